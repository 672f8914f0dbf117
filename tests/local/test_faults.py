"""Faults on demand, the clock, and credentials that end early."""

import http.client
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError

SEARCH = "/api/2.0/mlflow/experiments/search"
ONE = {"max_results": 1}


def test_latency(developer: Any, admin: Any) -> None:
    admin("POST", "faults", {"latency": 0.4, "requests": 1})
    began = time.monotonic()
    assert developer.call("POST", SEARCH, ONE).status == 200
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        ({"status": 500}, 500, "InternalServerException"),
        ({"status": 503, "error": "ServiceUnavailable"}, 503, "ServiceUnavailable"),
        ({"throttle": 429}, 429, "TooManyRequestsException"),
        ({"throttle": 400, "retry_after": 3}, 400, "ThrottlingException"),
    ],
)
def test_error_for_the_next_requests(developer: Any, admin: Any, fault: Any, status: int, error: str) -> None:
    admin("POST", "faults", {**fault, "requests": 2})
    answers = [developer.call("POST", SEARCH, ONE) for _ in range(3)]
    assert [answer.status for answer in answers] == [status, status, 200]
    assert answers[0].error == error
    assert answers[0].headers["retry-after"] == ("3" if "retry_after" in fault else None)
    state = admin("GET", "faults")["faults"][0]
    assert (state["hits"], state["left"]) == (2, 0)


@pytest.mark.parametrize(("reset", "done"), [("before", 0), ("after", 1)])
def test_reset_before_any_answer(developer: Any, sagemaker: Any, admin: Any, reset: str, done: int) -> None:
    admin("POST", "faults", {"reset": reset, "requests": 1})
    name = f"reset {reset} {time.time()}"
    with pytest.raises(ConnectionError):
        developer.call("POST", "/api/2.0/mlflow/experiments/create", {"name": name})
    found = developer.call("POST", SEARCH, {"max_results": 1000}).json()["experiments"]
    assert sum(each["name"] == name for each in found) == done
    entry = next(each for each in reversed(sagemaker.journal.last(5)) if each["fault"])
    assert (entry["path"], entry["status"]) == ("/api/2.0/mlflow/experiments/create", 0)


def test_reset_in_the_body(developer: Any, admin: Any) -> None:
    whole = developer.call("GET", "/")
    admin("POST", "faults", {"reset": "body", "path": "^/$"})
    with pytest.raises((ConnectionError, http.client.IncompleteRead)):
        developer.call("GET", "/")
    admin("DELETE", "faults")
    assert developer.call("GET", "/").body == whole.body


@pytest.mark.parametrize("size", [0, 1, 100])
def test_truncated_body(developer: Any, admin: Any, size: int) -> None:
    whole = developer.call("GET", "/").body
    admin("POST", "faults", {"truncate": size})
    with pytest.raises(http.client.IncompleteRead) as caught:
        developer.call("GET", "/")
    assert caught.value.partial == whole[:size]


def test_slow_pieces(developer: Any, admin: Any) -> None:
    whole = developer.call("GET", "/").body
    admin("POST", "faults", {"chunk_delay": 0.05, "chunk_bytes": len(whole) // 4, "requests": 1})
    began = time.monotonic()
    assert developer.call("GET", "/").body == whole
    assert time.monotonic() - began >= 0.2


def test_selection(developer: Any, sagemaker: Any, admin: Any) -> None:
    admin("POST", "faults", {"status": 500, "method": "GET", "path": "experiments/get$", "target": "app"})
    get = {"path": "/api/2.0/mlflow/experiments/get", "signed_query": "experiment_id=0"}
    assert developer.call("GET", **get).status == 200
    assert developer.call("POST", SEARCH, ONE, arn=sagemaker.app_arn).status == 200
    assert developer.call("GET", **get, arn=sagemaker.app_arn).status == 500


def test_fraction(developer: Any, admin: Any) -> None:
    admin("POST", "faults", {"throttle": 429, "fraction": 0.5})
    statuses = {developer.call("POST", SEARCH, ONE).status for _ in range(40)}
    assert statuses == {200, 429}


def test_first_match_only_and_removal(developer: Any, admin: Any) -> None:
    first = admin("POST", "faults", {"status": 500})["id"]
    admin("POST", "faults", {"status": 502})
    assert developer.call("POST", SEARCH, ONE).status == 500
    admin("DELETE", f"faults/{first}")
    assert developer.call("POST", SEARCH, ONE).status == 502
    admin("DELETE", "faults")
    assert developer.call("POST", SEARCH, ONE).status == 200


def test_tampered_requests_meet_no_fault(developer: Any, sagemaker: Any, admin: Any) -> None:
    admin("POST", "faults", {"status": 500, "requests": 1})
    wire = developer.sign("POST", SEARCH, b"{}").with_header("authorization", None)
    assert wire.send(sagemaker.endpoint).status == 403
    assert admin("GET", "faults")["faults"][0]["hits"] == 0


def test_other_planes(developer: Any, admin: Any) -> None:
    admin("POST", "faults", {"throttle": 400, "plane": "sagemaker"})
    admin("POST", "faults", {"throttle": 400, "plane": "sts"})
    assert developer.call("POST", SEARCH, ONE).status == 200
    with pytest.raises(ClientError, match="ThrottlingException"):
        developer.client("sagemaker").list_mlflow_apps()
    with pytest.raises(ClientError, match="Throttling"):
        developer.client("sts").get_caller_identity()


@pytest.mark.parametrize("skew", [3600, -3600])
def test_clock_skew(developer: Any, admin: Any, skew: int) -> None:
    admin("POST", "faults", {"clock_skew": skew})
    answer = developer.call("POST", SEARCH, ONE)
    assert answer.error == "InvalidSignatureException"
    assert answer.message.startswith("Signature expired" if skew > 0 else "Signature not yet current")
    ahead = parsedate_to_datetime(answer.headers["date"]) - datetime.now(UTC)
    assert abs(ahead.total_seconds() - skew) < 60
    corrected = datetime.now(UTC) + timedelta(seconds=skew)
    assert developer.call("POST", SEARCH, ONE, when=corrected).status == 200
    admin("DELETE", "faults")
    assert developer.call("POST", SEARCH, ONE).status == 200


def test_credentials_that_end_early(developer: Any, admin: Any) -> None:
    writer = developer.assume("writer")
    assert writer.call("POST", SEARCH, ONE).status == 200
    admin("POST", "faults", {"credential_lifetime": 0})
    answer = writer.call("POST", SEARCH, ONE)
    assert (answer.status, answer.error) == (403, "ExpiredTokenException")
    assert developer.call("POST", SEARCH, ONE).status == 200
    with pytest.raises(ClientError, match="ExpiredToken"):
        writer.client("sts").get_caller_identity()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"lateness": 1}, "unknown: lateness; known are"),
        ({"status": 200}, "status must be"),
        ({"throttle": 500}, "throttle must be"),
        ({"reset": "now"}, "reset must be"),
        ({"reset": "before", "plane": "sts"}, "for the plane mlflow alone"),
        ({"plane": "x"}, "plane must be"),
        ({"fraction": 2}, "fraction must be"),
        ({"path": "("}, "Not a fault"),
        ({"latency": "x"}, "Not a fault"),
        ({"clock_skew": "x"}, "Not a fault"),
        ([], "must be a JSON object"),
    ],
)
def test_faults_that_are_none(admin: Any, body: object, text: str) -> None:
    answer = admin("POST", "faults", body)
    assert answer["status"] == 400
    assert text in answer["error"]
    assert admin("GET", "faults")["faults"] == []
