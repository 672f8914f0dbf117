"""The architecture as pictures: what the stacks' templates say, drawn. `python -m infra.picture` writes docs/images/.

This module reads the templates: which boxes there are, what is in them, and an arrow only where one resource refers to
another or may act on it. `picture_drawing` says where they stand. Nothing here talks to AWS or builds anything.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infra.app import build, stack_ids
from infra.application import ROOT
from infra.networking import VALKEY_PORTS

IMAGES = ROOT / "docs" / "images"
_ACCOUNT, _REGION = "123456789012", "eu-central-1"
# The pictures: the default, and the other mode on the other compute.
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "tracking-ec2": {"mlflow_type": "tracking"},
    "serverless-fargate": {
        "mlflow_type": "serverless",
        "compute": "fargate",
        "image": f"{_ACCOUNT}.dkr.ecr.{_REGION}.amazonaws.com/mlflow-proxy:1",
    },
}
_STACKS = ("networking", "domain", "mlflow", "flaskapp")
# Endpoints of which the proxy uses each for something that is drawn.
_CELLS = {
    "mlflow": ("experiments",),
    "roles": ("sts",),
    "secrets": ("secretsmanager",),
    "logs": ("logs",),
    "ssm": ("ssm", "ssmmessages"),
}
_STORES = {"ec2": ("s3",), "fargate": ("ecr.api", "ecr.dkr")}
_NAMES = {
    "experiments": "SageMaker MLflow",
    "sagemaker.api": "SageMaker API",
    "sts": "STS",
    "secretsmanager": "Secrets Manager",
    "logs": "CloudWatch Logs",
    "ssm": "Systems Manager",
    "s3": "S3",
    "ecr.api": "ECR",
}


class Box(NamedTuple):
    """Something that is drawn. `stack`: which one makes it, or empty for what is outside AWS."""

    stack: str
    title: str
    lines: tuple[str, ...] = ()


class Arrow(NamedTuple):
    """From one box to another. `kind`: `request`, `api` or `record`."""

    begin: str
    end: str
    kind: str
    label: str = ""


class Zone(NamedTuple):
    """An Availability Zone: the networks of its subnets by kind, and whether a NAT gateway is in it."""

    subnets: Mapping[str, str]
    nat: bool


@dataclass(frozen=True)
class Picture:
    """All that is drawn of one deployment."""

    title: str
    compute: str
    mode: str
    vpc: str
    internal: bool
    zones: tuple[Zone, ...]
    boxes: Mapping[str, Box]
    arrows: tuple[Arrow, ...]
    other_endpoints: tuple[str, ...]


class Resource(NamedTuple):
    """A resource of a template. `key` is its stack and logical id."""

    key: tuple[str, str]
    type: str
    properties: Mapping[str, Any]


class Templates:
    """The four templates as one graph: resources, and which of them refer to which, also across stacks."""

    def __init__(self, templates: Mapping[str, Mapping[str, Any]]) -> None:
        self._exports = {
            output["Export"]["Name"]: (stack, output["Value"])
            for stack, template in templates.items()
            for output in template.get("Outputs", {}).values()
            if "Export" in output
        }
        self.resources = {
            (stack, name): Resource((stack, name), one["Type"], one.get("Properties", {}))
            for stack, template in templates.items()
            for name, one in template["Resources"].items()
        }

    def all(self, type_: str, stack: str | None = None) -> list[Resource]:
        """The resources of a type."""
        found = self.resources.values()
        return [one for one in found if one.type == type_ and stack in (None, one.key[0])]

    def one(self, type_: str, stack: str | None = None, begin: str = "") -> Resource:
        """The only resource of a type, in a stack, whose logical id begins so."""
        (found,) = (one for one in self.all(type_, stack) if one.key[1].startswith(begin))
        return found

    def named(self, value: Any, stack: str) -> Iterator[tuple[str, str]]:
        """The resources that a value in a template names."""
        if isinstance(value, list):
            for one in value:
                yield from self.named(one, stack)
        elif isinstance(value, Mapping):
            for function, one in value.items():
                if function == "Ref" and (stack, one) in self.resources:
                    yield stack, one
                elif function == "Fn::GetAtt":
                    yield stack, one[0]
                elif function == "Fn::ImportValue":
                    there, exported = self._exports[one]
                    yield from self.named(exported, there)
                else:
                    yield from self.named(one, stack)

    def refers(self, begin: Resource, end: Resource, *path: str) -> bool:
        """Whether one resource names another, in the property at that path or anywhere."""
        value: Any = begin.properties
        for name in path:
            value = value.get(name, {})
        return end.key in set(self.named(value, begin.key[0]))

    def may(self, role: Resource, action: str, on: Resource) -> bool:
        """Whether a policy of a role allows an action on a resource."""
        for policy in self.all("AWS::IAM::Policy", role.key[0]):
            if not self.refers(policy, role, "Roles"):
                continue
            for statement in policy.properties["PolicyDocument"]["Statement"]:
                actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
                if action in actions and on.key in set(self.named(statement["Resource"], role.key[0])):
                    return True
        return False

    def actions(self, role: Resource) -> set[str]:
        """All that the policies of a role allow."""
        return {
            action
            for policy in self.all("AWS::IAM::Policy", role.key[0])
            if self.refers(policy, role, "Roles")
            for statement in policy.properties["PolicyDocument"]["Statement"]
            for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
        }


def synthesize(context: Mapping[str, str]) -> Templates:
    """The templates of a deployment with these settings, with empty folders for what would be built for it."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty"
        empty.mkdir()
        (empty / "file").touch()
        stand_ins = {"account": _ACCOUNT, "region": _REGION, "application": str(empty)}
        flags = json.loads((ROOT / "infra" / "cdk.json").read_text("utf-8"))["context"]
        made = Path(folder) / "cdk.out"
        build({**flags, **stand_ins, "certificate_function": str(empty), **context}, {}, outdir=str(made)).synth()
        names = zip(_STACKS, stack_ids(context["mlflow_type"]), strict=True)
        return Templates({name: json.loads((made / f"{id_}.template.json").read_text("utf-8")) for name, id_ in names})


