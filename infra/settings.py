"""Every setting of the deployment once: name, type, default, one line of explanation, and what is wrong with a value.

Values come from CDK context (`-c name=value`, or `context` in cdk.json) and, for the environment and the mode, from the
variables STACK_ENV and MLFLOW_TYPE. Nothing here makes resources.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from ipaddress import AddressValueError, IPv4Network, NetmaskValueError
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from mlflow_proxy.access.mistakes import access_problems
from mlflow_proxy.settings import Rate, RoleSettings
from mlflow_proxy.targets import Mode

# CloudWatch Logs takes no other numbers (API reference of PutRetentionPolicy).
_RETENTION = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)
# Two rules each, and a security group has 60 of them (quotas of Amazon VPC, "Inbound or outbound rules").
_MOST_NETWORKS = 30
# The most that ECS waits before it ends a container on Fargate (API reference of ContainerDefinition, "stopTimeout").
_FARGATE_STOP_SECONDS = 120
_VARIABLES = {"stack_env": "STACK_ENV", "mlflow_type": "MLFLOW_TYPE"}
_ROOT = Path(__file__).parent.parent
_OIDC = (
    "oidc_issuer",
    "oidc_authorization_endpoint",
    "oidc_token_endpoint",
    "oidc_user_info_endpoint",
    "oidc_client_id",
    "oidc_client_secret_arn",
)


def _split(value: Any) -> Any:
    """A list as `-c` can give it: JSON, or texts between commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return [item.strip() for item in value.split(",") if item.strip()]


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("is not JSON") from None


def _from_root(value: Path) -> Path:
    """Relative paths begin at the repository, where people deploy; `cdk` runs in infra/."""
    return _ROOT / value


def _ipv4_network(value: str) -> IPv4Network:
    """A network such as security groups take it here. Raises ValueError with what to write instead."""
    try:
        network = IPv4Network(value, strict=False)
    except (AddressValueError, NetmaskValueError):
        raise ValueError(f"takes IPv4 networks such as 10.0.0.0/8, and {value} is none; write such a one") from None
    if str(network) != value:
        raise ValueError(f"takes networks as address/length without bits behind the length; write {network}")
    return network


def _toml(value: Any) -> Any:
    """The tables of a TOML file."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(_from_root(Path(value)).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not valid TOML: {error}") from None


Texts = Annotated[list[str], BeforeValidator(_split)]
Toml = Annotated[dict[str, Any], BeforeValidator(_toml)]
Folder = Annotated[Path, AfterValidator(_from_root)]


class CallerRole(BaseModel):
    """One role of callers, as `[[roles]]` of proxy.toml: what it may do, and who has it besides keys made for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,30}$")
    allow: list[str] = Field(min_length=1)
    deny: list[str] = Field(default_factory=list)
    subjects: list[str] = Field(default_factory=list)
    groups: list[str] = Field(default_factory=list)
    rate: Rate | None = None

    def of_proxy(self, target: str, assume_role_arn: str | None = None) -> RoleSettings:
        """The role as the proxy has it, for one target."""
        return RoleSettings.model_construct(
            **RoleSettings(targets=[target], **self.model_dump()).model_dump(),
        ).model_copy(update={"assume_role_arn": assume_role_arn, "session_tags": assume_role_arn is not None})


