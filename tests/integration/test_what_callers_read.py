"""What goes wrong on the proxy's side: callers get a sentence and a request id, and the operator's log the reason."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, Table, free_port, running
from tests.faults.upstreams import Arrived, Peer, Upstream, answer, answers
from tests.integration.conftest import NO_KEYS, Control

from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker

MODES = ("tracking", "app")
# Whatever the failure: AWS's names, this network's addresses, this machine's files and variables, and exceptions.
INSIDES = (
    *("arn:", "111122223333", "444455556666", "assumed-role", "developer", "demo-external-id", "AKIA", "ASIA"),
    *("trust policy", "external_id", "assume_role_arn", "127.0.0.1:", "localhost:", ".invalid", ".aws", "AWS_"),
    *("Traceback", "Error:", "rrno", "botocore", "no-such-profile", "aws sso login", "mlflow-proxy check"),
)


@dataclass
class Stage:
    """A proxy, an upstream that tests script, and a key of each role."""

    proxy: Proxy
    upstream: Upstream
    keys: Mapping[str, str]

    def ask(self, caller: str, path: str, method: str = "GET") -> requests.Response:
        token = self.keys.get(caller, caller)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        body = b'{"max_results": 1}' if method == "POST" else None
        url = f"http://127.0.0.1:{self.proxy.port}{path}"
        return requests.request(method, url, headers=headers, data=body, timeout=60, allow_redirects=False)

    def search(self, caller: str, target: str) -> requests.Response:
        return self.ask(caller, f"/t/{target}/api/2.0/mlflow/experiments/search", "POST")

    def assert_tells_little(self, got: requests.Response, status: int, *reason: str) -> None:
        """The caller reads none of the reason, and none of what is inside; the log line of the same id has it."""
        assert got.status_code == status, got.text
        assert got.json()["request_id"] == got.headers["x-request-id"]
        error = self.proxy.log_line(got.headers["x-request-id"])["error"]
        for words in reason:
            assert words in error
        assert_free_of(got, *reason, *INSIDES, str(self.proxy.folder))

    def assert_leads_to_the_log(self, got: requests.Response, status: int, *reason: str) -> None:
        """The same, and the message says so: MLflow's client shows nothing else of the body."""
        self.assert_tells_little(got, status, *reason)
        assert f"in its log, under the request id {got.headers['x-request-id']}." in got.json()["message"]


def assert_free_of(got: requests.Response, *words: str) -> None:
    read = "\n".join([got.text, *(f"{name}: {value}" for name, value in got.headers.items())])
    assert [word for word in words if word in read] == []


def keys_of(folder: Path, *roles: str) -> dict[str, str]:
    made = {role: make_key(role, role, created=datetime.now(UTC), expires=None) for role in roles}
    (folder / "keys").write_text("".join(f"{json.dumps(record.fields())}\n" for _, record in made.values()))
    return {role: key for role, (key, _) in made.items()}


def both(sagemaker: LocalSageMaker, name: str, **options: Any) -> list[Table]:
    """A target of each mode: `<name>-tracking` and `<name>-app`."""
    arns = {"tracking": sagemaker.tracking_arn, "app": sagemaker.app_arn}
    return [{"endpoint": sagemaker.endpoint, "name": f"{name}-{mode}", "arn": arns[mode], **options} for mode in MODES]


READER = {"name": "reader", "targets": ["*"], "allow": ["Search*", "Get*", "CreatePresigned*"]}


