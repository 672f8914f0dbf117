"""The first part of a host's user data, run as it stands with the real curl, against servers that check signatures.

The signatures are computed anew with botocore. What follows that part needs a whole Ubuntu host: see deploy/.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import re
import ssl
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs

import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials
from infra.certificate.handler import make_certificate
from tests.infra.variants import REGION, resolve, synthesize

from mlflow_proxy import configuration

CREDENTIALS = {"AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "secret/With+signs", "Token": "tok/en+=="}


def signed_by_host(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> bool:
    """Whether the request's signature is the one that botocore computes for the headers it lists."""
    match = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(.+)/(\d{8})/(.+)/(.+)/aws4_request, ?SignedHeaders=(.+), ?Signature=(\w+)",
        handler.headers["Authorization"],
    )
    assert match is not None, handler.headers["Authorization"]
    key, _, region, service, signed, signature = match.groups()
    assert (key, region) == (CREDENTIALS["AccessKeyId"], REGION)
    assert {"host", "x-amz-date", "x-amz-security-token"} <= set(signed.split(";"))
    assert handler.headers["x-amz-security-token"] == CREDENTIALS["Token"]

    class AsSigned(S3SigV4Auth if service == "s3" else SigV4Auth):  # type: ignore[misc]
        def headers_to_sign(self, request: AWSRequest) -> HTTPHeaders:
            headers = HTTPHeaders()
            for name in signed.split(";"):
                headers[name] = handler.headers[name]
            return headers

    request = AWSRequest(handler.command, f"https://{handler.headers['Host']}{handler.path}", data=body)
    for name, value in handler.headers.items():
        request.headers[name] = value
    request.context["timestamp"] = handler.headers["x-amz-date"]
    request.context["payload_signing_enabled"] = True
    auth = AsSigned(Credentials(key, CREDENTIALS["SecretAccessKey"], CREDENTIALS["Token"]), service, region)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    return bool(auth.signature(text, request) == signature)


class Metadata(http.server.BaseHTTPRequestHandler):
    """Version 2 of the instance metadata service."""

    def do_PUT(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer("token" if self.path == "/latest/api/token" else None)

    def do_GET(self) -> None:
        roles = "/latest/meta-data/iam/security-credentials/"
        known = {"/latest/meta-data/instance-id": "i-0abc", roles: "host", f"{roles}host": json.dumps(CREDENTIALS)}
        self._answer(known.get(self.path) if self.headers["X-aws-ec2-metadata-token"] == "token" else None)

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: Any) -> None: ...


class Aws(http.server.BaseHTTPRequestHandler):
    """S3 with the application, and CloudFormation, which notes the signals."""

    archive: ClassVar[bytes] = b""
    signals: ClassVar[list[dict[str, list[str]]]] = []

    def do_GET(self) -> None:
        right = signed_by_host(self, b"")
        self.send_response(200 if right and ".s3." in self.headers["Host"] else 403)
        self.end_headers()
        self.wfile.write(self.archive if right else b"SignatureDoesNotMatch")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        right = signed_by_host(self, body) and self.headers["Host"] == f"cloudformation.{REGION}.amazonaws.com"
        if right:
            self.signals.append(parse_qs(body.decode()))
        self.send_response(200 if right else 403)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Where curl finds these servers under AWS's names."""
    certificate, key = make_certificate("amazonaws.com")
    (tmp_path / "server.pem").write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    Aws.signals.clear()
    with serving(Metadata) as metadata, serving(Aws, context) as aws:
        lines = [f'connect-to = "169.254.169.254:80:127.0.0.1:{metadata}"', f'connect-to = ":443:127.0.0.1:{aws}"']
        (tmp_path / ".curlrc").write_text("\n".join(["insecure", 'noproxy = "*"', *lines, ""]))
        yield {"CURL_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}


def script(folder: Path, end: str) -> str:
    """The user data up to where it changes the host, then `end`."""
    template = synthesize().one("flaskapp", "AWS::EC2::LaunchTemplate")["LaunchTemplateData"]
    text = str(resolve(template["UserData"]))
    first, rest = text.split("\n# The service writes to the journal")
    assert "install.sh" in rest
    return f"{first.replace('/opt/mlflow-proxy-setup', str(folder))}\n{end}\n"


def run(text: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True, check=False, timeout=120)


def test_application_is_fetched_configured_and_told(environ: dict[str, str], tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("deploy/install.sh", "echo installed\n")
    Aws.archive = archive.getvalue()
    done = run(script(tmp_path / "setup", 'bash "$application/deploy/install.sh"\nsignal SUCCESS'), environ)
    assert (done.returncode, done.stdout) == (0, "installed\n"), done.stderr
    (told,) = Aws.signals
    assert told["Action"] == ["SignalResource"]
    assert told["Status"] == ["SUCCESS"]
    assert told["UniqueId"] == ["i-0abc"]
    assert told["StackName"] == ["sagemaker-infra-flaskapp-tracking"]
    (group,) = synthesize().resources("flaskapp", "AWS::AutoScaling::AutoScalingGroup")
    assert told["LogicalResourceId"] == [group]
    assert configuration.load(tmp_path / "setup" / "proxy.toml", {}).server.port == 8080
    assert CREDENTIALS["SecretAccessKey"] not in done.stdout + done.stderr


def test_failure_is_told_at_once(environ: dict[str, str], tmp_path: Path) -> None:
    Aws.archive = b"not a zip file"
    done = run(script(tmp_path / "setup", "signal SUCCESS"), environ)
    assert done.returncode != 0
    assert [told["Status"] for told in Aws.signals] == [["FAILURE"]]
