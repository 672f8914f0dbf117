"""Looks for what AWS keeps when the stacks are gone, and tells what is ours from what only looks like it.

Nothing here deletes; `erasing` does, and only what `Retained.is_ours`. That takes CloudFormation's own record, which
says which physical resource a stack of ours made and kept, or made by a resource of it (a function's log group). The
record lasts 90 days. Without it, two signs of different origin must agree: the tags `project` and `stack`, both with
exactly our values, and one of these: a name in the form that CloudFormation gives, the description that this
application gives, or the tag that only our certificate function sets. One sign alone is a coincidence, a copy, or a
neighbour: it is listed and left. What a stack that is there still uses is never even listed.

A tracking server's name can be used again by others, so for MLflow the record counts only with the tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from botocore.exceptions import ClientError

from infra.commands import looks, stacks, studio
from infra.commands.aws import Account, is_credentials, words
from infra.commands.kinds import KINDS, NAME, OWN_TAG, RECORD, TAGS, Retained
from infra.commands.stacks import Resource, Say

_CERTIFICATE_TAG = "sagemaker-mlflow-proxy:self-signed"

_TYPES = {
    "AWS::SageMaker::MlflowTrackingServer": "mlflow",
    "AWS::SageMaker::MlflowApp": "mlflow",
    # Its policies go with it.
    "AWS::IAM::Role": "roles",
    "AWS::S3::Bucket": "buckets",
    "AWS::Logs::LogGroup": "log-groups",
    "AWS::KMS::Key": "keys",
    "AWS::SecretsManager::Secret": "secrets",
    "AWS::EC2::EIP": "addresses",
    "AWS::EC2::SecurityGroup": "security-groups",
    "Custom::SelfSignedCertificate": "certificates",
}
# These may be there though CloudFormation calls them deleted: they wait for their date.
_LINGERING = ("AWS::KMS::Key", "AWS::SecretsManager::Secret", "Custom::SelfSignedCertificate")
_ARNS = (
    (r"arn:[a-z-]+:s3:::(?P<id>[^/]+)$", "buckets"),
    (r"arn:[^:]+:logs:[^:]*:[^:]*:log-group:(?P<id>[^:]+)", "log-groups"),
    (r"arn:[^:]+:kms:[^:]*:[^:]*:key/(?P<id>.+)$", "keys"),
    (r"(?P<id>arn:[^:]+:secretsmanager:.+)$", "secrets"),
    (r"(?P<id>arn:[^:]+:acm:.+)$", "certificates"),
    (r"arn:[^:]+:sagemaker:[^:]*:[^:]*:mlflow-tracking-server/(?P<id>.+)$", "mlflow"),
    (r"(?P<id>arn:[^:]+:sagemaker:[^:]*:[^:]*:mlflow-app/.+)$", "mlflow"),
    (r"arn:[^:]+:ec2:[^:]*:[^:]*:elastic-ip/(?P<id>.+)$", "addresses"),
    (r"arn:[^:]+:ec2:[^:]*:[^:]*:security-group/(?P<id>.+)$", "security-groups"),
    (r"arn:[^:]+:ec2:[^:]*:[^:]*:network-interface/(?P<id>.+)$", "network-interfaces"),
)


@dataclass
class _Search:
    """What was found so far, by kind and id."""

    account: Account
    gone: frozenset[str]
    used: frozenset[str]
    found: dict[tuple[str, str], Retained] = field(default_factory=dict)

    def add(self, kind: str, identity: str, stack: str, sign: str) -> None:
        if identity and identity not in self.used:
            known = self.found.setdefault((kind, identity), Retained(kind, identity, stack))
            self.found[kind, identity] = replace(known, signs=known.signs | {sign})


def find(account: Account, gone: Iterable[str], used: Iterable[str], say: Say) -> list[Retained]:
    """All that is left of the stacks named `gone`, in the order of deletion; `used`: ids that stacks still have."""
    search = _Search(account, frozenset(gone), frozenset(used))
    _by_record(search)
    _by_tags(search, say)
    _by_name(search)
    _interfaces_of_groups(search)
    order = [kind.word for kind in KINDS]
    looked_at = [seen for one in search.found.values() if (seen := looks.look(account, one)) is not None]
    return sorted(looked_at, key=lambda one: (order.index(one.kind), one.stack, one.id))


def _by_record(search: _Search) -> None:
    client = search.account.client("cloudformation")
    for stack in stacks.deleted(client, search.gone):
        for one in stacks.resources(client, stack):
            _of_resource(search, one)


def _of_resource(search: _Search, one: Resource) -> None:
    kind = _TYPES.get(one.type)
    if kind is not None and (one.status != "DELETE_COMPLETE" or one.type in _LINGERING):
        search.add(kind, one.physical, one.stack, RECORD)
    elif one.type == "AWS::Lambda::Function":
        search.add("log-groups", f"/aws/lambda/{one.physical}", one.stack, RECORD)
    elif one.type == "AWS::ECS::Cluster":
        search.add("log-groups", f"/aws/ecs/containerinsights/{one.physical}/performance", one.stack, RECORD)
    for domain in studio.domains([one]):
        for system in studio.file_systems(search.account, domain):
            search.add("home-folders", system["FileSystemId"], one.stack, RECORD)
        for group in studio.groups(search.account, domain):
            search.add("security-groups", group["GroupId"], one.stack, RECORD)
        search.add("log-streams", domain, one.stack, RECORD)


def _interfaces_of_groups(search: _Search) -> None:
    """Interfaces that hold a group of ours and nothing uses: AWS's services leave such ones."""
    groups = [one for one in search.found.values() if one.kind == "security-groups" and one.is_ours]
    pages = search.account.client("ec2").get_paginator("describe_network_interfaces")
    for group in groups:
        wanted = [{"Name": "group-id", "Values": [group.id]}, {"Name": "status", "Values": ["available"]}]
        for page in pages.paginate(Filters=wanted):
            for one in page["NetworkInterfaces"]:
                search.add("network-interfaces", one["NetworkInterfaceId"], group.stack, RECORD)


