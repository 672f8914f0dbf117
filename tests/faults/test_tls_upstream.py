"""TLS to the upstream is always verified, and nothing is read from the environment but where it should be."""

from __future__ import annotations

import re
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from http.client import IncompleteRead

import pytest
from tests.faults.callers import Answer, call
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, running, target
from tests.faults.signatures import assert_signed
from tests.faults.upstreams import Upstream, answer, answers

NOBODY = "http://127.0.0.1:1"


class TlsStage:
    """One proxy, and an upstream per way to be right or wrong."""

    def __init__(self, proxy: Proxy, upstreams: dict[str, Upstream]) -> None:
        self.proxy = proxy
        self.upstreams = upstreams
        for upstream in upstreams.values():
            upstream.reset()

    def call(self, name: str, method: str = "GET", body: bytes = b"") -> Answer:
        return call(self.proxy.port, f"/t/{name}/x", method, body=body)


def _old_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    with warnings.catch_warnings(action="ignore"):
        context.options |= ssl.OP_NO_TLSv1_2 | ssl.OP_NO_TLSv1_3
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsStage]:
    folder = tmp_path_factory.mktemp("tls")
    ours, others = Authority(folder, "ours"), Authority(folder, "others")
    upstreams = {
        "trusted": Upstream(ours.server("localhost", "127.0.0.1")),
        "other-ca": Upstream(others.server("localhost")),
        "other-name": Upstream(ours.server("elsewhere.example")),
        "expired": Upstream(ours.server("localhost", valid=timedelta(days=-1))),
        "old-tls": Upstream(_old_tls(ours.server("localhost"))),
        "no-tls": Upstream(),
    }
    targets = [
        target(name, f"https://localhost:{upstream.port}", ca_bundle=str(ours.bundle))
        for name, upstream in upstreams.items()
    ]
    targets.append(target("system", f"https://localhost:{upstreams['trusted'].port}"))
    targets.append(target("by-address", f"https://127.0.0.1:{upstreams['trusted'].port}", ca_bundle=str(ours.bundle)))
    targets.append(target("unresolvable", "https://no-such-host.invalid"))
    targets.append(target("long-label", f"https://{'a' * 64}.invalid"))
    environ = dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), NOBODY
    )
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = [socket.socket() for _ in range(3)]  # fill its queue, so that it accepts no more
    for sock in waiting:
        sock.setblocking(False)
        sock.connect_ex(full.getsockname())
    targets.append(target("not-accepting", f"http://127.0.0.1:{full.getsockname()[1]}"))
    with running(folder / "proxy", targets, environ=environ, upstream={"connect_timeout": 1, "retries": 1}) as proxy:
        yield TlsStage(proxy, upstreams)
    for sock in (full, *waiting):
        sock.close()
    for upstream in upstreams.values():
        upstream.close()


@pytest.fixture
def stage(_stage: TlsStage) -> TlsStage:
    return TlsStage(_stage.proxy, _stage.upstreams)


@pytest.mark.parametrize("name", ["trusted", "by-address"])
def test_a_certificate_of_the_targets_bundle_is_accepted(stage: TlsStage, name: str) -> None:
    """With every proxy variable of the environment set, which count for nothing."""
    for _ in range(3):
        assert stage.call(name, "POST", b"{}").status == 200
    arrived = stage.upstreams["trusted"].arrived[-1]
    assert arrived.request_line == b"POST /x HTTP/1.1"
    assert_signed(arrived)


@pytest.mark.parametrize(
    ("name", "status", "words", "reason"),
    [
        ("other-ca", 501, "its TLS certificate is not trusted", "its TLS certificate is not trusted ("),
        ("system", 501, "its TLS certificate is not trusted", "its TLS certificate is not trusted ("),
        ("other-name", 501, "its TLS certificate is not trusted", "not trusted (Hostname mismatch"),
        ("expired", 501, "its TLS certificate is not trusted", "not trusted (certificate has expired)"),
        ("old-tls", 502, "cannot be reached", "cannot be reached"),
        ("no-tls", 502, "no connection within 1 s", "no connection within 1 s"),
        ("not-accepting", 502, "no connection within 1 s", "no connection within 1 s"),
        ("unresolvable", 501, "cannot be reached", "no-such-host.invalid cannot be reached"),
        ("long-label", 501, "a label has at most 63 characters", "a label has at most 63 characters"),
    ],
)
def test_anything_else_is_refused_with_the_reason(
    stage: TlsStage, name: str, status: int, words: str, reason: str
) -> None:
    """Those that another attempt cannot cure with a status that clients do not repeat; addresses are in the log."""
    got = stage.call(name, "POST", b"{}")
    assert got.status == status
    assert words in got.json["message"]
    assert name in got.json["message"]
    line = stage.proxy.log_line(got.json["request_id"])
    assert line["target"] == name
    assert reason in line["error"]
    assert not re.search(r"127\.0\.0\.1|localhost|\.invalid", got.json["message"])
    assert not any(upstream.arrived for upstream in stage.upstreams.values())


def test_a_post_is_repeated_when_the_handshake_was_cut(stage: TlsStage) -> None:
    upstream = stage.upstreams["trusted"]
    upstream.hang_up()
    cut = iter([True])

    def greet(sock: object) -> None:
        if next(cut, False):
            raise OSError("cut")

    upstream.greeting = greet
    time.sleep(0.2)
    assert stage.call("trusted", "POST", b"{}").status == 200
    assert (len(upstream.arrived), upstream.connections) == (1, 2)


@pytest.mark.parametrize("size", [0, 1, 100_000, 5_000_000])
def test_large_bodies_both_ways(stage: TlsStage, size: int) -> None:
    upstream = stage.upstreams["trusted"]
    upstream.script = lambda peer, arrived: peer.send(answer(arrived.body[::-1]))
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    assert stage.call("trusted", "PUT", body).body == body[::-1]
    assert_signed(upstream.arrived[-1])


def test_an_answer_cut_inside_tls_is_cut(stage: TlsStage) -> None:
    stage.upstreams["trusted"].script = answers(answer(b"a" * 100)[:-1], close=True)
    with pytest.raises(IncompleteRead):
        stage.call("trusted")
