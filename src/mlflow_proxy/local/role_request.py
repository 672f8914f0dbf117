"""What a call of AssumeRole asks for, checked as STS checks its parameters; who may have it is `sts`'s to say.

Source: the STS API reference of AssumeRole, and "Pass session tags in AWS STS" in the AWS IAM User Guide.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import AwsError, validation_error

_NAME = re.compile(r"[\w+=,.@-]*", re.ASCII)
_NAME_LENGTHS = (2, 64)
_TAG_MARKS = frozenset("_.:/=+-@")
_TAG_CATEGORIES = "LZN"
_KEY_LENGTHS = (1, 128)
_VALUE_LENGTHS = (0, 256)
_MOST_TAGS = 50
_SECONDS = (900, 43200)
_RESERVED = "aws:"


@dataclass(frozen=True)
class RoleRequest:
    """The role that is asked for, and what its session is to be called and to carry."""

    role: str
    session_name: str
    external_id: str | None
    tags: Mapping[str, str]
    source_identity: str | None

    @classmethod
    def parse(cls, form: Mapping[str, str]) -> RoleRequest:
        """Raises AwsError for what STS would not take, whoever asks."""
        seconds = form.get("DurationSeconds", "3600")
        if not seconds.isdigit() or not _SECONDS[0] <= int(seconds) <= _SECONDS[1]:
            least, most = _SECONDS
            raise _constraint(seconds, "durationSeconds", f"Member must have value between {least} and {most}")
        identity = form.get("SourceIdentity")
        return cls(
            role=form.get("RoleArn", ""),
            session_name=_name(form.get("RoleSessionName", ""), "roleSessionName"),
            external_id=form.get("ExternalId"),
            tags=_tags(form),
            source_identity=None if identity is None else _name(identity, "sourceIdentity"),
        )

    @property
    def actions(self) -> list[str]:
        """The actions that both the caller and the role's trust policy must allow."""
        tagging = ["sts:TagSession"] if self.tags else []
        identifying = ["sts:SetSourceIdentity"] if self.source_identity is not None else []
        return ["sts:AssumeRole", *tagging, *identifying]

    @property
    def context(self) -> dict[str, str]:
        """The condition keys that policies may ask about."""
        known = {f"aws:RequestTag/{key}": value for key, value in self.tags.items()}
        known["sts:RoleSessionName"] = self.session_name
        if self.external_id is not None:
            known["sts:ExternalId"] = self.external_id
        if self.source_identity is not None:
            known["sts:SourceIdentity"] = self.source_identity
        return known


def _name(value: str, place: str) -> str:
    _check_length(value, place, _NAME_LENGTHS)
    if not _NAME.fullmatch(value):
        raise _constraint(value, place, f"Member must satisfy regular expression pattern: {_NAME.pattern}")
    if value.startswith(_RESERVED):
        raise _constraint(value, place, f"Member must not begin with {_RESERVED}")
    return value


def _tags(form: Mapping[str, str]) -> dict[str, str]:
    tags: dict[str, str] = {}
    number = 1
    while f"Tags.member.{number}.Key" in form:
        place = f"tags.{number}.member"
        key = _tag_text(form[f"Tags.member.{number}.Key"], f"{place}.key", _KEY_LENGTHS)
        value = _tag_text(form.get(f"Tags.member.{number}.Value", ""), f"{place}.value", _VALUE_LENGTHS)
        if key.lower() in {known.lower() for known in tags}:
            message = "Duplicate tag keys found. Please note that Tag keys are case insensitive."
            raise AwsError("InvalidParameterValue", message, status=400)
        tags[key] = value
        number += 1
    if len(tags) > _MOST_TAGS:
        raise _constraint(str(len(tags)), "tags", f"Member must have length less than or equal to {_MOST_TAGS}")
    return tags


def _tag_text(value: str, place: str, lengths: tuple[int, int]) -> str:
    _check_length(value, place, lengths)
    if not all(char in _TAG_MARKS or unicodedata.category(char)[0] in _TAG_CATEGORIES for char in value):
        pattern = r"[\p{L}\p{Z}\p{N}_.:/=+\-@]"
        raise _constraint(value, place, f"Member must satisfy regular expression pattern: {pattern}*")
    if value.startswith(_RESERVED):
        raise _constraint(value, place, f"Member must not begin with {_RESERVED}")
    return value


def _check_length(value: str, place: str, lengths: tuple[int, int]) -> None:
    least, most = lengths
    if len(value) < least:
        raise _constraint(value, place, f"Member must have length greater than or equal to {least}")
    if len(value) > most:
        raise _constraint(value, place, f"Member must have length less than or equal to {most}")


def _constraint(value: str, place: str, constraint: str) -> AwsError:
    return validation_error(
        f"1 validation error detected: Value '{value}' at '{place}' failed to satisfy constraint: {constraint}"
    )
