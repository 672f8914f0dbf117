"""Presigned links and descriptions: against the local SageMaker, and a server that answers what a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import requests
from botocore.loaders import Loader

from mlflow_proxy.aws import sessions
from mlflow_proxy.aws.presign import PresignError, ServerDescription, describe, presigned_url
from mlflow_proxy.aws.role_sessions import RoleSession
from mlflow_proxy.aws.sessions import Credentials
from mlflow_proxy.settings import Aws
from mlflow_proxy.targets import Target, default_endpoint, parse_arn

if TYPE_CHECKING:
    from mlflow_proxy.local import LocalSageMaker

SERVER = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/dev"
APP = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-app/app-ABC"
CALLS = {SERVER: "CreatePresignedMlflowTrackingServerUrl", APP: "CreatePresignedMlflowAppUrl"}
KEYS = Credentials("AKIATEST", "test-secret", "test-token", None, "env")
DEAD = "http://127.0.0.1:9"


def a_target(arn: str) -> Target:
    parsed = parse_arn(arn)
    return Target("dev", parsed, default_endpoint(parsed))


def presign(arn: str, aws: Aws, *, keys: Credentials = KEYS, link: int = 60, session: int = 1800) -> str:
    return presigned_url(a_target(arn), keys, aws, link_expires=link, session_expires=session)


class ControlPlane:
    """Answers every call with `status` and `body`, and keeps what was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.body = b"{}"
        self.delay = 0.0
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.aws = Aws(sagemaker_endpoint=f"http://127.0.0.1:{self._server.server_port}")
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, status: int, code: str, message: str = "") -> None:
        self.status = status
        self.body = json.dumps({"__type": code, "message": message}).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        plane = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                plane.asked.append((headers["x-amz-target"], headers, body))
                time.sleep(plane.delay)
                self.send_response(plane.status)
                self.send_header("content-length", str(len(plane.body)))
                self.end_headers()
                self.wfile.write(plane.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    server = ControlPlane()
    yield server
    server.close()


class TestCalls:
    """What goes out."""

    @pytest.mark.parametrize(
        ("arn", "wanted"), [(SERVER, {"TrackingServerName": "dev"}), (APP, {"Arn": APP})], ids=["server", "app"]
    )
    def test_presign(self, plane: ControlPlane, arn: str, wanted: dict[str, str]) -> None:
        plane.body = b'{"AuthorizedUrl": "https://example.com/auth?token=x"}'
        assert presign(arn, plane.aws, link=5, session=43200) == "https://example.com/auth?token=x"
        ((call, headers, body),) = plane.asked
        assert call == f"SageMaker.{CALLS[arn]}"
        assert body == {**wanted, "ExpiresInSeconds": 5, "SessionExpirationDurationInSeconds": 43200}
        assert "Credential=AKIATEST/" in headers["authorization"]
        assert "/us-east-1/sagemaker/aws4_request" in headers["authorization"]
        assert headers["x-amz-security-token"] == "test-token"

    def test_environments_proxy_is_ignored(self, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, DEAD)
        plane.body = b'{"AuthorizedUrl": "https://example.com/"}'
        presign(SERVER, plane.aws)

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (
                {"TrackingServerName": "dev", "TrackingServerStatus": "Created", "IsActive": "Active"},
                ServerDescription("dev", "Created", True, None),
            ),
            (
                {"TrackingServerStatus": "Stopped", "IsActive": "Inactive", "MlflowVersion": "3.0"},
                ServerDescription("dev", "Stopped", False, "3.0"),
            ),
            ({"TrackingServerStatus": "Stopped"}, ServerDescription("dev", "Stopped", False, None)),
        ],
    )
    def test_describe_server(self, plane: ControlPlane, answer: dict[str, str], expected: ServerDescription) -> None:
        plane.body = json.dumps(answer).encode()
        assert describe(a_target(SERVER), KEYS, plane.aws) == expected

    @pytest.mark.parametrize(("status", "running"), [("Created", True), ("Updating", True), ("Deleting", False)])
    def test_describe_app(self, plane: ControlPlane, status: str, running: bool) -> None:
        plane.body = json.dumps({"Name": "mine", "Status": status, "MlflowVersion": "3.4"}).encode()
        assert describe(a_target(APP), KEYS, plane.aws) == ServerDescription("mine", status, running, "3.4")


