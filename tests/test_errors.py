"""The proxy's own answers, in the shape that MLflow clients understand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.errors import Refusal, error_body

# Every status that the code refuses with.
STATUSES = [400, 401, 403, 404, 405, 408, 413, 414, 421, 429, 431, 500, 501, 502, 503, 504]


@pytest.mark.parametrize("status", STATUSES)
def test_answer(status: int) -> None:
    got, headers, body = Refusal(status, "What is wrong.").answer("0123456789abcdef")
    assert got == status
    assert headers == [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"x-request-id", b"0123456789abcdef"),
    ]
    content = json.loads(body)
    assert list(content) == ["error_code", "message", "request_id"]
    assert content["message"] == "What is wrong."
    assert content["request_id"] == "0123456789abcdef"


@pytest.mark.parametrize("status", STATUSES)
def test_error_code_is_one_of_mlflows(status: int) -> None:
    from mlflow.protos.databricks_pb2 import ErrorCode

    assert Refusal(status, "x").error_code in set(ErrorCode.keys())


@pytest.mark.parametrize(
    ("status", "code"), [(404, "NOT_FOUND"), (403, "PERMISSION_DENIED"), (429, "REQUEST_LIMIT_EXCEEDED")]
)
def test_client_raises_the_exception_of_the_code(status: int, code: str) -> None:
    from mlflow.exceptions import RestException

    _, _, body = Refusal(status, "Not here.").answer("a" * 16)
    error = RestException(json.loads(body))
    assert error.error_code == code
    assert error.get_http_status_code() == status
    assert "Not here." in str(error)


def test_extras() -> None:
    refusal = Refusal(
        503, "Busy.", retry_after=7, close=True, headers=[("x-a", "b"), ("location", "/t/ä/")], detail="only in the log"
    )
    _, headers, body = refusal.answer("a" * 16)
    assert headers[4:] == [
        (b"retry-after", b"7"),
        (b"x-a", b"b"),
        (b"location", b"/t/\xe4/"),
    ]
    assert b"log" not in body
    assert refusal.detail == "only in the log"
    assert str(refusal) == "Busy."


def test_given_error_code_wins() -> None:
    assert Refusal(400, "x", error_code="RESOURCE_DOES_NOT_EXIST").error_code == "RESOURCE_DOES_NOT_EXIST"


@given(message=st.text(st.characters()))
def test_any_message_is_one_line_of_json(message: str) -> None:
    body = error_body("BAD_REQUEST", message, "a" * 16)
    assert json.loads(body)["message"] == message.encode("utf-8", "replace").decode("utf-8")
    assert b"\n" not in body
    assert b"\r" not in body
