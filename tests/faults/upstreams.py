"""Upstreams on raw sockets: they record the very bytes that arrive, and answer as a test tells them."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

_WAIT = 30.0


@dataclass(frozen=True)
class Arrived:
    """One request as it arrived."""

    head: bytes
    body: bytes

    @property
    def request_line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def method(self) -> str:
        return self.request_line.split(b" ")[0].decode("ascii")

    @property
    def target(self) -> str:
        return self.request_line.split(b" ")[1].decode("ascii")

    @property
    def headers(self) -> list[tuple[str, str]]:
        lines = self.head.rstrip(b"\r\n").split(b"\r\n")[1:]
        pairs = (line.decode("latin-1").partition(": ") for line in lines)
        return [(name, value) for name, _, value in pairs]

    def values(self, name: str) -> list[str]:
        return [value for given, value in self.headers if given == name]

    def value(self, name: str) -> str:
        (value,) = self.values(name)
        return value


class Peer:
    """One connection that the proxy made."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(_WAIT)
        self.closed = False
        self._unread = b""

    def read_head(self) -> bytes | None:
        """The next request's head; None if the proxy closed the connection."""
        while b"\r\n\r\n" not in self._unread:
            data = self._receive()
            if not data:
                return None
            self._unread += data
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def read_body(self, head: bytes) -> bytes:
        """The body after `head`. The proxy sends no other framing than Content-Length."""
        length = int(next((v for n, v in Arrived(head, b"").headers if n == "content-length"), "0"))
        parts, size = [self._unread], len(self._unread)
        while size < length:
            data = self._receive()
            if not data:
                raise ConnectionError("the body was cut short")
            parts.append(data)
            size += len(data)
        whole = b"".join(parts)
        self._unread = whole[length:]
        return whole[:length]

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def close(self) -> None:
        self.closed = True
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.closed = True
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_closed(self, seconds: float) -> bool:
        """Whether the proxy closes this connection within `seconds`."""
        self.sock.settimeout(seconds)
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def _receive(self) -> bytes:
        try:
            return self.sock.recv(1 << 20)
        except OSError:
            return b""


Script = Callable[[Peer, Arrived], None]


def answer(body: bytes = b"{}", status: str = "200 OK", *headers: str) -> bytes:
    """A plain answer with its length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def answers(*given: bytes, close: bool = False) -> Script:
    """Gives these answers one after another, the last one from then on; then closes the connection if told so."""
    left = list(given)
    lock = threading.Lock()

    def script(peer: Peer, arrived: Arrived) -> None:
        with lock:
            data = left.pop(0) if len(left) > 1 else left[0]
        peer.send(data)
        if close:
            peer.close()

    return script


class Upstream:
    """A server that does what `script` says for each request, and `greeting` for each new connection."""

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._peers: list[Peer] = []
        self.reset()
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """Forget what arrived, and answer every request with 200 from now on."""
        self.script: Script = answers(answer())
        self.greeting: Callable[[socket.socket], None] | None = None
        self.reads_bodies = True
        self.arrived: list[Arrived] = []
        self.connections = 0

    def hang_up(self) -> None:
        """Close all connections, used or not."""
        for peer in self._peers:
            if not peer.closed:
                peer.close()
        self._peers.clear()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()

    @property
    def targets(self) -> list[str]:
        return [arrived.target for arrived in self.arrived]

    def wait_for(self, count: int, seconds: float = 10.0) -> None:
        """Wait until `count` requests have arrived."""
        end = time.monotonic() + seconds
        while len(self.arrived) < count:
            assert time.monotonic() < end, f"{len(self.arrived)} of {count} requests arrived"
            time.sleep(0.01)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self.greeting is not None:
                self.greeting(sock)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
        except OSError:
            sock.close()
            return
        peer = Peer(sock)
        self._peers.append(peer)
        with suppress(OSError):
            while not peer.closed and (head := peer.read_head()) is not None:
                arrived = Arrived(head, peer.read_body(head) if self.reads_bodies else b"")
                self.arrived.append(arrived)
                self.script(peer, arrived)
        if not peer.closed:
            peer.close()
