"""The stacks in CloudFormation: which are there, what is in them, and how they are deleted and waited for.

CloudFormation is asked directly, not through `cdk destroy`: that synthesizes the application first, which needs
Node.js, builds, and settings that are valid, and none of these may stand in the way of leaving. A stack counts as ours
by its fixed name and by the description that the application gives it: others use the same names.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

MODES = ("tracking", "serverless")
# In the order of deletion.
SHARED = ("sagemaker-infra-domain", "sagemaker-infra-networking")
DESCRIPTION = "MLflow proxy: "
DEADLINE_SECONDS = 60 * 60
# Waits between looks, the last one again and again: short stacks are gone at once, long ones need no hurry.
_PAUSES = (0.25, 0.5, 1.0, 2.0, 5.0)

Say = Callable[[str], None]


def of_mode(mode: str) -> tuple[str, str]:
    """The names of a mode's own stacks, in the order of deletion."""
    return f"sagemaker-infra-flaskapp-{mode}", f"sagemaker-infra-mlflow-{mode}"


@dataclass(frozen=True)
class Stack:
    """One stack, there or deleted."""

    name: str
    id: str
    status: str
    created: datetime
    protected: bool
    description: str

    @property
    def is_ours(self) -> bool:
        """Whether this application made it. One under review has nothing in it yet, not even a description."""
        return self.description.startswith(DESCRIPTION) or self.status == "REVIEW_IN_PROGRESS"

    @property
    def is_busy(self) -> bool:
        """Whether somebody deploys it right now."""
        return self.status.endswith("_IN_PROGRESS") and self.status not in ("DELETE_IN_PROGRESS", "REVIEW_IN_PROGRESS")

    @property
    def age(self) -> str:
        """How old it is, in words."""
        seconds = (datetime.now(UTC) - self.created).total_seconds()
        for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
            if seconds >= length:
                count = int(seconds // length)
                return f"{count} {unit}{'s' if count > 1 else ''} old"
        return "just made"


@dataclass(frozen=True)
class Resource:
    """One resource of a stack, as CloudFormation remembers it: for 90 days after the stack is deleted."""

    logical: str
    physical: str
    type: str
    status: str
    stack: str


@dataclass(frozen=True)
class Declared:
    """What a stack's template says of its end."""

    keeps: dict[str, str]
    environment: str | None


@dataclass(frozen=True)
class Failure:
    """Why a resource could not be deleted."""

    logical: str
    physical: str
    type: str
    reason: str


class StillDeleting(Exception):
    """A deletion did not end in time. CloudFormation goes on with it."""


def find(client: Any, name: str) -> Stack | None:
    """The stack of this name that is there. One that was deleted is not."""
    try:
        (found,) = client.describe_stacks(StackName=name)["Stacks"]
    except ClientError as error:
        if "does not exist" in str(error):
            return None
        raise
    return _stack(found)


def _stack(found: dict[str, Any]) -> Stack:
    return Stack(
        name=found["StackName"],
        id=found["StackId"],
        status=found["StackStatus"],
        created=found["CreationTime"],
        protected=bool(found.get("EnableTerminationProtection")),
        description=found.get("Description") or found.get("TemplateDescription") or "",
    )


def deleted(client: Any, names: Iterable[str]) -> list[Stack]:
    """Stacks of ours of these names that were deleted in the last 90 days."""
    wanted = set(names)
    pages = client.get_paginator("list_stacks").paginate(StackStatusFilter=["DELETE_COMPLETE"])
    found = (_stack(one) for page in pages for one in page["StackSummaries"] if one["StackName"] in wanted)
    return [one for one in found if one.description.startswith(DESCRIPTION)]


def resources(client: Any, stack: Stack) -> list[Resource]:
    """All resources of a stack, also of a deleted one."""
    pages = client.get_paginator("list_stack_resources").paginate(StackName=stack.id)
    return [
        Resource(
            logical=one["LogicalResourceId"],
            physical=one.get("PhysicalResourceId", ""),
            type=one["ResourceType"],
            status=one["ResourceStatus"],
            stack=stack.name,
        )
        for page in pages
        for one in page["StackResourceSummaries"]
    ]


def declared(client: Any, stack: Stack) -> Declared:
    """What a stack that is there will keep when it is deleted (type by logical id), and its environment."""
    template = client.get_template(StackName=stack.id).get("TemplateBody")
    declared = template.get("Resources", {}) if isinstance(template, dict) else {}
    keeps = {name: one["Type"] for name, one in declared.items() if str(one.get("DeletionPolicy")).startswith("Retain")}
    environments = {
        tag["Value"]
        for one in declared.values()
        for tag in _tags(one.get("Properties", {}))
        if tag.get("Key") == "environment"
    }
    return Declared(keeps, environments.pop() if len(environments) == 1 else None)


def _tags(properties: dict[str, Any]) -> Iterator[dict[str, str]]:
    tags = properties.get("Tags", [])
    yield from (tag for tag in tags if isinstance(tag, dict)) if isinstance(tags, list) else ()


def importers(client: Any, stack: Stack, leaving: Iterable[str]) -> set[str]:
    """Stacks that use what this one exports, but those that will be gone before it."""
    (found,) = client.describe_stacks(StackName=stack.id)["Stacks"]
    names = [one["ExportName"] for one in found.get("Outputs", []) if one.get("ExportName")]
    users: set[str] = set()
    for name in names:
        try:
            for page in client.get_paginator("list_imports").paginate(ExportName=name):
                users.update(page["Imports"])
        except ClientError as error:
            if "not imported" not in str(error):
                raise
    return users - set(leaving)


def unprotect(client: Any, stack: Stack) -> None:
    """Let it be deleted."""
    client.update_termination_protection(StackName=stack.id, EnableTerminationProtection=False)


def delete(client: Any, stack: Stack, say: Say, deadline_seconds: float = DEADLINE_SECONDS) -> list[Failure]:
    """Delete a stack, or wait for the deletion that is under way, and say how far it is. What failed; nothing if gone.

    Raises StillDeleting after `deadline_seconds`.
    """
    started = time.monotonic()
    total = len([one for one in resources(client, stack) if one.status != "DELETE_COMPLETE"])
    if stack.status != "DELETE_IN_PROGRESS":
        # Several of these at once count as one, and CloudFormation's events tell it.
        client.delete_stack(StackName=stack.id, ClientRequestToken=f"destroy-{uuid.uuid4()}")
    said = ""
    for pause in _pauses():
        (found,) = client.describe_stacks(StackName=stack.id)["Stacks"]
        elapsed = time.monotonic() - started
        left = [one for one in resources(client, stack) if one.status not in ("DELETE_COMPLETE", "DELETE_SKIPPED")]
        now = [one.logical for one in left if one.status == "DELETE_IN_PROGRESS"]
        progress = f"{max(total - len(left), 0)} of {total} resources" + (f"; now {', '.join(now[:3])}" if now else "")
        if progress != said:
            said = progress
            say(f"  {stack.name}: {progress} ({_minutes(elapsed)})")
        if found["StackStatus"] == "DELETE_COMPLETE":
            say(f"  {stack.name} is gone after {_minutes(elapsed)}")
            return []
        if not found["StackStatus"].endswith("_IN_PROGRESS"):
            return _failures(client, stack) or [_whole(found)]
        if elapsed > deadline_seconds:
            raise StillDeleting(
                f"{stack.name} is still being deleted after {_minutes(elapsed)}, {progress}. CloudFormation goes on by "
                "itself; run the same command again later, it goes on where it is"
            )
        time.sleep(pause)
    raise AssertionError("the pauses never end")


def _pauses() -> Iterator[float]:
    yield from _PAUSES
    while True:
        yield _PAUSES[-1]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _failures(client: Any, stack: Stack) -> list[Failure]:
    """What this deletion could not delete."""
    found: dict[str, Failure] = {}
    for page in client.get_paginator("describe_stack_events").paginate(StackName=stack.id):
        for event in page["StackEvents"]:
            whole = event.get("PhysicalResourceId") == stack.id
            # The newest come first, so this is where the deletion began.
            if whole and event["ResourceStatus"] == "DELETE_IN_PROGRESS":
                return list(found.values())
            reason = event.get("ResourceStatusReason", "CloudFormation gives no reason")
            if event["ResourceStatus"] == "DELETE_FAILED" and not whole and "cancelled" not in reason:
                found[event["LogicalResourceId"]] = Failure(
                    event["LogicalResourceId"], event.get("PhysicalResourceId", ""), event["ResourceType"], reason
                )
    return list(found.values())


def _whole(found: dict[str, Any]) -> Failure:
    reason = found.get("StackStatusReason") or f"its status is {found['StackStatus']}, and no event says why"
    return Failure(found["StackName"], found["StackId"], "AWS::CloudFormation::Stack", reason)
