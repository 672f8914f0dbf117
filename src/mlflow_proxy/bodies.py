"""Step 5 of a request's way, as far as bodies go: collected whole, since they are hashed, and never without bounds.

One request may hold up to a limit (413), all requests of a worker together up to a budget (503), and a caller may not
take for ever (408).
"""

from __future__ import annotations

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


# Chunks below this are gathered: kept singly, each would cost more memory than the bytes that the budget counts.
SMALL_CHUNK = 4096


class Bodies:
    """The request bodies that one worker holds."""

    def __init__(self, server: Server, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._limit = int(server.body_limit)
        self._budget = int(server.body_budget)
        self._timeout = server.body_timeout
        self.held = 0

    async def collect(self, request: Request, receive: Receive, *, limit: int | None = None) -> bytes:
        """The whole body, up to `limit` bytes (None: the configured limit). It counts until `release` is called with
        its length.

        Raises Refusal 413, 503 or 408, and CallerGone; then nothing stays counted.
        """
        declared = request.content_length
        limit = self._limit if limit is None else limit
        if declared is not None and declared > limit:
            raise self._too_large(limit)
        chunks: list[bytes | bytearray] = []
        size = 0
        reserved = 0
        try:
            with Timeout(self._deadlines, self._timeout) as deadline:
                started = time.monotonic()
                while True:
                    chunk = await receive()
                    if not chunk:
                        break
                    size += len(chunk)
                    if size > limit:
                        raise self._too_large(limit)
                    if size > reserved:  # as bytes arrive: a stated length costs its sender nothing
                        reserved += self._reserve(size - reserved)
                    _keep(chunks, chunk)
                    if size == declared:
                        break
                    whole = started + self._timeout + size / SLOWEST_RATE - time.monotonic()
                    deadline.extend(min(self._timeout, whole))
        except TimeoutError:
            self.held -= reserved
            raise Refusal(
                408, f"The body did not arrive in time (server.body_timeout, {self._timeout:g} s).", close=True
            ) from None
        except BaseException:
            self.held -= reserved
            raise
        self.held -= reserved - size
        return bytes(chunks[0]) if len(chunks) == 1 else b"".join(chunks)

    def release(self, size: int) -> None:
        """A body of `size` bytes is no longer needed."""
        self.held -= size

    def _too_large(self, limit: int) -> Refusal:
        option = " (server.body_limit)" if limit == self._limit else ""
        return Refusal(413, f"The body is larger than {limit} bytes{option}. Send smaller batches.", close=True)

    def _reserve(self, size: int) -> int:
        if self.held + size > self._budget:
            raise Refusal(
                503,
                "The proxy holds as many request bodies as it may (server.body_budget). Try again in a second.",
                retry_after=1,
                close=True,
            )
        self.held += size
        return size


def _keep(chunks: list[bytes | bytearray], chunk: bytes) -> None:
    if chunks and len(chunk) < SMALL_CHUNK:
        if not isinstance(chunks[-1], bytearray):
            chunks.append(bytearray())
        chunks[-1] += chunk
    else:
        chunks.append(chunk)
