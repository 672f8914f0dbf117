"""What is wrong with the options of identity, roles, limits and records, in words. For `mistakes`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from mlflow_proxy.access import actions
from mlflow_proxy.access.policy import EXPLICIT_PREFIX, OWN_PREFIX, UNKNOWN_PREFIX, Patterns
from mlflow_proxy.settings import SIGNATURE_ALGORITHMS
from mlflow_proxy.telemetry.audit import problem_with

Table = Mapping[str, Any]

_OWN_ACTIONS = (f"{OWN_PREFIX}GetReadiness", f"{OWN_PREFIX}GetMetrics")
_LINK_ACTIONS = (f"{EXPLICIT_PREFIX}MlflowTrackingServerUrl", f"{EXPLICIT_PREFIX}MlflowAppUrl")
# What the route is called; each request needs the actions of its fields instead.
_BY_BODY = "GraphQL"
_STORAGES = ("redis", "rediss", "valkey", "valkeys")
_LEAST_SECRET = 32
_HEADERS = ("subject_header", "issuer_header", "verify_header")
_CALLERS_OWN = frozenset({"authorization", "cookie", "x-api-key", "host", "forwarded", "user-agent", "x-request-id"})
# What turns each way of identifying on.
_WAYS = (
    ("access", "keys_file"),
    ("access", "keys_secret"),
    ("oidc", "issuer"),
    ("load_balancer", "arn"),
    ("certificates", "subject_header"),
)


def identifies(data: Table) -> bool:
    """Whether any way to identify callers is configured."""
    return any(_table(data, section).get(option) for section, option in _WAYS)


def access_problems(data: Table) -> Iterator[str]:
    """All mistakes of these options. Works on unvalidated data, too."""
    yield from _identity_problems(data)
    yield from _oidc_problems(_table(data, "oidc"))
    yield from _sign_in_problems(data)
    roles = [role for role in _list(data.get("roles")) if isinstance(role, Mapping)]
    names = [
        target["name"] for target in _list(data.get("targets")) if isinstance(target, Mapping) and "name" in target
    ]
    yield from _role_problems(roles, names)
    yield from _limit_problems(_table(data, "limits"))
    yield from _record_problems(data)


def _identity_problems(data: Table) -> Iterator[str]:
    some = identifies(data)
    if some and not data.get("roles"):
        yield (
            "roles: none is configured, so every identified caller would be refused; add a [[roles]] table with name, "
            "targets and allow"
        )
    if some and _table(data, "access").get("anonymous") == "i-understand":
        yield "access.anonymous: counts only where no way to identify callers is configured; remove it"
    trusted = _table(data, "server").get("trusted_proxies")
    for section, option in (("load_balancer", "arn"), ("certificates", "subject_header")):
        if _table(data, section).get(option) and not trusted:
            yield (
                f"{section}.{option}: counts only from server.trusted_proxies, and there are none; name the networks "
                "of the load balancer or nginx"
            )
    certificates = _table(data, "certificates")
    if certificates.get("issuers") and not certificates.get("issuer_header"):
        yield "certificates.issuers: counts only with issuer_header; add that or remove this"
    headers = {option: str(certificates.get(option)).lower() for option in _HEADERS if certificates.get(option)}
    for option, name in headers.items():
        if name in _CALLERS_OWN or name.startswith("x-forwarded-"):
            yield f"certificates.{option}: {name!r} is a header that callers send themselves; name one of your server's"
    if len(set(headers.values())) < len(headers):
        yield f"certificates: {' and '.join(headers)} name one header; each needs its own"
    for option in ("issuer_header", "verify_header", "issuers"):
        if certificates.get(option) and not certificates.get("subject_header"):
            yield f"certificates.{option}: counts only with subject_header; add that or remove this"
    yield from _load_balancer_problems(_table(data, "load_balancer"), _table(data, "oidc").get("issuer"))


def _load_balancer_problems(load_balancer: Table, oidc_issuer: Any) -> Iterator[str]:
    yield from _url("load_balancer.key_endpoint", load_balancer.get("key_endpoint"))
    if load_balancer.get("arn") and oidc_issuer and load_balancer.get("issuer") != oidc_issuer:
        yield (
            "load_balancer.issuer: must be oidc.issuer, for both ways call people user:<claim>, and one provider's "
            "user could pass for another's; make the two equal, or leave one way out"
        )


def _oidc_problems(oidc: Table) -> Iterator[str]:
    issuer = oidc.get("issuer")
    if not issuer:
        for option in ("audience", "jwks_url", "required_claims", "client_id", "client_secret_file"):
            if oidc.get(option):
                yield f"oidc.{option}: counts only with issuer; add that or remove this"
        return
    yield from _url("oidc.issuer", issuer)
    yield from _url("oidc.jwks_url", oidc.get("jwks_url"))
    if not oidc.get("audience"):
        yield "oidc.audience: is required with issuer; without it tokens made for any other service would count"
    if oidc.get("algorithms") == []:
        yield "oidc.algorithms: is empty, so no token would count; leave it out, or name some"
    for algorithm in _list(oidc.get("algorithms")):
        if isinstance(algorithm, str) and algorithm not in SIGNATURE_ALGORITHMS:
            choices = ", ".join(sorted(SIGNATURE_ALGORITHMS))
            yield f"oidc.algorithms: {algorithm!r} is not one that counts; there are {choices}"
    yield from _file("oidc.ca_bundle", oidc.get("ca_bundle"))


def _sign_in_problems(data: Table) -> Iterator[str]:
    oidc = _table(data, "oidc")
    if not oidc.get("client_id"):
        for option in ("client_secret_file", "session_secret_file"):
            if oidc.get(option):
                yield f"oidc.{option}: counts only with client_id; add that or remove this"
        return
    yield from _file("oidc.client_secret_file", oidc.get("client_secret_file"))
    yield from _file("oidc.session_secret_file", oidc.get("session_secret_file"), least=_LEAST_SECRET)
    idle, lifetime = oidc.get("session_idle"), oidc.get("session_lifetime")
    if isinstance(idle, int | float) and isinstance(lifetime, int | float) and idle > lifetime:
        yield "oidc.session_idle: is longer than session_lifetime, so it would never count; make it shorter"
    url = _table(data, "server").get("public_url")
    if isinstance(url, str) and url.startswith("http://") and not _is_loopback_url(url):
        yield "oidc.client_id: sign-in needs HTTPS, for its cookie is only sent there; make server.public_url https://…"


def _role_problems(roles: list[Table], targets: list[Any]) -> Iterator[str]:
    known = (*(name for name in actions.NAMES if name != _BY_BODY), *_OWN_ACTIONS, *_LINK_ACTIONS)
    choices = ", ".join(map(str, targets)) or "none"
    names = [role.get("name") for role in roles]
    for name in sorted({name for name in names if isinstance(name, str) and names.count(name) > 1}):
        yield f"roles: the name {name!r} is used twice; each role needs its own"
    for index, role in enumerate(roles, 1):
        where = f"roles[{index}]"
        for option in ("external_id", "session_tags", "source_identity"):
            if role.get(option) and not role.get("assume_role_arn"):
                yield f"{where}.{option}: counts only with assume_role_arn; add that or remove this"
        for pattern in _list(role.get("targets")):
            if isinstance(pattern, str) and not any(Patterns([pattern]).match(str(name)) for name in targets):
                yield f"{where}.targets: {pattern!r} matches no target; there are {choices}"
        for option in ("allow", "deny"):
            for pattern in _list(role.get(option)):
                if isinstance(pattern, str):
                    yield from _action_problems(f"{where}.{option}", pattern, known)


def _action_problems(where: str, pattern: str, known: tuple[str, ...]) -> Iterator[str]:
    for prefix in ("sagemaker-mlflow:", "sagemaker:"):
        if pattern.startswith(prefix):
            yield f"{where}: {pattern!r} needs no service before it; write {pattern.removeprefix(prefix)!r}"
            return
    if pattern.startswith(UNKNOWN_PREFIX):
        if where.endswith("allow"):
            yield f"{where}: {pattern!r} allows nothing; what the proxy does not know is allowed by '*' alone"
        return
    if not any(map(Patterns([pattern]).match, known)):
        yield f"{where}: {pattern!r} matches no action; docs/access.md lists them all"


def _limit_problems(limits: Table) -> Iterator[str]:
    least, most = limits.get("concurrency_min"), limits.get("concurrency_max")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield "limits.concurrency_min: is larger than concurrency_max; make it smaller"
    storage = limits.get("storage")
    if isinstance(storage, str):
        parts = _split(storage)
        if parts.scheme not in _STORAGES or not parts.hostname or parts.query or not _has_good_port(parts):
            yield "limits.storage: is not a URL of Redis or Valkey; write redis://host:6379/0 (rediss:// with TLS)"


def _record_problems(data: Table) -> Iterator[str]:
    to = _table(data, "audit").get("to")
    problem = problem_with(to) if isinstance(to, str) else None
    if problem is not None:
        yield f"audit.to: {problem}"
    endpoint = _table(data, "tracing").get("endpoint")
    yield from _url("tracing.endpoint", endpoint, secure=False)
    if endpoint and not is_installed("opentelemetry.exporter.otlp.proto.http"):
        yield (
            "tracing.endpoint: needs the extra; run pip install 'sagemaker-mlflow-proxy[tracing]', or "
            "pip install '.[tracing]' in a clone"
        )


def is_installed(module: str) -> bool:
    """Whether a module can be found. To look for a dotted name imports the packages above it: these may lack, too."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _url(option: str, value: Any, *, secure: bool = True) -> Iterator[str]:
    if not isinstance(value, str):
        return
    parts = _split(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        yield f"{option}: is not a plain URL; write one like https://example.com/path"
    elif secure and parts.scheme == "http" and not _is_loopback_url(value):
        yield f"{option}: must be https, else anybody on the way could pass for the provider"


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that hold no address
        return urlsplit("")


def _has_good_port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def _is_loopback_url(url: str) -> bool:
    return _split(url).hostname in ("127.0.0.1", "localhost", "::1")


def _file(option: str, value: Any, *, least: int = 1) -> Iterator[str]:
    if not isinstance(value, str | Path):
        return
    try:
        size = len(Path(value).read_bytes())
    except OSError as error:
        yield f"{option}: {str(value)!r} cannot be read ({error.strerror})"
        return
    if size < least:
        yield f"{option}: {str(value)!r} has {size} bytes; it needs {least} or more (openssl rand -out FILE {least})"


def _table(data: Table, name: str) -> Table:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