class TestErrors:
    @pytest.mark.parametrize(
        ("link", "session", "words"),
        [
            (4, 1800, "is 4; AWS takes 5 to 300 seconds"),
            (301, 1800, "is 301; AWS takes 5 to 300 seconds"),
            (60, 1799, "is 1799; AWS takes 1800 to 43200 seconds"),
            (60, 43201, "is 43201; AWS takes 1800 to 43200 seconds"),
        ],
    )
    def test_bounds(self, plane: ControlPlane, link: int, session: int, words: str) -> None:
        with pytest.raises(PresignError, match=words) as caught:
            presign(SERVER, plane.aws, link=link, session=session)
        assert (caught.value.status, caught.value.error_code) == (400, "INVALID_PARAMETER_VALUE")
        assert plane.asked == []

    @pytest.mark.parametrize("arn", [SERVER, APP], ids=["server", "app"])
    def test_denied_names_the_action(self, plane: ControlPlane, arn: str) -> None:
        plane.fail(400, "AccessDeniedException", "User: someone is not authorized")
        with pytest.raises(PresignError) as caught:
            presign(arn, plane.aws)
        assert (caught.value.status, caught.value.error_code) == (403, "PERMISSION_DENIED")
        assert f"sagemaker:{CALLS[arn]}" in caught.value.message
        for words in (f"sagemaker:{CALLS[arn]}", arn, "User: someone is not authorized"):
            assert words in caught.value.reason
        for words in (arn, "User: someone"):
            assert words not in caught.value.message

    @pytest.mark.parametrize(
        ("status", "code", "expected", "error_code"),
        [
            (400, "ResourceNotFound", 404, "RESOURCE_DOES_NOT_EXIST"),
            (400, "ValidationException", 400, "INVALID_PARAMETER_VALUE"),
            (400, "ThrottlingException", 429, "REQUEST_LIMIT_EXCEEDED"),
            (400, "ExpiredTokenException", 503, "TEMPORARILY_UNAVAILABLE"),
            (403, "UnrecognizedClientException", 501, "INVALID_STATE"),
            (403, "InvalidSignatureException", 501, "INVALID_STATE"),
            (500, "InternalFailure", 502, "TEMPORARILY_UNAVAILABLE"),
        ],
    )
    def test_answers(self, plane: ControlPlane, status: int, code: str, expected: int, error_code: str) -> None:
        plane.fail(status, code)
        with pytest.raises(PresignError) as caught:
            presign(SERVER, plane.aws)
        assert (caught.value.status, caught.value.error_code) == (expected, error_code)
        assert len(plane.asked) <= 2

    def test_unreachable(self) -> None:
        with pytest.raises(PresignError, match=r"The SageMaker API cannot be reached\.") as caught:
            presign(SERVER, Aws(sagemaker_endpoint=DEAD))
        assert caught.value.status == 502
        assert f"{DEAD} cannot be reached" in caught.value.reason

    def test_too_slow(self, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sessions, "_READ_TIMEOUT", 0.2)
        plane.delay = 2.0
        with pytest.raises(PresignError, match="did not answer in time") as caught:
            presign(SERVER, plane.aws)
        assert (caught.value.status, caught.value.error_code) == (504, "DEADLINE_EXCEEDED")

    def test_not_aws(self, plane: ControlPlane) -> None:
        plane.body = b"<html>Please sign in to the hotel's network</html>"
        with pytest.raises(PresignError, match="Something else than the SageMaker API answered") as caught:
            presign(SERVER, plane.aws)
        assert caught.value.status == 502
        assert "not AWS's" in caught.value.reason
        for arn in (SERVER, APP):
            with pytest.raises(PresignError) as caught:
                describe(a_target(arn), KEYS, plane.aws)
            assert "not AWS's" in caught.value.reason

    def test_secrets_stay_out(self, plane: ControlPlane) -> None:
        plane.fail(403, "InvalidSignatureException", "x-amz-security-token:test-token")
        with pytest.raises(PresignError) as caught:
            presign(SERVER, plane.aws)
        assert "test-token" not in caught.value.message + caught.value.reason


