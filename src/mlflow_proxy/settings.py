"""Every option once: name, type, default, and one line of explanation.

Options are values here: `configuration` reads them, `mistakes` says what is wrong with them, and what they do is
written where they are used.
"""

from __future__ import annotations

import os
import re
import ssl
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from mlflow_proxy.targets import TARGET_NAME, Target, default_endpoint, parse_arn, parse_endpoint

ENV_PREFIX = "MLFLOW_PROXY_"
CONFIG_VARIABLE = "MLFLOW_PROXY_CONFIG"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

Seconds = Annotated[float, Field(gt=0, le=3600)]
Network = IPv4Network | IPv6Network


class Section(BaseModel):
    """One table of the file. An option that does not exist is a mistake, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(Section):
    """Where the proxy listens, and what it accepts from callers."""

    host: str = Field("127.0.0.1", description="IP address to listen on.")
    port: int = Field(8080, ge=1, le=65535, description="Port to listen on.")
    workers: int = Field(
        default_factory=lambda: min(
            4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ),
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
    header_timeout: Annotated[float, Field(gt=0, le=600)] = Field(
        75.0,
        description="Seconds for a caller to send the headers of a request, and that a kept connection may be unused. "
        "Longer than the load balancer's own idle timeout, lest it use a connection that just closed.",
    )
    body_timeout: Seconds = Field(
        30.0,
        description="Seconds that a caller may pause while it sends a body, and that the whole may take, with one "
        "more for each 16 KiB of it; then 408.",
    )
    connections: int = Field(
        4096, ge=16, le=65536, description="Connections that one worker holds at once; further ones wait in the kernel."
    )
    drain_timeout: Annotated[float, Field(ge=1, le=1800)] = Field(
        30.0, description="Seconds that requests under way get to finish when the proxy stops."
    )
    ready_max_age: Seconds = Field(
        30.0, description="/-/ready calls the target again when its last signed answer is older, in seconds."
    )

    @field_validator("host")
    @classmethod
    def _address(cls, value: str) -> str:
        try:
            ip_address(value)
        except ValueError:
            raise ValueError("is not an address to listen on; write one like 127.0.0.1, ::1 or 0.0.0.0") from None
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not re.fullmatch(r"(\*\.)?[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]+\]?", name):
                raise ValueError(f"{name!r} is not a host name; write one without scheme and port, or *.example.com")
        return value

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        for item in value if isinstance(value, list) else ():
            try:
                if not isinstance(item, str):
                    raise ValueError
                ip_network(item)
            except ValueError:
                raise ValueError(f"{item!r} is not a network; write one like 10.0.0.0/8 or 192.0.2.7") from None
        return value


class Upstream(Section):
    """How requests travel from the proxy to SageMaker."""

    connect_timeout: Seconds = Field(5.0, description="Seconds to connect, TLS handshake included.")
    first_byte_timeout: Seconds = Field(
        60.0, description="Seconds from the sent request to its first answer byte, all attempts together."
    )
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
                why = getattr(error, "strerror", None) or error
                raise ValueError(f"cannot be used ({why}); name a readable PEM file of CA certificates") from None
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
        return is_loopback(self.server.host)


def is_loopback(host: str) -> bool:
    """Whether a listening address can be reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
