"""Looks at one thing that AWS may have kept: whether it is there, what is in it, and what says that it is ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from botocore.exceptions import ClientError

from infra.commands import buckets
from infra.commands.aws import Account, is_credentials, is_gone, words
from infra.commands.kinds import DESCRIPTION, NAME, RECORD, TAGS, Retained

PROJECT = "sagemaker-mlflow-proxy"
STUDIO_LOGS = "/aws/sagemaker/studio"
# What `infra/` gives to keys and secrets, and the common name that `infra/certificate/handler.py` writes.
_DESCRIPTIONS = ("Artifacts of SageMaker MLflow", "Alarms of the MLflow proxy", "API keys of the MLflow proxy")
_CERTIFICATE_NAME = "mlflow-proxy (self-signed)"


def look(account: Account, one: Retained) -> Retained | None:
    """The same with its details; None if it is not there any more."""
    try:
        return _LOOKS[one.kind](account, one)
    except ClientError as error:
        if is_gone(error):
            return None
        if is_credentials(error):
            raise
        return replace(one, detail=f"could not be looked at: {words(error)}")


def mlflow_call(identity: str) -> tuple[str, dict[str, str]]:
    """What API calls for a tracking server (by name) or an App (by ARN) end with, and their arguments."""
    if identity.startswith("arn:"):
        return "mlflow_app", {"Arn": identity}
    return "mlflow_tracking_server", {"TrackingServerName": identity}


def mlflow(account: Account, identity: str) -> dict[str, Any] | None:
    """What SageMaker says of a tracking server or App; None if it is gone."""
    call, arguments = mlflow_call(identity)
    try:
        found: dict[str, Any] = getattr(account.client("sagemaker"), f"describe_{call}")(**arguments)
    except ClientError as error:
        if is_gone(error):
            return None
        raise
    return None if found.get("Status") == "Deleted" else found


def _mlflow(account: Account, one: Retained) -> Retained | None:
    found = mlflow(account, one.id)
    if found is None:
        return None
    arn = found.get("TrackingServerArn") or found["Arn"]
    pages = account.client("sagemaker").get_paginator("list_tags").paginate(ResourceArn=arn)
    tags = {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}
    signs = set(one.signs)
    if (tags.get("project"), tags.get("stack")) == (PROJECT, one.stack):
        signs.add(TAGS)
    else:
        signs.discard(RECORD)
    bucket = str(found.get("ArtifactStoreUri", "")).removeprefix("s3://").split("/")[0]
    if stack_of(bucket, [one.stack]):
        signs.add(NAME)
    status = found.get("TrackingServerStatus") or found.get("Status", "")
    return replace(one, signs=frozenset(signs), detail=f"{status}, artifacts in {bucket}")


def _role(account: Account, one: Retained) -> Retained | None:
    found = account.client("iam").get_role(RoleName=one.id)["Role"]
    return replace(one, detail=found.get("Description", ""))


def _bucket(account: Account, one: Retained) -> Retained | None:
    found = buckets.contents(account, one.id)
    return None if found is None else replace(one, detail=str(found))


def _log_group(account: Account, one: Retained) -> Retained | None:
    pages = account.client("logs").get_paginator("describe_log_groups").paginate(logGroupNamePrefix=one.id)
    for page in pages:
        for group in page["logGroups"]:
            if group["logGroupName"] == one.id:
                days = group.get("retentionInDays")
                kept = f"kept {days} days" if days else "kept for ever"
                return replace(one, detail=f"{group.get('storedBytes', 0):,} B, {kept}")
    return None


def streams(account: Account, domain: str) -> list[str]:
    """The log streams of a domain in the group that all domains of the account share."""
    pages = account.client("logs").get_paginator("describe_log_streams")
    found = pages.paginate(logGroupName=STUDIO_LOGS, logStreamNamePrefix=f"{domain}/")
    return [stream["logStreamName"] for page in found for stream in page["logStreams"]]


def _log_streams(account: Account, one: Retained) -> Retained | None:
    found = streams(account, one.id)
    return replace(one, detail=f"{len(found):,} streams in {STUDIO_LOGS}") if found else None


def _certificate(account: Account, one: Retained) -> Retained | None:
    found = account.client("acm").describe_certificate(CertificateArn=one.id)["Certificate"]
    known = found.get("Type") == "IMPORTED" and _CERTIFICATE_NAME in f"{found.get('Subject')} {found.get('Issuer')}"
    users = f"in use by {', '.join(found['InUseBy'])}" if found.get("InUseBy") else "not in use"
    return replace(one, signs=one.signs | {NAME} if known else one.signs, detail=f"{found['DomainName']}, {users}")


def _secret(account: Account, one: Retained) -> Retained | None:
    found = account.client("secretsmanager").describe_secret(SecretId=one.id)
    signs = one.signs | _described(found)
    if date := found.get("DeletedDate"):
        back = f"deleted {date:%Y-%m-%d}; aws secretsmanager restore-secret --secret-id {one.id} brings it back for now"
        return replace(one, kind="secrets-in-deletion", signs=signs, detail=back)
    return replace(one, signs=signs, detail=found["Name"])


def _key(account: Account, one: Retained) -> Retained | None:
    found = account.client("kms").describe_key(KeyId=one.id)["KeyMetadata"]
    signs = one.signs | _described(found)
    if found["KeyState"] == "PendingDeletion":
        back = f"goes on {found['DeletionDate']:%Y-%m-%d}; aws kms cancel-key-deletion --key-id {one.id} keeps it"
        return replace(one, kind="keys-in-deletion", signs=signs, detail=back)
    return replace(one, signs=signs, detail=found.get("Description", ""))


def _described(found: dict[str, Any]) -> set[str]:
    return {DESCRIPTION} if str(found.get("Description", "")).startswith(_DESCRIPTIONS) else set()


def _home_folders(account: Account, one: Retained) -> Retained | None:
    (found,) = account.client("efs").describe_file_systems(FileSystemId=one.id)["FileSystems"]
    return replace(one, detail=f"{found['SizeInBytes']['Value']:,} B of home folders")


def _security_group(account: Account, one: Retained) -> Retained | None:
    (found,) = account.client("ec2").describe_security_groups(GroupIds=[one.id])["SecurityGroups"]
    named = {NAME} if stack_of(found["GroupName"], [one.stack]) else set()
    return replace(one, signs=one.signs | named, detail=f"{found['GroupName']} in {found['VpcId']}")


def _interface(account: Account, one: Retained) -> Retained | None:
    (found,) = account.client("ec2").describe_network_interfaces(NetworkInterfaceIds=[one.id])["NetworkInterfaces"]
    return replace(one, detail=f"{found['Status']}, {found.get('Description') or 'unnamed'}")


def _address(account: Account, one: Retained) -> Retained | None:
    """By its allocation id, as tags have it, or by the address, as CloudFormation does."""
    by = {"AllocationIds": [one.id]} if one.id.startswith("eipalloc-") else {"PublicIps": [one.id]}
    (found,) = account.client("ec2").describe_addresses(**by)["Addresses"]
    name = next((tag["Value"] for tag in found.get("Tags", []) if tag["Key"] == "Name"), "")
    named = {NAME} if name.startswith(f"{one.stack}/") else set()
    return replace(one, id=found["AllocationId"], signs=one.signs | named, detail=found["PublicIp"])


def stack_of(name: str, names: Iterable[str]) -> str | None:
    """The stack whose name stands before CloudFormation's own part: logical id and random letters.

    A long one is cut, but never so much that one stack's would be another's.
    """
    match = re.fullmatch(r"(?:/aws/lambda/)?(.+?)-[A-Za-z]+[0-9A-Fa-f]{8}(?:-[A-Za-z0-9]{12,13})", name)
    if match is None:
        match = re.fullmatch(r"/aws/lambda/(.+?)-[A-Za-z0-9]+-[A-Za-z0-9]{12,13}", name)
    if match is None:
        return None
    begin = match[1]
    found = [one for one in names if one == begin or (one.startswith(begin) and len(one) - len(begin) < 5)]
    return found[0] if len(found) == 1 else None


_LOOKS: dict[str, Callable[[Account, Retained], Retained | None]] = {
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
