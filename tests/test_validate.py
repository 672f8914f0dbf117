"""`mlflow-proxy validate` against real proxies before the local SageMaker, and against everything that is none."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.faults.certificates import Authority
from tests.faults.nginx import nginx
from tests.faults.proxies import Proxy, Table, free_port, running, target
from tests.faults.test_outgoing_proxy import open_tunnel
from tests.faults.upstreams import Arrived, Peer, Upstream, answer
from tests.integration.conftest import Control, targets_of

from mlflow_proxy import cli
from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.settings import KEY_VARIABLE
from mlflow_proxy.validate import Steps, reach
from mlflow_proxy.validate.deployment import TOKEN_VARIABLE, Deployment, Mistake, deployment

COMMAND = str(Path(sys.executable).with_name("mlflow-proxy"))
PAGE = Path(__file__).resolve().parent.parent / "docs" / "validate.md"
READING = ["AccessUI", "Get*", "List*", "Search*"]
WRITING = [*READING, "Create*", "Set*", "Delete*"]
CALLS = [
    "experiments/create",
    "experiments/search",
    "experiments/get",
    "runs/create",
    "artifacts/list",
    "runs/set-tag",
    "runs/delete",
]
RULES = ["DNS", "TLS", "health", "plain HTTP", "stranger", "identity", "may read", "may delete"]
ALL = [*RULES, *CALLS, "clean-up", "UI link", "UI page"]
# The name that callers of a load balancer use; only an HTTP proxy of the tests finds it.
NAME = "mlflow.example.com"


# What is run


class Validation(NamedTuple):
    """A finished `mlflow-proxy validate --output json`."""

    code: int
    report: dict[str, Any]
    stdout: str
    stderr: str

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        return {step["name"]: step for step in self.report["steps"]}

    @property
    def results(self) -> dict[str, str]:
        return {name: step["result"] for name, step in self.steps.items()}

    def told(self, name: str) -> str:
        """All that is said about a step."""
        step = self.steps[name]
        return f"{step['result']}: {step['found']} → {step['advice']}"


def environment(folder: Path, key: str | None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a machine without AWS."""
    given = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", "AWS_EC2_METADATA_DISABLED": "true"}
    return {**given, **({} if key is None else {KEY_VARIABLE: key}), **(environ or {})}


def validate(
    url: str,
    *arguments: str,
    folder: Path,
    key: str | None = None,
    environ: Mapping[str, str] | None = None,
    stdin: str = "",
) -> Validation:
    """Within this process, which saves half a second each time; what a process of its own adds, some tests look at."""
    given: dict[str, str | None] = dict.fromkeys(os.environ)
    given |= environment(folder, key, environ)
    asked = ["validate", "--url", url, "--output", "json", *arguments]
    done = CliRunner().invoke(cli.main, asked, input=stdin, env=given)
    assert isinstance(done.exception, SystemExit | None), done.exception
    report = json.loads(done.stdout)
    if key is not None:
        assert key not in done.stdout + done.stderr
    assert report["exit_code"] == done.exit_code
    assert report["passed"] is (done.exit_code == 0)
    return Validation(done.exit_code, report, done.stdout, done.stderr)


