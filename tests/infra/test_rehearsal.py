"""Rehearsal: the real `cdk` command line deploys and destroys both modes, in both orders, against moto's server.

What moto's CloudFormation lacks is listed by name in moto_launcher.py; a test here fails when that list is not exact.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from infra.app import stack_ids
from infra.certificate import handler
from moto.cloudformation.parsing import get_model_map
from tests.infra import moto_launcher
from tests.infra.variants import (
    ACCOUNT,
    CLIENT_CERTIFICATES,
    COMPUTES,
    MODES,
    PROD,
    REGION,
    ROOT,
    SIGN_IN,
    TLS,
    Synthesized,
    settings,
    synthesize,
)

INFRA = ROOT / "infra"
SHARED = stack_ids("tracking")[:2]


@pytest.fixture(scope="session")
def cdk_command() -> list[str]:
    """The command line of CDK, in the version of infra/package-lock.json."""
    # Node.js from PyPI stands beside this Python; else the system's.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    npm, node = shutil.which("npm", path=path), shutil.which("node", path=path)
    assert npm is not None, "npm is missing; install requirements/infra.txt, which brings it"
    assert node is not None
    if not (INFRA / "node_modules" / "aws-cdk").is_dir():
        subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=INFRA, check=True, capture_output=True)
    return [node, str(INFRA / "node_modules" / "aws-cdk" / "bin" / "cdk")]


class Cloud:
    """moto's server, and the command line that works against it."""

    def __init__(self, port: int, log: Path, command: list[str]) -> None:
        self.log = log
        self._command = command
        # moto finds the bucket of a template's URL in hosts named localhost alone.
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(log.parent),
            "AWS_ENDPOINT_URL": f"http://localhost:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "CDK_DISABLE_CLI_TELEMETRY": "true",
            "NODE_NO_WARNINGS": "1",
        }

    def cdk(self, *arguments: str, fails: bool = False, folder: Path | None = None) -> str:
        """Run `cdk` in a folder; all that it printed."""
        done = subprocess.run(
            [*self._command, "--no-notices", "--ci", *arguments],
            env=self.environ | {"PYTHON": sys.executable},
            cwd=folder or self.log.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, f"cdk {' '.join(arguments)}:\n{output}\n{self.log.read_text()[-4000:]}"
        return output

    def bootstrap(self) -> None:
        """What `cdk bootstrap` does, from its own template, in a tenth of the time."""
        template = (
            INFRA / "node_modules" / "aws-cdk" / "lib" / "api" / "bootstrap" / "bootstrap-template.yaml"
        ).read_text()
        self.client("cloudformation").create_stack(
            StackName="CDKToolkit", TemplateBody=template, Capabilities=["CAPABILITY_NAMED_IAM"]
        )

    def deploy(self, made: Synthesized) -> None:
        self.cdk("deploy", "--app", str(made.folder), "--require-approval", "never", "--all")

    def destroy(self, made: Synthesized, *stacks: str) -> None:
        self.cdk("destroy", "--app", str(made.folder), "--force", "--exclusively", *stacks)

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.environ["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def stacks(self) -> set[str]:
        found = self.client("cloudformation").describe_stacks()["Stacks"]
        return {one["StackName"] for one in found if one["StackName"] != "CDKToolkit"}

    def outputs(self, stack: str) -> dict[str, str]:
        (found,) = self.client("cloudformation").describe_stacks(StackName=stack)["Stacks"]
        return {one["OutputKey"]: one["OutputValue"] for one in found["Outputs"]}

    def left(self) -> dict[str, list[str]]:
        """What there is in the account that the stacks made."""
        ec2, logs, s3 = self.client("ec2"), self.client("logs"), self.client("s3")
        vpcs = [one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"] if not one["IsDefault"]]
        mine = [{"Name": "vpc-id", "Values": vpcs or ["none"]}]
        return {
            "vpcs": vpcs,
            "subnets": [one["SubnetId"] for one in ec2.describe_subnets(Filters=mine)["Subnets"]],
            "endpoints": [
                one["VpcEndpointId"]
                for one in ec2.describe_vpc_endpoints()["VpcEndpoints"]
                if one["State"] != "deleted"
            ],
            "gateways": [
                one["NatGatewayId"] for one in ec2.describe_nat_gateways()["NatGateways"] if one["State"] != "deleted"
            ],
            "addresses": [one["AllocationId"] for one in ec2.describe_addresses()["Addresses"]],
            "buckets": [one["Name"] for one in s3.list_buckets()["Buckets"] if not one["Name"].startswith("cdk-")],
            "log groups": [one["logGroupName"] for one in logs.describe_log_groups()["logGroups"]],
            "secrets": [one["ARN"] for one in self.client("secretsmanager").list_secrets()["SecretList"]],
            "certificates": [
                one["CertificateArn"] for one in self.client("acm").list_certificates()["CertificateSummaryList"]
            ],
            "load balancers": [
                one["LoadBalancerArn"] for one in self.client("elbv2").describe_load_balancers()["LoadBalancers"]
            ],
            "groups": [
                one["AutoScalingGroupName"]
                for one in self.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
            ],
            "clusters": self._clusters(),
            "topics": [one["TopicArn"] for one in self.client("sns").list_topics()["Topics"]],
            "functions": [one["FunctionArn"] for one in self.client("lambda").list_functions()["Functions"]],
        }

    def _clusters(self) -> list[str]:
        ecs = self.client("ecs")
        found = ecs.describe_clusters(clusters=ecs.list_clusters()["clusterArns"])["clusters"]
        return [one["clusterArn"] for one in found if one["status"] == "ACTIVE"]


@contextlib.contextmanager
def _server(folder: Path, command: list[str]) -> Iterator[Cloud]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "moto.log"
    cloud = Cloud(port, log, command)
    starter = "from tests.infra.moto_launcher import main; main()"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", starter, str(port)],
            cwd=ROOT,
            env=cloud.environ | {"PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
        )
        try:
            _wait(f"http://localhost:{port}/moto-api/", process, log)
            yield cloud
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"moto's server did not start:\n{log.read_text()}")


@pytest.fixture
def bare_cloud(tmp_path: Path, cdk_command: list[str]) -> Iterator[Cloud]:
    """An account in which nobody has used CDK."""
    with _server(tmp_path, cdk_command) as running:
        yield running


@pytest.fixture
def cloud(bare_cloud: Cloud) -> Cloud:
    bare_cloud.bootstrap()
    return bare_cloud


# Deployed first, second; computes of each. The first is also destroyed first in one, and last in the other.
ORDERS = [
    pytest.param((("tracking", "ec2"), ("serverless", "fargate")), "first in, first out", id="tracking first"),
    pytest.param((("serverless", "ec2"), ("tracking", "fargate")), "last in, first out", id="serverless first"),
]


@pytest.mark.parametrize(("order", "way"), ORDERS)
def test_both_modes_come_and_go(bare_cloud: Cloud, order: tuple[tuple[str, str], tuple[str, str]], way: str) -> None:
    cloud = bare_cloud
    cloud.cdk("bootstrap", f"aws://{ACCOUNT}/{REGION}")
    made = {mode: synthesize(mode, compute) for mode, compute in order}
    (first, _), (second, _) = order

    cloud.deploy(made[first])
    assert cloud.stacks() == set(stack_ids(first))
    _check_deployed(cloud, first)

    shared_before = [cloud.client("cloudformation").describe_stacks(StackName=one)["Stacks"][0] for one in SHARED]
    cloud.deploy(made[second])
    assert cloud.stacks() == set(stack_ids(first)) | set(stack_ids(second))
    shared_after = [cloud.client("cloudformation").describe_stacks(StackName=one)["Stacks"][0] for one in SHARED]
    assert shared_before == shared_after, "the second mode must not touch what it shares"
    _check_deployed(cloud, second)
    _check_deployed(cloud, first)

    gone, kept = (first, second) if way == "first in, first out" else (second, first)
    _add_artifacts(cloud, gone)
    cloud.destroy(made[gone], *stack_ids(gone)[2:])
    assert cloud.stacks() == set(stack_ids(kept))
    _check_deployed(cloud, kept)

    output = cloud.cdk("destroy", "--app", str(made[kept].folder), "--force", "--exclusively", SHARED[0], fails=True)
    assert "in use by" in output, "the shared network must not go while a mode is there"
    assert cloud.stacks() == set(stack_ids(kept))

    cloud.destroy(made[kept], *stack_ids(kept))
    assert cloud.stacks() == set()
    left = {kind: found for kind, found in cloud.left().items() if found}
    assert left == {}, f"dev must clean up after itself, but left {left}"
    _check_log(cloud)


def _check_deployed(cloud: Cloud, mode: str) -> None:
    """Outputs are real: what they name is there."""
    outputs = cloud.outputs(stack_ids(mode)[3])
    host = outputs["LoadBalancerHost"]
    assert outputs["Url"] == f"https://{host}"
    assert outputs["TargetArn"].startswith(f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:mlflow-")
    balancers = {one["DNSName"]: one for one in cloud.client("elbv2").describe_load_balancers()["LoadBalancers"]}
    listeners = cloud.client("elbv2").describe_listeners(LoadBalancerArn=balancers[host]["LoadBalancerArn"])[
        "Listeners"
    ]
    (https,) = (one for one in listeners if one["Port"] == 443)
    arn = https["Certificates"][0]["CertificateArn"]
    assert arn in outputs["CertificateCommand"]
    certificate = cloud.client("acm").describe_certificate(CertificateArn=arn)["Certificate"]
    assert certificate["SubjectAlternativeNames"] == [host.lower()]
    secret = cloud.client("secretsmanager").get_secret_value(SecretId=outputs["KeysSecret"])
    assert secret["SecretString"].strip() == ""
    bucket = cloud.outputs(stack_ids(mode)[2])["ArtifactBucket"]
    cloud.client("s3").head_bucket(Bucket=bucket)


def _add_artifacts(cloud: Cloud, mode: str) -> None:
    """Objects with several versions, as MLflow leaves them."""
    bucket = cloud.outputs(stack_ids(mode)[2])["ArtifactBucket"]
    for body in (b"one", b"two"):
        cloud.client("s3").put_object(Bucket=bucket, Key="1/abc/artifacts/model.pkl", Body=body)
    cloud.client("s3").delete_object(Bucket=bucket, Key="1/abc/artifacts/model.pkl")


def _check_log(cloud: Cloud) -> None:
    """moto leaves out what it does not know, with a warning; none may have been given."""
    lines = cloud.log.read_text().splitlines()
    assert not [line for line in lines if "Fn::GetAtt" in line or "not supported" in line or "No Moto" in line]


def test_prod_is_protected_and_keeps_its_data(cloud: Cloud) -> None:
    certificate, key = handler.make_certificate("mlflow.example.com")
    given = cloud.client("acm").import_certificate(Certificate=certificate, PrivateKey=key)["CertificateArn"]
    made = synthesize(**PROD | {"certificate_arn": given})
    cloud.deploy(made)
    formation = cloud.client("cloudformation")
    output = cloud.cdk("destroy", "--app", str(made.folder), "--force", "--all", fails=True)
    assert "TerminationProtection is enabled" in output
    assert cloud.stacks() == set(stack_ids("tracking"))
    for stack in stack_ids("tracking"):
        formation.update_termination_protection(StackName=stack, EnableTerminationProtection=False)
    cloud.destroy(made, *stack_ids("tracking"))
    left = {kind: len(found) for kind, found in cloud.left().items() if found}
    assert left == {"buckets": 2, "log groups": 2, "secrets": 1, "certificates": 1}
    _check_log(cloud)


def _existing_vpc(cloud: Cloud) -> str:
    """A VPC as others make it, with two public and two private subnets and a NAT gateway."""
    ec2 = cloud.client("ec2")
    vpc = str(ec2.create_vpc(CidrBlock="10.7.0.0/16")["Vpc"]["VpcId"])
    inwards = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=inwards, VpcId=vpc)
    outwards = ""
    for number, kind in enumerate(("public", "private")):
        table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        for zone in range(2):
            subnet = ec2.create_subnet(
                VpcId=vpc, CidrBlock=f"10.7.{10 * number + zone}.0/24", AvailabilityZone=f"{REGION}{'ab'[zone]}"
            )["Subnet"]["SubnetId"]
            ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)
            if kind == "public" and not outwards:
                address = ec2.allocate_address(Domain="vpc")["AllocationId"]
                outwards = ec2.create_nat_gateway(SubnetId=subnet, AllocationId=address)["NatGateway"]["NatGatewayId"]
        way = {"GatewayId": inwards} if kind == "public" else {"NatGatewayId": outwards}
        ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", **way)
    return vpc


def test_existing_vpc_is_looked_up_and_deployed_into(cloud: Cloud, tmp_path: Path) -> None:
    """As people run it: in infra/ with its cdk.json, which runs the application, and settings on the command line."""
    vpc = _existing_vpc(cloud)
    folder = tmp_path / "repository" / "infra"
    shutil.copytree(INFRA, folder, ignore=shutil.ignore_patterns("node_modules", "__pycache__", "cdk.context.json"))
    context = [part for name, value in settings(vpc_id=vpc).items() for part in ("-c", f"{name}={value}")]
    cloud.cdk("deploy", "--require-approval", "never", "--all", *context, folder=folder)
    made = tmp_path / "repository" / "build" / "cdk.out"
    assert (made / "manifest.json").is_file(), (
        "what is synthesized goes into the repository's build/, which git ignores"
    )
    outputs = cloud.outputs(stack_ids("tracking")[3])
    (balancer,) = cloud.client("elbv2").describe_load_balancers()["LoadBalancers"]
    assert outputs["LoadBalancerHost"] == balancer["DNSName"]
    assert balancer["VpcId"] == vpc
    subnets = cloud.client("ec2").describe_subnets(SubnetIds=[one["SubnetId"] for one in balancer["AvailabilityZones"]])
    assert {one["CidrBlock"] for one in subnets["Subnets"]} == {"10.7.10.0/24", "10.7.11.0/24"}
    cloud.cdk("destroy", "--app", str(made), "--force", "--exclusively", *stack_ids("tracking"))
    assert cloud.left()["vpcs"] == [vpc], "what was there before stays"
    _check_log(cloud)


def types_of_variants() -> set[str]:
    variants = [synthesize(mode, compute) for mode in MODES for compute in COMPUTES]
    variants.append(synthesize(**PROD))
    return {
        resource["Type"]
        for made in variants
        for template in made.templates.values()
        for resource in template["Resources"].values()
    }


def test_list_of_what_moto_lacks_is_exact() -> None:
    """Fails if a type is stubbed that moto has come to know or no stack uses, or if one lacks."""
    listed = set(moto_launcher.STUBS) | set(moto_launcher.REAL)
    assert not set(moto_launcher.STUBS) & set(moto_launcher.REAL)
    lacking = {one for one in types_of_variants() if one not in get_model_map()}
    assert lacking == listed


# Types that only other TLS variants have. They are synthesized, checked and shown in snapshots, but not rehearsed.
NOT_REHEARSED = {
    "AWS::CertificateManager::Certificate",
    "AWS::ElasticLoadBalancingV2::ListenerRule",
    "AWS::ElasticLoadBalancingV2::TrustStore",
    "AWS::Route53::RecordSet",
}


def test_what_is_not_rehearsed_is_named() -> None:
    others = [synthesize(**more) for more in (TLS["requested"], SIGN_IN, CLIENT_CERTIFICATES)]
    found = {
        resource["Type"]
        for made in others
        for template in made.templates.values()
        for resource in template["Resources"].values()
    }
    assert found - types_of_variants() == NOT_REHEARSED
