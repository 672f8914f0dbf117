"""HTTP/1.1 and 1.0 with one caller over one connection: bytes in, bytes out. What is answered is decided elsewhere.

llhttp (through httptools) parses; this module keeps what is around it: which bytes belong to which request, the order
of answers, how bodies are framed, backpressure both ways, and how a connection ends. A request that is not plainly well
framed is never acted upon: it carries its refusal, nothing after it is served, and the connection ends.

The protocol's sources: RFC 9112 (framing), RFC 9110 section 10.1.1 (Expect) and 9.3.2 (HEAD).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast

import httptools

from mlflow_proxy import kernel_buffers
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal

Headers = list[tuple[bytes, bytes]]

# Of a body that nobody has asked for yet, and of an answer that the caller has not taken yet, so much is kept, and what
# came or was sent last, which is a quarter of a MiB at the most.
HIGH_WATER = 16 * 1024
LOW_WATER = 4 * 1024
# What all connections of a worker together keep at the most of unfinished heads, and of bodies nobody has asked for.
_MOST_UNASKED = 64 << 20
# Requests that may wait behind the one under way (pipelining).
_MOST_WAITING = 64
# A caller that takes its answer more slowly than this, for a whole window, is cut off.
LEAST_RATE = 1024
# A refused caller may still be sending: so long, and so much, is thrown away before the connection is closed, for the
# kernel resets a connection that is closed with bytes unread, and then the answer may be lost.
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 4 << 20
# Seconds for the end of TLS on an unused connection.
_FAREWELL = 0.3
# Seconds that a caller gets for TLS's handshake, and for taking the rest of the last answer.
HANDSHAKE_SECONDS = 10.0
# Of a head that is too large, what is said first.
_SLACK = 1024

# SO_LINGER that makes the kernel send RST, not FIN.
_AT_ONCE = struct.pack("ii", 1, 0)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_NO_BODY = frozenset({204, 304})
# Where Python has the words of an older RFC than 9110.
_PHRASES = {413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"}


class CallerGone(Exception):
    """The caller closed the connection; nobody waits for an answer."""


class SlowReader(TimeoutError):
    """The caller takes its answer too slowly, or not at all."""


class Call:
    """One request of a caller, and the way to answer it.

    `headers` have lower-case names. `problem`: the request must be refused with it, and its other fields may be empty.
    `content_length` is None for a chunked body. `complete`: all of the body has arrived. `keep`: the connection may
    serve another request; who answers may forbid it. `gone`: the caller has closed the connection; then the task that
    answers is cancelled.
    """

    __slots__ = (
        "_buffered",
        "_chunked",
        "_chunks",
        "_connection",
        "_left",
        "_waiter",
        "awaits_continue",
        "begun",
        "complete",
        "content_length",
        "ended",
        "gone",
        "has_body",
        "headers",
        "http11",
        "keep",
        "method",
        "path",
        "problem",
        "query",
        "task",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.method = ""
        self.path = self.query = b""
        self.headers: Headers = []
        self.http11 = True
        self.has_body = False
        self.content_length: int | None = None
        self.problem: Refusal | None = None
        self.complete = False
        self.awaits_continue = False
        self.keep = True
        self.begun = self.ended = self.gone = False
        self.task: asyncio.Task[None] | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self._chunked = False
        self._left: int | None = None

    @property
    def is_read(self) -> bool:
        """Somebody waits for the body's next piece, and takes it at once."""
        return self._waiter is not None

    @property
    def peer(self) -> str:
        """The address that the connection comes from."""
        return self._connection.peer

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return self._connection.scheme

    async def receive(self) -> bytes:
        """The next piece of the body; empty at its end. Raises CallerGone, and Refusal for what is no body."""
        while not self._chunks:
            if self.problem is not None:
                raise self.problem
            if self.gone:
                raise CallerGone
            if self.complete:
                return b""
            if self.awaits_continue:
                self.awaits_continue = False
                self._connection.write(_CONTINUE)
            self._waiter = self._connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = self._chunks.popleft()
        self._count(-len(data))
        self._connection.resume_reading()
        return data

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        if self._begin(status, headers, body):
            self.end()

    def begin(self, status: int, headers: Headers) -> None:
        """Send the head of an answer whose body comes piece by piece."""
        self._begin(status, headers, None)

    async def send(self, data: bytes) -> None:
        """Send a piece of the body; waits while the caller is behind. Raises CallerGone and SlowReader."""
        if self.gone:
            raise CallerGone
        if not data or self._left == 0:
            return
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ValueError("the body is longer than its Content-Length")
        if self._chunked:
            self._connection.write(b"".join((b"%x\r\n" % len(data), data, b"\r\n")))
        else:
            self._connection.write(data)
        await self._connection.drain()

    def end(self) -> None:
        """The answer is whole."""
        if self.ended:
            return
        if self._left:
            self.cut()  # a clean end would make the caller take it for whole
            return
        self.ended = True
        self.forget()
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self._connection.answered(self)

    async def taken(self) -> None:
        """Wait until the caller has taken all but a little of what was sent, or is gone. Raises SlowReader."""
        await self._connection.caught_up()

    def cut(self) -> None:
        """The answer cannot be finished: the caller must see that."""
        self.ended = True
        self.forget()
        if self.begun and self._left is None and not self._chunked:
            self._connection.reset()
        else:
            self._connection.abort()

    def _begin(self, status: int, headers: Headers, body: bytes | None) -> bool:
        self.begun = True
        parts = [_status_line(status)]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        names = dict(headers)
        length = int(names[b"content-length"]) if b"content-length" in names else None
        bodiless = self.method == "HEAD" or status in _NO_BODY
        if length is None and not bodiless:
            if body is not None:
                parts.append(b"content-length: %d\r\n" % len(body))
            elif self.http11:
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep = False
        self._left = 0 if bodiless else length if body is None else None
        if not self.complete or self._connection.leaving:
            self.keep = False
        if b"date" not in names:
            parts.append(_date_line(int(time.time())))
        if not self.keep:
            parts.append(b"connection: close\r\n")
        elif not self.http11:
            parts.append(b"connection: keep-alive\r\n")
        parts.append(b"\r\n")
        if body and not bodiless:
            parts.append(body)
        self._connection.write(b"".join(parts))
        return body is not None

    # What the connection tells

    def add(self, data: bytes) -> int:
        """Keep a piece of the body; gives how much is kept."""
        self._chunks.append(data)
        self._count(len(data))
        self.wake()
        return self._buffered

    def forget(self) -> None:
        """Nobody will ask for the rest of the body."""
        if self._chunks:
            self._chunks.clear()
            self._count(-self._buffered)

    def _count(self, size: int) -> None:
        self._buffered += size
        self._connection.unasked.held += size

    def wake(self) -> None:
        """Let the one who waits for the body look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def lose(self) -> None:
        """The caller is gone."""
        self.gone = True
        self.forget()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        elif self.task is not None and not self.ended:
            self.task.cancel()


class Unasked:
    """The bytes that a worker's connections hold though nobody has asked for them yet: unfinished heads, and bodies."""

    __slots__ = ("_most", "held")

    def __init__(self, most: int = _MOST_UNASKED) -> None:
        self._most = most
        self.held = 0

    @property
    def too_many(self) -> bool:
        """There is no room for more."""
        return self.held > self._most


