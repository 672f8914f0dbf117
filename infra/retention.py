"""What becomes of data when its stack is deleted: `dev` removes it, `prod` keeps it."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_kms as kms
from aws_cdk import aws_logs as logs
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.acknowledgements import acknowledge, acknowledge_lint
from infra.settings import Settings

# What log delivery writes is of little use after that.
_LOG_FILE_DAYS = 90


def removal(settings: Settings) -> cdk.RemovalPolicy:
    """What happens to resources with data in them."""
    return cdk.RemovalPolicy.RETAIN if settings.is_prod else cdk.RemovalPolicy.DESTROY


def named_removal(settings: Settings) -> cdk.RemovalPolicy:
    """The same for what has a name of its own: a first deployment that fails leaves nothing in the next one's way."""
    return cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE if settings.is_prod else cdk.RemovalPolicy.DESTROY


def log_group(scope: Construct, id: str, settings: Settings) -> logs.LogGroup:
    """A log group with the environment's retention. Its name begins with the stack's.

    CloudFormation chooses the rest: a fixed name would be taken by the group that an earlier deployment left.
    """
    group = logs.LogGroup(scope, id, removal_policy=removal(settings))
    # The enum for it has a member for each number, but cannot be asked for one.
    resource = group.node.default_child
    assert isinstance(resource, logs.CfnLogGroup)  # noqa: S101
    resource.retention_in_days = settings.retention_days
    return group


def encryption_key(
    scope: Construct, id: str, settings: Settings, description: str, *, holds_data: bool = True
) -> kms.Key:
    """A key that rotates each year. A deleted one can be had back for a month in prod, for a week in dev.

    One that does not hold data goes with its stack: nothing would be lost with it.
    """
    return kms.Key(
        scope,
        id,
        description=description,
        enable_key_rotation=True,
        pending_window=cdk.Duration.days(30 if settings.is_prod else 7),
        removal_policy=removal(settings) if holds_data else cdk.RemovalPolicy.DESTROY,
    )


def log_bucket(scope: Construct, id: str, settings: Settings) -> s3.Bucket:
    """A bucket for what load balancer and S3 write about requests. Log delivery takes no KMS key, so S3 encrypts."""
    bucket = s3.Bucket(
        scope,
        id,
        encryption=s3.BucketEncryption.S3_MANAGED,
        block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
        object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
        enforce_ssl=True,
        minimum_tls_version=1.2,
        lifecycle_rules=[s3.LifecycleRule(expiration=cdk.Duration.days(_LOG_FILE_DAYS))],
        removal_policy=removal(settings),
        auto_delete_objects=not settings.is_prod,
    )
    acknowledge(bucket, "This is the bucket that access logs are written to; logging itself would never end.", "S1")
    return bucket


def acknowledge_bucket_emptier(stack: cdk.Stack) -> None:
    """For stacks with buckets that are emptied before they are deleted, which a function of CDK's own does."""
    provider = stack.node.try_find_child("Custom::S3AutoDeleteObjectsCustomResourceProvider")
    if provider is not None:
        acknowledge_lint(
            provider.node.find_child("Handler"), "CDK's own construct names the dependency twice.", "W3005"
        )
