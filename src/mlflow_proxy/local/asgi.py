"""The few things the stand-in needs of ASGI: a request held whole, and small answers.

Bodies are collected because their hash is part of the signature.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .errors import AwsError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[str, str]]


class ClientGone(Exception):
    """The caller closed the connection before its request was whole."""


@dataclass(frozen=True)
class Request:
    """A request as it arrived: path and query raw, header names in lower case, repeated headers kept."""

    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def values(self, name: str) -> list[str]:
        """All values of a header, in order."""
        return [value for key, value in self.headers if key == name]

    def value(self, name: str) -> str | None:
        """The only value of a header; None if it is missing or repeated."""
        values = self.values(name)
        return values[0] if len(values) == 1 else None


def header_text(value: bytes) -> str:
    """A header value as text: UTF-8 as clients sign it, Latin-1 for anything else."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


async def read_request(scope: Scope, receive: Receive) -> Request:
    """Collect the request; raises ClientGone."""
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return Request(
        method=scope["method"],
        path=scope["raw_path"].decode("latin-1"),
        query=scope["query_string"].decode("latin-1"),
        headers=tuple((name.decode("latin-1").lower(), header_text(value)) for name, value in scope["headers"]),
        body=b"".join(chunks),
    )


async def respond(send: Send, status: int, headers: Headers, body: bytes, *, head: bool = False) -> None:
    """Send one whole answer; with `head` its body is only announced."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": b"" if head else body})


async def respond_json(send: Send, status: int, value: object, headers: Headers = ()) -> None:
    """Send one JSON answer."""
    body = json.dumps(value, indent=1).encode() + b"\n"
    await respond(send, status, [("content-type", "application/json"), *headers], body)


def error_answer(error: AwsError, date: str) -> tuple[list[tuple[str, str]], bytes]:
    """Headers and body of a refusal as AWS's REST services shape it."""
    headers = [
        ("content-type", "application/json"),
        ("x-amzn-errortype", error.type),
        ("x-amzn-requestid", str(uuid.uuid4())),
        ("date", date),
    ]
    if error.retry_after is not None:
        headers.append(("retry-after", f"{error.retry_after:g}"))
    return headers, json.dumps({"message": error.message}).encode()
