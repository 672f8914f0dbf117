"""From the gate to MLflow and back: which headers go in, how the answer streams out, and how faults break it."""

from __future__ import annotations

import asyncio
import socket
import struct
import uuid
from collections.abc import AsyncIterator

import aiohttp
from yarl import URL

from .asgi import Request, Send
from .clock import ServiceClock
from .errors import AwsError
from .faults import Fault
from .targets import APP_HEADER, TRACKING_HEADER, Target

# MLflow opens its Assistant API to callers that it takes for local, which behind a gate would be all of them;
# an address of the documentation block (RFC 5737) is nobody's.
_CALLER = "203.0.113.10"
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
_NOT_UPSTREAM = {
    *_HOP_BY_HOP, "host", "authorization", "content-length", "cookie", "expect", "forwarded", "x-real-ip",
    TRACKING_HEADER, APP_HEADER,
}  # fmt: skip
_PREFIXES = ("x-amz-", "x-forwarded-")
_AUTO = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class Relay:
    """Sends admitted requests to the target's MLflow server; one instance, one pool."""

    def __init__(self, clock: ServiceClock) -> None:
        # Shorter than the five seconds after which MLflow's uvicorn closes an idle connection.
        self._connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_AUTO,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            trust_env=False,
        )
        self._clock = clock

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def forward(self, request: Request, target: Target, fault: Fault | None, send: Send) -> int:
        """Relay one request and its answer; the status that was answered, 0 after a reset.

        Raises AwsError when MLflow cannot be reached.
        """
        if fault is not None and fault.reset == "before":
            return await _reset(send)
        url = URL(target.upstream + request.path + (f"?{request.query}" if request.query else ""), encoded=True)
        try:
            async with self._session.request(
                request.method,
                url,
                headers=_upstream_headers(request),
                data=request.body or None,
                allow_redirects=False,
            ) as answer:
                if fault is not None and fault.reset == "after":
                    await answer.read()
                    return await _reset(send)
                return await self._answer(answer, fault, send)
        except aiohttp.ClientConnectionError as error:
            raise AwsError(
                "ServiceUnavailableException", "MLflow did not answer.", status=503, reason=str(error)
            ) from error

    async def _answer(self, answer: aiohttp.ClientResponse, fault: Fault | None, send: Send) -> int:
        headers = _downstream_headers(answer)
        headers += [(b"date", self._clock.http_date().encode()), (b"x-amzn-requestid", str(uuid.uuid4()).encode())]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        room = _room(answer, fault)
        async for piece in _pieces(answer, fault):
            if room is not None and len(piece) >= room:
                await send({"type": "http.response.body", "body": piece[:room], "more_body": True})
                if fault is not None and fault.reset == "body":
                    await _reset(send)
                else:
                    _transport(send).close()
                    await asyncio.sleep(0)
                return answer.status
            room = None if room is None else room - len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return answer.status


def _upstream_headers(request: Request) -> list[tuple[str, str]]:
    named = {name.strip().lower() for value in request.values("connection") for name in value.split(",")}
    kept = [
        (name, value)
        for name, value in request.headers
        if name not in _NOT_UPSTREAM and name not in named and not name.startswith(_PREFIXES)
    ]
    return [*kept, ("x-forwarded-for", _CALLER)]


def _downstream_headers(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    dropped = {*_HOP_BY_HOP, "date", "server"}
    return [
        (name.lower(), value) for name, value in answer.raw_headers if name.decode("latin-1").lower() not in dropped
    ]


def _room(answer: aiohttp.ClientResponse, fault: Fault | None) -> int | None:
    """How many bytes of the body may pass before the connection breaks."""
    if fault is None:
        return None
    if fault.truncate is not None:
        return fault.truncate
    if fault.reset == "body":
        return max(1, (answer.content_length or 2) // 2)
    return None


async def _pieces(answer: aiohttp.ClientResponse, fault: Fault | None) -> AsyncIterator[bytes]:
    slow = fault is not None and fault.chunk_delay > 0
    async for chunk in answer.content.iter_any():
        if not slow or fault is None:
            yield chunk
            continue
        for at in range(0, len(chunk), fault.chunk_bytes):
            await asyncio.sleep(fault.chunk_delay)
            yield chunk[at : at + fault.chunk_bytes]


def _transport(send: Send) -> asyncio.Transport:
    """The connection behind an answer: uvicorn hands out a bound method of the object that holds it."""
    transport: asyncio.Transport = send.__self__.transport  # type: ignore[attr-defined]
    return transport


async def _reset(send: Send) -> int:
    """End the connection with a TCP reset rather than an orderly close."""
    transport = _transport(send)
    raw = transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    await asyncio.sleep(0)
    return 0
