"""The signer against botocore, which is the oracle: what is signed, and what goes over the wire."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlflow_proxy import transform
from mlflow_proxy.aws import sigv4
from mlflow_proxy.aws.clock import ServiceClock
from mlflow_proxy.requests import Request
from mlflow_proxy.signing import NO_PAYLOAD, Payload, Signer
from mlflow_proxy.targets import Target, default_endpoint, parse_arn, parse_endpoint

ACCESS_KEY = "AKIDEXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
NOON = 1_795_500_000  # seconds since the epoch
TRACKING = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/team-a"
APP = "arn:aws:sagemaker:us-east-2:123456789012:mlflow-app/app-ABCDEF"
PCHAR = "ABCXYZabcxyz0189-._~!$&'()*+,;=:@"
BODY_SIZES = [0, 1, *range(55, 66), 4096, 1 << 20]


class Keys(NamedTuple):
    """Credentials as the signer takes them."""

    access_key: str
    secret_key: str
    token: str | None


class Wire(NamedTuple):
    """A request head taken apart by the rules of RFC 9112, not by the signer's."""

    method: str
    url: str
    headers: list[tuple[str, str]]

    def one(self, name: str) -> str:
        """The value of a header that is there exactly once."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) == 1, f"{name}: {values}"
        return values[0]


def parse_head(head: bytes) -> Wire:
    """Take a request head apart; it must be one, and nothing else."""
    text, end, rest = head.partition(b"\r\n\r\n")
    assert end == b"\r\n\r\n"
    assert rest == b""
    first, *lines = text.decode("ascii").split("\r\n")
    method, url, version = first.split(" ")
    assert version == "HTTP/1.1"
    headers = []
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+: ?[^\r\n]*", line), line
        name, _, value = line.partition(":")
        headers.append((name, value.strip(" \t")))
    return Wire(method, url, headers)


def botocore_authorization(
    *,
    keys: Keys,
    region: str,
    service: str,
    method: str,
    url: str,
    headers: list[tuple[str, str]],
    body: bytes,
    second: int,
) -> str:
    """What botocore makes of a request; it computes date, token and payload hash itself."""
    request = AWSRequest(method=method, url=url, data=body)
    for name, value in headers:
        request.headers[name] = value
    signer = SigV4Auth(Credentials(keys.access_key, keys.secret_key, keys.token), service, region)
    with patch("botocore.auth.get_current_datetime", return_value=datetime.fromtimestamp(second, UTC)):
        signer.add_auth(request)
    assert request.headers["X-Amz-Date"] == sigv4.amz_date_of(second)
    return str(request.headers["Authorization"])


def verify(head: bytes, body: bytes, keys: Keys, target: Target, second: int) -> Wire:
    """Check a request head as the service does: recompute the signature from what arrived, over what it lists."""
    wire = parse_head(head)
    authorization = wire.one("authorization")
    signed = re.search(r"SignedHeaders=([a-z0-9;-]+),", authorization)
    assert signed is not None
    names = signed[1].split(";")
    assert names == sorted(set(names))
    assert wire.one("x-amz-content-sha256") == hashlib.sha256(body).hexdigest()
    assert wire.one("x-amz-date") == sigv4.amz_date_of(second)
    given_headers = [(name, wire.one(name)) for name in names if name not in ("x-amz-date", "x-amz-security-token")]
    expected = botocore_authorization(
        keys=keys,
        region=target.arn.region,
        service=target.arn.mode.service,
        method=wire.method,
        url=f"{target.endpoint.scheme}://{wire.one('host')}{wire.url}",
        headers=given_headers,
        body=body,
        second=second,
    )
    assert authorization == expected
    required = {"host", "x-amz-date", "x-amz-content-sha256", target.arn.mode.arn_header}
    required |= {"x-amz-security-token"} if keys.token else set()
    assert required <= set(names)
    assert wire.one(target.arn.mode.arn_header) == target.arn.text
    return wire


def target_of(arn: str, endpoint: str | None = None) -> Target:
    parsed = parse_arn(arn)
    return Target("t", parsed, parse_endpoint(endpoint) if endpoint else default_endpoint(parsed))


def signer_of(target: Target, second: int) -> Signer:
    signer = Signer(target)
    signer.clock = ServiceClock(now=lambda: float(second))
    return signer


def request_of(
    method: str = "GET", path: str = "/", query: str = "", headers: list[tuple[bytes, bytes]] | None = None
) -> Request:
    """A request as `requests` would have read it: the content type in its signed form, in the list as well."""
    headers = headers or []
    content_type = next((value.decode() for name, value in headers if name == b"content-type"), "")
    return Request(method, path, query, headers, content_type, None, False, "127.0.0.1", "http", "localhost")


segments = st.text(alphabet=PCHAR + '|^{}[]"<>`äß漢字🚀 %', min_size=1, max_size=12).filter(
    lambda s: s not in (".", "..")
)
unicode_paths = st.lists(segments, max_size=5).map(
    lambda parts: transform.canonical_path(
        ("/" + "/".join("".join(f"%{byte:02X}" for byte in part.encode()) for part in parts)).encode()
    )
)
query_texts = st.text(alphabet="ab0-._~ +&=%/?'\"äñ漢🚀;,:@\n", max_size=6)
queries = st.lists(st.tuples(query_texts, query_texts), max_size=6).map(
    lambda pairs: transform.canonical_query(
        "&".join("=".join("".join(f"%{b:02x}" for b in text.encode()) for text in pair) for pair in pairs).encode()
    )
)
methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
secrets = st.text(alphabet="ABCabc012/+", min_size=1, max_size=50)
tokens = st.none() | st.text(alphabet="ABCabc012/+=", min_size=1, max_size=900)
keys_of = st.builds(Keys, st.text(alphabet="ABCDEF0123", min_size=4, max_size=20), secrets, tokens)
regions = st.sampled_from(["us-east-1", "eu-central-1", "ap-southeast-2", "us-gov-west-1"])
names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,20}[A-Za-z0-9])?", fullmatch=True)
seconds = st.integers(946_684_800, 4_102_444_800)
bodies = st.binary(max_size=200) | st.sampled_from(BODY_SIZES).map(lambda size: bytes(i % 251 for i in range(size)))
content_types = st.none() | st.sampled_from(
    ["application/json", "application/x-protobuf", 'multipart/form-data; boundary="a b"', "text/plain;charset=utf-8"]
)


@st.composite
def targets(draw: st.DrawFn) -> Target:
    region = draw(regions)
    partition = "aws-us-gov" if region.startswith("us-gov") else "aws"
    kind = draw(st.sampled_from(["mlflow-tracking-server", "mlflow-app"]))
    arn = f"arn:{partition}:sagemaker:{region}:123456789012:{kind}/{draw(names)}"
    endpoint = draw(st.sampled_from([None, "http://127.0.0.1:9500", "https://vpce-1.example.com", "http://[::1]:8081"]))
    return target_of(arn, endpoint)


# What is on the wire


@settings(max_examples=300, deadline=None)
@given(
    target=targets(),
    keys=keys_of,
    method=methods,
    path=unicode_paths,
    query=queries,
    body=bodies,
    content_type=content_types,
    second=seconds,
)
def test_head_is_verified_by_botocore(
    *,
    target: Target,
    keys: Keys,
    method: str,
    path: str,
    query: str,
    body: bytes,
    content_type: str | None,
    second: int,
) -> None:
    headers = [(b"accept", b"*/*"), (b"user-agent", b"mlflow-python-client/3.17")]
    if content_type is not None:
        headers.append((b"content-type", content_type.encode()))
    request = request_of(method, path, query, headers)
    head = signer_of(target, second).head(request, path, Payload.of([body]), keys, request_id="0123456789abcdef")
    wire = verify(head, body, keys, target, second)
    assert wire.method == method
    assert wire.url == (f"{path}?{query}" if query else path)
    assert wire.one("host") == target.endpoint.authority
    signed = wire.one("authorization").split("SignedHeaders=")[1].split(",")[0].split(";")
    assert ("content-type" in signed) == bool(content_type and body)
    assert "connection" not in signed


@pytest.mark.parametrize("size", BODY_SIZES)
@pytest.mark.parametrize("arn", [TRACKING, APP])
@pytest.mark.parametrize("token", [None, "FwoGZXIvYXdzEXAMPLE//token=="])
def test_body_sizes_in_both_modes(size: int, arn: str, token: str | None) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    keys, target = Keys(ACCESS_KEY, SECRET_KEY, token), target_of(arn)
    request = request_of("POST", "/api/2.0/mlflow/runs/log-batch", "", [(b"content-type", b"application/json")])
    head = signer_of(target, NOON).head(request, request.path, Payload.of([body]), keys, request_id="a" * 16)
    wire = verify(head, body, keys, target, NOON)
    assert wire.one("content-length") == str(size)
    assert wire.one("content-type") == "application/json"
    assert ("x-amz-security-token" in dict(wire.headers)) == (token is not None)
    service = {TRACKING: "sagemaker-mlflow", APP: "sagemaker"}[arn]
    assert f"/{target.arn.region}/{service}/aws4_request," in wire.one("authorization")
    other = {TRACKING: "x-sm-mlflow-app-arn", APP: "x-mlflow-sm-tracking-server-arn"}[arn]
    assert other not in dict(wire.headers)


@pytest.mark.parametrize(
    ("method", "body", "length"),
    [
        ("GET", b"", None),
        ("HEAD", b"", None),
        ("DELETE", b"", None),
        ("OPTIONS", b"", None),
        ("POST", b"", "0"),
        ("PUT", b"", "0"),
        ("PATCH", b"", "0"),
        ("DELETE", b"{}", "2"),
        ("GET", b"x", "1"),
    ],
)
def test_content_length(method: str, body: bytes, length: str | None) -> None:
    target = target_of(TRACKING)
    head = signer_of(target, NOON).head(
        request_of(method), "/", Payload.of([body]), Keys("A", "s", None), request_id="a" * 16
    )
    assert dict(parse_head(head).headers).get("content-length") == length


def test_target_path_not_the_proxys_is_signed_and_sent() -> None:
    target, keys = target_of(APP), Keys(ACCESS_KEY, SECRET_KEY, None)
    head = signer_of(target, NOON).head(
        request_of("GET", "/t/dev/api/x", "a=1"), "/api/x", NO_PAYLOAD, keys, request_id="a" * 16
    )
    assert verify(head, b"", keys, target, NOON).url == "/api/x?a=1"


def test_passed_headers_are_sent_as_they_came_and_request_id_is_ours() -> None:
    target, keys = target_of(TRACKING), Keys(ACCESS_KEY, SECRET_KEY, "token")
    passed = [(b"accept", b"a"), (b"accept", b"b"), (b"tracestate", b"x=1"), (b"tracestate", b"y=2")]
    head = signer_of(target, NOON).head(request_of(headers=passed), "/", NO_PAYLOAD, keys, request_id="my-request-id")
    wire = verify(head, b"", keys, target, NOON)
    assert [pair for pair in wire.headers if pair[0] in ("accept", "tracestate")] == [
        (name.decode(), value.decode()) for name, value in passed
    ]
    assert wire.one("x-request-id") == "my-request-id"


def test_clock_offset_moves_the_date() -> None:
    target, keys = target_of(TRACKING), Keys(ACCESS_KEY, SECRET_KEY, None)
    signer = signer_of(target, NOON)
    signer.clock.offset = -7200.0
    head = signer.head(request_of(), "/", NO_PAYLOAD, keys, request_id="a" * 16)
    verify(head, b"", keys, target, NOON - 7200)


def test_midnight_utc_changes_the_key() -> None:
    target, keys = target_of(TRACKING), Keys(ACCESS_KEY, SECRET_KEY, None)
    midnight = 1_795_564_800
    assert midnight % 86400 == 0
    signatures = []
    for second in (midnight - 1, midnight, midnight - 1, midnight + 1, midnight + 86400):
        head = signer_of(target, second).head(request_of(), "/", NO_PAYLOAD, keys, request_id="a" * 16)
        wire = verify(head, b"", keys, target, second)
        day = datetime.fromtimestamp(second, UTC).strftime("%Y%m%d")
        assert f"Credential={ACCESS_KEY}/{day}/" in wire.one("authorization")
        signatures.append(wire.one("authorization"))
    assert signatures[0] == signatures[2]
    assert len(set(signatures)) == 4


def test_many_secrets_regions_and_days_never_share_a_key() -> None:
    """More of them than the cache holds, asked for twice: each is the right one both times."""
    combinations = [
        (f"secret{i}", day, region, service)
        for i in range(20)
        for day in ("20261124", "20261125")
        for region in ("us-east-1", "eu-west-1")
        for service in ("sagemaker", "sagemaker-mlflow")
    ]
    first = [sigv4.signing_key(*combination) for combination in combinations]
    second = [sigv4.signing_key(*combination) for combination in reversed(combinations)]
    assert first == second[::-1]
    assert len(set(first)) == len(combinations) == 160


def tampered(head: bytes) -> list[tuple[str, bytes]]:
    """Heads of which a checker must say no."""
    return [
        ("path", head.replace(b"/api/2.0", b"/api/2.1", 1)),
        ("query", head.replace(b"run_id=1", b"run_id=2", 1)),
        ("method", head.replace(b"POST", b"PUT", 1)),
        ("host", head.replace(b"host: eu-west-1", b"host: eu-west-2", 1)),
        ("arn", head.replace(b"team-a", b"team-b", 1)),
        ("content type", head.replace(b"application/json", b"application/jsoN", 1)),
    ]


def test_verification_notices_every_change() -> None:
    """The checks of this file can fail: a changed head does not verify."""
    target, keys, body = target_of(TRACKING), Keys(ACCESS_KEY, SECRET_KEY, "token"), b'{"a": 1}'
    request = request_of("POST", "/api/2.0/x", "run_id=1", [(b"content-type", b"application/json")])
    head = signer_of(target, NOON).head(request, request.path, Payload.of([body]), keys, request_id="a" * 16)
    verify(head, body, keys, target, NOON)
    for what, changed in tampered(head):
        assert changed != head, what
        with pytest.raises(AssertionError):
            verify(changed, body, keys, target, NOON)
    with pytest.raises(AssertionError):
        verify(head, body + b" ", keys, target, NOON)
    with pytest.raises(AssertionError):
        verify(head, body, keys._replace(secret_key="other"), target, NOON)


# The pure functions


@settings(max_examples=200, deadline=None)
@given(path=unicode_paths)
@example(path="/" + PCHAR)
@example(path="/a%20b/%E6%BC%A2/%F0%9F%9A%80/")
@example(path="/api/2.0/mlflow-artifacts/artifacts/a%2Fb")
def test_canonical_uri_is_botocores(path: str) -> None:
    auth: Any = SigV4Auth(Credentials("A", "s"), "sagemaker-mlflow", "us-east-1")
    assert sigv4.canonical_uri(path) == auth._normalize_url_path(path)


@settings(max_examples=300, deadline=None)
@given(query=queries)
@example(query="a=2&a=1&a=10&a=")
@example(query="a-b=1&a=1&a.b=1&a~=1&A=1&a%20=1")
@example(query="b=&a=&c=")
def test_canonical_query_is_botocores(query: str) -> None:
    auth: Any = SigV4Auth(Credentials("A", "s"), "sagemaker-mlflow", "us-east-1")
    request = AWSRequest(method="GET", url=f"https://h/?{query}")
    assert sigv4.canonical_query(query) == auth.canonical_query_string(request)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(query_texts.filter(bool), query_texts), min_size=1, max_size=6), data=st.data())
def test_order_of_parameters_does_not_change_what_is_signed(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    def canonical(some: list[tuple[str, str]]) -> str:
        raw = "&".join("=".join("".join(f"%{b:02x}" for b in text.encode()) for text in pair) for pair in some)
        return sigv4.canonical_query(transform.canonical_query(raw.encode()))

    assert canonical(pairs) == canonical(data.draw(st.permutations(pairs)))


@settings(max_examples=200, deadline=None)
@given(query=queries.filter(bool))
def test_strict_encoding_is_what_the_service_computes(query: str) -> None:
    """The service decodes names and values and encodes them strictly: botocore's way with parameters."""
    from urllib.parse import unquote

    auth: Any = SigV4Auth(Credentials("A", "s"), "sagemaker-mlflow", "us-east-1")
    pairs = [tuple(unquote(part) for part in piece.split("=")) for piece in query.split("&")]
    assert sigv4.canonical_query(query) == auth._canonical_query_string_params(pairs)


