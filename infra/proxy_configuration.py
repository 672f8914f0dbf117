"""The proxy's configuration for a deployment, as proxy.toml for hosts and as environment variables for containers.

It is what the stack decides, and what the setting `proxy_options` adds; that says nothing about what the stack decides.
Values may be tokens of CDK, which CloudFormation fills in: so they are only ever put into texts, never looked into.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infra.networking import PROXY_PORT
from infra.settings import Settings
from mlflow_proxy.settings import ENV_PREFIX

# The load balancer waits longer than the proxy, so that it is the proxy who says why something took too long; and the
# proxy keeps a connection longer than the load balancer does, lest one be used that just closed. In seconds.
LOAD_BALANCER_IDLE = 180
_FIRST_BYTE = 150
_HEADER = LOAD_BALANCER_IDLE + 20
# Headers with the verified client certificate (ELB guide, "Mutual authentication", verify mode).
_SUBJECT_HEADER = "x-amzn-mtls-clientcert-subject"

Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class Deployment:
    """What the stack knows and the proxy needs. `caller_arns`: the IAM role of each role of callers."""

    target_arn: str
    public_url: str
    trusted_networks: tuple[str, ...]
    load_balancer_arn: str
    load_balancer_host: str
    keys_arn: str
    storage: str | None
    caller_arns: Mapping[str, str]


def proxy_configuration(settings: Settings, deployment: Deployment) -> Configuration:
    """All options that differ from the proxy's defaults, as its file has them."""
    configuration: dict[str, Any] = {
        "server": {
            # All addresses: the security group lets in the load balancer alone.
            "host": "0.0.0.0",  # noqa: S104
            "port": PROXY_PORT,
            "public_url": deployment.public_url,
            "allowed_hosts": [deployment.load_balancer_host],
            "trusted_proxies": list(deployment.trusted_networks),
            "header_timeout": _HEADER,
            "drain_timeout": max(1, settings.drain_seconds - 5),
        },
        "upstream": {"first_byte_timeout": _FIRST_BYTE},
        "log": {"format": "json"},
        "access": {"keys_secret": deployment.keys_arn},
        "audit": {"to": "stdout"},
        "targets": [{"name": settings.mlflow_name, "arn": deployment.target_arn, "default": True}],
        "roles": [
            {
                "name": role.name,
                "targets": [settings.mlflow_name],
                **{key: value for key, value in role.model_dump(exclude={"name"}).items() if value},
                "assume_role_arn": deployment.caller_arns[role.name],
                "session_tags": True,
            }
            for role in settings.roles
        ],
    }
    if deployment.storage is not None:
        configuration["limits"] = {"storage": deployment.storage}
    if settings.signs_in:
        claim = {"groups_claim": settings.oidc_groups_claim} if settings.oidc_groups_claim else {}
        configuration["load_balancer"] = {
            "arn": deployment.load_balancer_arn,
            "issuer": settings.oidc_issuer,
            "client_id": settings.oidc_client_id,
            **claim,
        }
    if settings.mtls_ca_bundle is not None:
        configuration["certificates"] = {"subject_header": _SUBJECT_HEADER}
    for name, table in (settings.proxy_options or {}).items():
        # What is not a table, or decided here, is a mistake, which proxy_options.py tells.
        if name not in configuration:
            configuration[name] = table
        elif isinstance(table, dict) and isinstance(configuration[name], dict):
            configuration[name] = table | configuration[name]
    return configuration


def as_toml(configuration: Configuration) -> str:
    """The configuration as a file."""
    return "\n\n".join(_tables(configuration)) + "\n"


def as_environment(configuration: Configuration) -> dict[str, str]:
    """The configuration as environment variables."""
    variables: dict[str, str] = {}
    for name, value in configuration.items():
        if isinstance(value, list):
            variables[f"{ENV_PREFIX}{name.upper()}"] = json.dumps(value)
            continue
        for option, one in value.items():
            text = one if isinstance(one, str) else json.dumps(one)
            variables[f"{ENV_PREFIX}{name.upper()}__{option.upper()}"] = text
    return variables


def _tables(configuration: Configuration) -> Iterator[str]:
    # What stands in no table must come before the first one.
    for name, value in configuration.items():
        if not isinstance(value, dict | list):
            yield f"{name} = {_toml_value(value)}"
    for name, value in configuration.items():
        if not isinstance(value, dict | list):
            continue
        for table in value if isinstance(value, list) else [value]:
            header = f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
            yield "\n".join([header, *(f"{option} = {_toml_value(one)}" for option, one in table.items())])


def _toml_value(value: Any) -> str:
    """Texts, numbers and truth values are written in TOML as in JSON; tables are not."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml_value(one)}" for name, one in value.items()) + "}"
    # TOML knows no surrogates, which JSON writes for some signs unless it may write the sign itself.
    return json.dumps(value, ensure_ascii=False, default=str)
