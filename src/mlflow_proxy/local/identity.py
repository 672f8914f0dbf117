"""Who a request comes from: access keys, STS sessions and permissions, as moto's IAM and STS hold them.

moto's inner data is touched here and in `accounts` only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from moto.iam.access_control import AssumedRoleAccessKey, CreateAccessKeyFailure, IAMUserAccessKey
from moto.iam.exceptions import NoSuchEntity, NotFoundException
from moto.iam.models import Policy, iam_backends
from moto.sts.models import sts_backends

from .errors import AwsError
from .policy import Context, Decision, Document, evaluate

PARTITION = "aws"


@dataclass(frozen=True)
class Principal:
    """The holder of one access key; `token` is set for sessions, `identity_arn` is what trust policies name."""

    account: str
    arn: str
    identity_arn: str
    access_key: str
    secret_key: str
    token: str | None
    created: datetime
    expires: datetime | None
    session_policy: str | None = None
    session_tags: Mapping[str, str] = field(default_factory=dict)
    source_identity: str | None = None

    def names(self) -> list[str]:
        """What a trust policy may call this principal."""
        root = f"arn:{PARTITION}:iam::{self.account}:root"
        return [self.arn, self.identity_arn, self.account, root]

    def context(self) -> dict[str, str]:
        """What conditions of policies may ask about this principal."""
        known = {f"aws:PrincipalTag/{key}": value for key, value in self.session_tags.items()}
        if self.source_identity is not None:
            known["aws:SourceIdentity"] = self.source_identity
        return known


class Directory:
    """Access keys and permissions of all accounts of the stand-in."""

    def __init__(self, accounts: Iterable[str]) -> None:
        self._accounts = tuple(accounts)
        self._carried: dict[str, tuple[Mapping[str, str], str | None]] = {}
        self.credential_lifetime: float | None = None

    def find(self, access_key: str) -> Principal | None:
        """The principal that holds `access_key`, expired or not."""
        for account in self._accounts:
            found = _find_session(account, access_key) or _find_user(account, access_key)
            if found is not None:
                tags, source_identity = self._carried.get(access_key, ({}, None))
                return replace(found, session_tags=tags, source_identity=source_identity)
        return None

    def carry(self, access_key: str, tags: Mapping[str, str], source_identity: str | None) -> None:
        """Note what a new session was given; moto forgets it."""
        self._carried[access_key] = (tags, source_identity)

    def expired(self, principal: Principal) -> bool:
        """Whether its session is over: by STS's word, or sooner if a fault says so."""
        if principal.expires is None:
            return False
        end = principal.expires
        if self.credential_lifetime is not None:
            end = min(end, principal.created + timedelta(seconds=self.credential_lifetime))
        return datetime.now(UTC) >= end

    def decide(self, principal: Principal, action: str, resource: str, context: Context) -> Decision:
        """What the principal's policies say; a session policy can only narrow them."""
        context = {**principal.context(), **context}
        decision = evaluate(_policies(principal), action, resource, context)
        if decision is Decision.ALLOW and principal.session_policy:
            return evaluate([json.loads(principal.session_policy)], action, resource, context)
        return decision

    def authorize(self, principal: Principal, action: str, resource: str, owner: str) -> None:
        """Raise AWS's AccessDeniedException unless the principal may do `action` on `resource`.

        `owner` is the resource's account: MLflow resources have no resource policy, so no identity policy
        reaches into another account.
        """
        decision = self.decide(principal, action, resource, {"aws:PrincipalArn": principal.arn})
        if decision is Decision.ALLOW and owner == principal.account:
            return
        because = f"no identity-based policy allows the {action} action"
        if decision is Decision.ALLOW:
            because = f"no resource-based policy allows the {action} action"
        tail = (
            "with an explicit deny in an identity-based policy" if decision is Decision.DENY else f"because {because}"
        )
        message = f"User: {principal.arn} is not authorized to perform: {action} on resource: {resource} {tail}"
        raise AwsError("AccessDeniedException", message)


def _find_user(account: str, access_key: str) -> Principal | None:
    for user in list(iam_backends[account][PARTITION].users.values()):
        for key in user.access_keys:
            if key.access_key_id == access_key and key.status == "Active":
                return Principal(
                    account=account,
                    arn=user.arn,
                    identity_arn=user.arn,
                    access_key=access_key,
                    secret_key=key.secret_access_key,
                    token=None,
                    created=_utc(key.create_date),
                    expires=None,
                )
    return None


def _find_session(account: str, access_key: str) -> Principal | None:
    role = sts_backends[account][PARTITION].get_assumed_role_from_access_key(access_key)
    if role is None:
        return None
    return Principal(
        account=account,
        arn=role.arn,
        identity_arn=role.role_arn,
        access_key=access_key,
        secret_key=role.secret_access_key,
        token=role.session_token,
        created=_utc(role.access_key.create_date),
        expires=_utc(role.expiration),
        session_policy=role.policy,
    )


def _policies(principal: Principal) -> list[Document]:
    """The identity policies as moto stores them, each as JSON, as a managed policy or in a small mapping."""
    return [json.loads(_document(policy)) for policy in _collected(principal)]


def _collected(principal: Principal) -> list[Any]:
    try:
        if principal.token is None:
            key = IAMUserAccessKey(principal.account, PARTITION, principal.access_key, {})
        else:
            headers = {"X-Amz-Security-Token": principal.token}
            key = AssumedRoleAccessKey(principal.account, PARTITION, principal.access_key, headers)
        return list(key.collect_policies())
    except (CreateAccessKeyFailure, NotFoundException, NoSuchEntity):
        return []  # the user, role or key was deleted while its session lasts


def _document(policy: Any) -> str:
    if isinstance(policy, Policy):
        return str(next(each.document for each in policy.versions if each.is_default))
    return str(policy if isinstance(policy, str) else policy["policy_document"])


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
