"""The callers' side of HTTP/1.1, over real sockets, before an application of the tests' own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import uvloop

from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.inbound.connection import Call, CallerGone, Connection, SlowReader, Terms, Unasked
from mlflow_proxy.inbound.listener import Listener

Scenario = Callable[["Server"], Awaitable[None]]
TERMS = Terms(head_limit=4096, unused=30, head=30, window=30)
GET = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Server:
    """A listener on a port of its own. Each request is noted, and answered by `answer`."""

    def __init__(self, terms: Terms, most: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.deadlines = Deadlines(self.loop)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        self.calls: list[Call] = []
        self.errors: list[BaseException] = []
        self.answer: Callable[[Call], Awaitable[None]] = echo
        self.listener = Listener(
            self.listening,
            connection=lambda lost: Connection(self.loop, self.deadlines, terms, self._serve, lost),
            most=most,
            tls=None,
        )
        self.listener.start()

    async def _serve(self, call: Call) -> None:
        self.calls.append(call)
        try:
            if call.problem is not None:
                call.keep = False
                call.respond(call.problem.status, [], call.problem.message.encode())
            else:
                await self.answer(call)
        except BaseException as error:
            self.errors.append(error)
            raise

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, data: bytes) -> bytes:
        """What comes back on a connection of its own until it is closed."""
        reader, writer = await self.connect()
        writer.write(data)
        answer = await reader.read()
        writer.close()
        return answer


async def echo(call: Call) -> None:
    pieces = []
    while data := await call.receive() if call.has_body else b"":
        pieces.append(data)
    call.respond(200, [], call.path + b"|" + b"".join(pieces))


def run(scenario: Scenario, terms: Terms = TERMS, most: int = 100) -> None:
    async def main() -> None:
        server = Server(terms, most)
        await asyncio.wait_for(scenario(server), 30)
        await server.listener.stop(1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # of many things, none of which tells
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_connection_is_kept_or_closed_as_asked(version: bytes) -> None:
    async def scenario(server: Server) -> None:
        reader, writer = await server.connect()
        for last in (False, True):
            connection = b"close" if last else b"keep-alive"
            writer.write(b"GET /x HTTP/%b\r\nHost: localhost\r\nConnection: %b\r\n\r\n" % (version, connection))
            head = await reader.readuntil(b"\r\n\r\n")
            assert (b"connection: close" in head) == last
            assert (b"connection: keep-alive" in head) == (version == b"1.0" and not last)
            assert await reader.readexactly(3) == b"/x|"
        assert await reader.read() == b""
        writer.close()

    run(scenario)


def test_pipelined_requests_wait_their_turn_and_no_more_than_some_of_them() -> None:
    async def scenario(server: Server) -> None:
        reader, writer = await server.connect()
        writer.write(b"".join(GET % b"/%d" % number for number in range(20)))
        for number in range(20):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(b"/%d|" % number)) == b"/%d|" % number
        writer.close()
        assert (await server.say((GET % b"/many") * 200)).count(b"/many|") < 100

    run(scenario)


def test_a_body_waits_in_the_kernel_until_it_is_asked_for() -> None:
    started = asyncio.Event()

    async def later(call: Call) -> None:
        await started.wait()
        await echo(call)

    async def scenario(server: Server) -> None:
        server.answer = later
        reader, writer = await server.connect()
        body = b"a" * (32 << 20)
        writer.write(b"PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await until(lambda: bool(server.calls))
        await asyncio.sleep(0.1)
        assert writer.transport.get_write_buffer_size() > 16 << 20
        started.set()
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head
        assert len(await reader.readexactly(len(body) + 3)) == len(body) + 3
        writer.close()

    run(scenario)


@pytest.mark.parametrize("half", [False, True], ids=["reset", "closed"])
def test_a_caller_that_leaves_ends_the_work(half: bool) -> None:
    async def endless(call: Call) -> None:
        await asyncio.sleep(60)

    async def scenario(server: Server) -> None:
        server.answer = endless
        _, writer = await server.connect()
        writer.write(GET % b"/x")
        await until(lambda: bool(server.calls))
        if half:
            writer.write_eof()
        else:
            writer.transport.abort()
        await until(lambda: bool(server.errors))
        assert isinstance(server.errors[0], asyncio.CancelledError)
        assert server.calls[0].gone
        writer.close()

    run(scenario)


def test_a_caller_that_leaves_in_its_body_is_gone() -> None:
    async def scenario(server: Server) -> None:
        _, writer = await server.connect()
        writer.write(b"PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc")
        await until(lambda: bool(server.calls))
        writer.close()
        await until(lambda: bool(server.errors))
        assert isinstance(server.errors[0], CallerGone)

    run(scenario)


def test_a_reader_that_takes_next_to_nothing_is_cut_off() -> None:
    async def large(call: Call) -> None:
        call.begin(200, [])
        while True:
            await call.send(b"a" * 65536)

    async def scenario(server: Server) -> None:
        server.answer = large
        reader, writer = await server.connect()
        writer.write(GET % b"/x")
        await reader.readexactly(100)
        cast(asyncio.Transport, writer.transport).pause_reading()
        await until(lambda: bool(server.errors))
        assert isinstance(server.errors[0], SlowReader)
        writer.close()

    run(scenario, Terms(head_limit=4096, unused=30, head=30, window=0.3))


def test_a_steady_reader_is_served_to_the_end() -> None:
    size = 8 << 20

    async def large(call: Call) -> None:
        call.begin(200, [(b"content-length", b"%d" % size)])
        for _ in range(size // 65536):
            await call.send(b"a" * 65536)
        call.end()

    async def scenario(server: Server) -> None:
        server.answer = large
        reader, writer = await server.connect()
        writer.write(GET % b"/x")
        await reader.readuntil(b"\r\n\r\n")
        left = size
        while left:
            left -= len(await reader.read(1 << 18))
            await asyncio.sleep(0.01)
        writer.close()
        assert not server.errors

    run(scenario, Terms(head_limit=4096, unused=30, head=30, window=0.2))


def test_answers_that_a_caller_does_not_take_keep_its_next_requests_waiting() -> None:
    """Else a caller that sends many requests and reads nothing would have all their answers kept for it."""
    body, count = b"a" * (1 << 20), 48

    async def large(call: Call) -> None:
        call.respond(200, [], body)

    async def scenario(server: Server) -> None:
        server.answer = large
        reader, writer = await server.connect()
        writer.write(GET % b"/x" * count)
        for taken in range(count):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(body)) == body
            assert len(server.calls) - taken < count // 2  # what the kernel holds, and little of ours
        assert len(server.calls) == count
        writer.close()

    run(scenario)


def test_an_answer_is_taken_when_the_caller_has_nearly_all_of_it() -> None:
    taken: list[bool] = []

    async def large(call: Call) -> None:
        call.respond(200, [], b"a" * (32 << 20))
        taken.append(False)
        await call.taken()
        taken.append(True)

    async def scenario(server: Server) -> None:
        server.answer = large
        reader, writer = await server.connect()
        writer.write(GET % b"/x")
        await reader.readuntil(b"\r\n\r\n")
        assert taken == [False]
        await reader.readexactly(32 << 20)
        await until(lambda: taken == [False, True])
        writer.close()

    run(scenario)


HALF = b"POST /x HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 3000


def test_unfinished_heads_of_all_connections_together_have_a_bound() -> None:
    terms = Terms(head_limit=4096, unused=30, head=30, window=30, unasked=Unasked(5000))

    async def scenario(server: Server) -> None:
        first, writer = await server.connect()
        writer.write(HALF)
        await until(lambda: terms.unasked.held == len(HALF))
        assert b" 503 " in await server.say(HALF)
        assert b" 200 " in await server.say(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % b"/x")
        writer.write(b"\r\nContent-Length: 0\r\n\r\n")
        assert (await first.readline()).split()[1] == b"200"
        writer.close()
        assert terms.unasked.held == 0

    run(scenario, terms)


@pytest.mark.parametrize("framing", [b"Content-Length: 4000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nfa0\r\n"])
def test_bodies_that_nobody_has_asked_for_have_a_bound_together(framing: bytes) -> None:
    terms = Terms(head_limit=4096, unused=30, head=30, window=30, unasked=Unasked(5000))
    asked = asyncio.Event()
    post = b"POST /x HTTP/1.1\r\nHost: localhost\r\n" + framing + b"a" * 3900

    async def patient(call: Call) -> None:
        await asked.wait()
        try:
            while await call.receive():
                pass
            call.respond(200, [], b"")
        except Refusal as refusal:
            call.respond(refusal.status, [], b"")

    async def scenario(server: Server) -> None:
        server.answer = patient
        first, writer = await server.connect()
        writer.write(post)
        await until(lambda: terms.unasked.held == 3900)
        second, other = await server.connect()
        other.write(post)
        await until(lambda: len(server.calls) == 2 and server.calls[1].problem is not None)
        assert terms.unasked.held == 3900
        asked.set()
        assert (await second.readline()).split()[1] == b"503"
        writer.write(b"a" * 100 + (b"\r\n0\r\n\r\n" if b"chunked" in framing else b""))
        assert (await first.readline()).split()[1] == b"200"
        assert terms.unasked.held == 0
        other.close()
        writer.close()

    run(scenario, terms)


@pytest.mark.parametrize("ending", [b"", b"\r\n"], ids=["half a head", "whole"])
def test_what_a_caller_that_goes_away_has_sent_is_forgotten(ending: bytes) -> None:
    terms = Terms(head_limit=4096, unused=30, head=30, window=30)

    async def deaf(_: Call) -> None:
        await asyncio.Event().wait()

    async def scenario(server: Server) -> None:
        server.answer = deaf
        _, writer = await server.connect()
        writer.write(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n" + ending + b"abc" * bool(ending))
        await until(lambda: terms.unasked.held > 0)
        writer.close()
        await until(lambda: terms.unasked.held == 0)

    run(scenario, terms)


def test_of_too_many_headers_no_more_are_kept_than_tell_so() -> None:
    """Each takes about 150 bytes here, and 5 on the wire."""
    terms = Terms(head_limit=65536, unused=30, head=30, window=30, most_headers=10)

    async def scenario(server: Server) -> None:
        await server.say(b"GET /x HTTP/1.0\r\nHost: localhost\r\n" + b"a:b\r\n" * 5000 + b"\r\n")
        assert len(server.calls[0].headers) == 11

    run(scenario, terms)


@pytest.mark.parametrize(
    ("sent", "answered"),
    [(b"", b""), (b"\r\n", b""), (b"GET /x HT", b" 408 "), (GET % b"/x" + b"GET", b" 200 ")],
    ids=["nothing", "empty lines", "half a head", "half a second head"],
)
def test_every_wait_for_a_head_ends(sent: bytes, answered: bytes) -> None:
    async def scenario(server: Server) -> None:
        got = await server.say(sent)
        assert answered in got
        assert bool(got) == bool(answered)

    run(scenario, Terms(head_limit=4096, unused=0.3, head=0.3, window=30))


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 5000, b" 414 "),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 5000, b" 431 "),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000, b" 431 "),
    ],
)
def test_a_head_may_not_grow_without_end(sent: bytes, status: bytes) -> None:
    async def scenario(server: Server) -> None:
        got = await server.say(sent)
        assert status in got
        assert got.count(b"HTTP/1.1 ") == 1

    run(scenario)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02", b" 400 "),
        (b"BREW / HTTP/1.1\r\n\r\n", b" 501 "),
        (b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b" 400 "),
        (b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", b" 501 "),
        (b"PUT / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b" 400 "),
    ],
)
def test_what_cannot_be_read_is_answered_once_and_the_connection_closed(sent: bytes, status: bytes) -> None:
    async def refusing(call: Call) -> None:
        try:
            await echo(call)
        except Exception:
            assert call.problem is not None
            call.respond(call.problem.status, [], b"")

    async def scenario(server: Server) -> None:
        server.answer = refusing
        got = await server.say(sent + b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status in got
        assert got.count(b"HTTP/1.1 ") == 1
        assert b"smuggled" not in got

    run(scenario)


def test_a_refused_caller_that_is_still_sending_sees_the_answer() -> None:
    async def refuse(call: Call) -> None:
        call.keep = False
        call.respond(413, [], b"too large")

    async def scenario(server: Server) -> None:
        server.answer = refuse
        head = b"PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (3 << 20)
        assert (await server.say(head + b"a" * (3 << 20))).endswith(b"too large")

    run(scenario)


def test_an_answer_that_is_not_whole_cuts_the_connection() -> None:
    async def short(call: Call) -> None:
        call.begin(200, [] if call.path == b"/no-length" else [(b"content-length", b"10")])
        await call.send(b"abc")
        if call.path == b"/ends":
            call.end()

    async def scenario(server: Server) -> None:
        server.answer = short
        for path in (b"/ends", b"/returns"):
            assert (await server.say(GET % path)).endswith(b"\r\n\r\nabc")
        with pytest.raises(ConnectionResetError):
            await server.say(b"GET /no-length HTTP/1.0\r\nHost: a\r\n\r\n")

    run(scenario)


def test_further_connections_wait_until_there_is_room() -> None:
    async def scenario(server: Server) -> None:
        first, second = await server.connect(), await server.connect()
        third = await server.connect()
        third[1].write(GET % b"/third")
        await until(lambda: server.listener.connections == 2)
        assert not server.calls
        first[1].close()
        await third[0].readuntil(b"/third|")
        for _, writer in (second, third):
            writer.close()

    run(scenario, most=2)


def test_a_stop_announces_the_end_and_serves_what_is_asked_meanwhile() -> None:
    release = asyncio.Event()

    async def held(call: Call) -> None:
        if call.path == b"/held":
            await release.wait()
        await echo(call)

    async def scenario(server: Server) -> None:
        server.answer = held
        kept, busy, unused = await server.connect(), await server.connect(), await server.connect()
        kept[1].write(GET % b"/1")
        await kept[0].readuntil(b"/1|")
        busy[1].write(GET % b"/held")
        await until(lambda: len(server.calls) == 2)
        queued = socket.create_connection(("127.0.0.1", server.port))
        queued.sendall(GET % b"/queued")
        stopping = asyncio.create_task(server.listener.stop(20))
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionRefusedError):
            await server.connect()
        kept[1].write(GET % b"/2")
        answer = await kept[0].read()
        assert b"connection: close" in answer
        assert answer.endswith(b"/2|")
        assert b"connection: close" in await asyncio.to_thread(_all_of, queued)
        assert await unused[0].read() == b""
        assert not stopping.done()
        release.set()
        assert (await busy[0].read()).endswith(b"/held|")
        await stopping
        for _, writer in (kept, busy, unused):
            writer.close()

    run(scenario)


def _all_of(sock: socket.socket) -> bytes:
    with sock, sock.makefile("rb") as file:
        return file.read()
