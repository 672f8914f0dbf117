"""The setting `proxy_options`: it reaches hosts and tasks alike, and what cannot work is told at synthesis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from infra.proxy_options import REFUSED
from infra.settings import SettingsError, load
from tests.infra.test_proxy_configuration import of_host, of_task
from tests.infra.variants import CLIENT_CERTIFICATES, IMAGE, SIGN_IN, TLS, settings, synthesize

from mlflow_proxy.options import options

GIVEN = """
[oidc]
issuer = "https://login.example.com"
audience = ["mlflow"]
groups_claim = "groups"
required_claims = { tid = "t-1", "some.claim" = "ü𝒳" }

[limits]
caller_rate = "100/second"
auth_failure_rate = "none"

[tracing]
endpoint = "https://collector.example.com/v1/traces"
sample = 0.1

[server]
workers = 3
body_limit = "32MiB"

[log]
metrics = false
"""


@pytest.fixture
def options_file(tmp_path: Path) -> Path:
    path = tmp_path / "options.toml"
    path.write_text(GIVEN)
    return path


def test_hosts_and_tasks_get_them_besides_what_the_stack_decides(options_file: Path, tmp_path: Path) -> None:
    chosen = {**TLS["given"], "proxy_options": str(options_file)}
    host = of_host(synthesize(**chosen), tmp_path)
    assert (host.oidc.issuer, host.oidc.audience) == ("https://login.example.com", ["mlflow"])
    assert host.oidc.required_claims == {"tid": "t-1", "some.claim": "ü𝒳"}
    assert (host.limits.caller_rate, host.limits.auth_failure_rate) == ("100/second", None)
    assert (host.tracing.endpoint, host.tracing.sample) == ("https://collector.example.com/v1/traces", 0.1)
    assert (host.server.workers, host.server.body_limit, host.log.metrics) == (3, 32 << 20, False)
    # What the stack decides in the same sections is still there.
    assert host.limits.storage is not None
    assert (host.server.port, host.log.format) == (8080, "json")
    task = of_task(synthesize("tracking", "fargate", **chosen))
    assert task == host


def problems(tmp_path: Path, text: str, **more: str) -> list[str]:
    path = tmp_path / "options.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load({**settings(**more), "proxy_options": str(path)}, {})
    return caught.value.problems


TOKENS = "[oidc]\nissuer = 'https://i'\naudience = ['a']"
MISTAKES: list[tuple[str, dict[str, str], list[str]]] = [
    ("[oidc]\nisuer = 'x'", {}, ["proxy_options: oidc.isuer: no such option; did you mean issuer?"]),
    ("[oidc]\nissuer = 'https://i'", {}, ["proxy_options: oidc.audience: is required with issuer"]),
    ("[limits]\ncaller_rate = 'often'", {}, ["proxy_options: limits.caller_rate: 'often' is not a rate"]),
    ("[limit]\ncaller_rate = '1/second'", {}, ["proxy_options: limit: no such"]),
    ("oidc = 1", {}, ["proxy_options: oidc: input should be"]),
    ("[oidc", {}, ["proxy_options: "]),
    ("[server]\nbody_limit = 1", {}, ["proxy_options: server.body_limit: "]),
    ("[upstream]\nproxy = 'http://u:p@proxy:3128'", {}, ["proxy_options: upstream.proxy: holds a password"]),
    (
        f"{TOKENS}\nclient_id = 'c'\nclient_secret_file = '/no/such/file'",
        {},
        ["proxy_options: oidc.client_id: browsers sign in", "proxy_options: oidc.client_secret_file: browsers sign in"],
    ),
    (TOKENS, {"nat_gateways": "0"}, ["proxy_options: oidc.issuer: with nat_"]),
    # Both ways name people user:<claim>, so it must be one provider: known only together with the stack's part.
    (TOKENS, SIGN_IN, ["proxy_options: load_balancer.issuer: must be oidc"]),
    ("[certificates]\nissuers = ['CN=a']", CLIENT_CERTIFICATES, ["proxy_options: certificates.issuers: counts only"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "more", "begins"), MISTAKES, ids=[begins[0][15:60] for _, _, begins in MISTAKES])
def test_mistakes_are_told_by_the_proxys_own_code(
    text: str, more: dict[str, str], begins: list[str], tmp_path: Path
) -> None:
    found = problems(tmp_path, text, **more)
    assert len(found) == len(begins), found
    for problem, begin in zip(sorted(found), sorted(begins), strict=True):
        assert problem.startswith(begin), problem


def example(name: str) -> str:
    """A file that sets one refused option, or something in a refused section."""
    if name in ("targets", "roles"):
        return f"[[{name}]]\nname = 'x'"
    section, _, option = name.partition(".")
    return f"[{section}]\n{option or 'keys_file'} = 'x'"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_stack_decides_is_refused_with_what_to_do_instead(name: str, tmp_path: Path) -> None:
    assert problems(tmp_path, example(name)) == [f"proxy_options: {name}: {REFUSED[name]}"]


def test_refused_options_exist() -> None:
    known = {f"{option.section}.{option.name}" for option in options()} | {option.section for option in options()}
    assert set(REFUSED) <= known


def test_all_that_the_stack_sets_is_refused() -> None:
    """Else a file could change it, or would be overruled in silence."""
    everything = SIGN_IN | CLIENT_CERTIFICATES
    made = synthesize("tracking", "fargate", **everything)
    (container,) = made.one("flaskapp", "AWS::ECS::TaskDefinition")["ContainerDefinitions"]
    names = [one["Name"].removeprefix("MLFLOW_PROXY_").lower().replace("__", ".") for one in container["Environment"]]
    assert len(names) > 15
    assert not [name for name in names if name not in REFUSED and name.split(".")[0] not in REFUSED]


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"proxy_options: '/no/such\.toml' cannot be read \(No such file"):
        load(settings(proxy_options="/no/such.toml"), {})


def test_relative_paths_begin_at_the_repository() -> None:
    """`cdk` runs in infra/, but people write paths as they see them."""
    with pytest.raises(SettingsError, match="proxy_options: project: no such"):
        load(settings(proxy_options="pyproject.toml"), {})


def test_nothing_secret_is_in_the_templates(options_file: Path) -> None:
    """Every value of the configuration stands readable in a launch template or task definition."""
    secret = {
        f"{option.section}.{option.name}"
        for option in options()
        if "secret" in option.name or option.name in ("keys_file", "tls_key", "storage", "external_id")
    }
    allowed = {"access.keys_secret", "targets.external_id", "roles.external_id"}
    sections = {name for name in REFUSED if "." not in name}
    assert not {name for name in secret - allowed if name not in REFUSED and name.split(".")[0] not in sections}
    text = json.dumps(synthesize("tracking", "fargate", proxy_options=str(options_file)).templates["flaskapp"])
    assert IMAGE in text
    assert "password" not in text.lower()
