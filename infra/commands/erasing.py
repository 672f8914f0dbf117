"""Deletes what `retained` found to be ours, one kind after the other. The caller has asked before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from infra.commands import buckets, looks, studio
from infra.commands.aws import Account, is_credentials, is_gone, words
from infra.commands.kinds import Retained
from infra.commands.stacks import Say

_SECRET_DAYS = 7
_KEY_DAYS = 30


@dataclass(frozen=True)
class Left:
    """Something that was to go and stayed, and why."""

    what: str
    why: str


def erase(account: Account, found: Iterable[Retained], say: Say) -> list[Left]:
    """Delete these things; what stays, with reasons. One that cannot be deleted does not stop the others."""
    left: list[Left] = []
    found = list(found)
    # Groups may name each other in their rules, so all rules go before any group.
    for one in found:
        if one.kind == "security-groups" and one.is_ours:
            _revoke_rules(account, one)
    for one in found:
        if not one.is_ours:
            raise ValueError(f"{one.kind} {one.id} is not known to be ours")
        try:
            _ERASERS[one.kind](account, one, say)
        except buckets.NotEmpty as error:
            left.append(Left(one.id, str(error)))
        except (ClientError, BotoCoreError) as error:
            if is_credentials(error):
                raise
            if not (isinstance(error, ClientError) and is_gone(error)):
                left.append(Left(one.id, words(error)))
    return left


def needed_keys(account: Account, kept: Iterable[Retained]) -> dict[str, str]:
    """Keys without which a bucket that stays could not be read: the bucket by key."""
    keys: dict[str, str] = {}
    for one in kept:
        if one.kind == "buckets" and (key := buckets.key_of(account, one.id)) is not None:
            keys[key] = one.id
    return keys


def _mlflow(account: Account, one: Retained, say: Say) -> None:
    call, arguments = looks.mlflow_call(one.id)
    getattr(account.client("sagemaker"), f"delete_{call}")(**arguments)
    studio.until_none(lambda: [one.id] if looks.mlflow(account, one.id) else [], say)
    say(f"  {one.id} is gone")


def _role(account: Account, one: Retained, say: Say) -> None:
    iam = account.client("iam")
    for page in iam.get_paginator("list_role_policies").paginate(RoleName=one.id):
        for name in page["PolicyNames"]:
            iam.delete_role_policy(RoleName=one.id, PolicyName=name)
    iam.delete_role(RoleName=one.id)
    say(f"  {one.id} is gone")


def _bucket(account: Account, one: Retained, say: Say) -> None:
    buckets.delete(account, one.id, say)
    say(f"  {one.id} is gone")


def _log_group(account: Account, one: Retained, say: Say) -> None:
    account.client("logs").delete_log_group(logGroupName=one.id)
    say(f"  {one.id} is gone")


def _log_streams(account: Account, one: Retained, say: Say) -> None:
    for count, stream in enumerate(looks.streams(account, one.id), start=1):
        account.client("logs").delete_log_stream(logGroupName=looks.STUDIO_LOGS, logStreamName=stream)
        if count % 100 == 0:
            say(f"  {count:,} streams deleted")
    say(f"  the log streams of {one.id} are gone")


def _certificate(account: Account, one: Retained, say: Say) -> None:
    account.client("acm").delete_certificate(CertificateArn=one.id)
    say(f"  {one.id} is gone")


def _secret(account: Account, one: Retained, say: Say) -> None:
    answer = account.client("secretsmanager").delete_secret(SecretId=one.id, RecoveryWindowInDays=_SECRET_DAYS)
    say(f"  {one.id} goes on {answer['DeletionDate']:%Y-%m-%d}")


def _key(account: Account, one: Retained, say: Say) -> None:
    answer = account.client("kms").schedule_key_deletion(KeyId=one.id, PendingWindowInDays=_KEY_DAYS)
    say(f"  {one.id} goes on {answer['DeletionDate']:%Y-%m-%d}; aws kms cancel-key-deletion --key-id {one.id} keeps it")


def _home_folders(account: Account, one: Retained, say: Say) -> None:
    efs = account.client("efs")
    for target in studio.mount_targets(account, one.id):
        efs.delete_mount_target(MountTargetId=target)
    studio.until_none(lambda: studio.mount_targets(account, one.id), say)
    efs.delete_file_system(FileSystemId=one.id)
    say(f"  {one.id} is gone")


def _interface(account: Account, one: Retained, say: Say) -> None:
    account.client("ec2").delete_network_interface(NetworkInterfaceId=one.id)
    say(f"  {one.id} is gone")


def _revoke_rules(account: Account, one: Retained) -> None:
    try:
        (group,) = account.client("ec2").describe_security_groups(GroupIds=[one.id])["SecurityGroups"]
        studio.revoke_rules(account, group)
    except ClientError as error:
        # What stands in the way is told when the group itself cannot be deleted.
        if is_credentials(error):
            raise


def _security_group(account: Account, one: Retained, say: Say) -> None:
    account.client("ec2").delete_security_group(GroupId=one.id)
    say(f"  {one.id} is gone")


def _address(account: Account, one: Retained, say: Say) -> None:
    account.client("ec2").release_address(AllocationId=one.id)
    say(f"  {one.id} is released")


_ERASERS: dict[str, Callable[[Account, Retained, Say], Any]] = {
    "mlflow": _mlflow,
    "buckets": _bucket,
    "log-groups": _log_group,
    "log-streams": _log_streams,
    "certificates": _certificate,
    "secrets": _secret,
    "home-folders": _home_folders,
    "roles": _role,
    "network-interfaces": _interface,
    "security-groups": _security_group,
    "addresses": _address,
    "keys": _key,
}
