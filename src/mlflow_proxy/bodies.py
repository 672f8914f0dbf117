"""Step 5 of a request's way, as far as bodies go: collected whole, since they are hashed, and never without bounds.

One request may hold up to a limit (413), all requests of a worker together up to a budget (503), and a caller may not
take for ever (408). Each byte is held once, in memory that goes back to the system as soon as the body is released.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Awaitable, Callable

from mlflow_proxy.deadlines import Deadlines, Timeout
from mlflow_proxy.errors import Refusal
from mlflow_proxy.requests import Request
from mlflow_proxy.settings import Server

# Gives the next piece of a body, and nothing at its end.
Receive = Callable[[], Awaitable[bytes]]

# Below this, a caller is not slow but stalling: the deadline grows by a second for each of these.
SLOWEST_RATE = 16 * 1024
# What a body grows by: as much as it has, between these.
_LEAST_BLOCK, _LARGEST_BLOCK = 64 * 1024, 1 << 20


class Body:
    """A request's body. It counts in its worker's budget until `release`, after which it is empty.

    What arrives first stays as it came. Further bytes are copied into blocks outside the interpreter's heap: pieces of
    many sizes would leave gaps there in which nothing else fits, and the process would keep twice the budget.
    """

    __slots__ = ("_block", "_bodies", "pieces", "size")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._block: mmap.mmap | None = None
        self.pieces: list[bytes | memoryview] = []
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def start(self, most: int) -> bytes:
        """Its first `most` bytes, or all if it has fewer, in one piece."""
        first = self.pieces[0] if self.pieces else b""
        if isinstance(first, bytes) and len(first) == self.size <= most:
            return first
        parts: list[bytes | memoryview] = []
        for piece in self.pieces:
            parts.append(piece[:most])
            most -= len(parts[-1])
        return b"".join(parts)

    def add(self, data: bytes) -> None:
        """Count and keep further bytes. Raises Refusal 503 if there is no room for them."""
        self._bodies.reserve(len(data))
        self.size += len(data)
        if not self.pieces:
            self.pieces.append(data)
            return
        rest = memoryview(data)
        while rest:
            if self._block is None or self._block.tell() == len(self._block):
                self._block = _block(min(max(_LEAST_BLOCK, self.size), _LARGEST_BLOCK))
                self.pieces.append(b"")
            rest = rest[self._block.write(rest[: len(self._block) - self._block.tell()]) :]
            self.pieces[-1] = memoryview(self._block)[: self._block.tell()]

    def release(self) -> None:
        """It is no longer needed. What still refers to its pieces, as the frames of a failure may, loses them."""
        self._bodies.held -= self.size
        self.size = 0
        self.pieces.clear()
        self._block = None


class Bodies:
    """The request bodies that one worker holds; `held` is their bytes."""

    def __init__(self, server: Server, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._limit = int(server.body_limit)
        self._budget = int(server.body_budget)
        self._timeout = server.body_timeout
        self.held = 0
        self.none = Body(self)  # of requests without one

    async def collect(self, request: Request, receive: Receive, *, limit: int | None = None) -> Body:
        """The whole body, up to `limit` bytes (None: the configured limit). It counts until it is released.

        Raises Refusal 413, 503 or 408, and CallerGone; then nothing stays counted.
        """
        declared = request.content_length
        limit = self._limit if limit is None else limit
        if declared is not None and declared > limit:
            raise self._too_large(limit)
        body = Body(self)
        try:
            with Timeout(self._deadlines, self._timeout) as deadline:
                started = time.monotonic()
                while chunk := await receive():
                    if len(body) + len(chunk) > limit:
                        raise self._too_large(limit)
                    body.add(chunk)  # counts what has arrived: a stated length costs its sender nothing
                    if len(body) == declared:
                        break
                    whole = started + self._timeout + len(body) / SLOWEST_RATE - time.monotonic()
                    deadline.extend(min(self._timeout, whole))
        except TimeoutError:
            body.release()
            raise Refusal(
                408, f"The body did not arrive in time (server.body_timeout, {self._timeout:g} s).", close=True
            ) from None
        except BaseException:
            body.release()
            raise
        return body

    def reserve(self, size: int) -> None:
        """Count `size` bytes that have arrived. Raises Refusal 503 if there is no room for them."""
        if self.held + size > self._budget:
            raise _full()
        self.held += size

    def _too_large(self, limit: int) -> Refusal:
        option = " (server.body_limit)" if limit == self._limit else ""
        return Refusal(413, f"The body is larger than {limit} bytes{option}. Send smaller batches.", close=True)


def _block(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError):
        raise _full() from None


def _full() -> Refusal:
    return Refusal(
        503,
        "The proxy holds as many request bodies as it may (server.body_budget). Try again in a second.",
        retry_after=1,
        close=True,
    )
