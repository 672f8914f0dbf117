"""Small real servers that give credentials as AWS does, with lifetimes of seconds and faults on demand."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import botocore.session
import pytest
from moto.server import ThreadedMotoServer

from mlflow_proxy.aws import sources

if TYPE_CHECKING:
    from mypy_boto3_iam import IAMClient

IMDS_ROLES = "/latest/meta-data/iam/security-credentials/"
IMDS_TOKEN = "imds-token"
CONTAINER_TOKEN = "container-token"
SSO_TOKEN = "sso-token"
SECRET = "very-secret"


class CredentialSource:
    """Instance metadata v2, container endpoint, STS and SSO portal, on one port."""

    def __init__(self) -> None:
        self.lifetime = 3600.0
        self.failing = False
        self.delay = 0.0
        self.delays: dict[str, float] = {}  # further seconds for role sessions whose names begin so
        self.external_id: str | None = None
        self.trusted = {"sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"}  # by the roles' trust policies
        self.refused_keys: dict[str, str] = {}  # with the code of the refusal
        self.asked: Counter[str] = Counter()
        self.roles_asked: list[dict[str, str]] = []
        self.signed_by: list[str] = []  # the access keys of calls to STS
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def issue(self, kind: str) -> dict[str, Any]:
        with self._lock:
            self.asked[kind] += 1
            number = sum(self.asked.values())
        expires_at = time.time() + self.lifetime
        return {
            "AccessKeyId": f"ASIA{kind.upper()}{number:08d}",
            "SecretAccessKey": SECRET,
            "Token": f"{SECRET}-token-{number}",
            "Expiration": datetime.fromtimestamp(expires_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "Code": "Success",
        }

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, str]:
        if target.startswith("http://"):
            with self._lock:
                self.asked["proxied"] += 1
        path = urlsplit(target).path
        if self.delay:
            time.sleep(self.delay)
        if self.failing:
            return 500, "out of order"
        if path.startswith("/latest/"):
            return self._instance_metadata(method, path, headers)
        if path == "/container":
            allowed = headers["authorization"] == CONTAINER_TOKEN
            return (200, json.dumps(self.issue("ecs"))) if allowed else (401, "{}")
        if path == "/federation/credentials":
            return self._sso_portal(headers)
        return self._sts({name: values[0] for name, values in parse_qs(body.decode()).items()}, headers)

    def _instance_metadata(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        if method == "PUT":
            return (200, IMDS_TOKEN) if headers["x-aws-ec2-metadata-token-ttl-seconds"] else (400, "")
        if headers["x-aws-ec2-metadata-token"] != IMDS_TOKEN:
            return 401, ""
        return 200, "proxy-role" if path == IMDS_ROLES else json.dumps(self.issue("imds"))

    def _sso_portal(self, headers: Any) -> tuple[int, str]:
        if headers["x-amz-sso_bearer_token"] != SSO_TOKEN:
            return 401, "{}"
        given = self.issue("sso")
        role = {
            "accessKeyId": given["AccessKeyId"],
            "secretAccessKey": given["SecretAccessKey"],
            "sessionToken": given["Token"],
            "expiration": int((time.time() + self.lifetime) * 1000),
        }
        return 200, json.dumps({"roleCredentials": role})

    def _sts(self, wanted: dict[str, str], headers: Any) -> tuple[int, str]:
        with self._lock:
            self.roles_asked.append(wanted)
            self.signed_by.append(headers["authorization"].partition("Credential=")[2].partition("/")[0])
        for key, code in self.refused_keys.items():
            if f"Credential={key}/" in headers["authorization"]:
                return 403, _sts_error(code, "The security token included in the request is expired or invalid")
        time.sleep(sum(delay for name, delay in self.delays.items() if wanted["RoleSessionName"].startswith(name)))
        refused = self._refused(wanted)
        if refused is not None:
            with self._lock:
                self.asked["denied"] += 1
            who = "arn:aws:iam::111122223333:user/proxy"
            message = f"User: {who} is not authorized to perform: {refused} on resource: {wanted['RoleArn']}"
            return 403, _sts_error("AccessDenied", message)
        given = self.issue("sts")
        return 200, (
            '<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>'
            f"<AccessKeyId>{given['AccessKeyId']}</AccessKeyId>"
            f"<SecretAccessKey>{given['SecretAccessKey']}</SecretAccessKey>"
            f"<SessionToken>{given['Token']}</SessionToken><Expiration>{given['Expiration']}</Expiration>"
            "</Credentials></AssumeRoleResult></AssumeRoleResponse>"
        )

    def _refused(self, wanted: dict[str, str]) -> str | None:
        """The first action that the role's trust policy does not allow."""
        if self.external_id is not None and wanted.get("ExternalId") != self.external_id:
            return "sts:AssumeRole"
        needed = {"RoleArn": "sts:AssumeRole", "Tags.member.1.Key": "sts:TagSession"}
        needed["SourceIdentity"] = "sts:SetSourceIdentity"
        return next((action for name, action in needed.items() if name in wanted and action not in self.trusted), None)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        source = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, text = source.answer(self.command, self.path, self.headers, body)
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_PUT = do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _sts_error(code: str, message: str) -> str:
    return (
        '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
        f"<Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"
    )


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever this machine has, the test doesn't see; and what failed may be tried again after a second."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(sources, "_LEAST_INTERVAL", 1.0)


@pytest.fixture
def source() -> Iterator[CredentialSource]:
    server = CredentialSource()
    yield server
    server.close()


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def checking_moto(moto_url: str) -> Iterator[tuple[str, Callable[[], tuple[str, str]]]]:
    """moto that checks keys and signatures, and what gives its one user new keys, and deletes the old ones."""
    keys = {"aws_access_key_id": "AKIAROOT", "aws_secret_access_key": "root-secret"}
    session: Any = botocore.session.Session()
    iam: IAMClient = session.create_client("iam", region_name="us-east-1", endpoint_url=moto_url, **keys)
    allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    iam.create_user(UserName="proxy")
    iam.put_user_policy(UserName="proxy", PolicyName="all", PolicyDocument=json.dumps(allow))

    def rotate() -> tuple[str, str]:
        _check_keys(moto_url, False)
        for old in iam.list_access_keys(UserName="proxy")["AccessKeyMetadata"]:
            iam.delete_access_key(UserName="proxy", AccessKeyId=old["AccessKeyId"])
        new = iam.create_access_key(UserName="proxy")["AccessKey"]
        _check_keys(moto_url, True)
        return new["AccessKeyId"], new["SecretAccessKey"]

    yield moto_url, rotate
    _check_keys(moto_url, False)


def _check_keys(moto_url: str, on: bool) -> None:
    body = b"0" if on else b"inf"
    request = Request(f"{moto_url}/moto-api/reset-auth", body, {"Content-Type": "text/plain"})
    urlopen(request, timeout=10).close()
