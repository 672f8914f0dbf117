"""Callers over TLS, and callers that would rather speak HTTP/2: they get HTTP/1.1."""

from __future__ import annotations

import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from tests.faults.callers import Caller, call_raw, chunked, request
from tests.faults.certificates import Authority
from tests.faults.conftest import Stage
from tests.faults.proxies import Proxy, running, target
from tests.faults.signatures import assert_signed
from tests.faults.upstreams import Arrived, Peer, Upstream, answer

MIB = 1 << 20


class TlsStage(NamedTuple):
    proxy: Proxy
    upstream: Upstream
    bundle: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.proxy.port}"


@pytest.fixture(scope="module")
def _secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsStage]:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder, "ours")
    certificate, key = authority.issue("localhost", "127.0.0.1")
    upstream = Upstream()
    server = {"tls_certificate": str(certificate), "tls_key": str(key)}
    with running(folder / "proxy", [target("prod", f"http://127.0.0.1:{upstream.port}")], server=server) as proxy:
        yield TlsStage(proxy, upstream, authority.bundle)
    upstream.close()


@pytest.fixture
def secure(_secure: TlsStage) -> TlsStage:
    _secure.upstream.reset()
    return _secure


def curl(*arguments: str) -> tuple[str, bytes]:
    """HTTP version and status, and the body."""
    command = ["curl", "-sS", "--max-time", "60", "-w", "%{stderr}%{http_version} %{http_code}", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=90, check=False)
    return done.stderr.decode(), done.stdout


def over_tls(stage: TlsStage, path: str, *arguments: str) -> tuple[str, bytes]:
    return curl("--cacert", str(stage.bundle), stage.url + path, *arguments)


def test_a_request_over_tls(secure: TlsStage) -> None:
    secure.upstream.script = lambda peer, arrived: peer.send(answer(arrived.body[::-1]))
    assert over_tls(secure, "/x?y=z", "-d", '{"a": 1}', "-H", "Content-Type: application/json") == (
        "1.1 200",
        b'}1 :"a"{',
    )
    (arrived,) = secure.upstream.arrived
    assert arrived.request_line == b"POST /x?y=z HTTP/1.1"
    assert arrived.value("content-length") == "8"
    assert_signed(arrived)


def test_the_authority_is_checked_as_host(secure: TlsStage) -> None:
    status, body = over_tls(secure, "/x", "-H", "Host: evil.example")
    assert status == "1.1 421"
    assert b"evil.example" in body
    assert not secure.upstream.arrived
    assert over_tls(secure, "/-/health", "-H", "Host: evil.example")[0] == "1.1 200"


def test_a_large_upload_and_a_large_download(secure: TlsStage, tmp_path: Path) -> None:
    body = bytes(range(256)) * (30 * MIB // 256)
    source = tmp_path / "body"
    source.write_bytes(body)
    secure.upstream.script = lambda peer, arrived: peer.send(answer(arrived.body[::-1]))
    status, got = over_tls(secure, "/x", "-T", str(source), "-H", "Expect:")
    assert status == "1.1 200"
    assert got == body[::-1]
    assert secure.upstream.arrived[0].body == body


def test_a_caller_that_reads_slowly_slows_the_upstream(secure: TlsStage) -> None:
    taken = 0
    done = threading.Event()

    def large(peer: Peer, _: Arrived) -> None:
        nonlocal taken
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (100 * MIB))
        try:
            for _piece in range(100):
                peer.send(b"a" * MIB)
                taken += MIB
        finally:
            done.set()

    secure.upstream.script = large
    over_tls(secure, "/x", "--limit-rate", "500k", "--max-time", "2")
    assert done.wait(10)  # curl has gone, so the proxy has let go
    assert taken < 60 * MIB  # what the kernel holds for four sockets, and no more of the 100


def test_an_upgrade_to_http2_is_an_ordinary_request(steady: Stage) -> None:
    """Java's client asks for it with its first request, which may have a body."""
    headers = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
    with Caller(steady.port) as caller:
        caller.send(request("/1", "GET", *headers))
        assert caller.answer().status == 200
        caller.send(request("/2", "PUT", *headers, body=b"hello") + request("/3"))
        assert [caller.answer().status for _ in range(2)] == [200, 200]
        caller.send(request("/4", "PUT", *headers, "Transfer-Encoding: chunked") + chunked(b"hel", b"lo"))
        assert caller.answer().status == 200
    assert steady.upstream.targets == ["/1", "/2", "/3", "/4"]
    assert [arrived.body for arrived in steady.upstream.arrived] == [b"", b"hello", b"", b"hello"]
    assert not [
        name
        for arrived in steady.upstream.arrived
        for name, _ in arrived.headers
        if name in ("upgrade", "http2-settings", "connection")
    ]


def test_http2_with_prior_knowledge_is_refused(steady: Stage) -> None:
    answer = call_raw(steady.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    assert answer.status in (400, 501)
    assert not steady.upstream.arrived


def test_http_1_over_tls(secure: TlsStage) -> None:
    context = ssl.create_default_context(cafile=str(secure.bundle))
    with Caller(secure.proxy.port, context) as caller:
        for _ in range(2):
            caller.send(request("/x"))
            assert caller.answer().status == 200
    with requests.Session() as session:
        session.trust_env = False
        got = session.get(f"{secure.url}/x", verify=str(secure.bundle), timeout=10)
        assert got.status_code == 200


@pytest.mark.filterwarnings("ignore:ssl.OP_NO:DeprecationWarning")
def test_old_tls_is_not_spoken(secure: TlsStage) -> None:
    context = ssl.create_default_context(cafile=str(secure.bundle))
    context.options |= ssl.OP_NO_TLSv1_2 | ssl.OP_NO_TLSv1_3
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(OSError):  # noqa: PT011
        Caller(secure.proxy.port, context)


def test_plain_http_to_the_tls_port_reaches_nothing(secure: TlsStage) -> None:
    with Caller(secure.proxy.port) as caller:
        caller.send(request("/x"))
        assert b"HTTP/" not in caller.makefile("rb").read()
    assert not secure.upstream.arrived
