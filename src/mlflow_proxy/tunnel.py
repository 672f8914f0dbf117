"""A connection to the upstream through an HTTP proxy on the way out (CONNECT, RFC 9110 section 9.3.6)."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
from typing import cast
from urllib.parse import unquote, urlsplit

from mlflow_proxy.http1 import Connection

_ANSWER_LIMIT = 64 * 1024
_FORBIDDEN = re.compile(r"HTTP/1\.\d 40[137](?: |$)")
_SUCCESS = re.compile(r"HTTP/1\.\d 2\d\d(?: |$)")  # any 2xx opens the tunnel


async def open_tunnel(
    proxy: str, host: str, port: int, tls: ssl.SSLContext | None, connection: Connection
) -> Connection:
    """Connect `connection` to `host` through `proxy`, with TLS to `host` inside the tunnel if `tls` is given.

    Raises OSError if the proxy cannot be reached, TunnelRefused if it refuses; the caller sets the deadline.
    """
    loop = asyncio.get_running_loop()
    parts = urlsplit(proxy)
    request = _request(host, port, parts.username, parts.password)
    tunnel = _Tunnel(loop, request)
    try:
        transport, _ = await loop.create_connection(lambda: tunnel, parts.hostname or "", parts.port or 80)
        await tunnel.opened
        if tls is None:
            transport.set_protocol(connection)
            connection.connection_made(transport)
            return connection
        # uvloop tells the protocol of the new transport itself; asyncio does not.
        secured = await loop.start_tls(transport, connection, tls, server_hostname=host)
        if secured is None:
            raise TunnelRefused("the tunnel was closed during the TLS handshake")
        connection.connection_made(secured)
        return connection
    except BaseException:
        tunnel.abort()
        raise


def _request(host: str, port: int, user: str | None, password: str | None) -> bytes:
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"host: {authority}"]
    if user is not None:
        credentials = f"{unquote(user)}:{unquote(password or '')}"
        lines.append(f"proxy-authorization: Basic {base64.b64encode(credentials.encode()).decode()}")
    return "\r\n".join([*lines, "", ""]).encode()


class TunnelRefused(OSError):
    """The proxy on the way out let nothing through. `words` are our own; `detail` is what it said, for the log.

    `lasting`: it wants other credentials, or does not let this host pass, so trying again cannot help.
    """

    def __init__(self, words: str, *, detail: str = "", lasting: bool = False) -> None:
        super().__init__(f"{words} ({detail})" if detail else words)
        self.words = words
        self.detail = detail
        self.lasting = lasting


class _Tunnel(asyncio.Protocol):
    """Sends the CONNECT request; `opened` tells how it ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: bytes) -> None:
        self._request = request
        self._answer = b""
        self._transport: asyncio.Transport | None = None
        self.opened: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def abort(self) -> None:
        """Nobody waits for `opened` any more."""
        self.opened.cancel()
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self.opened.done():
            return
        if b"\r\n\r\n" in self._answer:
            status = self._answer.split(b"\r\n", 1)[0].decode("latin-1")
            if _SUCCESS.match(status) and self._answer.endswith(b"\r\n\r\n"):
                self.opened.set_result(None)
            else:
                lasting = _FORBIDDEN.match(status) is not None
                refused = TunnelRefused(
                    "the outgoing HTTP proxy refused the tunnel", detail=status[:200], lasting=lasting
                )
                self.opened.set_exception(refused)
        elif len(self._answer) > _ANSWER_LIMIT:
            self.opened.set_exception(TunnelRefused("the outgoing HTTP proxy's answer is not HTTP"))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            reason = str(error) if error else ""
            self.opened.set_exception(TunnelRefused("the outgoing HTTP proxy closed the connection", detail=reason))