@dataclass(frozen=True, slots=True)
class Terms:
    """What the connections of a worker are held to. Sizes in bytes, times in seconds.

    `unused`: to the first byte, and between an answer and the next request's head. `head`: from the first byte of a
    head to its end. `window`: over which a reader has to take `LEAST_RATE`.
    """

    head_limit: int
    unused: float
    head: float
    window: float
    most_headers: int = 1000
    unasked: Unasked = field(default_factory=Unasked)


Serve = Callable[[Call], Coroutine[Any, Any, None]]


class Connection(asyncio.Protocol):
    """One caller's connection. `serve` answers each of its requests, one after the other."""

    __slots__ = (
        "_call",
        "_deadlines",
        "_drained",
        "_ending",
        "_head_bytes",
        "_head_counted",
        "_head_done",
        "_held",
        "_lingering",
        "_lost",
        "_parser",
        "_reading_paused",
        "_resuming",
        "_serve",
        "_terms",
        "_transport",
        "_upgrades",
        "_url",
        "_waiting",
        "leaving",
        "loop",
        "peer",
        "scheme",
        "unasked",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deadlines: Deadlines,
        terms: Terms,
        serve: Serve,
        lost: Callable[[Connection], None],
    ) -> None:
        self.loop = loop
        self.peer = ""
        self.scheme = "http"
        self.leaving = self._ending = False
        self._deadlines = deadlines
        self._terms = terms
        self.unasked = terms.unasked
        self._serve = serve
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._call: Call | None = None  # whose answer is due
        self._waiting: deque[Call] = deque()  # behind it
        self._held: Call | None = None  # whose bytes arrive
        self._url = b""
        self._head_bytes = self._head_counted = 0
        self._head_done = self._upgrades = self._resuming = False
        self._drained: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._lingering: int | None = None

    @property
    def idle(self) -> bool:
        """No request is under way, and none has begun to arrive."""
        return self._call is None and self._held is None

    # What calls and the listener use

    def write(self, data: bytes) -> None:
        """Send; nothing happens if the caller is gone."""
        if self._transport is not None:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait while the caller is too far behind. Raises CallerGone and SlowReader."""
        await self.caught_up()
        if self._transport is None:
            raise CallerGone

    async def caught_up(self) -> None:
        """Wait while the caller is too far behind, and there. Raises SlowReader."""
        if self._drained is not None:
            await self._drained

    def resume_reading(self) -> None:
        """A piece of a body was taken: there is room for more."""
        if self._reading_paused and not self._waiting and self._transport is not None:
            held = self._held
            if held is None or held._buffered <= LOW_WATER:
                self._reading_paused = False
                self._transport.resume_reading()

    def answered(self, call: Call) -> None:
        """The answer to `call` is whole: the next request's turn, or the connection's end."""
        if call is not self._call:
            return
        self._call = None
        if not call.keep or not call.complete or (self._ending and not self._waiting):
            unread = self._reading_paused or bool(self._waiting) or call.problem is not None
            self._close(unread=unread or not call.complete)
        elif self._waiting:
            self._begin(self._waiting.popleft())
            self.resume_reading()
        else:
            self.resume_reading()
            if self._held is None:
                self._deadlines.set(self, self._terms.unused, self._end_unused)
            else:
                self._deadlines.set(self, self._terms.head, self._end_head)

    def leave(self) -> None:
        """Serve no further request after those that are on their way."""
        self.leaving = True

    def end(self) -> None:
        """Close now, if the connection is unused, else after the answers that are due."""
        self._ending = True
        if self.idle:
            self._close(unread=False)
            self._deadlines.set(self, _FAREWELL, self.abort)  # TLS waits for the caller's farewell, which may not come

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """Close at once, in a way that cannot be taken for the regular end of an answer without length."""
        transport = self._transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            transport.abort()

    # How a connection ends

    def _close(self, *, unread: bool) -> None:
        transport = self._transport
        if transport is None:
            return
        self._parser = None
        self._deadlines.set(self, _LINGER_SECONDS if unread else HANDSHAKE_SECONDS, self.abort)
        if not unread:
            transport.close()
            return
        self._lingering = 0
        self._forget_waiting()
        if transport.can_write_eof():
            transport.write_eof()
        if self._reading_paused:
            self._reading_paused = False
            transport.resume_reading()

    def _end_unused(self) -> None:
        self._close(unread=False)

    def _end_head(self) -> None:
        self._refuse(Refusal(408, "The headers did not arrive in time (server.header_timeout).", close=True))

    def _check_reader(self, behind: int) -> None:
        transport, drained = self._transport, self._drained
        if transport is None or drained is None:
            return
        now_behind = transport.get_write_buffer_size()
        if behind - now_behind < LEAST_RATE * self._terms.window:
            if not drained.done():
                drained.set_exception(SlowReader())
                drained.exception()  # nobody may be waiting
            transport.abort()
            return
        self._watch_reader(now_behind)

    def _watch_reader(self, behind: int) -> None:
        self._deadlines.set((self, "reader"), self._terms.window, lambda: self._check_reader(behind))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER, low=LOW_WATER)
        kernel_buffers.keep_small(transport)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if peer else ""
        if transport.get_extra_info("sslcontext") is not None:
            self.scheme = "https"
        self._parser = httptools.HttpRequestParser(self)
        self._deadlines.set(self, self._terms.unused, self._end_unused)

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by the event loop: closed, by whichever side."""
        self._transport = None
        self._parser = None
        self._deadlines.clear(self)
        self._deadlines.clear((self, "reader"))
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._count_head(0)
        call, self._call = self._call, None
        self._forget_waiting()
        if call is not None:
            call.lose()
        self._lost(self)

    def pause_writing(self) -> None:
        """Called by the event loop: the caller is behind."""
        self._drained = self.loop.create_future()
        if self._transport is not None:
            self._watch_reader(self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Called by the event loop: the caller has caught up."""
        self._deadlines.clear((self, "reader"))
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._parser is None:
            self._throw_away(data)
            return
        begins = self._held is None
        if begins or not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserInvalidMethodError as error:
            known = begins and _METHOD.match(data)
            self._refuse(_unknown_method() if known else _broken(error, in_body=False))
        except httptools.HttpParserError as error:
            self._refuse(_broken(error, in_body=self._held is not None and self._head_done))
        else:
            if self._held is not None and not self._head_done:
                self._count_head(self._head_bytes)
                if self._head_bytes > self._terms.head_limit:
                    self._refuse(_too_large(self._url, self._terms.head_limit))
                elif self.unasked.too_many:
                    self._refuse(_no_room())
                elif begins and self._call is None:
                    self._deadlines.set(self, self._terms.head, self._end_head)

    def _forget_waiting(self) -> None:
        for call in self._waiting:
            call.forget()
        self._waiting.clear()

    def _count_head(self, size: int) -> None:
        self.unasked.held += size - self._head_counted
        self._head_counted = size

    def _throw_away(self, data: bytes) -> None:
        if self._lingering is not None:
            self._lingering += len(data)
            if self._lingering > _LINGER_BYTES:
                self.abort()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Nobody here speaks another protocol, so the request counts as if it had not asked (RFC 9110 section 7.8).

        llhttp stops there; another parser reads on, and is told first of the body that belongs to the request.
        """
        call = self._held
        self._upgrades = False
        if call is None or call.method == "CONNECT":
            self._parser = None
            return
        framing = [b"%b: %b\r\n" % pair for pair in call.headers if pair[0] in _FRAMING]
        self._parser = httptools.HttpRequestParser(self)
        self._resuming = True
        try:
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
        finally:
            self._resuming = False
        if rest and self._parser is not None:
            self.data_received(rest)

    def _refuse(self, refusal: Refusal) -> None:
        """Nothing more of this connection can be understood: answer what is due, then `refusal`, then close."""
        self._parser = None
        self._deadlines.clear(self)
        self._count_head(0)
        call, self._held = self._held, None
        if call is not None and self._head_done:  # its body is broken
            call.problem = call.problem or refusal
            call.keep = False
            call.wake()
            return
        call = call or Call(self)
        call.problem = refusal
        call.keep = False
        self._arrived(call)

    # httptools' callbacks

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._resuming:
            return
        if len(self._waiting) >= _MOST_WAITING:
            raise ValueError("too many requests at once")
        self._held = Call(self)
        self._head_done = False
        self._url = b""

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line; trailers, which come after the head, are dropped."""
        if not self._head_done and self._held is not None and len(self._held.headers) <= self._terms.most_headers:
            self._held.headers.append((name.lower(), value.rstrip(b" \t")))  # RFC 9110 section 5.5

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._resuming:
            return
        call, parser = self._held, self._parser
        if call is None:
            return
        self._head_done = True
        self._head_bytes = 0
        if self._head_counted:
            self._count_head(0)
        self._upgrades = parser.should_upgrade()
        call.method = parser.get_method().decode("ascii")
        call.keep = parser.should_keep_alive() or self._upgrades
        _read_head(call, self._url, parser.get_http_version())
        self._arrived(call)

    def _arrived(self, call: Call) -> None:
        if self._call is None:
            self._begin(call)
        else:
            self._waiting.append(call)
            if not self._reading_paused and self._transport is not None:
                self._reading_paused = True
                self._transport.pause_reading()

    def _begin(self, call: Call) -> None:
        self._deadlines.clear(self)
        self._call = call
        call.task = self.loop.create_task(self._run(call))

    async def _run(self, call: Call) -> None:
        try:
            if self._drained is not None:  # answers before this one are not taken yet
                await self.caught_up()
            await self._serve(call)
        except SlowReader:
            pass  # the connection is gone
        finally:
            if not call.ended:  # it failed, or what it sent is not whole
                call.cut()

    def on_body(self, data: bytes) -> None:
        """A piece of the body, with chunked framing removed."""
        call = self._held
        if call is None or call.ended or call.problem is not None:
            return
        kept = call.add(data)
        no_room = self.unasked.too_many and not call.is_read
        if no_room:
            call.problem = _no_room()
            call.keep = False
            call.forget()
        if (no_room or kept > HIGH_WATER) and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._upgrades:  # it is not, but llhttp reads no body after an upgrade
            return
        call, self._held = self._held, None
        if call is not None:
            call.complete = True
            call.wake()


_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_METHOD = re.compile(rb"[A-Za-z]{1,32} /")


def _read_head(call: Call, url: bytes, version: str) -> None:
    """What llhttp leaves to its user: the form of the target, and framing that servers read in different ways."""
    call.http11 = version == "1.1"
    if version not in ("1.1", "1.0"):
        call.problem = Refusal(400, f"HTTP/{version} is not spoken here, but HTTP/1.1 is.", close=True)
        return
    length, codings, expects = None, [], False
    for name, value in call.headers:
        if name == b"content-length":
            length = value
        elif name == b"transfer-encoding":
            codings.append(value)
        elif name == b"expect":
            expects = value.strip().lower() == b"100-continue"
    if codings:
        call.has_body = True
        if not call.http11:
            call.problem = Refusal(400, "HTTP/1.0 has no Transfer-Encoding.", close=True)
        elif length is not None:
            call.problem = Refusal(400, "A request has Content-Length or Transfer-Encoding, not both.", close=True)
        elif [value.strip().lower() for value in codings] != [b"chunked"]:  # anything else nobody would undo
            call.problem = Refusal(501, "Transfer-Encoding may be 'chunked' once, and nothing else.", close=True)
    elif length is not None:
        call.content_length = int(length)
        call.has_body = call.content_length > 0
    call.awaits_continue = expects and call.has_body and call.http11
    if not url.startswith(b"/"):
        url = _without_authority(url)
    call.path, _, call.query = url.partition(b"?")
    if call.problem is not None:
        call.keep = False


def _without_authority(url: bytes) -> bytes:
    """Path and query of a target in absolute form, whose host the Host header repeats (RFC 9112 section 3.2.2)."""
    scheme, _, rest = url.partition(b"://")
    if scheme.lower() not in (b"http", b"https"):
        return url
    for position, byte in enumerate(rest):
        if byte == 0x2F:
            return rest[position:]
        if byte == 0x3F:
            return b"/" + rest[position:]
    return b"/"


def _no_room() -> Refusal:
    return Refusal(503, "Too many requests arrive at once. Try again in a second.", retry_after=1, close=True)


def _unknown_method() -> Refusal:
    return Refusal(501, "The method is not one that MLflow has.", close=True)


def _broken(error: httptools.HttpParserError, *, in_body: bool) -> Refusal:
    if in_body:
        words = "The body is not what its framing says: Content-Length, or chunked coding, does not fit it."
    else:
        words = "The request is not valid HTTP/1.1."
    return Refusal(400, words, close=True, detail=f"{words} ({error})")


def _too_large(url: bytes, limit: int) -> Refusal:
    if len(url) > limit // 2:
        return Refusal(414, "The URL is longer than server.url_limit.", close=True)
    return Refusal(431, "The headers are larger than server.header_limit.", close=True)


@lru_cache(maxsize=128)
def _status_line(status: int) -> bytes:
    phrase = _PHRASES.get(status, "")
    if not phrase:
        with contextlib.suppress(ValueError):
            phrase = HTTPStatus(status).phrase
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


@lru_cache(maxsize=1)
def _date_line(second: int) -> bytes:
    return f"date: {formatdate(second, usegmt=True)}\r\n".encode("ascii")