def _by_tags(search: _Search, say: Say) -> None:
    ours = [{"Key": "project", "Values": [looks.PROJECT]}, {"Key": "stack", "Values": sorted(search.gone)}]
    certificates = [{"Key": _CERTIFICATE_TAG, "Values": sorted(search.gone)}]
    if not search.gone:
        return
    try:
        for key, filters, sign in (("stack", ours, TAGS), (_CERTIFICATE_TAG, certificates, OWN_TAG)):
            for arn, tags in _tagged(search.account, filters):
                for pattern, kind in _ARNS:
                    if match := re.match(pattern, arn):
                        search.add(kind, match["id"], tags[key], sign)
                        break
    except ClientError as error:
        if is_credentials(error):
            raise
        say(f"  Not looked for by tags ({words(error)}): what was kept more than 90 days ago may be missing below.")


def _tagged(account: Account, filters: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, str]]]:
    pages = account.client("resourcegroupstaggingapi").get_paginator("get_resources").paginate(TagFilters=filters)
    for page in pages:
        for one in page["ResourceTagMappingList"]:
            yield one["ResourceARN"], {tag["Key"]: tag["Value"] for tag in one["Tags"]}


def _by_name(search: _Search) -> None:
    """Buckets and log groups whose names have the form that CloudFormation gives."""
    pages = search.account.client("s3").get_paginator("list_buckets").paginate()
    names = [("buckets", one["Name"]) for page in pages for one in page["Buckets"]]
    logs = search.account.client("logs").get_paginator("describe_log_groups")
    for prefix in ("sagemaker-infra-", "/aws/lambda/sagemaker-infra-"):
        for page in logs.paginate(logGroupNamePrefix=prefix):
            names += [("log-groups", one["logGroupName"]) for one in page["logGroups"]]
    for kind, name in names:
        if (stack := looks.stack_of(name, search.gone)) is not None:
            search.add(kind, name, stack, NAME)
