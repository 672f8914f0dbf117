"""What a token's claims say: until when it holds, who the user is, and in which groups. Pure; knows no signatures.

A group may stand in a role that denies. So groups that are missing for want of room, or that cannot be understood,
refuse the token; to go on with some of them could lift a denial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from mlflow_proxy.access.caller import Caller, Unauthenticated, Way
from mlflow_proxy.access.tokens import shown

_LONGEST_NAME = 256
_MOST_GROUPS = 200
# The year 5138. More is no count of seconds; milliseconds, mostly.
_LATEST = 1e11
# Claims that are lists of words by definition (RFC 8693 section 4.2; Entra ID's name for it).
_WORD_LISTS = ("scope", "scp")


@dataclass(frozen=True, slots=True)
class ClaimRules:
    """From claims to a caller. Names of claims may lead inwards with dots; a claim named just so comes first."""

    user: str
    groups: str | None = None
    required: Mapping[str, str] = field(default_factory=dict)

    def caller(self, claims: Mapping[str, Any], *, way: Way, credential: str) -> Caller:
        """The caller whom verified claims name. Raises Unauthenticated."""
        for name, value in self.required.items():
            found = look_up(claims, name)
            if not _has(found, value, words=name in _WORD_LISTS):
                raise Unauthenticated(f"its claim {name!r} is {shown(found)}, not {value!r} (required_claims)")
        return Caller(f"user:{self._user(claims)}", way, self._groups(claims), credential=credential)

    def _user(self, claims: Mapping[str, Any]) -> str:
        found = look_up(claims, self.user)
        if not is_name(found):
            raise Unauthenticated(f"its claim {self.user!r} (user_claim) is {shown(found)}, which names no user")
        if self.user == "email" and not _is_verified(claims):
            raise Unauthenticated("its email is not verified, so anybody may have entered it")
        return found

    def _groups(self, claims: Mapping[str, Any]) -> frozenset[str]:
        if self.groups is None:
            return frozenset()
        found = look_up(claims, self.groups)
        if found is None:
            _refuse_overage(claims, self.groups)
            return frozenset()
        groups = found.split() if isinstance(found, str) else found
        if not isinstance(groups, list) or not all(is_name(group) for group in groups):
            raise Unauthenticated(f"its claim {self.groups!r} (groups_claim) is {shown(found)}, not a list of names")
        if len(groups) > _MOST_GROUPS:
            raise Unauthenticated(
                f"its claim {self.groups!r} (groups_claim) has {len(groups)} groups, and {_MOST_GROUPS} are allowed; "
                "let the provider send only those that matter here"
            )
        return frozenset(groups)


def look_up(claims: Mapping[str, Any], name: str) -> Any:
    """A claim's value, or None. `https://example.com/groups` is one name, `realm_access.roles` leads inwards."""
    if name in claims:
        return claims[name]
    head, dot, rest = name.partition(".")
    inner = claims.get(head) if dot else None
    return look_up(inner, rest) if isinstance(inner, Mapping) else None


def is_name(value: Any) -> TypeGuard[str]:
    """Whether a value can be a user or group: a text of 1 to 256 printable characters, no space at its ends."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable() and value == value.strip()


def check_times(claims: Mapping[str, Any], now: float, leeway: float, what: str = "the token") -> float:
    """When `exp` ends it, in seconds since the epoch, leeway included; `exp` is required, `nbf` and `iat` count.

    Raises Unauthenticated outside of that time (RFC 7519 section 4.1).
    """
    expires = _seconds(claims, "exp")
    if expires is None:
        raise Unauthenticated(f"{what} has no exp, so that it would never expire")
    if now >= expires + leeway:
        raise Unauthenticated(f"{what} expired {now - expires:.0f} s ago")
    for name, meaning in (("nbf", "is not yet valid"), ("iat", "was issued in the future")):
        begins = _seconds(claims, name)
        if begins is not None and begins > now + leeway:
            raise Unauthenticated(f"{what} {meaning}, by {begins - now:.0f} s; are both clocks right?")
    return expires + leeway


def _seconds(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LATEST:
        raise Unauthenticated(f"its {name} is {shown(value)}, which is no time in seconds")
    return float(value)


def _has(found: Any, wanted: str, *, words: bool) -> bool:
    if isinstance(found, list):
        return wanted in found
    if isinstance(found, bool):
        return wanted == str(found).lower()
    if isinstance(found, int):
        return wanted == str(found)
    return isinstance(found, str) and (wanted == found or (words and wanted in found.split()))


def _is_verified(claims: Mapping[str, Any]) -> bool:
    """Not refuted, that is: some providers leave the claim out. Cognito writes it as a text."""
    return claims.get("email_verified", True) in (True, "true")


def _refuse_overage(claims: Mapping[str, Any], name: str) -> None:
    """Entra ID leaves out the groups of users with more than 200, and says where to ask for them instead."""
    elsewhere = claims.get("_claim_names")
    if (isinstance(elsewhere, Mapping) and name in elsewhere) or claims.get("hasgroups") in (True, "true"):
        raise Unauthenticated(
            f"its claim {name!r} (groups_claim) was left out because the user is in too many groups; let the provider "
            "send only groups assigned to the application, or use application roles"
        )
