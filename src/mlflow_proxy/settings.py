"""Every option once: name, type, default, and one line of explanation. A TOML file, then environment variables.

`load` reads both, and reports all mistakes of a configuration together. Options are values here; what they do is
written where they are used.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import ssl
import tomllib
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources.utils import parse_env_vars

from mlflow_proxy.targets import TARGET_NAME, Target, TargetError, default_endpoint, parse_arn, parse_endpoint

ENV_PREFIX = "MLFLOW_PROXY_"
CONFIG_VARIABLE = "MLFLOW_PROXY_CONFIG"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

Seconds = Annotated[float, Field(gt=0, le=3600)]
Network = IPv4Network | IPv6Network


class SettingsError(Exception):
    """A configuration that cannot be used. `problems` has one readable line per mistake, all of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Section(BaseModel):
    """One table of the file. An option that does not exist is a mistake, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(Section):
    """Where the proxy listens, and what it accepts from callers."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=1, le=65535, description="Port to listen on.")
    workers: int = Field(
        default_factory=lambda: min(4, len(os.sched_getaffinity(0))),
        ge=1,
        le=64,
        description="Worker processes. Default: one per CPU, at most 4.",
    )
    tls_certificate: Path | None = Field(None, description="PEM file with the certificate chain; turns HTTPS on.")
    tls_key: Path | None = Field(None, description="PEM file with its private key (PKCS#8).")
    public_url: str | None = Field(
        None, description="The URL callers use, when another server stands in front; its host is allowed."
    )
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="Host names callers may use, besides the listening address, loopback and public_url's. "
        "`*.example.com` takes every name below.",
    )
    trusted_proxies: list[Network] = Field(
        default_factory=list,
        description="Networks whose X-Forwarded-For and X-Forwarded-Proto count.",
    )
    body_limit: ByteSize = Field(
        ByteSize(64 << 20), ge=1024, description="Largest request body; more is refused with 413."
    )
    body_budget: ByteSize = Field(
        ByteSize(256 << 20),
        ge=1024,
        description="All request bodies held by one worker together; beyond it 503 with Retry-After.",
    )
    header_limit: ByteSize = Field(
        ByteSize(32 << 10),
        ge=1024,
        le=256 << 10,
        description="All headers of a request together; more is 431.",
    )
    header_count_limit: int = Field(100, ge=10, le=1000, description="Number of headers of a request; more is 431.")
    url_limit: ByteSize = Field(
        ByteSize(32 << 10), ge=1024, le=128 << 10, description="Length of path and query; more is 414."
    )
    header_timeout: Annotated[float, Field(gt=0, le=60)] = Field(
        15.0, description="Seconds for a caller to send the headers of a request."
    )
    body_timeout: Seconds = Field(30.0, description="Seconds that a caller may pause while it sends a body; then 408.")
    concurrency: int = Field(
        1024, ge=16, le=65536, description="Requests that one worker takes at once; further ones wait unread."
    )
    drain_timeout: Annotated[float, Field(ge=1, le=1800)] = Field(
        30.0, description="Seconds that requests under way get to finish when the proxy stops."
    )
    ready_max_age: Seconds = Field(
        30.0, description="/-/ready calls the target again when its last signed answer is older, in seconds."
    )

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        for item in value if isinstance(value, list) else ():
            try:
                ip_network(item)
            except ValueError:
                raise ValueError(f"{item!r} is not a network; write one like 10.0.0.0/8 or 192.0.2.7") from None
        return value


class Upstream(Section):
    """How requests travel from the proxy to SageMaker."""

    connect_timeout: Seconds = Field(5.0, description="Seconds to connect, TLS handshake included.")
    first_byte_timeout: Seconds = Field(60.0, description="Seconds from the sent request to its first answer byte.")
    idle_timeout: Seconds = Field(60.0, description="Seconds between two chunks, while sending or receiving.")
    connections: int = Field(128, ge=1, le=4096, description="Connections per target and worker.")
    pending: int = Field(
        512,
        ge=0,
        le=65536,
        description="Requests per target and worker that wait for a connection; more is 503.",
    )
    keep_alive: Seconds = Field(20.0, description="Seconds that an unused connection is kept.")
    retries: int = Field(2, ge=0, le=5, description="Further attempts, where repeating is surely safe.")
    proxy: str | None = Field(
        None,
        description="HTTP proxy on the way out, `http://[user:password@]host:port`. The environment's is ignored.",
    )


