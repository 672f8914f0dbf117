"""What an API key looks like, and what is kept of it: a line of JSON without any secret.

Pure values and parsing. Where lines are kept is in `key_file` and `key_secret`; whether a shown key counts, in `keys`.
"""

from __future__ import annotations

import io
import json
import math
import re
import secrets
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from mlflow_proxy.targets import TARGET_NAME

KEYS_MAX = 10_000
LINE_MAX = 4096  # bytes
TEXT_MAX = KEYS_MAX * LINE_MAX

# Without 0, 1, i, l and o, which people mistake for each other; and without `_`, which ends the id.
_ID_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"
_ID_LENGTH = 8
_SECRET_LETTERS = string.ascii_letters + string.digits
_SECRET_LENGTH = 43  # times log2(62) bits: 256
KEY = re.compile(rf"mlp_([{_ID_LETTERS}]{{{_ID_LENGTH}}})_[A-Za-z0-9]{{{_SECRET_LENGTH}}}")

_NAME = re.compile(r"[A-Za-z0-9._@+-]{1,64}")
_ID = re.compile(rf"[{_ID_LETTERS}]{{{_ID_LENGTH}}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


class KeysError(Exception):
    """Keys that cannot be read, kept or changed. The message says what to do; it never repeats what is in a line."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key. `sha256` is the hash of the whole key as callers show it, in hexadecimal digits.

    `expires` None means never. `ends` is set by a rotation: from then on only the new key counts. All times are in UTC.
    """

    id: str
    name: str
    sha256: str = field(repr=False)
    role: str
    created: datetime
    expires: datetime | None
    ends: datetime | None = None
    revoked: datetime | None = None

    @property
    def valid_until(self) -> float:
        """When it stops to count, in seconds since the epoch; infinite for never."""
        if self.revoked is not None:
            return -math.inf
        return min((end.timestamp() for end in (self.expires, self.ends) if end is not None), default=math.inf)

    def restricted_by(self, other: Key) -> Key:
        """This key, over as soon as either of the two is; all else stays as it is here."""
        return replace(
            self,
            expires=_earlier(self.expires, other.expires),
            ends=_earlier(self.ends, other.ends),
            revoked=_earlier(self.revoked, other.revoked),
        )

    def state(self, now: float) -> str:
        """`active`, `ends` (after a rotation), `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        if now >= self.valid_until:
            return "expired"
        return "active" if self.ends is None else "ends"

    def fields(self) -> dict[str, str | None]:
        """As it stands in the file; `ends` and `revoked` only when they are set."""
        optional = {"ends": self.ends, "revoked": self.revoked}
        return {
            "id": self.id,
            "name": self.name,
            "sha256": self.sha256,
            "role": self.role,
            "created": show_time(self.created),
            "expires": show_time(self.expires) if self.expires else None,
            **{name: show_time(value) for name, value in optional.items() if value is not None},
        }


def _earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    return min((time for time in (one, other) if time is not None), default=None)


def make_key(
    name: str, role: str, *, created: datetime, expires: datetime | None, taken: Iterable[str] = ()
) -> tuple[str, Key]:
    """A new key as its caller shows it, and what is kept of it. `taken` are ids and names that its id must not be.

    Raises KeysError for a name or role that cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r} cannot be a key's name; use 1 to 64 letters, digits and any of . - _ @ +")
    if not TARGET_NAME.fullmatch(role):
        raise KeysError(f"{role!r} cannot be a role's name; give one of the names in the [[roles]] tables")
    avoided = set(taken) | {name}
    key_id = next(found for found in iter(_random_id, None) if found not in avoided)
    text = f"mlp_{key_id}_{''.join(secrets.choice(_SECRET_LETTERS) for _ in range(_SECRET_LENGTH))}"
    return text, Key(key_id, name, sha256(text.encode()).hexdigest(), role, created, expires)


def _random_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def show_time(value: datetime) -> str:
    """A time as it is written in keys files: UTC, in whole seconds."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_keys(text: bytes) -> dict[str, Key]:
    """The keys in a text, by id. One line that cannot be used makes all of it unusable: KeysError with its number."""
    found: dict[str, Key] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(io.BytesIO(text), 1):
        if not line.strip():
            continue
        try:
            key = _parse_line(line)
        except KeysError as error:
            raise KeysError(f"line {number}: {error}") from None
        if key.id in found:
            raise KeysError(f"line {number}: the id {key.id} is that of line {lines[key.id]}; remove one of them")
        found[key.id] = key
        lines[key.id] = number
        if len(found) > KEYS_MAX:
            raise KeysError(f"line {number}: more than {KEYS_MAX} keys; remove those that are revoked or expired")
    return found


def usable_lines(text: bytes) -> Iterator[Key]:
    """The keys of those lines that can be used, whatever the others are; an id may come twice."""
    for line in io.BytesIO(text):
        try:
            yield _parse_line(line)
        except KeysError:
            continue


def _parse_line(line: bytes) -> Key:
    if len(line.rstrip()) > LINE_MAX:
        raise KeysError(f"is longer than {LINE_MAX} bytes")
    try:
        data = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise KeysError("is not JSON; each line is one object, as `mlflow-proxy keys new` writes it") from None
    if not isinstance(data, dict):
        raise KeysError("is not a JSON object")
    allowed = ("id", "name", "sha256", "role", "created", "expires", "ends", "revoked")
    if not data.keys() <= set(allowed):
        raise KeysError(f"has a field that does not exist; there are {', '.join(allowed)}")
    if "expires" not in data:  # a forgotten one must not mean for ever
        raise KeysError("expires is missing; write a time, or null for never")
    return Key(
        id=_text(data, "id", _ID, "8 letters and digits"),
        name=_text(data, "name", _NAME, "1 to 64 letters, digits and any of . - _ @ +"),
        sha256=_text(data, "sha256", _DIGEST, "64 hexadecimal digits in lower case"),
        role=_text(data, "role", TARGET_NAME, "the name of a role"),
        created=_time(data, "created"),
        expires=_optional_time(data, "expires"),
        ends=_optional_time(data, "ends"),
        revoked=_optional_time(data, "revoked"),
    )


def _text(data: dict[str, Any], name: str, pattern: re.Pattern[str], what: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise KeysError(f"{name} must be {what}")
    return value


def _optional_time(data: dict[str, Any], name: str) -> datetime | None:
    return None if data.get(name) is None else _time(data, name)


def _time(data: dict[str, Any], name: str) -> datetime:
    value = data.get(name)
    try:
        if isinstance(value, str) and _TIME.fullmatch(value):
            return datetime.fromisoformat(value)
    except ValueError:  # the 31st of February
        pass
    raise KeysError(f"{name} must be a time in UTC like 2026-11-24T06:07:48Z")
