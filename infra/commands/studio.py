"""What a SageMaker domain leaves behind, and what people made in it: both stand in the way of deleting stacks.

People: apps, spaces and user profiles must be gone before the domain can go. SageMaker itself: deleting a domain by
CloudFormation keeps its EFS file system with everybody's home folders, that system's mount targets, and two security
groups that name each other in their rules. The last two keep a VPC from being deleted, so they go between the domain
and the network; the file system can live without them, and its data is for `retained` to ask about.

What is ours is known by two signs: the id of the domain, which CloudFormation recorded as a resource of our stack, and
the tag that SageMaker sets, whose value is that domain's ARN; the groups have the id in their name besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from botocore.exceptions import ClientError

from infra.commands.aws import Account, is_gone
from infra.commands.stacks import Resource, Say

TAG = "ManagedByAmazonSageMakerResource"
GROUPS = ("security-group-for-inbound-nfs-{}", "security-group-for-outbound-nfs-{}")
_DEADLINE_SECONDS = 30 * 60
_PAUSE_SECONDS = 5.0

_Look = Callable[[Any, str, Iterable[Resource]], Iterator["Member"]]


class StudioBusy(Exception):
    """Something in Studio did not go in time. The message says what."""


@dataclass(frozen=True)
class Member:
    """An app, space or user profile in a domain."""

    kind: str
    name: str
    domain: str
    call: str
    arguments: dict[str, str]

    def __str__(self) -> str:
        return f"{self.kind} {self.name} in {self.domain}"


def domains(resources: Iterable[Resource]) -> list[str]:
    """The ids of the domains among a stack's resources."""
    return [one.physical for one in resources if one.type == "AWS::SageMaker::Domain" and one.physical.startswith("d-")]


def domain_arn(account: Account, domain: str) -> str:
    """The ARN that SageMaker writes into its tag."""
    return f"arn:{account.partition}:sagemaker:{account.region}:{account.id}:domain/{domain}"


def members(account: Account, domain: str, own: Iterable[Resource]) -> list[Member]:
    """Whoever and whatever is in a domain, in the order of deletion, but the user profiles of the stack itself."""
    return [one for kind in (_apps, _spaces, _profiles) for one in kind(account.client("sagemaker"), domain, own)]


def _pages(client: Any, operation: str, domain: str, key: str) -> Iterator[dict[str, Any]]:
    try:
        for page in client.get_paginator(operation).paginate(DomainIdEquals=domain):
            yield from (one for one in page[key] if one.get("Status") not in ("Deleted", "Failed"))
    except ClientError as error:
        if not is_gone(error):
            raise


def _apps(client: Any, domain: str, _: Iterable[Resource]) -> Iterator[Member]:
    for one in _pages(client, "list_apps", domain, "Apps"):
        owner = {key: one[key] for key in ("UserProfileName", "SpaceName") if one.get(key)}
        arguments = {"DomainId": domain, "AppType": one["AppType"], "AppName": one["AppName"], **owner}
        name = f"{one['AppType']}/{one['AppName']} of {' '.join(owner.values())}"
        yield Member("app", name, domain, "delete_app", arguments)


def _spaces(client: Any, domain: str, _: Iterable[Resource]) -> Iterator[Member]:
    for one in _pages(client, "list_spaces", domain, "Spaces"):
        arguments = {"DomainId": domain, "SpaceName": one["SpaceName"]}
        yield Member("space", one["SpaceName"], domain, "delete_space", arguments)


def _profiles(client: Any, domain: str, own: Iterable[Resource]) -> Iterator[Member]:
    mine = {part for one in own if one.type == "AWS::SageMaker::UserProfile" for part in one.physical.split("|")}
    for one in _pages(client, "list_user_profiles", domain, "UserProfiles"):
        if one["UserProfileName"] not in mine:
            arguments = {"DomainId": domain, "UserProfileName": one["UserProfileName"]}
            yield Member("user profile", one["UserProfileName"], domain, "delete_user_profile", arguments)


def delete_members(account: Account, found: list[Member], own: Iterable[Resource], say: Say) -> None:
    """Delete apps, then spaces, then user profiles, each kind when the one before is gone. Raises StudioBusy."""
    client = account.client("sagemaker")
    for kind, look in (("app", _apps), ("space", _spaces), ("user profile", _profiles)):
        these = [one for one in found if one.kind == kind]
        for one in these:
            say(f"  deleting {one}")
            try:
                getattr(client, one.call)(**one.arguments)
            except ClientError as error:
                if not is_gone(error):
                    raise
        for domain in {one.domain for one in these}:
            until_none(partial(_listed, look, client, domain, own), say)