def read(templates: Templates) -> Picture:
    """What there is to draw."""
    reader = _Reader(templates)
    mode = "tracking" if templates.all("AWS::SageMaker::MlflowTrackingServer") else "serverless"
    where = {"ec2": "EC2", "fargate": "Fargate"}[reader.compute]
    what = {"tracking": "a SageMaker MLflow tracking server", "serverless": "a serverless SageMaker MLflow App"}[mode]
    balancer = templates.one("AWS::ElasticLoadBalancingV2::LoadBalancer")
    return Picture(
        title=f"The proxy on {where} before {what}",
        compute=reader.compute,
        mode=mode,
        vpc=templates.one("AWS::EC2::VPC").properties["CidrBlock"],
        internal=balancer.properties["Scheme"] == "internal",
        zones=tuple(reader.zones()),
        boxes={name: box for name, box in reader.boxes() if box is not None},
        arrows=tuple(reader.arrows()),
        other_endpoints=tuple(reader.other_endpoints()),
    )


class _Reader:
    def __init__(self, templates: Templates) -> None:
        self._made = templates
        self.compute = "ec2" if templates.all("AWS::AutoScaling::AutoScalingGroup") else "fargate"
        self._balancer = templates.one("AWS::ElasticLoadBalancingV2::LoadBalancer")
        self._host = templates.one("AWS::IAM::Role", "flaskapp", "PermissionsHost")
        mlflow = ("AWS::SageMaker::MlflowTrackingServer", "AWS::SageMaker::MlflowApp")
        (self._mlflow,) = (one for type_ in mlflow for one in templates.all(type_))
        self._callers = [
            one for one in templates.all("AWS::IAM::Role", "flaskapp") if one.key[1].startswith("PermissionsCaller")
        ]
        self._cells = _CELLS | {"store": _STORES[self.compute]}

    def zones(self) -> Iterator[Zone]:
        subnets = self._made.all("AWS::EC2::Subnet")
        numbers = sorted({_zone(one) for one in subnets})
        gateways = self._made.all("AWS::EC2::NatGateway")
        for number in numbers:
            here = [one for one in subnets if _zone(one) == number]
            yield Zone(
                subnets={_tag(one, "aws-cdk:subnet-name"): one.properties["CidrBlock"] for one in here},
                nat=any(self._made.refers(gateway, one) for gateway in gateways for one in here),
            )

    # Boxes

    def boxes(self) -> Iterator[tuple[str, Box | None]]:
        yield "clients", Box("", "MLflow clients, curl, pipelines, browsers", ("with an API key or a token",))
        yield "operators", Box("", "Operators", ("no SSH, no bastion",))
        yield "waf", self._waf()
        yield "certificate", self._certificate()
        yield "maker", self._certificate_maker()
        yield "access_logs", Box("mlflow", "S3: access logs", ("of load balancer and artifacts",))
        scheme = self._balancer.properties["Scheme"]
        ports = sorted(one.properties["Port"] for one in self._made.all("AWS::ElasticLoadBalancingV2::Listener"))
        yield (
            "balancer",
            Box(
                "flaskapp",
                f"Application Load Balancer ({scheme})",
                (f"HTTPS {ports[1]}, TLS 1.3 and 1.2; HTTP {ports[0]} only redirects",),
            ),
        )
        yield "compute", self._group()
        yield "host", self._one_host()
        yield "valkey", self._valkey()
        for cell, services in self._cells.items():
            if self._is_used(cell):
                kind = "gateway" if services == ("s3",) else "interface"
                count = f"{len(services)} endpoints" if len(services) > 1 else f"{kind} endpoint"
                yield f"to_{cell}", Box("networking", _NAMES[services[0]], (count,))
        yield "mlflow", self._mlflow_box()
        names = ", ".join(role.key[1].removeprefix("PermissionsCaller")[:-8] for role in self._callers)
        yield "roles", Box("flaskapp", "IAM roles", (f"{names}:", "one session per caller"))
        yield "secrets", Box("flaskapp", "Secret: API keys", ("as hashes",))
        yield "logs", self._logs()
        yield (
            "ssm",
            Box("", "Session Manager", ("shell in a task" if self.compute == "fargate" else "shell on a host",)),
        )
        yield "store", self._store()
        yield "artifacts", Box("mlflow", "S3: artifacts", ("KMS key, versions,", "TLS only"))
        yield "domain", Box("domain", "SageMaker domain", ("VPC only, in the private", "subnets; one user"))
        filters, alarms = (len(self._made.all(f"AWS::{one}")) for one in ("Logs::MetricFilter", "CloudWatch::Alarm"))
        dashboards = len(self._made.all("AWS::CloudWatch::Dashboard"))
        yield (
            "alarms",
            Box(
                "flaskapp", "CloudWatch", (f"{filters} metrics of the log,", f"{dashboards} dashboard, {alarms} alarms")
            ),
        )
        topic = self._made.one("AWS::SNS::Topic")
        key = "KMS key" if "KmsMasterKeyId" in topic.properties else "not encrypted"
        mail = "mail" if self._made.all("AWS::SNS::Subscription") else "mail with alarm_email"
        yield "topic", Box("flaskapp", "SNS topic: alarms", (f"{key}, TLS only;", mail))

    def _waf(self) -> Box | None:
        if not self._made.all("AWS::WAFv2::WebACL"):
            return None
        rules = self._made.one("AWS::WAFv2::WebACL").properties["Rules"]
        managed = sum("ManagedRuleGroupStatement" in rule["Statement"] for rule in rules)
        (rate,) = (
            rule["Statement"]["RateBasedStatement"]["Limit"]
            for rule in rules
            if "RateBasedStatement" in rule["Statement"]
        )
        return Box("flaskapp", "AWS WAF", (f"{managed} managed rule groups,", f"{rate} per address in 5 min"))

    def _certificate(self) -> Box:
        if self._made.all("Custom::SelfSignedCertificate"):
            return Box("flaskapp", "ACM certificate", ("self-signed, for the load", "balancer's own name"))
        return Box("flaskapp", "ACM certificate")

    def _certificate_maker(self) -> Box | None:
        if not self._made.all("Custom::SelfSignedCertificate"):
            return None
        return Box("flaskapp", "Lambda function", ("makes it when deployed,", "renews it"))

    def _group(self) -> Box:
        if self.compute == "ec2":
            group = self._made.one("AWS::AutoScaling::AutoScalingGroup").properties
            return Box("flaskapp", f"Auto Scaling group, {group['MinSize']} to {group['MaxSize']} hosts")
        target = self._made.one("AWS::ApplicationAutoScaling::ScalableTarget").properties
        return Box("flaskapp", f"ECS service on Fargate, {target['MinCapacity']} to {target['MaxCapacity']} tasks")

    def _one_host(self) -> Box:
        if self.compute == "ec2":
            data = self._made.one("AWS::EC2::LaunchTemplate").properties["LaunchTemplateData"]
            return Box("flaskapp", "mlflow-proxy", (f"{data['InstanceType']}, Ubuntu 24.04", "IMDSv2, encrypted disk"))
        task = self._made.one("AWS::ECS::TaskDefinition").properties
        cpu, memory = int(task["Cpu"]) / 1024, int(task["Memory"]) / 1024
        architecture = task["RuntimePlatform"]["CpuArchitecture"]
        return Box("flaskapp", "mlflow-proxy", (f"{cpu:g} vCPU, {memory:g} GB, {architecture}", "read-only root"))

    def _valkey(self) -> Box | None:
        if not self._made.all("AWS::ElastiCache::ServerlessCache"):
            return None
        return Box("flaskapp", "Valkey (ElastiCache Serverless)", ("limits that all instances share",))

    def _mlflow_box(self) -> Box:
        if self._mlflow.type.endswith("TrackingServer"):
            size = self._mlflow.properties["TrackingServerSize"]
            return Box("mlflow", "Tracking server", ("SageMaker MLflow,", f"size {size}"))
        return Box("mlflow", "MLflow App", ("SageMaker, serverless",))

    def _logs(self) -> Box:
        groups = self._made.all("AWS::Logs::LogGroup", "flaskapp")
        days = {one.properties["RetentionInDays"] for one in groups}
        return Box("flaskapp", "Log groups", ("requests, audit, boot;" if self.compute == "ec2" else
                                              "requests, audit, shells;", f"flow logs; {days.pop()} days"))  # fmt: skip

    def _store(self) -> Box:
        if self.compute == "ec2":
            return Box("", "CDK's bucket", ("the application, and all", "packages it needs"))
        return Box("", "ECR repository", ("the proxy's image",))

    # Arrows

    def arrows(self) -> Iterator[Arrow]:
        yield from self._requests()
        yield from self._apis()
        yield from self._records()

    def _requests(self) -> Iterator[Arrow]:
        """The way of a request."""
        made = self._made
        if any(made.refers(one, self._balancer) for one in made.all("AWS::WAFv2::WebACLAssociation")):
            yield Arrow("clients", "waf", "request", "HTTPS")
            yield Arrow("waf", "balancer", "request")
        else:
            yield Arrow("clients", "balancer", "request", "HTTPS")
        targets = made.one("AWS::ElasticLoadBalancingV2::TargetGroup")
        runs = "AWS::AutoScaling::AutoScalingGroup" if self.compute == "ec2" else "AWS::ECS::Service"
        if made.refers(made.one(runs), targets):
            port, health = targets.properties["Port"], targets.properties["HealthCheckPath"]
            yield Arrow("balancer", "compute", "request", f"HTTP {port}, health {health}")
        if self._lets_in("ValkeyGroup", "ProxyGroup", VALKEY_PORTS[0]):
            yield Arrow("compute", "valkey", "api", f"TLS {VALKEY_PORTS[0]}")
        if self._calls_mlflow():
            if self._is_used("mlflow"):
                yield Arrow("compute", "endpoints", "request", "TLS 443")
                yield Arrow("to_mlflow", "mlflow", "request", "SigV4")
            elif made.all("AWS::EC2::NatGateway"):
                yield Arrow("compute", "nat", "request")
                yield Arrow("nat", "mlflow", "request", "SigV4")
        writer = made.one("AWS::IAM::Role", "mlflow", "MlflowRole")
        bucket = made.one("AWS::S3::Bucket", "mlflow", "Artifacts")
        if made.refers(self._mlflow, writer) and made.may(writer, "s3:PutObject", bucket):
            yield Arrow("mlflow", "artifacts", "request")

    def _apis(self) -> Iterator[Arrow]:
        """What else the proxy asks AWS for."""
        if self._is_used("roles") and not self._is_used("mlflow"):
            yield Arrow("compute", "endpoints", "api", "TLS 443")
        for cell in ("roles", "secrets", "ssm", "store"):
            if self._is_used(cell):
                yield Arrow(f"to_{cell}", cell, "api")
        for one in self._made.all("AWS::ElasticLoadBalancingV2::Listener"):
            for certificate in self._made.all("Custom::SelfSignedCertificate"):
                if self._made.refers(one, certificate, "Certificates" if one.properties.get("Certificates") else ""):
                    yield Arrow("certificate", "balancer", "api")
                function = self._made.one("AWS::Lambda::Function", "flaskapp")
                if one.properties.get("Certificates") and self._made.refers(certificate, function):
                    yield Arrow("maker", "certificate", "api")
        if "ssmmessages:OpenDataChannel" in self._made.actions(self._host):
            yield Arrow("operators", "ssm", "api")

    def _records(self) -> Iterator[Arrow]:
        """Logs, and what becomes of them."""
        made = self._made
        if self._is_used("logs"):
            yield Arrow("to_logs", "logs", "record")
        group = made.one("AWS::Logs::LogGroup", "flaskapp", "ProxyLogs")
        if all(made.refers(one, group) for one in made.all("AWS::Logs::MetricFilter")):
            yield Arrow("logs", "alarms", "record")
        topic = made.one("AWS::SNS::Topic")
        if all(made.refers(one, topic) for one in made.all("AWS::CloudWatch::Alarm")):
            yield Arrow("alarms", "topic", "record")
        if made.refers(self._balancer, made.one("AWS::S3::Bucket", "mlflow", "Logs")):
            yield Arrow("balancer", "access_logs", "record")

    # What the templates say

    def _calls_mlflow(self) -> bool:
        actions = ("sagemaker-mlflow:CreateRun", "sagemaker:CallMlflowAppApi")
        return any(self._made.may(role, action, self._mlflow) for role in self._callers for action in actions)

    def _is_used(self, cell: str) -> bool:
        """Whether the proxy may call what is behind an endpoint, and the endpoint is there."""
        if not set(self._cells[cell]) & set(self._endpoints()):
            return False
        made, host = self._made, self._host
        if cell == "mlflow":
            return self._mlflow.type.endswith("TrackingServer") and self._calls_mlflow()
        if cell == "roles":
            return all(made.may(host, "sts:AssumeRole", role) for role in self._callers)
        if cell == "secrets":
            return made.may(host, "secretsmanager:GetSecretValue", made.one("AWS::SecretsManager::Secret"))
        return {
            "logs": "logs:PutLogEvents" in made.actions(host) or self.compute == "fargate",
            "ssm": "ssmmessages:OpenDataChannel" in made.actions(host),
            "store": "s3:GetObject" in made.actions(host) or self.compute == "fargate",
        }[cell]

    def _lets_in(self, group: str, source: str, port: int) -> bool:
        """Whether a security group lets another one in."""
        to, origin = (self._made.one("AWS::EC2::SecurityGroup", "networking", name) for name in (group, source))
        return any(
            self._made.refers(rule, to, "GroupId")
            and self._made.refers(rule, origin, "SourceSecurityGroupId")
            and rule.properties.get("FromPort") == port
            for rule in self._made.all("AWS::EC2::SecurityGroupIngress")
        )

    def _endpoints(self) -> list[str]:
        """The services that have one, without what all names begin with."""
        names = [json.dumps(one.properties["ServiceName"]) for one in self._made.all("AWS::EC2::VPCEndpoint")]
        found = (re.search(rf"{_REGION}\.([a-z0-9.]+)|\.(s3)", name) for name in names)
        return [match[1] or match[2] for match in found if match is not None]

    def other_endpoints(self) -> Iterator[str]:
        drawn = {service for cell, services in self._cells.items() if self._is_used(cell) for service in services}
        names = {
            "ecr.dkr": "ECR (images)",
            "ecr.api": "ECR",
            "s3": "S3 (gateway)",
        }
        yield from sorted(names.get(one, _NAMES.get(one, one)) for one in self._endpoints() if one not in drawn)


def _tag(resource: Resource, name: str) -> str:
    return next(str(tag["Value"]) for tag in resource.properties["Tags"] if tag["Key"] == name)


def _zone(subnet: Resource) -> int:
    number: int = subnet.properties["AvailabilityZone"]["Fn::Select"][0]
    return number


def files() -> Iterator[tuple[Path, str]]:
    """The pictures, and where they are kept."""
    from infra.picture_drawing import draw  # noqa: PLC0415  (it draws what this module describes)

    for name, context in VARIANTS.items():
        yield IMAGES / f"architecture-aws-{name}.svg", draw(read(synthesize(context)))


def main() -> None:
    """Write all pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path, text in files():
        path.write_text(text, "utf-8")
        print(path.relative_to(ROOT))  # noqa: T201


if __name__ == "__main__":
    main()
