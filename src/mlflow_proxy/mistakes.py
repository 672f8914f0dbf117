"""What is wrong with a configuration, in words: the option's name, and what to write instead. Never a secret."""

from __future__ import annotations

import difflib
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from mlflow_proxy.access.mistakes import access_problems, identifies
from mlflow_proxy.options import options, sections
from mlflow_proxy.settings import CONFIG_VARIABLE, ENV_PREFIX, KEY_VARIABLE, Settings, is_loopback
from mlflow_proxy.targets import TargetError, parse_endpoint, parse_public_url


def broken_json(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that should hold a list or a table, and don't."""
    shapes: dict[str, tuple[type, str]] = {
        f"{ENV_PREFIX}{section}".upper(): (dict, '{"option": "value"}') for section, _ in sections()
    }
    for option in options():
        if option.variable and option.type == "list of texts":
            shapes[option.variable] = (list, '["first", "second"]')
        if option.variable and option.type == "table of texts":
            shapes[option.variable] = (dict, '{"name": "value"}')
    shapes[f"{ENV_PREFIX}TARGETS"] = (list, '[{"name": "…", "arn": "…"}]')
    shapes[f"{ENV_PREFIX}ROLES"] = (list, '[{"name": "…", "targets": ["*"], "allow": ["…"]}]')
    for name, (shape, example) in shapes.items():
        if name in environ and not isinstance(_json_or_none(environ[name]), shape):
            yield name, f"environment variable {name}: is not the JSON it should be; write it like {example}"


def unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """Variables with the proxy's prefix that set nothing."""
    known = {option.variable for option in options() if option.variable} | {
        CONFIG_VARIABLE,
        KEY_VARIABLE,
        *(f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields),
    }
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            yield f"environment variable {name}: no such option{_suggestion(name, known, ENV_PREFIX)}"


def explain(detail: ErrorDetails) -> str:
    """One of pydantic's errors in our words."""
    where = _option_name(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: no such option{_suggestion(str(detail['loc'][-1]), _neighbours(detail['loc']))}"
    if detail["type"] == "missing":
        return f"{where}: is required"
    message = detail["msg"].removeprefix("Value error, ")
    shown = detail["input"]
    is_option = len(detail["loc"]) > 1 and where not in ("upstream.proxy", "limits.storage")
    value = f" {_without_password(repr(shown))}" if is_option and isinstance(shown, str | int | float | bool) else ""
    return f"{where}:{value} {message[:1].lower()}{message[1:]}"


def _option_name(location: tuple[int | str, ...]) -> str:
    """`targets[1].arn`, as a reader would write it (targets count from 1)."""
    text = ""
    for part in location:
        text += f"[{part + 1}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _neighbours(location: tuple[int | str, ...]) -> set[str]:
    tables = dict(sections())
    table = tables.get(str(location[0])) if len(location) > 1 else None
    return set(table.model_fields) if table else set(tables)


def _suggestion(name: str, known: set[Any], prefix: str = "") -> str:
    """The known name that was probably meant; the `prefix` that all have makes none of them more alike."""
    close = difflib.get_close_matches(
        name.removeprefix(prefix), [one.removeprefix(prefix) for one in sorted(known)], n=1
    )
    return f"; did you mean {prefix}{close[0]}?" if close else "; see docs/configuration.md for all of them"


def cross_checks(data: dict[str, Any]) -> Iterator[str]:
    """What no single option shows. Works on unvalidated data too, so that these mistakes are listed with the others."""
    listed = data.get("targets")
    targets = [target for target in listed if isinstance(target, dict)] if isinstance(listed, list) else []
    if not targets:
        yield "targets: none is configured; add a [[targets]] table with name and arn"
    defaults = [str(target.get("name")) for target in targets if target.get("default") is True]
    if len(defaults) > 1:
        yield f"targets: {' and '.join(defaults)} are both default = true; keep one"
    names = [target["name"] for target in targets if isinstance(target.get("name"), str)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"targets: the name {name!r} is used twice; each target needs its own"
    for index, target in enumerate(targets, 1):
        if target.get("external_id") and not target.get("assume_role_arn"):
            yield f"targets[{index}].external_id: counts only with assume_role_arn; add that or remove this"
    server = _table(data, "server")
    yield from _body_problems(server)
    yield from _tls_problems(server.get("tls_certificate"), server.get("tls_key"))
    yield from _url_problems(data)
    host = str(server.get("host", "127.0.0.1"))
    understood = _table(data, "access").get("anonymous") == "i-understand"
    if not is_loopback(host) and not identifies(data) and not understood:
        yield (
            f"server.host: {host!r} can be reached from other machines, and no way to identify callers is configured: "
            "whoever reaches the proxy would have its AWS rights. Configure one (docs/access.md; API keys: "
            'access.keys_file), listen on 127.0.0.1, or name the risk with access.anonymous = "i-understand"'
        )
    yield from access_problems(data)


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _table(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def _body_problems(server: dict[str, Any]) -> Iterator[str]:
    limit, budget = server.get("body_limit"), server.get("body_budget")
    if isinstance(limit, int) and isinstance(budget, int) and limit > budget:
        yield "server.body_limit: is larger than body_budget, so the largest bodies would never pass; raise body_budget"


def _url_problems(data: dict[str, Any]) -> Iterator[str]:
    for section, name, parse in (
        ("server", "public_url", parse_public_url),
        ("aws", "sts_endpoint", parse_endpoint),
        ("aws", "sagemaker_endpoint", parse_endpoint),
    ):
        value = _table(data, section).get(name)
        if isinstance(value, str):
            try:
                parse(value)
            except TargetError as error:
                yield f"{section}.{name}: {_without_password(repr(value))} {error}"
    proxy = _table(data, "upstream").get("proxy")
    if isinstance(proxy, str) and not (
        (match := re.fullmatch(r"http://([^/@\s]+@)?[^/@\s]+:([0-9]{1,5})/?", proxy)) and 0 < int(match[2]) < 65536
    ):
        yield "upstream.proxy: is not a proxy's URL; write http://host:port or http://user:password@host:port"


def _without_password(text: str) -> str:
    return re.sub(r"//[^/\s]*@", "//…@", text)


def _tls_problems(certificate: Any, key: Any) -> Iterator[str]:
    if not certificate and not key:
        return
    if not all(isinstance(path, str | Path | None) for path in (certificate, key)):
        return  # listed already: not a file's name
    if not certificate or not key:
        missing = "tls_key" if certificate else "tls_certificate"
        yield f"server.{missing}: is missing; TLS needs both tls_certificate and tls_key"
        return
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            yield f"server.{name}: {str(path)!r} cannot be read ({reason(error)})"
            return
        if name == "tls_key" and "-----BEGIN PRIVATE KEY-----" not in text:
            yield (
                f"server.tls_key: {str(path)!r} is not an unencrypted PKCS#8 key; make one with "
                "openssl pkcs8 -topk8 -nocrypt -in key.pem -out key8.pem"
            )
            return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        yield f"server.tls_certificate: does not go with tls_key ({reason(error)})"


def reason(error: Exception) -> str:
    """Why a file could not be used, without its name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
