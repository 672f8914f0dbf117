"""On the way out through an HTTP proxy: CONNECT, and the rest is the upstream's alone."""

from __future__ import annotations

import base64
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
from tests.faults.callers import call
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, running, target
from tests.faults.signatures import assert_signed
from tests.faults.upstreams import Arrived, Peer, Upstream, answer


class Stage(NamedTuple):
    proxy: Proxy
    tunnels: Upstream
    plain: Upstream
    tls: Upstream


def open_tunnel(peer: Peer, arrived: Arrived, status: bytes = b"HTTP/1.1 200 Connection established") -> None:
    host, _, port = arrived.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as onward:
        peer.send(status + b"\r\nX-Via: a\r\n\r\n")
        back = threading.Thread(target=_pump, args=(onward, peer.sock), daemon=True)
        back.start()
        _pump(peer.sock, onward)
        back.join(10)
    peer.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("outgoing")
    authority = Authority(folder, "ours")
    tunnels, plain, tls = Upstream(), Upstream(), Upstream(authority.server("localhost"))
    targets = [
        target("plain", f"http://localhost:{plain.port}"),
        target("tls", f"https://localhost:{tls.port}", ca_bundle=str(authority.bundle)),
        target("untrusted", f"https://localhost:{tls.port}"),
    ]
    url = f"http://user:p%40ss@127.0.0.1:{tunnels.port}"
    with running(folder / "proxy", targets, upstream={"proxy": url, "connect_timeout": 1}) as proxy:
        yield Stage(proxy, tunnels, plain, tls)
    for upstream in (tunnels, plain, tls):
        upstream.close()


@pytest.fixture
def stage(_stage: Stage) -> Stage:
    for upstream in (_stage.tunnels, _stage.plain, _stage.tls):
        upstream.reset()
        upstream.hang_up()
    _stage.tunnels.script = open_tunnel
    return _stage


@pytest.mark.parametrize("name", ["plain", "tls"])
def test_requests_travel_through_the_tunnel(stage: Stage, name: str) -> None:
    upstream: Upstream = getattr(stage, name)
    for _ in range(3):
        got = call(stage.proxy.port, f"/t/{name}/x", "PUT", body=b"a" * 400_000)
        assert got.status == 200
    assert {arrived.request_line for arrived in upstream.arrived} == {b"PUT /x HTTP/1.1"}
    assert_signed(upstream.arrived[-1])
    credentials = base64.b64encode(b"user:p@ss").decode()
    for connect in stage.tunnels.arrived:
        assert connect.request_line == f"CONNECT localhost:{upstream.port} HTTP/1.1".encode()
        assert connect.value("host") == f"localhost:{upstream.port}"
        assert connect.value("proxy-authorization") == f"Basic {credentials}"
        assert len(connect.headers) == 2
    for arrived in upstream.arrived:
        assert not arrived.values("proxy-authorization")


def test_tls_is_verified_through_the_tunnel_too(stage: Stage) -> None:
    got = call(stage.proxy.port, "/t/untrusted/x", "POST", body=b"{}")
    assert got.status == 501
    assert "its TLS certificate is not trusted" in got.json["message"]
    assert not stage.tls.arrived


@pytest.mark.parametrize("name", ["plain", "tls"])
@pytest.mark.parametrize(
    ("refusal", "status", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", 501, "407 Proxy Authentication"),
        (b"HTTP/1.1 403 Not allowed here\r\nContent-Length: 0\r\n\r\n", 501, "403 Not allowed here"),
        (b"HTTP/1.1 503 Unavailable\r\nContent-Length: 4\r\n\r\nbusy", 502, "503 Unavailable"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", 502, "refused the tunnel"),
        (b"\0" * 70_000, 502, "not HTTP"),
        (b"", 502, "closed the connection"),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison", 502, ""),
    ],
    ids=["407", "403", "503", "other", "garbage", "closed", "surplus"],
)
def test_a_refused_tunnel_is_refused_with_the_reason(
    stage: Stage, name: str, refusal: bytes, status: int, words: str
) -> None:
    """502 where it may pass, 501 where the outgoing proxy forbids it; what that said is in the log alone."""

    def refuse(peer: Peer, _: Arrived) -> None:
        peer.send(refusal)
        peer.close()

    stage.tunnels.script = refuse
    got = call(stage.proxy.port, f"/t/{name}/x", "POST", body=b"{}")
    assert got.status == status
    assert words in stage.proxy.log_line(got.json["request_id"])["error"]
    assert not re.search(r"40[37]|Unavailable|SSH", got.json["message"])
    assert "p@ss" not in got.json["message"]
    assert "p%40ss" not in stage.proxy.stderr.read_text() + stage.proxy.stdout.read_text()
    stage.tunnels.script = open_tunnel
    assert call(stage.proxy.port, f"/t/{name}/x").status == 200


@pytest.mark.parametrize("status", [b"HTTP/1.1 204 No Content", b"HTTP/1.0 299"])
def test_any_2xx_opens_the_tunnel(stage: Stage, status: bytes) -> None:
    def welcome(peer: Peer, arrived: Arrived) -> None:
        open_tunnel(peer, arrived, status)

    stage.tunnels.script = welcome
    assert call(stage.proxy.port, "/t/plain/x").status == 200


def test_a_post_is_repeated_when_the_tunnel_was_refused_first(stage: Stage) -> None:
    refused = iter([True])

    def refuse_once(peer: Peer, arrived: Arrived) -> None:
        if next(refused, False):
            peer.send(answer(b"", "503 Unavailable"))
            peer.close()
        else:
            open_tunnel(peer, arrived)

    stage.tunnels.script = refuse_once
    assert call(stage.proxy.port, "/t/plain/x", "POST", body=b"{}").status == 200
    assert len(stage.tunnels.arrived) == 2
    assert len(stage.plain.arrived) == 1


def test_a_proxy_that_says_nothing_is_502_in_time(stage: Stage) -> None:
    def silent(peer: Peer, _: Arrived) -> None:
        peer.wait_closed(20)
        peer.close()

    stage.tunnels.script = silent
    got = call(stage.proxy.port, "/t/plain/x", "POST", body=b"{}")
    assert got.status == 502
    assert "no connection within 1 s" in got.json["message"]