class Settings(BaseModel):
    """The whole deployment. Where a default is none, the description says what that means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stack_env: Literal["dev", "prod"] = Field(
        "dev",
        description="`dev` removes its data with its stacks; `prod` keeps data and protects stacks from deletion.",
    )
    mlflow_type: Literal["tracking", "serverless"] = Field(
        "tracking", description="The mode: a managed MLflow tracking server, or a serverless MLflow App."
    )
    account: str = Field(
        pattern=r"^[0-9]{12}$", description="AWS account. Default: that of the credentials (CDK_DEFAULT_ACCOUNT)."
    )
    region: str = Field(
        pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9]$",
        description="AWS region. Default: that of the credentials (CDK_DEFAULT_REGION).",
    )
    tags: Annotated[dict[str, str], BeforeValidator(_json)] = Field(
        default_factory=dict, description="Tags for all resources besides the four that are always there, as JSON."
    )

    vpc_id: str | None = Field(
        None, pattern=r"^vpc-[0-9a-f]{8,17}$", description="An existing VPC with private subnets. Default: a new one."
    )
    load_balancer_subnets: Texts = Field(
        default_factory=list,
        description="Subnets of an existing VPC, in which nothing but the internal load balancer is: the proxy trusts "
        "them. Default: the private ones.",
    )
    vpc_cidr: str = Field("10.42.0.0/16", description="Addresses of a new VPC, /16 to /22.")
    zones: int = Field(2, ge=2, le=3, description="Availability Zones of a new VPC.")
    zone_names: Texts = Field(
        default_factory=list,
        description="These zones by name, such as `eu-central-1a,eu-central-1c`, where the first ones lack something. "
        "Default: the first that AWS names.",
    )
    nat_gateways: Literal["0", "1", "per-zone"] | None = Field(
        None,
        description="NAT gateways of a new VPC. `0`: nothing leaves it but through endpoints. "
        "Default: 1 in dev, per-zone in prod.",
    )
    endpoints: Literal["all", "none"] | None = Field(
        None,
        description="Interface endpoints for AWS's services. Default: `all` in a new VPC, `none` in an existing one.",
    )

    studio_domain: str = Field(
        "sagemaker-infra", pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$", description="Name of the SageMaker AI domain."
    )
    studio_user: str = Field(
        "mlflow", pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$", description="Name of the user profile in it."
    )

    mlflow_name: str = Field(
        "mlflow",
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9-]{0,60}[A-Za-z0-9])?$",
        description="Name of the tracking server or App.",
    )
    mlflow_version: str | None = Field(
        None,
        pattern=r"^[0-9]+\.[0-9]+(\.[0-9]+)?$",
        description="MLflow version of a tracking server. Default: the newest that SageMaker offers.",
    )
    mlflow_size: Literal["Small", "Medium", "Large"] = Field("Small", description="Size of a tracking server.")
    maintenance_window: str | None = Field(
        None,
        pattern=r"^(Mon|Tue|Wed|Thu|Fri|Sat|Sun):([01][0-9]|2[0-3]):[0-5][0-9]$",
        description="Begin of the weekly maintenance in UTC, such as `Sun:03:30`. Default: SageMaker chooses.",
    )
    model_registration: bool = Field(False, description="Register MLflow models in the SageMaker Model Registry, too.")

    compute: Literal["ec2", "fargate"] = Field("ec2", description="Where the proxy runs.")
    architecture: Literal["arm64", "x86_64"] = Field("arm64", description="`arm64` is Graviton.")
    instance_type: str | None = Field(
        None, pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$", description="EC2 instance type. Default: t4g.small, or t3.small."
    )
    image: str | None = Field(
        None,
        description="Container image, such as `<account>.dkr.ecr.<region>.amazonaws.com/mlflow-proxy:1`; for Fargate.",
    )
    instances_min: int = Field(2, ge=1, le=50, description="Hosts or tasks at the least. prod takes 2 or more.")
    instances_max: int = Field(4, ge=1, le=100, description="Hosts or tasks at the most.")
    requests_per_target: int = Field(
        6000, ge=60, description="Requests per minute of one host or task beyond which there will be another."
    )
    cpu_target: int = Field(60, ge=10, le=90, description="CPU use in percent beyond which there will be another.")
    drain_seconds: int = Field(60, ge=10, le=900, description="Seconds that requests under way get when a host goes.")

    internet_facing: bool = Field(False, description="Give the load balancer public addresses.")
    allowed_cidrs: Texts = Field(
        default_factory=list, description="Networks that may reach the load balancer. Default: the VPC's own."
    )
    host_name: str | None = Field(
        None,
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+$",
        description="Name that callers use, such as `mlflow.example.com`. "
        "Default: the load balancer's own, in dev only.",
    )
    certificate_arn: str | None = Field(
        None,
        pattern=r"^arn:aws(-us-gov)?:acm:[a-z0-9-]+:[0-9]{12}:certificate/[A-Za-z0-9-]+$",
        description="ACM certificate for host_name. Default: one is requested in the hosted zone, or is self-signed.",
    )
    hosted_zone_id: str | None = Field(
        None, pattern=r"^Z[A-Z0-9]{1,31}$", description="Route 53 zone in which host_name is made."
    )
    hosted_zone_name: str | None = Field(None, description="Name of that zone, such as `example.com`.")
    oidc_issuer: str | None = Field(
        None, description="Sign-in of browsers at the load balancer: the provider's issuer. All `oidc_…` or none."
    )
    oidc_authorization_endpoint: str | None = Field(None, description="The provider's authorization endpoint.")
    oidc_token_endpoint: str | None = Field(None, description="The provider's token endpoint.")
    oidc_user_info_endpoint: str | None = Field(None, description="The provider's user info endpoint.")
    oidc_client_id: str | None = Field(None, description="The load balancer's client at the provider.")
    oidc_client_secret_arn: str | None = Field(
        None,
        pattern=r"^arn:aws(-us-gov)?:secretsmanager:.+$",
        description="Secret in Secrets Manager that holds that client's secret as plain text.",
    )
    oidc_groups_claim: str | None = Field(None, description="Claim with the caller's groups, for roles.")
    mtls_ca_bundle: str | None = Field(
        None,
        pattern=r"^s3://[a-z0-9.-]{3,63}/.+$",
        description="PEM file of CAs in S3, `s3://bucket/key`: callers must show a certificate of theirs.",
    )
    waf: bool = Field(True, description="Put AWS WAF before the load balancer.")
    waf_rate: int = Field(
        30000, ge=10, description="Requests of one address in five minutes beyond which WAF blocks it."
    )
    waf_counted_rules: Texts = Field(
        default_factory=lambda: ["SizeRestrictions_BODY"],
        description="Rules of AWS's common rule set that only count. SizeRestrictions_BODY blocks bodies over 8 KB.",
    )

    roles: Annotated[list[CallerRole], BeforeValidator(_json)] = Field(
        default_factory=lambda: [
            CallerRole(name="reader", allow=["Get*", "List*", "Search*", "AccessUI"]),
            CallerRole(name="writer", allow=["*"]),
        ],
        description="Roles of callers as JSON, each with name, allow, deny, subjects, groups, rate. Default: a "
        "`reader` and a `writer` without members; API keys are made for them.",
    )
    proxy_options: Toml | None = Field(
        None,
        description="TOML file with further options of the proxy, as in proxy.toml, such as `[oidc]` for tokens and "
        "`[limits]`. Relative paths begin at the repository.",
    )

    log_retention_days: int | None = Field(
        None, description="Days that logs are kept in CloudWatch. Default: 14 in dev, 365 in prod."
    )
    alarm_email: str | None = Field(
        None, pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$", description="Address that is told of alarms, after it confirmed."
    )

    application: Folder | None = Field(
        None, description="Folder with the application for EC2 hosts. Default: it is built from this repository."
    )
    certificate_function: Folder | None = Field(
        None, description="Folder with the function that makes self-signed certificates. Default: it is built."
    )

    @field_validator("nat_gateways", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("log_retention_days")
    @classmethod
    def _retention(cls, value: int | None) -> int | None:
        if value is not None and value not in _RETENTION:
            raise ValueError(f"is not one that CloudWatch takes; there are {', '.join(map(str, _RETENTION))}")
        return value

    @field_validator("vpc_cidr")
    @classmethod
    def _cidr(cls, value: str) -> str:
        if not 16 <= _ipv4_network(value).prefixlen <= 22:
            raise ValueError("must be /16 to /22, so that twelve subnets fit")
        return value

    @field_validator("allowed_cidrs")
    @classmethod
    def _cidrs(cls, value: list[str]) -> list[str]:
        for item in value:
            _ipv4_network(item)
        if len(value) > _MOST_NETWORKS:
            raise ValueError(
                f"has {len(value)} networks, and a security group takes {_MOST_NETWORKS}; write larger ones"
            )
        return value

    @property
    def is_prod(self) -> bool:
        """Whether data is kept and stacks are protected."""
        return self.stack_env == "prod"

    @property
    def mode(self) -> Mode:
        """The kind of target."""
        return Mode.TRACKING if self.mlflow_type == "tracking" else Mode.APP

    @property
    def nat_gateway_count(self) -> int:
        """NAT gateways of a new VPC."""
        choice = self.nat_gateways or ("per-zone" if self.is_prod else "1")
        return self.zones if choice == "per-zone" else int(choice)

    @property
    def is_closed(self) -> bool:
        """Whether nothing leads out of the VPC but endpoints."""
        return self.vpc_id is None and self.nat_gateway_count == 0

    @property
    def has_endpoints(self) -> bool:
        """Whether interface endpoints are made."""
        return (self.endpoints or ("all" if self.vpc_id is None else "none")) == "all"

    @property
    def signs_in(self) -> bool:
        """Whether the load balancer signs browsers in."""
        return self.oidc_issuer is not None

    @property
    def self_signed(self) -> bool:
        """Whether the load balancer gets a certificate that nobody vouches for."""
        return self.certificate_arn is None and self.hosted_zone_id is None

    @property
    def traces(self) -> bool:
        """Whether the proxy sends traces, which takes the extra `tracing`."""
        return bool((self.proxy_options or {}).get("tracing", {}).get("endpoint"))

    @property
    def shares_limits(self) -> bool:
        """Whether several instances count requests together."""
        return self.instances_max > 1

    @property
    def host_type(self) -> str:
        """The EC2 instance type."""
        return self.instance_type or ("t4g.small" if self.architecture == "arm64" else "t3.small")

    @property
    def retention_days(self) -> int:
        """Days that logs are kept."""
        return self.log_retention_days or (365 if self.is_prod else 14)


class SettingsError(Exception):
    """Settings that cannot be used. `problems` has one readable line per mistake, all of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(
            f"{len(problems)} {'mistake' if len(problems) == 1 else 'mistakes'} in the settings of the deployment:\n"
            + "\n".join(f"  ✗ {problem}" for problem in problems)
        )
        self.problems = problems


