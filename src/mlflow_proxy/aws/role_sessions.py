"""Role sessions: which IAM role is assumed, and under which name, tags and source identity.

A target's role has a fixed name; a session for a caller is named after that caller, so that CloudTrail shows who it was
and IAM policies can tell callers apart. Pure values; assuming the role is the business of `credentials`.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import sha256
from typing import NamedTuple

from mlflow_proxy.settings import RoleSettings

# What STS takes (API reference of AssumeRole): RoleSessionName and SourceIdentity are 2 to 64 of [\w+=,.@-], values of
# tags at most 256 of [\p{L}\p{Z}\p{N}_.:/=+\-@]; of the separators, \p{Z}, only the space is let through here.
_NAME_LENGTH = 64
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_+=,.@-]")
_TAG_LENGTH = 256
_MARKS_IN_TAGS = frozenset(" _.:/=+-@")

# Hexadecimal digits of the subject's SHA-256 that make a shortened or changed text unique.
_HASH_DIGITS = 16
_LIKE_HASHED = re.compile(rf"-[0-9a-f]{{{_HASH_DIGITS}}}\Z")


class RoleSession(NamedTuple):
    """All that STS is told when a role is assumed. Equal ones share credentials; different callers are never equal.

    `caller` is the subject as it was identified, unchanged; None for the role of a target, which all its callers share.
    """

    role_arn: str
    external_id: str | None
    region: str
    session_name: str
    tags: tuple[tuple[str, str], ...] = ()
    source_identity: str | None = None
    caller: str | None = None

    @property
    def label(self) -> str:
        """The session in messages and logs; of the caller it holds only what STS takes."""
        return f"role {self.role_arn}" + (f" as {self.session_name}" if self.caller is not None else "")


def role_session(role: RoleSettings, subject: str, region: str) -> RoleSession:
    """The session of `role` for one caller, by the STS of `region`.

    Raises ValueError if the role of the proxy names no IAM role to sign with.
    """
    if role.assume_role_arn is None:
        raise ValueError(f"role {role.name} has no assume_role_arn")
    name = _session_name(subject)
    return RoleSession(
        role_arn=role.assume_role_arn,
        external_id=role.external_id,
        region=region,
        session_name=name,
        tags=(("caller", _tag_value(subject)), ("role", role.name)) if role.session_tags else (),
        source_identity=name if role.source_identity else None,
        caller=subject,
    )


def _session_name(subject: str) -> str:
    """`alice@example.com-<hash>` for a user, `key=ci-<hash>` for others.

    No user can look like another kind of caller, because a user's own `=` becomes `-`.
    """
    user = subject.removeprefix("user:")
    readable = subject.replace(":", "=", 1) if user == subject else user.replace("=", "-")
    return _with_hash(_NOT_IN_NAMES.sub("-", readable), subject, _NAME_LENGTH)


def _tag_value(subject: str) -> str:
    """The subject itself where STS takes it, else what is left of it, with its hash.

    One that only looks as if it had a hash gets one, too: else somebody could choose another's changed name.
    """
    cleaned = "".join(char if _fits_tag(char) else "-" for char in subject)
    if cleaned == subject and len(subject) <= _TAG_LENGTH and not _LIKE_HASHED.search(subject):
        return subject
    return _with_hash(cleaned, subject, _TAG_LENGTH)


def _fits_tag(char: str) -> bool:
    return char in _MARKS_IN_TAGS or unicodedata.category(char)[0] in "LN"


def _with_hash(readable: str, subject: str, length: int) -> str:
    # surrogatepass: a JSON text can hold half a surrogate pair.
    digest = sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    return f"{readable[: length - _HASH_DIGITS - 1]}-{digest}"
