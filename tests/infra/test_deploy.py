"""`make deploy`: what must be there, a first deployment with all that can go wrong, and the validation at its end.

Against moto's server with the real `cdk`, and against a real proxy whose keys are in moto's Secrets Manager.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from infra.certificate import handler
from infra.commands import cdk, deploy, prerequisites, validation
from infra.commands.prerequisites import Account, Report
from infra.settings import Settings
from tests.faults.proxies import Table, running
from tests.infra.failing_launcher import REASON
from tests.infra.test_rehearsal import INFRA, Cloud, _wait
from tests.infra.variants import ACCOUNT, IMAGE, REGION, ROOT, settings, synthesize

from mlflow_proxy.access.key_record import KeysError, parse_keys
from mlflow_proxy.local import LocalSageMaker

NAMES = (
    "sagemaker-infra-networking",
    "sagemaker-infra-domain",
    "sagemaker-infra-mlflow-tracking",
    "sagemaker-infra-flaskapp-tracking",
)


def context(**more: str) -> str:
    """CONTEXT for a deployment for which nothing must be built."""
    given = settings() | more
    wanted = {name: given[name] for name in ("application", "certificate_function", *more)}
    return " ".join(f"{name}={value}" for name, value in wanted.items() if value)


@dataclass(frozen=True)
class Place:
    """An account in moto, and a copy of infra/ in which commands run, so that nobody shares their files."""

    cloud: Cloud
    repository: Path
    fails: Path

    def environ(self, **more: str) -> dict[str, str]:
        python = {"PYTHONPATH": str(self.repository), "PYTHONUNBUFFERED": "1"}
        return self.cloud.environ | python | {"MLFLOW_TYPE": "tracking", "CONTEXT": context()} | more

    def start(self, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "infra.commands.deploy"],
            cwd=self.repository,
            env=self.environ(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def deploy(self, code: int, **more: str) -> str:
        """Run the command to its end; what it printed."""
        with self.start(**more) as process:
            watchdog = threading.Timer(200, os.killpg, (process.pid, signal.SIGKILL))
            watchdog.start()
            output, _ = process.communicate()
            watchdog.cancel()
        assert process.returncode == code, output + self.cloud.log.read_text()[-3000:]
        return output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("deploy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cloud = Cloud(port, folder / "moto.log", command=[])
    fails = folder / "fails"
    starter = "from tests.infra.failing_launcher import main; main()"
    with cloud.log.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", starter, str(port)],
            cwd=ROOT,
            env=cloud.environ | {"PYTHONPATH": str(ROOT), "MOTO_FAILS": str(fails)},
            stdout=log,
            stderr=log,
        )
    try:
        _wait(f"http://localhost:{port}/moto-api/", process, cloud.log)
        yield Place(cloud, copy_of_repository(folder / "repository"), fails)
    finally:
        process.terminate()
        process.wait(timeout=30)


def copy_of_repository(folder: Path) -> Path:
    shutil.copytree(
        INFRA, folder / "infra", ignore=shutil.ignore_patterns("node_modules", "__pycache__", "cdk.context.json")
    )
    (folder / "infra" / "node_modules").symlink_to(INFRA / "node_modules")
    # So that templates are the same as those that are synthesized in this process.
    own = json.loads((INFRA / "cdk.json").read_text()) | {"pathMetadata": False, "assetMetadata": False}
    (folder / "infra" / "cdk.json").write_text(json.dumps(own))
    return folder


# The deployment as a whole


def test_a_first_deployment(place: Place, account: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    """Not bootstrapped; then a stack fails; then the command goes on from there, to the end."""
    assert deploy._deploy(account) == 2
    output = capfd.readouterr().out
    assert f"  - bootstrap: not done in aws://{ACCOUNT}/{REGION}\n" in output
    assert "  make deploy MLFLOW_TYPE=tracking BOOTSTRAP=yes\n" in output
    assert place.cloud.client("cloudformation").describe_stacks()["Stacks"] == []
    failing(place, account, capfd)

    output = place.deploy(0)
    assert "── bootstrap" not in output
    assert f"  - {NAMES[1]}: is in ROLLBACK_COMPLETE, its first deployment failed; it will be deleted" in output
    assert f"  ✓ stacks: {NAMES[0]} there already\n" in output
    for number, name in enumerate(NAMES, 1):
        assert f"── {number}/4 {name}: done in" in output
    _check_end(place, output)


def failing(place: Place, account: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    """Bootstrap and deploy, from templates that are there already, until the second stack fails."""
    ready = prerequisites.check(account, Report())
    assert ready is not None
    place.fails.write_text(NAMES[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "_ASSEMBLY", synthesize().folder)
        assert deploy._bootstrap(ready, account | {"BOOTSTRAP": "yes"})
        with pytest.raises(deploy.Failed) as failed:
            deploy._deploy_stacks(ready, account)
    output = capfd.readouterr().out
    assert "── bootstrap: done in" in output
    assert f"── 1/4 {NAMES[0]}: done in" in output
    told = str(failed.value)
    assert told.startswith(f"2/4 {NAMES[1]} failed after ")
    assert f"First failure: AWS::EC2::EIP Address (CREATE_FAILED): {REASON}\n" in told
    assert "The stack is in ROLLBACK_COMPLETE.\n" in told
    assert told.endswith("run the same command again: it goes on from there.")
    assert place.cloud.stacks() == {*NAMES[:2]}


def test_an_interrupted_deployment(place: Place) -> None:
    """As a CI ends it."""
    ssm = _client(place, "ssm", "eu-west-1")
    ssm.put_parameter(Name=prerequisites.BOOTSTRAP_PARAMETER, Value="33", Type="String")
    with place.start(AWS_REGION="eu-west-1") as process:
        watchdog = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line == "── build and synthesize\n":
                _wait_for_child(process)
                process.send_signal(signal.SIGTERM)
        watchdog.cancel()
    assert process.returncode == 130, "".join(printed)
    assert "── build and synthesize: interrupted after " in "".join(printed)
    assert printed[-1].endswith("run the same command again to go on from there.\n")


def _wait_for_child(process: subprocess.Popen[str]) -> None:
    """Until it has started `cdk`."""
    until = time.monotonic() + 60
    while not any("bin/cdk" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children()):
        assert time.monotonic() < until
        time.sleep(0.05)


def _check_end(place: Place, output: str) -> None:
    """Nobody can reach moto's load balancer, so it is said how to validate; and what to do now."""
    outputs = place.cloud.outputs(NAMES[3])
    url, host = outputs["Url"], outputs["LoadBalancerHost"]
    assert f"Deployed, not validated: the load balancer is internal, and {url} cannot be reached from here" in output
    assert (
        "/opt/mlflow-proxy/current/bin/mlflow-proxy validate --url " + url + " --ca /tmp/mlflow-proxy.pem\n" in output
    )
    assert f"'host={host},portNumber=443,localPortNumber=8443'" in output
    saved = place.repository / "build" / "mlflow-proxy-tracking.pem"
    assert host.lower() in _names(saved)
    secret = place.cloud.client("secretsmanager").get_secret_value(SecretId=outputs["KeysSecret"])
    assert secret["SecretString"].strip() == "", "where nothing is tried, no key is made"
    summary = output[output.index("\nURL ") :]
    assert url in summary
    assert f"--secret-id {outputs['KeysSecret']}" in summary
    assert outputs["ShellCommand"] in summary
    assert f"https://{REGION}.console.aws.amazon.com/cloudwatch/home" in summary
    boards = place.cloud.client("cloudwatch").list_dashboards()["DashboardEntries"]
    assert summary.split("dashboards/dashboard/")[1].split()[0] in [board["DashboardName"] for board in boards]
    assert summary.rstrip().endswith("make destroy MLFLOW_TYPE=tracking")


