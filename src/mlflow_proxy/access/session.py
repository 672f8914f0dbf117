"""The session of a person who signed in by browser: a sealed cookie that any instance with the same secret can read.

Nothing is kept per session but what the cookie holds; the way to get one is in `portal.signin`. Sessions that were
signed out of are remembered by this instance alone (`revocations`): elsewhere, a copy of the cookie counts until the
session is over.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import NamedTuple

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.revocations import Revocations
from mlflow_proxy.access.seal import LARGEST_COOKIE, Seal, cookie_name, cookie_value, cookie_values
from mlflow_proxy.settings import Oidc

# Path=/, Secure and no Domain are what the prefix __Host- demands (RFC 6265bis section 4.1.3.2).
ATTRIBUTES = "; Path=/; Secure; HttpOnly; SameSite=Lax"
# Other instances' clocks may be ahead by so many seconds. A session from further in the future is not believed, lest a
# clock that was wrong once make sessions that outlive their time.
_TOLERANCE = 60.0
# A session is written anew when this part of its idle time has passed without.
_RENEWED_AFTER = 0.1
# So many cookies are known without opening them again.
_MOST_KNOWN = 4096


class SessionTooLarge(Exception):
    """What a session must hold does not fit into a cookie."""

    def __init__(self, groups: int) -> None:
        super().__init__(
            f"the user is in {groups} groups that roles name, more than fit into a cookie of {LARGEST_COOKIE} bytes"
        )


class _Session(NamedTuple):
    """An opened cookie. All times in seconds since the epoch; `renew_at` is when it is to be written anew."""

    caller: Caller
    begun: int
    valid_from: float
    ends: float
    renew_at: float


class Sessions:
    """Opens, renews and ends sessions. Usable from any thread.

    `secret` has 32 bytes or more. `relevant` says which groups a session keeps, for the rest would only make every
    request larger: those that some role names. `revocations` is a file that all workers of the instance share. A
    session counts only under the settings that say who its caller is: the provider, the client, and the claims.
    `prefix` is the path below which callers see the proxy.
    """

    COOKIE = "__Host-mlflow-proxy"

    def __init__(
        self,
        oidc: Oidc,
        secret: bytes,
        *,
        relevant: Callable[[str], bool] | None = None,
        revocations: Path | None = None,
        prefix: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._secret = secret
        self._context = json.dumps(
            [oidc.issuer, oidc.client_id, oidc.user_claim, oidc.groups_claim, sorted(oidc.required_claims.items())]
        )
        self._cookie_name = cookie_name(self.COOKIE, prefix)
        self._seal = self.seal_for(self._cookie_name)
        self._name = self._cookie_name.encode("ascii")
        self._idle = oidc.session_idle
        self._lifetime = oidc.session_lifetime
        self._relevant = relevant
        self._revoked = Revocations(revocations, clock=clock)
        self._clock = clock
        self._known: dict[bytes, _Session] = {}

    def seal_for(self, cookie: str) -> Seal:
        """The seal of another cookie, under the same secret and settings."""
        return Seal(self._secret, cookie, self._context)

    @staticmethod
    def new_id() -> str:
        """A new session's id, for its caller's `credential`."""
        return secrets.token_hex(16)

    def begin(self, caller: Caller) -> str:
        """The value of a Set-Cookie header that begins a session, whose id is `caller.credential`.

        Raises SessionTooLarge. Leaving groups out instead could leave out the one that a role denies something to.
        """
        groups = caller.groups if self._relevant is None else frozenset(filter(self._relevant, caller.groups))
        now = int(self._clock())
        cookie = self._cookie(caller.subject, groups, caller.credential, begun=now, seen=now)
        if len(cookie) > LARGEST_COOKIE:
            raise SessionTooLarge(len(groups))
        return cookie

    def identify(self, cookies: list[bytes]) -> tuple[Caller, bytes | None] | None:
        """The caller of a request with these Cookie headers, and a Set-Cookie value if its session is to be renewed.

        None if there is no session that counts.
        """
        value = cookie_value(cookies, self._name)
        if value is None:
            return None
        session = self._known.get(value) or self._open(value)
        now = self._clock()
        if (
            session is None
            or not session.valid_from <= now < session.ends
            or session.caller.credential in self._revoked
        ):
            return None
        return session.caller, self._renew(value, session, now) if now >= session.renew_at else None

    def end(self, cookies: list[bytes]) -> str:
        """End the sessions of these Cookie headers for all workers; the Set-Cookie value that removes the cookie."""
        for value in cookie_values(cookies, self._name):
            session = self._open(value)
            if session is not None:
                self._revoked.add(session.caller.credential, session.begun + self._lifetime + _TOLERANCE)
        return f"{self._cookie_name}=; Max-Age=0{ATTRIBUTES}"

    def use_once(self, item: str, until: float) -> bool:
        """Whether an id, a text without spaces, is used here for the first time before `until` (since the epoch)."""
        return self._revoked.add(item, until)

    def _cookie(self, subject: str, groups: frozenset[str], session_id: str, *, begun: int, seen: int) -> str:
        content = json.dumps([session_id, subject, sorted(groups), begun, seen], separators=(",", ":"))
        return f"{self._cookie_name}={self._seal.seal(content.encode())}{ATTRIBUTES}"

    def _open(self, value: bytes) -> _Session | None:
        content = self._seal.open(value)
        if content is None:
            return None
        session_id, subject, groups, begun, seen = json.loads(content)
        last, idle_end = begun + self._lifetime, seen + self._idle
        session = _Session(
            Caller(subject, "session", frozenset(groups), credential=session_id),
            begun,
            valid_from=seen - _TOLERANCE,
            ends=min(last, idle_end),
            renew_at=seen + self._idle * _RENEWED_AFTER if idle_end < last else inf,
        )
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[value] = session
        return session

    def _renew(self, value: bytes, session: _Session, now: float) -> bytes:
        """The cookie with the time moved on. A page's many requests with the old one get it once, not each."""
        self._known[value] = session._replace(renew_at=now + self._idle * _RENEWED_AFTER)
        caller = session.caller
        cookie = self._cookie(caller.subject, caller.groups, caller.credential, begun=session.begun, seen=int(now))
        return cookie.encode("ascii")
