"""Documents of identity providers: over trusted ways only, in bounded time and size."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.access.provider import Answer, Documents, free_port, json_answer
from tests.faults.certificates import Authority

from mlflow_proxy.access import fetch as module
from mlflow_proxy.access.fetch import FetchFailed, Source


@pytest.fixture
def server() -> Iterator[Documents]:
    with Documents() as running:
        yield running


def why(url: str, source: Source | None = None) -> str:
    with pytest.raises(FetchFailed) as caught:
        (source or Source()).fetch(url)
    return caught.value.reason


def test_a_document_comes_as_it_is(server: Documents) -> None:
    server.answers["/keys"] = json_answer({"keys": []})
    assert Source().fetch(f"{server.url}/keys") == b'{"keys": []}'
    assert Source().fetch_object(f"{server.url}/keys") == {"keys": []}
    assert server.asked == {"/keys": 2}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://keys.example.com/jwks", "not an https URL"),
        ("http://127.0.0.1.example.com/jwks", "not an https URL"),
        ("ftp://127.0.0.1/jwks", "not an https URL"),
        ("file:///etc/passwd", "not a plain URL"),
        ("https:///jwks", "not a plain URL"),
        ("https://user:word@keys.example.com/jwks", "not a plain URL"),
        ("https://keys.example.com/jw ks", "not a plain URL"),
        ("https://keys.example.com/\njwks", "not a plain URL"),
        ("https://[::1/jwks", "not a URL"),
        ("", "not a plain URL"),
    ],
)
def test_where_no_document_is_fetched_from(url: str, expected: str) -> None:
    assert expected in why(url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server: Documents, status: int) -> None:
    server.answers["/there"] = json_answer({})
    server.answers["/here"] = Answer(status=status, headers={"Location": f"{server.url}/there"})
    assert "redirect" in why(f"{server.url}/here")
    assert server.asked == {"/here": 1}


@pytest.mark.parametrize("status", [201, 204, 400, 404, 500, 503])
def test_other_statuses_are_failures(server: Documents, status: int) -> None:
    server.answers["/keys"] = Answer(b"" if status == 204 else b"{}", status)
    with pytest.raises(FetchFailed) as caught:
        Source().fetch(f"{server.url}/keys")
    assert caught.value.status == status
    assert str(status) in caught.value.reason


def test_size_is_bounded(server: Documents) -> None:
    server.answers["/fits"] = Answer(b"x" * (1 << 20))
    server.answers["/huge"] = Answer(b"x" * ((1 << 20) + 1))
    assert len(Source().fetch(f"{server.url}/fits")) == 1 << 20
    assert "more than 1 MiB" in why(f"{server.url}/huge")


def test_what_is_compressed_could_be_any_size(server: Documents) -> None:
    server.answers["/keys"] = Answer(gzip.compress(b"x" * (8 << 20)), headers={"Content-Encoding": "gzip"})
    assert "compressed" in why(f"{server.url}/keys")


def test_a_dripping_answer_ends_at_the_deadline(server: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENT_DEADLINE", 0.3)
    server.answers["/keys"] = Answer(b"x" * 1000, drip=0.1)
    assert "took longer than" in why(f"{server.url}/keys")


def test_a_silent_server_ends_the_wait(server: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_TIMEOUT", 0.2)
    server.held = threading.Event()
    assert "does not answer in time" in why(f"{server.url}/keys")
    server.held.set()


def test_nobody_there() -> None:
    assert "Connection refused" in why(f"http://127.0.0.1:{free_port()}/keys")


@pytest.mark.parametrize("body", [b"", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object(server: Documents, body: bytes) -> None:
    server.answers["/keys"] = Answer(body)
    with pytest.raises(FetchFailed, match="JSON"):
        Source().fetch_object(f"{server.url}/keys")


def test_environment_proxies_are_ignored(server: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/keys"] = json_answer({})
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert Source().fetch(f"{server.url}/keys") == b"{}"


def test_the_configured_proxy_is_asked_and_its_password_told_to_nobody(server: Documents) -> None:
    server.answers["/keys"] = json_answer({})
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        source = Source(proxy=f"http://user:s3cret@127.0.0.1:{listener.getsockname()[1]}")
        reason = why("https://keys.example.test/jwks", source)
        thread.join(60)
    assert asked[0].startswith(b"CONNECT keys.example.test:443 ")
    assert "upstream.proxy" in reason
    assert "s3cret" not in reason
    assert source.fetch(f"{server.url}/keys") == b"{}"  # loopback is not behind it


class TlsServer:
    """Answers one document over TLS."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._context = context
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(connection, server_side=True) as secure:
                    secure.recv(4096)
                    secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            except OSError:
                connection.close()


def test_only_trusted_certificates_of_the_right_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    server = TlsServer(ours.server("127.0.0.1"))
    try:
        url = f"https://127.0.0.1:{server.port}/keys"
        assert Source(ca_bundle=str(ours.bundle)).fetch(url) == b"{}"
        assert "not trusted" in why(url)
        assert "not trusted" in why(url, Source(ca_bundle=str(others.bundle)))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ours.bundle))
        assert "not trusted" in why(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(ours.bundle))  # where the system's CAs are, for OpenSSL
        assert Source().fetch(url) == b"{}"
    finally:
        server.close()
    wrong_name = TlsServer(ours.server("localhost"))
    try:
        bundle = Source(ca_bundle=str(ours.bundle))
        assert "not trusted" in why(f"https://127.0.0.1:{wrong_name.port}/keys", bundle)
    finally:
        wrong_name.close()
