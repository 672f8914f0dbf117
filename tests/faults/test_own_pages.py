"""What is the proxy's own: health, readiness, version; and whose requests it answers at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.faults.callers import Answer, call, call_raw
from tests.faults.conftest import Stage
from tests.faults.proxies import free_port, running, target
from tests.faults.signatures import assert_signed
from tests.faults.upstreams import Arrived, Peer, Upstream, answer, answers


def test_health_is_answered_always(steady: Stage) -> None:
    for head in (
        b"GET /-/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /-/health HTTP/1.1\r\nHost: 10.0.0.7:8080\r\n\r\n",  # a load balancer's
        b"GET /-/health HTTP/1.0\r\n\r\n",
        b"GET /-/health?a=b HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        got = call_raw(steady.port, head)
        assert (got.status, got.json) == (200, {"status": "ok"})
    assert call_raw(steady.port, b"HEAD /-/health HTTP/1.1\r\nHost: x\r\n\r\n", "HEAD").status == 200
    assert not steady.upstream.arrived


@pytest.mark.parametrize("path", ["/", "/api/2.0/mlflow/experiments/search", "/-/ready", "/-/version", "/t/app/"])
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.7", "[::2]:80", "evil:80"])
def test_other_hosts_get_421(steady: Stage, path: str, host: str) -> None:
    got = call_raw(steady.port, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert got.status == 421
    assert "server.allowed_hosts" in got.json["message"]
    assert not steady.upstream.arrived


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:1", "[::1]:80", "localhost."])
def test_its_own_hosts_are_answered(steady: Stage, host: str) -> None:
    assert call_raw(steady.port, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).status == 200


def test_version(steady: Stage) -> None:
    got = steady.call("/-/version")
    assert got.status == 200
    assert sorted(got.json) == ["python", "version"]
    assert got.values("x-request-id")
    assert not steady.upstream.arrived


@pytest.mark.parametrize("path", ["/-/x", "/-/", "/-/ready/", "/-/health/", "/-/%68ealth/x"])
def test_own_pages_never_reach_the_upstream(steady: Stage, path: str) -> None:
    got = steady.call(path, "GET", "X-Request-Id: an-own-page")
    if path == "/-/":
        assert got.status == 200
        assert b"<" in got.body
    else:
        assert got.status == 404
        assert got.json["error_code"] == "NOT_FOUND"
        assert got.json["request_id"] == got.value("x-request-id") == "an-own-page"
    assert all(target.startswith("/api/2.0/mlflow/experiments/search") for target in steady.upstream.targets)


@pytest.mark.parametrize("path", ["//-/version", "/%2D/version", "/%2d//version", "///-///version", "/-/%76ersion"])
def test_own_pages_under_any_spelling_are_the_same_page(steady: Stage, path: str) -> None:
    got = steady.call(path)
    assert (got.status, sorted(got.json)) == (200, ["python", "version"])
    assert not steady.upstream.arrived


@pytest.mark.parametrize("path", ["/-%2Fversion", "/%2D%2fversion", "/x/../-/version", "/./-/version", "/-/../x"])
def test_doubtful_spellings_are_refused(steady: Stage, path: str) -> None:
    assert steady.call(path).status == 400
    assert not steady.upstream.arrived


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
def test_other_methods_on_own_pages_are_405(steady: Stage, method: str) -> None:
    got = steady.call("/-/version", method, body=b"{}")
    assert got.status == 405
    assert got.values("allow")
    assert got.json["error_code"] == "BAD_REQUEST"
    assert not steady.upstream.arrived


def test_a_targets_own_dash_path_is_the_targets(steady: Stage) -> None:
    steady.call("/t/app/-/version")
    assert steady.upstream.targets == ["/-/version"]


def test_a_target_without_slash_redirects_to_it(steady: Stage) -> None:
    got = steady.call("/t/app?a=b")
    assert (got.status, got.value("location")) == (308, "app/?a=b")
    assert not steady.upstream.arrived


def test_an_unknown_target_is_404_and_names_those_there_are(steady: Stage) -> None:
    got = steady.call("/t/nobody/x")
    assert got.status == 404
    assert "/t/prod/" in got.json["message"]
    assert not steady.upstream.arrived


# Readiness


class Restartable:
    """A proxy, and an upstream that can be taken down and brought back on the same port."""

    def __init__(self, port: int, upstream_port: int) -> None:
        self.port = port
        self.upstream_port = upstream_port
        self.upstream: Upstream | None = None

    def up(self) -> Upstream:
        if self.upstream is None:
            self.upstream = Upstream(port=self.upstream_port)
        return self.upstream

    def down(self) -> None:
        if self.upstream is not None:
            self.upstream.close()
            self.upstream = None

    def ready(self) -> Answer:
        return call(self.port, "/-/ready")

    def wait(self, status: int) -> dict[str, Any]:
        """The report of the target, once readiness answers `status`."""
        deadline = time.monotonic() + 15
        while (got := self.ready()).status != status:
            assert time.monotonic() < deadline, got
            time.sleep(0.2)
        report = got.json["targets"]["prod"]
        assert isinstance(report, dict)
        return report


@pytest.fixture(scope="module")
def _restartable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restartable]:
    upstream_port = free_port()
    with running(
        tmp_path_factory.mktemp("ready"),
        [target("prod", f"http://127.0.0.1:{upstream_port}")],
        server={"ready_max_age": 0.5, "allowed_hosts": ["*.example.com", "mlflow.internal"]},
        upstream={"retries": 0},
    ) as proxy:
        yield Restartable(proxy.port, upstream_port)


@pytest.fixture
def restartable(_restartable: Restartable) -> Iterator[Restartable]:
    yield _restartable
    _restartable.down()


def test_ready_tells_why_not_and_recovers(restartable: Restartable) -> None:
    report = restartable.wait(503)
    assert report["ready"] is False
    assert "cannot be reached" in report["reason"]
    assert call(restartable.port, "/-/health").status == 200
    upstream = restartable.up()
    report = restartable.wait(200)
    assert report == {**report, "ready": True, "reason": None, "mode": "mlflow-tracking-server"}
    assert report["credentials"]["usable"] is True
    probe = upstream.arrived[-1]
    assert probe.request_line == b"POST /api/2.0/mlflow/experiments/search HTTP/1.1"
    assert json.loads(probe.body) == {"max_results": 1}
    assert_signed(probe)
    restartable.down()
    restartable.wait(503)


def test_the_reason_is_what_the_service_said(restartable: Restartable) -> None:
    denied = b'{"message": "User is not authorized"}'
    restartable.up().script = answers(answer(denied, "403 Forbidden", "x-amzn-ErrorType: AccessDeniedException"))
    deadline = time.monotonic() + 15
    while "AccessDeniedException" not in (restartable.wait(503)["reason"] or ""):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    restartable.up().script = answers(answer(b'{"error_code": "INTERNAL_ERROR", "message": "no database"}', "500 Oops"))
    while "no database" not in (restartable.wait(503)["reason"] or ""):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_one_probe_at_a_time_however_many_ask(restartable: Restartable) -> None:
    upstream = restartable.up()
    restartable.wait(200)
    time.sleep(0.7)  # what was learned is too old now
    lock = threading.Lock()
    at_once = most = 0

    def slow(peer: Peer, _: Arrived) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.3)
        with lock:
            at_once -= 1
        peer.send(answer())

    upstream.reset()
    upstream.script = slow
    with ThreadPoolExecutor(8) as threads:
        answers_ = list(threads.map(lambda _: restartable.ready().status, range(8)))
    assert answers_ == [200] * 8
    assert most == 1
    assert len(upstream.arrived) <= 2


def test_traffic_counts_as_a_probe(restartable: Restartable) -> None:
    upstream = restartable.up()
    restartable.wait(200)
    time.sleep(0.7)
    upstream.reset()
    call(restartable.port, "/x")
    assert restartable.ready().status == 200
    assert upstream.targets == ["/x"]


def test_a_probe_that_hangs_holds_nobody_up(restartable: Restartable) -> None:
    upstream = restartable.up()
    restartable.wait(200)
    time.sleep(0.7)
    upstream.reset()
    release = threading.Event()

    def hangs_for_probes(peer: Peer, arrived: Arrived) -> None:
        if "search" in arrived.target:
            assert release.wait(20)
        peer.send(answer())

    upstream.script = hangs_for_probes
    with ThreadPoolExecutor(1) as thread:
        probe = thread.submit(restartable.ready)
        upstream.wait_for(1)
        for _ in range(10):
            assert call(restartable.port, "/-/health").status == 200
            assert call(restartable.port, "/x").status == 200
            assert call(restartable.port, "/-/version").status == 200
        release.set()
        assert probe.result(20).status == 200


def test_a_silent_target_is_named_and_does_not_hide_the_others(tmp_path: Path) -> None:
    silent, well = Upstream(), Upstream()
    silent.script = lambda *_: None  # takes the request and says nothing
    targets = [target(name, f"http://127.0.0.1:{each.port}") for name, each in (("silent", silent), ("well", well))]
    try:
        with running(tmp_path / "two", targets) as proxy:
            got = call(proxy.port, "/-/ready")
            assert got.status == 503
            assert got.json["targets"]["well"]["ready"] is True
            assert "no answer within" in got.json["targets"]["silent"]["reason"]
    finally:
        silent.close()
        well.close()


@pytest.mark.parametrize(
    ("name", "site", "dest", "status"),
    [
        ("prod", "cross-site", "image", 403),
        ("prod", "same-site", "script", 403),
        ("nope", "cross-site", "document", 404),
        ("nope", "same-origin", "empty", 404),
        ("nope", "none", "document", 404),
    ],
)
def test_other_sites_may_link_to_the_ui_but_not_embed_it(
    restartable: Restartable, name: str, site: str, dest: str, status: int
) -> None:
    got = call(restartable.port, f"/-/ui/{name}", "GET", f"Sec-Fetch-Site: {site}", f"Sec-Fetch-Dest: {dest}")
    assert got.status == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("a.example.com", 200), ("example.com", 421), ("a.b.example.com:8", 200), ("mlflow.internal", 200), ("x", 421)],
)
def test_allowed_hosts(restartable: Restartable, host: str, status: int) -> None:
    restartable.up()
    assert call_raw(restartable.port, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).status == status
