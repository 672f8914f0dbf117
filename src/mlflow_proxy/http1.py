"""HTTP/1.1 to one upstream over one connection: bytes in, bytes out, one exchange at a time. No policy.

llhttp (through httptools) parses; this module keeps the state around it: what belongs to which exchange, when a body
ends, whether the connection may serve again, and backpressure. Which connection to use, how long to wait and what to
repeat is decided in `upstream`.

The protocol's sources: RFC 9112 (framing), RFC 9110 section 15.2 (interim answers) and 9.3.2 (HEAD).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol, cast

import httptools

from mlflow_proxy import kernel_buffers
from mlflow_proxy.deadlines import Deadlines

# A reader that falls this far behind stops the socket from being read, so that a worker's memory stays flat. What is
# read once more before is a quarter of a MiB at the most.
HIGH_WATER = 8 * 1024
# Bodies up to this size travel with the head in one write; larger ones in slices, each with a deadline.
SLICE = 256 * 1024
# An answer whose headers are larger than this is broken, or an attack on this worker's memory.
HEAD_LIMIT = 256 * 1024
# A read of this size tells a body that is worth being taken past the parser.
_LARGE_READ = 64 * 1024


class UpstreamError(Exception):
    """An exchange that came to nothing. `begun`: the answer had begun, so the request was surely received.

    `words` are our own, and fit for callers; `detail` is what others said (the system, TLS, the upstream), for the log.
    """

    def __init__(self, words: str, *, begun: bool = False, detail: str = "") -> None:
        super().__init__(f"{words} ({detail})" if detail else words)
        self.words = words
        self.begun = begun


class NotSent(UpstreamError):
    """Nothing of the request was sent, so it may be repeated whatever its method."""


class Disconnected(UpstreamError):
    """The upstream closed or reset the connection before the answer was whole."""


class BrokenAnswer(UpstreamError):
    """The upstream's bytes are not HTTP, or not a whole answer to one request."""


class AnswerTimeout(UpstreamError):
    """The upstream sent nothing for as long as a deadline allows."""


class _Parser(Protocol):
    def feed_data(self, data: bytes) -> None: ...
    def get_status_code(self) -> int: ...
    def should_keep_alive(self) -> bool: ...


