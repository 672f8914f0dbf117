"""`mlflow-proxy check` for what a configuration says of callers: each thing tried as the service would use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.access.provider import Issuer, MockProvider, mock_provider
from tests.faults.proxies import free_port
from tests.integration.conftest import targets_of
from tests.integration.test_commands import config, run
from tests.limits.servers import RedisServer

from mlflow_proxy.access.key_file import change_keys
from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker


@pytest.fixture
def oidc() -> Iterator[MockProvider]:
    with mock_provider() as running:
        yield running


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


def keys_file(folder: Path, role: str, days: int = 1) -> Path:
    now = datetime.now(UTC)
    with change_keys(folder / "keys.jsonl", create=True) as kept:
        kept.append(make_key("ci", role, created=now, expires=now + timedelta(days=days))[1])
    return folder / "keys.jsonl"


def checked(folder: Path, sagemaker: LocalSageMaker, text: str) -> tuple[int, str]:
    path = config(folder, [targets_of(sagemaker)[0]], text)
    done = run(folder, "check", "-c", str(path), environ=sagemaker.environment())
    return done.returncode, done.stdout + done.stderr


def mark(output: str, step: str) -> str:
    found = re.search(rf"^  (.) {re.escape(step)} ", output, re.MULTILINE)
    assert found is not None, output
    return found[1]


def test_keys_over_plain_http(tmp_path: Path, sagemaker: LocalSageMaker) -> None:
    """It works, and is worth a look."""
    server = '[server]\nhost = "0.0.0.0"\n'
    access = f'[access]\nkeys_file = "{keys_file(tmp_path, "writer")}"\n'
    roles = '[[roles]]\nname = "writer"\ntargets = ["*"]\nallow = ["*"]\n'
    code, output = checked(tmp_path, sagemaker, server + access + roles)
    assert code == 0, output
    assert mark(output, "exposure") == "?"
    assert "server.trusted_proxies" in output


def test_all_is_well(tmp_path: Path, sagemaker: LocalSageMaker, oidc: MockProvider, redis: RedisServer) -> None:
    code, output = checked(
        tmp_path,
        sagemaker,
        f"""
[access]
keys_file = "{keys_file(tmp_path, "writer")}"
[oidc]
issuer = "{oidc.issuer}"
audience = ["mlflow"]
[limits]
storage = "{redis.url}"
[[roles]]
name = "writer"
targets = ["*"]
allow = ["*"]
assume_role_arn = "{sagemaker.roles["writer"]}"
session_tags = true
""",
    )
    assert code == 0, output
    for step in ("keys file", "OIDC provider", "role writer", "limits", "credentials"):
        assert mark(output, step) == "✓"
    assert "1 active API key\n" in output


def test_all_is_wrong(tmp_path: Path, sagemaker: LocalSageMaker) -> None:
    code, output = checked(
        tmp_path,
        sagemaker,
        f"""
[access]
keys_file = "{keys_file(tmp_path, "gone")}"
[oidc]
issuer = "http://127.0.0.1:{free_port()}"
audience = ["mlflow"]
[limits]
storage = "redis://127.0.0.1:{free_port()}"
[[roles]]
name = "writer"
targets = ["*"]
allow = ["*"]
assume_role_arn = "{sagemaker.roles["untagged"]}"
session_tags = true
""",
    )
    assert code == 1, output
    for step in ("keys file", "OIDC provider", "role writer", "limits"):
        assert mark(output, step) == "✗"
    assert "roles that [[roles]] does not have: gone" in output
    assert "sts:TagSession" in output
    assert mark(output, "credentials") == "✓"


def test_a_provider_whose_keys_are_at_an_address_of_their_own(tmp_path: Path, sagemaker: LocalSageMaker) -> None:
    """It needs no discovery, but where people sign in."""
    with Issuer() as issuer:
        del issuer.answers["/.well-known/openid-configuration"]
        oidc = f'[oidc]\nissuer = "{issuer.url}"\naudience = ["mlflow"]\njwks_url = "{issuer.url}/jwks"\n'
        roles = '[[roles]]\nname = "writer"\ntargets = ["*"]\nallow = ["*"]\n'
        code, output = checked(tmp_path, sagemaker, oidc + roles)
        assert (code, mark(output, "OIDC provider")) == (0, "✓"), output
        code, output = checked(tmp_path, sagemaker, f'{oidc}client_id = "mlflow"\n{roles}')
        assert (code, mark(output, "OIDC provider")) == (1, "✗"), output
        assert "/.well-known/openid-configuration answers 404" in output


def test_no_key_yet(tmp_path: Path, sagemaker: LocalSageMaker) -> None:
    path = keys_file(tmp_path, "writer", days=-1)
    roles = '[[roles]]\nname = "writer"\ntargets = ["*"]\nallow = ["*"]\n'
    code, output = checked(tmp_path, sagemaker, f'[access]\nkeys_file = "{path}"\n{roles}')
    assert (code, mark(output, "keys file")) == (0, "?")
    assert "mlflow-proxy keys new" in output
    path.unlink()
    code, output = checked(tmp_path, sagemaker, f'[access]\nkeys_file = "{path}"\n{roles}')
    assert (code, mark(output, "keys file")) == (1, "✗")
    assert "does not exist" in output