@pytest.fixture(scope="module")
def stage(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("read")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    plain, tls = Upstream(), Upstream(theirs.server("localhost"))
    targets = [
        *both(sagemaker, "good"),
        *both(sagemaker, "denied", assume_role_arn=sagemaker.roles["cross-account"], external_id="somebody-elses"),
        *both(sagemaker, "powerless", assume_role_arn=sagemaker.roles["nothing"]),
        *both(sagemaker, "closed", endpoint=f"http://127.0.0.1:{free_port()}"),
        *both(sagemaker, "nameless", endpoint="https://vpce-0abc.invalid"),
        *both(sagemaker, "untrusted", endpoint=f"https://localhost:{tls.port}", ca_bundle=str(ours.bundle)),
        *both(sagemaker, "scripted", endpoint=f"http://127.0.0.1:{plain.port}"),
    ]
    signer = {**READER, "name": "tagged", "assume_role_arn": sagemaker.roles["untagged"], "session_tags": True}
    fleeting = {**READER, "name": "fleeting", "assume_role_arn": sagemaker.roles["reader"]}
    keys = keys_of(folder, "reader", "tagged", "fleeting", "operator")
    with running(
        folder / "proxy",
        targets,
        upstream={"retries": 0, "first_byte_timeout": 1},
        sections={"access": {"keys_file": str(folder / "keys")}},
        roles=[READER, signer, fleeting, {"name": "operator", "targets": ["*"], "allow": ["*"]}],
        environ=sagemaker.environment(),
    ) as proxy:
        yield Stage(proxy, plain, keys)
    plain.close()
    tls.close()


@pytest.mark.parametrize("mode", MODES)
class TestBothModes:
    def test_a_targets_role_that_sts_denies(self, stage: Stage, sagemaker: LocalSageMaker, mode: str) -> None:
        reason = ("sts:AssumeRole", sagemaker.roles["cross-account"], "user/developer", "trust policy", "external_id")
        stage.assert_leads_to_the_log(stage.search("reader", f"denied-{mode}"), 501, *reason)
        stage.assert_leads_to_the_log(stage.ask("reader", f"/-/ui/denied-{mode}"), 501, *reason)

    def test_a_callers_role_that_sts_denies(self, stage: Stage, sagemaker: LocalSageMaker, mode: str) -> None:
        reason = ("sts:TagSession", sagemaker.roles["untagged"], "user/developer", "trust policy")
        stage.assert_leads_to_the_log(stage.search("tagged", f"good-{mode}"), 501, *reason)
        stage.assert_leads_to_the_log(stage.ask("tagged", f"/-/ui/good-{mode}", "POST"), 501, *reason)

    def test_sts_throttles(self, stage: Stage, control: Control, mode: str) -> None:
        control("POST", "faults", {"plane": "sts", "throttle": 400})
        got = stage.search("fleeting", f"good-{mode}")
        stage.assert_leads_to_the_log(got, 503, "sts:AssumeRole for role arn:", "Throttling")
        assert got.headers["retry-after"] == "5"

    def test_sagemaker_denies_the_proxys_identity(self, stage: Stage, sagemaker: LocalSageMaker, mode: str) -> None:
        arn = sagemaker.tracking_arn if mode == "tracking" else sagemaker.app_arn
        got = stage.search("reader", f"powerless-{mode}")
        reason = ("assumed-role/nothing/", f"is not authorized to perform: {_ACTIONS[mode]}", arn, "Grant the action")
        stage.assert_leads_to_the_log(got, 403, *reason)
        assert "AccessDeniedException" in got.json()["message"]

    def test_a_link_that_sagemaker_denies(self, stage: Stage, sagemaker: LocalSageMaker, mode: str) -> None:
        arn = sagemaker.tracking_arn if mode == "tracking" else sagemaker.app_arn
        got = stage.ask("reader", f"/-/ui/powerless-{mode}")
        stage.assert_leads_to_the_log(got, 403, f"allow it on {arn}", "assumed-role/nothing/")

    def test_nobody_listens(self, stage: Stage, mode: str) -> None:
        stage.assert_leads_to_the_log(stage.search("reader", f"closed-{mode}"), 502, "127.0.0.1:")

    def test_a_name_that_does_not_exist(self, stage: Stage, mode: str) -> None:
        got = stage.search("reader", f"nameless-{mode}")
        stage.assert_leads_to_the_log(got, 501, "vpce-0abc.invalid cannot be reached: its name")

    def test_a_certificate_that_is_not_trusted(self, stage: Stage, mode: str) -> None:
        stage.assert_leads_to_the_log(
            stage.search("reader", f"untrusted-{mode}"), 501, "localhost:", "local issuer certificate"
        )

    def test_silence(self, stage: Stage, mode: str) -> None:
        def silent(peer: Peer, _: Arrived) -> None:
            peer.wait_closed(20)
            peer.close()

        stage.upstream.script = silent
        got = stage.search("reader", f"scripted-{mode}")
        stage.assert_tells_little(got, 504, f"127.0.0.1:{stage.upstream.port} gave no answer within 1 s")

    def test_no_http(self, stage: Stage, mode: str) -> None:
        stage.upstream.script = answers(b"SSH-2.0-OpenSSH_9.2 bastion.internal\r\n", close=True)
        got = stage.search("reader", f"scripted-{mode}")
        stage.assert_leads_to_the_log(got, 502, f"127.0.0.1:{stage.upstream.port} broke off: not a valid HTTP answer (")


_ACTIONS = {"tracking": "sagemaker-mlflow:SearchExperiments", "app": "sagemaker:CallMlflowAppApi"}
_PRINCIPAL = "arn:aws:sts::111122223333:assumed-role/proxy-host/i-0abc"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 503])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("AccessDeniedException", f"User: {_PRINCIPAL} is not authorized to perform this with an explicit deny"),
        ("UnrecognizedClientException", f"The security token of {_PRINCIPAL} included in the request is invalid."),
        ("InvalidSignatureException", "The AWS Access Key Id AKIAIOSFODNN7EXAMPLE does not match its secret"),
        ("ExpiredTokenException", f"The security token of {_PRINCIPAL} is expired"),
        ("ResourceNotFoundException", "arn:aws:sagemaker:us-east-1:111122223333:mlflow-app/x does not exist"),
        ("SomethingNew", f"Whatever it is, {_PRINCIPAL} has to do with it"),
        (_PRINCIPAL, "As its own type"),
    ],
)
def test_whatever_aws_says_stays_in_the_log(stage: Stage, status: int, kind: str, text: str) -> None:
    body = json.dumps({"message": text}).encode()
    headers = (f"x-amzn-ErrorType: {kind}", f"x-amzn-principal: {_PRINCIPAL}", f"x-proxied-for: {_PRINCIPAL}")
    stage.upstream.script = answers(answer(body, f"{status} Oops", *headers))
    stage.assert_leads_to_the_log(stage.search("reader", "scripted-tracking"), status, text)