class Aws(Section):
    """Where AWS credentials come from; everything else is botocore's own chain."""

    profile: str | None = Field(None, description="Profile of the shared AWS configuration to take credentials from.")
    sts_endpoint: str | None = Field(
        None,
        description="URL of STS, for assumed roles. Default: the regional endpoint of the target's region.",
    )
    sagemaker_endpoint: str | None = Field(
        None,
        description="URL of the SageMaker API, for presigned URLs. Default: botocore's for the target's region.",
    )


class Ui(Section):
    """Presigned links to the MLflow UI. The bounds are AWS's."""

    link_expires: int = Field(300, ge=5, le=300, description="Seconds until an unused link is void.")
    session_expires: int = Field(
        3600, ge=1800, le=43200, description="Seconds that the browser session lasts which a link opens."
    )


class Log(Section):
    """What the proxy writes about requests."""

    format: Literal["auto", "json", "text"] = Field(
        "auto", description="`json` lines, `text` for people, or `auto`: text on a terminal."
    )
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is written.")
    requests: bool = Field(True, description="Write one line per request.")


class Access(Section):
    """Who may call."""

    anonymous: Literal["loopback", "i-understand"] = Field(
        "loopback",
        description="Callers are not identified yet, so the proxy listens on loopback only. `i-understand` lets it "
        "listen elsewhere: whoever reaches it then has its AWS rights.",
    )


