"""What a caller gets of an answer's headers."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_proxy.http1 import BrokenAnswer, Connection
from mlflow_proxy.inbound import connection as inbound
from mlflow_proxy.inbound.connection import Call
from mlflow_proxy.relay import (
    Headers,
    downstream_headers,
    protected,
    relay,
    rewrite_location,
    upstream_request_id,
)
from mlflow_proxy.targets import Endpoint

TRACKING = Endpoint("https", "eu-west-1.experiments.sagemaker.aws", 443)
APP = Endpoint("https", "mlflow.sagemaker.us-east-2.app.aws", 443)
LOCAL = Endpoint("http", "127.0.0.1", 9500)
IPV6 = Endpoint("http", "::1", 9500)


@pytest.mark.parametrize("prefix", ["", "/t/dev"])
@pytest.mark.parametrize("endpoint", [TRACKING, APP])
def test_own_urls_become_paths_on_the_proxy(endpoint: Endpoint, prefix: str) -> None:
    host = endpoint.host
    for location, path in {
        f"https://{host}/": "/",
        f"https://{host}": "/",
        f"https://{host}/a/b?c=d#e": "/a/b?c=d#e",
        f"https://{host}?a=1": "/?a=1",
        f"https://{host}#x": "/#x",
        f"https://{host}:443/a": "/a",
        f"http://{host}/a": "/a",
        f"HTTPS://{host.upper()}/A": "/A",
        f"//{host}/a": "/a",
        f"//{host}:443/a": "/a",
        "/a": "/a",
        "/": "/",
        "/a?b=https://evil.example/": "/a?b=https://evil.example/",
        f"https://{host}/a%2Fb%20c?x=%C3%A9": "/a%2Fb%20c?x=%C3%A9",
        f"https://{host}/a?next=//evil.example": "/a?next=//evil.example",
    }.items():
        assert rewrite_location(location, endpoint, prefix) == prefix + path


@pytest.mark.parametrize("prefix", ["", "/t/dev"])
@pytest.mark.parametrize(
    "location",
    [
        *("", "a", "a/b", "./a", "../a", "?x=1", "#top", "a:b"),
        *(
            "https://evil.example/",
            "//evil.example/a",
            "http://evil.example:443/",
            "https://s3.amazonaws.com/b/k?X-Amz-Signature=1",
        ),
        *(f"https://{TRACKING.host}@evil.example/", f"https://{TRACKING.host}:443@evil.example/"),
        *(f"https://user@{TRACKING.host}/", f"https://user:pw@{TRACKING.host}/", f"//{TRACKING.host}@evil.example"),
        *(f"https://{TRACKING.host}.evil.example/", f"https://evil-{TRACKING.host}/", f"https://{TRACKING.host}:8443/"),
        *(
            f"https://{TRACKING.host}:44/",
            f"https://{TRACKING.host}%2eevil.example/",
            f"https://{TRACKING.host}\\@evil.example/",
        ),
        *(f"ftp://{TRACKING.host}/", "javascript:alert(1)", "data:text/html,x", "mailto:a@b", "https:/a", "https:a"),
        *(f" https://{TRACKING.host}/", f"https:\\\\{TRACKING.host}/", "///evil.example/", "////evil.example"),
    ],
)
def test_everything_else_stays(location: str, prefix: str) -> None:
    assert rewrite_location(location, TRACKING, prefix) == location


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("http://127.0.0.1:9500/a", "/a"),
        ("//127.0.0.1:9500/a", "/a"),
        ("https://127.0.0.1:9500/a", "/a"),
        ("http://127.0.0.1/a", None),
        ("http://127.0.0.1:9501/a", None),
        ("http://localhost:9500/a", None),
    ],
)
def test_endpoint_with_a_port(location: str, path: str | None) -> None:
    assert rewrite_location(location, LOCAL, "/t/x") == (location if path is None else f"/t/x{path}")


def test_ipv6_endpoint() -> None:
    assert rewrite_location("http://[::1]:9500/a", IPV6, "/t/x") == "/t/x/a"
    assert rewrite_location("http://[::2]:9500/a", IPV6, "/t/x") == "http://[::2]:9500/a"


@pytest.mark.parametrize("prefix", ["", "/t/dev"])
@pytest.mark.parametrize("rest", ["//evil.example/", "///evil.example", "/\\evil.example", "/\\/evil.example", "//"])
def test_own_url_never_becomes_another_hosts(rest: str, prefix: str) -> None:
    """A path that begins with two slashes must not come out as `//host`."""
    rewritten = rewrite_location(f"https://{TRACKING.host}{rest}", TRACKING, prefix)
    assert rewritten == prefix + "/" + rest.lstrip("/\\")


@settings(max_examples=300, deadline=None)
@given(
    rest=st.text(alphabet="/\\?#a.:@%20", max_size=12),
    prefix=st.sampled_from(["", "/t/dev"]),
    start=st.sampled_from([f"https://{TRACKING.host}", f"//{TRACKING.host}:443", f"HTTP://{TRACKING.host}"]),
)
def test_rewritten_location_stays_on_the_proxy(rest: str, prefix: str, start: str) -> None:
    rewritten = rewrite_location(start + rest, TRACKING, prefix)
    if rewritten == start + rest:  # the text made it another authority
        assert rest[:1] not in ("", "/", "?", "#")
    else:
        assert rewritten.startswith(prefix + "/")
        assert not rewritten.startswith(("//", "/\\"))


AWS_HEADERS = [
    "x-amzn-requestid",
    "x-amz-request-id",
    "x-amz-id-2",
    "X-Amzn-ErrorType",
    "x-amzn-trace-id",
    "x-amz-cf-id",
]
HOP_BY_HOP = [
    *(
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ),
]
ORIGIN_WIDE = [
    "set-cookie",
    "set-cookie2",
    "strict-transport-security",
    "alt-svc",
    "clear-site-data",
    "report-to",
    "nel",
]


@pytest.mark.parametrize("name", [*AWS_HEADERS, *HOP_BY_HOP, *ORIGIN_WIDE, "x-request-id"])
def test_dropped_header(name: str) -> None:
    for spelled in (name, name.upper(), name.title()):
        headers = [(b"Content-Type", b"text/plain"), (spelled.encode(), b"x"), (b"Server", b"s")]
        assert downstream_headers(headers, TRACKING, "") == [(b"content-type", b"text/plain"), (b"server", b"s")]


def test_order_duplicates_and_bytes_are_kept() -> None:
    headers = [
        (b"Content-Encoding", b"gzip"),
        (b"Vary", b"Accept"),
        (b"Content-Length", b"5"),
        (b"VARY", b"Origin"),
        (b"Link", b"</a>; rel=x"),
        (b"ETag", b'W/"\xe9"'),
        (b"WWW-Authenticate", b"Basic"),
        (b"X-Amazing", b"kept"),
        (b"Retry-After", b"3"),
    ]
    assert downstream_headers(headers, TRACKING, "/t/dev") == [(name.lower(), value) for name, value in headers]


@pytest.mark.parametrize("connection", [[b"X-Private, close"], [b"close", b" x-private "], [b"x-PRIVATE"]])
@pytest.mark.parametrize("first", [True, False])
def test_headers_named_in_connection_are_dropped(connection: list[bytes], first: bool) -> None:
    private = [(b"X-Private", b"1"), (b"x-private", b"2")]
    named = [(b"Connection", value) for value in connection]
    headers = [*(named if first else private), (b"ETag", b"1"), *(private if first else named)]
    assert downstream_headers(headers, TRACKING, "") == [(b"etag", b"1")]


def test_locations_are_rewritten_in_both_headers() -> None:
    url = f"https://{TRACKING.host}/a\xe9".encode("latin-1")
    headers = [(b"Location", url), (b"Content-Location", b"/b"), (b"X-Location", url)]
    assert downstream_headers(headers, TRACKING, "/t/dev") == [
        (b"location", b"/t/dev/a\xe9"),
        (b"content-location", b"/t/dev/b"),
        (b"x-location", url),
    ]


TYPED, FRAMED = (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"SAMEORIGIN")


@pytest.mark.parametrize(
    ("sent", "added"),
    [
        ([], [TYPED, FRAMED]),
        ([TYPED], [FRAMED]),
        ([FRAMED], [TYPED]),
        ([(b"x-frame-options", b"DENY"), TYPED], []),
        ([(b"content-security-policy", b"default-src 'self'; Frame-Ancestors https://a.example")], [TYPED]),
        ([(b"content-security-policy", b"default-src 'self'")], [TYPED, FRAMED]),
    ],
)
def test_what_browsers_are_told_is_added_where_it_is_missing(sent: Headers, added: Headers) -> None:
    headers = [(b"content-type", b"text/html"), *sent]
    assert protected(headers, "/") == [*headers, *added]


def test_what_mlflow_means_for_frames_may_be_framed() -> None:
    assert protected([], "/static-files/lib/notebook-trace-renderer/index.html") == [TYPED]


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], ""),
        ([(b"x-amzn-RequestId", b"abc-1")], "abc-1"),
        ([(b"X-AMZ-Request-Id", b"abc-2")], "abc-2"),
        ([(b"x-request-id", b"ours")], ""),
        ([(b"x-amzn-requestid", b"a" * 500)], "a" * 128),
    ],
)
def test_upstream_request_id(headers: list[tuple[bytes, bytes]], found: str) -> None:
    assert upstream_request_id(headers) == found


class Chunks:
    """An answer that arrives in chunks: what `relay` uses of a connection."""

    def __init__(self, chunks: list[bytes | Exception], *, ready: bool = True) -> None:
        self.status = 206
        self.ready = ready
        self._chunks = chunks

    @property
    def drained(self) -> bool:
        return not self._chunks

    async def read(self, _seconds: float) -> bytes:
        chunk = self._chunks.pop(0)
        if isinstance(chunk, Exception):
            raise chunk
        return chunk


class Downstream:
    """The connection of a call: what was written, and whether it was cut."""

    peer, scheme, leaving = "192.0.2.1", "http", False

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.whole = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    async def drain(self) -> None:
        pass

    def answered(self, _call: Call) -> None:
        self.whole = True

    def body(self) -> bytes:
        """What was sent after the head, without its chunked coding."""
        return b"".join(piece.split(b"\r\n")[1] for piece in self.written[1:] if piece != b"0\r\n\r\n")


def relayed(begun: bytes, chunks: list[bytes | Exception]) -> tuple[Downstream, list[int]]:
    downstream = Downstream()
    call = Call(cast(inbound.Connection, downstream))
    call.complete = True
    sizes: list[int] = []
    connection = cast(Connection, Chunks(chunks))
    try:
        asyncio.run(relay(connection, begun, call, [(b"a", b"b")], between=1.0, sent=sizes.append))
    except BrokenAnswer:
        assert not downstream.whole
    return downstream, sizes


@pytest.mark.parametrize(
    ("begun", "chunks"),
    [(b"", []), (b"", [b"a"]), (b"", [b"a", b"bc", b"d"]), (b"x", []), (b"x", [b"a", b"b"])],
)
def test_relay_sends_each_chunk_once_and_in_order(begun: bytes, chunks: list[bytes | Exception]) -> None:
    whole = begun + b"".join(chunk for chunk in chunks if isinstance(chunk, bytes))
    downstream, sizes = relayed(begun, list(chunks))
    assert downstream.written[0].startswith(b"HTTP/1.1 206 Partial Content\r\na: b\r\n")
    assert downstream.body() == whole
    assert sum(sizes) == len(whole)
    assert downstream.whole


def test_relay_never_ends_a_broken_answer() -> None:
    """The caller must be able to tell it from a whole one."""
    downstream, _ = relayed(b"", [b"a", BrokenAnswer("broken"), b"never"])
    assert downstream.body() == b"a"
    assert not downstream.whole
    assert downstream.written[-1] != b"0\r\n\r\n"
