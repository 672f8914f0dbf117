"""Synthesis for tests: each set of settings once per session, with what AWS would be asked or sent left out."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aws_cdk as cdk
from aws_cdk.assertions import Template
from infra.app import build, stack_ids

ROOT = Path(__file__).parents[2]
ACCOUNT = "123456789012"
REGION = "eu-central-1"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/mlflow-proxy:1"
CONTEXT: dict[str, Any] = json.loads((ROOT / "infra" / "cdk.json").read_text())["context"]

MODES = ("tracking", "serverless")
COMPUTES = ("ec2", "fargate")
# How the load balancer gets its certificate, and what else TLS settings change.
TLS: dict[str, dict[str, str]] = {
    "self-signed": {},
    "given": {
        "certificate_arn": f"arn:aws:acm:{REGION}:{ACCOUNT}:certificate/11111111-2222-3333-4444-555555555555",
        "host_name": "mlflow.example.com",
    },
    "requested": {
        "hosted_zone_id": "Z0123456789ABCDEFGHIJ",
        "hosted_zone_name": "example.com",
        "host_name": "mlflow.example.com",
    },
}
SIGN_IN = TLS["given"] | {
    "oidc_issuer": "https://login.example.com",
    "oidc_authorization_endpoint": "https://login.example.com/authorize",
    "oidc_token_endpoint": "https://login.example.com/token",
    "oidc_user_info_endpoint": "https://login.example.com/userinfo",
    "oidc_client_id": "mlflow",
    "oidc_client_secret_arn": f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:oidc-AbCdEf",
    "oidc_groups_claim": "groups",
}
CLIENT_CERTIFICATES = TLS["given"] | {"mtls_ca_bundle": "s3://company-cas/clients.pem"}
PROD = TLS["given"] | {"stack_env": "prod"}


@dataclass(frozen=True)
class Synthesized:
    """One application: its folder, and the templates by what their stack is for."""

    app: cdk.App
    folder: Path
    templates: dict[str, dict[str, Any]]

    def resources(self, stack: str, type_: str) -> dict[str, dict[str, Any]]:
        """The resources of a type in a stack, by logical id."""
        found = self.templates[stack]["Resources"].items()
        return {name: resource for name, resource in found if resource["Type"] == type_}

    def one(self, stack: str, type_: str) -> dict[str, Any]:
        """The properties of the only resource of a type."""
        (resource,) = self.resources(stack, type_).values()
        properties: dict[str, Any] = resource.get("Properties", {})
        return properties

    def template(self, stack: str) -> Template:
        """For CDK's own assertions."""
        return Template.from_json(self.templates[stack])


def settings(mlflow_type: str = "tracking", compute: str = "ec2", **more: str) -> dict[str, str]:
    """Context for a deployment. Folders stand in for what is built and sent to AWS."""
    fixtures = _fixtures()
    image = {"image": IMAGE} if compute == "fargate" else {}
    return {
        "account": ACCOUNT,
        "region": REGION,
        "application": str(fixtures / "application"),
        "certificate_function": str(fixtures / "function"),
        "mlflow_type": mlflow_type,
        "compute": compute,
        **image,
        **more,
    }


def synthesize(mlflow_type: str = "tracking", compute: str = "ec2", **more: str) -> Synthesized:
    """The four stacks of these settings."""
    return _synthesize(tuple(sorted(settings(mlflow_type, compute, **more).items())))


@cache
def _synthesize(given: tuple[tuple[str, str], ...]) -> Synthesized:
    folder = _folder("cdk-out-")
    context = dict(given)
    app = build(CONTEXT | context, {}, outdir=str(folder))
    app.synth()
    names = ("networking", "domain", "mlflow", "flaskapp")
    ids = stack_ids(context["mlflow_type"])
    templates = {
        name: json.loads((folder / f"{id_}.template.json").read_text()) for name, id_ in zip(names, ids, strict=True)
    }
    return Synthesized(app, folder, templates)


def _folder(prefix: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _fixtures() -> Path:
    folder = _folder("infra-fixtures-")
    (folder / "application" / "deploy").mkdir(parents=True)
    (folder / "application" / "deploy" / "install.sh").write_text("exit 0\n")
    (folder / "function").mkdir()
    handler = (ROOT / "infra" / "certificate" / "handler.py").read_text()
    (folder / "function" / "handler.py").write_text(handler)
    return folder


def every_statement(synthesized: Synthesized) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """All statements of IAM policies of roles: stack, policy, statement."""
    for stack, template in synthesized.templates.items():
        for name, resource in template["Resources"].items():
            if resource["Type"] in ("AWS::IAM::Policy", "AWS::IAM::ManagedPolicy"):
                for statement in resource["Properties"]["PolicyDocument"]["Statement"]:
                    yield stack, name, statement
            for policy in resource.get("Properties", {}).get("Policies", []) if "Role" in resource["Type"] else []:
                for statement in policy["PolicyDocument"]["Statement"]:
                    yield stack, name, statement


def as_list(value: Any) -> list[Any]:
    """IAM writes one of a thing without its list."""
    return value if isinstance(value, list) else [value]


# What CloudFormation would fill in, as far as the configuration has it.
_ATTRIBUTES = {
    "DNSName": "internal-proxy-1234567890.eu-central-1.elb.amazonaws.com",
    "Endpoint.Address": "mlflow-proxy.serverless.euc1.cache.amazonaws.com",
    "Endpoint.Port": "6379",
}


def resolve(value: Any) -> Any:  # noqa: PLR0911  (one per function of CloudFormation)
    """A value of a template with its intrinsic functions carried out, with made-up names in the right form."""
    if isinstance(value, list):
        return [resolve(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "Fn::Join" in value:
        separator, parts = value["Fn::Join"]
        return separator.join(map(resolve, parts))
    if "Fn::Base64" in value:
        return resolve(value["Fn::Base64"])
    if "Fn::GetAtt" in value:
        name, attribute = value["Fn::GetAtt"]
        if attribute == "Arn" and "Caller" in name:
            return f"arn:aws:iam::{ACCOUNT}:role/{name}"
        return _ATTRIBUTES.get(attribute, f"<{name}.{attribute}>")
    if "Fn::ImportValue" in value:
        name = value["Fn::ImportValue"]
        if "TrackingServerArn" in name:
            return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:mlflow-tracking-server/mlflow"
        if "AppArn" in name:
            return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:mlflow-app/app-ABCDEF123456"
        return f"<{name}>"
    if "Ref" in value:
        name = value["Ref"]
        if name.startswith("Keys"):
            return f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:{name}-AbCdEf"
        if name.startswith("LoadBalancer"):
            return f"arn:aws:elasticloadbalancing:{REGION}:{ACCOUNT}:loadbalancer/app/proxy/0123456789abcdef"
        return f"<{name}>"
    return {name: resolve(one) for name, one in value.items()}
