"""`make cost`: what a deployment costs in a month while nobody calls it, per option, from a price file. No network.

The numbers of things are counted in the templates that CDK makes, so they cannot differ from what is deployed. What
depends on use (traffic, requests, storage) is named, not guessed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

from infra.commands import cdk, prerequisites
from infra.settings import SettingsError

PRICES = cdk.INFRA / "prices.toml"
HOURS = 730  # of a month, as AWS's own calculator has it
# The least that ElastiCache Serverless bills for Valkey, in GB (Amazon ElastiCache pricing).
_VALKEY_LEAST = 0.1
# Metrics of one host with detailed monitoring (Amazon CloudWatch pricing).
_HOST_METRICS = 7
_EXAMPLE = {
    "account": "111122223333",
    "region": "us-east-1",
    "image": "111122223333.dkr.ecr.us-east-1.amazonaws.com/mlflow-proxy:1",
    "certificate_arn": "arn:aws:acm:us-east-1:111122223333:certificate/11111111-2222-3333-4444-555555555555",
    "host_name": "mlflow.example.com",
}

Resources = Mapping[str, list[Mapping[str, Any]]]


class Price(NamedTuple):
    """US dollars for one unit; None where no figure could be had."""

    usd: float | None
    unit: str
    page: str


@dataclass(frozen=True)
class Prices:
    """The price file."""

    region: str
    date: str
    of: Mapping[str, Price]

    @classmethod
    def read(cls, path: Path = PRICES) -> Prices:
        """The file as it is."""
        data = tomllib.loads(path.read_text("utf-8"))
        region, date = data.pop("region"), data.pop("date")
        return cls(region, date, {name: Price(one.get("usd"), one["unit"], one["page"]) for name, one in data.items()})


class Line(NamedTuple):
    """One thing that costs by its mere existence: how many there are, and how many units of its price in a month."""

    what: str
    number: float
    price: str
    units: float


class Option(NamedTuple):
    """A way to deploy: its name, and the settings that differ."""

    name: str
    settings: Mapping[str, str]


# What people compare first, and then what they turn.
DEFAULTS = (
    Option("tracking, dev", {}),
    Option("serverless, dev", {"mlflow_type": "serverless"}),
    Option("tracking, prod", {"stack_env": "prod"}),
)
LEVERS = (
    Option("compute=fargate", {"compute": "fargate"}),
    Option("endpoints=none", {"endpoints": "none"}),
    Option("nat_gateways=0", {"nat_gateways": "0"}),
    Option("nat_gateways=per-zone", {"nat_gateways": "per-zone"}),
    Option("zones=3", {"zones": "3"}),
    Option("waf=false", {"waf": "false"}),
    Option("instances_min=1", {"instances_min": "1"}),
    Option("mlflow_size=Medium", {"mlflow_size": "Medium"}),
    Option(
        "the cheapest: serverless, endpoints=none, waf=false, instances_min=1",
        {"mlflow_type": "serverless", "endpoints": "none", "waf": "false", "instances_min": "1"},
    ),
)
NOT_COUNTED = (
    "traffic: through NAT gateways, endpoints and the load balancer (LCUs), between zones, and to the internet",
    "requests: WAF, Valkey (ECPUs), KMS, Secrets Manager, S3",
    "storage: artifacts, metadata of MLflow, access logs, log groups, images, the bucket of the CDK bootstrap",
    "CloudWatch Logs by what is written, Container Insights of Fargate, what alarms send",
    "hosts or tasks beyond the least number, CPU credits of t4g and t3, apps that people start in Studio",
    "Route 53, taxes; and nothing is taken off for free tiers, credits and savings plans",
)


def count(context: Mapping[str, str]) -> Resources:
    """The properties of all resources of a deployment, by type. Raises SettingsError."""
    from infra.app import build  # noqa: PLC0415  (starts Node.js)

    with tempfile.TemporaryDirectory() as folder:
        # What hosts are sent costs nothing, so nothing is built.
        for name in ("application", "function"):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "handler.py").touch()
        stubs = {
            "application": str(Path(folder) / "application"),
            "certificate_function": str(Path(folder) / "function"),
        }
        kept = prerequisites.context({})
        build({**kept, **stubs, **context}, {}, outdir=f"{folder}/out").synth()
        found: dict[str, list[Mapping[str, Any]]] = {}
        for path in Path(folder, "out").glob("*.template.json"):
            for resource in json.loads(path.read_text("utf-8"))["Resources"].values():
                found.setdefault(resource["Type"], []).append(resource.get("Properties", {}))
        return found


def settings_of(option: Option, given: Mapping[str, str]) -> dict[str, str]:
    """Context of an option on top of what is given, with examples for what a real deployment must name."""
    context = {"account": _EXAMPLE["account"], "region": _EXAMPLE["region"], **given, **option.settings}
    if context.get("compute") == "fargate":
        context.setdefault("image", _EXAMPLE["image"])
    if context.get("stack_env") == "prod" and not context.keys() & {"certificate_arn", "hosted_zone_id"}:
        context |= {name: _EXAMPLE[name] for name in ("certificate_arn", "host_name")}
    return context


def lines(found: Resources) -> list[Line]:
    """What of these resources costs by being there."""
    return [
        line for part in (_network, _balancer, _hosts, _tasks, _mlflow, _watch) for line in part(found) if line.number
    ]


def _of(found: Resources, type_: str) -> list[Mapping[str, Any]]:
    return found.get(f"AWS::{type_}", [])


def _hourly(what: str, number: int, price: str) -> Line:
    return Line(what, number, price, number * HOURS)


def _monthly(what: str, number: int, price: str) -> Line:
    return Line(what, number, price, number)


def _network(found: Resources) -> Iterator[Line]:
    yield _hourly("NAT gateways", len(_of(found, "EC2::NatGateway")), "nat-gateway")
    public = [one for one in _of(found, "ElasticLoadBalancingV2::LoadBalancer") if one["Scheme"] == "internet-facing"]
    # A public load balancer has an address in each zone.
    addresses = len(_of(found, "EC2::EIP")) + sum(len(one["Subnets"]) for one in public)
    yield _hourly("public IPv4 addresses", addresses, "public-ipv4")
    interfaces = [one for one in _of(found, "EC2::VPCEndpoint") if one["VpcEndpointType"] == "Interface"]
    zones = sum(len(one["SubnetIds"]) for one in interfaces)
    yield _hourly("interface endpoints, in each zone", zones, "interface-endpoint")


def _balancer(found: Resources) -> Iterator[Line]:
    yield _hourly("load balancer", len(_of(found, "ElasticLoadBalancingV2::LoadBalancer")), "load-balancer")
    acls = _of(found, "WAFv2::WebACL")
    yield _monthly("web ACL", len(acls), "web-acl")
    yield _monthly("rules in it", sum(len(one["Rules"]) for one in acls), "web-acl-rule")
    caches = len(_of(found, "ElastiCache::ServerlessCache"))
    yield Line("Valkey, the least", caches, "valkey", caches * _VALKEY_LEAST * HOURS)


def _hosts(found: Resources) -> Iterator[Line]:
    hosts = sum(int(one["MinSize"]) for one in _of(found, "AutoScaling::AutoScalingGroup"))
    for template in _of(found, "EC2::LaunchTemplate"):
        data = template["LaunchTemplateData"]
        kind = data["InstanceType"]
        yield _hourly(f"hosts, {kind}", hosts, kind.replace(".", "-"))
        gigabytes = sum(one["Ebs"]["VolumeSize"] for one in data["BlockDeviceMappings"])
        yield _monthly("GB of their disks", hosts * gigabytes, "gp3")
        if data["Monitoring"]["Enabled"]:
            yield _monthly("metrics of hosts", hosts * _HOST_METRICS, "metric")


def _tasks(found: Resources) -> Iterator[Line]:
    tasks = sum(one["DesiredCount"] for one in _of(found, "ECS::Service"))
    for definition in _of(found, "ECS::TaskDefinition"):
        kind = definition["RuntimePlatform"]["CpuArchitecture"].lower()
        cpus, gigabytes = int(definition["Cpu"]) / 1024, int(definition["Memory"]) / 1024
        yield Line("tasks: vCPUs", tasks * cpus, f"fargate-cpu-{kind}", tasks * cpus * HOURS)
        yield Line("tasks: GB of memory", tasks * gigabytes, f"fargate-memory-{kind}", tasks * gigabytes * HOURS)


def _mlflow(found: Resources) -> Iterator[Line]:
    for server in _of(found, "SageMaker::MlflowTrackingServer"):
        size = server["TrackingServerSize"]
        yield _hourly(f"tracking server, {size}", 1, f"tracking-server-{size.lower()}")
    yield _monthly("MLflow App", len(_of(found, "SageMaker::MlflowApp")), "mlflow-app")


def _watch(found: Resources) -> Iterator[Line]:
    yield _monthly("KMS keys", len(_of(found, "KMS::Key")), "kms-key")
    yield _monthly("secret", len(_of(found, "SecretsManager::Secret")), "secret")
    alarms = Counter("ANOMALY_DETECTION_BAND" in json.dumps(one) for one in _of(found, "CloudWatch::Alarm"))
    yield _monthly("alarms", alarms[False], "alarm")
    yield _monthly("alarms by anomaly", alarms[True], "anomaly-alarm")
    yield _monthly("metrics from the log", len(_of(found, "Logs::MetricFilter")), "metric")
    yield _monthly("dashboard", len(_of(found, "CloudWatch::Dashboard")), "dashboard")


class Amount(NamedTuple):
    """A sum in US dollars a month, and what is not in it for lack of a price."""

    usd: float
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.usd:.2f}" + (" + unknown" if self.unknown else "")


def amount(found: list[Line], prices: Prices) -> Amount:
    """What these lines cost together."""
    known = [(line, _price(prices, line.price).usd) for line in found]
    return Amount(
        sum(line.units * usd for line, usd in known if usd is not None),
        tuple(line.what for line, usd in known if usd is None),
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON: all options with their lines.")
def main(as_json: bool) -> None:
    """Print the monthly cost of what is there by itself, for the settings in CONTEXT and what can be turned."""
    try:
        given = cdk.context(os.environ)
        prices = Prices.read()
        made = [(option, lines(count(settings_of(option, given)))) for option in DEFAULTS]
        turned = [(option, _try(option, given)) for option in LEVERS]
    except (cdk.ContextError, SettingsError) as error:
        click.echo(error, err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(_as_json([*made, *turned], prices), indent=2))
        return
    _print(made, turned, prices)


def _try(option: Option, given: Mapping[str, str]) -> list[Line] | None:
    """None where the option does not go with what is given."""
    try:
        return lines(count(settings_of(option, given)))
    except SettingsError:
        return None


def _as_json(options: Sequence[tuple[Option, list[Line] | None]], prices: Prices) -> dict[str, Any]:
    return {
        "currency": "USD",
        "prices": {"region": prices.region, "date": prices.date},
        "options": [
            {
                "name": option.name,
                "settings": dict(option.settings),
                "monthly": round(amount(found, prices).usd, 2),
                "unknown": list(amount(found, prices).unknown),
                "lines": [
                    {
                        "what": line.what,
                        "number": line.number,
                        "monthly": None if (one := amount([line], prices)).unknown else round(one.usd, 2),
                    }
                    for line in found
                ],
            }
            for option, found in options
            if found is not None
        ],
        "not_counted": list(NOT_COUNTED),
    }


def _print(
    made: Sequence[tuple[Option, list[Line]]], turned: Sequence[tuple[Option, list[Line] | None]], prices: Prices
) -> None:
    click.echo(f"US dollars a month ({HOURS} hours) at rest; list prices of {prices.date} in {prices.region}.\n")
    whats = dict.fromkeys(line.what for _, found in made for line in found)
    rows = [("", *(option.name for option, _ in made))]
    rows += [(what, *(_cell(what, found, prices) for _, found in made)) for what in whats]
    rows.append(("together", *(str(amount(found, prices)) for _, found in made)))
    _table(rows)
    first, found = made[0]
    click.echo(f"\nWhat can be turned, from {first.name}:\n")
    base = amount(found, prices)
    _table([("", "together", "difference"), *(_lever(option, found, base, prices) for option, found in turned)])
    used = {line.price for _, found in (*made, *turned) for line in found or ()}
    pages = {_price(prices, name).page for name in used if _price(prices, name).usd is None}
    if pages:
        click.echo(f"\nunknown: see {', '.join(sorted(pages))}.")
    click.echo("\nNot counted:")
    for one in NOT_COUNTED:
        click.echo(f"  {one}")


def _price(prices: Prices, name: str) -> Price:
    """Instance types that are not in the file are on this page."""
    return prices.of.get(name, Price(None, "", "Amazon EC2 On-Demand pricing"))


def _cell(what: str, found: list[Line], prices: Prices) -> str:
    line = next((one for one in found if one.what == what), None)
    if line is None:
        return "-"
    sum_ = amount([line], prices)
    return f"{line.number:g} x " + ("unknown" if sum_.unknown else f"{sum_.usd:.2f}").rjust(7)


def _lever(option: Option, found: list[Line] | None, base: Amount, prices: Prices) -> tuple[str, str, str]:
    if found is None:
        return option.name, "-", "not with these settings"
    sum_ = amount(found, prices)
    return option.name, str(sum_), f"{sum_.usd - base.usd:+.2f}" if sum_.unknown == base.unknown else "unknown"


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
