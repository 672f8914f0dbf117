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

from limits import parse_many
from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from mlflow_proxy.targets import (
    TARGET_NAME,
    PublicUrl,
    Target,
    default_endpoint,
    parse_arn,
    parse_endpoint,
    parse_public_url,
)

ENV_PREFIX = "MLFLOW_PROXY_"
CONFIG_VARIABLE = "MLFLOW_PROXY_CONFIG"
# A caller's, for `mlflow-proxy validate`.
KEY_VARIABLE = "MLFLOW_PROXY_KEY"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

Seconds = Annotated[float, Field(gt=0, le=3600)]
Network = IPv4Network | IPv6Network


def _rate(value: str) -> str:
    try:
        amounts = [rate.amount for rate in parse_many(value)]
    except ValueError:
        amounts = [0]
    if min(amounts) < 1:
        raise ValueError("is not a rate; write one like 100/second, 1000/minute or 5000 per hour")
    return value


Rate = Annotated[str, AfterValidator(_rate)]


def _none_by_word(value: Any) -> Any:
    """TOML has no null, so an option that is set by default is taken back by a word."""
    return None if value == "none" else value


# The reference of AssumeRole.
ExternalId = Annotated[str, Field(min_length=2, max_length=1224, pattern=r"^[\w+=,.@:/-]*$")]


