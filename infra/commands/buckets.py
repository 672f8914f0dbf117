"""Buckets with versions: what is in one, and how it is emptied and deleted, page by page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from infra.commands.aws import Account, code, is_gone
from infra.commands.stacks import Say

# Log delivery may write while a bucket is emptied.
_PASSES = 5
# Counting more than this would keep a person waiting; a thousand come per request.
_COUNTED = 200_000


class NotEmpty(Exception):
    """A bucket could not be emptied. The message says which objects stay, and why."""


@dataclass(frozen=True)
class Contents:
    """What is in a bucket. `more`: there is more than was counted."""

    objects: int
    versions: int
    markers: int
    size: int
    more: bool

    def __str__(self) -> str:
        if not self.versions and not self.markers:
            return "empty"
        least = "more than " if self.more else ""
        return (
            f"{least}{_count(self.objects, 'object')} in {_count(self.versions, 'version')}, "
            f"{_count(self.markers, 'delete marker')}, {_bytes(self.size)}"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def contents(account: Account, bucket: str) -> Contents | None:
    """What is in a bucket; None if there is no such bucket of this account."""
    objects: set[str] = set()
    versions = markers = size = 0
    try:
        for page in _pages(account, bucket):
            for one in page.get("Versions", []):
                objects.add(one["Key"])
                versions += 1
                size += one["Size"]
            markers += len(page.get("DeleteMarkers", []))
            if versions + markers >= _COUNTED:
                return Contents(len(objects), versions, markers, size, more=True)
    except ClientError as error:
        if is_gone(error):
            return None
        raise
    return Contents(len(objects), versions, markers, size, more=False)


def _pages(account: Account, bucket: str) -> Iterator[dict[str, Any]]:
    pages = account.client("s3").get_paginator("list_object_versions")
    yield from pages.paginate(Bucket=bucket, ExpectedBucketOwner=account.id)


def empty(account: Account, bucket: str, say: Say) -> None:
    """Delete all versions and delete markers, and what was never uploaded to its end. Raises NotEmpty."""
    _abort_uploads(account, bucket)
    deleted = 0
    for _ in range(_PASSES):
        reasons: Counter[str] = Counter()
        stuck: list[str] = []
        found = 0
        for page in _pages(account, bucket):
            items = [
                {"Key": one["Key"], "VersionId": one["VersionId"]}
                for one in (*page.get("Versions", []), *page.get("DeleteMarkers", []))
            ]
            if not items:
                continue
            found += len(items)
            errors = _delete(account, bucket, items)
            reasons.update(f"{one.get('Code')}: {one.get('Message')}" for one in errors)
            stuck += [one.get("Key", "") for one in errors]
            deleted += len(items) - len(errors)
            say(f"  {bucket}: {deleted:,} versions and delete markers deleted")
        if not found:
            return
        if stuck:
            raise NotEmpty(
                f"{len(stuck):,} versions cannot be deleted, such as {stuck[0]!r} "
                f"({'; '.join(reasons)}); {deleted:,} were deleted"
            )
    raise NotEmpty("new objects come as fast as they are deleted; stop what writes them, then run this again")


def _delete(account: Account, bucket: str, items: list[dict[str, str]]) -> list[dict[str, str]]:
    answer = account.client("s3").delete_objects(
        Bucket=bucket, ExpectedBucketOwner=account.id, Delete={"Objects": items, "Quiet": True}
    )
    errors: list[dict[str, str]] = answer.get("Errors", [])
    return errors


def _abort_uploads(account: Account, bucket: str) -> None:
    s3 = account.client("s3")
    pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, ExpectedBucketOwner=account.id)
    for page in pages:
        for one in page.get("Uploads", []):
            s3.abort_multipart_upload(
                Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"], ExpectedBucketOwner=account.id
            )


def delete(account: Account, bucket: str, say: Say) -> None:
    """Empty a bucket and delete it. Raises NotEmpty."""
    for _ in range(_PASSES):
        try:
            empty(account, bucket, say)
            account.client("s3").delete_bucket(Bucket=bucket, ExpectedBucketOwner=account.id)
        except ClientError as error:
            if is_gone(error):
                return
            if code(error) != "BucketNotEmpty":
                raise
        else:
            return
    raise NotEmpty("something writes into it again and again; stop that, then run this again")


def key_of(account: Account, bucket: str) -> str | None:
    """The KMS key that a bucket's objects are encrypted with."""
    try:
        answer = account.client("s3").get_bucket_encryption(Bucket=bucket, ExpectedBucketOwner=account.id)
    except ClientError as error:
        if is_gone(error) or code(error) == "ServerSideEncryptionConfigurationNotFoundError":
            return None
        raise
    for rule in answer["ServerSideEncryptionConfiguration"]["Rules"]:
        key = rule.get("ApplyServerSideEncryptionByDefault", {}).get("KMSMasterKeyID")
        if key:
            return str(key).rsplit("/", 1)[-1]
    return None
