"""The gate takes what botocore signs and refuses every request that was changed afterwards."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import pytest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.local.signature import canonical_query

SEARCH = "/api/2.0/mlflow/experiments/search"
GET = "/api/2.0/mlflow/experiments/get"
BODY = json.dumps({"max_results": 10}).encode()
INVALID = "InvalidSignatureException"
UNKNOWN = "UnrecognizedClientException"


@pytest.mark.parametrize("mode", ["tracking_arn", "app_arn"])
@pytest.mark.parametrize(("method", "body"), [("POST", BODY), ("GET", b"")])
def test_signed_is_accepted(developer: Any, sagemaker: Any, mode: str, method: str, body: bytes) -> None:
    arn, query = getattr(sagemaker, mode), "" if body else "max_results=10"
    answer = developer.sign(method, SEARCH, body, arn=arn, signed_query=query).send(sagemaker.endpoint)
    assert answer.status == 200
    root = f"s3://{sagemaker.bucket}/{mode.removesuffix('_arn')}/"
    assert answer.json()["experiments"][0]["artifact_location"].startswith(root)


def tampered() -> dict[str, Callable[[Any], Any]]:
    def flip(text: str) -> str:
        return text[:-1] + ("0" if text[-1] != "0" else "1")

    return {
        "one byte of the body": lambda w: replace(w, body=w.body.replace(b"10", b"11")),
        "a byte more": lambda w: replace(w, body=w.body + b" "),
        "no body": lambda w: replace(w, body=b""),
        "one path character": lambda w: replace(w, target=w.target.replace("search", "searcH")),
        "another version in the path": lambda w: replace(w, target=w.target.replace("2.0", "3.0")),
        "a query": lambda w: replace(w, target=w.target + "?a=1"),
        "the method": lambda w: replace(w, method="PUT"),
        "a signed header": lambda w: w.with_header("content-type", "application/json; charset=utf-8"),
        "a signed header gone": lambda w: w.with_header("content-type", None),
        "a signed header twice": lambda w: replace(w, headers=(*w.headers, ("content-type", "application/json"))),
        "the host": lambda w: w.with_header("host", "us-east-1.experiments.sagemaker.aws"),
        "the date": lambda w: w.with_header("x-amz-date", _later(w.header("x-amz-date"))),
        "the payload hash": lambda w: w.with_header("x-amz-content-sha256", flip(w.header("x-amz-content-sha256"))),
        "UNSIGNED-PAYLOAD after signing": lambda w: w.with_header("x-amz-content-sha256", "UNSIGNED-PAYLOAD"),
        "the signature": lambda w: w.with_header("authorization", flip(w.header("authorization"))),
        "an x-amz header more": lambda w: w.with_header("x-amz-meta", "1"),
        "a header less in the list": lambda w: _authorization(w, "content-type;", ""),
        "the list unsorted": lambda w: _authorization(w, "content-type;host", "host;content-type"),
        "a header listed that is not there": lambda w: _authorization(w, "host;", "host;x-absent;"),
        "the ARN of the other kind": lambda w: w.with_header(
            "x-mlflow-sm-tracking-server-arn", w.header("x-mlflow-sm-tracking-server-arn") + "-2"
        ),
    }


def _later(stamp: str) -> str:
    moment = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ") + timedelta(seconds=1)
    return moment.strftime("%Y%m%dT%H%M%SZ")


def _authorization(wire: Any, old: str, new: str) -> Any:
    return wire.with_header("authorization", wire.header("authorization").replace(old, new))


@pytest.mark.parametrize("what", tampered())
def test_tampered_is_refused(developer: Any, sagemaker: LocalSageMaker, what: str) -> None:
    wire = developer.sign("POST", SEARCH, BODY)
    assert wire.send(sagemaker.endpoint).status == 200
    answer = tampered()[what](wire).send(sagemaker.endpoint)
    assert (answer.status, answer.error) == (403, INVALID)
    assert answer.message.startswith("The request signature we calculated does not match")
    assert answer.headers["x-amzn-requestid"]
    assert abs(parsedate_to_datetime(answer.headers["date"]) - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize("changed", ["experiment_id=1", "experiment_id=0&x=", "Experiment_id=0", ""])
def test_tampered_query_is_refused(developer: Any, sagemaker: Any, changed: str) -> None:
    wire = developer.sign("GET", GET, signed_query="experiment_id=0")
    assert wire.send(sagemaker.endpoint).status == 200
    answer = replace(wire, target=f"{GET}?{changed}").send(sagemaker.endpoint)
    assert answer.error == INVALID


@pytest.mark.parametrize(
    ("options", "status", "error", "text"),
    [
        ({"service": "sagemaker"}, 403, INVALID, "correct service: 'sagemaker-mlflow'"),
        ({"service": "execute-api"}, 403, INVALID, "correct service"),
        ({"region": "eu-west-1"}, 403, INVALID, "valid region, not 'eu-west-1'"),
        ({"headers": {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}}, 403, INVALID, "does not match"),
        ({"headers": {"x-amz-content-sha256": None}}, 403, INVALID, "does not match"),
        ({"headers": {"x-mlflow-sm-tracking-server-arn": None}}, 400, "ValidationException", "none was given"),
        ({"headers": {"x-sm-mlflow-app-arn": "arn:x"}}, 400, "ValidationException", "2 were given"),
        ({"arn": "arn:aws:sagemaker:us-east-1:1:x/y"}, 400, "ValidationException", "is not the ARN"),
    ],
)
def test_wrong_from_the_start(developer: Any, options: Any, status: int, error: str, text: str) -> None:
    answer = developer.call("POST", SEARCH, BODY, **options)
    assert (answer.status, answer.error) == (status, error)
    assert text in answer.message


def test_arn_header_of_the_other_kind(developer: Any, sagemaker: Any) -> None:
    headers = {"x-mlflow-sm-tracking-server-arn": sagemaker.app_arn, "x-sm-mlflow-app-arn": None}
    assert developer.call("POST", SEARCH, BODY, headers=headers).error == "ValidationException"


def test_repeated_arn_header(developer: Any, sagemaker: Any) -> None:
    wire = developer.sign("POST", SEARCH, BODY)
    twice = (*wire.headers, ("x-mlflow-sm-tracking-server-arn", sagemaker.tracking_arn))
    assert replace(wire, headers=twice).send(sagemaker.endpoint).error == "ValidationException"


def test_arn_header_must_be_signed(developer: Any, sagemaker: Any) -> None:
    name = "x-mlflow-sm-tracking-server-arn"
    wire = developer.sign("POST", SEARCH, BODY, headers={name: None})
    answer = wire.with_header(name, sagemaker.tracking_arn).send(sagemaker.endpoint)
    assert answer.error == INVALID
    assert sagemaker.journal.last(1)[0]["reason"].endswith(name)


def test_same_request_twice_is_accepted(developer: Any, sagemaker: Any) -> None:
    wire = developer.sign("POST", SEARCH, BODY)
    assert [wire.send(sagemaker.endpoint).status for _ in range(2)] == [200, 200]


def test_unsigned_headers_may_change(developer: Any, sagemaker: Any) -> None:
    wire = developer.sign("POST", SEARCH, BODY).with_header("user-agent", "x").with_header("x-request-id", "7")
    assert wire.send(sagemaker.endpoint).status == 200


@pytest.mark.parametrize("minutes", [-6, 6, -60 * 24, 60 * 24])
def test_date_outside_the_window(developer: Any, sagemaker: Any, minutes: int) -> None:
    answer = developer.call("POST", SEARCH, BODY, when=datetime.now(UTC) + timedelta(minutes=minutes))
    assert (answer.status, answer.error) == (403, INVALID)
    begin, end = ("Signature expired: ", " - 5 min.)") if minutes < 0 else ("Signature not yet current: ", " + 5 min.)")
    assert answer.message.startswith(begin)
    assert answer.message.endswith(end)


@pytest.mark.parametrize("minutes", [-4, 4])
def test_date_inside_the_window(developer: Any, minutes: int) -> None:
    assert developer.call("POST", SEARCH, BODY, when=datetime.now(UTC) + timedelta(minutes=minutes)).status == 200


def test_scope_date_differs(developer: Any, sagemaker: Any) -> None:
    wire = developer.sign("POST", SEARCH, BODY)
    today = wire.header("x-amz-date")[:8]
    answer = _authorization(wire, today, "20200101").send(sagemaker.endpoint)
    assert answer.message.startswith("Date in Credential scope does not match")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "MissingAuthenticationTokenException"),
        ("Bearer abc", "IncompleteSignatureException"),
        ("AWS4-HMAC-SHA256 Credential=a/b/c/d/aws4_request", "IncompleteSignatureException"),
        ("AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders=host, Signature=0", "IncompleteSignatureException"),
        ("AWS4-HMAC-SHA256", "IncompleteSignatureException"),
    ],
)
def test_authorization_missing_or_broken(developer: Any, sagemaker: Any, value: str | None, error: str) -> None:
    wire = developer.sign("POST", SEARCH, BODY).with_header("authorization", value)
    assert wire.send(sagemaker.endpoint).error == error


def test_unknown_key_and_wrong_secret(developer: Any, sagemaker: Any) -> None:
    known = developer.credentials
    stranger = replace(developer, credentials=Credentials("AKIAAAAAAAAAAAAAAAAA", known.secret_key))
    answer = stranger.call("POST", SEARCH, BODY)
    assert (answer.status, answer.error) == (403, UNKNOWN)
    assert answer.message == "The security token included in the request is invalid."
    thief = replace(developer, credentials=Credentials(known.access_key, "0" * 40))
    assert thief.call("POST", SEARCH, BODY).error == INVALID


def test_session_token(developer: Any, sagemaker: Any) -> None:
    writer = developer.assume("writer")
    assert writer.call("POST", SEARCH, BODY).status == 200
    session = writer.credentials
    for token in (None, "another"):
        without = replace(writer, credentials=Credentials(session.access_key, session.secret_key, token))
        assert without.call("POST", SEARCH, BODY).error == UNKNOWN
    borrowed = Credentials(developer.credentials.access_key, developer.credentials.secret_key, session.token)
    assert replace(developer, credentials=borrowed).call("POST", SEARCH, BODY).error == UNKNOWN


def test_disabled_key(developer: Any, make_user: Any) -> None:
    user = make_user({"Effect": "Allow", "Action": "*", "Resource": "*"})
    assert user.call("POST", SEARCH, BODY).status == 200
    iam = developer.client("iam")
    iam.update_access_key(UserName="user-0", AccessKeyId=user.credentials.access_key, Status="Inactive")
    assert user.call("POST", SEARCH, BODY).error == UNKNOWN


NAMES = ["plain", "a b", "a+b", 'it\'s "quoted"', "a/b?c=d&e", "ünï 東京 🚀", "100%", "~._-", "a;b|c\\d", "=", "x=y"]


@pytest.mark.parametrize("name", NAMES)
def test_query_that_was_encoded_strictly(developer: Any, name: str) -> None:
    """The form that a signer should send: it must reach MLflow with its meaning intact."""
    query = f"experiment_name={quote(name, safe='-_.~')}"
    answer = developer.call("GET", "/api/2.0/mlflow/experiments/get-by-name", signed_query=query)
    assert answer.status == 404
    assert name in answer.message


@pytest.mark.parametrize(
    ("sent", "signed"),
    [
        ("a=b+c", "a=b%20c"),
        ("a='x'", "a=%27x%27"),
        ("a=%7e", "a=~"),
        ("a=%e4%b8%ad", "a=%E4%B8%AD"),
        ("a=1&a=0", "a=0&a=1"),
        ("b=1&a=2", "a=2&b=1"),
        ("a&b=", "a=&b="),
        ("a=(x)*!", "a=%28x%29%2A%21"),
        ("filter=name='a+b'", "filter=name%3D%27a%20b%27"),
    ],
)
def test_query_in_another_spelling(developer: Any, sent: str, signed: str) -> None:
    """The service canonicalises what arrives; a spelling that means the same has the same signature."""
    options = {"signed_query": f"experiment_id=0&{signed}", "sent_query": f"experiment_id=0&{sent}"}
    assert developer.call("GET", GET, **options).status == 200


@pytest.mark.parametrize("query", ["a=b+c", "a='x'", "a=%7E", "a=(x)"])
def test_query_signed_as_it_stands_is_refused(developer: Any, query: str) -> None:
    """botocore signs a URL's query as it stands; the service does not see it so."""
    assert developer.call("GET", GET, signed_query=f"experiment_id=0&{query}").error == INVALID