class TargetSettings(Section):
    """One `[[targets]]` table."""

    name: str = Field(description="Name in URLs: `/t/<name>/`. Letters, digits, `-` and `_`.")
    arn: str = Field(description="ARN of the tracking server or MLflow App.")
    default: bool = Field(
        False, description="Requests without `/t/<name>` go here. A single target is the default anyway."
    )
    assume_role_arn: str | None = Field(
        None, description="IAM role to assume for this target; may be another account's."
    )
    external_id: str | None = Field(None, description="External ID for that role's trust policy.")
    session_name: str = Field(
        "sagemaker-mlflow-proxy",
        pattern=r"^[A-Za-z0-9_+=,.@-]{2,64}$",
        description="Role session name, seen in CloudTrail.",
    )
    endpoint: str | None = Field(
        None,
        description="URL instead of the public endpoint: an interface VPC endpoint, or the local SageMaker.",
    )
    ca_bundle: Path | None = Field(
        None, description="PEM file with the CAs to trust for this target, instead of the system's."
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not TARGET_NAME.fullmatch(value):
            raise ValueError("use 1 to 63 letters, digits, '-' and '_', with a letter or digit at both ends")
        return value

    @field_validator("arn")
    @classmethod
    def _arn(cls, value: str) -> str:
        parse_arn(value)
        return value

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None:
            parse_endpoint(value)
        return value

    @field_validator("assume_role_arn")
    @classmethod
    def _role(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"arn:aws(-us-gov)?:iam::[0-9]{12}:role/[A-Za-z0-9_+=,.@/-]{1,512}", value
        ):
            raise ValueError("is not a role's ARN; write arn:aws:iam::<account>:role/<name>")
        return value

    @field_validator("ca_bundle")
    @classmethod
    def _ca(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                ssl.create_default_context(cafile=str(value))
            except (OSError, ssl.SSLError) as error:
                raise ValueError(
                    f"cannot be used ({_reason(error)}); name a readable PEM file of CA certificates"
                ) from None
        return value

    def build(self, *, default: bool) -> Target:
        """The value that the rest of the program works with."""
        arn = parse_arn(self.arn)
        return Target(
            name=self.name,
            arn=arn,
            endpoint=parse_endpoint(self.endpoint) if self.endpoint else default_endpoint(arn),
            assume_role_arn=self.assume_role_arn,
            external_id=self.external_id,
            session_name=self.session_name,
            ca_bundle=str(self.ca_bundle) if self.ca_bundle else None,
            default=default,
        )


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="none",
    )

    server: Server = Field(default_factory=Server)
    upstream: Upstream = Field(default_factory=Upstream)
    aws: Aws = Field(default_factory=Aws)
    ui: Ui = Field(default_factory=Ui)
    log: Log = Field(default_factory=Log)
    access: Access = Field(default_factory=Access)
    targets: list[TargetSettings] = Field(default_factory=list)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  (names are pydantic-settings')
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What `load` merged, and nothing else: neither .env files nor secret folders."""
        return (init_settings,)

    def build_targets(self) -> tuple[Target, ...]:
        """All targets; at most one is the default."""
        single = len(self.targets) == 1
        return tuple(target.build(default=target.default or single) for target in self.targets)

    @property
    def listens_on_loopback(self) -> bool:
        """Whether only this machine can reach the proxy."""
        return self.server.host in LOOPBACK_HOSTS or self.server.host.startswith("127.")


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the TOML file at `path` (None: environment only), then the environment's MLFLOW_PROXY_… variables.

    Raises SettingsError with every mistake found.
    """
    environ = os.environ if environ is None else environ
    problems = list(_unknown_variables(environ))
    broken = dict(_broken_json(environ))
    problems += broken.values()
    environ = {name: value for name, value in environ.items() if name not in broken}
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise SettingsError([f"{path}: cannot be read ({_reason(error)})"]) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError([f"{path}: is not valid TOML: {error}"]) from None
    settings: Settings | None = None
    merged = _merged(data, _environment(environ))
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors()]
    problems += _cross_checks(merged if settings is None else settings.model_dump(mode="python"))
    if problems or settings is None:
        raise SettingsError(list(dict.fromkeys(problems)))
    return settings


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the variables set, in the shape of the file."""

    class Source(EnvSettingsSource):
        def _load_env_vars(self) -> Mapping[str, str | None]:
            ours = {
                name: value
                for name, value in environ.items()
                if name.startswith(ENV_PREFIX) and name != CONFIG_VARIABLE
            }
            return parse_env_vars(ours, parse_none_str=self.env_parse_none_str)

    return Source(Settings)()


def _merged(file: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """Environment over file, option by option."""
    merged = dict(file)
    for name, value in environment.items():
        below = merged.get(name)
        merged[name] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _broken_json(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that should hold a list or a table, and don't."""
    shapes: dict[str, tuple[type, str]] = {
        f"{ENV_PREFIX}{section}".upper(): (dict, '{"option": "value"}') for section, _ in _sections()
    }
    for option in options():
        if option.variable and option.type == "list of texts":
            shapes[option.variable] = (list, '["first", "second"]')
    shapes[f"{ENV_PREFIX}TARGETS"] = (list, '[{"name": "…", "arn": "…"}]')
    for name, (shape, example) in shapes.items():
        if name in environ and not isinstance(_json_or_none(environ[name]), shape):
            yield name, f"environment variable {name}: is not the JSON it should be; write it like {example}"


class Option(BaseModel):
    """One option, as the documentation lists it."""

    section: str
    name: str
    type: str
    default: str
    description: str

    @property
    def variable(self) -> str | None:
        """Environment variable that sets it; None for the options of a target, which are set as one JSON list."""
        return None if self.section == "targets" else f"{ENV_PREFIX}{self.section}__{self.name}".upper()


def options() -> Iterator[Option]:
    """Every option, in the order of the documentation."""
    for section, model in _sections():
        for name, field in model.model_fields.items():
            yield Option(
                section=section,
                name=name,
                type=_type_name(field),
                default=_default_text(field),
                description=field.description or "",
            )


def options_markdown() -> str:
    """All options as Markdown tables, one per section; docs/configuration.md contains exactly this."""
    parts: list[str] = []
    for section, model in _sections():
        heading = "[[targets]]" if section == "targets" else f"[{section}]"
        parts.append(
            f"### `{heading}`\n\n{(model.__doc__ or '').strip()}\n\n| option | type | default | what it does |"
        )
        parts.append("|---|---|---|---|")
        parts += [
            f"| `{option.name}` | {option.type} | {option.default} | {option.description.replace('|', chr(92) + '|')} |"
            for option in options()
            if option.section == section
        ]
        parts.append("")
    return "\n".join(parts).strip()


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in Settings.model_fields.items():
        annotation = field.annotation
        model = annotation if isinstance(annotation, type) else get_args(annotation)[0]
        yield name, model


def _type_name(field: FieldInfo) -> str:
    annotation = field.annotation
    names = [
        _TYPE_NAMES.get(str(getattr(part, "__name__", part)), "text") for part in get_args(annotation) or (annotation,)
    ]
    if getattr(annotation, "__origin__", None) is list:
        return "list of texts"
    if getattr(annotation, "__origin__", None) is Literal:
        return " / ".join(f"`{value}`" for value in get_args(annotation))
    return names[0]


_TYPE_NAMES = {
    "int": "number",
    "float": "seconds",
    "bool": "true / false",
    "ByteSize": "size",
    "Path": "file",
    "str": "text",
}


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "[]" if field.default_factory is list else "see text"
    if isinstance(field.default, ByteSize):
        return field.default.human_readable().replace(".0", "")
    if field.default is None:
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    known = {option.variable for option in options() if option.variable} | {
        CONFIG_VARIABLE,
        *(f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields),
    }
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            yield f"environment variable {name}: no such option{_suggestion(name, known, ENV_PREFIX)}"


def _explain(detail: ErrorDetails) -> str:
    where = _option_name(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: no such option{_suggestion(str(detail['loc'][-1]), _neighbours(detail['loc']))}"
    if detail["type"] == "missing":
        return f"{where}: is required"
    message = detail["msg"].removeprefix("Value error, ")
    shown = detail["input"]
    is_option = len(detail["loc"]) > 1 and where != "upstream.proxy"
    value = f" {_without_password(repr(shown))}" if is_option and isinstance(shown, str | int | float | bool) else ""
    return f"{where}:{value} {message[:1].lower()}{message[1:]}"


def _option_name(location: tuple[int | str, ...]) -> str:
    """`targets[1].arn`, as a reader would write it (targets count from 1)."""
    text = ""
    for part in location:
        text += f"[{part + 1}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _neighbours(location: tuple[int | str, ...]) -> set[str]:
    sections = dict(_sections())
    section = sections.get(str(location[0])) if len(location) > 1 else None
    return set(section.model_fields) if section else set(sections)


def _suggestion(name: str, known: set[Any], prefix: str = "") -> str:
    """The known name that was probably meant; the `prefix` that all have makes none of them more alike."""
    close = difflib.get_close_matches(
        name.removeprefix(prefix), [one.removeprefix(prefix) for one in sorted(known)], n=1
    )
    return f"; did you mean {prefix}{close[0]}?" if close else "; see docs/configuration.md for all of them"


def _cross_checks(data: dict[str, Any]) -> Iterator[str]:
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
    yield from _tls_problems(server.get("tls_certificate"), server.get("tls_key"))
    yield from _url_problems(data)
    host = str(server.get("host", "127.0.0.1"))
    on_loopback = host in LOOPBACK_HOSTS or host.startswith("127.")
    if not on_loopback and _table(data, "access").get("anonymous") != "i-understand":
        yield (
            f"server.host: {host!r} can be reached from other machines, and callers are not identified: whoever "
            "reaches the proxy has its AWS rights. Listen on 127.0.0.1, or name the risk with "
            'access.anonymous = "i-understand"'
        )


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _table(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def _url_problems(data: dict[str, Any]) -> Iterator[str]:
    for section, name in (("server", "public_url"), ("aws", "sts_endpoint"), ("aws", "sagemaker_endpoint")):
        value = _table(data, section).get(name)
        if isinstance(value, str):
            try:
                parse_endpoint(value)
            except TargetError as error:
                yield f"{section}.{name}: {_without_password(repr(value))} {error}"
    proxy = _table(data, "upstream").get("proxy")
    if isinstance(proxy, str) and not re.fullmatch(r"http://([^/@\s]+@)?[^/@\s]+:\d+/?", proxy):
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
            yield f"server.{name}: {str(path)!r} cannot be read ({_reason(error)})"
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
        yield f"server.tls_certificate: does not go with tls_key ({_reason(error)})"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
