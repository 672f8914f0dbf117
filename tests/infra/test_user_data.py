"""A host's user data, run as it stands with the real curl, against servers that check signatures.

The signatures are computed anew with botocore. The first part runs anywhere; the whole runs on a Debian host of its
own, with a real systemd, rsyslog and dpkg: AWS's names lead to these servers there, and nothing else can be reached.
Only the system's version (Ubuntu 24.04 in AWS), the agent's package and the key that signed it are others than there.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs

import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials
from infra.certificate.handler import make_certificate
from tests.deploy.host import Host, running, why_not
from tests.faults.certificates import Authority
from tests.infra.variants import REGION, ROOT, resolve, synthesize

from mlflow_proxy import configuration

REGIONS_BUCKET = f"amazoncloudwatch-agent-{REGION}.s3.{REGION}.amazonaws.com"
GENERAL_BUCKET = "amazoncloudwatch-agent.s3.amazonaws.com"
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
    """S3 with the application, and with what is public there; and CloudFormation, which notes the signals.

    `public`: by bucket's host and path. `failures`: what the next signals meet, and are not taken: a status and a code
    as in CloudFormation's answers, or a connection that ends (None).
    """

    archive: ClassVar[bytes | None] = b""
    public: ClassVar[dict[tuple[str, str], bytes]] = {}
    signals: ClassVar[list[dict[str, list[str]]]] = []
    failures: ClassVar[list[tuple[int, str] | None]] = []

    def do_GET(self) -> None:
        if self.headers["Host"] in (REGIONS_BUCKET, GENERAL_BUCKET):
            found = self.public.get((self.headers["Host"], self.path))
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"")
            return
        right = signed_by_host(self, b"") and self.archive is not None
        self.send_response(200 if right and ".s3." in self.headers["Host"] else 403)
        self.end_headers()
        self.wfile.write(self.archive or b"" if right else b"SignatureDoesNotMatch")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        right = signed_by_host(self, body) and self.headers["Host"] == f"cloudformation.{REGION}.amazonaws.com"
        if right and self.failures:
            failure = self.failures.pop(0)
            if failure is not None:
                status, code = failure
                self.send_response(status)
                self.end_headers()
                self.wfile.write(f"<ErrorResponse><Error><Code>{code}</Code></Error></ErrorResponse>".encode())
            return
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
    Aws.failures.clear()
    with serving(Metadata) as metadata, serving(Aws, context) as aws:
        lines = [f'connect-to = "169.254.169.254:80:127.0.0.1:{metadata}"', f'connect-to = ":443:127.0.0.1:{aws}"']
        (tmp_path / ".curlrc").write_text("\n".join(["insecure", 'noproxy = "*"', *lines, ""]))
        yield {"CURL_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}


def user_data() -> str:
    template = synthesize().one("flaskapp", "AWS::EC2::LaunchTemplate")["LaunchTemplateData"]
    return str(resolve(template["UserData"]))


def script(folder: Path, end: str) -> str:
    """The user data up to where it changes the host, then `end`."""
    text = user_data()
    first, rest = text.split("\n# The service writes to the journal")
    assert "install.sh" in rest
    return f"{first.replace('/opt/mlflow-proxy-setup', str(folder))}\n{end}\n"


def packed(install: str) -> bytes:
    """An application whose installation is these commands."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("deploy/install.sh", f"{install}\n")
    return archive.getvalue()


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


def test_application_that_cannot_be_fetched_is_told(environ: dict[str, str], tmp_path: Path) -> None:
    Aws.archive = None
    text = script(tmp_path / "setup", "signal SUCCESS")
    assert text.count("--retry 5 ") == 1
    done = run(text.replace("--retry 5 ", "--retry 0 "), environ)
    assert done.returncode != 0
    assert [told["Status"] for told in Aws.signals] == [["FAILURE"]]