def _role_arn(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(
        r"arn:aws(-us-gov)?:iam::[0-9]{12}:role/[A-Za-z0-9_+=,.@/-]{1,512}", value
    ):
        raise ValueError("is not a role's ARN; write arn:aws:iam::<account>:role/<name>")
    return value


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
        None,
        description="The URL callers use, when another server stands in front; its host is allowed. With a path, the "
        "proxy is below that.",
    )
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="Host names callers may use, besides the listening address, loopback and public_url's. "
        "`*.example.com` takes every name below.",
    )
    trusted_proxies: list[Network] = Field(
        default_factory=list,
        description="Networks whose X-Forwarded-For, X-Forwarded-Proto and identity headers count.",
    )
    trusted_hops: int = Field(
        1,
        ge=1,
        le=8,
        description="How many servers of trusted_proxies stand between callers and the proxy; X-Forwarded-For counts "
        "as far as they wrote it.",
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

    @property
    def address(self) -> PublicUrl | None:
        """`public_url`, taken apart."""
        return parse_public_url(self.public_url) if self.public_url else None

    @property
    def prefix(self) -> str:
        """The path below which callers see the proxy: `/mlflow`, or nothing."""
        return self.address.prefix if self.address else ""


class Upstream(Section):
    """How requests travel from the proxy to SageMaker."""

    connect_timeout: Seconds = Field(5.0, description="Seconds to connect, TLS handshake included.")
    first_byte_timeout: Seconds = Field(
        130.0,  # MLflow's client waits 120; one that is cut earlier repeats what MLflow is still working on
        description="Seconds from the sent request to its first answer byte, all attempts together.",
    )
    idle_timeout: Seconds = Field(60.0, description="Seconds between two chunks, while sending or receiving.")
    connections: int = Field(128, ge=1, le=4096, description="Connections per target and worker.")
    keep_alive: Seconds = Field(20.0, description="Seconds that an unused connection is kept.")
    retries: int = Field(2, ge=0, le=5, description="Further attempts, where repeating is surely safe.")
    proxy: str | None = Field(
        None,
        repr=False,  # it may hold a password
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
    metrics: bool = Field(True, description="Count requests, for /-/metrics.")


class Access(Section):
    """Who may call: API keys, and callers that are not identified at all."""

    anonymous: Literal["loopback", "i-understand"] = Field(
        "loopback",
        description="Where no way to identify callers is configured, the proxy listens on loopback only. "
        "`i-understand` lets it listen elsewhere: whoever reaches it then has its AWS rights.",
    )
    keys_file: Path | None = Field(
        None, description="File of API keys, made by `mlflow-proxy keys`. Changes count within about a second."
    )
    keys_secret: str | None = Field(
        None, description="ARN of a secret in AWS Secrets Manager that holds the same text as a keys file."
    )
    keys_refresh: Seconds = Field(60.0, description="Seconds between two looks at that secret.")

    @field_validator("keys_secret")
    @classmethod
    def _secret(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"arn:aws(-us-gov)?:secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:[A-Za-z0-9/_+=.@-]{1,519}", value
        ):
            raise ValueError("is not a secret's ARN; write arn:aws:secretsmanager:<region>:<account>:secret:<name>")
        return value


# What tokens may be signed with: all with a public key. With a shared secret or none at all, whoever can check a token
# could make one: never, whatever is configured.
SIGNATURE_ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)


class Oidc(Section):
    """Tokens and sign-in of an OpenID Connect provider."""

    issuer: str | None = Field(
        None, description="The provider's issuer URL, exactly as in its tokens; turns this way of identifying on."
    )
    audience: list[str] = Field(
        default_factory=list, description="What a token's `aud` must name, one of these. Required with issuer."
    )
    algorithms: list[str] = Field(
        default_factory=lambda: ["RS256", "ES256"],
        description="Signature algorithms that count: RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, "
        "EdDSA. Default: RS256 and ES256.",
    )
    jwks_url: str | None = Field(None, description="Where the provider's keys are. Default: by discovery.")
    keys_lifetime: Seconds = Field(600.0, description="Seconds after which the provider's keys are fetched again.")
    leeway: Annotated[float, Field(ge=0, le=300)] = Field(
        30.0, description="Seconds that the provider's clock may differ."
    )
    user_claim: str = Field(
        "sub",
        description="Claim that names the user: callers become `user:<value>`. `email` counts only where it is not "
        "said to be unverified.",
    )
    groups_claim: str | None = Field(
        None,
        description="Claim with the groups, a list or a text with spaces, 200 at most. Dots lead inwards: "
        "`realm_access.roles`.",
    )
    required_claims: dict[str, str] = Field(
        default_factory=dict,
        description="Claims that a token must have with just these values, such as a tenant's id; of a list, and of "
        "the words in `scope`, one must be it.",
    )
    ca_bundle: Path | None = Field(None, description="PEM file with the CAs to trust for the provider.")
    client_id: str | None = Field(None, description="The proxy's client at the provider; turns sign-in by browser on.")
    client_secret_file: Path | None = Field(
        None, description="File with that client's secret; none for a public client (PKCE protects both)."
    )
    scopes: list[str] = Field(
        default_factory=lambda: ["openid", "email", "profile"],
        description="What sign-in asks for; must have openid. Default: openid, email, profile.",
    )
    session_secret_file: Path | None = Field(
        None,
        description="File with 32 or more random bytes that seal the session cookie, the same on all instances. "
        "Exchanging it signs everybody out. Default: random ones, so that sessions end with the process.",
    )
    session_idle: Annotated[float, Field(ge=60, le=86400)] = Field(
        3600.0, description="Seconds without a request after which a browser's session ends."
    )
    session_lifetime: Annotated[float, Field(ge=60, le=604800)] = Field(
        43200.0, description="Seconds after which a browser's session ends in any case."
    )


class LoadBalancer(Section):
    """Identity that an AWS Application Load Balancer gives: its OIDC header. Counts from trusted_proxies only."""

    arn: str | None = Field(
        None, description="ARN of the load balancer that signs `x-amzn-oidc-data`; turns this way of identifying on."
    )
    key_endpoint: str | None = Field(
        None,
        description="URL that its keys are below. Default: `https://public-keys.auth.elb.<region>.amazonaws.com`, "
        "in GovCloud S3 of the region.",
    )
    issuer: str | None = Field(None, description="The issuer that the header's `iss` must name, if given.")
    client_id: str | None = Field(None, description="The client that the header's `client` must name, if given.")
    user_claim: str = Field("sub", description="Claim that names the user: callers become `user:<value>`.")
    groups_claim: str | None = Field(None, description="Claim with the groups, as in oidc.")
    leeway: Annotated[float, Field(ge=0, le=300)] = Field(30.0, description="Seconds that its clock may differ.")

    @field_validator("arn")
    @classmethod
    def _arn(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"arn:aws(-us-gov)?:elasticloadbalancing:[a-z0-9-]+:[0-9]{12}:loadbalancer/app/[A-Za-z0-9-]+/[0-9a-f]+",
            value,
        ):
            raise ValueError("is not a load balancer's ARN; write arn:aws:elasticloadbalancing:…:loadbalancer/app/…")
        return value


class Certificates(Section):
    """Client certificates that a load balancer or nginx verified. The headers count from trusted_proxies only."""

    subject_header: str | None = Field(
        None,
        description="Header with the verified certificate's subject, such as `x-amzn-mtls-clientcert-subject`; turns "
        "this way of identifying on. Callers become `cert:<subject>`.",
    )
    issuer_header: str | None = Field(None, description="Header with the issuer, for issuers.")
    issuers: list[str] = Field(
        default_factory=list, description="Issuers that count, exactly as the header gives them. Default: all."
    )
    verify_header: str | None = Field(
        None, description="Header that must say verify_value, such as nginx's `$ssl_client_verify`."
    )
    verify_value: str = Field("SUCCESS", description="What verify_header must say.")

    @field_validator("subject_header", "issuer_header", "verify_header")
    @classmethod
    def _header(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
            raise ValueError("is not a header's name")
        return value.lower() if value else value


class LimitSettings(Section):
    """How much callers may ask for. Rates are texts such as `100/second` or `5000 per hour`."""

    caller_rate: Rate | None = Field(None, description="Requests of each caller; several rates with `;`.")
    auth_failure_rate: Annotated[Rate | None, BeforeValidator(_none_by_word)] = Field(
        "30/minute", description="Failed authentications from each client address; beyond it 429. `none`: no limit."
    )
    storage: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="`redis://…`, `rediss://…`, `valkey://…` or `valkeys://…` that many instances share. "
        "Default: in memory, each worker its share.",
    )
    storage_away: Literal["open", "closed"] = Field(
        "open",
        description="While the storage does not answer: let requests through, each worker counting alone, or refuse "
        "them with 503.",
    )
    storage_timeout: Annotated[float, Field(gt=0, le=10)] = Field(0.5, description="Seconds to wait for the storage.")
    queue: int = Field(
        256, ge=0, le=65536, description="Requests per target and worker that wait for a place; more is 503 at once."
    )
    queue_timeout: Seconds = Field(10.0, description="Seconds that a request waits for a place.")
    concurrency_min: int = Field(
        4, ge=1, le=4096, description="Requests under way per target that throttling never goes below, per instance."
    )
    concurrency_max: int = Field(
        256,
        ge=1,
        le=65536,
        description="Requests under way per target at the most, per instance; no more than "
        "upstream.connections per worker.",
    )


class Audit(Section):
    """The audit log: every write, every denial, sign-in and sign-out, key changes."""

    to: str = Field("stderr", description="`stderr`, `stdout`, `off`, or a file's path, which is appended to.")


class Tracing(Section):
    """OpenTelemetry traces. Needs the extra `tracing`."""

    endpoint: str | None = Field(
        None, description="OTLP/HTTP endpoint, such as http://127.0.0.1:4318/v1/traces; turns tracing on."
    )
    sample: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of the traces begun here that is kept; a caller's own decision counts more."
    )
    service_name: str = Field("mlflow-proxy", description="The name under which spans are shown.")


