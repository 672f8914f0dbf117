"""Who calls, as every way of identifying says it, and what a way says when it does not know the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["key", "token", "load-balancer", "certificate", "session", "anonymous"]


@dataclass(frozen=True, slots=True)
class Caller:
    """An identified caller. Equal ones are the same caller to policy, limits and sessions.

    `subject` begins with where the name comes from, so that no key or certificate can be named like a person:
    `key:<name>`, `user:<claim>`, `cert:<subject>`, or `anonymous`. `role` is the role that a key was made for; other
    callers get theirs by `[[roles]]` alone. `credential` is the public part of what was shown (a key's id, a token's
    `jti`, a session's id), for the audit log; it is never a secret.
    """

    subject: str
    way: Way
    groups: frozenset[str] = frozenset()
    role: str | None = None
    credential: str = ""


ANONYMOUS = Caller("anonymous", "anonymous")


class Unauthenticated(Exception):
    """What was shown does not identify anybody. `reason` is for the log and the audit, never for the caller."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
