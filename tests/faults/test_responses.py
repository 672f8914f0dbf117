"""Answers go back as they come: at once, in order, with the very bytes of the body."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from http.client import HTTPException

import psutil
import pytest
from tests.faults.callers import Caller, call, chunked, request
from tests.faults.conftest import Stage
from tests.faults.upstreams import Arrived, Peer, answer, answers

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
MIB = 1 << 20


class Steps:
    """Sends one piece after another, each only when the test says so."""

    def __init__(self, *pieces: bytes, close: bool = False) -> None:
        self._pieces = pieces
        self._close = close
        self._go = threading.Semaphore(1)

    def __call__(self, peer: Peer, _: Arrived) -> None:
        for piece in self._pieces:
            assert self._go.acquire(timeout=20)
            peer.send(piece)
        if self._close:
            assert self._go.acquire(timeout=20)
            peer.close()

    def next(self) -> None:
        self._go.release()


def test_the_head_comes_before_any_byte_of_the_body(steady: Stage) -> None:
    steady.upstream.script = steps = Steps(CHUNKED, chunked(b"abc"))
    with Caller(steady.port) as caller:
        caller.send(request())
        response = caller.head()
        assert response.getheader("content-type") == "text/event-stream"
        steps.next()
        assert response.read() == b"abc"


def test_every_event_comes_when_it_was_sent(steady: Stage) -> None:
    events = [b"data: %d\n\n" % number for number in range(5)]
    steady.upstream.script = steps = Steps(
        CHUNKED, *(b"%x\r\n%b\r\n" % (len(event), event) for event in events), b"0\r\n\r\n"
    )
    with Caller(steady.port) as caller:
        caller.send(request())
        response = caller.head()
        for event in events:
            steps.next()
            assert response.read(len(event)) == event
        steps.next()
        assert response.read() == b""


@pytest.mark.parametrize("framing", ["Content-Length: 6\r\n", "Connection: close\r\n"])
def test_every_piece_comes_when_it_was_sent_however_framed(steady: Stage, framing: str) -> None:
    head = f"HTTP/1.1 200 OK\r\n{framing}\r\n".encode()
    steady.upstream.script = steps = Steps(head, b"abc", b"def", close="close" in framing)
    with Caller(steady.port) as caller:
        caller.send(request())
        response = caller.head()
        steps.next()
        assert response.read(3) == b"abc"
        steps.next()
        assert response.read(3) == b"def"
        steps.next()
        assert response.read() == b""


def test_a_caller_that_does_not_read_stops_the_upstream_and_costs_no_memory(steady: Stage) -> None:
    taken = 0

    def endless(peer: Peer, _: Arrived) -> None:
        nonlocal taken
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (200 * MIB))
        piece = b"a" * (1 << 16)
        for _piece in range(200 * MIB // len(piece)):
            peer.send(piece)
            taken += len(piece)

    (worker,) = steady.proxy.workers
    before = worker.memory_info().rss
    steady.upstream.script = endless
    with Caller(steady.port) as caller:
        caller.send(request())
        response = caller.head()
        settled = -1
        while settled != taken:
            settled = taken
            time.sleep(0.5)
        assert taken < 60 * MIB  # of 200: what the kernel holds for four sockets, and little of ours
        assert worker.memory_info().rss - before < 16 * MIB
        assert sum(len(response.read(MIB)) for _ in range(200)) == 200 * MIB
        assert response.read() == b""
        assert worker.memory_info().rss - before < 32 * MIB


def test_content_coding_is_left_alone(steady: Stage) -> None:
    body = gzip.compress(b"hello" * 1000)
    steady.upstream.script = answers(answer(body, "200 OK", "Content-Encoding: gzip", "Vary: Accept-Encoding"))
    got = steady.call("/", "GET", "Accept-Encoding: gzip")
    assert got.body == body
    assert (got.value("content-encoding"), got.value("content-length")) == ("gzip", str(len(body)))
    assert steady.upstream.arrived[0].value("accept-encoding") == "gzip"
    steady.call("/")
    assert not steady.upstream.arrived[1].values("accept-encoding")


def test_head_keeps_the_length_and_has_no_body(steady: Stage) -> None:
    for status in ("200 OK", "404 Not Found"):
        steady.upstream.script = answers(f"HTTP/1.1 {status}\r\nContent-Length: 12345\r\nETag: a\r\n\r\n".encode())
        with Caller(steady.port) as caller:
            for _ in range(2):
                caller.send(request("/x", "HEAD"))
                got = caller.answer("HEAD")
                assert (got.status, got.value("content-length"), got.value("etag")) == (int(status[:3]), "12345", "a")
    assert steady.upstream.connections <= 2  # it may serve again after a HEAD


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Connection: close", "ETag: a"])
def test_head_without_a_length(steady: Stage, framing: str) -> None:
    steady.upstream.script = answers(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode(), close="close" in framing)
    with Caller(steady.port) as caller:
        for _ in range(3):
            caller.send(request("/x", "HEAD"))
            assert caller.answer("HEAD").status == 200


def test_odd_headers_pass_as_they_are(steady: Stage) -> None:
    steady.upstream.script = answers(answer(b"{}", "200", "X-A: \x80\xff", "X-B: a\tb", "X-C:", "ETag:   c"))
    got = steady.call()
    assert [got.value(name) for name in ("x-a", "x-b", "x-c", "etag")] == ["\x80\xff", "a\tb", "", "c"]


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answers_without_body(steady: Stage, status: str) -> None:
    steady.upstream.script = answers(f"HTTP/1.1 {status}\r\nETag: a\r\n\r\n".encode())
    with Caller(steady.port) as caller:
        for _ in range(3):
            caller.send(request())
            got = caller.answer()
            assert (got.status, got.value("etag"), got.body) == (int(status[:3]), "a", b"")
            assert not got.values("transfer-encoding")
    assert len(steady.upstream.arrived) == 3


def test_304_may_tell_the_length_it_would_have(steady: Stage) -> None:
    steady.upstream.script = answers(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\nETag: a\r\n\r\n")
    with Caller(steady.port) as caller:
        for _ in range(2):
            caller.send(request("/x", "GET", "If-None-Match: a"))
            assert caller.answer().status == 304


def test_an_answer_without_length_ends_with_its_connection(steady: Stage) -> None:
    steady.upstream.script = answers(b"HTTP/1.1 200 OK\r\n\r\nall there is", close=True)
    assert steady.call().body == b"all there is"
    steady.upstream.script = answers(b"HTTP/1.0 200 OK\r\n\r\n" + b"a" * 300_000, close=True)
    assert steady.call().body == b"a" * 300_000


def test_trailers_are_dropped(steady: Stage) -> None:
    steady.upstream.script = answers(CHUNKED + chunked(b"abc", b"def", trailers=b"X-Amz-Secret: a\r\nX-B: c\r\n"))
    with Caller(steady.port) as caller:
        for _ in range(2):
            caller.send(request())
            got = caller.answer()
            assert got.body == b"abcdef"
            assert not got.values("x-b")


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 1 << 20, 5_000_001])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_bodies_of_all_sizes_come_whole(steady: Stage, size: int, framing: str) -> None:
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    whole = answer(body) if framing == "length" else CHUNKED + chunked(*([body] if body else []))
    steady.upstream.script = answers(whole)
    got = steady.call()
    assert got.body == body
    if size:
        assert got.values("content-length") in ([[str(size)]] if framing == "length" else [[], [str(size)]])


def test_repeated_headers_stay_repeated_and_others_go(steady: Stage) -> None:
    steady.upstream.script = answers(
        answer(
            b"{}",
            "200 OK",
            "Link: a",
            "Link: b",
            "Vary: c",
            "X-Mlflow: d",
            "Connection: keep-alive, X-Hop",
            "X-Hop: e",
            "Keep-Alive: timeout=5",
            "Proxy-Authenticate: Basic",
            "Upgrade: h2c",
            "Trailer: X-B",
            "Set-Cookie: session=secret",
            "Set-Cookie: other=secret",
            "X-Amz-Id-2: secret",
            "x-amzn-RequestId: 1b2c",
            "X-Amzn-Trace-Id: secret",
            "Strict-Transport-Security: max-age=1",
            "Alt-Svc: h3",
            "X-Request-Id: theirs",
        )
    )
    got = steady.call("/", "GET", "X-Request-Id: given-by-caller")
    names = [name.lower() for name, _ in got.headers]
    added = ["x-request-id", "date", "x-content-type-options", "x-frame-options"]
    assert sorted(names) == sorted(["content-length", "link", "link", "vary", "x-mlflow", *added])
    assert got.values("link") == ["a", "b"]
    assert got.value("x-request-id") == "given-by-caller"
    assert steady.proxy.log_line("given-by-caller")["upstream_request_id"] == "1b2c"


def test_the_upstreams_own_server_and_date_are_relayed_once(steady: Stage) -> None:
    steady.upstream.script = answers(answer(b"", "200 OK", "Date: Tue, 24 Nov 2026 00:00:00 GMT", "Server: gunicorn"))
    got = steady.call()
    assert got.value("date") == "Tue, 24 Nov 2026 00:00:00 GMT"
    assert got.value("server") == "gunicorn"


def test_interim_answers_are_dropped(steady: Stage) -> None:
    interim = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    )
    steady.upstream.script = answers(interim + answer(b"final"))
    with Caller(steady.port) as caller:
        caller.send(request())
        assert caller.line() == b"HTTP/1.1 200 OK\r\n"
    got = steady.call()
    assert (got.body, got.values("link")) == (b"final", [])


@pytest.mark.parametrize(
    ("path", "location", "rewritten"),
    [
        ("/x", "/y?z=1#f", "./y?z=1#f"),
        ("/x", "{upstream}/y", "./y"),
        ("/x", "{upstream}", "./"),
        ("/t/app/x", "/y?z=1", "../../t/app/y?z=1"),
        ("/t/app/x", "{upstream}/y", "../../t/app/y"),
        ("/t/app/x", "relative/y", "relative/y"),
        ("/t/app/x", "https://elsewhere.example/y", "https://elsewhere.example/y"),
        ("/t/app/x", "//elsewhere.example/y", "//elsewhere.example/y"),
    ],
)
@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
def test_redirects_are_relayed_never_followed(
    steady: Stage, path: str, location: str, rewritten: str, status: str
) -> None:
    location = location.replace("{upstream}", f"http://127.0.0.1:{steady.upstream.port}")
    steady.upstream.script = answers(answer(b"", status, f"Location: {location}"))
    got = steady.call(path)
    assert (got.status, got.value("location")) == (int(status[:3]), rewritten)
    assert len(steady.upstream.arrived) == 1


def test_statuses_pass_as_they_are(steady: Stage) -> None:
    for status in (201, 202, 206, 299, 300, 400, 401, 403, 404, 409, 412, 416, 418, 422, 451, 500, 501, 599):
        steady.upstream.script = answers(answer(b'{"error_code": "X", "message": "mlflow"}', f"{status} Word"))
        got = steady.call()
        assert (got.status, got.json["message"]) == (status, "mlflow")


def test_connections_are_used_again(steady: Stage) -> None:
    steady.call()
    made = steady.upstream.connections
    for _ in range(20):
        assert steady.call().status == 200
    assert steady.upstream.connections <= made + 1


def test_an_upload_that_is_answered_early_gets_that_answer(steady: Stage) -> None:
    """The upstream refuses a large body by its head, and closes without reading it."""
    steady.upstream.reads_bodies = False
    body = b"a" * (30 * MIB)

    def refuse(peer: Peer, _: Arrived) -> None:
        peer.send(answer(b'{"error_code": "X", "message": "too large"}', "413 Too Large", "Connection: close"))
        time.sleep(0.5)
        peer.close()

    steady.upstream.script = refuse
    got = call(steady.port, "/x", "PUT", body=body)
    assert (got.status, got.json["message"]) == (413, "too large")
    steady.upstream.reset()
    assert steady.call("/after").status == 200
    assert steady.upstream.targets == ["/after"]


def test_an_early_answer_whose_upstream_stays_there_is_relayed_at_once(steady: Stage) -> None:
    steady.upstream.reads_bodies = False
    done = threading.Event()

    def refuse(peer: Peer, _: Arrived) -> None:
        peer.send(answer(b"{}", "413 Too Large"))
        assert done.wait(20)  # the body is left unread, and the connection open
        peer.close()

    steady.upstream.script = refuse
    with Caller(steady.port) as caller:
        caller.sock.settimeout(15)
        caller.send(request("/x", "PUT", body=b"a" * (30 * MIB)))
        assert caller.answer().status == 413
    done.set()


def test_a_cut_answer_never_looks_whole(steady: Stage) -> None:
    steady.upstream.script = answers(CHUNKED + b"5\r\nhello\r\n", close=True)
    with pytest.raises(HTTPException):
        steady.call()


def test_no_thread_or_descriptor_is_left_by_many_requests(steady: Stage) -> None:
    (worker,) = steady.proxy.workers
    for _ in range(20):
        steady.call()
    process = psutil.Process(worker.pid)
    before = process.num_fds()
    for _ in range(100):
        steady.call()
    deadline = time.monotonic() + 10
    while process.num_fds() > before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _chunked_answer(body: bytes) -> bytes:
    return CHUNKED + chunked(body)


@pytest.mark.parametrize("size", [100, 60 << 10, 300 << 10, 600 << 10, 1600 << 10, 5 << 20])
@pytest.mark.parametrize("framed", [answer, _chunked_answer], ids=["length", "chunked"])
def test_a_kept_connection_serves_again_after_any_size(
    steady: Stage, size: int, framed: Callable[[bytes], bytes]
) -> None:
    """Large bodies pause the socket and pass the parser by; neither may outlast the answer."""
    large, small = bytes(range(256)) * (size // 256 + 1), b'{"small": true}'
    given = iter([large, small, large, small, large, small])
    steady.upstream.script = lambda peer, _: peer.send(framed(next(given)))
    for expected in [large, small] * 3:
        got = steady.call()
        assert (got.status, got.body) == (200, expected)
    assert steady.upstream.connections <= 1  # none if one was kept from before
