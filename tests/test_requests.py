"""What passes of a caller's request, and what is refused."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_proxy.errors import Refusal
from mlflow_proxy.inbound.connection import Call, Connection
from mlflow_proxy.requests import (
    PASSED_HEADERS,
    SINGLE_HEADERS,
    AllowedHosts,
    Request,
    RequestIds,
    RequestReader,
    forwarded_client,
    refuse_foreign,
    up,
)
from mlflow_proxy.settings import Server

HOST = (b"host", b"localhost:8080")

# The list of the issue, written out here so that a change in the code shows.
PASSED = [
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "cache-control",
    "content-encoding",
    "content-language",
    "content-type",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "pragma",
    "range",
    "traceparent",
    "tracestate",
    "user-agent",
    "x-mlflow-client-version",
    "x-mlflow-experiment-id",
    "x-mlflow-workspace",
]

FORBIDDEN = [
    "authorization",
    "proxy-authorization",
    "cookie",
    "cookie2",
    "set-cookie",
    "x-amz-date",
    "x-amz-content-sha256",
    "x-amz-security-token",
    "x-amz-target",
    "x-amz-user-agent",
    "x-amz-expires",
    "x-amz-algorithm",
    "x-amz-credential",
    "x-amz-signature",
    "x-amz-signedheaders",
    "x-amz-invocation-type",
    "x-amzn-trace-id",
    "amz-sdk-request",
    "x-mlflow-sm-tracking-server-arn",
    "x-sm-mlflow-app-arn",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-server",
    "x-forwarded-user",
    "x-forwarded-email",
    "x-forwarded-access-token",
    "x-forwarded-client-cert",
    "forwarded",
    "x-real-ip",
    "x-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "via",
    "x-envoy-original-path",
    "origin",
    "referer",
    "sec-fetch-site",
    "sec-fetch-mode",
    "access-control-request-method",
    "access-control-request-headers",
    "x-mlflow-guardrail-bypass",
    "x-mlflow-authorization",
    "x-mlflow-gateway-caller",
    "x-mlflow-user",
    "x-mlflow-anything",
    "x-host",
    "x-original-host",
    "x-host-override",
    "x-http-host-override",
    "x-original-url",
    "x-rewrite-url",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "expect",
    "max-forwards",
    "content-length",
    "host",
    "date",
    "x-request-id",
    "baggage",
    "priority",
    "x-api-key",
    "x-csrf-token",
    "x-xsrf-token",
    "x-requested-with",
]


class Peer(NamedTuple):
    """What a call knows of its connection."""

    peer: str
    scheme: str = "http"


def call_of(
    headers: list[tuple[bytes, bytes]] | None = None,
    *,
    method: str = "GET",
    path: bytes = b"/",
    query: bytes = b"",
    client: tuple[str, int] | None = ("198.51.100.7", 4711),
    host: bool = True,
) -> Call:
    """A request as it arrives."""
    call = Call(cast(Connection, Peer(client[0] if client else "")))
    call.method, call.path, call.query = method, path, query
    call.headers = ([HOST] if host else []) + (headers or [])
    return call


def read(headers: list[tuple[bytes, bytes]] | None = None, server: Server | None = None, **scope: Any) -> Request:
    return RequestReader(server or Server()).read(call_of(headers, **scope))


def refusal_of(headers: list[tuple[bytes, bytes]] | None = None, server: Server | None = None, **scope: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(headers, server, **scope)
    return caught.value


# Headers


@pytest.mark.parametrize("name", PASSED)
def test_listed_header_passes(name: str) -> None:
    pair = (name.encode(), b"some value")
    assert read([pair]).headers == [pair]


@pytest.mark.parametrize("name", [name for name in FORBIDDEN if name not in ("host", "transfer-encoding")])
def test_other_header_never_passes(name: str) -> None:
    kept = (b"accept", b"*/*")
    value = b"5" if name == "content-length" else b"value"
    assert read([(name.encode(), value), kept]).headers == [kept]


def test_list_is_exactly_the_issues() -> None:
    assert sorted(name.decode() for name in PASSED_HEADERS) == sorted(PASSED)
    assert not {name.encode() for name in FORBIDDEN} & PASSED_HEADERS
    assert SINGLE_HEADERS < PASSED_HEADERS


header_names = st.sampled_from([*PASSED, *FORBIDDEN]).filter(lambda name: name not in ("host", "connection")) | (
    st.from_regex(r"x-(amz|amzn|mlflow|forwarded|sm)-[a-z-]{1,12}", fullmatch=True)
)


@settings(max_examples=300, deadline=None)
@given(names=st.lists(header_names, max_size=12, unique=True))
def test_only_listed_headers_pass_in_their_order(names: list[str]) -> None:
    names = [name for name in names if name not in ("content-length", "transfer-encoding")]
    headers = [(name.encode(), b"v%d" % index) for index, name in enumerate(names)]
    assert read(headers).headers == [pair for pair in headers if pair[0].decode() in PASSED]


@pytest.mark.parametrize("name", PASSED)
def test_header_sent_twice(name: str) -> None:
    """RFC 9110 section 5.3: lists may be repeated; of the others, two could mean two things."""
    single = [
        "content-encoding",
        "content-type",
        "if-range",
        "range",
        "traceparent",
        "user-agent",
        "x-mlflow-client-version",
        "x-mlflow-experiment-id",
        "x-mlflow-workspace",
    ]
    headers = [(name.encode(), b"a"), (b"pragma" if name != "pragma" else b"accept", b"x"), (name.encode(), b"b")]
    if name in single:
        refusal = refusal_of(headers)
        assert refusal.status == 400
        assert name in refusal.message
    else:
        assert read(headers).headers == headers


@pytest.mark.parametrize(
    ("connection", "left"),
    [
        ([b"close"], ["accept", "range", "x-mlflow-workspace"]),
        ([b"keep-alive, Range"], ["accept", "x-mlflow-workspace"]),
        ([b"RANGE"], ["accept", "x-mlflow-workspace"]),
        ([b"range ,\taccept"], ["x-mlflow-workspace"]),
        ([b"close", b"x-mlflow-workspace"], ["accept", "range"]),
        ([b",,"], ["accept", "range", "x-mlflow-workspace"]),
        ([b"host, content-length"], ["accept", "range", "x-mlflow-workspace"]),
    ],
)
def test_headers_named_in_connection_are_for_this_hop(connection: list[bytes], left: list[str]) -> None:
    headers = [(b"connection", value) for value in connection]
    headers += [(b"accept", b"*/*"), (b"range", b"bytes=0-1"), (b"x-mlflow-workspace", b"w"), (b"content-length", b"3")]
    request = read(headers)
    assert [name.decode() for name, _ in request.headers] == left
    assert request.host == "localhost"


@pytest.mark.parametrize(
    ("value", "content_type"),
    [
        (b"application/json", "application/json"),
        (b"  application/json;   charset=utf-8 ", "application/json; charset=utf-8"),
        (b"a/b;\tc=d", "a/b; c=d"),
        (b"", ""),
    ],
)
def test_content_type_is_passed_as_it_is_signed(value: bytes, content_type: str) -> None:
    request = read([(b"content-type", value)])
    assert request.content_type == content_type
    assert request.headers == [(b"content-type", content_type.encode())]


def test_content_type_must_be_ascii() -> None:
    assert refusal_of([(b"content-type", "text/plén".encode())]).status == 400


def test_content_type_named_in_connection_is_neither_passed_nor_signed() -> None:
    request = read([(b"content-type", b"a/b"), (b"connection", b"content-type")])
    assert (request.headers, request.content_type) == ([], "")


# Framing


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"")],
        [HOST, HOST],
        [HOST, (b"host", b"evil.example")],
    ],
)
def test_a_request_has_one_host(headers: list[tuple[bytes, bytes]]) -> None:
    refusal = refusal_of(headers, host=False)
    assert refusal.status == 400
    assert refusal.close


@pytest.mark.parametrize(
    "method", ["CONNECT", "TRACE", "TRACK", "get", "G T", "", "GÉT", "A" * 33, "GET\n", "M-SEARCH"]
)
def test_refused_method(method: str) -> None:
    refusal = refusal_of(method=method)
    assert (refusal.status, refusal.close) == (501, True)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "PROPFIND"])
def test_method(method: str) -> None:
    assert read(method=method).method == method


@pytest.mark.parametrize("path", [b"*", b"", b"http://localhost/", b"localhost:443", b"/a%2Fb", b"/../x"])
def test_target_without_single_meaning(path: bytes) -> None:
    assert refusal_of(path=path).status == 400


def test_path_and_query_are_canonical() -> None:
    request = read(path=b"/%61//b", query=b"x=1+2&y")
    assert (request.path, request.query) == ("/a/b", "x=1%202&y=")


# Limits


def test_url_limit() -> None:
    server = Server(url_limit=1024)
    assert len(read(server=server, path=b"/" + b"a" * 1000, query=b"b=" + b"1" * 21).path) == 1001
    refusal = refusal_of(server=server, path=b"/" + b"a" * 1000, query=b"b=" + b"1" * 22)
    assert (refusal.status, refusal.close) == (414, True)
    assert "server.url_limit" in refusal.message


def test_header_limit_counts_all_headers() -> None:
    server = Server(header_limit=1024)
    used = sum(map(len, HOST)) + len(b"x-other")
    read([(b"x-other", b"a" * (1024 - used))], server)
    refusal = refusal_of([(b"x-other", b"a" * (1025 - used))], server)
    assert (refusal.status, refusal.close) == (431, True)
    assert "server.header_limit" in refusal.message


def test_header_count_limit() -> None:
    server = Server(header_count_limit=10)
    read([(b"x-%d" % index, b"") for index in range(9)], server)
    refusal = refusal_of([(b"x-%d" % index, b"") for index in range(10)], server)
    assert (refusal.status, refusal.close) == (431, True)
    assert "server.header_count_limit" in refusal.message


# Host

HOSTS = Server(
    host="192.0.2.5", allowed_hosts=["Proxy.Example.com", "*.team.example"], public_url="https://pub.example:9"
)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("localhost", "localhost"),
        ("localhost:8080", "localhost"),
        ("LOCALHOST:1", "localhost"),
        ("localhost.", "localhost"),
        ("127.0.0.1:8080", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8080", "::1"),
        ("192.0.2.5:8080", "192.0.2.5"),
        ("proxy.example.com", "proxy.example.com"),
        ("PROXY.example.COM.:443", "proxy.example.com"),
        ("pub.example", "pub.example"),
        ("pub.example:9", "pub.example"),
        ("a.team.example", "a.team.example"),
        ("a.b.Team.Example:80", "a.b.team.example"),
    ],
)
def test_allowed_host(value: str, name: str) -> None:
    hosts = AllowedHosts(HOSTS)
    assert [hosts.check(value.encode()) for _ in range(2)] == [name, name]


@pytest.mark.parametrize(
    "value",
    [
        *(
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.nip.io",
            "evil-localhost",
            "xlocalhost",
            "169.254.169.254",
        ),
        *("team.example", "ateam.example", "team.example.evil.example", "proxy.example.com.evil.example", "0.0.0.0"),
        *("[::2]:80", "[::ffff:127.0.0.1]", "127.0.0.2", "127.1", "2130706433", "1.0.0.127", "com", "example.com"),
    ],
)
def test_foreign_host_is_misdirected(value: str) -> None:
    """The names that DNS rebinding would bring."""
    hosts = AllowedHosts(HOSTS)
    for _ in range(2):
        with pytest.raises(Refusal) as caught:
            hosts.check(value.encode())
        assert caught.value.status == 421
        assert "server.allowed_hosts" in caught.value.message


@pytest.mark.parametrize(
    "value",
    [
        *("localhost:", "localhost:port", "localhost:123456", "localhost:80:80", ":80", "user@localhost", "localhost/"),
        *(
            "localhost, evil.example",
            "localhost evil",
            "local\thost",
            "::1",
            "[::1",
            "[::1]x",
            "[localhost]",
            "http://localhost",
        ),
        *(
            "localhost\r\nx: y",
            "localhost\x00",
            "locälhost",
            "localhost#",
            "localhost?x",
            "*.team.example",
            "%6cocalhost",
        ),
    ],
)
def test_malformed_host(value: str) -> None:
    with pytest.raises(Refusal) as caught:
        AllowedHosts(HOSTS).check(value.encode("latin-1"))
    assert (caught.value.status, caught.value.close) == (400, True)


def test_many_hosts_stay_checked_and_bounded() -> None:
    hosts = AllowedHosts(HOSTS)
    for index in range(2000):
        assert hosts.check(b"h%d.team.example" % index) == f"h{index}.team.example"
    assert len(hosts._known) <= 256
    with pytest.raises(Refusal):
        hosts.check(b"evil.example")


def test_listening_on_an_address() -> None:
    assert AllowedHosts(Server(host="10.1.2.3")).check(b"10.1.2.3:8080") == "10.1.2.3"
    assert AllowedHosts(Server(host="fd00::5")).check(b"[FD00::5]:8080") == "fd00::5"
    assert AllowedHosts(Server(public_url="https://[fd00::6]:8443")).check(b"[fd00::6]") == "fd00::6"


# Client address and scheme

TRUSTED = [ip_network("10.0.0.0/8"), ip_network("fd00::/8"), ip_network("192.0.2.7/32")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("198.51.100.7", ["203.0.113.9"], "198.51.100.7"),  # not a trusted peer: its words don't count
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.2.3.4, 203.0.113.9"], "203.0.113.9"),  # the left one may be made up
        ("10.0.0.1", ["1.2.3.4", "203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, 10.0.0.2"], "10.0.0.2"),  # a caller in the load balancer's own network
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.2"),
        ("fd00::1", ["2001:db8::9, fd00::2"], "fd00::2"),
        ("10.0.0.1", ["2001:db8::9"], "2001:db8::9"),
        ("10.0.0.1", [" \t203.0.113.9 "], "203.0.113.9"),
        # What is no address ends the search at the last that is one.
        ("10.0.0.1", ["garbage"], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, "], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:db8::9]:4711"], "2001:db8::9"),
        ("10.0.0.1", ["[203.0.113.9"], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.09"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9/32"], "10.0.0.1"),
        ("10.0.0.1", ["1", "999.1.1.1"], "10.0.0.1"),
        ("", ["203.0.113.9"], ""),
        ("unix:", ["203.0.113.9"], "unix:"),
    ],
)
def test_forwarded_client(peer: str, forwarded: list[str], client: str) -> None:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    assert forwarded_client(peer, "http", headers, TRUSTED) == (client, "http")


@pytest.mark.parametrize(
    ("forwarded", "hops", "client"),
    [
        (["203.0.113.9, 10.0.0.2"], 2, "203.0.113.9"),
        (["1.2.3.4, 203.0.113.9, 10.0.0.2"], 2, "203.0.113.9"),
        (["1.2.3.4, 10.0.0.3, 10.0.0.2"], 2, "10.0.0.3"),
        (["1.2.3.4, 203.0.113.9, 192.0.2.7,10.9.9.9"], 3, "203.0.113.9"),
        (["1.2.3.4", "203.0.113.9, 192.0.2.7", "10.9.9.9"], 3, "203.0.113.9"),
        (["10.0.0.3, 203.0.113.9, 10.0.0.2"], 3, "203.0.113.9"),  # the hop before is none of ours
        (["203.0.113.9, unknown, 10.0.0.2"], 3, "10.0.0.2"),
        (["203.0.113.9"], 3, "203.0.113.9"),
        ([], 3, "10.0.0.1"),
    ],
)
def test_as_many_hops_count_as_there_are(forwarded: list[str], hops: int, client: str) -> None:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    assert forwarded_client("10.0.0.1", "http", headers, TRUSTED, hops) == (client, "http")


@settings(max_examples=200, deadline=None)
@given(spoofed=st.lists(st.text(st.characters(max_codepoint=255), max_size=20), max_size=4))
def test_nothing_left_of_the_caller_counts(spoofed: list[str]) -> None:
    value = ", ".join([*spoofed, "203.0.113.9", "10.0.0.2"]).encode("latin-1")
    headers = [(b"x-forwarded-for", value)]
    assert forwarded_client("10.0.0.1", "http", headers, TRUSTED)[0] == "10.0.0.2"
    assert forwarded_client("10.0.0.1", "http", headers, TRUSTED, 2)[0] == "203.0.113.9"


@pytest.mark.parametrize(
    ("peer", "values", "scheme"),
    [
        ("10.0.0.1", ["https"], "https"),
        ("10.0.0.1", ["HTTPS "], "https"),
        ("10.0.0.1", ["http, https"], "https"),
        ("10.0.0.1", ["https, http"], "http"),
        ("10.0.0.1", ["http", "https"], "https"),
        ("10.0.0.1", ["javascript"], "http"),
        ("10.0.0.1", [""], "http"),
        ("10.0.0.1", [], "http"),
        ("198.51.100.7", ["https"], "http"),
    ],
)
def test_forwarded_scheme(peer: str, values: list[str], scheme: str) -> None:
    headers = [(b"x-forwarded-proto", value.encode()) for value in values]
    assert forwarded_client(peer, "http", headers, TRUSTED) == (peer, scheme)


def test_reader_uses_trusted_proxies() -> None:
    headers = [(b"x-forwarded-for", b"203.0.113.9"), (b"x-forwarded-proto", b"https")]
    server = Server.model_validate({"trusted_proxies": ["198.51.100.0/24"]})
    request = read(headers, server)
    assert (request.client, request.scheme) == ("203.0.113.9", "https")
    request = read(headers)
    assert (request.client, request.scheme) == ("198.51.100.7", "http")
    assert read(client=None).client == ""


# Request ids


@pytest.mark.parametrize("value", ["12345678", "a" * 128, "0af7651916cd43dd-8448eb211c80319c", "A.b_c-d9", "--------"])
def test_good_request_id_is_kept(value: str) -> None:
    assert RequestIds().of([(b"x-request-id", value.encode())]) == value


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"1234567",
        b"a" * 129,
        b"12345678\n",
        b"1234 5678",
        b"1234567\xe9",
        b'12345678"',
        b"<12345678>",
        b"a/b;c%00",
    ],
)
def test_bad_request_id_is_replaced(value: bytes) -> None:
    made = RequestIds().of([(b"x-request-id", value)])
    assert made.encode() != value
    assert re.fullmatch(r"[0-9a-f]{16,32}", made)


def test_made_request_ids_are_unique_and_would_be_accepted() -> None:
    workers = [RequestIds(), RequestIds()]
    made = [ids.of([]) for _ in range(2500) for ids in workers]
    assert len(set(made)) == 5000
    assert [RequestIds().of([(b"x-request-id", one.encode())]) for one in made] == made


# Requests that a page of another site sends through a browser

PUBLIC = Server(public_url="https://Pub.example:443")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "PROPFIND"])
@pytest.mark.parametrize(
    ("headers", "own"),
    [
        ([], True),  # no browser
        ([("sec-fetch-site", "same-origin")], True),
        ([("sec-fetch-site", "none")], True),
        ([("sec-fetch-site", "same-site")], False),
        ([("sec-fetch-site", "cross-site")], False),
        ([("sec-fetch-site", "")], False),
        ([("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")], False),
        ([("sec-fetch-site", "cross-site"), ("origin", "http://localhost:8080")], False),
        ([("sec-fetch-site", "same-origin"), ("origin", "https://proxy.example")], False),
        ([("sec-fetch-site", "same-origin"), ("origin", "https://pub.example")], True),
        ([("origin", "http://localhost:8080")], True),
        ([("origin", "https://localhost:8080")], True),
        ([("origin", "HTTP://LOCALHOST:8080")], True),
        ([("origin", "https://pub.example")], True),
        ([("origin", "http://pub.example")], False),
        ([("origin", "https://pub.example.evil.example")], False),
        ([("origin", "http://localhost")], False),
        ([("origin", "http://localhost:8081")], False),
        ([("origin", "https://evil.example")], False),
        ([("origin", "null")], False),
        ([("sec-fetch-site", "same-origin"), ("origin", "null")], True),
        ([("sec-fetch-site", "cross-site"), ("origin", "null")], False),
        ([("origin", "")], False),
        ([("origin", "http://localhost:8080"), ("origin", "https://evil.example")], False),
    ],
)
def test_other_sites_change_nothing(method: str, headers: list[tuple[str, str]], own: bool) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    request = read(pairs, PUBLIC, method=method)
    assert request.foreign is not own
    if own:
        refuse_foreign(request, writes=True)
        return
    with pytest.raises(Refusal) as refused:
        refuse_foreign(request, writes=False)
    assert (refused.value.status, refused.value.close) == (403, True)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_other_sites_may_link_here_but_not_to_what_changes_something(method: str) -> None:
    headers = [(b"sec-fetch-site", b"cross-site"), (b"origin", b"https://evil.example")]
    request = read(headers, method=method)
    refuse_foreign(request, writes=False)
    with pytest.raises(Refusal):
        refuse_foreign(request, writes=True)
    refuse_foreign(read([(b"sec-fetch-site", b"same-origin")], method=method), writes=True)


def test_without_public_url_an_empty_origin_is_nobodys() -> None:
    assert read([(b"origin", b"")], method="POST").foreign


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ("/", "./"),
        ("/t", "./"),
        ("/-/", "../"),
        ("/t/app/", "../../"),
        ("//-//", "../"),
        ("//t//app", "../"),
        ("", "./"),
    ],
)
def test_the_way_up_to_the_root(path: str, way: str) -> None:
    assert up(path) == way