def _names(certificate: Path) -> str:
    decoded: dict[str, Any] = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
    return str(decoded["subjectAltName"])


# What must be there


@pytest.fixture
def account(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The environment of a command in this process, with credentials that work."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    environ = place.environ(HOME=str(tmp_path))
    for name, value in environ.items():
        if name.startswith("AWS_") or name == "HOME":
            monkeypatch.setenv(name, value)
    return environ


def problems(environ: Mapping[str, str], capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """What is wrong, and all that was said."""
    report = Report()
    ready = prerequisites.check(environ, report)
    assert (ready is None) is bool(report.problems)
    return report.problems, capsys.readouterr().out


def test_all_that_is_missing_is_told_together(place: Place, tmp_path: Path) -> None:
    """No Node.js, no CDK, no credentials, two mistakes in the settings; and nothing is begun."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    repository = copy_of_repository(tmp_path / "repository")
    (repository / "infra" / "node_modules").unlink()
    environ = {
        "PATH": str(python.parent),
        "HOME": str(tmp_path),
        "PYTHONPATH": f"{repository}:{ROOT / 'src'}:{sysconfig.get_path('purelib')}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "CONTEXT": context(nat_gateways="7", host_nam="x"),
    }
    done = subprocess.run(
        [str(python), "-P", "-m", "infra.commands.deploy"],
        cwd=repository,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("  ✗ ")]
    assert found[0].startswith("  ✗ Node.js is missing; install it into this environment: ")
    assert "-m pip install --require-hashes -r requirements/infra.txt" in found[0]
    assert found[1] == "  ✗ CDK's command line is missing; install it: (cd infra && npm ci)"
    assert found[2].startswith("  ✗ there are no AWS credentials; run `aws configure`")
    assert found[3].startswith("  ✗ setting host_nam: ")
    assert found[4].startswith("  ✗ setting nat_gateways: ")
    assert len(found) == 5
    assert "Nothing was deployed: 5 things to mend first" in done.stdout


def test_a_node_that_is_too_old_and_another_cdk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    node = tmp_path / "node"
    node.write_text("#!/bin/sh\necho v16.20.2\n")
    node.chmod(0o755)
    (tmp_path / "aws-cdk").mkdir()
    (tmp_path / "aws-cdk" / "package.json").write_text('{"version": "3.0.0"}')
    monkeypatch.setattr(cdk, "_path", lambda: str(tmp_path))
    monkeypatch.setattr(cdk, "_CDK", tmp_path / "aws-cdk")
    found, _ = problems(account, capsys)
    wanted = json.loads((INFRA / "package-lock.json").read_text())["packages"]["node_modules/aws-cdk"]["version"]
    assert found[0].startswith(f"Node.js 16 ({node}) is too old, CDK needs 18 or newer")
    assert found[1].startswith(f"CDK's command line is 3.0.0, but infra/package-lock.json says {wanted}")


def test_cdk_runs_with_the_settings_of_context(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(cdk.CdkFailed) as failed:
        cdk.run(["ls", "--app", "false"], environ={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    assert failed.value.code == 1
    with pytest.raises(cdk.ContextError, match="'compute' is no setting; write name=value"):
        cdk.run(["ls"], environ={"CONTEXT": "compute"})
    assert cdk.context({"CONTEXT": 'a=1 tags=\'{"b": "c d"}\' e='}) == {"a": "1", "tags": '{"b": "c d"}', "e": ""}
    app = f"{sys.executable} -c 'import os; print(os.environ[\"CDK_CONTEXT_JSON\"])' >&2; exit 3"
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CONTEXT": "studio_user='some one'"}
    with pytest.raises(cdk.CdkFailed):
        cdk.run(["ls", "--app", app], environ=environ)
    assert '"studio_user":"some one"' in capfd.readouterr().err


class Refusing:
    """An STS that answers every call with one error, in AWS's form."""

    def __init__(self, code: str) -> None:
        body = (
            f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>no</Message></Error></ErrorResponse>"
        )

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_response(403)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ExpiredToken", "the AWS credentials have expired; get new ones: `aws sso login`"),
        (
            "InvalidClientTokenId",
            "AWS does not accept the credentials (InvalidClientTokenId); is this the right profile?",
        ),
        ("AccessDenied", "the AWS credentials do not work: "),
    ],
)
def test_credentials_that_aws_refuses(
    code: str,
    message: str,
    account: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Refusing(code) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        found, _ = problems(account, capsys)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_credentials_that_are_not_there(
    account: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (found,), _ = problems(account, capsys)
    assert found.startswith("AWS cannot be reached (")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (found,), _ = problems(account, capsys)
    assert found.startswith("the AWS credentials are incomplete (")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    (found,), _ = problems(account | {"AWS_PROFILE": "nobody"}, capsys)
    assert found.startswith("there is no AWS profile nobody; `aws configure list-profiles`")


def test_region(account: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path(account["HOME"])
    bare = {name: value for name, value in account.items() if name not in ("AWS_REGION", "AWS_DEFAULT_REGION")}
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    (found,), output = problems(bare, capsys)
    assert found == "no region is set; name one: export AWS_REGION=eu-central-1"
    assert f"account {ACCOUNT}\n" in output, "the credentials are told apart from the region"
    (found,), _ = problems(bare | {"AWS_REGION": "cn-north-1"}, capsys)
    assert found.startswith("region cn-north-1: a target there ")
    (home / ".aws").mkdir()
    (home / ".aws" / "config").write_text("[default]\nregion = eu-west-3\n")
    assert prerequisites.region_of(bare) == "eu-west-3"
    assert prerequisites.region_of(bare | {"AWS_DEFAULT_REGION": "eu-west-2"}) == "eu-west-2"
    assert prerequisites.region_of(account | {"AWS_REGION": "eu-west-1"}) == "eu-west-1"
    assert prerequisites.region_of(account | {"CONTEXT": "region=us-east-2"}) == "us-east-2"


def test_settings(account: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    prod = {
        "STACK_ENV": "prod",
        "CONTEXT": context(certificate_arn=f"arn:aws:acm:{REGION}:{ACCOUNT}:certificate/1", host_name="a.example.com"),
    }
    (found,), _ = problems(account | prod, capsys)
    assert found.startswith("prod asks before it widens permissions, and there is no terminal to ask on; ")
    assert problems(account | prod | {"YES": "1"}, capsys)[0] == []
    (found,), _ = problems(account | {"CONTEXT": context(account="999999999999")}, capsys)
    assert found.startswith(f"setting account: is 999999999999, but the credentials are of {ACCOUNT}")
    (found,), _ = problems(account | {"CONTEXT": "compute"}, capsys)
    assert found.startswith("CONTEXT: 'compute' is no setting")


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index that has pip, as PEP 503 has it."""

    def do_GET(self) -> None:
        body = b'<!DOCTYPE html><a href="pip-25.0-py3-none-any.whl">pip-25.0-py3-none-any.whl</a>'
        self.send_response(200 if self.path == "/simple/pip/" else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def test_what_is_built_needs_the_package_index(
    account: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that is built for other tests may help."""
    repository = copy_of_repository(tmp_path / "repository")
    monkeypatch.setattr(cdk, "INFRA", repository / "infra")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    found, _ = problems(account | {"CONTEXT": ""}, capsys)
    assert found[0].startswith("deploy/install.sh is missing, which hosts are set up with")
    assert found[1].startswith("the package index cannot be reached, and hosts are sent packages from it (")
    (repository / "deploy").mkdir()
    (repository / "deploy" / "install.sh").touch()
    (repository / "build").mkdir()
    (repository / "build" / "application-arm64.sha256").touch()
    found, output = problems(account | {"CONTEXT": ""}, capsys)
    assert found == []
    assert "  - package index: not reachable; what was built before can be used again if nothing has changed" in output
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    try:
        assert "  ✓ package index: reachable\n" in problems(account | {"CONTEXT": ""}, capsys)[1]
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    own = context(compute="fargate", image=IMAGE)
    assert "package index" not in problems(account | {"CONTEXT": own}, capsys)[1], "here nothing is built"


def test_bootstrap(account: dict[str, str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    other = account | {"AWS_REGION": "eu-west-2"}
    ssm = _client(place, "ssm", "eu-west-2")
    for version, said in (("5", "version 5 in"), ("33", "version 33, but its stack CDKToolkit could not be seen")):
        ssm.put_parameter(Name=prerequisites.BOOTSTRAP_PARAMETER, Value=version, Type="String", Overwrite=True)
        report = Report()
        ready = prerequisites.check(other, report)
        assert ready is not None
        assert ready.bootstrapped is (version == "33")
        assert f"  - bootstrap: {said}" in capsys.readouterr().out


def test_stacks_ask_for_no_newer_bootstrap() -> None:
    """The version that is checked for is the one that CDK's assemblies name."""
    needed = set()
    for made in (synthesize(), synthesize(compute="fargate")):
        for manifest in made.folder.glob("manifest.json"):
            for artifact in json.loads(manifest.read_text())["artifacts"].values():
                details = artifact.get("properties", {})
                needed.add(details.get("requiresBootstrapStackVersion", 0))
                needed.add(details.get("lookupRole", {}).get("requiresBootstrapStackVersion", 0))
    assert max(needed) == prerequisites.BOOTSTRAP_OLDEST


def _client(place: Place, service: str, region: str) -> Any:
    return boto3.client(
        service,
        region_name=region,
        endpoint_url=place.cloud.environ["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def test_quotas(account: dict[str, str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    region = "ap-southeast-2"
    here = account | {"AWS_REGION": region}
    ec2 = _client(place, "ec2", region)
    subnets = ec2.describe_subnets()["Subnets"]
    for _ in range(5):
        ec2.create_nat_gateway(SubnetId=subnets[0]["SubnetId"], AllocationId=ec2.allocate_address()["AllocationId"])
    found, output = problems(here, capsys)
    assert found == [
        "NAT gateways in one zone: 5 of 5 in use, 1 more needed; ask for more in the console of Service Quotas, or "
        "delete some"
    ]
    assert "  ✓ VPCs: 1 of 5 in use, 1 more needed\n" in output
    assert "  - elastic IPs: could not see (" in output, "moto has no quotas of EC2, as a caller may not see them"
    for number in range(4):
        ec2.create_vpc(CidrBlock=f"10.{number}.0.0/16")
    found, output = problems(here | {"CONTEXT": context(nat_gateways="0")}, capsys)
    assert [problem.split(":")[0] for problem in found] == ["VPCs"]
    assert "elastic IPs" not in output
    found, output = problems(here | {"CONTEXT": context(vpc_id="vpc-0123456789abcdef0")}, capsys)
    assert found == []
    assert "VPCs" not in output


class Quotas:
    """Service Quotas, as far as its pages go."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def get_paginator(self, operation: str) -> Quotas:
        assert operation == "list_service_quotas"
        return self

    def paginate(self, **_: str) -> Iterator[dict[str, Any]]:
        yield {"Quotas": [{"QuotaName": name, "Value": 3.0} for name in self._names]}


def test_quotas_of_sagemaker_are_found_by_name() -> None:
    listed = Quotas("Maximum number of MLflow tracking servers", "ml.t3.medium for MLflow", "Domains")
    assert prerequisites._named_quota(listed, "mlflow", "tracking server") == 3
    with pytest.raises(LookupError, match="0 quotas of SageMaker have such a name"):
        prerequisites._named_quota(listed, "mlflow", "app")
    with pytest.raises(LookupError, match="2 quotas"):
        prerequisites._named_quota(listed, "mlflow")


@pytest.mark.parametrize(
    ("status", "protected", "said"),
    [
        ("CREATE_COMPLETE", False, None),
        ("UPDATE_ROLLBACK_COMPLETE", True, None),
        ("REVIEW_IN_PROGRESS", False, None),
        ("ROLLBACK_COMPLETE", False, None),
        (
            "ROLLBACK_COMPLETE",
            True,
            "update-termination-protection --no-enable-termination-protection --stack-name one",
        ),
        ("UPDATE_ROLLBACK_FAILED", False, "aws cloudformation continue-update-rollback --stack-name one"),
        ("UPDATE_IN_PROGRESS", False, "somebody else is changing it"),
        ("DELETE_FAILED", False, "make destroy MLFLOW_TYPE=tracking"),
    ],
)
def test_stacks_that_cannot_be_updated(status: str, protected: bool, said: str | None) -> None:
    stack = {"StackName": "one", "StackStatus": status, "EnableTerminationProtection": protected}
    found = list(prerequisites.stack_problems(stack, Settings.model_validate(settings())))
    assert [said in problem for problem in found] if said else not found
    assert len(found) == (said is not None)


def event(resource: str, status: str, reason: str = "") -> dict[str, str]:
    physical = "stack-id" if resource == "stack" else f"{resource}-id"
    return {
        "StackId": "stack-id",
        "PhysicalResourceId": physical,
        "LogicalResourceId": resource,
        "ResourceStatus": status,
        "ResourceStatusReason": reason,
    }


def test_first_failure() -> None:
    before = [event("old", "CREATE_FAILED", "long ago"), event("stack", "CREATE_IN_PROGRESS")]
    now = [
        event("stack", "UPDATE_ROLLBACK_COMPLETE"),
        event("stack", "UPDATE_ROLLBACK_IN_PROGRESS", "The following resource(s) failed"),
        event("third", "CREATE_FAILED", "Resource creation cancelled"),
        event("second", "UPDATE_FAILED", "also wrong"),
        event("first", "CREATE_FAILED", "wrong"),
        event("first", "CREATE_IN_PROGRESS"),
        event("stack", "UPDATE_IN_PROGRESS", "User Initiated"),
    ]
    found = deploy.first_failure([*now, *before])
    assert found is not None
    assert found["ResourceStatusReason"] == "wrong"
    assert deploy.first_failure([event("stack", "UPDATE_COMPLETE"), *now[-1:], *before]) is None


# The validation


ROLES: list[Table] = [
    {"name": "reader", "targets": ["*"], "allow": ["Get*", "Search*", "List*", "AccessUI"]},
    {"name": "writer", "targets": ["*"], "allow": ["*"]},
]


@dataclass(frozen=True)
class Deployed:
    """A proxy with TLS before a local SageMaker, and what the stack's outputs say of it."""

    outputs: Mapping[str, str]
    ca: Path
    secrets: Any

    def held(self) -> list[Any]:
        text = self.secrets.get_secret_value(SecretId=self.outputs["KeysSecret"])["SecretString"]
        return list(parse_keys(text.encode()).values())

    def status(self, key: str) -> int:
        return validation._status(f"{self.outputs['Url']}/-/whoami", self.ca, {"X-API-Key": key})


OTHER_KEY = (
    '{"id": "7x3kq2mp", "name": "ci", "sha256": "' + "0f" * 32 + '", "role": "reader", '
    '"created": "2026-01-01T00:00:00Z", "expires": null}\n'
)


@pytest.fixture
def deployed(
    place: Place, account: dict[str, str], sagemaker: LocalSageMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Deployed]:
    certificate, key = handler.make_certificate("localhost")
    acm = _client(place, "acm", REGION)
    arn = acm.import_certificate(Certificate=certificate, PrivateKey=key)["CertificateArn"]
    command = f"aws acm get-certificate --region {REGION} --certificate-arn {arn} --query Certificate --output text > x"
    ca = validation.save_certificate(acm, command, tmp_path / "build" / "saved.pem")
    (tmp_path / "tls.pem").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    secrets = _client(place, "secretsmanager", REGION)
    secret = secrets.create_secret(Name=tmp_path.name, SecretString=OTHER_KEY)["ARN"]
    target = tomllib.loads(sagemaker.proxy_toml())["targets"][0]
    monkeypatch.setattr(validation, "REFRESH", 1.0)
    monkeypatch.setattr(validation, "_MARGIN", 1.0)
    with running(
        tmp_path / "proxy",
        [{**target, "default": True}],
        server={"tls_certificate": str(tmp_path / "tls.pem"), "tls_key": str(tmp_path / "tls.key")},
        sections={"access": {"keys_secret": secret, "keys_refresh": 1}},
        roles=ROLES,
        environ={
            **sagemaker.environment(),
            "AWS_ENDPOINT_URL_SECRETS_MANAGER": place.cloud.environ["AWS_ENDPOINT_URL"],
        },
    ) as proxy:
        outputs = {
            "Url": f"https://localhost:{proxy.port}",
            "KeysSecret": secret,
            "LoadBalancerHost": "localhost",
            "ShellCommand": "shell",
            "CertificateCommand": command,
        }
        yield Deployed(outputs, ca, secrets)


def attempt(deployed: Deployed, *, internet_facing: bool = False) -> int:
    """The last step of a deployment."""
    more = {"internet_facing": "true", "allowed_cidrs": "0.0.0.0/0"} if internet_facing else {}
    made = Settings.model_validate(settings(**more))
    return deploy._try(made, Account(ACCOUNT, "arn", REGION), deployed.outputs, "writer", deployed.ca)


def test_a_deployment_is_validated_with_a_key_of_its_own(deployed: Deployed, capfd: pytest.CaptureFixture[str]) -> None:
    assert attempt(deployed) == 0
    output = capfd.readouterr().out
    made = deployed.held()
    assert [key.name for key in made] == ["ci", "deploy-validation"]
    assert f"  Made the API key {made[1].id} of role writer, for this only.\n" in output
    assert "runs/create" in output
    assert f"key:{validation.KEY_NAME}" in output, "it is this key that was used"
    assert output.endswith(f"  Revoked the API key {made[1].id}.\n")
    assert "mlp_" not in output, "the key itself is never printed"
    assert made[0].fields() == json.loads(OTHER_KEY), "keys of others stay as they are"
    assert made[1].state(time.time()) == "revoked"
    assert made[1].expires - made[1].created == validation._KEY_LIFETIME
    # Another deployment: the secret does not fill up.
    assert attempt(deployed) == 0
    assert [key.name for key in deployed.held()] == ["ci", "deploy-validation"]


def test_the_key_is_revoked_whatever_happens(deployed: Deployed) -> None:
    before = signal.getsignal(signal.SIGINT)
    shown = []

    def interrupted() -> None:
        with validation.short_lived_key(deployed.secrets, deployed.outputs["KeysSecret"], "writer") as key:
            shown.append(key)
            assert validation.wait_until_accepted(deployed.outputs["Url"], deployed.ca, key, 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert deployed.held()[1].state(time.time()) == "revoked"
    end = time.monotonic() + 30
    while deployed.status(shown[0]) != 401:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_proxy_that_does_not_take_the_key(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when its role may not read the secret: it goes on with what it knew."""
    other = deployed.secrets.create_secret(Name="another", SecretString="\n")["ARN"]
    monkeypatch.setattr(validation, "_GRACE", 1.0)
    wrong = Deployed({**deployed.outputs, "KeysSecret": other}, deployed.ca, deployed.secrets)
    assert attempt(wrong) == 1
    output = capfd.readouterr().out
    assert "✗ The proxy does not accept the key." in output
    assert [key.state(time.time()) for key in wrong.held()] == ["revoked"]


def test_a_secret_that_cannot_be_used(deployed: Deployed) -> None:
    arn = deployed.outputs["KeysSecret"]
    deployed.secrets.put_secret_value(SecretId=arn, SecretString="{}\n")
    with (
        pytest.raises(KeysError, match=f"the secret {arn}, line 1: expires is missing"),
        validation.short_lived_key(deployed.secrets, arn, "writer"),
    ):
        raise AssertionError
    assert deployed.secrets.get_secret_value(SecretId=arn)["SecretString"] == "{}\n"


def test_a_public_load_balancer_must_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deploy, "_REACH_PUBLIC", 0.0)
    (tmp_path / "ca.pem").write_bytes(handler.make_certificate("lb.example.com")[0])
    nowhere = Deployed({"Url": "https://127.0.0.1:9", "LoadBalancerHost": "lb.example.com"}, tmp_path / "ca.pem", None)
    assert attempt(nowhere, internet_facing=True) == 1
    output = capsys.readouterr().out
    assert "✗ https://127.0.0.1:9 cannot be reached from here (" in output
    assert "in allowed_cidrs (0.0.0.0/0), and does the name lead to lb.example.com?" in output


def test_role_for_validation() -> None:
    def of(*roles: Mapping[str, Any]) -> str | None:
        given = settings(roles=json.dumps(roles))
        return validation.role_for_validation(Settings.model_validate(given))

    everything, some = {"name": "all", "allow": ["*"]}, {"name": "some", "allow": ["Get*"]}
    assert of(some, everything) == "all"
    assert of(everything, {"name": "writer", "allow": ["*"]}) == "writer"
    assert of({"name": "writer", "allow": ["Get*"]}) is None
    assert of({"name": "but", "allow": ["*"], "deny": ["DeleteRun"]}) is None


def test_what_cannot_be_validated_is_said(account: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    given = {"certificate_arn": f"arn:aws:acm:{REGION}:{ACCOUNT}:certificate/1", "host_name": "a.example.com"}
    made = Settings.model_validate(settings(**given, mtls_ca_bundle="s3://bucket/ca.pem"))
    assert deploy._validate(made, Account(ACCOUNT, "arn", REGION), {}) == 0
    assert "Deployed, not validated: every caller needs a client certificate" in capsys.readouterr().out
    made = Settings.model_validate(settings(roles='[{"name": "reader", "allow": ["Get*"]}]'))
    assert deploy._validate(made, Account(ACCOUNT, "arn", REGION), {}) == 0
    assert "Deployed, not validated: no role may do everything" in capsys.readouterr().out


def test_tasks_are_reached_by_a_shell_alone(account: dict[str, str]) -> None:
    made = Settings.model_validate(settings(compute="fargate"))
    outputs = {"Url": "https://a.example.com", "LoadBalancerHost": "lb", "ShellCommand": "aws ecs execute-command"}
    told = validation.by_hand(made, outputs, REGION, None)
    assert "  MLFLOW_PROXY_KEY=… mlflow-proxy validate --url https://a.example.com" in told.splitlines()
    assert "start-session" not in told
    assert "--ca" not in told
    assert "allowed_cidrs" not in told


def test_a_self_signed_certificate_is_brought_along_and_not_asked_of_whoever_answers(account: dict[str, str]) -> None:
    made = Settings.model_validate(settings(allowed_cidrs="10.50.0.0/16"))
    outputs = {"Url": "https://lb", "LoadBalancerHost": "lb", "ShellCommand": "aws ssm start-session --target $(aws x)"}
    told = validation.by_hand(made, outputs, REGION, ROOT / "build" / "mlflow-proxy-tracking.pem")
    assert "paste build/mlflow-proxy-tracking.pem" in told
    assert told.count("--ca /tmp/mlflow-proxy.pem") == 1
    assert told.count("--ca build/mlflow-proxy-tracking.pem") == 1
    assert "allowed_cidrs (10.50.0.0/16) must have its network in it" in told
