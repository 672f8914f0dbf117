"""A request is sent again only where that is surely safe, few times, each time freshly signed, and never too late."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from tests.faults.callers import Caller, call, request
from tests.faults.conftest import Stage
from tests.faults.proxies import free_port, running, target
from tests.faults.signatures import assert_signed
from tests.faults.upstreams import Arrived, Peer, Upstream, answer, answers

THROTTLED_400 = answer(
    b'{"message": "Rate exceeded"}', "400 Bad Request", "x-amzn-ErrorType: ThrottlingException:http://x"
)
THROTTLED_TYPE_IN_BODY = answer(b'{"__type": "com.amazon#ThrottlingException", "message": "Slow"}', "400 Bad Request")
THROTTLED_429 = answer(b"", "429 Too Many Requests")
THROTTLED_503 = answer(
    b'{"message": "Rate exceeded"}', "503 Service Unavailable", "x-amzn-ErrorType: ThrottlingException"
)
EXPIRED_500 = answer(b'{"message": "m"}', "500 Internal Server Error", "x-amzn-ErrorType: ExpiredTokenException")
OK = answer(b"ok")


class Faults:
    """Fails the first requests as told, then answers."""

    def __init__(self, *faults: str, then: bytes = OK) -> None:
        self._faults = list(faults)
        self._then = then

    def __call__(self, peer: Peer, _: Arrived) -> None:
        if not self._faults:
            peer.send(self._then)
        elif (fault := self._faults.pop(0)) == "close":
            peer.close()
        elif fault == "reset":
            peer.reset()


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("fault", ["close", "reset"])
def test_an_idempotent_request_is_repeated(steady: Stage, method: str, fault: str) -> None:
    steady.upstream.script = Faults(fault)
    got = steady.call("/x", method, "X-Request-Id: repeated-request", body=b"" if method != "PUT" else b"body")
    assert got.status == 200
    assert [arrived.method for arrived in steady.upstream.arrived] == [method] * 2
    assert len({arrived.body for arrived in steady.upstream.arrived}) == 1
    for arrived in steady.upstream.arrived:
        assert_signed(arrived)


@pytest.mark.parametrize("method", ["POST", "PATCH", "PROPFIND"])
def test_any_other_is_not_repeated_once_it_was_sent(steady: Stage, method: str) -> None:
    steady.upstream.script = Faults("close")
    assert steady.call("/x", method, body=b"{}").status == 502
    assert len(steady.upstream.arrived) == 1


def test_repetitions_are_few(steady: Stage) -> None:
    steady.upstream.script = Faults(*["close"] * 10)
    got = steady.call("/x", "GET")
    assert got.status == 502
    assert len(steady.upstream.arrived) == 3
    assert steady.proxy.log_line(got.value("x-request-id"))["retries"] == 2


def test_a_connection_closed_while_unused_costs_a_get_nothing(steady: Stage) -> None:
    """Also if the proxy has not noticed yet: the repetition takes a fresh connection."""
    for pause in (0.2, 0.0, 0.0, 0.0):
        assert steady.call("/x").status == 200
        steady.upstream.hang_up()
        time.sleep(pause)
        assert steady.call("/x").status == 200


def test_a_repetition_takes_no_other_connection_that_may_be_closed(steady: Stage) -> None:
    together = threading.Barrier(4)
    old: set[Peer] = set()

    def first(peer: Peer, _: Arrived) -> None:
        together.wait(10)
        old.add(peer)
        peer.send(OK)

    def later(peer: Peer, _: Arrived) -> None:
        if peer in old:
            peer.close()
        else:
            peer.send(OK)

    steady.upstream.script = first
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: steady.call("/x").status, range(4))) == [200] * 4
    steady.upstream.script = later
    assert steady.call("/x").status == 200
    assert len(steady.upstream.arrived) == 6


def test_a_connection_known_to_be_closed_costs_a_post_nothing(steady: Stage) -> None:
    for number in range(1, 4):
        assert steady.call("/x", "POST").status == 200
        steady.upstream.hang_up()
        time.sleep(0.2)
        assert len(steady.upstream.arrived) == number


def test_never_after_an_answer_has_begun(steady: Stage) -> None:
    steady.upstream.script = answers(b"HTTP/1.1 200 OK\r\n", close=True)
    assert steady.call("/x", "GET").status == 502
    assert len(steady.upstream.arrived) == 1


@pytest.mark.parametrize("throttled", [THROTTLED_400, THROTTLED_TYPE_IN_BODY, THROTTLED_429])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_throttled_request_is_repeated_whatever_its_method(steady: Stage, throttled: bytes, method: str) -> None:
    steady.upstream.script = answers(throttled, throttled, OK)
    assert steady.call("/x", method).body == b"ok"
    assert len(steady.upstream.arrived) == 3


@pytest.mark.parametrize("throttled", [THROTTLED_400, THROTTLED_429])
def test_a_throttled_request_keeps_its_connection(steady: Stage, throttled: bytes) -> None:
    assert steady.call("/x").status == 200
    connections = steady.upstream.connections
    steady.upstream.script = answers(throttled, throttled, OK)
    assert steady.call("/x", "POST").status == 200
    assert len(steady.upstream.arrived) == 4
    assert steady.upstream.connections == connections


def test_one_throttled_answer_takes_no_capacity(steady: Stage) -> None:
    """All 40 calls are under way at once, though the request before met a 429."""
    steady.upstream.script = answers(THROTTLED_429, OK)
    assert steady.call("/x", "POST").status == 200
    together = threading.Barrier(40)

    def slow(peer: Peer, _: Arrived) -> None:
        together.wait(30)
        peer.send(OK)

    steady.upstream.script = slow
    with ThreadPoolExecutor(40) as threads:
        assert list(threads.map(lambda _: steady.call("/x", "POST").status, range(40))) == [200] * 40


@pytest.mark.parametrize("error", [THROTTLED_503, EXPIRED_500])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_a_write_is_not_repeated_after_an_error_that_may_follow_the_work(
    steady: Stage, method: str, error: bytes
) -> None:
    steady.upstream.script = answers(error, OK)
    got = steady.call("/x", method, body=b"{}")
    assert got.status in (429, 500)
    assert len(steady.upstream.arrived) == 1


def test_a_read_is_repeated_after_a_throttled_503(steady: Stage) -> None:
    steady.upstream.script = answers(THROTTLED_503, OK)
    assert steady.call("/x", "GET").body == b"ok"
    assert len(steady.upstream.arrived) == 2


@pytest.mark.parametrize("throttled", [THROTTLED_400, THROTTLED_429])
def test_throttling_that_lasts_is_told_as_429(steady: Stage, throttled: bytes) -> None:
    steady.upstream.script = answers(throttled)
    got = steady.call("/x", "POST", body=b"{}")
    assert got.status == 429
    assert int(got.value("retry-after")) >= 1
    assert got.json["error_code"] == "REQUEST_LIMIT_EXCEEDED"
    assert got.json["request_id"] == got.value("x-request-id")
    assert len(steady.upstream.arrived) == 3


def test_mlflows_own_429_is_relayed_as_it_is(steady: Stage) -> None:
    body = json.dumps({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "mlflow's own"}).encode()
    steady.upstream.script = answers(answer(body, "429 Too Many Requests", "Retry-After: 7"))
    got = steady.call("/x", "POST")
    assert (got.status, got.body, got.value("retry-after")) == (429, body, "7")
    assert len(steady.upstream.arrived) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_server_errors_are_relayed_not_repeated(steady: Stage, status: int) -> None:
    steady.upstream.script = answers(answer(b'{"error_code": "INTERNAL_ERROR", "message": "m"}', f"{status} Error"))
    assert steady.call("/x", "GET").status == status
    assert len(steady.upstream.arrived) == 1


def test_each_attempt_is_signed_freshly(steady: Stage) -> None:
    steady.upstream.script = answers(THROTTLED_400, THROTTLED_400, OK)
    times: list[str] = []
    for _ in range(3):  # until two attempts fall into different seconds, which the pauses make likely
        steady.upstream.reset()
        steady.upstream.script = answers(THROTTLED_400, THROTTLED_400, OK)
        steady.call("/x", "POST", body=b"{}")
        for arrived in steady.upstream.arrived:
            assert_signed(arrived)
        times += [arrived.value("x-amz-date") for arrived in steady.upstream.arrived]
    assert len(set(times)) > 1


# Connections that were never made: any method may be repeated


@pytest.fixture(scope="module")
def reconnecting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """A proxy whose upstream does not listen yet; the ports of both."""
    port = free_port()
    folder = tmp_path_factory.mktemp("reconnecting")
    with running(
        folder,
        [target("prod", f"http://127.0.0.1:{port}")],
        upstream={"retries": 5, "connections": 2},
        sections={"limits": {"queue": 0}},
    ) as proxy:
        yield proxy.port, port


def test_a_post_is_repeated_while_the_connection_is_refused(reconnecting: tuple[int, int]) -> None:
    port, upstream_port = reconnecting
    late: list[Upstream] = []
    timer = threading.Timer(0.05, lambda: late.append(Upstream(port=upstream_port)))
    timer.start()
    got = call(port, "/x", "POST", body=b"{}")
    assert got.status == 200
    assert [arrived.body for arrived in late[0].arrived] == [b"{}"]
    late[0].close()


def test_a_connection_that_is_always_refused_is_502_with_the_reason(reconnecting: tuple[int, int]) -> None:
    port, upstream_port = reconnecting
    socket.create_server(("127.0.0.1", upstream_port)).close()  # nobody listens there
    got = call(port, "/x", "POST", body=b"{}")
    assert got.status == 502
    assert got.value("retry-after") == "1"
    assert f"127.0.0.1:{upstream_port}" not in got.json["message"]
    assert "cannot be reached: connection refused" in got.json["message"]


# Clock skew


def skewed(minutes: float, message: str = "Signature expired: 20261124T000000Z is now earlier than") -> bytes:
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    body = json.dumps({"message": message}).encode()
    return answer(body, "403 Forbidden", "x-amzn-ErrorType: InvalidSignatureException", f"Date: {date}")


def minutes_ahead(arrived: Arrived) -> float:
    signed_at = datetime.strptime(arrived.value("x-amz-date"), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return (signed_at - datetime.now(UTC)).total_seconds() / 60


@pytest.fixture
def skewing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    upstream = Upstream()
    with running(tmp_path_factory.mktemp("skewing"), [target("prod", f"http://127.0.0.1:{upstream.port}")]) as proxy:
        yield Stage(proxy, upstream)
    upstream.close()


def test_a_wrong_clock_is_corrected_once_and_for_all(skewing: Stage) -> None:
    skewing.upstream.script = answers(skewed(10), OK)
    assert skewing.call("/x", "POST", body=b"{}").body == b"ok"
    first, second = skewing.upstream.arrived
    assert abs(minutes_ahead(first)) < 1
    assert abs(minutes_ahead(second) - 10) < 1
    assert_signed(second)
    for _ in range(3):
        skewing.call("/x", "POST", body=b"{}")
    assert len(skewing.upstream.arrived) == 5
    assert all(abs(minutes_ahead(arrived) - 10) < 1 for arrived in skewing.upstream.arrived[2:])
    # The same error again, with a Date that the clock agrees with now, is no skew any more.
    skewing.upstream.script = answers(skewed(10))
    assert skewing.call("/x", "POST").status == 403
    assert len(skewing.upstream.arrived) == 6
    # A service whose clock runs away is not followed within one request.
    skewing.upstream.script = answers(*(skewed(minutes) for minutes in range(20, 90, 10)))
    assert skewing.call("/x", "POST").status == 403
    assert len(skewing.upstream.arrived) == 8
    # And it goes back, too.
    skewing.upstream.script = answers(skewed(0), OK)
    assert skewing.call("/x", "POST").status == 200
    assert abs(minutes_ahead(skewing.upstream.arrived[-1])) < 1


@pytest.mark.parametrize(
    ("minutes", "message"),
    [
        (10, "The request signature we calculated does not match the signature you provided."),
        (0.5, "Signature expired"),
    ],
)
def test_a_mismatch_is_no_skew(steady: Stage, minutes: float, message: str) -> None:
    steady.upstream.script = answers(skewed(minutes, message))
    got = steady.call("/x", "POST")
    assert got.status == 403
    assert "InvalidSignatureException" in got.json["message"]
    assert got.json["error_code"] == "PERMISSION_DENIED"
    assert len(steady.upstream.arrived) == 1
    steady.upstream.reset()
    steady.call("/x")
    assert abs(minutes_ahead(steady.upstream.arrived[0])) < 1


def test_retries_stop_at_the_deadline(hasty: Stage) -> None:
    """One second to the first byte: an attempt that took most of it leaves no time for another."""

    def slow_and_gone(peer: Peer, _: Arrived) -> None:
        time.sleep(0.7)
        peer.close()

    hasty.upstream.script = slow_and_gone
    assert hasty.call("/x", "GET").status in (502, 504)
    assert len(hasty.upstream.arrived) <= 2
    hasty.upstream.reset()

    def slow_throttling(peer: Peer, _: Arrived) -> None:
        time.sleep(0.9)
        peer.send(THROTTLED_400)

    hasty.upstream.script = slow_throttling
    assert hasty.call("/x", "GET").status == 429
    assert len(hasty.upstream.arrived) <= 2


def test_a_repetition_does_not_disturb_the_next_request_on_the_connection(steady: Stage) -> None:
    steady.upstream.script = answers(THROTTLED_400, OK)
    with Caller(steady.port) as caller:
        caller.send(request("/x") + request("/y"))
        assert [caller.answer().body, caller.answer().body] == [b"ok", b"ok"]