class Connection(asyncio.Protocol):
    """One connection. `exchange` sends a request and returns when the answer's head is there; `read` gives its body."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deadlines: Deadlines) -> None:
        self._loop = loop
        self._deadlines = deadlines
        self._wait_for = ("", 0.0)
        self._transport: asyncio.Transport | None = None
        self._parser: _Parser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._reading_paused = False
        self.idle_since = 0.0
        self._reset(head_request=False)
        self.complete = True  # no exchange under way

    def _reset(self, *, head_request: bool) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self._head_request = head_request
        self._head_done = False
        self._head_bytes = 0
        self._keep_alive = False
        self._surplus = False
        self._half_sent = False
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._received = 0
        self._unparsed = 0
        self._error: UpstreamError | None = None

    # What the pool and the sender use

    @property
    def reusable(self) -> bool:
        """Whether the next exchange may use this connection: the last answer was whole and nothing followed it."""
        transport = self._transport
        return (
            self.complete
            and self._keep_alive
            and not self._surplus
            and not self._half_sent
            and transport is not None
            and not transport.is_closing()
        )

    @property
    def drained(self) -> bool:
        """The answer is whole and all of it has been read."""
        return self.complete and not self._chunks

    @property
    def ready(self) -> bool:
        """`read` need not wait: some of the body has arrived, or all of the answer."""
        return self.complete or bool(self._chunks)

    async def exchange(
        self,
        head: bytes,
        body: Sequence[bytes | memoryview],
        *,
        head_request: bool,
        first_byte: float,
        between: float,
    ) -> None:
        """Send a request; returns when status and headers of the final answer are in `status` and `headers`.

        `head` ends with the empty line. Deadlines in seconds: `first_byte` from the sent request to the answer,
        `between` for each slice of a large body. Raises UpstreamError.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise NotSent("the connection was closed before the request was sent")
        self._reset(head_request=head_request)
        if self._parser is None:
            self._parser = cast(_Parser, httptools.HttpResponseParser(self))
        if not body:
            transport.write(head)
        elif len(body) == 1 and len(body[0]) <= SLICE:
            transport.write(b"".join((head, body[0])))
        else:
            transport.write(head)
            await self._write_slices(transport, body, between)
        if not self._head_done and self._error is None:
            self._waiter = self._loop.create_future()
            await self._wait(first_byte, "no answer", self._waiter)
        if self._error is not None and not self._head_done:
            raise self._error

    async def read(self, between: float) -> bytes | None:
        """What has arrived of the body since the last call, at least one byte; None at its end. Raises UpstreamError.

        `between` is the longest pause of the upstream, in seconds.
        """
        while not self._chunks:
            if self.complete:
                return None
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            await self._wait(between, "no further data", self._waiter)
        if len(self._chunks) == 1 or len(self._chunks[0]) >= SLICE // 4:
            data = self._chunks.popleft()  # large enough to be worth a send of its own, and a copy less
        else:
            data = b"".join(self._chunks)
            self._chunks.clear()
        self._buffered -= len(data)
        self._resume_if_low()
        return data

    def take(self) -> bytes:
        """All that is left of a complete answer; no waiting."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        self._resume_if_low()
        return data

    def abort(self) -> None:
        """Close at once; an exchange under way ends with an error."""
        if self._transport is not None:
            self._transport.abort()

    # What waits

    async def _wait(self, seconds: float, what: str, future: asyncio.Future[None]) -> None:
        self._wait_for = (what, seconds)
        self._deadlines.set(self, seconds, self._expire)
        try:
            await future
        finally:
            self._deadlines.clear(self)

    def _expire(self) -> None:
        self._fail(AnswerTimeout("{} within {:g} s".format(*self._wait_for), begun=self._head_done))
        self.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._drained is not None and not self._drained.done():  # the answer is there before the body was sent
            self._drained.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        if not self.complete and self._error is None:
            self._error = error
        self._wake()

    async def _write_slices(
        self, transport: asyncio.Transport, body: Sequence[bytes | memoryview], between: float
    ) -> None:
        """Send a large body slice by slice; stops early when the upstream answers before it has all (RFC 9112 9.3)."""
        for piece in body:
            for start in range(0, len(piece), SLICE):
                if self._head_done or self._error is not None:
                    self._half_sent = True
                    return
                transport.write(memoryview(piece)[start : start + SLICE])
                if self._drained is not None:
                    await self._wait(between, "no room for more of the body", self._drained)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=SLICE)
        kernel_buffers.keep_small(transport)

    def pause_writing(self) -> None:
        """Called by the event loop: the socket takes no more for now."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """Called by the event loop."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._unparsed:
            self._take_unparsed(data)
            return
        if self.complete or self._parser is None:  # nobody asked: whatever this is, it must not become an answer
            self._surplus = True
            self.abort()
            return
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BrokenAnswer("not a valid HTTP answer", begun=True, detail=str(error)))
            self.abort()
            return
        if not self._head_done and self._head_bytes > HEAD_LIMIT:
            self._fail(BrokenAnswer(f"its headers are larger than {HEAD_LIMIT} bytes", begun=True))
            self.abort()
            return
        if self._head_done:
            if not self.complete and len(data) >= _LARGE_READ:
                self._stop_parsing()
            self._wake()
        self._pause_if_full()

    def _stop_parsing(self) -> None:
        """The rest of a large body of known length needs no parser, only counting: a copy less for each byte."""
        declared = next((int(value) for name, value in self.headers if name.lower() == b"content-length"), 0)
        if declared - self._received > _LARGE_READ and self._parser is not None:
            self._unparsed = declared - self._received
            self._keep_alive = self._parser.should_keep_alive()
            self._parser = None

    def _take_unparsed(self, data: bytes) -> None:
        if len(data) > self._unparsed:
            data = data[: self._unparsed]
            self._surplus = True
        self._unparsed -= len(data)
        self._chunks.append(data)
        self._buffered += len(data)
        self.complete = not self._unparsed
        self._wake()
        self._pause_if_full()

    def _resume_if_low(self) -> None:
        if self._reading_paused and self._buffered <= HIGH_WATER and self._transport is not None:
            self._reading_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _pause_if_full(self) -> None:
        if self._buffered > HIGH_WATER and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop: closed, by whichever side."""
        self._transport = None
        self._keep_alive = False
        if self.complete:
            return
        if error is None and self._head_done and not self._framed():
            self.complete = True  # an answer without length ends with the connection (RFC 9112 section 6.3)
            self._wake()
            return
        reason = str(error) if error else ""
        if self._head_done:
            closed = "the connection was closed in the middle of the answer"
            self._fail(BrokenAnswer(closed, begun=True, detail=reason))
        else:
            closed = "the connection was closed without an answer"
            self._fail(Disconnected(closed, begun=self._head_bytes > 0, detail=reason))

    def _framed(self) -> bool:
        return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    # httptools' callbacks

    def on_message_begin(self) -> None:
        """A second answer to one request: nothing of it may reach anybody."""
        if self.complete:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line; trailers, which come after the head, are dropped."""
        if self._surplus or self._head_done:
            return
        if len(name) == 17 and name.lower() == b"transfer-encoding" and value.strip().lower() != b"chunked":
            raise ValueError("a transfer coding that was not asked for")  # nobody would undo it (RFC 9112 section 7)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole, unless it is an interim one, which is dropped."""
        parser = self._parser
        if self._surplus or parser is None:
            return
        status = parser.get_status_code()
        if status == 101:
            raise ValueError("it switched protocols unasked")
        if status < 200:
            return
        self.status = status
        self._head_done = True
        if self._head_request:  # llhttp does not know that no body follows, so this parser has done its work
            self._keep_alive = parser.should_keep_alive()
            self._parser = None
            self.complete = True

    def on_body(self, data: bytes) -> None:
        """A piece of the body, with chunked framing removed."""
        if self._surplus or self._head_request:
            self._surplus = True
            return
        self._chunks.append(data)
        self._buffered += len(data)
        self._received += len(data)

    def on_message_complete(self) -> None:
        """The answer is whole, or was an interim one."""
        if self._surplus or self._parser is None:
            return
        if not self._head_done:
            self.headers = []
            return
        self._keep_alive = self._parser.should_keep_alive()
        self.complete = True
