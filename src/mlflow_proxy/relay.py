"""Step 8 of a request's way: the answer goes back as it came: status, headers, and the very bytes of the body.

Left out are headers that are for this hop only, that are AWS's own business, or that would speak for the proxy's
origin: a cookie of the upstream would be everybody's, since all callers share one identity there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from mlflow_proxy.errors import NO_SNIFFING
from mlflow_proxy.http1 import Connection
from mlflow_proxy.inbound.connection import Call
from mlflow_proxy.requests import up
from mlflow_proxy.targets import Endpoint

Headers = list[tuple[bytes, bytes]]

DROPPED_HEADERS = frozenset(
    {
        # hop by hop (RFC 9110 section 7.6.1)
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        # would set something for the proxy's own origin
        b"alt-svc",
        b"clear-site-data",
        b"nel",
        b"public-key-pins",
        b"report-to",
        b"reporting-endpoints",
        b"set-cookie",
        b"set-cookie2",
        b"strict-transport-security",
        # ours takes its place
        b"x-request-id",
    }
)
_AWS_PREFIXES = (b"x-amz-", b"x-amzn-")
_SLASHES = "/\\\t\r\n "
# What Connection most often holds, which names no header of the answer.
_NO_NAMES = frozenset({b"keep-alive", b"close"})
_LOCATIONS = frozenset({b"location", b"content-location"})
_TYPE_OPTIONS, _FRAME_OPTIONS, _POLICY = b"x-content-type-options", b"x-frame-options", b"content-security-policy"
_OWN_FRAMES = (_FRAME_OPTIONS, b"SAMEORIGIN")  # MLflow's default: its UI shows artifacts in frames
# MLflow leaves the header out here, since notebooks show traces in a frame (mlflow/server/security.py).
_MEANT_FOR_FRAMES = "/static-files/lib/notebook-trace-renderer/"
_UPSTREAM_IDS = (b"x-amzn-requestid", b"x-amz-request-id")
_ABSOLUTE = re.compile(r"(?:(https?):)?//([^/?#]*)([^#]*(?:#.*)?)", re.IGNORECASE | re.DOTALL)


def downstream_headers(headers: Headers, endpoint: Endpoint, prefix: str, path: str = "") -> Headers:
    """The headers of an answer that the caller gets: names in lower case, order and duplicates kept.

    `path` is the one that the caller asked for, to which redirects are then relative.
    """
    kept: Headers = []
    named: set[bytes] = set()
    for name, value in headers:
        lowered, passes = _judge(name)
        if passes:
            if lowered in _LOCATIONS:
                value = rewrite_location(value.decode("latin-1"), endpoint, prefix, path).encode("latin-1")  # noqa: PLW2901
            kept.append((lowered, value))
        elif lowered == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    if named and not named <= _NO_NAMES:
        kept = [pair for pair in kept if pair[0] not in named]
    return kept


def protected(headers: Headers, path: str) -> Headers:
    """The same headers, with those by which browsers neither guess types nor let pages of other sites frame this one.

    Newer MLflows send both; what is there stays as it is. `path` is MLflow's.
    """
    typed = framed = False
    for name, value in headers:
        if name == _TYPE_OPTIONS:
            typed = True
        elif name == _FRAME_OPTIONS or (name == _POLICY and b"frame-ancestors" in value.lower()):
            framed = True
    added = [] if typed else [NO_SNIFFING]
    if not framed and not path.startswith(_MEANT_FOR_FRAMES):
        added.append(_OWN_FRAMES)
    return [*headers, *added]


@lru_cache(maxsize=512)
def _judge(name: bytes) -> tuple[bytes, bool]:
    """A header's name in lower case, and whether it goes to the caller."""
    lowered = name.lower()
    return lowered, lowered not in DROPPED_HEADERS and not lowered.startswith(_AWS_PREFIXES)


def rewrite_location(location: str, endpoint: Endpoint, prefix: str, path: str = "") -> str:
    """Where a redirect leads, as seen from the caller: the upstream's own URLs become paths on the proxy.

    `prefix` is the target's, such as `/t/dev`, or empty. Other hosts' URLs and relative ones stay. With `path`, which
    the caller asked for, they are relative to that: a server in front may have taken a prefix off it.
    """
    match = _ABSOLUTE.fullmatch(location)
    if match:
        scheme, authority, rest = match.groups()
        if authority.lower() not in _authorities(endpoint, scheme):
            return location
        # One slash, lest what follows be read as another host's name.
        location = "/" + rest.lstrip("/\\")
    if not location.startswith("/"):
        return location
    # Browsers take backslashes for slashes, leave out white space, and read a second slash as another host's name.
    return f"{up(path) if path else '/'}{prefix.lstrip('/')}{'/' if prefix else ''}{location.lstrip(_SLASHES)}"


def _authorities(endpoint: Endpoint, scheme: str | None) -> tuple[str, ...]:
    """The upstream may redirect to itself with or without port, and under either scheme."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    host = host.lower()
    names = [endpoint.authority.lower(), f"{host}:{endpoint.port}"]
    if scheme is None or scheme.lower() != endpoint.scheme:
        names.append(host)
    return tuple(names)


def upstream_request_id(headers: Headers) -> str:
    """AWS's id of the request, for the log; empty if there is none."""
    for name, value in headers:
        if name.lower() in _UPSTREAM_IDS:
            return value.decode("latin-1")[:128]
    return ""


async def relay(
    connection: Connection, begun: bytes, call: Call, headers: Headers, *, between: float, sent: Callable[[int], None]
) -> None:
    """Send the answer whose head is on `connection`; `begun` is what was read of its body already.

    The head goes out at once, then chunks as they arrive (event streams depend on both); the next is read when the
    caller has taken the last one. `between` is the upstream's longest pause, in seconds; `sent` is told the size of
    each chunk. Raises the connection's UpstreamErrors, CallerGone and SlowReader.
    """
    call.begin(connection.status, headers)
    data = begun
    if not data and not connection.drained:
        data = await connection.read(between) or b""
    while True:
        sent(len(data))
        await call.send(data)
        if connection.drained:
            call.end()
            return
        data = await connection.read(between) or b""