@pytest.mark.parametrize(
    ("day", "region", "service", "key"),
    [
        # "Examples of how to derive a signing key", AWS General Reference
        ("20120215", "us-east-1", "iam", "f4780e2d9f65fa895f9c67b32ce1baf0b0d8a43505a000a1a9e090d414db404d"),
        # "Create a signed AWS API request", IAM user guide
        ("20150830", "us-east-1", "iam", "c4afb1cc5771d871763a393e44b703571b55cc28424d1a5e86da6ed3c154a4b9"),
    ],
)
def test_documented_signing_keys(day: str, region: str, service: str, key: str) -> None:
    secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
    assert sigv4.signing_key(secret, day, region, service).hex() == key


def test_documented_request() -> None:
    """The worked example of the IAM user guide: ListUsers on 2015-08-30."""
    content_type = "application/x-www-form-urlencoded; charset=utf-8"
    headers = [("content-type", content_type), ("host", "iam.amazonaws.com"), ("x-amz-date", "20150830T123600Z")]
    canonical, signed = sigv4.canonical_request(
        "GET", "/", "Action=ListUsers&Version=2010-05-08", headers, sigv4.EMPTY_SHA256
    )
    assert hashlib.sha256(canonical.encode()).hexdigest() == (
        "f536975d06c0309214f805bb90ccff089219ecd68b2577efef23edd43b7e1a59"
    )
    assert signed == "content-type;host;x-amz-date"
    authorization = sigv4.sign(
        access_key="AKIDEXAMPLE",
        secret_key=SECRET_KEY,
        region="us-east-1",
        service="iam",
        method="GET",
        path="/",
        query="Action=ListUsers&Version=2010-05-08",
        headers=headers,
        hashed_payload=sigv4.EMPTY_SHA256,
        amz_date="20150830T123600Z",
    )
    assert authorization.endswith("Signature=5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7")


