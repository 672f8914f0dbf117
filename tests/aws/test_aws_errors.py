"""Which answers are AWS's own errors, and how a caller is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.aws.errors import SIZE_LIMIT, AwsError, aws_error

SUFFIXED = b"http://internal.amazon.com/coral/com.amazon.coral.service/"


def error_of(content: Any, error_type: bytes | None = None, status: int = 400) -> AwsError | None:
    headers = [(b"Content-Type", b"application/json")]
    if error_type is not None:
        headers.append((b"X-Amzn-ErrorType", error_type))
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return aws_error(status, headers, body)


@pytest.mark.parametrize(
    ("content", "header", "expected"),
    [
        # restJson1: the header, with or without a namespace and a URL behind
        ({"message": "no"}, b"AccessDeniedException", ("AccessDeniedException", "no")),
        ({"message": "no"}, b"AccessDeniedException:" + SUFFIXED, ("AccessDeniedException", "no")),
        ({"Message": "no"}, b"aws.protocoltests.restjson#FooError", ("FooError", "no")),
        ({"message": "no"}, b"aws.protocoltests.restjson#FooError:" + SUFFIXED, ("FooError", "no")),
        ({}, b"FooError", ("FooError", "")),
        (b"", b"FooError", ("FooError", "")),
        (b"<html>", b"FooError", ("FooError", "")),
        ([], b"FooError", ("FooError", "")),
        # awsJson1: the body
        ({"__type": "FooError", "message": "no"}, None, ("FooError", "no")),
        ({"__type": "com.amazon.coral.service#FooError", "Message": "no"}, None, ("FooError", "no")),
        ({"__type": "a.b#FooError:http://x", "message": "no"}, None, ("FooError", "no")),
        ({"__type": "Other", "message": "no"}, b"FooError", ("FooError", "no")),
        ({"__type": "FooError", "message": None}, None, ("FooError", "")),
        ({"__type": "FooError", "message": 5}, None, ("FooError", "5")),
    ],
)
def test_aws_error(content: Any, header: bytes | None, expected: tuple[str, str]) -> None:
    error = error_of(content, header, 403)
    assert error is not None
    assert (error.type, error.message) == expected
    assert error.status == 403


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
@pytest.mark.parametrize(
    "content",
    [
        {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Run 'x' not found"},
        {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow"},
        {"error_code": "X", "message": "m", "__type": "ThrottlingException"},
        {"error_code": 1000},
    ],
)
def test_mlflows_own_errors_are_left_alone(content: Any, status: int) -> None:
    assert error_of(content, status=status) is None


def test_mlflows_error_stays_mlflows_even_with_a_header() -> None:
    assert error_of({"error_code": "NOT_FOUND", "message": "m"}, b"FooError") is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"<html><h1>502 Bad Gateway</h1></html>", b"not json", b"null", b"[]", b'"x"', b"5", b"{}", b"\xff\xfe"),
        *({"message": "no type"}, {"detail": "Not Found"}, {"__type": ""}, {"__type": None, "message": "m"}),
        *(b"[" * SIZE_LIMIT, b'{"a":' * 3000),
    ],
)
def test_other_answers_are_left_alone(content: Any) -> None:
    assert error_of(content) is None


@pytest.mark.parametrize("content", [b"", b"<html>Too many requests</html>", {}, b"[" * SIZE_LIMIT])
def test_bare_429_is_throttling(content: Any) -> None:
    error = error_of(content, status=429)
    assert error is not None
    assert error.throttled


@pytest.mark.parametrize(
    "name", ["ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded"]
)
@pytest.mark.parametrize("status", [400, 429, 503])
def test_throttling_by_type(name: str, status: int) -> None:
    for error in (
        error_of({"message": "Rate exceeded"}, name.encode(), status),
        error_of({"__type": f"com.amazon.coral.availability#{name}", "message": "Rate exceeded"}, None, status),
    ):
        assert error is not None
        assert error.throttled
        assert not error.expired
        refusal = error.refusal()
        assert (refusal.status, refusal.error_code, refusal.retry_after) == (429, "REQUEST_LIMIT_EXCEEDED", 1)
        assert refusal.message.endswith("Send requests more slowly, and try again later.")
        assert "Rate exceeded" in refusal.reason


@pytest.mark.parametrize(
    ("name", "expired"),
    [
        ("ExpiredTokenException", True),
        ("ExpiredToken", True),
        ("UnrecognizedClientException", True),
        ("InvalidClientTokenId", True),
        ("AccessDeniedException", False),
        ("InvalidSignatureException", False),
        ("ThrottlingException", False),
        ("expiredtoken", False),
    ],
)
def test_expired(name: str, expired: bool) -> None:
    error = error_of({"__type": name}, None, 403)
    assert error is not None
    assert error.expired == expired


@pytest.mark.parametrize(
    ("name", "status", "code", "advice"),
    [
        ("AccessDeniedException", 403, "PERMISSION_DENIED", "Grant the action"),
        ("InvalidSignatureException", 403, "PERMISSION_DENIED", "mlflow-proxy check"),
        ("ExpiredTokenException", 403, "PERMISSION_DENIED", "Renew the credentials"),
        ("ResourceNotFoundException", 404, "RESOURCE_DOES_NOT_EXIST", "ARN"),
        ("ValidationException", 400, "BAD_REQUEST", ""),
        ("InternalFailure", 500, "INTERNAL_ERROR", ""),
        ("ServiceUnavailable", 503, "TEMPORARILY_UNAVAILABLE", ""),
        ("SomethingNew", 401, "UNAUTHENTICATED", ""),
    ],
)
def test_refusal(name: str, status: int, code: str, advice: str) -> None:
    error = error_of({"message": "because"}, name.encode(), status)
    assert error is not None
    refusal = error.refusal()
    assert (refusal.status, refusal.error_code) == (status, code)
    assert refusal.message.startswith(f"SageMaker MLflow answered {name}.")
    assert "because" not in refusal.message
    assert refusal.reason.startswith(f"SageMaker MLflow answered {name}: because")
    assert advice in refusal.reason
    assert json.loads(refusal.answer("a" * 16)[2])["error_code"] == code


def test_recited_signature_is_cut() -> None:
    """AWS recites the canonical request, with the session token, when a signature does not match."""
    recital = (
        "The request signature we calculated does not match the signature you provided.\n\n"
        "The Canonical String for this request should have been\n'GET\n/\n\nhost:h\nx-amz-security-token:SECRETTOKEN\n'"
        "\n\nThe String-to-Sign should have been\n'AWS4-HMAC-SHA256\nSECRETTOKEN'"
    )
    for message in (
        recital,
        recital.replace("\n", " "),
        "x-amz-security-token:SECRETTOKEN",
        "a X-AMZ-SECURITY-TOKEN: SECRETTOKEN",
    ):
        error = error_of({"message": message}, b"InvalidSignatureException", 403)
        assert error is not None
        assert "SECRETTOKEN" not in error.message
        assert "SECRETTOKEN" not in error.refusal().message + error.refusal().reason
    error = error_of({"message": recital}, b"InvalidSignatureException", 403)
    assert error is not None
    assert error.message == "The request signature we calculated does not match the signature you provided."


def test_long_message_is_cut() -> None:
    error = error_of({"message": "a" * 10_000}, b"X")
    assert error is not None
    assert error.message == "a" * 1000


@given(body=st.binary(max_size=200), header=st.none() | st.binary(max_size=30), status=st.integers(400, 599))
def test_no_answer_breaks_it(body: bytes, header: bytes | None, status: int) -> None:
    error = error_of(body, header, status)
    if header:
        assert error is not None
        assert "#" not in error.type
        assert ":" not in error.type
