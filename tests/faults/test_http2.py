"""Callers that speak HTTP/2: over TLS, as curl does by itself, and over plain TCP with prior knowledge."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from tests.faults.callers import Caller, request
from tests.faults.certificates import Authority
from tests.faults.conftest import Stage
from tests.faults.proxies import Proxy, running, target
from tests.faults.signatures import assert_signed
from tests.faults.upstreams import Arrived, Peer, Upstream, answer

MIB = 1 << 20

# In CI the tests run all the same, and fail.
curl_speaks_http2 = pytest.mark.skipif(
    not os.environ.get("CI")
    and (
        shutil.which("curl") is None
        or b"HTTP2" not in subprocess.run(["curl", "-V"], capture_output=True, check=False).stdout
    ),
    reason="needs a curl with HTTP/2",
)


class TlsStage(NamedTuple):
    proxy: Proxy
    upstream: Upstream
    bundle: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.proxy.port}"


@pytest.fixture(scope="module")
def _secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsStage]:
    folder = tmp_path_factory.mktemp("http2")
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
    return curl("--http2", "--cacert", str(stage.bundle), stage.url + path, *arguments)


@curl_speaks_http2
def test_a_request_over_tls(secure: TlsStage) -> None:
    secure.upstream.script = lambda peer, arrived: peer.send(answer(arrived.body[::-1]))
    assert over_tls(secure, "/x?y=z", "-d", '{"a": 1}', "-H", "Content-Type: application/json") == (
        "2 200",
        b'}1 :"a"{',
    )
    (arrived,) = secure.upstream.arrived
    assert arrived.request_line == b"POST /x?y=z HTTP/1.1"
    assert arrived.value("content-length") == "8"
    assert_signed(arrived)


@curl_speaks_http2
def test_the_authority_is_checked_as_host(secure: TlsStage) -> None:
    status, body = over_tls(secure, "/x", "-H", "Host: evil.example")
    assert status == "2 421"
    assert b"evil.example" in body
    assert not secure.upstream.arrived
    assert over_tls(secure, "/-/health", "-H", "Host: evil.example")[0] == "2 200"


@curl_speaks_http2
def test_a_large_upload_and_a_large_download(secure: TlsStage, tmp_path: Path) -> None:
    body = bytes(range(256)) * (30 * MIB // 256)
    source = tmp_path / "body"
    source.write_bytes(body)
    secure.upstream.script = lambda peer, arrived: peer.send(answer(arrived.body[::-1]))
    status, got = over_tls(secure, "/x", "-T", str(source), "-H", "Expect:")
    assert status == "2 200"
    assert got == body[::-1]
    assert secure.upstream.arrived[0].body == body


@curl_speaks_http2
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


@curl_speaks_http2
def test_streams_of_one_connection_do_not_wait_for_each_other(secure: TlsStage) -> None:
    release = threading.Event()

    def script(peer: Peer, arrived: Arrived) -> None:
        if arrived.target == "/slow":
            assert release.wait(20)
        else:
            release.set()
        peer.send(answer(arrived.target.encode()))

    secure.upstream.script = script
    status, body = over_tls(secure, "/slow", secure.url + "/fast", "--parallel", "--parallel-immediate")
    assert "2 2002 200" in status
    assert sorted((body[:5], body[5:])) == [b"/fast", b"/slow"]


# By hand, frame by frame (RFC 9113 section 4.1), where a client library would hide what happens

DATA, HEADERS, RST_STREAM = 0, 1, 3


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def put(body: bytes, *fields: tuple[str, str], ends: bool = True) -> bytes:
    """A connection's first bytes: the preface, and one request with its body; header fields as plain literals."""
    head = [(":method", "PUT"), (":scheme", "http"), (":path", "/x"), (":authority", "localhost"), *fields]
    block = b"".join(b"\0%c%b%c%b" % (len(n), n.encode(), len(v), v.encode()) for n, v in head)
    pieces = [body[start : start + 16_384] for start in range(0, len(body), 16_384)]
    data = b"".join(frame(DATA, 0, 1, piece) for piece in pieces)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    return preface + frame(HEADERS, 4, 1, block) + data + (frame(DATA, 1, 1) if ends else b"")


def frames_of_the_stream(port: int, data: bytes) -> list[tuple[int, bytes]]:
    """Types and payloads of what comes back on stream 1, until it is over."""
    frames: list[tuple[int, bytes]] = []
    with Caller(port) as caller:
        file = caller.makefile("rb")
        caller.send(data)
        with suppress(OSError):
            while head := file.read(9):
                payload = file.read(int.from_bytes(head[:3], "big"))
                if int.from_bytes(head[5:], "big") == 1:
                    frames.append((head[3], payload))
                    if head[3] == RST_STREAM or head[4] & 1:
                        caller.sock.settimeout(0.3)
    return frames


def test_too_large_a_body_is_answered_before_its_stream_is_reset(steady: Stage) -> None:
    """With NO_ERROR, as RFC 9113 section 8.1 wants it. (curl 7.88 looks at the reset only.)"""
    frames = frames_of_the_stream(steady.port, put(b"a" * 30_000, ("content-length", "70000000"), ends=False))
    assert [kind for kind, _ in frames] == [HEADERS, DATA, RST_STREAM]
    assert b"server.body_limit" in frames[1][1]
    assert int.from_bytes(frames[2][1], "big") == 0
    assert not steady.upstream.arrived


@pytest.mark.parametrize("length", ["3", "99", "x"])
def test_a_body_that_is_not_as_long_as_said_is_refused(steady: Stage, length: str) -> None:
    frames = frames_of_the_stream(steady.port, put(b"hello", ("content-length", length)))
    assert frames[-1][0] == RST_STREAM or b"BAD_REQUEST" in frames[-1][1]
    assert not steady.upstream.arrived


@pytest.mark.parametrize("name", ["transfer-encoding", "connection"])
def test_http_1_framing_has_no_place_in_http_2(steady: Stage, name: str) -> None:
    frames = frames_of_the_stream(steady.port, put(b"hello", (name, "chunked")))
    assert [kind for kind, _ in frames] == [RST_STREAM]
    assert not steady.upstream.arrived


def test_a_body_without_length_arrives(steady: Stage) -> None:
    assert frames_of_the_stream(steady.port, put(b"hello" * 3000))[0][0] == HEADERS
    assert steady.upstream.arrived[0].body == b"hello" * 3000


@curl_speaks_http2
def test_plain_http2_with_prior_knowledge(steady: Stage) -> None:
    url = f"http://localhost:{steady.port}"
    assert curl("--http2-prior-knowledge", f"{url}/x", "-d", "{}") == ("2 200", b"{}")
    assert curl("--http2-prior-knowledge", f"{url}/x", "-H", "Host: evil.example")[0] == "2 421"
    assert [arrived.request_line for arrived in steady.upstream.arrived] == [b"POST /x HTTP/1.1"]
    assert_signed(steady.upstream.arrived[0])


def test_an_upgrade_to_http2_is_an_ordinary_request(steady: Stage) -> None:
    headers = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
    assert steady.call("/x", "GET", *headers).status == 200
    (arrived,) = steady.upstream.arrived
    assert not [name for name, _ in arrived.headers if name in ("upgrade", "http2-settings", "connection")]


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
