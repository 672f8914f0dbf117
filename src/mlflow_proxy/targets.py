"""Targets: from an ARN to what a request for it needs: endpoint, SigV4 service name, and the header that names it.

Pure values and parsing; nothing here talks to anybody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit


class TargetError(ValueError):
    """An ARN or endpoint that cannot be used; the message says what to write instead."""


class Mode(Enum):
    """The two kinds of SageMaker MLflow, with the words AWS uses for each."""

    TRACKING = ("mlflow-tracking-server", "sagemaker-mlflow", "x-mlflow-sm-tracking-server-arn")
    APP = ("mlflow-app", "sagemaker", "x-sm-mlflow-app-arn")

    def __init__(self, resource_type: str, service: str, arn_header: str) -> None:
        self.resource_type = resource_type
        self.service = service
        self.arn_header = arn_header


# Both offered partitions use the DNS suffix "aws".
PARTITIONS = ("aws", "aws-us-gov")
TARGET_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")

# Regions of partitions where SageMaker MLflow is not offered.
_FOREIGN_REGIONS = ("cn-", "us-iso", "eu-iso", "eusc-")
_RESOURCE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,254}[A-Za-z0-9])?")
_REGION = re.compile(r"[a-z]{2}(?:-[a-z]+)+-[0-9]{1,2}")
_EXAMPLE = "arn:aws:sagemaker:<region>:<account>:mlflow-tracking-server/<name> or …:mlflow-app/<id>"


@dataclass(frozen=True, slots=True)
class Arn:
    """The parts of a target's ARN that decide where a request goes and how it is signed."""

    text: str
    partition: str
    region: str
    account: str
    mode: Mode
    resource: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a target listens. `host` has no brackets; `authority` is what goes into the Host header."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Host with its port, where the port is not the scheme's own (RFC 9110 section 4.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The origin, without a trailing slash."""
        return f"{self.scheme}://{self.authority}"


_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Target:
    """One SageMaker MLflow that requests can be for."""

    name: str
    arn: Arn
    endpoint: Endpoint
    assume_role_arn: str | None = None
    external_id: str | None = None
    session_name: str = "sagemaker-mlflow-proxy"
    ca_bundle: str | None = None
    default: bool = False


def parse_arn(text: str) -> Arn:
    """Take a tracking server's or MLflow App's ARN apart; raises TargetError for any other text."""
    parts = text.split(":", 5)
    if len(parts) != 6 or parts[0] != "arn":
        raise TargetError(f"is not an ARN; write {_EXAMPLE}")
    _, partition, service, region, account, resource = parts
    if partition not in PARTITIONS:
        offered = " and ".join(PARTITIONS)
        raise TargetError(f"is in partition {partition!r}, where SageMaker MLflow is not offered; {offered} are")
    if service != "sagemaker":
        raise TargetError(f"belongs to service {service!r}, not sagemaker; write {_EXAMPLE}")
    if not _REGION.fullmatch(region):
        raise TargetError(f"has region {region!r}; write one like us-east-1")
    if (partition == "aws-us-gov") != region.startswith("us-gov-") or region.startswith(_FOREIGN_REGIONS):
        raise TargetError(f"names region {region!r}, which is not in partition {partition!r}")
    if not re.fullmatch(r"[0-9]{12}", account):
        raise TargetError(f"has account {account!r}; an AWS account has 12 digits")
    kind, _, name = resource.partition("/")
    for mode in Mode:
        if kind == mode.resource_type and _RESOURCE.fullmatch(name):
            return Arn(text, partition, region, account, mode, name)
    raise TargetError(f"names resource {resource!r}; write {_EXAMPLE}")


def default_endpoint(arn: Arn) -> Endpoint:
    """The public endpoint of a target's mode and region."""
    host = (
        f"{arn.region}.experiments.sagemaker.aws"
        if arn.mode is Mode.TRACKING
        else f"mlflow.sagemaker.{arn.region}.app.aws"
    )
    return Endpoint("https", host, 443)


@dataclass(frozen=True, slots=True)
class PublicUrl:
    """The address by which callers know the proxy. `prefix` is the path below which it is: `/mlflow`, or nothing."""

    endpoint: Endpoint
    prefix: str

    @property
    def url(self) -> str:
        """What callers have in MLFLOW_TRACKING_URI, without a trailing slash."""
        return self.endpoint.url + self.prefix


# The first parts of paths that mean something here or at MLflow: as a prefix, none could be told from that.
TAKEN = frozenset(
    {
        "-",
        "ajax-api",
        "api",
        "build",
        "favicon.ico",
        "gateway",
        "get-artifact",
        "graphql",
        "health",
        "index.html",
        "model-versions",
        "static-files",
        "t",
        "v1",
        "version",
    }
)


def parse_public_url(url: str) -> PublicUrl:
    """Take the address apart by which callers know the proxy. Raises TargetError."""
    match = re.fullmatch(r"([^:/?#]+://[^/?#]*)((?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)*)/?", url)
    if match is None:
        raise TargetError("is not an http(s) URL, with a plain path at the most; write one like https://host/mlflow")
    endpoint, prefix = parse_endpoint(match[1]), match[2]
    if prefix and prefix.split("/")[1] in TAKEN:
        first = prefix.split("/")[1]
        raise TargetError(f"has a path that begins with /{first}, which has a meaning of its own; choose another")
    return PublicUrl(endpoint, prefix)


def parse_endpoint(url: str) -> Endpoint:
    """An endpoint that replaces the public one: scheme, host and port only."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TargetError(f"is not a URL ({error}); write one like https://host or http://127.0.0.1:9500") from None
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise TargetError("is not an http(s) URL; write one like https://host or http://127.0.0.1:9500")
    if port == 0:
        raise TargetError("has port 0; leave the port out for the scheme's own, or name one")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise TargetError("may have only scheme, host and port: the path and query stay the caller's")
    if not re.fullmatch(r"[A-Za-z0-9.:_-]+", host):
        raise TargetError(f"has the host {host!r}, which is not a plain host name or address")
    return Endpoint(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme])