def load(context: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Settings from CDK context and environment. Raises SettingsError with every mistake found."""
    # Names with these signs are CDK's own: feature flags, and what it remembers of the account.
    data = {name: value for name, value in context.items() if not re.search(r"[:@/]", name) and value != ""}
    problems = [f"{name}: {_unknown(name)}" for name in data if name not in Settings.model_fields]
    data = {name: value for name, value in data.items() if name in Settings.model_fields}
    for name, variable in _VARIABLES.items():
        value = environ.get(variable)
        if value and data.setdefault(name, value) != value:
            problems.append(f"{name}: is {data[name]!r} in the context but {value!r} in {variable}; keep one of them")
    for name in ("account", "region"):
        if default := environ.get(f"CDK_DEFAULT_{name.upper()}"):
            data.setdefault(name, default)
    settings: Settings | None = None
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        problems += map(_explain, error.errors())
    else:
        problems += _cross_checks(settings)
    if problems or settings is None:
        raise SettingsError(list(dict.fromkeys(problems)))
    return settings


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"no such setting; did you mean {near[0]}?" if near else "no such setting; docs/deploy-aws.md lists all"


def _explain(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    field = Settings.model_fields.get(str(detail["loc"][0])) if detail["loc"] else None
    if detail["type"] == "missing" and where in ("account", "region"):
        return f"{where}: not known, because there are no AWS credentials; configure them, or give -c {where}=…"
    if detail["type"] == "missing":
        return f"{where}: is missing; add it"
    if detail["type"] == "extra_forbidden":
        return f"{where}: no such option of a role; there are {', '.join(CallerRole.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    hint = f" ({field.description})" if field is not None and "pattern" in detail["type"] else ""
    if "pattern" in detail["type"]:
        message = "does not have the right form"
    return f"{where}: {detail['input']!r} {message[0].lower()}{message[1:]}{hint}"


def _cross_checks(settings: Settings) -> Iterator[str]:
    yield from _network_problems(settings)
    yield from _compute_problems(settings)
    yield from _name_problems(settings)
    yield from _sign_in_problems(settings)
    yield from _role_problems(settings)
    if settings.proxy_options is not None:
        from infra import proxy_options  # noqa: PLC0415  (it builds on this module)

        yield from proxy_options.problems(settings)


def _network_problems(settings: Settings) -> Iterator[str]:
    if settings.internet_facing and not settings.allowed_cidrs:
        yield "allowed_cidrs: is required with internet_facing; name the networks of your callers, or 0.0.0.0/0 for all"
    if settings.vpc_id is not None and settings.nat_gateways is not None:
        yield "nat_gateways: counts only for a new VPC; remove it, or vpc_id"
    yield from _zone_problems(settings)
    yield from _load_balancer_problems(settings)
    if not settings.is_closed:
        return
    closed = "nat_gateways: 0 leaves no way out of the VPC but endpoints, and "
    if settings.mlflow_type == "serverless":
        yield closed + "no endpoint for MLflow Apps is known; write 1, or take mlflow_type=tracking"
    if settings.signs_in:
        yield closed + "sign-in needs to reach the provider and the load balancer's keys; write 1, or leave oidc_… out"
    if not settings.has_endpoints:
        yield closed + "endpoints=none leaves not even these; write endpoints=all"
    if settings.compute == "fargate" and settings.image is not None and not _ecr_image(settings):
        yield closed + f"only images in ECR of {settings.region} can be had; push the image there"


def _load_balancer_problems(settings: Settings) -> Iterator[str]:
    names = settings.load_balancer_subnets
    if names and settings.vpc_id is None:
        yield "load_balancer_subnets: counts only with vpc_id; a new VPC has subnets for the load balancer. Remove it"
    if names and settings.internet_facing:
        yield "load_balancer_subnets: counts only without internet_facing, which takes the public ones; remove it"
    if len(names) == 1:
        yield "load_balancer_subnets: names one subnet, and a load balancer takes two or more, each in another zone"


def _zone_problems(settings: Settings) -> Iterator[str]:
    names = settings.zone_names
    if not names:
        return
    if settings.vpc_id is not None:
        yield "zone_names: counts only for a new VPC; remove it, or vpc_id"
    if len(set(names)) != settings.zones:
        yield f"zone_names: must name {settings.zones} different zones, as zones says; write {settings.zones}"
    for name in names:
        if not re.fullmatch(rf"{settings.region}[a-z]", name):
            yield f"zone_names: {name} is no zone of {settings.region}; write names such as {settings.region}a"


def _ecr_image(settings: Settings) -> bool:
    return re.match(rf"[0-9]{{12}}\.dkr\.ecr\.{settings.region}\.amazonaws\.com/", settings.image or "") is not None


def _compute_problems(settings: Settings) -> Iterator[str]:
    if settings.compute == "fargate" and settings.image is None:
        yield "image: is required with compute=fargate; build deploy/container/Dockerfile, push it and name it here"
    if settings.compute == "fargate" and settings.instance_type is not None:
        yield "instance_type: counts only with compute=ec2; remove it"
    if settings.compute == "fargate" and settings.drain_seconds > _FARGATE_STOP_SECONDS:
        yield f"drain_seconds: Fargate waits {_FARGATE_STOP_SECONDS} at the most; make it smaller, or take compute=ec2"
    if settings.host_type.startswith("t2."):
        yield "instance_type: t2 has no EBS optimization, which hosts are started with; write a t3 type instead"
    if settings.compute == "ec2" and settings.image is not None:
        yield "image: counts only with compute=fargate; remove it"
    if settings.instances_min > settings.instances_max:
        yield "instances_min: is larger than instances_max; make it smaller"
    if settings.is_prod and settings.instances_min < 2:
        yield "instances_min: prod takes 2 or more, over several zones"
    if settings.compute == "ec2" and settings.instances_max <= settings.instances_min:
        yield "instances_max: must be larger than instances_min, because a new version starts beside the old ones"
    graviton = re.match(r"^([a-z]+[0-9]+g[a-z]*|a1)\.", settings.host_type) is not None
    if settings.compute == "ec2" and graviton != (settings.architecture == "arm64"):
        other = "x86_64" if settings.architecture == "arm64" else "arm64"
        yield f"instance_type: {settings.host_type} is not {settings.architecture}; write architecture={other}"
    if settings.mlflow_type == "serverless" and settings.mlflow_version is not None:
        yield "mlflow_version: counts only with mlflow_type=tracking; an App chooses its own; remove it"


def _name_problems(settings: Settings) -> Iterator[str]:
    if (settings.hosted_zone_id is None) != (settings.hosted_zone_name is None):
        yield "hosted_zone_id: goes with hosted_zone_name; give both, or neither"
    zone = settings.hosted_zone_name
    if zone is not None and not f".{settings.host_name}".endswith(f".{zone}"):
        yield f"host_name: must be in the zone {zone}, such as mlflow.{zone}"
    if settings.certificate_arn is not None and settings.host_name is None:
        yield "host_name: is required with certificate_arn; write the name that the certificate is for"
    if settings.certificate_arn is not None and f":acm:{settings.region}:" not in settings.certificate_arn:
        yield f"certificate_arn: must be in {settings.region}, where the load balancer is"
    if settings.self_signed and settings.is_prod:
        yield "certificate_arn: prod takes no self-signed certificate; give certificate_arn, or a hosted zone"
    if settings.self_signed and settings.host_name is not None:
        yield "host_name: needs a certificate; give certificate_arn, or hosted_zone_id and hosted_zone_name"


def _sign_in_problems(settings: Settings) -> Iterator[str]:
    given = [name for name in _OIDC if getattr(settings, name) is not None]
    for name in _OIDC:
        if given and name not in given:
            yield f"{name}: is missing; sign-in at the load balancer takes all of {', '.join(_OIDC)}"
        elif (
            name.endswith(("issuer", "endpoint")) and given and not str(getattr(settings, name)).startswith("https://")
        ):
            yield f"{name}: must be an https:// URL"
    if settings.oidc_groups_claim is not None and not given:
        yield "oidc_groups_claim: counts only with oidc_issuer; add that or remove this"


def _role_problems(settings: Settings) -> Iterator[str]:
    if not settings.roles:
        yield "roles: is empty, so nobody would be served; leave it out, or name some"
    # The proxy's own judgement, so that a deployment does not fail on the hosts.
    data = {
        "targets": [{"name": settings.mlflow_name}],
        "roles": [{"targets": ["*"], **role.model_dump(exclude_none=True)} for role in settings.roles],
    }
    yield from access_problems(data)


class Option(NamedTuple):
    """A setting as documentation lists it."""

    name: str
    type: str
    default: str
    description: str


def options() -> Iterator[Option]:
    """All settings in order, for a table."""
    for name, field in Settings.model_fields.items():
        default: Any = field.default
        if field.default_factory is not None:
            made: Callable[[], Any] = field.default_factory  # type: ignore[assignment]
            default = made()
        shown = "see text" if name in ("roles", "account", "region") or default is None else _shown(default)
        if default is None and "Default:" not in (field.description or ""):
            shown = "none"
        yield Option(name, _type_name(field.annotation), shown, field.description or "")


def options_table() -> str:
    """All settings as a Markdown table."""
    rows = [f"| `{one.name}` | {one.type} | {one.default} | {one.description} |" for one in options()]
    return "\n".join(["| setting | type | default | what it does |", "|---|---|---|---|", *rows])


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return ", ".join(map(str, default)) or "[]"
    return str(default) if default != {} else "{}"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (types.UnionType,) or str(get_origin(annotation)) == "typing.Union":
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is Literal:
        return " / ".join(f"`{one}`" for one in get_args(annotation))
    if get_origin(annotation) is list:
        return "list" if get_args(annotation) == (str,) else "JSON"
    names = {str: "text", int: "number", bool: "true / false", Folder: "folder", Toml: "file"}
    return names.get(annotation, "JSON")
