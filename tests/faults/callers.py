"""Callers that speak to the proxy byte by byte."""

from __future__ import annotations

import io
import json
import socket
import ssl
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

_WAIT = 30.0


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for given, value in self.headers if given.lower() == name]

    def value(self, name: str) -> str:
        (value,) = self.values(name)
        return value

    @property
    def json(self) -> dict[str, Any]:
        content = json.loads(self.body)
        assert isinstance(content, dict)
        return content


class Caller:
    """One connection to the proxy."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.sock: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=_WAIT)
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname="localhost")
        self._file = _Kept(socket.SocketIO(self.sock, "rb"))

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def head(self, method: str = "GET") -> HTTPResponse:
        """The next answer when its head has arrived; its body can be read piece by piece."""
        response = HTTPResponse(self, method=method)  # type: ignore[arg-type]  # all it needs is makefile
        response.begin()
        return response

    def answer(self, method: str = "GET") -> Answer:
        """The next answer, whole; raises http.client.HTTPException if it is cut short."""
        response = self.head(method)
        return Answer(response.status, response.getheaders(), response.read())

    def makefile(self, mode: str) -> io.BufferedReader:
        """For HTTPResponse: the one buffered reader of this connection."""
        return self._file

    def line(self) -> bytes:
        return self._file.readline()

    def is_closed(self, seconds: float = 10.0) -> bool:
        """Whether the proxy closes this connection within `seconds`, saying nothing more."""
        self.sock.settimeout(seconds)
        try:
            rest = self._file.read(1)
        except TimeoutError:
            return False
        except OSError:
            return True
        return rest == b""


class _Kept(io.BufferedReader):
    """Stays open when an HTTPResponse has read its answer."""

    def close(self) -> None:
        pass


def request(target: str = "/", method: str = "GET", *headers: str, body: bytes = b"") -> bytes:
    """A plain request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def call(port: int, target: str = "/", method: str = "GET", *headers: str, body: bytes = b"") -> Answer:
    """One request on a connection of its own."""
    return call_raw(port, request(target, method, *headers, body=body), method)


def call_raw(port: int, data: bytes, method: str = "GET") -> Answer:
    """Send `data` on a connection of its own and read one answer."""
    with Caller(port) as caller:
        caller.send(data)
        return caller.answer(method)


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    """A body in chunked coding."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailers + b"\r\n"
