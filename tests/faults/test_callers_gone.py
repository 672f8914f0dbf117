"""A caller that goes away ends its upstream request, and leaves nothing behind."""

from __future__ import annotations

import threading
import time

import pytest
from tests.faults.callers import Caller, request
from tests.faults.conftest import Stage
from tests.faults.upstreams import Arrived, Peer, answer


class Watcher:
    """Sends `data`, then waits for the proxy to close the connection."""

    def __init__(self, data: bytes = b"") -> None:
        self._data = data
        self.closed = threading.Semaphore(0)

    def __call__(self, peer: Peer, _: Arrived) -> None:
        peer.send(self._data)
        if peer.wait_closed(15):
            self.closed.release()
        peer.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_while_waiting_for_the_head(steady: Stage, method: str) -> None:
    steady.upstream.script = watcher = Watcher()
    with Caller(steady.port) as caller:
        caller.send(request("/x", method, "X-Request-Id: gone-before-head", body=b"" if method == "GET" else b"{}"))
        steady.upstream.wait_for(1)
    assert watcher.closed.acquire(timeout=10)
    assert steady.proxy.log_line("gone-before-head")["status"] == 499


def test_a_good_while_later_too(steady: Stage) -> None:
    steady.upstream.script = watcher = Watcher()
    with Caller(steady.port) as caller:
        caller.send(request("/x", "PUT", body=b"a" * 1000))
        steady.upstream.wait_for(1)
        time.sleep(1)
    assert watcher.closed.acquire(timeout=10)


def test_while_the_answer_streams(steady: Stage) -> None:
    """Also in a pause of the upstream, when there is nothing to send that would fail."""
    steady.upstream.script = watcher = Watcher(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    with Caller(steady.port) as caller:
        caller.send(request("/x"))
        assert caller.head().read(3) == b"abc"
    assert watcher.closed.acquire(timeout=10)


def test_while_nobody_reads_a_large_answer(steady: Stage) -> None:
    gone = threading.Event()

    def endless(peer: Peer, _: Arrived) -> None:
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            while True:
                peer.send(b"a" * 65536)
        finally:
            gone.set()

    steady.upstream.script = endless
    with Caller(steady.port) as caller:
        caller.send(request("/x"))
        caller.head()
        time.sleep(0.5)
    assert gone.wait(10)


def test_in_the_middle_of_its_own_body(steady: Stage) -> None:
    with Caller(steady.port) as caller:
        caller.send(request("/x", "PUT", "Content-Length: 100", "X-Request-Id: gone-in-its-body") + b"abc")
        time.sleep(0.5)
    assert steady.proxy.log_line("gone-in-its-body")["status"] == 499
    assert not steady.upstream.arrived


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"], ids=["head", "body"])
def test_a_narrow_pool_survives_many_callers_that_go(narrow: Stage, data: bytes) -> None:
    narrow.upstream.script = watcher = Watcher(data)
    for number in range(10):
        with Caller(narrow.port) as first, Caller(narrow.port) as second:
            first.send(request("/gone"))
            second.send(request("/gone"))
            narrow.upstream.wait_for(2 * number + 2)
        assert watcher.closed.acquire(timeout=10)
        assert watcher.closed.acquire(timeout=10)
    narrow.upstream.reset()
    for _ in range(3):
        assert narrow.call("/after").status == 200


def test_callers_that_go_at_once(narrow: Stage) -> None:
    for number in range(30):
        with Caller(narrow.port) as caller:
            caller.send(request("/gone", "PUT", body=b"a" * (100_000 if number % 2 else 1)))
    deadline = time.monotonic() + 10
    while [narrow.call("/after").status for _ in range(3)] != [200] * 3:  # some are still on their way
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_callers_that_go_while_they_wait_for_a_connection(narrow: Stage) -> None:
    release = threading.Event()

    def held(peer: Peer, _: Arrived) -> None:
        assert release.wait(20)
        peer.send(answer())

    narrow.upstream.script = held
    with Caller(narrow.port) as first, Caller(narrow.port) as second:
        first.send(request("/1"))
        second.send(request("/2"))
        narrow.upstream.wait_for(2)
        for _ in range(3):
            with Caller(narrow.port) as third, Caller(narrow.port) as fourth:
                third.send(request("/gone"))
                fourth.send(request("/gone"))
                time.sleep(0.5)
            time.sleep(0.2)
        with Caller(narrow.port) as last:  # its place in the queue is free again
            last.send(request("/3"))
            time.sleep(0.2)
            release.set()
            assert last.answer().status == 200
        assert first.answer().status == second.answer().status == 200
    for _ in range(3):
        assert narrow.call("/after").status == 200
    assert "/gone" not in narrow.upstream.targets


def test_more_than_may_wait_is_503_with_retry_after(narrow: Stage) -> None:
    release = threading.Event()

    def held(peer: Peer, _: Arrived) -> None:
        assert release.wait(20)
        peer.send(answer())

    narrow.upstream.script = held
    callers = [Caller(narrow.port) for _ in range(5)]
    for number, caller in enumerate(callers):
        caller.send(request(f"/{number}"))
        time.sleep(0.1)
    refused = callers[4].answer()
    assert refused.status == 503
    assert refused.value("retry-after") == "1"
    assert "2 requests wait already" in refused.json["message"]
    release.set()
    assert [caller.answer().status for caller in callers[:4]] == [200] * 4
    for caller in callers:
        caller.close()
    assert narrow.upstream.connections <= 2


def test_who_waits_too_long_for_a_connection_gets_503(narrow: Stage) -> None:
    done = threading.Event()

    def held(peer: Peer, _: Arrived) -> None:
        assert done.wait(20)
        peer.send(answer())

    narrow.upstream.script = held
    with Caller(narrow.port) as first, Caller(narrow.port) as second:
        first.send(request("/1"))
        second.send(request("/2"))
        narrow.upstream.wait_for(2)
        refused = narrow.call("/3")
        assert refused.status == 503
        assert "no place became free in 3 s" in refused.json["message"]
        done.set()
        assert first.answer().status == second.answer().status == 200
    assert narrow.call("/after").status == 200


def test_an_unused_connection_is_closed_after_a_while(hasty: Stage) -> None:
    closed = threading.Event()

    def watch(peer: Peer, _: Arrived) -> None:
        peer.send(answer())
        if peer.wait_closed(10):
            closed.set()
        peer.close()

    hasty.upstream.script = watch
    assert hasty.call("/x").status == 200
    assert closed.wait(10)
