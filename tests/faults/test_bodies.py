"""Request bodies have bounds: each one, all of a worker together, and in time."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from tests.faults.callers import Answer, Caller, chunked, request
from tests.faults.conftest import Stage
from tests.faults.upstreams import answers

MIB = 1 << 20


def test_a_body_of_just_the_limit_passes(hasty: Stage) -> None:
    assert hasty.call("/x", "PUT", body=b"a" * MIB).status == 200
    assert len(hasty.upstream.arrived[0].body) == MIB


def test_a_declared_length_over_the_limit_is_refused_before_a_byte_is_sent(hasty: Stage) -> None:
    with Caller(hasty.port) as caller:
        caller.send(request("/x", "PUT", f"Content-Length: {MIB + 1}"))
        answer = caller.answer()
    assert answer.status == 413
    assert "server.body_limit" in answer.json["message"]
    assert not hasty.upstream.arrived


def test_an_upload_without_end_is_refused_when_it_crosses_the_limit(hasty: Stage) -> None:
    piece = b"%x\r\n%b\r\n" % (1 << 16, b"a" * (1 << 16))
    with Caller(hasty.port) as caller:
        caller.send(request("/x", "PUT", "Transfer-Encoding: chunked"))
        sent = 0
        with suppress(ConnectionError):  # the proxy answers and closes, whatever is still on its way
            for _ in range(17):
                caller.send(piece)
                sent += 1 << 16
        assert sent > MIB // 2
        answer = caller.answer()
        assert answer.status == 413
        caller.sock.settimeout(10)
        with pytest.raises(ConnectionError):  # noqa: PT012
            while True:
                caller.send(piece)
    assert not hasty.upstream.arrived
    assert hasty.call("/after").status == 200


def test_bodies_together_have_a_budget_that_is_given_back(hasty: Stage) -> None:
    hasty.upstream.script = answers(b"HTTP/1.1 204 No Content\r\n\r\n")
    for _ in range(3):
        with Caller(hasty.port) as first, Caller(hasty.port) as second:
            first.send(request("/first", "PUT", f"Content-Length: {MIB}") + b"a" * (MIB - 1))
            time.sleep(0.1)
            with suppress(ConnectionError):  # refused as it crosses the budget
                second.send(request("/second", "PUT", f"Content-Length: {MIB}") + b"a" * (MIB * 3 // 4))
            refused = second.answer()
            assert refused.status == 503
            assert refused.value("retry-after") == "1"
            assert "server.body_budget" in refused.json["message"]
            first.send(b"a")
            assert first.answer().status == 204
        assert hasty.call("/second", "PUT", body=b"a" * MIB).status == 204
    assert hasty.upstream.targets == ["/first", "/second"] * 3


def test_lengths_that_are_only_stated_take_nothing_of_the_budget(hasty: Stage) -> None:
    callers = [Caller(hasty.port) for _ in range(8)]
    try:
        for caller in callers:
            caller.send(request("/x", "PUT", f"Content-Length: {MIB}"))
        assert hasty.call("/real", "PUT", body=b"a" * MIB).status == 200
    finally:
        for caller in callers:
            caller.close()


def test_what_was_sent_before_earns_no_longer_pause(hasty: Stage) -> None:
    """At 16 KiB a second, half a MiB would be good for 32 s; a pause is a pause all the same."""
    with Caller(hasty.port) as caller:
        caller.sock.settimeout(15)
        caller.send(request("/x", "PUT", f"Content-Length: {MIB}") + b"a" * (MIB // 2))
        assert caller.answer().status == 408
    assert not hasty.upstream.arrived


def test_the_proxys_own_pages_take_small_bodies_only(hasty: Stage) -> None:
    assert hasty.call("/-/ui/prod?unknown=1", "POST", body=b"a" * 1000).status == 400
    assert hasty.call("/-/ui/prod?unknown=1", "POST", body=b"a" * 20_000).status == 413


def _upload_that_fails(stage: Stage, how: str) -> None:
    with Caller(stage.port) as caller:
        if how == "gone":
            caller.send(request("/x", "PUT", f"Content-Length: {MIB}") + b"a" * 1000)
        elif how == "broken":
            caller.send(request("/x", "PUT", "Transfer-Encoding: chunked") + b"3\r\nabcdef\r\n")
            caller.answer()
        elif how == "too large":
            caller.send(request("/x", "PUT", "Transfer-Encoding: chunked") + chunked(b"a" * (MIB + 1)))
            caller.answer()
        elif how == "slow":
            caller.send(request("/x", "PUT", f"Content-Length: {MIB}"))
            assert caller.answer().status == 408
        elif how == "no upstream":
            caller.send(request("/x", "PUT", body=b"a" * MIB))
            assert caller.answer().status == 502


@pytest.mark.parametrize("how", ["gone", "broken", "too large", "slow", "no upstream"])
def test_a_failed_upload_gives_its_part_of_the_budget_back(hasty: Stage, how: str) -> None:
    hasty.upstream.script = lambda peer, _: peer.close()
    for _ in range(1 if how == "slow" else 3):
        _upload_that_fails(hasty, how)
    hasty.upstream.reset()
    deadline = time.monotonic() + 10
    while (answer := _whole_budget(hasty)).status != 200:
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)


def _whole_budget(stage: Stage) -> Answer:
    """Takes a MiB while half a MiB is held, so that any byte not given back shows."""
    with Caller(stage.port) as holder:
        holder.send(request("/held", "PUT", f"Content-Length: {MIB // 2}"))
        time.sleep(0.1)
        return stage.call("/x", "PUT", body=b"a" * MIB)


def test_a_caller_that_pauses_in_its_body_gets_408(hasty: Stage) -> None:
    with Caller(hasty.port) as caller:
        caller.send(request("/x", "PUT", "Content-Length: 10") + b"abc")
        answer = caller.answer()
        assert answer.status == 408
        assert "server.body_timeout" in answer.json["message"]
        assert caller.is_closed()
    assert not hasty.upstream.arrived


def test_a_caller_that_trickles_gets_408_too(hasty: Stage) -> None:
    with Caller(hasty.port) as caller:
        caller.send(request("/x", "PUT", "Content-Length: 1000"))
        with suppress(ConnectionError):
            for _ in range(40):
                caller.send(b"a")
                time.sleep(0.05)
        assert caller.answer().status == 408


def test_a_caller_that_never_finishes_its_head_is_closed(hasty: Stage) -> None:
    with Caller(hasty.port) as caller:
        caller.send(b"GET /x HTTP/1.1\r\nHost: localhost\r\n")
        caller.sock.settimeout(10)
        data = caller.sock.recv(1000)
        assert data == b"" or b" 408 " in data
    assert not hasty.upstream.arrived