@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_mlflows_own_errors_pass_unchanged(stage: Stage, status: int) -> None:
    body = b'{"error_code": "PERMISSION_DENIED",  "message": "Permission denied for arn:aws:iam::1:role/in-a-run"}\n'
    stage.upstream.script = answers(answer(body, f"{status} Oops"))
    got = stage.search("reader", "scripted-tracking")
    assert (got.status_code, got.content) == (status, body)


def test_the_overview_and_readiness(stage: Stage, sagemaker: LocalSageMaker) -> None:
    stage.upstream.script = answers(answer(b'{"message": "no"}', "403 No", f"x-amzn-ErrorType: {_PRINCIPAL}"))
    end = time.monotonic() + 30
    while 'http-equiv="refresh"' in (page := stage.ask("reader", "/-/")).text:  # not all targets were measured yet
        assert time.monotonic() < end
        time.sleep(0.1)
    assert page.status_code == 200
    assert "trying again will not help" in page.text
    own_address = page.text.replace(f"http://127.0.0.1:{stage.proxy.port}/", "")
    assert [words for words in INSIDES if words in own_address] == []
    stage.assert_tells_little(stage.ask("reader", "/-/ready"), 403)
    stage.assert_tells_little(stage.ask("nobody", "/-/ready"), 401)
    whole = stage.ask("operator", "/-/ready")
    assert whole.status_code == 503
    reasons = {name: state["reason"] for name, state in whole.json()["targets"].items()}
    assert sagemaker.roles["cross-account"] in reasons["denied-app"]
    assert "assumed-role/nothing/" in reasons["powerless-tracking"]
    assert sagemaker.roles["cross-account"] in stage.ask("operator", "/-/").text
    line = stage.proxy.log_line(whole.headers["x-request-id"])
    assert f"denied-tracking: {reasons['denied-tracking']}"[:200] in line["error"]


