"""What moto lacks of the way stacks end on AWS. For tests only, as part of moto_launcher.

CloudFormation deletes in the order of dependencies, remembers what became of each resource, and says why one cannot go;
EC2 does not delete what others still need; SageMaker has apps, spaces and user profiles in its domains.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from moto.cloudformation.exceptions import ValidationError
from moto.cloudformation.models import CloudFormationBackend, Event, Stack
from moto.cloudformation.parsing import OutputMap
from moto.cloudformation.responses import CloudFormationResponse
from moto.core.responses import ActionResult
from moto.ec2.exceptions import DependencyViolationError
from moto.ec2.models import EC2Backend
from moto.s3.models import FakeBucket, s3_backends
from moto.sagemaker.exceptions import ResourceInUseException, ResourceNotFound
from moto.sagemaker.responses import SageMakerResponse
from moto.utilities.utils import get_partition

# A deletion in the background takes so long for each resource.
_SECONDS_EACH = 0.01

# Members of all Studio domains: kind, domain and name to what the API tells of them.
MEMBERS: dict[tuple[str, str, str], dict[str, Any]] = {}

# Tracking servers by name and Apps by ARN, to what the API tells of them.
MLFLOW: dict[str, dict[str, Any]] = {}


def repair() -> None:
    """Let moto end stacks as AWS does."""
    _delete_stacks()
    _remember_resources()
    _list_imports()
    _keep_what_is_needed()
    _people_domains()
    _tell_of_mlflow()


def _delete_stacks() -> None:
    """moto deletes resources in any order, also those to keep, and answers an error if one cannot go.

    With a ClientRequestToken it is done in the background, as on AWS, so that the caller must wait; without, at once,
    because `cdk destroy` gives none and would take five seconds a stack to look again. And moto makes resources that
    were deleted once more when somebody asks for the stack's outputs, so that a stack has none from here on.
    """
    in_background = threading.local()

    def respond(self: CloudFormationResponse) -> Any:
        in_background.value = bool(self._get_param("ClientRequestToken"))
        return answer(self)

    def delete(self: CloudFormationBackend, name_or_stack_id: str) -> None:
        for stack in list(self.stacks.values()):
            if name_or_stack_id in (stack.name, stack.stack_id) and stack.status != "DELETE_IN_PROGRESS":
                stack.status = "DELETE_IN_PROGRESS"
                stack._add_stack_event("DELETE_IN_PROGRESS", resource_status_reason="User Initiated")
                if getattr(in_background, "value", False):
                    threading.Thread(target=_finish, args=(self, stack, _SECONDS_EACH), daemon=True).start()
                else:
                    _finish(self, stack, 0)

    answer = CloudFormationResponse.delete_stack
    CloudFormationResponse.delete_stack = respond
    CloudFormationBackend.delete_stack = delete


def _finish(backend: CloudFormationBackend, stack: Stack, seconds_each: float) -> None:
    exports = [export.name for export in stack.exports]
    resources = stack.resource_map
    stack.output_map = OutputMap(resources, {}, stack.stack_id)
    if not hasattr(stack, "records"):
        # Only once: looking for a resource that is gone makes it again.
        stack.records = {one[0]: one for one in _resources(stack)}
    for name in reversed(list(resources._parsed_resources)):
        declared = resources._resource_json_map.get(name)
        if declared is None:
            continue
        status = "DELETE_SKIPPED"
        if declared.get("DeletionPolicy") not in ("Retain", "RetainExceptOnCreate"):
            _note(stack, name, "DELETE_IN_PROGRESS")
            time.sleep(seconds_each)
            status = "DELETE_COMPLETE"
            try:
                resources._delete_resource(resources._parsed_resources[name], declared)
            except Exception as error:
                _note(stack, name, "DELETE_FAILED", str(error))
                stack._add_stack_event("DELETE_FAILED", f"The following resource(s) failed to delete: [{name}].")
                stack.status = "DELETE_FAILED"
                return
        _note(stack, name, status)
        del resources._parsed_resources[name], resources._resource_json_map[name]
    stack._add_stack_event("DELETE_COMPLETE")
    stack.status = "DELETE_COMPLETE"
    for export in exports:
        backend.exports.pop(export, None)
    backend.deleted_stacks[stack.stack_id] = stack
    backend.stacks.pop(stack.stack_id, None)


def _resources(stack: Stack) -> Iterable[tuple[str, str, str, str]]:
    """Logical id, physical id, type and status of each."""
    for resource in stack.stack_resources:
        physical = str(getattr(resource, "physical_resource_id", "") or "")
        yield resource.logical_resource_id, physical, resource.cf_resource_type, "CREATE_COMPLETE"


def _note(stack: Stack, name: str, status: str, reason: str | None = None) -> None:
    logical, physical, kind, _ = stack.records[name]
    stack.records[name] = (logical, physical, kind, status)
    stack.events.append(Event(stack.stack_id, stack.name, logical, physical, kind, status, reason, None))


def _remember_resources() -> None:
    """moto forgets the resources of deleted stacks, and says CREATE_COMPLETE of all."""

    def list_stack_resources(self: CloudFormationResponse) -> ActionResult:
        stack = self.cloudformation_backend.get_stack(self._get_param("StackName"))
        records = getattr(stack, "records", None)
        names = ("LogicalResourceId", "PhysicalResourceId", "ResourceType", "ResourceStatus")
        found = [
            dict(zip(names, one, strict=True)) | {"LastUpdatedTimestamp": stack.creation_time}
            for one in (records.values() if records else _resources(stack))
        ]
        # A page of CloudFormation's has a hundred.
        begin = int(self._get_param("NextToken") or 0)
        rest = str(begin + 100) if len(found) > begin + 100 else None
        return ActionResult({"StackResourceSummaries": found[begin : begin + 100], "NextToken": rest})

    CloudFormationResponse.list_stack_resources = list_stack_resources


def _list_imports() -> None:
    """moto does not know ListImports."""

    def list_imports(self: CloudFormationResponse) -> ActionResult:
        name = self._get_param("ExportName")
        users = [one.name for one in self.cloudformation_backend.stacks.values() if f'"{name}"' in str(one.template)]
        users = [one for one in users if not name.startswith(f"{one}:")]
        if not users:
            raise ValidationError(message=f"Export '{name}' is not imported by any stack.")
        return ActionResult({"Imports": users})

    CloudFormationResponse.list_imports = list_imports


def _keep_what_is_needed() -> None:
    """moto deletes groups that rules or interfaces name, and subnets and VPCs with interfaces or groups in them.

    And it says that buckets with objects are deleted.
    """
    delete_group, delete_subnet, delete_vpc = (
        EC2Backend._delete_security_group,
        EC2Backend.delete_subnet,
        EC2Backend.delete_vpc,
    )

    def there(self: EC2Backend) -> Iterable[Any]:
        """Interfaces, but those of terminated instances, which moto forgets to delete."""
        return (one for one in self.enis.values() if one.instance is None or one.instance.state == "running")

    def group(self: EC2Backend, vpc_id: str | None, group_id: str) -> None:
        interfaces = any(group_id in {one.id for one in eni.group_set} for eni in there(self))
        rules = any(
            rule.source_group.get("GroupId") == group_id
            for groups in self.groups.values()
            for one in groups.values()
            for rule in (*one.ingress_rules, *one.egress_rules)
            if one.id != group_id
        )
        if interfaces or rules:
            raise DependencyViolationError(f"resource {group_id} has a dependent object")
        delete_group(self, vpc_id, group_id)

    def subnet(self: EC2Backend, subnet_id: str) -> Any:
        if any(eni.subnet.id == subnet_id for eni in there(self)):
            raise DependencyViolationError(f"The subnet '{subnet_id}' has dependencies and cannot be deleted.")
        return delete_subnet(self, subnet_id)

    def vpc(self: EC2Backend, vpc_id: str) -> Any:
        if any(one.name != "default" for one in self.groups[vpc_id].values()):
            raise DependencyViolationError(f"The vpc '{vpc_id}' has dependencies and cannot be deleted.")
        return delete_vpc(self, vpc_id)

    delete_bucket = FakeBucket.delete_from_cloudformation_json.__func__

    def bucket(cls: type[FakeBucket], name: str, resource: Any, account_id: str, region_name: str) -> None:
        found = s3_backends[account_id][get_partition(region_name)].buckets.get(name)
        if found is not None and found.keys:
            raise RuntimeError(f"The bucket you tried to delete is not empty: {name}")
        delete_bucket(cls, name, resource, account_id, region_name)

    FakeBucket.delete_from_cloudformation_json = classmethod(bucket)
    EC2Backend._delete_security_group = group
    EC2Backend.delete_subnet = subnet
    EC2Backend.delete_vpc = vpc


def _people_domains() -> None:
    """moto knows neither apps, spaces nor user profiles of Studio."""
    for kind, name, listed in (
        ("app", "AppName", "Apps"),
        ("space", "SpaceName", "Spaces"),
        ("user_profile", "UserProfileName", "UserProfiles"),
    ):
        if hasattr(SageMakerResponse, f"list_{kind}s"):
            raise AssertionError(f"moto has Studio's {kind}s now: take them from this list")
        setattr(SageMakerResponse, f"create_{kind}", _create(kind, name))
        setattr(SageMakerResponse, f"delete_{kind}", _delete(kind, name))
        setattr(SageMakerResponse, f"list_{kind}s", _list(kind, listed))


def _create(kind: str, name: str) -> Any:
    def create(self: SageMakerResponse) -> ActionResult:
        shown = {
            key: self._get_param(key)
            for key in ("DomainId", "UserProfileName", "SpaceName", "AppType", "AppName")
            if self._get_param(key)
        }
        status = {"Status": "InService", "CreationTime": datetime.now(UTC)}
        MEMBERS[kind, self._get_param("DomainId"), self._get_param(name)] = shown | status
        return ActionResult({})

    return create


def _delete(kind: str, name: str) -> Any:
    def delete(self: SageMakerResponse) -> ActionResult:
        domain, own = self._get_param("DomainId"), self._get_param(name)
        holds = {"space": "SpaceName", "user_profile": "UserProfileName"}.get(kind)
        used = [key for key, one in MEMBERS.items() if key[:2] == ("app", domain) and holds and one.get(holds) == own]
        if used:
            raise ResourceInUseException(message=f"{own} has apps: {used}")
        MEMBERS.pop((kind, domain, own))
        return ActionResult({})

    return delete


def _list(kind: str, listed: str) -> Any:
    def answer(self: SageMakerResponse) -> ActionResult:
        domain = self._get_param("DomainIdEquals")
        found = [one for key, one in MEMBERS.items() if key[:2] == (kind, domain)]
        begin = int(self._get_param("NextToken") or 0)
        rest = {"NextToken": str(begin + 10)} if len(found) > begin + 10 else {}
        return ActionResult({listed: found[begin : begin + 10], **rest})

    return answer


def _tell_of_mlflow() -> None:
    """moto knows neither tracking servers nor Apps."""
    known_tags = SageMakerResponse.list_tags

    def describe(self: SageMakerResponse) -> ActionResult:
        return ActionResult(_mlflow(self))

    def delete(self: SageMakerResponse) -> ActionResult:
        found = _mlflow(self)
        MLFLOW.pop(found.get("TrackingServerName") or found["Arn"])
        return ActionResult({})

    def list_tags(self: SageMakerResponse) -> Any:
        arn = self._get_param("ResourceArn")
        tags = [one["Tags"] for one in MLFLOW.values() if arn in (one.get("Arn"), one.get("TrackingServerArn"))]
        return ActionResult({"Tags": tags[0]}) if tags else known_tags(self)

    for kind in ("mlflow_tracking_server", "mlflow_app"):
        if hasattr(SageMakerResponse, f"describe_{kind}"):
            raise AssertionError(f"moto has {kind} now: take it from here")
        setattr(SageMakerResponse, f"describe_{kind}", describe)
        setattr(SageMakerResponse, f"delete_{kind}", delete)
    SageMakerResponse.list_tags = list_tags


def _mlflow(response: SageMakerResponse) -> dict[str, Any]:
    identity = response._get_param("TrackingServerName") or response._get_param("Arn")
    if identity not in MLFLOW:
        raise ResourceNotFound(message=f"MLflow {identity} does not exist")
    return MLFLOW[identity]
