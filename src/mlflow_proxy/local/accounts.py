"""The IAM users, roles and policies, and the artifact bucket, that the stand-in begins with.

They are ordinary residents of moto: more can be made with any AWS client, and are obeyed at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moto.iam.exceptions import NotFoundException
from moto.iam.models import iam_backends
from moto.s3.exceptions import BucketAlreadyExists
from moto.s3.models import s3_backends
from moto.sts.models import sts_backends

from .identity import PARTITION
from .targets import Arn

EXTERNAL_ID = "demo-external-id"
_USER = "developer"
# The last two, to give the session tags and a source identity.
_ASSUME = ("sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity")
_CONTROL_PLANE = [
    "sagemaker:CreatePresignedMlflow*",
    "sagemaker:DescribeMlflow*",
    "sagemaker:StartMlflow*",
    "sagemaker:StopMlflow*",
]


@dataclass(frozen=True)
class Residents:
    """What was made: the default principal's key, and the roles by name."""

    access_key: str
    secret_key: str
    roles: Mapping[str, str]


@dataclass(frozen=True)
class Estate:
    """Whose resources there are."""

    account: str
    other_account: str
    tracking: Arn
    app: Arn
    cross_account: Arn


def settle(estate: Estate) -> Residents:
    """Create users and roles; what already exists by name is given the same policies anew."""
    own = [estate.tracking.text, estate.app.text]
    everything = [*_data(own), _allow(_CONTROL_PLANE, own), _allow(["sagemaker:ListMlflow*"], "*")]
    writer = [*_data(own), _allow(_CONTROL_PLANE[:2], own)]
    reading = [f"sagemaker-mlflow:{verb}*" for verb in ("Get", "Search", "List")]
    reader = [_allow(reading, [estate.tracking.text]), _allow(["sagemaker-mlflow:AccessUI"], "*")]
    abroad = [estate.cross_account.text]
    visitor = [*_data(abroad), _allow(_CONTROL_PLANE, abroad), _allow(["sagemaker:ListMlflow*"], "*")]
    roles = {
        "writer": _role(estate.account, "writer", _trust(estate.account), writer),
        "untagged": _role(estate.account, "untagged", _trust(estate.account, actions=_ASSUME[:1]), writer),
        "reader": _role(estate.account, "reader", _trust(estate.account), reader),
        "nothing": _role(estate.account, "nothing", _trust(estate.account), []),
        "cross-account": _role(estate.other_account, "cross-account", _trust(estate.account, EXTERNAL_ID), visitor),
    }
    abilities = [*everything, _allow(_ASSUME, list(roles.values())), _allow(["s3:*"], "*")]
    access_key, secret_key = _user(estate.account, _USER, abilities)
    return Residents(access_key, secret_key, roles)


def make_bucket(account: str, region: str, name: str) -> None:
    """The bucket of artifacts."""
    try:
        s3_backends[account][PARTITION].create_bucket(name, region)
    except BucketAlreadyExists:
        return


def open_session(role_arn: str, account: str, region: str, lifetime: int) -> dict[str, str]:
    """Fresh session credentials of a role, as a container's credential endpoint answers them.

    Made beside STS, which grants no session under fifteen minutes, so that expiry can be watched.
    """
    session = sts_backends[account][PARTITION].assume_role(
        region_name=region,
        role_session_name="container",
        role_arn=role_arn,
        policy=None,
        duration=lifetime,
        external_id=None,
    )
    return {
        "RoleArn": role_arn,
        "AccessKeyId": session.access_key_id,
        "SecretAccessKey": session.secret_access_key,
        "Token": session.session_token,
        "Expiration": session.expiration.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def trust_policy(role_arn: str) -> Mapping[str, Any] | None:
    """A role's trust policy; None if there is no such role."""
    try:
        role = iam_backends[role_arn.split(":")[4]][PARTITION].get_role_by_arn(role_arn)
    except NotFoundException:
        return None
    document: Mapping[str, Any] = json.loads(role.assume_role_policy_document)
    return document


def _data(arns: Sequence[str]) -> list[dict[str, Any]]:
    return [
        _allow(["sagemaker-mlflow:*", "sagemaker:CallMlflowAppApi"], arns),
        _allow(["sagemaker-mlflow:AccessUI"], "*"),
    ]


def _allow(actions: Sequence[str], resources: Sequence[str]) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": actions, "Resource": resources}


def _trust(account: str, external_id: str | None = None, actions: Sequence[str] = _ASSUME) -> str:
    statement: dict[str, Any] = {
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:{PARTITION}:iam::{account}:root"},
        "Action": actions,
    }
    if external_id is not None:
        statement["Condition"] = {"StringEquals": {"sts:ExternalId": external_id}}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _document(statements: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def _role(account: str, name: str, trust: str, statements: Sequence[Mapping[str, Any]]) -> str:
    iam = iam_backends[account][PARTITION]
    try:
        role = iam.get_role(name)
    except NotFoundException:
        role = iam.create_role(
            role_name=name,
            assume_role_policy_document=trust,
            path="/",
            permissions_boundary=None,
            description="",
            tags=[],
            max_session_duration="3600",
        )
    if statements:
        iam.put_role_policy(name, "local-sagemaker", _document(statements))
    return str(role.arn)


def _user(account: str, name: str, statements: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    iam = iam_backends[account][PARTITION]
    if name not in iam.users:
        iam.create_user(PARTITION, name)
    iam.put_user_policy(name, "local-sagemaker", _document(statements))
    keys = iam.list_access_keys(name)
    key = keys[0] if keys else iam.create_access_key(name)
    return str(key.access_key_id), str(key.secret_access_key)
