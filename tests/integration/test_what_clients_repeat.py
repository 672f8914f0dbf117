"""MLflow's own client shows at once what only the operator can mend, and repeats what passes by itself.

Its defaults are in force: seven repetitions of 408, 429, 500, 502, 503 and 504, after which it hides the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import RestException
from mlflow.tracking import MlflowClient
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, Table, running
from tests.faults.upstreams import Upstream
from tests.integration.conftest import NO_KEYS, Control, Start

from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker


def requests_at(proxy: Proxy, count: int) -> list[Mapping[str, Any]]:
    """The lines of its request log, once there are `count` of them at least."""
    end = time.monotonic() + 10
    while len(lines := proxy.stdout.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
    return [json.loads(line) for line in lines]


def assert_shown_at_once(proxy: Proxy, target: str) -> None:
    """One request, and its id and reason in the exception that a program's log ends with."""
    client = MlflowClient(f"http://127.0.0.1:{proxy.port}/t/{target}")
    before = len(proxy.stdout.read_text().splitlines())
    with pytest.raises(RestException) as caught:
        client.search_experiments()
    (line,) = requests_at(proxy, before + 1)[before:]
    assert line["status"] == 501
    assert "trying again will not help" in str(caught.value)
    assert f"under the request id {line['request_id']}" in str(caught.value)
    assert caught.value.error_code == "INVALID_STATE"


MODES = ("tracking", "app")


def arns(sagemaker: LocalSageMaker) -> dict[str, str]:
    return dict(zip(MODES, (sagemaker.tracking_arn, sagemaker.app_arn), strict=True))


@pytest.fixture(scope="module")
def misconfigured(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("misconfigured")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    upstream = Upstream(theirs.server("localhost"))
    abroad = sagemaker.roles["cross-account"]
    faults: dict[str, dict[str, Any]] = {
        "denied": {"assume_role_arn": abroad, "external_id": "somebody-elses"},
        "no-role": {"assume_role_arn": f"{abroad}-with-a-typo"},
        "no-name": {"endpoint": "https://no-such-host.invalid"},
        "untrusted": {"endpoint": f"https://localhost:{upstream.port}", "ca_bundle": str(ours.bundle)},
    }
    targets: list[Table] = [
        {"endpoint": sagemaker.endpoint, "name": f"{name}-{mode}", "arn": arn, **options}
        for name, options in faults.items()
        for mode, arn in arns(sagemaker).items()
    ]
    with running(folder / "proxy", targets, environ=sagemaker.environment()) as proxy:
        yield proxy
    upstream.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["denied", "no-role", "no-name", "untrusted"])
def test_a_target_that_is_set_up_wrongly(misconfigured: Proxy, fault: str, mode: str) -> None:
    assert_shown_at_once(misconfigured, f"{fault}-{mode}")


@pytest.mark.parametrize(
    "environ",
    [
        {"AWS_SECRET_ACCESS_KEY": "somebody-elses"},
        {"AWS_ACCESS_KEY_ID": "AKIAUNKNOWNEXAMPLE00"},
        NO_KEYS,
        {**NO_KEYS, "AWS_PROFILE": "no-such-profile"},
        {**NO_KEYS, "AWS_CONFIG_FILE": "/dev/null", "AWS_WEB_IDENTITY_TOKEN_FILE": "/none", "AWS_ROLE_ARN": "{role}"},
    ],
    ids=["wrong secret", "unknown key", "no credentials", "no profile", "no token file"],
)
def test_an_aws_identity_that_is_set_up_wrongly(
    sagemaker: LocalSageMaker, start: Start, environ: Mapping[str, str]
) -> None:
    role = {"assume_role_arn": sagemaker.roles["reader"]}
    given = {name: value.format(role=role["assume_role_arn"]) for name, value in environ.items()}
    proxy = start({**sagemaker.environment(), **given}, {"tracking": role, "app": role})
    for mode in MODES:
        assert_shown_at_once(proxy, mode)


def test_what_passes_is_repeated_until_it_has_passed(
    sagemaker: LocalSageMaker, control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STS throttles both attempts to open the caller's session, then SageMaker throttles for longer than the proxy."""
    key, record = make_key("trainer", "trainer", created=datetime.now(UTC), expires=None)
    (tmp_path / "keys").write_text(f"{json.dumps(record.fields())}\n")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", key)
    trainer = {"name": "trainer", "targets": ["*"], "allow": ["*"], "assume_role_arn": sagemaker.roles["writer"]}
    with running(
        tmp_path / "proxy",
        [{"name": mode, "arn": arn, "endpoint": sagemaker.endpoint} for mode, arn in arns(sagemaker).items()],
        sections={"access": {"keys_file": str(tmp_path / "keys")}},
        roles=[trainer],
        environ=sagemaker.environment(),
    ) as proxy:
        for mode, fault in (("tracking", {"plane": "sts", "requests": 2}), ("app", {"plane": "mlflow", "requests": 3})):
            control("POST", "faults", {**fault, "throttle": 400})
            assert MlflowClient(f"http://127.0.0.1:{proxy.port}/t/{mode}").search_experiments()
        statuses = [line["status"] for line in requests_at(proxy, 4)]
    assert statuses == [503, 200, 429, 200]
