"""Step 4 of a request's way: may this caller do this, there; and as which role, with which AWS identity.

Roles are values of the configuration; a decision is a pure function of caller, target and action, and is remembered.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.aws.role_sessions import RoleSession, role_session
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import RoleSettings
from mlflow_proxy.targets import Mode, Target

# Actions of the proxy's own, which only `proxy:…` and `*` name.
OWN_PREFIX = "proxy:"
# A link is a browser session of up to twelve hours, so a pattern must name it: neither `*` nor `Create*` does.
EXPLICIT_PREFIX = "CreatePresigned"
UNKNOWN_PREFIX = "Unknown:"
# Pairs of caller and action that are remembered; then all are forgotten.
_MOST_REMEMBERED = 8192


def link_action(target: Target) -> str:
    """AWS's name of the call that makes a presigned link to a target's UI."""
    kind = "App" if target.arn.mode is Mode.APP else "TrackingServer"
    return f"{EXPLICIT_PREFIX}Mlflow{kind}Url"


class Decision(NamedTuple):
    """An allowed request: the role that allows it, and the AWS role session to sign with (None: as the target says)."""

    role: str
    session: RoleSession | None


_UNRESTRICTED = Decision("", None)


class Patterns:
    """Texts with `*`, which stands for anything."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact = frozenset(patterns)
        # fnmatch's translation takes no time that grows with the stars; its other signs are made plain first.
        plain = (pattern.replace("[", "[[]").replace("?", "[?]") for pattern in self._exact)
        self._regex = re.compile("|".join(map(fnmatch.translate, plain)) or r"(?!)")

    def match(self, text: str) -> bool:
        """Whether any of them matches the whole text."""
        return self._regex.fullmatch(text) is not None

    def __contains__(self, pattern: str) -> bool:
        return pattern in self._exact


class Role:
    """One `[[roles]]` table, ready to be asked."""

    def __init__(self, settings: RoleSettings) -> None:
        self.settings = settings
        self.name = settings.name
        self._subjects = Patterns(settings.subjects)
        self._groups = Patterns(settings.groups)
        self._targets = Patterns(settings.targets)
        self._allow = Patterns(settings.allow)
        self._allow_explicit = Patterns(one for one in settings.allow if one.startswith(EXPLICIT_PREFIX))
        # Metrics and readiness are of all targets; a role that is for some has to name them.
        self._allow_own = Patterns(one for one in settings.allow if one.startswith(OWN_PREFIX))
        self._all_targets = "*" in self._targets
        self._deny = Patterns(settings.deny)

    def is_of(self, caller: Caller) -> bool:
        """Whether the caller has this role: by the key's role, by subject or by group."""
        return (
            caller.role == self.name
            or self._subjects.match(caller.subject)
            or any(self._groups.match(group) for group in caller.groups)
        )

    def is_for(self, target: str) -> bool:
        """Whether it says anything about a target."""
        return self._targets.match(target)

    def allows(self, action: str) -> bool:
        """Whether its `allow` has the action. What no table knows takes a plain `*`."""
        if action.startswith(UNKNOWN_PREFIX):
            return "*" in self._allow
        if action.startswith(EXPLICIT_PREFIX):
            return self._allow_explicit.match(action)
        if action.startswith(OWN_PREFIX) and not self._all_targets:
            return self._allow_own.match(action)
        return self._allow.match(action)

    def denies(self, action: str) -> bool:
        """Whether its `deny` has the action."""
        return self._deny.match(action)