def test_an_outgoing_proxy_that_refuses(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    outgoing = Upstream()
    outgoing.script = answers(answer(b"ask alice", "407 Proxy Authentication Required by squid.internal"), close=True)
    keys = keys_of(tmp_path, "reader")
    with running(
        tmp_path / "proxy",
        both(sagemaker, "far", endpoint="https://mlflow.example.invalid"),
        upstream={"retries": 0, "proxy": f"http://user:secret@127.0.0.1:{outgoing.port}"},
        sections={"access": {"keys_file": str(tmp_path / "keys")}},
        roles=[READER],
        environ=sagemaker.environment(),
    ) as proxy:
        stage = Stage(proxy, outgoing, keys)
        for mode in MODES:
            got = stage.search("reader", f"far-{mode}")
            stage.assert_leads_to_the_log(got, 501, "squid.internal", "mlflow.example.invalid")
            assert "secret" not in proxy.log_line(got.headers["x-request-id"])["error"]
    outgoing.close()


def test_without_a_request_log_the_reason_is_in_the_programs_own(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    targets = both(sagemaker, "closed", endpoint=f"http://127.0.0.1:{free_port()}")
    with running(tmp_path / "proxy", targets, sections={"log": {"requests": False}}) as proxy:
        got = Stage(proxy, Upstream(), {}).search("anybody", "closed-app")
        assert got.status_code == 502
    (line,) = [line for line in proxy.stderr.read_text().splitlines() if got.headers["x-request-id"] in line]
    assert "127.0.0.1:" in line


def test_nothing_around_the_proxy_works(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    """No profile of the name that is configured; the identity provider and the shared storage are down."""
    keys = keys_of(tmp_path, "reader", "counted")
    gone, away = free_port(), free_port()
    with running(
        tmp_path / "proxy",
        both(sagemaker, "any"),
        sections={
            "aws": {"profile": "no-such-profile"},
            "access": {"keys_file": str(tmp_path / "keys")},
            "oidc": {"issuer": f"http://127.0.0.1:{gone}", "audience": ["mlflow"]},
            "limits": {"storage": f"redis://:hush@127.0.0.1:{away}/0", "storage_away": "closed"},
        },
        roles=[READER, {**READER, "name": "counted", "rate": "10/second"}],
        environ={**sagemaker.environment(), **NO_KEYS},
    ) as proxy:
        stage = Stage(proxy, Upstream(), keys)
        for mode in MODES:
            stage.assert_leads_to_the_log(
                stage.search("reader", f"any-{mode}"), 501, "no-such-profile", "~/.aws/config"
            )
            stage.assert_tells_little(stage.search("counted", f"any-{mode}"), 503)
            stage.assert_tells_little(stage.search(_TOKEN, f"any-{mode}"), 503, f"keys of http://127.0.0.1:{gone}")
        assert "hush" not in proxy.stdout.read_text() + proxy.stderr.read_text()


# `{"alg": "RS256", "kid": "a"}` and `{"iss": …}` of any signature: what it says is not looked at without keys.
_TOKEN = "eyJhbGciOiAiUlMyNTYiLCAia2lkIjogImEifQ.eyJpc3MiOiAieCJ9.AAAA"