def _listed(look: _Look, client: Any, domain: str, own: Iterable[Resource]) -> list[Member]:
    return list(look(client, domain, own))


def until_none(look: Callable[[], list[Any]], say: Say) -> None:
    """Wait until nothing is found any more. Raises StudioBusy when that takes too long."""
    until = time.monotonic() + _DEADLINE_SECONDS
    while found := look():
        names = ", ".join(map(str, found[:3]))
        if time.monotonic() > until:
            raise StudioBusy(f"{names} did not go within {_DEADLINE_SECONDS // 60} minutes; run the same command again")
        say(f"  waiting for {names}")
        time.sleep(_PAUSE_SECONDS)


def file_systems(account: Account, domain: str) -> list[dict[str, Any]]:
    """The file systems with the home folders of a domain."""
    arn = domain_arn(account, domain)
    pages = account.client("efs").get_paginator("describe_file_systems").paginate()
    return [one for page in pages for one in page["FileSystems"] if _tag(one.get("Tags", [])) == arn]


def mount_targets(account: Account, system: str) -> list[str]:
    """The mount targets of a file system."""
    pages = account.client("efs").get_paginator("describe_mount_targets").paginate(FileSystemId=system)
    try:
        return [one["MountTargetId"] for page in pages for one in page["MountTargets"]]
    except ClientError as error:
        if is_gone(error):
            return []
        raise


def groups(account: Account, domain: str) -> list[dict[str, Any]]:
    """The security groups that SageMaker made for a domain's file system."""
    names = [name.format(domain) for name in GROUPS]
    arn = domain_arn(account, domain)
    pages = account.client("ec2").get_paginator("describe_security_groups")
    found = pages.paginate(Filters=[{"Name": "group-name", "Values": names}])
    return [one for page in found for one in page["SecurityGroups"] if _tag(one.get("Tags", [])) == arn]


def _tag(tags: list[dict[str, str]]) -> str | None:
    return next((tag["Value"] for tag in tags if tag["Key"] == TAG), None)


def is_attached(account: Account, domain: str) -> bool:
    """Whether there is something for `detach` to do."""
    systems = [one["FileSystemId"] for one in file_systems(account, domain)]
    return bool(groups(account, domain)) or any(mount_targets(account, one) for one in systems)


def detach(account: Account, domain: str, say: Say) -> None:
    """Delete the mount targets of a domain's file system, and its security groups. No data goes. Raises StudioBusy."""
    efs, ec2 = account.client("efs"), account.client("ec2")
    for system in file_systems(account, domain):
        identity = system["FileSystemId"]
        for target in mount_targets(account, identity):
            say(f"  deleting mount target {target} of {identity}; the home folders stay")
            _unless_gone(efs.delete_mount_target, MountTargetId=target)
        until_none(partial(mount_targets, account, identity), say)
    found = groups(account, domain)
    # The two groups name each other, so all rules go before any group.
    for group in found:
        revoke_rules(account, group)
    for group in found:
        say(f"  deleting security group {group['GroupName']}")
        _unless_gone(ec2.delete_security_group, GroupId=group["GroupId"])


def revoke_rules(account: Account, group: dict[str, Any]) -> None:
    """Take all rules from a group of ours, so that the groups that these name can go."""
    for kind, permissions in (("ingress", "IpPermissions"), ("egress", "IpPermissionsEgress")):
        if group[permissions]:
            revoke = getattr(account.client("ec2"), f"revoke_security_group_{kind}")
            _unless_gone(revoke, GroupId=group["GroupId"], IpPermissions=group[permissions])


def _unless_gone(call: Callable[..., Any], **arguments: Any) -> None:
    try:
        call(**arguments)
    except ClientError as error:
        if not is_gone(error):
            raise


def delete_stray_interfaces(account: Account, group_ids: Iterable[str], say: Say) -> int:
    """Delete network interfaces that nothing is attached to any more but that still hold a group of ours; how many.

    Load balancers, functions and endpoints leave such ones for a while. An interface without a group of ours is
    somebody else's, even in our VPC.
    """
    ec2 = account.client("ec2")
    wanted = [{"Name": "group-id", "Values": list(group_ids) or ["none"]}, {"Name": "status", "Values": ["available"]}]
    count = 0
    for page in ec2.get_paginator("describe_network_interfaces").paginate(Filters=wanted):
        for one in page["NetworkInterfaces"]:
            if one.get("RequesterManaged"):
                continue  # AWS deletes these itself, and lets nobody else
            say(f"  deleting network interface {one['NetworkInterfaceId']} ({one.get('Description') or 'unnamed'})")
            _unless_gone(ec2.delete_network_interface, NetworkInterfaceId=one["NetworkInterfaceId"])
            count += 1
    return count
