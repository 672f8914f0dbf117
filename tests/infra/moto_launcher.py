"""moto's server, with what its CloudFormation lacks for these stacks. For tests only:
`python -c 'from tests.infra.moto_launcher import main; main()' PORT` (moto takes no models from a module `__main__`).

Resource types that moto does not know are listed here by name, so that their attributes are real and nothing is skipped
in silence. What can be had from moto's other services is made there (REAL); the rest are names and attributes (STUBS).
A test fails when a type is no longer needed here, or a new one lacks.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

import boto3
from infra.certificate import handler
from moto.cloudformation import parsing
from moto.cloudformation.exceptions import ValidationError
from moto.cloudformation.models import CloudFormationBackend
from moto.cloudformation.parsing import OutputMap
from moto.cloudformation.responses import CloudFormationResponse
from moto.core.common_models import CloudFormationModel
from moto.core.responses import ActionResult
from moto.ec2 import ec2_backends
from moto.ec2.models.elastic_ip_addresses import ElasticAddress
from moto.ec2.models.nat_gateways import NatGateway
from moto.ec2.models.route_tables import RouteTable
from moto.ec2.models.vpcs import VPCEndPoint
from moto.ecs.models import Cluster, ecs_backends
from moto.elbv2.models import FakeLoadBalancer, FakeTargetGroup
from moto.kms.models import Key
from moto.moto_api._internal import mock_random
from moto.s3.models import FakeBucket
from moto.server import main as serve
from moto.ssm.models import Parameter, ParameterDict
from tests.infra import moto_deletion

ACCOUNT = "123456789012"
UBUNTU_IMAGE = "ami-03cf127a"

Properties = Mapping[str, Any]
Attributes = Mapping[str, Callable[["Stub"], str]]


class Stub(CloudFormationModel):  # type: ignore[misc]
    """One resource that exists in CloudFormation only."""

    type = ""
    attributes: ClassVar[Attributes] = {}

    def __init__(self, name: str, properties: Properties, account: str, region: str) -> None:
        self.name = name
        self.properties = properties
        self.account = account
        self.region = region
        self.suffix = mock_random.get_random_hex(12)

    @property
    def physical_resource_id(self) -> str:
        """What Ref gives."""
        return self.attributes["Ref"](self) if "Ref" in self.attributes else self.name

    @classmethod
    def cloudformation_type(cls) -> str:
        return cls.type

    @staticmethod
    def cloudformation_name_type() -> str:
        return ""

    @classmethod
    def has_cfn_attr(cls, attr: str) -> bool:
        return attr in cls.attributes

    def get_cfn_attribute(self, attribute_name: str) -> str:
        """What Fn::GetAtt gives. An attribute that is not listed is a mistake here, not a silent None."""
        return self.attributes[attribute_name](self)

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **_: Any
    ) -> Stub:
        made = cls(resource_name, cloudformation_json.get("Properties", {}), account_id, region_name)
        made.create()
        return made

    @classmethod
    def update_from_cloudformation_json(
        cls, original_resource: Stub, new_resource_name: str, cloudformation_json: Any, **_: Any
    ) -> Stub:
        original_resource.properties = cloudformation_json.get("Properties", {})
        return original_resource

    @classmethod
    def delete_from_cloudformation_json(cls, *_: Any) -> None: ...

    def is_created(self) -> bool:
        return True

    def create(self) -> None:
        """Make it in moto's own service, if there is one."""

    def delete(self, account_id: str, region_name: str) -> None:
        """Remove what `create` made."""

    def client(self, service: str) -> Any:
        """A client of this very server."""
        return boto3.client(service, region_name=self.region)


class Secret(Stub):
    type = "AWS::SecretsManager::Secret"
    arn = ""
    attributes: ClassVar[Attributes] = {"Ref": lambda stub: stub.arn}

    def create(self) -> None:
        made = self.client("secretsmanager").create_secret(
            Name=self.name,
            Description=self.properties["Description"],
            SecretString=self.properties["SecretString"],
            Tags=self.properties["Tags"],
        )
        self.arn = made["ARN"]

    def delete(self, account_id: str, region_name: str) -> None:
        self.client("secretsmanager").delete_secret(SecretId=self.arn, ForceDeleteWithoutRecovery=True)


class BucketEmptier(Stub):
    """Does what CDK's function does before a bucket is deleted."""

    type = "Custom::S3AutoDeleteObjects"

    def delete(self, account_id: str, region_name: str) -> None:
        bucket = boto3.resource("s3", region_name=region_name).Bucket(self.properties["BucketName"])
        bucket.object_versions.delete()


