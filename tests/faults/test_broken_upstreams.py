"""Upstreams that break off, lie, or fall silent: the caller gets an error or sees a cut, never a false answer."""

from __future__ import annotations

import re
import threading
import time
from http.client import HTTPException, IncompleteRead

import pytest
from tests.faults.callers import Answer, Caller, chunked, request
from tests.faults.conftest import Stage
from tests.faults.upstreams import Arrived, Peer, answer, answers

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def assert_is_error(stage: Stage, got: Answer, status: int, *words: str) -> None:
    """MLflow's shape, with one id in body, header and log."""
    assert got.status == status
    assert sorted(got.json) == ["error_code", "message", "request_id"]
    assert got.json["error_code"] == {502: "TEMPORARILY_UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}[status]
    assert got.value("content-type") == "application/json"
    assert got.value("x-request-id") == got.json["request_id"]
    address = f"127.0.0.1:{stage.upstream.port}"
    for word in ("prod", *words):
        assert word in got.json["message"]
    assert address not in got.json["message"]
    line = stage.proxy.log_line(got.json["request_id"])
    assert (line["status"], line["target"]) == (status, "prod")
    for word in (address, *words):
        assert word in line["error"]


# POST: it is not repeated, so that one fault suffices.


def test_closed_without_an_answer(steady: Stage) -> None:
    steady.upstream.script = lambda peer, _: peer.close()
    assert_is_error(steady, steady.call("/x", "POST"), 502, "closed without an answer")
    assert len(steady.upstream.arrived) == 1


def test_reset_without_an_answer(steady: Stage) -> None:
    steady.upstream.script = lambda peer, _: peer.reset()
    assert_is_error(steady, steady.call("/x", "POST"), 502, "closed without an answer")


def test_closed_in_the_middle_of_the_head(steady: Stage) -> None:
    steady.upstream.script = answers(b"HTTP/1.1 200 OK\r\nContent-Le", close=True)
    assert_is_error(steady, steady.call("/x", "GET"), 502, "closed without an answer")
    assert len(steady.upstream.arrived) == 1  # an answer had begun: not even a GET is repeated


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("garbage", b"\x00\x01\x02garbage\r\n\r\n"),
        ("an SSH server", b"SSH-2.0-OpenSSH_9.2\r\n"),
        ("a TLS alert", b"\x15\x03\x01\x00\x02\x02\x46"),
        ("a request", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ("no status", b"HTTP/1.1 \r\n\r\n"),
        ("another protocol", b"SIP/2.0 200 OK\r\n\r\n"),
        ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        ("a length that is none", b"HTTP/1.1 200 OK\r\nContent-Length: 1x\r\n\r\na"),
        ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
        ("length and chunked", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("chunked and length", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n"),
        ("another coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + chunked(b"abc")),
        ("a coding after chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n" + chunked(b"abc")),
        ("no coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nabc"),
        ("a folded header", b"HTTP/1.1 200 OK\r\nX-A: a\r\n b\r\nContent-Length: 2\r\n\r\n{}"),
        ("a bare CR", b"HTTP/1.1 200 OK\r\nX-A: a\rX-B: b\r\nContent-Length: 2\r\n\r\n{}"),
        ("bare line feeds", b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}"),
        ("a space before the colon", b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n"),
        ("a header without colon", b"HTTP/1.1 200 OK\r\nContent-Length\r\n\r\n"),
        ("NUL in a header", b"HTTP/1.1 200 OK\r\nX-A: \0\r\nContent-Length: 0\r\n\r\n"),
        ("other protocols", b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
        ("giant headers", b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 600_000 + b"\r\nContent-Length: 0\r\n\r\n"),
        ("endless interim answers", b"HTTP/1.1 100 Continue\r\nX-A: b\r\n\r\n" * 20_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_answer(steady: Stage, name: str, data: bytes) -> None:
    def script(peer: Peer, _: Arrived) -> None:
        peer.send(data)
        assert peer.wait_closed(10)  # by the proxy, which can do nothing more with this connection
        peer.close()

    steady.upstream.script = script
    assert_is_error(steady, steady.call("/x", "POST"), 502)
    steady.upstream.reset()
    assert steady.call("/after").status == 200


@pytest.mark.parametrize(
    "cut",
    [
        answer(b"a" * 100)[:-1],
        answer(b"a" * 1_000_000)[:-400_000],
        CHUNKED,
        CHUNKED + b"5\r\nhel",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhello\r\n0\r\n",
        CHUNKED + b"5\r\nhello\r\nzz\r\n",
        CHUNKED + b"5\r\nhello, too long\r\n0\r\n\r\n",
    ],
    ids=lambda cut: repr(cut[-20:]),
)
@pytest.mark.parametrize("how", ["close", "reset"])
def test_an_answer_that_is_cut_is_cut_for_the_caller(steady: Stage, cut: bytes, how: str) -> None:
    def script(peer: Peer, _: Arrived) -> None:
        peer.send(cut)
        time.sleep(0.05)  # else a reset overtakes what was sent
        getattr(peer, how)()

    steady.upstream.script = script
    with Caller(steady.port) as caller:
        caller.send(request("/x", "GET", "X-Request-Id: cut-answer"))
        with pytest.raises((HTTPException, ConnectionError)):
            caller.answer()
    assert len(steady.upstream.arrived) == 1
    assert "cut short" in steady.proxy.log_line("cut-answer")["error"]


def test_an_error_answer_that_is_cut_is_an_error(steady: Stage) -> None:
    """Short errors are read whole first, so this one can still be told properly."""
    steady.upstream.script = answers(b'HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\n{"error_code"', close=True)
    assert_is_error(steady, steady.call("/x"), 502, "in the middle")


POISON = answer(b"poison", "200 OK", "X-Poison: 1")
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"  # would swallow what comes next


@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["at once", "later"])
@pytest.mark.parametrize(
    "whole",
    [
        answer(b"good"),
        CHUNKED + chunked(b"good"),
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        answer(b"", "302 Found", "Location: /y"),
    ],
    ids=["length", "chunked", "204", "304", "empty"],
)
@pytest.mark.parametrize(
    "surplus", [POISON, b"more bytes", b"\r\n" * 3 + POISON, HALF], ids=["answer", "bytes", "lines", "half"]
)
def test_what_follows_an_answer_reaches_nobody(steady: Stage, pause: float, whole: bytes, surplus: bytes) -> None:
    def script(peer: Peer, _: Arrived) -> None:
        if pause:
            peer.send(whole)
            time.sleep(pause)
            peer.send(surplus)
        else:
            peer.send(whole + surplus)

    steady.upstream.script = script
    with Caller(steady.port) as caller:
        caller.send(request())
        assert caller.answer().status < 400
        steady.upstream.script = answers(answer(b"next"))
        time.sleep(pause * 2)
        for _ in range(3):
            caller.send(request())
            assert caller.answer().body == b"next"


@pytest.mark.parametrize("body", [b"poison", POISON])
def test_a_body_after_head_reaches_nobody(steady: Stage, body: bytes) -> None:
    steady.upstream.script = answers(answer(body))
    with Caller(steady.port) as caller:
        caller.send(request("/x", "HEAD"))
        assert caller.answer("HEAD").status == 200
        steady.upstream.script = answers(answer(b"next"))
        for _ in range(3):
            caller.send(request())
            assert caller.answer().body == b"next"


# Silence


def test_no_answer_in_time_is_504(hasty: Stage) -> None:
    closed = threading.Event()

    def silent(peer: Peer, _: Arrived) -> None:
        if peer.wait_closed(10):
            closed.set()

    hasty.upstream.script = silent
    assert_is_error(hasty, hasty.call("/x"), 504, "no answer within 1 s")
    assert closed.wait(5)
    assert len(hasty.upstream.arrived) == 1


def test_a_head_that_trickles_is_504(hasty: Stage) -> None:
    def trickle(peer: Peer, _: Arrived) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 1000:
            peer.send(bytes([byte]))
            time.sleep(0.05)

    hasty.upstream.script = trickle
    assert_is_error(hasty, hasty.call("/x"), 504, "no answer within 1 s")


def test_silence_in_the_middle_cuts_the_answer(hasty: Stage) -> None:
    def stall(peer: Peer, _: Arrived) -> None:
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        peer.wait_closed(10)

    hasty.upstream.script = stall
    with Caller(hasty.port) as caller:
        caller.send(request("/x", "GET", "X-Request-Id: silence-in-the-middle"))
        with pytest.raises(IncompleteRead) as caught:
            caller.answer()
        assert caught.value.partial == b"abc"
    assert re.search("no further data within 1 s", hasty.proxy.log_line("silence-in-the-middle")["error"])


def test_a_slow_answer_is_whole_as_long_as_it_goes_on(hasty: Stage) -> None:
    """There is no total deadline for streams."""

    def slowly(peer: Peer, _: Arrived) -> None:
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        for byte in b"slow!":
            time.sleep(0.5)
            peer.send(bytes([byte]))

    hasty.upstream.script = slowly
    assert hasty.call("/x").body == b"slow!"


def test_an_upstream_that_reads_nothing_is_504(hasty: Stage) -> None:
    hasty.upstream.reads_bodies = False
    hasty.upstream.script = lambda peer, _: time.sleep(5)
    # More than the kernel's buffers would take is over this proxy's limit, so the wait is for the answer.
    assert hasty.call("/x", "PUT", body=b"a" * (1 << 20)).status == 504


def test_a_caller_that_stops_reading_is_let_go(hasty: Stage) -> None:
    gone = threading.Event()

    def endless(peer: Peer, _: Arrived) -> None:
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            while True:
                peer.send(b"a" * 65536)
        except OSError:
            gone.set()

    hasty.upstream.script = endless
    with Caller(hasty.port) as caller:
        caller.send(request("/x", "GET", "X-Request-Id: stops-reading"))
        caller.head()
        assert gone.wait(10)
    assert hasty.proxy.log_line("stops-reading")["error"] == "the caller stopped reading"