class RoleSettings(Section):
    """One `[[roles]]` table: who may do what where, and as which IAM role. In the order in which they are tried."""

    name: str = Field(description="Name of the role; API keys are made for one.")
    subjects: list[str] = Field(
        default_factory=list,
        description="Callers that have it, with `*`: `user:*@example.com`, `key:ci-*`, `cert:CN=trainer,*`.",
    )
    groups: list[str] = Field(default_factory=list, description="Groups whose members have it, with `*`.")
    targets: list[str] = Field(description="Names of the targets that it is for, with `*`.")
    allow: list[str] = Field(
        default_factory=list, description="Actions that it allows, with `*`: `Get*`, `Search*`, `LogBatch`."
    )
    deny: list[str] = Field(
        default_factory=list, description="Actions that it denies, with `*`; wins over every allow, also other roles'."
    )
    assume_role_arn: str | None = Field(
        None, description="IAM role to sign with for these callers, instead of the target's."
    )
    external_id: ExternalId | None = Field(None, description="External ID for that role's trust policy.")
    session_tags: bool = Field(
        False, description="Tag the role's session with `caller` and `role`. Needs sts:TagSession in its trust policy."
    )
    source_identity: bool = Field(
        False, description="Set the session's source identity. Needs sts:SetSourceIdentity in its trust policy."
    )
    rate: Rate | None = Field(None, description="Requests of all callers in this role together.")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not TARGET_NAME.fullmatch(value):
            raise ValueError("use 1 to 63 letters, digits, '-' and '_', with a letter or digit at both ends")
        return value

    @field_validator("assume_role_arn")
    @classmethod
    def _role(cls, value: str | None) -> str | None:
        return _role_arn(value)


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
    external_id: ExternalId | None = Field(None, description="External ID for that role's trust policy.")
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
    rate: Rate | None = Field(None, description="Requests to this target, of all callers together.")
    concurrency_max: int | None = Field(
        None, ge=1, le=65536, description="Requests to this target under way at the most, instead of limits'."
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
        return _role_arn(value)

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
    oidc: Oidc = Field(default_factory=Oidc)
    load_balancer: LoadBalancer = Field(default_factory=LoadBalancer)
    certificates: Certificates = Field(default_factory=Certificates)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    audit: Audit = Field(default_factory=Audit)
    tracing: Tracing = Field(default_factory=Tracing)
    roles: list[RoleSettings] = Field(default_factory=list)
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
    def identifies(self) -> bool:
        """Whether any way to identify callers is configured; then nobody is served without."""
        return bool(
            self.access.keys_file
            or self.access.keys_secret
            or self.oidc.issuer
            or self.load_balancer.arn
            or self.certificates.subject_header
        )

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