class Domain(Stub):
    """A domain of Studio. As on AWS, it cannot go while anybody is in it."""

    type = "AWS::SageMaker::Domain"
    attributes: ClassVar[Attributes] = {
        "Ref": lambda stub: f"d-{stub.suffix}",
        "DomainId": lambda stub: f"d-{stub.suffix}",
    }

    def delete(self, account_id: str, region_name: str) -> None:
        if left := [key for key in moto_deletion.MEMBERS if key[1] == self.physical_resource_id]:
            raise RuntimeError(f"Unable to delete Domain [{self.physical_resource_id}]: it has {left}")


class UserProfile(Stub):
    """A user in a domain. As on AWS, it cannot go while it has apps."""

    type = "AWS::SageMaker::UserProfile"
    attributes: ClassVar[Attributes] = {
        "Ref": lambda stub: f"{stub.properties['UserProfileName']}|{stub.properties['DomainId']}"
    }

    @property
    def _named(self) -> dict[str, str]:
        return {name: self.properties[name] for name in ("UserProfileName", "DomainId")}

    def create(self) -> None:
        self.client("sagemaker").create_user_profile(**self._named)

    def delete(self, account_id: str, region_name: str) -> None:
        self.client("sagemaker").delete_user_profile(**self._named)


class SelfSignedCertificate(Stub):
    """Runs the very function that runs in Lambda, which answers to a URL as CloudFormation has it."""

    type = "Custom::SelfSignedCertificate"
    attributes: ClassVar[Attributes] = {"Ref": lambda stub: stub.arn}
    arn = "none"

    def create(self) -> None:
        self.arn = self._ask("Create")

    def delete(self, account_id: str, region_name: str) -> None:
        self._ask("Delete")

    def _ask(self, kind: str) -> str:
        answers: list[dict[str, str]] = []

        class Receiver(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        event = {
            "RequestType": kind,
            "ResponseURL": f"http://127.0.0.1:{server.server_port}/",
            "StackId": "stack",
            "RequestId": "request",
            "LogicalResourceId": self.name,
            "PhysicalResourceId": self.arn,
            "ResourceProperties": self.properties,
        }
        handler.handle(event, None)
        thread.join()
        server.server_close()
        if answers[0]["Status"] != "SUCCESS":
            raise RuntimeError(answers[0]["Reason"])
        return answers[0]["PhysicalResourceId"]


def _arn(service: str, pattern: str) -> Callable[[Stub], str]:
    def make(stub: Stub) -> str:
        return f"arn:aws:{service}:{stub.region}:{stub.account}:{pattern.format(stub=stub, **_texts(stub.properties))}"

    return make


def _texts(properties: Properties) -> dict[str, str]:
    return {name: value for name, value in properties.items() if isinstance(value, str)}


class MlflowTrackingServer(Stub):
    """A tracking server; its API tells of it and deletes it."""

    type = "AWS::SageMaker::MlflowTrackingServer"
    attributes: ClassVar[Attributes] = {
        "Ref": lambda stub: stub.properties["TrackingServerName"],
        "TrackingServerArn": _arn("sagemaker", "mlflow-tracking-server/{TrackingServerName}"),
    }

    def create(self) -> None:
        told = {"TrackingServerArn": self.attributes["TrackingServerArn"](self), "TrackingServerStatus": "Created"}
        moto_deletion.MLFLOW[self.physical_resource_id] = {**self.properties, **told}

    def delete(self, account_id: str, region_name: str) -> None:
        moto_deletion.MLFLOW.pop(self.physical_resource_id, None)


class MlflowApp(Stub):
    """An App; its API tells of it and deletes it."""

    type = "AWS::SageMaker::MlflowApp"
    attributes: ClassVar[Attributes] = {
        "Ref": _arn("sagemaker", "mlflow-app/app-{stub.suffix}"),
        "Arn": _arn("sagemaker", "mlflow-app/app-{stub.suffix}"),
    }

    def create(self) -> None:
        told = {"Arn": self.physical_resource_id, "Status": "Created"}
        moto_deletion.MLFLOW[self.physical_resource_id] = {**self.properties, **told}

    def delete(self, account_id: str, region_name: str) -> None:
        moto_deletion.MLFLOW.pop(self.physical_resource_id, None)


REAL: dict[str, type[Stub]] = {
    one.type: one
    for one in (
        Secret,
        BucketEmptier,
        Domain,
        UserProfile,
        MlflowTrackingServer,
        MlflowApp,
        SelfSignedCertificate,
    )
}

# Types with the attributes that templates ask for; `Ref` where it is not the name that moto makes.
STUBS: dict[str, Attributes] = {
    "AWS::ApplicationAutoScaling::ScalableTarget": {},
    "AWS::ApplicationAutoScaling::ScalingPolicy": {},
    "AWS::AutoScaling::LifecycleHook": {},
    "AWS::AutoScaling::ScalingPolicy": {},
    "AWS::CloudWatch::Alarm": {},
    "AWS::EC2::SecurityGroupEgress": {},
    "AWS::ElastiCache::ServerlessCache": {
        "Endpoint.Address": lambda stub: f"{stub.properties['ServerlessCacheName']}-{stub.suffix}.cache.amazonaws.com",
        "Endpoint.Port": lambda _: "6379",
    },
    "AWS::Logs::MetricFilter": {},
    # Not made in moto's S3: that judges policies without their conditions, so "deny without TLS" would deny everything.
    "AWS::S3::BucketPolicy": {},
    "AWS::SNS::TopicPolicy": {},
    "AWS::WAFv2::WebACL": {"Arn": _arn("wafv2", "regional/webacl/proxy/{stub.suffix}")},
    "AWS::WAFv2::WebACLAssociation": {},
}


def register() -> None:
    """Make moto's CloudFormation know all of them."""
    kinds: dict[str, type[Stub]] = dict(REAL)
    for type_, attributes in STUBS.items():
        kinds[type_] = type(type_.replace(":", ""), (Stub,), {"type": type_, "attributes": attributes})
    known = parsing.resource_class_from_type

    def find(resource_type: str) -> Any:
        return kinds.get(resource_type) or known(resource_type)

    parsing.resource_class_from_type = find


def repair() -> None:
    """What moto knows of CloudFormation, but gets wrong for these stacks."""
    _delete_what_is_left()
    _tag_keys()
    _keep_versions()
    _name_balancers()
    # Innermost first: what refuses a deletion stands before what does it.
    moto_deletion.repair()
    _export()
    _protect()


def _delete_what_is_left() -> None:
    """moto never deletes these of what CloudFormation made, so that a VPC with route tables could not be deleted."""

    def route_table(self: RouteTable, account_id: str, region_name: str) -> None:
        backend = ec2_backends[account_id][region_name]
        for association in list(self._associations):
            backend.disassociate_route_table(association)
        backend.delete_route_table(self.id)

    def endpoint(self: VPCEndPoint, account_id: str, region_name: str) -> None:
        ec2_backends[account_id][region_name].delete_vpc_endpoints([self.id])

    def gateway(self: NatGateway, account_id: str, region_name: str) -> None:
        backend = ec2_backends[account_id][region_name]
        backend.delete_nat_gateway(self.id)
        backend.delete_network_interface(self._eni.id)

    def address(self: ElasticAddress, account_id: str, region_name: str) -> None:
        ec2_backends[account_id][region_name].release_address(allocation_id=self.allocation_id)

    def cluster(self: Cluster, account_id: str, region_name: str) -> None:
        ecs_backends[account_id][region_name].delete_cluster(self.name)

    deletions: dict[Any, Any] = {
        RouteTable: route_table,
        VPCEndPoint: endpoint,
        NatGateway: gateway,
        ElasticAddress: address,
        Cluster: cluster,
    }
    for kind, delete in deletions.items():
        own = kind.delete_from_cloudformation_json
        if hasattr(kind, "delete") or not getattr(own, "__isabstractmethod__", False):
            raise AssertionError(f"moto deletes {kind.__name__} now: take it from this list")
        kind.delete = delete


def _tag_keys() -> None:
    """moto takes the tags of KMS keys from CloudFormation's `Key` and `Value` for KMS's `TagKey` and `TagValue`.

    And it keeps the policy as an object, where everything else of it wants JSON.
    """
    original = Key.create_from_cloudformation_json.__func__

    def create(cls: type[Key], name: str, resource: dict[str, Any], *args: Any, **kwargs: Any) -> Key:
        properties = dict(resource["Properties"])
        tags = properties.get("Tags", [])
        properties["Tags"] = [{"TagKey": tag["Key"], "TagValue": tag["Value"]} for tag in tags]
        properties["KeyPolicy"] = json.dumps(properties["KeyPolicy"])
        made: Key = original(cls, name, {**resource, "Properties": properties}, *args, **kwargs)
        return made

    Key.create_from_cloudformation_json = classmethod(create)


def _keep_versions() -> None:
    """moto's buckets have no versions when CloudFormation makes them."""
    original = FakeBucket.create_from_cloudformation_json.__func__

    def create(cls: type[FakeBucket], name: str, resource: dict[str, Any], *args: Any, **kwargs: Any) -> FakeBucket:
        made: FakeBucket = original(cls, name, resource, *args, **kwargs)
        if made.versioning_status is not None:
            raise AssertionError("moto's buckets have versions now: take that from here")
        made.versioning_status = resource["Properties"].get("VersioningConfiguration", {}).get("Status")
        return made

    FakeBucket.create_from_cloudformation_json = classmethod(create)


def _name_balancers() -> None:
    """moto's target groups have no attributes for CloudFormation, and its load balancers lack their full name."""
    known = FakeLoadBalancer.get_cfn_attribute

    def of_group(self: FakeTargetGroup, attribute_name: str) -> str:
        names = {"TargetGroupFullName": self.arn.split(":")[-1], "TargetGroupArn": self.arn}
        return str(names[attribute_name])

    def of_balancer(self: FakeLoadBalancer, attribute_name: str) -> str:
        if attribute_name == "LoadBalancerFullName":
            return str(self.arn.split(":loadbalancer/")[-1])
        return str(known(self, attribute_name))

    FakeTargetGroup.get_cfn_attribute = of_group
    FakeLoadBalancer.get_cfn_attribute = of_balancer


def _protect() -> None:
    """moto does not know UpdateTerminationProtection, and deletes protected stacks."""

    def update_termination_protection(self: CloudFormationResponse) -> ActionResult:
        backend = self.cloudformation_backend
        stack = backend.get_stack(self._get_param("StackName"))
        stack.enable_termination_protection = bool(self._get_param("EnableTerminationProtection"))
        return ActionResult({"StackId": stack.stack_id})

    delete = CloudFormationBackend.delete_stack

    def delete_unless_protected(self: CloudFormationBackend, name_or_stack_id: str) -> None:
        for stack in self.stacks.values():
            if name_or_stack_id in (stack.name, stack.stack_id) and stack.enable_termination_protection:
                raise ValidationError(
                    stack.name, f"Stack [{stack.name}] cannot be deleted while TerminationProtection is enabled"
                )
        delete(self, name_or_stack_id)

    CloudFormationResponse.update_termination_protection = update_termination_protection
    CloudFormationBackend.delete_stack = delete_unless_protected


def _export() -> None:
    """Stacks that moto makes by change sets have no description and no outputs, export nothing and import nothing.

    And it deletes stacks whose exports others import, which CloudFormation refuses.
    """
    execute = CloudFormationBackend.execute_change_set
    delete = CloudFormationBackend.delete_stack

    def execute_and_export(self: CloudFormationBackend, change_set_name: str, stack_name: str | None = None) -> None:
        change_set = self.describe_change_set(change_set_name)
        stack = change_set.stack
        stack.cross_stack_resources = stack.resource_map.cross_stack_resources = self.exports
        execute(self, change_set_name, stack_name)
        stack.template_dict = change_set.template_dict
        stack.description = change_set.template_dict.get("Description")
        stack.output_map = OutputMap(stack.resource_map, stack.template_dict, stack.stack_id)
        prefix = f"{stack.name}:"
        for name in [name for name in self.exports if name.startswith(prefix)]:
            del self.exports[name]
        self.exports.update({export.name: export for export in stack.exports})

    def delete_unless_used(self: CloudFormationBackend, name_or_stack_id: str) -> None:
        for stack in self.stacks.values():
            if name_or_stack_id not in (stack.name, stack.stack_id):
                continue
            for other in self.stacks.values():
                for export in stack.exports:
                    if other is not stack and export.name in str(other.template):
                        raise ValidationError(
                            stack.name, f"Export {export.name} cannot be deleted as it is in use by {other.name}"
                        )
        delete(self, name_or_stack_id)

    CloudFormationBackend.execute_change_set = execute_and_export
    CloudFormationBackend.delete_stack = delete_unless_used


def seed_images() -> None:
    """Canonical's parameters, which are AWS's to write: moto refuses them from a client."""
    original = ParameterDict._check_loading_status

    def check(self: ParameterDict, key: str) -> None:
        original(self, key)
        if str(key).startswith("/aws/service/canonical/") and not dict.get(self, key):
            self[key] = [
                Parameter(
                    account_id=self.account_id,
                    name=key,
                    value=UBUNTU_IMAGE,
                    parameter_type="String",
                    description=None,
                    allowed_pattern=None,
                    keyid=None,
                    last_modified_date=datetime.now(UTC),
                    version=1,
                    data_type="aws:ec2:image",
                )
            ]

    ParameterDict._check_loading_status = check


def main() -> None:
    port = sys.argv[1]
    # Clients in this process (the real ones above) call this very server.
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://localhost:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": os.environ["AWS_DEFAULT_REGION"],
        "MOTO_PORT": port,
    }
    # A type that neither moto nor this file knows would be left out with a warning only.
    warnings.filterwarnings("error", message=".*not supported by moto's CloudFormation.*")
    register()
    repair()
    seed_images()
    serve(["-H", "127.0.0.1", "-p", port])
