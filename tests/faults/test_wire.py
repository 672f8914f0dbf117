"""The very bytes that arrive upstream: request line, headers, body, and a signature that is right for them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.faults.callers import Caller, call, chunked, request
from tests.faults.conftest import Stage
from tests.faults.proxies import APP_ARN, SERVER_ARN
from tests.faults.signatures import assert_signed

OURS = ("host", "x-amz-date", "x-amz-content-sha256", "x-mlflow-sm-tracking-server-arn", "authorization")


def test_a_plain_request_arrives_as_exactly_these_bytes(steady: Stage) -> None:
    answer = steady.call("/api/2.0/mlflow/experiments/get?experiment_id=0", "GET", "Accept: */*")
    (arrived,) = steady.upstream.arrived
    expected = (
        r"GET /api/2\.0/mlflow/experiments/get\?experiment_id=0 HTTP/1\.1\r\n"
        rf"host: 127\.0\.0\.1:{steady.upstream.port}\r\n"
        r"x-amz-date: \d{8}T\d{6}Z\r\n"
        r"x-amz-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\r\n"
        rf"x-mlflow-sm-tracking-server-arn: {SERVER_ARN}\r\n"
        r"authorization: AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/\d{8}/us-east-1/sagemaker-mlflow/aws4_request, "
        r"SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-mlflow-sm-tracking-server-arn, "
        r"Signature=[0-9a-f]{64}\r\n"
        rf"x-request-id: {answer.value('x-request-id')}\r\n"
        r"accept: \*/\*\r\n"
        r"\r\n"
    )
    assert re.fullmatch(expected.encode(), arrived.head)
    assert arrived.body == b""
    assert_signed(arrived)
    sent = datetime.strptime(arrived.value("x-amz-date"), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - sent).total_seconds()) < 60


def test_an_app_is_signed_for_its_own_service_under_its_own_header(steady: Stage) -> None:
    steady.call("/t/app/api/2.0/mlflow/runs/create", "POST", "Content-Type: application/json", body=b'{"a": 1}')
    (arrived,) = steady.upstream.arrived
    assert arrived.request_line == b"POST /api/2.0/mlflow/runs/create HTTP/1.1"
    assert arrived.value("x-sm-mlflow-app-arn") == APP_ARN
    assert not arrived.values("x-mlflow-sm-tracking-server-arn")
    assert_signed(arrived, "sagemaker")


PASSED = {
    "accept": "application/json",
    "accept-charset": "utf-8",
    "accept-encoding": "gzip, br",
    "accept-language": "de, en;q=0.5",
    "cache-control": "no-cache",
    "content-encoding": "identity",
    "content-language": "en",
    "content-type": "application/json; charset=utf-8",
    "if-match": '"a"',
    "if-modified-since": "Tue, 24 Nov 2026 06:00:00 GMT",
    "if-none-match": 'W/"b"',
    "if-range": '"c"',
    "if-unmodified-since": "Tue, 24 Nov 2026 07:00:00 GMT",
    "pragma": "no-cache",
    "range": "bytes=0-9",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "a=b",
    "user-agent": "mlflow-python-client/3.17",
    "x-mlflow-client-version": "3.17",
    "x-mlflow-experiment-id": "7",
    "x-mlflow-workspace": "w",
}
KEPT_BACK = {
    "authorization": "Bearer secret",
    "proxy-authorization": "Basic c2VjcmV0",
    "cookie": "session=secret",
    "origin": "http://localhost",
    "referer": "http://localhost/",
    "x-amz-date": "20200101T000000Z",
    "x-amz-security-token": "stolen",
    "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
    "x-amz-meta-a": "b",
    "x-amzn-trace-id": "Root=1",
    "x-mlflow-sm-tracking-server-arn": SERVER_ARN.replace("team", "other"),
    "x-sm-mlflow-app-arn": APP_ARN,
    "x-forwarded-for": "10.0.0.1",
    "x-forwarded-host": "evil.example",
    "x-forwarded-proto": "https",
    "forwarded": "for=10.0.0.1",
    "x-real-ip": "10.0.0.1",
    "x-mlflow-guardrail-bypass": "1",
    "x-mlflow-anything-new": "1",
    "x-http-method-override": "DELETE",
    "keep-alive": "timeout=5",
    "te": "trailers",
    "trailer": "x-checksum",
    "upgrade": "websocket",
    "proxy-connection": "keep-alive",
    "expect": "100-continue",
    "via": "1.1 someone",
    "x-unknown": "1",
}


def test_the_headers_that_pass_are_these_and_no_others(steady: Stage) -> None:
    sent = [f"{name.title()}: {value}" for name, value in {**PASSED, **KEPT_BACK}.items()]
    assert steady.call("/x", "POST", *sent, body=b"{}").status == 200
    (arrived,) = steady.upstream.arrived
    names = sorted(name for name, _ in arrived.headers)
    assert names == sorted([*PASSED, *OURS, "content-length", "x-request-id"])
    assert {name: arrived.value(name) for name in PASSED} == PASSED
    assert arrived.value("host") == f"127.0.0.1:{steady.upstream.port}"
    assert_signed(arrived)


def test_what_connection_names_stays_on_this_hop(steady: Stage) -> None:
    steady.call(
        "/x", "GET", "Connection: keep-alive, User-Agent,range", "User-Agent: a", "Range: bytes=0-1", "Accept: b"
    )
    (arrived,) = steady.upstream.arrived
    assert not arrived.values("user-agent")
    assert not arrived.values("range")
    assert not arrived.values("connection")
    assert arrived.value("accept") == "b"


def test_connection_cannot_name_the_proxys_own_headers_away(steady: Stage) -> None:
    steady.call("/x", "GET", f"Connection: close, {', '.join(OURS)}")
    assert_signed(steady.upstream.arrived[0])


def test_a_repeated_list_header_stays_repeated_and_in_order(steady: Stage) -> None:
    steady.call("/x", "GET", "Accept: a", "Accept-Language: de", "Accept: b")
    assert steady.upstream.arrived[0].values("accept") == ["a", "b"]


@pytest.mark.parametrize("name", ["Content-Type", "Range", "X-MLflow-Workspace", "User-Agent"])
def test_two_of_a_header_that_has_one_value_are_refused(steady: Stage, name: str) -> None:
    answer = steady.call("/x", "GET", f"{name}: a", f"{name}: b")
    assert answer.status == 400
    assert name.lower() in answer.json["message"]
    assert not steady.upstream.arrived


def test_the_callers_request_id_is_kept_if_it_is_a_sane_one(steady: Stage) -> None:
    assert steady.call("/x", "GET", "X-Request-Id: abc-DEF_123.4").value("x-request-id") == "abc-DEF_123.4"
    assert steady.upstream.arrived[0].value("x-request-id") == "abc-DEF_123.4"
    for bad in ("short", "a b c d e f", 'quote"quote"', "x" * 129):
        given = steady.call("/x", "GET", f"X-Request-Id: {bad}").value("x-request-id")
        assert re.fullmatch(r"[0-9a-f]{20}", given)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "PROPFIND"])
def test_every_method_passes_as_it_is(steady: Stage, method: str) -> None:
    assert steady.call("/some/path/yet/to/come", method).status == 200
    (arrived,) = steady.upstream.arrived
    assert arrived.request_line == f"{method} /some/path/yet/to/come HTTP/1.1".encode()
    assert_signed(arrived)


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ("/", "/"),
        ("/a%2fb", None),
        ("//a///b//", "/a/b/"),
        ("/%7Euser/%41%c3%a9", "/~user/A%C3%A9"),
        ('/a"^[{|}]', "/a%22%5E%5B%7B%7C%7D%5D"),
        ("/a!$&'()*+,;=:@b", "/a!$&'()*+,;=:@b"),
        ("/api/2.0/mlflow-artifacts/artifacts/a%2Fb", "/api/2.0/mlflow-artifacts/artifacts/a%2Fb"),
        ("/a?b=1+2&b=%20&&c&=d&e=f=g", "/a?b=1%202&b=%20&c=&=d&e=f%3Dg"),
        ("/a?filter=name='a b'".replace(" ", "+"), "/a?filter=name%3D%27a%20b%27"),
        ("/a?", "/a"),
        ("/a/../b", None),
        ("/a/%2e%2E/b", None),
        ("/.", None),
        ("/a\\b", None),
        ("/a%5cb", None),
        ("/a%00b", None),
        ("/a%0Ab", None),
        ("/a%zz", None),
        ("/a%", None),
        ("/a%ff", None),
        ("/a?b=%ff", None),
        ("/a?b=%0", None),
        ("/a?b=%00", None),
        ("/t/app/x?y=z", "/x?y=z"),
        ("/t/%61pp/x", "/x"),
        ("/t/app/", "/"),
    ],
)
def test_one_canonical_target_arrives_or_none(steady: Stage, sent: str, arrives: str | None) -> None:
    answer = steady.call(sent)
    if arrives is None:
        assert answer.status == 400
        assert answer.json["error_code"] == "BAD_REQUEST"
        assert not steady.upstream.arrived
    else:
        assert answer.status == 200
        assert steady.upstream.targets == [arrives]


# What is sent, and what must arrive: written down, not computed by the code under test.
_piece_of_path = st.one_of(
    st.sampled_from("abcXYZ019-._~!$&'()*+,;=:@").map(lambda c: (c, c)),
    st.sampled_from('"^{|}[]').map(lambda c: (c, quote(c))),
    st.sampled_from("aZ5-_~").map(lambda c: (f"%{ord(c):02x}", c)),
    st.sampled_from(" !$&'()*+,;=:@#?%").map(lambda c: (f"%{ord(c):02x}", f"%{ord(c):02X}")),
    st.characters(min_codepoint=0xA0, exclude_categories=["Cs"]).map(lambda c: (quote(c).lower(), quote(c))),
)
_segment = (
    st.lists(_piece_of_path, min_size=1, max_size=8)
    .map(lambda pieces: ("".join(s for s, _ in pieces), "".join(e for _, e in pieces)))
    .filter(lambda pair: pair[1] not in (".", ".."))
)
_path = st.tuples(st.lists(_segment, max_size=5), st.sampled_from(["/", "//"]), st.booleans()).map(
    lambda parts: (
        "/" + parts[1].join(s for s, _ in parts[0]) + ("/" if parts[2] else ""),
        "/" + "/".join(e for _, e in parts[0]) + ("/" if parts[2] and parts[0] else ""),
    )
)
_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
_word = st.tuples(_text, st.sampled_from(["-._~", "", "!$'()*,;:@/?"]), st.booleans()).map(
    lambda parts: (
        quote(parts[0], safe=parts[1]).replace("%20", "+" if parts[2] else "%20"),
        quote(parts[0], safe="-._~"),
    )
)
_query = st.lists(st.tuples(_word, _word), max_size=5).map(
    lambda pairs: (
        "&".join(f"{n[0]}={v[0]}" for n, v in pairs),
        "&".join(f"{n[1]}={v[1]}" for n, v in pairs),
    )
)
_value = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_categories=["Cc"]), max_size=20)
_headers = st.dictionaries(
    st.sampled_from(sorted({"accept", "user-agent", "x-mlflow-workspace", "tracestate", "range", "if-match"})), _value
)
_body = st.one_of(
    st.binary(max_size=64),
    st.builds(lambda unit, size: (unit * size)[:size], st.binary(min_size=1, max_size=9), st.integers(0, 700_000)),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]),
    path=_path,
    query=_query,
    headers=_headers,
    body=_body,
    as_chunks=st.booleans(),
    content_type=st.sampled_from(["application/json", "text/plain;charset=utf-8", ""]),
)
def test_whatever_is_sent_its_canonical_form_arrives_and_is_signed(
    steady: Stage,
    *,
    method: str,
    path: tuple[str, str],
    query: tuple[str, str],
    headers: dict[str, str],
    body: bytes,
    as_chunks: bool,
    content_type: str,
) -> None:
    if path[1].startswith(("/-/", "/t/")) or path[1] == "/t":
        return
    steady.upstream.arrived.clear()
    head = [f"{name}: {value}" for name, value in headers.items()]
    if content_type:
        head.append(f"Content-Type: {content_type}")
    target = f"{path[0]}?{query[0]}" if query[0] else path[0]
    if as_chunks:
        third = len(body) // 3
        pieces = [piece for piece in (body[:third], body[third:]) if piece]
        data = request(target, method if method != "POST" else "PUT", *head, "Transfer-Encoding: chunked")
        data += chunked(*pieces)
    else:
        data = request(target, method, *head, body=body)
    with Caller(steady.port) as caller:
        caller.send(data)
        assert caller.answer().status == 200
    (arrived,) = steady.upstream.arrived
    assert arrived.target == (f"{path[1]}?{query[1]}" if query[1] else path[1])
    assert arrived.body == body
    assert {name: arrived.value(name) for name in headers} == headers
    assert_signed(arrived)


def test_a_session_token_is_sent_and_signed_only_when_there_is_one(steady: Stage) -> None:
    call(steady.port, "/x")
    assert not steady.upstream.arrived[0].values("x-amz-security-token")