# CloudFormation's answer if the stack is not being made or changed, as for a host that Auto Scaling starts later.
NOBODY_WAITS = (400, "ValidationError")
# Pauses are told instead of made.
AT_ONCE = 'sleep() { echo "pause $1"; }\n'


@pytest.mark.parametrize(("end", "code"), [("signal SUCCESS", 0), ("exit 3", 3)])
def test_signal_that_no_deployment_waits_for_is_no_error(
    environ: dict[str, str], tmp_path: Path, end: str, code: int
) -> None:
    Aws.archive = packed("")
    Aws.failures[:] = [NOBODY_WAITS] * 20
    done = run(script(tmp_path / "setup", AT_ONCE + end), environ)
    assert done.returncode == code, done.stderr
    assert "No deployment waits for this host." in done.stdout
    assert "<Code>ValidationError</Code>" in done.stdout, "CloudFormation's own words"
    assert "pause" not in done.stdout
    assert len(Aws.failures) == 19, "it is not tried again"


def test_signal_is_tried_again_after_what_may_pass(environ: dict[str, str], tmp_path: Path) -> None:
    Aws.archive = packed("")
    Aws.failures[:] = [(503, "ServiceUnavailable"), None, (400, "Throttling")]
    done = run(script(tmp_path / "setup", AT_ONCE + "signal SUCCESS"), environ)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"pause (\d+)", done.stdout) == ["1", "2", "4"]
    assert "No deployment waits" not in done.stdout
    assert [told["Status"] for told in Aws.signals] == [["SUCCESS"]]


def test_signal_that_is_never_taken_is_an_error_once(environ: dict[str, str], tmp_path: Path) -> None:
    Aws.archive = packed("")
    Aws.failures[:] = [(403, "AccessDenied")] * 20
    done = run(script(tmp_path / "setup", AT_ONCE + "signal SUCCESS"), environ)
    assert done.returncode != 0
    assert len(Aws.failures) == 20 - 6, "no FAILURE is sent after the SUCCESS that was not taken"


# The whole, on a host

needs_host = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
FINGERPRINT = "937616F3450B7D806CBD9725D58167303B789C72"
PORT = 8080


