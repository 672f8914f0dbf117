"""Presigned URLs of the MLflow UI and the browser sessions that they open.

A URL works once and for a short time; what it opens is a cookie for one target. In the service every target
has a host name of its own for this; here each has a port of its own, and because browsers share cookies
between ports, the cookie's name holds the target's.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from .identity import Principal
from .targets import Target


@dataclass(frozen=True)
class Grant:
    """An issued URL or an open session: who, for which target, until when (monotonic seconds)."""

    principal: Principal
    target: Target
    until: float
    started: float
    session_seconds: int


class Sessions:
    """All URLs not yet used, and all open sessions."""

    def __init__(self) -> None:
        self._issued: dict[str, Grant] = {}
        self._open: dict[str, Grant] = {}
        self.lifetime: float | None = None

    def presign(self, principal: Principal, target: Target, expires: int, session_seconds: int) -> str:
        """A fresh AuthorizedUrl, good once and for `expires` seconds."""
        token = secrets.token_urlsafe(48)
        now = time.monotonic()
        self._issued[token] = Grant(principal, target, now + expires, now, session_seconds)
        return f"{target.ui_origin}/auth?authToken={token}"

    def redeem(self, token: str, target: Target) -> tuple[str, int] | None:
        """The value and the lifetime in seconds of the session's cookie; None for a bad, used or late token."""
        grant = self._issued.pop(token, None)
        now = time.monotonic()
        if grant is None or grant.target is not target or now >= grant.until:
            return None
        value = secrets.token_urlsafe(48)
        seconds = grant.session_seconds
        self._open[value] = Grant(grant.principal, target, now + seconds, now, seconds)
        return value, seconds

    def find(self, value: str, target: Target) -> Principal | None:
        """Whose open session this cookie is, if it is one of this target's."""
        grant = self._open.get(value)
        if grant is None or grant.target is not target:
            return None
        until = grant.until if self.lifetime is None else min(grant.until, grant.started + self.lifetime)
        if time.monotonic() >= until:
            del self._open[value]
            return None
        return grant.principal


def cookie_name(target: Target) -> str:
    """The session cookie of one target."""
    return f"sagemaker-mlflow-session-{target.name}"
