"""The setting `proxy_options`: a file in the form of proxy.toml with what the stacks do not decide themselves.

It is judged when the application is synthesized, by the proxy's own code and together with all that the stack adds: so
that a mistake is found here and not by hosts that do not start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from infra.proxy_configuration import Deployment, as_toml, proxy_configuration
from infra.settings import Settings
from mlflow_proxy import configuration
from mlflow_proxy.targets import Mode

_SIGN_IN = "browsers sign in at the load balancer here: use the settings oidc_…"
_NO_FILES = "names a file, and hosts have none but their configuration"
# Options, or whole sections, that the stack decides or that cannot work there, and what to do instead.
REFUSED = {
    "targets": "the target is the stack's own MLflow; remove it",
    "roles": "write them into the setting roles, which makes their IAM roles, too",
    "server.host": "decided by the stack; remove it",
    "server.port": "decided by the stack; remove it",
    "server.public_url": "decided by the stack; use the setting host_name",
    "server.allowed_hosts": "decided by the stack; use the setting host_name",
    "server.trusted_proxies": "decided by the stack: they are the load balancer's subnets; remove it",
    "server.tls_certificate": "TLS ends at the load balancer; use the setting certificate_arn",
    "server.tls_key": "TLS ends at the load balancer; use the setting certificate_arn",
    "server.header_timeout": "decided by the stack, to fit the load balancer's; remove it",
    "server.drain_timeout": "decided by the stack; use the setting drain_seconds",
    "upstream.first_byte_timeout": "decided by the stack, to fit the load balancer's; remove it",
    "aws.profile": "credentials are those of the host's role; remove it",
    "log.format": "decided by the stack: metrics and alarms read json; remove it",
    "log.requests": "decided by the stack: metrics and alarms read these lines; remove it",
    "access": "decided by the stack: keys are in its own secret; remove it",
    "audit.to": "decided by the stack: the log group gets it; remove it",
    "oidc.client_id": _SIGN_IN,
    "oidc.client_secret_file": _SIGN_IN,
    "oidc.session_secret_file": _SIGN_IN,
    "oidc.ca_bundle": _NO_FILES,
    "limits.storage": "decided by the stack, which makes one when there can be several instances; remove it",
    "load_balancer.arn": "decided by the stack; use the settings oidc_…",
    "load_balancer.issuer": "decided by the stack; use the settings oidc_…",
    "load_balancer.client_id": "decided by the stack; use the settings oidc_…",
    "load_balancer.groups_claim": "decided by the stack; use the setting oidc_groups_claim",
    "certificates.subject_header": "decided by the stack; use the setting mtls_ca_bundle",
}


def problems(settings: Settings) -> Iterator[str]:
    """What is wrong with the file, all of it."""
    given = settings.proxy_options or {}
    tables = {name: table for name, table in given.items() if isinstance(table, dict)}
    for name in given:
        for one in (name, *(f"{name}.{option}" for option in tables.get(name, ()))):
            if one in REFUSED:
                yield f"proxy_options: {one}: {REFUSED[one]}"
    # It would stand readable in the launch template or the task definition.
    proxy = tables.get("upstream", {}).get("proxy")
    if isinstance(proxy, str) and (urlsplit(proxy).username or urlsplit(proxy).password):
        yield "proxy_options: upstream.proxy: holds a password, which many could read there; let it in by address"
    if settings.is_closed and tables.get("oidc", {}).get("issuer"):
        yield "proxy_options: oidc.issuer: with nat_gateways=0 the provider's keys cannot be fetched; write 1"
    yield from (f"proxy_options: {problem}" for problem in _problems_of_proxy(settings))


def _problems_of_proxy(settings: Settings) -> list[str]:
    """What the proxy says of the whole file as a host would get it, with names in place of what AWS makes.

    What is refused is left out of it, so that it is not told twice.
    """
    judged = {
        name: {option: one for option, one in table.items() if f"{name}.{option}" not in REFUSED}
        if isinstance(table, dict)
        else table
        for name, table in (settings.proxy_options or {}).items()
        if name not in REFUSED
    }
    whole = settings.model_copy(update={"proxy_options": judged})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proxy.toml"
        path.write_text(as_toml(proxy_configuration(whole, _example(whole))), "utf-8")
        try:
            configuration.load(path, {})
        except configuration.SettingsError as error:
            return error.problems
    return []


def _example(settings: Settings) -> Deployment:
    here = f"{settings.region}:{settings.account}"
    kind = "mlflow-tracking-server" if settings.mode is Mode.TRACKING else "mlflow-app"
    return Deployment(
        target_arn=f"arn:aws:sagemaker:{here}:{kind}/{settings.mlflow_name}",
        public_url="https://proxy.example.com",
        trusted_networks=(settings.vpc_cidr,),
        load_balancer_arn=f"arn:aws:elasticloadbalancing:{here}:loadbalancer/app/proxy/0123456789abcdef",
        load_balancer_host="proxy.example.com",
        keys_arn=f"arn:aws:secretsmanager:{here}:secret:keys",
        storage="rediss://valkey.example.com:6379/0" if settings.shares_limits else None,
        caller_arns={role.name: f"arn:aws:iam::{settings.account}:role/{role.name}" for role in settings.roles},
    )