class Agent(NamedTuple):
    """A package in the CloudWatch agent's place, its signature, and who signed it."""

    package: bytes
    signature: bytes
    key: bytes
    fingerprint: str


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """A real package, whose control program notes how it is called, with a real signature."""
    folder = tmp_path_factory.mktemp("agent")
    control = folder / "package" / "opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl"
    for path in (control.parent, control.parent.parent / "etc", folder / "package" / "DEBIAN"):
        path.mkdir(parents=True)
    control.write_text('#!/bin/sh\necho "$@" >>/run/agent-calls\n')
    control.chmod(0o755)
    fields = "Package: amazon-cloudwatch-agent\nVersion: 1\nArchitecture: all\nMaintainer: tests\nDescription: tests\n"
    (folder / "package" / "DEBIAN" / "control").write_text(fields)
    package = folder / "agent.deb"
    build = ["dpkg-deb", "--root-owner-group", "--build", str(folder / "package"), str(package)]
    subprocess.run(build, check=True, capture_output=True)

    home = folder / "gnupg"
    home.mkdir(mode=0o700)
    environ = os.environ | {"GNUPGHOME": str(home)}

    def gpg(*arguments: str) -> bytes:
        command = ["gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "", *arguments]
        return subprocess.run(command, env=environ, check=True, capture_output=True).stdout

    try:
        gpg("--quick-gen-key", "tests", "rsa2048", "sign", "never")
        (fingerprint,) = re.findall(rb"^fpr:+(\w+):$", gpg("--with-colons", "--fingerprint"), re.M)
        # The digest of the signatures that AWS's tools made in 2017: to be taken, too.
        gpg("--digest-algo", "SHA1", "--output", str(folder / "agent.sig"), "--detach-sign", str(package))
        signature = (folder / "agent.sig").read_bytes()
        yield Agent(package.read_bytes(), signature, gpg("--armor", "--export"), fingerprint.decode())
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], env=environ, check=True)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `build_application` makes, for the Python of that host, packed as CDK packs it."""
    folder = tmp_path_factory.mktemp("application") / "made"
    command = [sys.executable, str(ROOT / "deploy" / "wheelhouse.py"), str(folder), "--python", "3.11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(shutil.make_archive(str(folder), "zip", folder)).read_bytes()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host on which AWS's names lead to the servers here, under a certificate that it trusts."""
    names = sorted(set(re.findall(r"https://([\w.-]+)", user_data().replace("$region", REGION))))
    with running(tmp_path / "host") as booted, contextlib.ExitStack() as stack:
        booted.in_network(
            lambda: subprocess.run(["ip", "address", "add", "169.254.169.254/32", "dev", "lo"], check=True)
        )
        authority = Authority(tmp_path, "tests")
        with (booted / "/etc/ssl/certs/ca-certificates.crt").open("ab") as file:
            file.write(authority.bundle.read_bytes())
        (booted / "/etc/hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ["localhost", *names]))
        context = authority.server("amazonaws.com", *names)
        Aws.signals.clear()
        Aws.failures.clear()
        for handler, address, tls in ((Metadata, ("169.254.169.254", 80), None), (Aws, ("127.0.0.1", 443), context)):
            server = booted.in_network(partial(http.server.ThreadingHTTPServer, address, handler))
            if tls is not None:
                server.socket = tls.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
        yield booted


def first_boot(
    host: Host, agent: Agent, archive: bytes, *, package: str = REGIONS_BUCKET, key: str = GENERAL_BUCKET
) -> subprocess.CompletedProcess[str]:
    """Run the user data, with the tests' key in the place of AWS's. In which buckets: as far as AWS documents it."""
    text = user_data()
    assert text.count(FINGERPRINT) == 1
    Aws.archive = archive
    path = "/" + re.findall(r"ubuntu/\w+/latest/", text)[0]
    name = "amazon-cloudwatch-agent"
    Aws.public = {
        (package, f"{path}{name}.deb"): agent.package,
        (package, f"{path}{name}.deb.sig"): agent.signature,
        (key, f"/assets/{name}.gpg"): agent.key,
    }
    (host / "/root/user-data").write_text(text.replace(FINGERPRINT, agent.fingerprint))
    return host.run("bash", "/root/user-data")


@needs_host
def test_whole_script_makes_a_host_that_serves(host: Host, agent: Agent, application: bytes) -> None:
    done = first_boot(host, agent, application)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [told["Status"] for told in Aws.signals] == [["SUCCESS"]]
    assert f"Healthy:   http://127.0.0.1:{PORT}/-/health" in done.stdout
    assert CREDENTIALS["SecretAccessKey"] not in done.stdout + done.stderr
    assert host.out("systemctl", "is-active", "mlflow-proxy", "rsyslog") == "active\nactive"
    loaded = configuration.load(host / "/etc/mlflow-proxy/proxy.toml", {})
    assert loaded.server.port == PORT
    stop = host.out("systemctl", "show", "--property=TimeoutStopUSec", "--value", "mlflow-proxy")
    assert stop == f"1min {round(loaded.server.drain_timeout) + 15 - 60}s"

    # A refused call is in the file that the agent reads, as the JSON that it was.
    (call,) = (host / "/run/agent-calls").read_text().splitlines()
    assert call.startswith("-a fetch-config -m ec2 -s -c file:")
    config = json.loads((host / call.split("file:")[1].strip()).read_text())
    read = {each["file_path"] for each in config["logs"]["logs_collected"]["files"]["collect_list"]}
    assert read == {"/var/log/mlflow-proxy.log", "/var/log/cloud-init-output.log"}
    url = f"http://127.0.0.1:{PORT}/api/2.0/mlflow/experiments/search"
    assert host.out("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-d", "{}", url) == "401"
    end = time.monotonic() + 60
    while True:
        lines = (host / "/var/log/mlflow-proxy.log").read_text().splitlines()
        if any(json.loads(line).get("status") == 401 for line in lines if line.startswith("{")):
            break
        assert time.monotonic() < end, lines
        time.sleep(0.1)
    host.out("logrotate", "--force", "/etc/logrotate.d/mlflow-proxy")
    assert (host / "/var/log/mlflow-proxy.log").stat().st_size == 0


@needs_host
def test_installation_that_fails_is_told(host: Host, agent: Agent) -> None:
    done = first_boot(host, agent, packed("exit 3"))
    assert done.returncode == 3, done.stderr
    assert (host / "/run/agent-calls").exists(), "the agent sends the reason"
    assert [told["Status"] for told in Aws.signals] == [["FAILURE"]]


@needs_host
@pytest.mark.parametrize("forged", ["package", "key"])
def test_agent_that_aws_did_not_sign_is_not_installed(host: Host, agent: Agent, forged: str) -> None:
    other = (
        agent._replace(package=agent.package + b"x") if forged == "package" else agent._replace(fingerprint="0" * 40)
    )
    done = first_boot(host, other, packed("touch /run/installed"))
    assert done.returncode != 0
    assert [told["Status"] for told in Aws.signals] == [["FAILURE"]]
    assert not (host / "/opt/aws").exists()
    assert not (host / "/run/installed").exists()


@contextlib.contextmanager
def closed_network(host: Host) -> Iterator[None]:
    """Connections to the general bucket end nowhere, as where there is no way to the internet.

    Linux drops the first packet of a connection while too many others wait to be accepted.
    """
    with contextlib.ExitStack() as stack:
        listener, *waiting = (stack.enter_context(host.in_network(socket.socket)) for _ in range(4))
        listener.bind(("127.0.0.2", 443))
        listener.listen(0)
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.2", 443))
        names = (host / "/etc/hosts").read_text()
        line = f"127.0.0.1 {GENERAL_BUCKET}\n"
        assert line in names
        (host / "/etc/hosts").write_text(names.replace(line, line.replace("127.0.0.1", "127.0.0.2")))
        yield


@needs_host
def test_agent_comes_from_the_general_bucket_if_not_from_the_regions(host: Host, agent: Agent) -> None:
    done = first_boot(host, agent, packed("touch /run/installed"), package=GENERAL_BUCKET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (host / "/run/agent-calls").exists()
    assert (host / "/run/installed").exists()
    assert "left out" not in done.stdout


@needs_host
def test_closed_network_needs_the_regions_bucket_only(host: Host, agent: Agent) -> None:
    with closed_network(host):
        done = first_boot(host, agent, packed("touch /run/installed"), key=REGIONS_BUCKET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert GENERAL_BUCKET not in done.stderr, "it was not even tried"
    assert (host / "/run/agent-calls").exists()
    assert (host / "/run/installed").exists()


@needs_host
@pytest.mark.parametrize(("missing", "closed"), [("package", False), ("key", False), ("key", True)])
def test_host_without_an_agent_to_be_had_serves_and_tells_why(
    host: Host, agent: Agent, missing: str, closed: bool
) -> None:
    with closed_network(host) if closed else contextlib.nullcontext():
        done = first_boot(host, agent, packed("touch /run/installed"), **{missing: "nowhere"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [told["Status"] for told in Aws.signals] == [["SUCCESS"]]
    assert (host / "/run/installed").exists()
    assert not (host / "/opt/aws").exists()
    (reason,) = re.findall("^The CloudWatch agent is left out: .+$", done.stdout, re.M)
    assert (".gpg" in reason, ".deb.sig" in reason) == (missing == "key", missing == "package")
    assert {f"https://{REGIONS_BUCKET}", f"https://{GENERAL_BUCKET}:"} <= set(reason.split())