def in_process(*arguments: str, folder: Path, key: str | None) -> subprocess.CompletedProcess[str]:
    """As a person runs it, with the table for output."""
    return subprocess.run(
        [COMMAND, "validate", *arguments],
        env=environment(folder, key),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# What is validated


def self_signed(folder: Path, name: str) -> tuple[Path, Path]:
    """As the stacks make it: a certificate that is its own CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    called = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(called)
        .issuer_name(called)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=825, hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name), x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = folder / "self-signed.pem", folder / "self-signed.key"
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    return files


class Site(NamedTuple):
    """A deployment, reached by TLS at `localhost`, its keys by role, and the MLflow behind it."""

    proxy: Proxy
    keys: Mapping[str, str]
    ca: str
    sagemaker: LocalSageMaker

    @property
    def url(self) -> str:
        return f"https://localhost:{self.proxy.port}"

    def validate(self, role: str | None, *arguments: str, folder: Path, **more: Any) -> Validation:
        key = None if role is None else self.keys[role]
        return validate(self.url, "--ca", self.ca, *arguments, folder=folder, key=key, **more)

    def straight(self, name: str, route: str, **query: str) -> requests.Response:
        """A call of MLflow itself, behind the gate."""
        url = f"{self.sagemaker.mlflow_urls[name]}/api/2.0/mlflow/{route}"
        return requests.get(url, params=query, timeout=60)

    def made(self, name: str) -> dict[str, str]:
        """Experiments of this command and their lifecycle stages."""
        url = f"{self.sagemaker.mlflow_urls[name]}/api/2.0/mlflow/experiments/search"
        data = {"max_results": 1000, "view_type": "ALL", "filter": "name LIKE 'mlflow-proxy-validate-%'"}
        found = requests.post(url, json=data, timeout=60).json().get("experiments", [])
        return {each["experiment_id"]: each["lifecycle_stage"] for each in found}

    def left(self) -> list[str]:
        """Experiments of this command that were not removed."""
        return [
            number for name in ("tracking", "app") for number, stage in self.made(name).items() if stage == "active"
        ]

    def remove(self) -> None:
        """What a test left there, by mistake or on purpose."""
        for name in ("tracking", "app"):
            url = f"{self.sagemaker.mlflow_urls[name]}/api/2.0/mlflow/experiments/delete"
            for number in [number for number, stage in self.made(name).items() if stage == "active"]:
                requests.post(url, json={"experiment_id": number}, timeout=60).raise_for_status()


@pytest.fixture(scope="session")
def _site(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("validate")

    def role(name: str, allow: list[str], targets: tuple[str, ...] = ("tracking", "app"), **more: Any) -> Table:
        return {"name": name, "targets": list(targets), "allow": allow, **more}

    roles = [
        role("reader", READING),
        role("writer", WRITING),
        role("linker", [*WRITING, "CreatePresigned*"]),
        role("keeper", WRITING, deny=["DeleteExperiment"]),
        role("pageless", WRITING, deny=["AccessUI"]),
        role("optimist", WRITING, ("tracking",), assume_role_arn=sagemaker.roles["reader"]),
        role("hurried", WRITING, rate="2/hour"),
        role("elsewhere", WRITING, ("app",)),
    ]
    made = {
        name: make_key(name, name, created=datetime.now(UTC), expires=None)
        for name in [*(str(each["name"]) for each in roles), "nobody"]
    }
    keys = folder / "keys.jsonl"
    keys.write_text("".join(f"{json.dumps(kept.fields())}\n" for _, kept in made.values()))
    certificate, key = self_signed(folder, "localhost")
    targets = [each for each in targets_of(sagemaker) if each["name"] != "cross-account"]
    with running(
        folder,
        targets,
        server={"tls_certificate": str(certificate), "tls_key": str(key), "allowed_hosts": [NAME]},
        sections={"access": {"keys_file": str(keys)}},
        roles=roles,
        environ=sagemaker.environment(),
    ) as proxy:
        yield Site(proxy, {name: key for name, (key, _) in made.items()}, str(certificate), sagemaker)


@pytest.fixture
def control(sagemaker: LocalSageMaker) -> Iterator[Control]:
    control = Control(sagemaker.admin_endpoint)
    control.reset()
    yield control
    control.reset()


@pytest.fixture
def site(_site: Site, control: Control) -> Iterator[Site]:
    """Without faults; whatever a test does, nothing of it stays."""
    yield _site
    _site.remove()


Respond = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def imposter(respond: Respond | type[BaseHTTPRequestHandler], port: int = 0) -> Iterator[str]:
    """A server that answers every request by `respond`, or by a handler; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            assert not isinstance(respond, type)
            respond(self)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), respond if isinstance(respond, type) else Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def respond(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def healthy(then: Respond) -> Respond:
    """Health as a proxy answers it; then something else."""

    def answer_to(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/-/health":
            respond(handler, 200, b'{"status": "ok"}', Content_Type="application/json")
        else:
            then(handler)

    return answer_to


# All well


@pytest.mark.parametrize(("mode", "arguments"), [("tracking", []), ("app", ["--target", "app"])])
def test_a_writer_passes_and_leaves_nothing(site: Site, tmp_path: Path, mode: str, arguments: list[str]) -> None:
    before = site.made(mode)
    done = site.validate("writer", *arguments, folder=tmp_path)
    assert done.code == 0, done.report
    assert list(done.steps) == ALL
    skipped = {name for name, result in done.results.items() if result == "skipped"}
    assert skipped == {"plain HTTP", "UI link"}
    assert set(done.results.values()) == {"passed", "skipped"}
    assert re.fullmatch(
        r"TLSv1\.[23], certificate for localhost, mlflow\.example\.com from itself \(self-signed\), valid for 825 days",
        done.steps["TLS"]["found"],
    )
    assert f"key:writer by an API key, role writer; target {mode}, mlflow-" in done.steps["identity"]["found"]
    new = {number: stage for number, stage in site.made(mode).items() if number not in before}
    (number,) = new
    assert new == {number: "deleted"}
    assert done.steps["experiments/create"]["found"].startswith(f"experiment {number}: mlflow-proxy-validate-2")
    assert f"experiment {number} is deleted" in done.steps["clean-up"]["found"]
    assert "lifecycle stage 'deleted'" in done.steps["clean-up"]["found"]
    run = site.straight(mode, "runs/get", run_id=done.steps["runs/create"]["found"].removeprefix("run ")).json()["run"]
    assert run["info"]["lifecycle_stage"] == "deleted"
    assert {"key": "validated", "value": "yes"} in run["data"]["tags"]
    for name, step in done.steps.items():
        assert (step["milliseconds"] is None) == (step["result"] == "skipped"), name
    assert done.report["url"] == site.url + (f"/t/{mode}" if arguments else "")


def test_the_seven_calls_arrive_in_their_order(site: Site, control: Control, tmp_path: Path) -> None:
    assert site.validate("writer", "--target", "app", folder=tmp_path).code == 0
    arrived = [entry["path"] for entry in control("GET", "requests?last=50")["requests"] if entry["plane"] == "mlflow"]
    routes = [path.partition("?")[0].removeprefix("/api/2.0/mlflow/") for path in arrived]
    assert routes == ["experiments/search", "runs/delete", *CALLS, "experiments/delete", "/"]


def test_the_table(site: Site, tmp_path: Path) -> None:
    done = in_process("--url", f"{site.url}/t/app/", "--ca", site.ca, folder=tmp_path, key=site.keys["writer"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^  [✓✗?-] (.{18}) +(?:\d+ ms)?  +\S", done.stdout, re.MULTILINE) == [
        f"{name:<18}" for name in ALL
    ]
    assert done.stdout.startswith(f"\n{site.url}/t/app\n")
    assert re.search(r"^\d\d passed, 2 skipped, in \d+\.\d s\. Slowest: .+, \d+ ms\.\n$", done.stdout, re.MULTILINE)
    assert "\033" not in done.stdout + done.stderr  # no terminal
    assert done.stderr == ""


def test_a_link_for_those_who_may(site: Site, control: Control, tmp_path: Path) -> None:
    for mode in ("tracking", "app"):
        done = site.validate("linker", "--target", mode, folder=tmp_path)
        assert done.code == 0, done.report
        assert done.told("UI link").startswith("passed: a link to 127.0.0.1, void after 5 s")
        assert done.told("UI page").startswith("passed")
        assert "authToken" not in done.stdout + done.stderr


def test_a_link_that_aws_refuses(site: Site, control: Control, tmp_path: Path) -> None:
    control("POST", "faults", {"plane": "sagemaker", "status": 403, "error": "AccessDeniedException"})
    done = site.validate("linker", "--read-only", folder=tmp_path)
    assert done.code == 1
    assert "failed: 403: the proxy's AWS identity may not do sagemaker:CreatePresigned" in done.told("UI link")
    assert "mlflow-proxy check" in done.told("UI link")


def test_a_role_without_the_ui(site: Site, tmp_path: Path) -> None:
    done = site.validate("pageless", "--read-only", folder=tmp_path)
    assert done.code == 0
    assert done.told("UI page").startswith("skipped: the role does not allow AccessUI")


def test_key_and_token_from_files(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{site.keys['reader']}\n")
    for arguments, stdin in (
        (["--key-file", str(file)], ""),
        (["--token-file", str(file)], ""),
        (["--key-file", "-"], f"{site.keys['reader']}\n"),
    ):
        done = site.validate(None, "--read-only", *arguments, folder=tmp_path, stdin=stdin)
        assert "key:reader" in done.told("identity"), arguments
    environ = {TOKEN_VARIABLE: site.keys["reader"]}
    assert "key:reader" in site.validate(None, "--read-only", folder=tmp_path, environ=environ).told("identity")
    both = site.validate("writer", "--read-only", folder=tmp_path, environ=environ)
    assert "key:writer" in both.told("identity")


# Roles


def test_a_reader_who_only_reads(site: Site, tmp_path: Path) -> None:
    before = site.made("tracking")
    done = site.validate("reader", "--read-only", folder=tmp_path)
    assert done.code == 0, done.report
    assert "403: The role 'reader' does not allow DeleteRun on the target 'tracking'" in done.told("may delete")
    assert done.told("may delete").startswith("passed")
    writes = {"experiments/create", "runs/create", "artifacts/list", "runs/set-tag", "runs/delete"}
    assert {name for name in CALLS if done.results[name] == "skipped"} == writes
    assert all("--read-only" in done.told(name) for name in writes)
    assert done.results["experiments/search"] == done.results["experiments/get"] == "passed"
    assert done.told("clean-up").startswith("skipped: nothing was made")
    assert site.made("tracking") == before


def test_a_reader_who_would_write(site: Site, tmp_path: Path) -> None:
    done = site.validate("reader", folder=tmp_path)
    assert done.code == 1
    told = done.told("experiments/create")
    assert "403: The role 'reader' does not allow CreateExperiment" in told
    assert "--read-only" in told
    assert done.steps["experiments/create"]["request_id"] in told
    assert site.proxy.log_line(done.steps["experiments/create"]["request_id"])["action"] == "CreateExperiment"
    assert [name for name, result in done.results.items() if result == "failed"] == ["experiments/create"]
    assert done.told("clean-up").startswith("skipped: nothing was made")


def test_a_role_that_iam_does_not_back(site: Site, tmp_path: Path) -> None:
    done = site.validate("optimist", folder=tmp_path)
    assert done.code == 1
    for step in ("may delete", "experiments/create"):
        assert done.told(step).startswith("failed: 403: SageMaker MLflow answered AccessDeniedException")
        assert "The AWS identity that signs for this caller lacks the action" in done.told(step)


def test_a_caller_without_a_role(site: Site, tmp_path: Path) -> None:
    done = site.validate("nobody", folder=tmp_path)
    assert done.code == 1
    assert list(done.steps) == RULES[:6]
    assert done.told("identity").startswith("failed: 403: No role is this caller's")
    assert "[[roles]]" in done.told("identity")


def test_a_role_that_cannot_clean_up(site: Site, tmp_path: Path) -> None:
    done = site.validate("keeper", "--target", "app", folder=tmp_path)
    assert done.code == 1
    told = done.told("clean-up")
    (number,) = site.left()
    assert f"failed: experiment {number}, mlflow-proxy-validate-" in told
    assert "is still there: 403: The role 'keeper' denies DeleteExperiment" in told
    assert f'experiments/delete {{"experiment_id": "{number}"}}' in told
    assert [name for name, result in done.results.items() if result == "failed"] == ["clean-up"]


def test_a_rate_that_is_used_up(site: Site, tmp_path: Path) -> None:
    done = site.validate("hurried", folder=tmp_path)
    assert done.code == 1
    assert done.results["may delete"] == "passed"
    assert done.told("experiments/create").startswith("failed: 429")
    assert re.search(r"Wait \d+ s, and run this again", done.told("experiments/create"))
    assert done.told("clean-up").startswith("skipped")


# Callers


def test_strangers_and_wrong_keys(site: Site, tmp_path: Path) -> None:
    for key in (None, "mlp_wrong", f"{site.keys['writer'][:-1]}x", "no.such.token"):
        done = validate(site.url, "--ca", site.ca, folder=tmp_path, key=key)
        assert done.code == 1
        assert done.told("stranger") == "passed: 401, as JSON → "
        assert done.told("identity").startswith("failed: 401: ")
        assert KEY_VARIABLE in done.told("identity")
        assert list(done.steps) == RULES[:6]


def test_a_netrc_makes_nobody_somebody(site: Site, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine localhost login any password {site.keys['writer']}\n")
    done = validate(site.url, "--ca", site.ca, folder=tmp_path)
    assert done.told("stranger").startswith("passed")
    assert done.told("identity").startswith("failed: 401")


def test_targets_that_are_not_there(site: Site, tmp_path: Path) -> None:
    done = site.validate("writer", "--target", "none", folder=tmp_path)
    assert done.code == 1
    assert "no target none → Write --target" in done.told("identity")
    assert "--target app or --target tracking" in done.told("identity")
    other = site.validate("elsewhere", folder=tmp_path)
    assert "has no target for this caller → Write --target app." in other.told("identity")
    assert site.validate("elsewhere", "--target", "app", "--read-only", folder=tmp_path).code == 0


def test_where_nobody_is_identified(sagemaker: LocalSageMaker, control: Control, tmp_path: Path) -> None:
    """On loopback this is how it is meant; from elsewhere it is not. `127.1` looks like another machine's address."""
    server = {"allowed_hosts": ["127.1"]}
    with running(tmp_path / "proxy", targets_of(sagemaker), server=server, environ=sagemaker.environment()) as proxy:
        here = validate(f"http://127.0.0.1:{proxy.port}/", folder=tmp_path)
        assert here.code == 0, here.report
        assert here.told("stranger").startswith("warning: a stranger is served")
        assert here.told("identity").startswith("warning: nobody is identified; target tracking")
        assert here.results["UI link"] == "passed"
        elsewhere = validate(f"http://127.1:{proxy.port}", "--read-only", folder=tmp_path)
        assert elsewhere.code == 1
        assert elsewhere.told("TLS").startswith("failed: plain HTTP")
        assert elsewhere.told("stranger").startswith("failed: a stranger is served")
        assert "docs/access.md" in elsewhere.told("stranger")


# Names and certificates


def test_a_certificate_that_nobody_vouches_for(site: Site, tmp_path: Path) -> None:
    done = validate(site.url, folder=tmp_path, key=site.keys["writer"])
    assert done.code == 2
    assert list(done.steps) == ["DNS", "TLS"]
    told = done.told("TLS")
    assert "not trusted: self-signed certificate; it is for localhost, mlflow.example.com" in told
    assert "CertificateCommand" in told
    assert "--ca mlflow-proxy.pem" in told


def test_a_certificate_for_another_name(site: Site, tmp_path: Path) -> None:
    url = f"https://127.0.0.1:{site.proxy.port}"
    done = validate(url, "--ca", site.ca, folder=tmp_path, key=site.keys["writer"])
    assert done.code == 2
    assert "it is for localhost" in done.told("TLS")
    assert "Write a name in --url that the certificate has" in done.told("TLS")


@pytest.mark.parametrize(("days", "result"), [(-1, "failed"), (20, "warning"), (60, "passed")])
def test_how_long_a_certificate_lasts(tmp_path: Path, days: int, result: str) -> None:
    authority = Authority(tmp_path, "ours")
    upstream = Upstream(authority.server("localhost", valid=timedelta(days=days, hours=1)))
    try:
        url = f"https://localhost:{upstream.port}"
        done = validate(url, "--ca", str(authority.bundle), folder=tmp_path, key="mlp_any")
    finally:
        upstream.close()
    assert done.results["TLS"] == result
    assert done.code == (2 if days < 0 else 1)  # what is there is no proxy
    assert ("Renew it" in done.told("TLS")) == (days < 30)
    if days > 0:
        assert f"valid for {days} days" in done.told("TLS")
        assert "from ours" in done.told("TLS")


def test_tls_and_plain_http_taken_for_each_other(site: Site, tmp_path: Path) -> None:
    with imposter(lambda handler: respond(handler, 200)) as url:
        done = validate(url.replace("http:", "https:"), folder=tmp_path)
        assert done.code == 2
        assert "Does this port speak TLS?" in done.told("TLS")
    plain = validate(site.url.replace("https:", "http:"), folder=tmp_path)
    assert plain.code in (1, 2)
    assert plain.results["health"] == "failed"


def test_a_name_that_is_not_found(tmp_path: Path) -> None:
    done = validate("https://no-such-host.invalid", folder=tmp_path)
    assert done.code == 2
    assert done.told("DNS").startswith("failed: no-such-host.invalid is not found")
    assert "--wait" in done.told("DNS")


def test_a_closed_port(tmp_path: Path) -> None:
    for scheme, step in (("http", "health"), ("https", "TLS")):
        done = validate(f"{scheme}://127.0.0.1:{free_port()}", folder=tmp_path)
        assert done.code == 2
        assert "connection refused" in done.told(step)
        assert "allowed_cidrs" in done.told(step)


def test_through_a_proxy_on_the_way_out(site: Site, tmp_path: Path) -> None:
    """At a name and at ports that a load balancer has; port 80 is the HTTP proxy's to answer."""
    tunnels = Upstream()
    plain = [answer(b"", "301 Moved Permanently", f"Location: https://{NAME}:443/-/health")]

    def script(peer: Peer, arrived: Arrived) -> None:
        if arrived.method == "CONNECT":
            head = arrived.head.replace(f"{NAME}:443".encode(), f"127.0.0.1:{site.proxy.port}".encode(), 1)
            open_tunnel(peer, Arrived(head, b""))
        else:
            peer.send(plain[0])

    tunnels.script = script
    variables = dict.fromkeys(("HTTPS_PROXY", "http_proxy"), f"http://127.0.0.1:{tunnels.port}")
    try:
        arguments = (f"https://{NAME}", "--ca", site.ca, "--read-only")
        done = validate(*arguments, folder=tmp_path, key=site.keys["reader"], environ=variables)
        assert done.code == 0, done.report
        assert done.results["DNS"] == done.results["TLS"] == "warning"
        assert done.told("plain HTTP").startswith("passed: 301 to HTTPS")
        plain[0] = answer()
        done = validate(*arguments, folder=tmp_path, key=site.keys["reader"], environ=variables)
        assert done.told("plain HTTP").startswith("failed: 200 on port 80, without TLS")
        assert site.keys["reader"] not in "".join(arrived.head.decode("latin-1") for arrived in tunnels.arrived)
    finally:
        tunnels.close()


def test_what_is_beside_https() -> None:
    def look(port: int) -> tuple[bool | None, str]:
        outcome = reach.plain_http(Deployment("https", "127.0.0.1", 443, timeout=10), port=port)
        return outcome.good, outcome.found

    port = free_port()
    assert look(port) == (True, f"nothing is served on port {port}")
    for location, good in (("https://127.0.0.1/", True), ("http://127.0.0.1/", False), ("/", False)):
        with imposter(lambda handler, to=location: respond(handler, 301, Location=to)) as url:  # type: ignore[misc]
            assert look(int(url.rpartition(":")[2]))[0] is good, location
    with imposter(lambda handler: respond(handler, 200)) as url:
        assert look(int(url.rpartition(":")[2]))[0] is False
    assert reach.plain_http(Deployment("https", "127.0.0.1", 8443)).skipped
    assert reach.plain_http(Deployment("http", "127.0.0.1", 80)).skipped


# Client certificates


@contextmanager
def asking_nginx(folder: Path, authority: Authority, onward: int) -> Iterator[int]:
    """An nginx that asks for a client certificate and hands on whose it was; its port."""
    certificate, key = authority.issue("localhost", valid=timedelta(days=90))
    port = free_port()
    server = f"""server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_client_certificate {authority.bundle};
        ssl_verify_client on;
        location / {{
            proxy_pass http://127.0.0.1:{onward};
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-Proto https;
            proxy_set_header SSL-Client-Subject-DN $ssl_client_s_dn;
            proxy_set_header SSL-Client-Verify $ssl_client_verify;
        }}
    }}"""
    with nginx(folder, port, server):
        yield port


def test_client_certificates(sagemaker: LocalSageMaker, control: Control, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    certificate, key = authority.issue("trainer")
    role = {"name": "trainer", "subjects": ["cert:CN=trainer"], "targets": ["tracking"], "allow": READING}
    headers = {"subject_header": "SSL-Client-Subject-DN", "verify_header": "SSL-Client-Verify"}
    with (
        running(
            tmp_path / "proxy",
            targets_of(sagemaker),
            server={"trusted_proxies": ["127.0.0.1/32"]},
            sections={"certificates": headers},
            roles=[role],
            environ=sagemaker.environment(),
        ) as proxy,
        asking_nginx(tmp_path, authority, proxy.port) as port,
    ):
        arguments = (f"https://localhost:{port}", "--ca", str(authority.bundle), "--read-only")
        shown = ("--client-cert", str(certificate), "--client-key", str(key))
        done = validate(*arguments, *shown, folder=tmp_path)
        assert done.code == 0, done.report
        assert done.told("stranger").startswith("passed: 400 without a client certificate")
        assert "cert:CN=trainer by a client certificate, role trainer" in done.told("identity")
        without = validate(*arguments, folder=tmp_path)
        assert without.code == 1
        assert "--client-cert and --client-key" in without.told("health")
        whole = tmp_path / "whole.pem"
        whole.write_bytes(key.read_bytes() + certificate.read_bytes())
        assert validate(*arguments, "--client-cert", str(whole), folder=tmp_path).code == 0


# What is not well behind it


def test_a_target_that_is_away(tmp_path: Path) -> None:
    with running(tmp_path / "proxy", [target("prod", f"http://127.0.0.1:{free_port()}")]) as proxy:
        done = validate(f"http://127.0.0.1:{proxy.port}", folder=tmp_path)
    assert done.code == 1
    assert list(done.steps)[-1] == "may read"
    assert done.told("may read").startswith("failed: 502")
    assert "mlflow-proxy check" in done.told("may read")
    assert done.steps["may read"]["request_id"] in done.told("may read")


def test_a_stopped_server(site: Site, control: Control, tmp_path: Path) -> None:
    control("POST", "servers/tracking/stop")
    done = site.validate("writer", folder=tmp_path)
    assert done.code == 1
    assert "The target may be stopped" in done.told("may read")
    assert list(done.steps)[-1] == "may read"


def test_an_experiment_whose_making_was_not_answered(site: Site, control: Control, tmp_path: Path) -> None:
    before = site.made("tracking")
    control("POST", "faults", {"reset": "after", "path": "experiments/create", "requests": 1})
    done = site.validate("writer", folder=tmp_path)
    assert done.code == 1
    assert done.told("experiments/create").startswith("failed: 502")
    assert done.results["clean-up"] == "passed"
    new = {number: stage for number, stage in site.made("tracking").items() if number not in before}
    assert list(new.values()) == ["deleted"]


def test_an_experiment_that_was_never_made(site: Site, control: Control, tmp_path: Path) -> None:
    before = site.made("tracking")
    fault = {"status": 500, "error": "InternalFailure", "path": "experiments/create"}
    control("POST", "faults", fault)
    done = site.validate("writer", folder=tmp_path)
    assert done.code == 1
    assert re.match(r"passed: no experiment mlflow-proxy-validate-\S+ is there", done.told("clean-up"))
    assert site.made("tracking") == before


def test_clean_up_is_tried_again(site: Site, control: Control, tmp_path: Path) -> None:
    fault = {"status": 503, "error": "ServiceUnavailableException", "path": "experiments/delete", "requests": 1}
    control("POST", "faults", fault)
    done = site.validate("writer", folder=tmp_path)
    assert done.code == 0, done.report
    asked = [entry for entry in control("GET", "requests?last=50")["requests"] if "experiments/delete" in entry["path"]]
    assert len(asked) == 2
    assert site.left() == []


def test_a_run_that_could_not_be_deleted_goes_with_its_experiment(site: Site, control: Control, tmp_path: Path) -> None:
    fault = {"status": 500, "error": "InternalFailure", "path": "runs/set-tag|artifacts/list"}
    control("POST", "faults", fault)
    done = site.validate("writer", folder=tmp_path)
    assert done.code == 1
    assert done.results["artifacts/list"] == done.results["runs/set-tag"] == "failed"
    assert done.results["clean-up"] == "passed"
    assert site.left() == []


# Interrupted


class Underway:
    """A validation that runs on, and what it has printed."""

    def __init__(self, site: Site, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            # These tests may have been started with nohup.
            ["env", "--default-signal=HUP", COMMAND, "validate", "--url", site.url, "--ca", site.ca, *arguments],
            env=environment(folder, site.keys["writer"]),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()), daemon=True)
        self._reader.start()

    def wait_for(self, wanted: str) -> None:
        end = time.monotonic() + 60
        while not any(wanted in line for line in self.lines):
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < end, self.lines
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(60)
        self._reader.join(10)
        return code, "".join(self.lines)


@pytest.fixture
def underway(site: Site, tmp_path: Path) -> Iterator[Callable[..., Underway]]:
    started: list[Underway] = []

    def start(*arguments: str) -> Underway:
        started.append(Underway(site, tmp_path, *arguments))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait(10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_cleans_up(
    site: Site, control: Control, underway: Callable[..., Underway], number: signal.Signals
) -> None:
    control("POST", "faults", {"latency": 1.5, "path": "artifacts/list"})
    run = underway()
    run.wait_for("runs/create ")
    run.process.send_signal(number)
    code, printed = run.end()
    assert code == 128 + number
    assert "Traceback" not in printed + (run.process.stderr.read() if run.process.stderr else "")
    assert re.search(r"✓ clean-up .* is deleted", printed)
    assert "✓ artifacts/list" in printed  # the call under way may end
    assert "runs/set-tag" not in printed
    assert printed.endswith("Interrupted.\n")
    assert site.left() == []


def test_interrupted_twice_it_does_not_wait(site: Site, control: Control, underway: Callable[..., Underway]) -> None:
    control("POST", "faults", {"latency": 45.0, "path": "artifacts/list"})
    run = underway("--timeout", "90")
    run.wait_for("runs/create ")
    begin = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.process.stderr is not None
    assert "once more" in run.process.stderr.readline()
    run.process.send_signal(signal.SIGINT)
    code, printed = run.end()
    assert code == 130
    assert re.search(r"✓ clean-up .* is deleted", printed)
    assert time.monotonic() - begin < 45
    assert site.left() == []


def test_nobody_reads_on(site: Site, control: Control, tmp_path: Path) -> None:
    """As with `| head`: what was made is removed all the same."""
    before = site.made("tracking")
    control("POST", "faults", {"latency": 0.5, "path": "experiments/get"})
    process = subprocess.Popen(
        [COMMAND, "validate", "--url", site.url, "--ca", site.ca],
        env=environment(tmp_path, site.keys["writer"]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if "experiments/create" in line:
            break
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
    new = {number: stage for number, stage in site.made("tracking").items() if number not in before}
    assert list(new.values()) == ["deleted"]


# What is no proxy


def test_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<html>MLflow</html>")

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with imposter(Quiet) as url:
        done = validate(url, folder=tmp_path, key="mlp_any")
    assert done.code == 1
    assert done.told("health").startswith("failed: 404, with a web page → Something else than the proxy answers")
    assert list(done.steps)[-1] == "health"


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    [
        (503, b"<html><h1>503 Service Temporarily Unavailable</h1></html>", "no healthy host"),
        (502, b"<html><h1>502 Bad Gateway</h1></html>", "no healthy host"),
        (403, b"<html><h1>403 Forbidden</h1></html>", "web firewall"),
        (200, b"OK", "Something else than the proxy"),
        (200, b'["status", "ok"]', "Something else than the proxy"),
        (400, b"<html>400 No required SSL certificate was sent</html>", "--client-cert"),
        (400, b"<html>The plain HTTP request was sent to HTTPS port</html>", "https://"),
        (421, b'{"error_code": "BAD_REQUEST", "message": "no"}', "server.allowed_hosts"),
    ],
)
def test_what_stands_before_it_answers(tmp_path: Path, status: int, body: bytes, advice: str) -> None:
    with imposter(lambda handler: respond(handler, status, body, Content_Type="text/html")) as url:
        done = validate(url, folder=tmp_path, key="mlp_any")
    assert done.code == 1
    assert done.told("health").startswith(f"failed: {status}")
    assert advice in done.told("health")


def test_a_sign_in_that_takes_callers_for_browsers(tmp_path: Path) -> None:
    location = "https://login.example.com/authorize?state=do-not-show"
    with imposter(healthy(lambda handler: respond(handler, 302, Location=location))) as url:
        done = validate(url, folder=tmp_path, key="mlp_any")
    assert done.code == 1
    for step in ("stranger", "identity"):
        assert done.told(step).startswith("failed: 302: redirected to login.example.com → ")
        assert "OnUnauthenticatedRequest=allow" in done.told(step)
    assert "do-not-show" not in done.stdout
    assert list(done.steps)[-1] == "identity"


def test_a_key_goes_nowhere_else(tmp_path: Path) -> None:
    seen: list[str] = []
    with (
        imposter(lambda handler: seen.append(str(handler.headers)) or respond(handler, 200)) as other,  # type: ignore[func-returns-value]
        imposter(healthy(lambda handler: respond(handler, 307, Location=f"{other}/"))) as url,
    ):
        validate(url, folder=tmp_path, key="mlp_any")
    assert seen == []


@pytest.mark.parametrize("stage", ["connect", "head", "body"])
def test_a_server_that_hangs(tmp_path: Path, stage: str) -> None:
    """Or drips, so that something comes all the time."""
    over = threading.Event()

    def drip(peer: Peer, arrived: Arrived) -> None:
        if stage != "connect":
            peer.send(b"HTTP/1.1 200 OK\r\n" + (b"" if stage == "head" else b"Content-Length: 1000\r\n\r\n"))
            while not over.wait(0.05):
                peer.send(b"x")
        over.wait(60)

    upstream = Upstream()
    upstream.script = drip
    try:
        done = validate(f"http://127.0.0.1:{upstream.port}", "--timeout", "0.7", folder=tmp_path, key="mlp_any")
    finally:
        over.set()
        upstream.close()
    assert done.code == 2
    assert done.told("health").startswith("failed: no answer")


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\xff\x13garbage\n\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"],
)
def test_a_server_that_talks_nonsense(tmp_path: Path, garbage: bytes) -> None:
    upstream = Upstream()

    def script(peer: Peer, arrived: Arrived) -> None:
        peer.send(garbage)
        peer.close()

    upstream.script = script
    try:
        done = validate(f"http://127.0.0.1:{upstream.port}", folder=tmp_path, key="mlp_any")
    finally:
        upstream.close()
    assert done.code in (1, 2)
    assert done.results["health"] == "failed"


def test_answers_without_end_or_sense(tmp_path: Path) -> None:
    """JSON of the wrong shape at every step, a body without end, and signs that a terminal would obey."""
    bodies = [b"[]", b"[" * 100_000, b'{"targets": {"x": 1}}', b'{"targets": {}, "roles": 7}', b"null", b"\xff\xfe"]
    for body in bodies:
        with imposter(healthy(lambda handler, body=body: respond(handler, 200, body))) as url:  # type: ignore[misc]
            done = validate(url, folder=tmp_path, key="mlp_any")
        assert done.code == 1
        assert done.results["identity"] == "failed"

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while True:
                handler.wfile.write(b"\x1b]0;title\x07" * 1000)

    with imposter(endless) as url:
        done = validate(url, folder=tmp_path, key="mlp_any")
    assert done.code == 1

    evil = json.dumps({"error_code": "X", "message": "\x1b[2Jgone\r\nmlp_any " + "long " * 1000})
    with imposter(healthy(lambda handler: respond(handler, 400, evil.encode(), X_Request_Id="\x1b[1mid"))) as url:
        shown = in_process("--url", url, folder=tmp_path, key="mlp_any")
        parsed = validate(url, folder=tmp_path, key="mlp_any")
    for step in parsed.report["steps"]:
        assert all(str(step[name]).isprintable() for name in ("found", "advice", "request_id"))
    assert parsed.steps["identity"]["request_id"] == "[1mid"
    assert shown.returncode == 1
    assert "gone" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "mlp_any" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) < 600


def test_an_mlflow_without_proxy(sagemaker: LocalSageMaker, control: Control, tmp_path: Path) -> None:
    done = validate(sagemaker.mlflow_urls["tracking"], folder=tmp_path)
    assert done.code == 1
    assert list(done.steps)[-1] == "health"


def test_wrong_answers_to_the_seven_calls(tmp_path: Path) -> None:
    """What answers is somehow a proxy, but not MLflow."""
    who = {"caller": "key:a", "way": "key", "roles": ["a"], "targets": {"x": {"default": True, "mode": "mlflow-app"}}}

    def odd(handler: BaseHTTPRequestHandler) -> None:
        body: Any = who if handler.path == "/-/whoami" else {"experiments": 7, "run": [], "experiment": "x"}
        respond(handler, 200, json.dumps(body).encode(), Content_Type="application/json")

    with imposter(healthy(odd)) as url:
        done = validate(url, folder=tmp_path, key="mlp_any")
    assert done.code == 1
    for step in ("experiments/create", "experiments/search", "clean-up"):
        assert done.results[step] == "failed", done.report
    assert "whether the experiment mlflow-proxy-validate-" in done.told("clean-up")


# Waiting


def test_it_waits_for_a_deployment(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["--url", f"http://127.0.0.1:{port}", "--wait", "60", "--output", "json"]
    process = subprocess.Popen(
        [COMMAND, "validate", *arguments],
        env=environment(tmp_path, None),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert re.match(
            rf"waiting for http://127.0.0.1:{port}: connection refused \(\d+ of 60 s\)", process.stderr.readline()
        )
        starting = [503, 200]

        def slowly(handler: BaseHTTPRequestHandler) -> None:
            status = starting.pop(0) if len(starting) > 1 else starting[0]
            respond(handler, status, b'{"status": "ok"}' if status == 200 else b"<html>")

        with imposter(slowly, port):
            assert "503 from what stands before it" in process.stderr.readline()
            stdout, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
    steps = {step["name"]: step["result"] for step in json.loads(stdout)["steps"]}
    assert steps["health"] == "passed"


def test_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    done = validate(f"http://127.0.0.1:{free_port()}", "--wait", "0.5", folder=tmp_path)
    assert done.code == 2
    assert "connection refused" in done.stderr


def test_a_certificate_is_not_waited_for(site: Site, tmp_path: Path) -> None:
    done = validate(site.url, "--wait", "600", folder=tmp_path)
    assert done.code == 2
    assert done.stderr == ""


def test_interrupted_while_waiting(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "validate", "--url", f"http://127.0.0.1:{free_port()}", "--wait", "600"],
        env=environment(tmp_path, None),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stdout.endswith("Interrupted.\n")


# On a terminal


def on_a_terminal(*arguments: str, folder: Path, key: str) -> str:
    """What a person sees, in a terminal of its own; nobody types anything."""
    asked = shlex.join([COMMAND, "validate", *arguments])
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", asked, "/dev/null"],
        env={**environment(folder, key), "TERM": "xterm", "SHELL": "/bin/sh"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.stdout.decode("utf-8")


def test_steps_are_shown_while_they_run(site: Site, tmp_path: Path) -> None:
    seen = on_a_terminal("--url", site.url, "--ca", site.ca, "--read-only", folder=tmp_path, key=site.keys["reader"])
    for name in ALL:
        assert re.search(rf"  … {name}\r\x1b\[K  \x1b\[\d+m[✓?-]\x1b\[0m {name} ", seen), seen


def test_nobody_is_asked_for_a_password(tmp_path: Path, locked: Path) -> None:
    seen = on_a_terminal("--url", "https://x", "--client-cert", str(locked), folder=tmp_path, key="mlp_any")
    assert "without a password" in re.sub(r"\s+", " ", seen)
    assert "pass phrase" not in seen


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        ([], {}, "--url"),
        (["--url", "mlflow.example.com"], {}, "https://mlflow.example.com"),
        (["--url", "ftp://x"], {}, "not an address of a proxy"),
        (["--url", "https://"], {}, "not an address of a proxy"),
        (["--url", "https://x:port"], {}, "not a URL"),
        (["--url", "https://[::1"], {}, "not a URL"),
        (["--url", "https://x/-/"], {}, "has a path that begins with /-"),
        (["--url", "https://x/t/"], {}, "has a path that begins with /t"),
        (["--url", "https://x/a/../b"], {}, "with a plain path at the most"),
        (["--url", "https://x/mlflow/t/a/b"], {}, "'a/b' is not the name of a target"),
        (["--url", "https://x/t/a/b"], {}, "'a/b' is not the name of a target"),
        (["--url", "https://x/t/a", "--target", "b"], {}, "give one"),
        (["--url", "https://x", "--target", "../-"], {}, "not the name of a target"),
        (["--url", "https://x?y"], {}, "query"),
        (["--url", "https://user:s3cret@x"], {}, "holds a password"),
        (["--url", "https://x y"], {}, "not an address of a proxy"),
        (["--url", "http://10.0.0.7"], {KEY_VARIABLE: "mlp_s3cret"}, "must not travel in the clear"),
        (["--url", "http://mlflow.example.com"], {TOKEN_VARIABLE: "s3cret"}, "must not travel in the clear"),
        (["--url", "https://x"], {KEY_VARIABLE: "a s3cret"}, "something else than one key"),
        (["--url", "https://x"], {KEY_VARIABLE: " "}, f"{KEY_VARIABLE} is empty"),
        (["--url", "https://x"], {TOKEN_VARIABLE: "s3crét"}, "something else than one key"),
        (["--url", "https://x", "--key-file", "/none"], {}, "/none"),
        (["--url", "https://x", "--key-file", "{empty}"], {}, "--key-file is empty"),
        (["--url", "https://x", "--key-file", "{binary}"], {}, "not text"),
        (["--url", "https://x", "--key-file", "{text}", "--token-file", "{text}"], {}, "exclude each other"),
        (["--url", "https://x", "--ca", "{text}"], {}, "not a PEM file"),
        (["--url", "https://x", "--ca", "/none"], {}, "/none"),
        (["--url", "https://x", "--client-key", "{text}"], {}, "needs --client-cert"),
        (["--url", "https://x", "--client-cert", "{text}"], {}, "not a certificate and its key"),
        (["--url", "https://x", "--client-cert", "{locked}"], {}, "without a password"),
        (["--url", "https://x", "--timeout", "0"], {}, "--timeout"),
        (["--url", "https://x", "--output", "xml"], {}, "--output"),
    ],
)
def test_mistakes_are_exit_code_2(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], says: str, locked: Path
) -> None:
    files = {name: tmp_path / name for name in ("empty", "binary", "text")} | {"locked": locked}
    files["empty"].write_text("\n")
    files["binary"].write_bytes(b"\xff\xfe\x00s3cret")
    files["text"].write_text("s3cret")
    given = [argument.format(**files) if argument.startswith("{") else argument for argument in arguments]
    absent = {KEY_VARIABLE: None, TOKEN_VARIABLE: None}
    done = CliRunner().invoke(cli.main, ["validate", *given], env={**absent, **environ})
    assert done.exit_code == 2, done.output
    assert says in re.sub(r"\s+", " ", done.output)
    assert "s3cret" not in done.output


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate with a key that has a password, which nobody is asked for."""
    folder = tmp_path_factory.mktemp("locked")
    certificate, key_file = Authority(folder, "ours").issue("trainer")
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    whole = folder / "locked.pem"
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    whole.write_bytes(encrypted + certificate.read_bytes())
    return whole


@pytest.mark.parametrize(
    ("url", "origin", "whole"),
    [
        ("https://x", "https://x", "https://x"),
        ("https://x:443/", "https://x", "https://x"),
        ("https://x:8443/t/a/", "https://x:8443", "https://x:8443/t/a"),
        ("http://[::1]:8080", "http://[::1]:8080", "http://[::1]:8080"),
        ("https://X/t/a", "https://x", "https://x/t/a"),
        ("https://x/mlflow/", "https://x", "https://x/mlflow"),
        ("https://x/ml/flow/t/a/", "https://x", "https://x/ml/flow/t/a"),
        ("http://localhost", "http://localhost", "http://localhost"),
    ],
)
def test_addresses(url: str, origin: str, whole: str) -> None:
    found = deployment(url, environ={KEY_VARIABLE: "mlp_s3cret"})
    assert (found.origin, found.url) == (origin, whole)
    assert "s3cret" not in repr(found)


def test_it_needs_no_extra_and_no_aws() -> None:
    heavy = ["mlflow", "moto", "boto3", "botocore", "aiohttp", "uvloop"]
    script = f"import sys, mlflow_proxy.cli, mlflow_proxy.validate; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_key_is_no_argument() -> None:
    parameters = {name for parameter in cli.main.commands["validate"].params for name in parameter.opts}
    assert {"--key", "--token", "--password"} & parameters == set()
    with pytest.raises(Mistake):
        deployment("http://10.0.0.1", key="mlp_x", environ={})


# The page


def test_the_page_shows_what_is_printed() -> None:
    text = PAGE.read_text("utf-8")
    sample = text.split("```text\n", 1)[1].split("```", 1)[0]
    assert [name.strip() for name in re.findall(r"^  [✓✗?-] (.{18}) ", sample, re.MULTILINE)] == ALL
    steps = Steps(Deployment("https", "x", 443), read_only=False)
    assert [row.name for row in (*steps.reach, *steps.rules, *steps.calls, steps.clean_up, *steps.ui)] == ALL
    table = text.split("\n## The steps\n", 1)[1].split("\n## ", 1)[0]
    named = [
        name for row in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    ]
    assert named == ALL
    listed = set(re.findall(r"`(--[a-z-]+)", text.split("\n## Options\n", 1)[1].split("\n## ", 1)[0]))
    parameters = {name for parameter in cli.main.commands["validate"].params for name in parameter.opts}
    assert listed == parameters
