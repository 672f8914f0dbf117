"""The command line as an operator uses it, against the local SageMaker: check, ui, serve, demo; and `/-/ui/`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from tests.compat.client_runs import bare_environment
from tests.faults.proxies import Proxy, Table, free_port
from tests.integration.conftest import NO_KEYS, Control, targets_of

from mlflow_proxy.local import LocalSageMaker

COMMAND = str(Path(sys.executable).with_name("mlflow-proxy"))


def config(folder: Path, targets: list[Table], more: str = "") -> Path:
    path = folder / "proxy.toml"
    tables = ("".join(f"{name} = {json.dumps(value)}\n" for name, value in target.items()) for target in targets)
    path.write_text(more + "".join(f"[[targets]]\n{table}" for table in tables))
    return path


def run(folder: Path, *arguments: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "AWS_EC2_METADATA_DISABLED": "true", **environ},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Checks:
    """Runs `mlflow-proxy check` for one target whose configuration or environment is a little off."""

    def __init__(self, sagemaker: LocalSageMaker, folder: Path) -> None:
        self._sagemaker = sagemaker
        self._folder = folder

    def __call__(self, environ: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        target: Table = {**targets_of(self._sagemaker)[0], **options}
        path = config(self._folder, [target])
        given = {**self._sagemaker.environment(), **(environ or {})}
        return run(self._folder, "check", "-c", str(path), environ=given)


@pytest.fixture
def checks(sagemaker: LocalSageMaker, control: Control, tmp_path: Path) -> Checks:
    return Checks(sagemaker, tmp_path)


def row(done: subprocess.CompletedProcess[str], name: str) -> str:
    """A row of the table with its advice."""
    match = re.search(rf"^  [✓✗?] {name} .*(?:\n +→ .*)?", done.stdout, re.MULTILINE)
    assert match is not None, done.stdout + done.stderr
    return match[0].strip()


def test_all_well(sagemaker: LocalSageMaker, control: Control, tmp_path: Path) -> None:
    path = config(tmp_path, targets_of(sagemaker))
    done = run(tmp_path, "check", "-c", str(path), environ=sagemaker.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    assert done.stdout.endswith("All well.\n")
    for arn in (sagemaker.tracking_arn, sagemaker.app_arn, sagemaker.cross_account_arn):
        assert arn in done.stdout
    assert done.stdout.count("may list experiments") == 3
    assert "arn:aws:iam::111122223333:user/developer" in done.stdout
    assert "assumed-role/cross-account" in done.stdout


def test_one_target_only(sagemaker: LocalSageMaker, control: Control, tmp_path: Path) -> None:
    path = config(tmp_path, targets_of(sagemaker))
    done = run(tmp_path, "check", "-c", str(path), "-t", "app", environ=sagemaker.environment())
    assert done.returncode == 0
    assert sagemaker.tracking_arn not in done.stdout
    unknown = run(tmp_path, "check", "-c", str(path), "-t", "none", environ=sagemaker.environment())
    assert unknown.returncode == 1
    assert "there is no target 'none'" in unknown.stderr


def test_an_unknown_key(checks: Checks) -> None:
    done = checks({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWNEXAMPLE00"})
    assert done.returncode == 1
    assert row(done, "signature").startswith("✗ signature      refused: UnrecognizedClientException")
    assert "→" in row(done, "signature")


def test_a_wrong_secret(checks: Checks) -> None:
    done = checks({"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert done.returncode == 1
    assert "refused: InvalidSignatureException" in row(done, "signature")
    assert "Check this proxy's clock, its credentials, and the target's ARN" in row(done, "signature")


def test_the_wrong_region(sagemaker: LocalSageMaker, checks: Checks) -> None:
    done = checks(arn=sagemaker.tracking_arn.replace("us-east-1", "eu-west-1"))
    assert done.returncode == 1
    assert row(done, "signature").startswith("✗")
    assert "not 'eu-west-1'" in row(done, "signature")


def test_another_target_of_the_account(sagemaker: LocalSageMaker, checks: Checks) -> None:
    done = checks(arn=sagemaker.tracking_arn.replace("team-tracking", "no-such-server"))
    assert done.returncode == 1
    assert row(done, "signature").startswith("✓")
    assert f"Allow sagemaker-mlflow:SearchExperiments on {sagemaker.tracking_arn[:-13]}no-such-server" in row(
        done, "permission"
    )


def test_a_closed_port(checks: Checks) -> None:
    done = checks(endpoint=f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert row(done, "signature").startswith("✗ signature      no answer")
    assert "cannot be reached" in row(done, "signature")


def test_an_unknown_host(checks: Checks) -> None:
    done = checks(endpoint="http://no-such-host.invalid")
    assert done.returncode == 1
    assert "no-such-host.invalid is not found" in row(done, "DNS")
    assert "Check the region in the ARN" in row(done, "DNS")


def test_plain_http_where_tls_is_meant(sagemaker: LocalSageMaker, checks: Checks) -> None:
    done = checks(endpoint=sagemaker.endpoint.replace("http:", "https:"))
    assert done.returncode == 1
    assert row(done, "TLS").startswith("✗")


def test_a_role_without_permission(sagemaker: LocalSageMaker, checks: Checks) -> None:
    done = checks(assume_role_arn=sagemaker.roles["nothing"])
    assert done.returncode == 1
    assert row(done, "signature").startswith("✓")
    assert "assumed-role/nothing" in row(done, "identity")
    assert row(done, "permission").startswith("✗")
    assert f"Allow sagemaker-mlflow:SearchExperiments on {sagemaker.tracking_arn}" in row(done, "permission")


def test_a_role_that_may_only_read(sagemaker: LocalSageMaker, checks: Checks) -> None:
    done = checks(assume_role_arn=sagemaker.roles["reader"])
    assert done.returncode == 0, done.stdout
    assert row(done, "permission").startswith("✓")
    assert row(done, "server").startswith("?")


def test_a_role_that_cannot_be_assumed(sagemaker: LocalSageMaker, checks: Checks) -> None:
    done = checks(assume_role_arn=sagemaker.roles["cross-account"], external_id="not-the-one")
    assert done.returncode == 1
    assert row(done, "credentials").startswith("✗")
    assert sagemaker.roles["cross-account"] in row(done, "credentials")


def test_a_wrong_clock(control: Control, checks: Checks) -> None:
    control("POST", "faults", {"clock_skew": 600})
    done = checks()
    assert done.returncode == 1
    assert re.match(r"✗ clock +the service is \+(599|600|601) s ahead", row(done, "clock"))
    assert "Set this machine's clock" in row(done, "clock")


def test_a_stopped_server(control: Control, checks: Checks) -> None:
    control("POST", "servers/tracking/stop")
    done = checks()
    assert done.returncode == 1
    assert row(done, "server").startswith("✗ server         team-tracking is Stopped")
    assert "start-mlflow-tracking-server" in row(done, "server")


def test_no_credentials(checks: Checks) -> None:
    done = checks(NO_KEYS)
    assert done.returncode == 1
    assert row(done, "credentials").startswith("✗ credentials    none that can be used")
    assert "no AWS credentials were found. On AWS, attach a role" in row(done, "credentials")
    assert max(len(line) for line in done.stdout.splitlines()) < 300
    assert done.stderr == ""
    assert "AWS_ACCESS_KEY_ID is not set" not in done.stdout
    assert "mlflow-proxy check --verbose" in done.stdout


def test_no_credentials_in_detail(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    path = config(tmp_path, targets_of(sagemaker)[:1])
    done = run(tmp_path, "check", "--verbose", "-c", str(path), environ={**sagemaker.environment(), **NO_KEYS})
    assert done.returncode == 1
    assert "AWS_ACCESS_KEY_ID is not set" in done.stdout


def test_no_link_without_credentials(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    path = config(tmp_path, targets_of(sagemaker)[:1])
    done = run(tmp_path, "ui", "tracking", "-c", str(path), environ={**sagemaker.environment(), **NO_KEYS})
    assert done.returncode == 1
    assert done.stderr.count("no AWS credentials were found") == 1


@pytest.mark.parametrize("group", [[], ["keys"]])
def test_the_help_describes_commands_in_whole_sentences(tmp_path: Path, group: list[str]) -> None:
    done = run(tmp_path, *group, "--help", environ={"COLUMNS": "80"})
    commands = done.stdout.partition("Commands:\n")[2].splitlines()
    assert len(commands) >= 4
    assert [line for line in commands if not line.endswith(".") or line.endswith("...")] == []


def visit(link: str) -> requests.Response:
    return requests.get(link, allow_redirects=False, timeout=30)


@pytest.mark.parametrize("name", ["tracking", "app"])
def test_a_link_from_the_command_line(sagemaker: LocalSageMaker, control: Control, tmp_path: Path, name: str) -> None:
    path = config(tmp_path, targets_of(sagemaker))
    done = run(tmp_path, "ui", "-c", str(path), name, environ=sagemaker.environment())
    assert done.returncode == 0, done.stderr
    link = done.stdout.strip()
    opened = requests.get(link, timeout=60)
    assert opened.status_code == 200
    assert "<title>MLflow</title>" in opened.text
    assert visit(link).status_code == 403
    unknown = run(tmp_path, "ui", "-c", str(path), "none", environ=sagemaker.environment())
    assert unknown.returncode == 1
    assert "there is no target 'none'; there are: tracking, app, cross-account" in unknown.stderr


def test_a_link_for_a_role_that_may_not(sagemaker: LocalSageMaker, control: Control, tmp_path: Path) -> None:
    target: Table = {**targets_of(sagemaker)[0], "assume_role_arn": sagemaker.roles["reader"]}
    done = run(tmp_path, "ui", "-c", str(config(tmp_path, [target])), "tracking", environ=sagemaker.environment())
    assert done.returncode == 1
    assert "sagemaker:CreatePresignedMlflowTrackingServerUrl" in done.stderr


def test_a_browser_is_sent_to_a_link(control: Control, proxy: Proxy, mode: str) -> None:
    page = f"http://127.0.0.1:{proxy.port}/-/ui/{mode}"
    looked = requests.head(page, timeout=30)
    assert looked.status_code == 405
    assert "location" not in looked.headers
    sent = visit(page)
    assert sent.status_code == 302
    assert sent.headers["cache-control"] == "no-store"
    assert sent.headers["referrer-policy"] == "no-referrer"
    link = sent.headers["location"]
    assert visit(link).status_code == 302
    assert visit(link).status_code == 403
    assert visit(link).status_code == 403

    asked = requests.post(page, params={"link_expires": 60, "session_expires": 1800}, timeout=30)
    assert asked.status_code == 200
    assert asked.headers["cache-control"] == "no-store"
    assert asked.json()["expires_in_seconds"] == 60
    other = asked.json()["authorized_url"]
    assert other != link
    assert visit(other).status_code == 302

    logged = proxy.stdout.read_text() + proxy.stderr.read_text()
    for secret in (link, other):
        assert secret.partition("authToken=")[2]
        assert secret.partition("authToken=")[2] not in logged
    assert "authToken" not in logged


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("link_expires=4", "link_expires"),
        ("link_expires=301", "link_expires"),
        ("link_expires=soon", "link_expires"),
        ("link_expires=-5", "link_expires"),
        ("session_expires=1799", "session_expires"),
        ("session_expires=43201", "session_expires"),
        ("forever=1", "forever"),
    ],
)
def test_options_out_of_bounds(control: Control, proxy: Proxy, query: str, named: str) -> None:
    for method in ("GET", "POST"):
        answer = requests.request(
            method, f"http://127.0.0.1:{proxy.port}/-/ui/tracking?{query}", allow_redirects=False, timeout=30
        )
        assert answer.status_code == 400
        assert named in answer.json()["message"]
    assert all(entry["plane"] != "sagemaker" for entry in control("GET", "requests?last=10")["requests"])


def test_no_link_to_an_unknown_target(proxy: Proxy) -> None:
    answer = visit(f"http://127.0.0.1:{proxy.port}/-/ui/none")
    assert answer.status_code == 404
    assert answer.json()["error_code"] == "NOT_FOUND"


def test_serve_tells_all_mistakes(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    targets: list[Table] = [
        {"name": "one", "arn": "arn:aws-cn:sagemaker:cn-north-1:111122223333:mlflow-app/app-X", "default": True},
        {"name": "two words", "arn": sagemaker.app_arn, "default": True, "endpint": "http://127.0.0.1"},
    ]
    path = config(tmp_path, targets, '[server]\nport = 99999\ntls_certificate = "/none.pem"\n[nothing]\nx = 1\n')
    done = run(tmp_path, "serve", "-c", str(path), environ={"MLFLOW_PROXY_UPSTREAM__RETRIES": "many"})
    assert done.returncode == 2
    mistakes = [line for line in done.stderr.splitlines() if line.startswith("  ✗ ")]
    for named in ("server.port", "tls_key", "nothing", "arn", "name", "endpint", "default", "upstream.retries"):
        assert any(named in line for line in mistakes), f"{named} is not among\n{done.stderr}"
    assert f"{len(mistakes)} mistakes in the configuration from {path}" in done.stderr


def test_the_demo(tmp_path: Path) -> None:
    port = free_port()
    printed = tmp_path / "printed"
    with printed.open("w") as out:
        demo = subprocess.Popen(
            [COMMAND, "demo", "--port", str(port)],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "LANG": "C.UTF-8"},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family: list[psutil.Process] = []
    try:
        end = time.monotonic() + 120
        while "Ctrl-C ends everything." not in printed.read_text():
            assert demo.poll() is None, printed.read_text()
            assert time.monotonic() < end, printed.read_text()
            time.sleep(0.2)
        family = psutil.Process(demo.pid).children(recursive=True)
        assert len(family) >= 3  # the proxy and two MLflow servers at the least
        guide = printed.read_text()
        assert guide.startswith("Loading the local SageMaker MLflow …\n")
        assert "  The proxy starts\n" in guide
        assert " INFO " not in guide
        commands = guide[guide.index("PROXY=") : guide.index("The same with any MLflow client")]
        for commands_of_a_mode in (commands, re.sub(r"^# PROXY", "PROXY", commands, flags=re.MULTILINE)):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", commands_of_a_mode],
                env=bare_environment("", tmp_path),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert re.search(r"run [0-9a-f]{32}$", done.stdout, re.MULTILINE), done.stdout
            assert done.stdout.count("error_code") == 1  # the reader's last command
            assert "does not allow CreateExperiment on the target" in done.stdout
        overview = f"http://127.0.0.1:{port}/-/"
        assert requests.get(overview, timeout=30).status_code == 401
        for role in ("reader", "writer"):
            key = re.search(rf"^  {role} +(mlp_\S+)$", guide, re.MULTILINE)
            assert key is not None
            page = requests.get(overview, headers={"x-api-key": key[1]}, timeout=30)
            assert f"<strong>key:{role}</strong>" in page.text
        audit = re.search(r"^Its audit log: +(\S+)$", guide, re.MULTILINE)
        assert audit is not None
        deleted = [line for line in Path(audit[1]).read_text().splitlines() if '"DeleteRun"' in line]
        assert len(deleted) == 2
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/-/health", timeout=5)
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        if demo.poll() is None:
            demo.kill()
            demo.wait()
