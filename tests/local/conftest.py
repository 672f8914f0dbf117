"""Tools for the tests of the local SageMaker: requests signed by botocore, byte for byte under the test's control."""

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from mlflow_proxy.local import LocalSageMaker

TRACKING_HEADER = "x-mlflow-sm-tracking-server-arn"
APP_HEADER = "x-sm-mlflow-app-arn"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> str | None:
        return self.headers.get("x-amzn-errortype")

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["message"])

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Wire:
    """A request as it goes out; change it after signing to tamper with it."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def with_header(self, name: str, value: str | None) -> "Wire":
        kept = [(key, old) for key, old in self.headers if key.lower() != name.lower()]
        return replace(self, headers=tuple(kept if value is None else [*kept, (name, value)]))

    def header(self, name: str) -> str:
        return next(value for key, value in self.headers if key.lower() == name.lower())

    def send(self, endpoint: str) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
        try:
            connection.putrequest(self.method, self.target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers:
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(self.body)))
            connection.endheaders(self.body)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()


@dataclass
class Caller:
    """Signs with botocore, as one principal."""

    sagemaker: LocalSageMaker
    credentials: Credentials

    def sign(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        arn: str | None = None,
        signed_query: str = "",
        sent_query: str | None = None,
        service: str | None = None,
        region: str | None = None,
        when: datetime | None = None,
        headers: dict[str, str | None] | None = None,
    ) -> Wire:
        """A signed request; the query may be sent in another spelling than the one that is signed."""
        arn = self.sagemaker.tracking_arn if arn is None else arn
        app = ":mlflow-app/" in arn
        service = service or ("sagemaker" if app else "sagemaker-mlflow")
        values: dict[str, str | None] = {
            "host": urlsplit(self.sagemaker.endpoint).netloc,
            APP_HEADER if app else TRACKING_HEADER: arn,
            "x-amz-content-sha256": sha256(body).hexdigest(),
            "content-type": "application/json" if body else None,
            **(headers or {}),
        }
        url = f"{self.sagemaker.endpoint}{path}" + (f"?{signed_query}" if signed_query else "")
        request = AWSRequest(method, url, data=body)
        for name, value in values.items():
            if value is not None:
                request.headers[name] = value
        _sign(request, self.credentials, service, region or self.sagemaker.region, when)
        query = signed_query if sent_query is None else sent_query
        return Wire(method, path + (f"?{query}" if query else ""), tuple(request.headers.items()), body)

    def call(self, method: str, path: str, body: object = None, **options: Any) -> Answer:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.sign(method, path, raw, **options).send(self.sagemaker.endpoint)

    def client(self, service: str) -> Any:
        environment = self.sagemaker.environment()
        return boto3.client(
            service,
            region_name=self.sagemaker.region,
            endpoint_url=environment[f"AWS_ENDPOINT_URL_{service.upper()}"],
            aws_access_key_id=self.credentials.access_key,
            aws_secret_access_key=self.credentials.secret_key,
            aws_session_token=self.credentials.token,
        )

    def assume(self, role: str, *, name: str = "tests", **options: Any) -> "Caller":
        arn = self.sagemaker.roles.get(role, role)
        given = self.client("sts").assume_role(RoleArn=arn, RoleSessionName=name, **options)["Credentials"]
        return Caller(
            self.sagemaker,
            Credentials(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"]),
        )


def _sign(request: AWSRequest, who: Credentials, service: str, region: str, when: datetime | None) -> None:
    """What SigV4Auth.add_auth does, at a moment of the test's choice."""
    signer: Any = SigV4Auth(who, service, region)
    request.context["timestamp"] = (when or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    signer._modify_request_before_signing(request)
    text = signer.string_to_sign(request, signer.canonical_request(request))
    signer._inject_signature_to_request(request, signer.signature(text, request))


@pytest.fixture
def developer(sagemaker: LocalSageMaker) -> Caller:
    environment = sagemaker.environment()
    return Caller(sagemaker, Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]))


@dataclass
class Controls:
    """The admin endpoint."""

    url: str

    def __call__(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Any:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            raw = None if body is None else json.dumps(body)
            connection.request(method, f"/_local/{path}", raw, headers or {})
            answer = connection.getresponse()
            parsed = json.loads(answer.read())
            return parsed if answer.status < 400 else {"status": answer.status, **parsed}
        finally:
            connection.close()

    def last(self) -> dict[str, Any]:
        entry: dict[str, Any] = self("GET", "requests?last=1")["requests"][0]
        return entry


@pytest.fixture
def admin(sagemaker: LocalSageMaker) -> Iterator[Controls]:
    controls = Controls(sagemaker.admin_endpoint)
    yield controls
    controls("DELETE", "faults")
    controls("POST", "servers/tracking/start")


@pytest.fixture
def make_user(developer: Caller) -> Iterator[Callable[..., Caller]]:
    """Makes IAM users with the statements given, through moto's IAM as any client would."""
    iam = developer.client("iam")
    made: list[tuple[str, str]] = []

    def make(*statements: dict[str, Any]) -> Caller:
        name = f"user-{len(made)}"
        iam.create_user(UserName=name)
        document = json.dumps({"Version": "2012-10-17", "Statement": list(statements)})
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=document)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        made.append((name, key["AccessKeyId"]))
        return Caller(developer.sagemaker, Credentials(key["AccessKeyId"], key["SecretAccessKey"]))

    yield make
    for name, key in made:
        iam.delete_access_key(UserName=name, AccessKeyId=key)
        iam.delete_user_policy(UserName=name, PolicyName="p")
        iam.delete_user(UserName=name)