class Policy:
    """All roles of a configuration. Without any, everything is allowed: then callers are not identified either."""

    def __init__(self, roles: Iterable[RoleSettings], targets: Iterable[Target]) -> None:
        self._roles = tuple(Role(role) for role in roles)
        self._targets: Mapping[str, Target] = {target.name: target for target in targets}
        self._decided: dict[tuple[Caller, str, tuple[str, ...]], Decision | Refusal] = {}
        self._sessions: dict[tuple[str, str, str], RoleSession] = {}

    @property
    def restricts(self) -> bool:
        """Whether there is any role, so that not everything is allowed."""
        return bool(self._roles)

    def decide(self, caller: Caller, target: str, *actions: str) -> Decision:
        """The decision for an action on a target, or for several at once, which one role must allow.

        Raises Refusal 403.
        """
        known = self._known(caller, target, *actions)
        if isinstance(known, Refusal):
            raise known.again()
        return known

    def decide_own(self, caller: Caller, action: str) -> Decision:
        """The same for the proxy's own pages, where a role counts whatever its targets."""
        return self.decide(caller, "", action)

    def allows_own(self, caller: Caller, action: str) -> bool:
        """Whether a page of our own may be shown a link to."""
        return isinstance(self._known(caller, "", action), Decision)

    def allows_link(self, caller: Caller, target: str) -> bool:
        """Whether the caller may have presigned links to a target's UI."""
        return isinstance(self._known(caller, target, link_action(self._targets[target])), Decision)

    def allows(self, caller: Caller, target: str, action: str) -> bool:
        """Whether a role allows the caller an action there."""
        return isinstance(self._known(caller, target, action), Decision)

    def role_names(self, caller: Caller) -> list[str]:
        """The caller's roles, in the order of the file."""
        return [role.name for role in self._roles if role.is_of(caller)]

    def require_any_role(self, caller: Caller) -> None:
        """Raises Refusal 403 for a caller who has no role at all."""
        if self._roles and not any(role.is_of(caller) for role in self._roles):
            raise _refusal("No role is this caller's", "")

    def visible(self, caller: Caller) -> frozenset[str]:
        """The targets that a caller may know of: those that any role of theirs is for."""
        if not self._roles:
            return frozenset(self._targets)
        roles = [role for role in self._roles if role.is_of(caller)]
        return frozenset(name for name in self._targets if any(role.is_for(name) for role in roles))

    def _known(self, caller: Caller, target: str, *actions: str) -> Decision | Refusal:
        key = (caller, target, actions)
        known = self._decided.get(key)
        if known is None:
            known = self._judge(caller, target, actions)
            if len(actions) > 1 or actions[0].startswith(UNKNOWN_PREFIX):
                return known  # callers choose these, and they may be long: remembering them would only cost memory
            if len(self._decided) >= _MOST_REMEMBERED:
                self._decided.clear()
                self._sessions.clear()
            self._decided[key] = known
        return known

    def _judge(self, caller: Caller, target: str, actions: tuple[str, ...]) -> Decision | Refusal:
        if not self._roles:
            return _UNRESTRICTED
        roles = [role for role in self._roles if role.is_of(caller) and (not target or role.is_for(target))]
        for action in actions:
            denying = next((role for role in roles if role.denies(action)), None)
            if denying is not None:
                return _refusal(f"The role {denying.name!r} denies {action}", target)
        allowing = next((role for role in roles if all(map(role.allows, actions))), None)
        if allowing is None:
            return _refusal(_not_allowed(roles, actions), target)
        return Decision(allowing.name, self._session(allowing.settings, caller, target))

    def _session(self, role: RoleSettings, caller: Caller, target: str) -> RoleSession | None:
        if role.assume_role_arn is None or not target:
            return None
        key = (role.name, caller.subject, self._targets[target].arn.region)
        if key not in self._sessions:
            self._sessions[key] = role_session(role, caller.subject, key[2])
        return self._sessions[key]


def _not_allowed(roles: list[Role], actions: tuple[str, ...]) -> str:
    missing = [action for action in actions if not any(role.allows(action) for role in roles)]
    what = " and ".join(missing or actions)
    if not roles:
        return f"No role of this caller allows {what}"
    names = ", ".join(repr(role.name) for role in roles)
    return f"The role {names} does not allow {what}" if len(roles) == 1 else f"None of the roles {names} allows {what}"


def _refusal(what: str, target: str) -> Refusal:
    where = f" on the target {target!r}" if target else ""
    return Refusal(403, f"{what}{where}. Ask the proxy's operator for a role that does.")