# The AWS SigV4 test suite (aws-sig-v4-test-suite): service "service", us-east-1, 2015-08-30.
SUITE = [
    ("get-vanilla", "GET", "", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
    (
        "get-vanilla-query-order-key-case",
        "GET",
        "Param2=value2&Param1=value1",
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
    ),
    ("post-vanilla", "POST", "", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
]


@pytest.mark.parametrize(("name", "method", "query", "signature"), SUITE, ids=[case[0] for case in SUITE])
def test_aws_test_suite(name: str, method: str, query: str, signature: str) -> None:
    authorization = sigv4.sign(
        access_key="AKIDEXAMPLE",
        secret_key=SECRET_KEY,
        region="us-east-1",
        service="service",
        method=method,
        path="/",
        query=query,
        headers=[("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")],
        hashed_payload=sigv4.EMPTY_SHA256,
        amz_date="20150830T123600Z",
    )
    assert authorization.endswith(f"Signature={signature}")


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (0, "19700101T000000Z"),
        (1_440_938_160, "20150830T123600Z"),
        (1_709_164_799, "20240228T235959Z"),
        (1_709_164_800, "20240229T000000Z"),
        (4_102_444_799, "20991231T235959Z"),
    ],
)
def test_amz_date(second: int, text: str) -> None:
    assert sigv4.amz_date_of(second) == text


def test_payload_hash() -> None:
    assert sigv4.payload_hash([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sigv4.payload_hash([b"a", b"bc"]) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