def test_model_is_botocores() -> None:
    """The cut-down service model says of each call and shape what botocore's own says.

    When it fails after an update of botocore: `python tests/aws/cut_sagemaker_model.py` cuts it anew.
    """
    ours = sessions._LOADER.load_service_model("sagemaker", "service-2")
    theirs = Loader(include_default_search_paths=True).load_service_model("sagemaker", "service-2")
    assert len(ours["operations"]) == 4
    assert ours["metadata"] == theirs["metadata"]
    for kind in ("operations", "shapes"):
        for name, definition in ours[kind].items():
            wanted = {key: value for key, value in theirs[kind][name].items() if key != "documentation"}
            assert definition == wanted, name


class TestLocalSageMaker:
    """Accepted by a service that checks signatures with botocore."""

    @pytest.fixture
    def keys(self, sagemaker: LocalSageMaker) -> Credentials:
        given = sagemaker.environment()
        return Credentials(
            given["AWS_ACCESS_KEY_ID"], given["AWS_SECRET_ACCESS_KEY"], given.get("AWS_SESSION_TOKEN"), None, "env"
        )

    @pytest.fixture
    def aws(self, sagemaker: LocalSageMaker) -> Aws:
        return Aws(sagemaker_endpoint=sagemaker.sagemaker_endpoint)

    @pytest.mark.parametrize("kind", ["tracking_arn", "app_arn"])
    def test_link_opens_once(self, sagemaker: LocalSageMaker, aws: Aws, keys: Credentials, kind: str) -> None:
        url = presign(getattr(sagemaker, kind), aws, keys=keys)
        assert requests.get(url, timeout=60).status_code == 200
        assert requests.get(url, timeout=60).status_code == 403

    @pytest.mark.parametrize("kind", ["tracking_arn", "app_arn"])
    def test_describe(self, sagemaker: LocalSageMaker, aws: Aws, keys: Credentials, kind: str) -> None:
        found = describe(a_target(getattr(sagemaker, kind)), keys, aws)
        assert found.running
        assert found.version

    def test_wrong_secret(self, sagemaker: LocalSageMaker, aws: Aws, keys: Credentials) -> None:
        wrong = Credentials(keys.access_key, "wrong", keys.token, None, "env")
        with pytest.raises(PresignError) as caught:
            presign(sagemaker.tracking_arn, aws, keys=wrong)
        assert caught.value.status == 501

    def test_server_that_no_policy_names(self, sagemaker: LocalSageMaker, aws: Aws, keys: Credentials) -> None:
        with pytest.raises(PresignError, match="sagemaker:CreatePresignedMlflowTrackingServerUrl") as caught:
            presign(f"{sagemaker.tracking_arn}-other", aws, keys=keys)
        assert caught.value.status == 403

    def test_role_in_another_account(
        self, sagemaker: LocalSageMaker, keys: Credentials, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in sagemaker.environment().items():
            monkeypatch.setenv(name, value)  # as an operator would: botocore finds both endpoints by itself
        arn = sagemaker.cross_account_arn
        role = RoleSession(sagemaker.roles["cross-account"], sagemaker.external_id, sagemaker.region, "test")
        assumed = sessions.Sts(Aws()).assume_role(role, keys)
        url = presign(arn, Aws(), keys=assumed)
        assert requests.get(url, timeout=60).status_code == 200
