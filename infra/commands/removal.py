"""Takes the planned stacks away, one after the other, and helps where AWS says that something is in the way."""

from __future__ import annotations

import time

from infra.commands import buckets, plan, stacks, studio
from infra.commands.aws import Account
from infra.commands.console import Console
from infra.commands.erasing import Left
from infra.commands.plan import Plan
from infra.commands.stacks import SHARED, Failure, Resource, Stack

_ATTEMPTS = 3
# AWS takes the interfaces of load balancers and endpoints away some time after these are gone.
PAUSE_SECONDS = 30.0
STUDIO_WORD = "studio-apps"


def remove(account: Account, now: Plan, console: Console) -> list[Left]:
    """Delete all that leaves. What stays, with the reason: then nothing after it was tried."""
    domain_stack, network_stack = SHARED
    detached = False
    for stack in now.leaving:
        if stack.name == domain_stack and now.members and not _delete_members(account, now, console):
            return [Left(stack.name, "there are still apps, spaces or users in the domain")]
        if stack.name == network_stack:
            _detach(account, now, console)
            detached = True
        console.say(f"\nDeleting {stack.name}")
        if left := _delete(account, stack, now, console):
            return left
    if not detached:
        _detach(account, now, console)
    return []


def _delete_members(account: Account, now: Plan, console: Console) -> bool:
    console.say("\nMade by hand in Studio; unsaved work and the volumes of spaces are lost:")
    for member in now.members:
        console.say(f"  · {member}")
    if not console.confirms(STUDIO_WORD, "Delete all of these"):
        return False
    studio.delete_members(account, now.members, now.resources[SHARED[0]], console.say)
    return True


def _detach(account: Account, now: Plan, console: Console) -> None:
    """Mount targets and groups of domains that are gone."""
    leaving = {one.name for one in now.leaving}
    just_now = studio.domains(now.resources[SHARED[0]]) if SHARED[0] in leaving else []
    for domain in dict.fromkeys((*just_now, *plan.domains_gone(account, now.gone | leaving))):
        studio.detach(account, domain, console.say)


def _delete(account: Account, stack: Stack, now: Plan, console: Console) -> list[Left]:
    client = account.client("cloudformation")
    for attempt in range(1, _ATTEMPTS + 1):
        there = stacks.find(client, stack.name)
        if there is None:
            return []
        if there.is_busy:
            raise plan.Refused(f"{stack.name} is {there.status}: somebody deploys it; wait, then run this again")
        failures = stacks.delete(client, there, console.say)
        if not failures:
            return []
        for one in failures:
            console.say(f"  ✗ {one.logical} ({one.type}, {one.physical}): {one.reason}")
        if attempt < _ATTEMPTS:
            _help(account, failures, now.resources[stack.name], console)
            console.say(f"  once more ({attempt + 1} of {_ATTEMPTS})")
    return [Left(f"{one.logical} of {stack.name}", f"{one.reason} {_advice(stack, one)}") for one in failures]


def _help(account: Account, failures: list[Failure], own: list[Resource], console: Console) -> None:
    """Take away what is in the way, as far as it is ours."""
    kinds = {one.type for one in failures}
    for one in failures:
        if one.type == "AWS::S3::Bucket":
            # It was to go with its stack; log delivery may have written after it was emptied.
            console.say(f"  emptying {one.physical}")
            _empty(account, one.physical, console)
    if any(kind.startswith("AWS::EC2::") for kind in kinds):
        groups = [one.physical for one in own if one.type == "AWS::EC2::SecurityGroup"]
        if not studio.delete_stray_interfaces(account, groups, console.say):
            console.say(f"  waiting {PAUSE_SECONDS:.0f} s: AWS takes interfaces of its services away by itself")
            time.sleep(PAUSE_SECONDS)


def _empty(account: Account, bucket: str, console: Console) -> None:
    try:
        buckets.empty(account, bucket, console.say)
    except buckets.NotEmpty as error:
        console.say(f"  ✗ {error}")


def _advice(stack: Stack, failure: Failure) -> str:
    if failure.type.startswith("AWS::EC2::"):
        return (
            "Something that this tool does not know uses it; see who: aws ec2 describe-network-interfaces "
            f"--filters Name=vpc-id,Values=… (or Name=group-id,Values={failure.physical})."
        )
    if failure.type == "AWS::S3::Bucket":
        return "Empty the bucket by hand."
    return (
        "Delete it by hand, or leave it there: aws cloudformation delete-stack "
        f"--stack-name {stack.name} --retain-resources {failure.logical}."
    )