@pytest.mark.parametrize("path", ["/api/2.0/mlflow/traces/a%20b/info", "/api/2.0/mlflow/traces/%E4%B8%AD/info"])
def test_encoded_path(developer: Any, path: str) -> None:
    answer = developer.call("GET", path)
    assert answer.error is None


@pytest.mark.parametrize("path", ["/api//2.0/mlflow/experiments/get", "/api/./2.0/mlflow/experiments/get"])
def test_path_is_compared_in_its_normal_form(developer: Any, sagemaker: Any, path: str) -> None:
    wire = developer.sign("GET", GET, signed_query="experiment_id=0")
    answer = replace(wire, target=f"{path}?experiment_id=0").send(sagemaker.endpoint)
    assert answer.error is None


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=6))
def test_canonical_query_of_any_encoding_is_botocores(pairs: list[tuple[str, str]]) -> None:
    def clean(text: str) -> str:
        return text.encode("utf-8", "ignore").decode()

    safe = [(clean(name), clean(value)) for name, value in pairs]
    strict = sorted((quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in safe)
    loose = "&".join(
        f"{quote(name, safe=chr(39) + '/()')}={quote(value, safe=' ').replace(' ', '+')}" for name, value in safe
    )
    assert canonical_query(loose) == "&".join(f"{name}={value}" for name, value in strict)
