"""The credentials that requests are signed with: fetched in threads, renewed ahead of expiry, handed out without I/O.

A source is botocore's chain of providers, or one role assumed with what the chain gives. Targets that name the same
source share it, and it is kept for good; a caller's role session is kept while it is used, and their number is bounded.
When a source is asked is in `sources`; how, and what its failures mean, in `sessions`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial

from botocore.exceptions import ClientError

from mlflow_proxy.aws import codes, sessions
from mlflow_proxy.aws.role_sessions import RoleSession
from mlflow_proxy.aws.sessions import Credentials, CredentialsUnavailable, Sts
from mlflow_proxy.aws.sources import Source
from mlflow_proxy.settings import Aws
from mlflow_proxy.targets import Target
from mlflow_proxy.threads import Threads

__all__ = ["CredentialStatus", "CredentialStore", "Credentials", "CredentialsUnavailable"]

# All in seconds.
_FETCH_DEADLINE = 30.0
_IDENTITY_DEADLINE = 15.0
_OBTAIN_DEADLINE = 10.0

# Callers have threads of their own, so that no number of them holds up a target's renewal.
_THREADS = 4
_CALLER_THREADS = 4
_CALLER_SESSIONS = 1000

# What STS says of a base that has expired or was rotated; the same source may have another by now.
_BASE_IS_BAD = codes.STALE | codes.BAD_SIGNATURE


@dataclass(frozen=True, slots=True)
class CredentialStatus:
    """How a target's credentials stand.

    `error` is the reason of the last failure, None after a success; it can be set while old ones are still usable.
    """

    usable: bool
    provider: str | None
    access_key: str | None
    expires_at: float | None
    error: str | None


class CredentialStore:
    """Credentials per target and per caller's role session.

    Made and used in one event loop; `get` and `status` in any thread.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        aws: Aws,
        *,
        proxy: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        targets = tuple(targets)
        self._aws = aws
        self._proxy = proxy
        self._clock = clock
        self._sts = Sts(aws, proxy)
        self._threads = Threads("aws-credentials", _THREADS)
        self._caller_threads = Threads("aws-role-sessions", _CALLER_THREADS)
        region = targets[0].arn.region if targets else "us-east-1"
        self._chain = Source("the credential chain", partial(self._walk_chain, region), clock)
        self._roles: dict[RoleSession, Source] = {}
        self._callers: dict[RoleSession, Source] = {}
        self._sources = {target.name: self._source(_role(target)) for target in targets}
        self._closed = False

    def _source(self, role: RoleSession | None) -> Source:
        if role is None:
            return self._chain
        if role not in self._roles:
            self._roles[role] = Source(role.label, partial(self._assume, role, self._threads), self._clock)
        return self._roles[role]

    async def start(self) -> None:
        """Fetch for all targets, in parallel, and begin to renew. Failures are kept as reasons, never raised."""
        for source in self._all():
            source.start(asyncio.get_running_loop())
        await asyncio.gather(*(source.settled() for source in self._all()))

    async def close(self) -> None:
        """Stop renewing. A call to AWS that a thread still waits for ends by its own deadline."""
        self._closed = True
        await asyncio.gather(*(source.close() for source in self._all()))
        self._callers.clear()

    def get(self, target: Target, session: RoleSession | None = None) -> Credentials:
        """The current, unexpired credentials; no I/O. Raises CredentialsUnavailable if there are none.

        With a caller's `session`, its credentials instead of the target's; `obtain` fetches them.
        """
        if session is None:
            source = self._sources[target.name]
        elif (found := self._callers.get(session)) is not None:
            source = found
        else:
            raise CredentialsUnavailable(f"{session.label}: not fetched yet")
        credentials = source.current
        now = self._clock()
        if credentials is not None and now < source.usable_until:
            source.used_at = now
            return credentials
        source.wake()
        raise source.unavailable()

    def obtain(self, target: Target, session: RoleSession | None) -> Awaitable[None] | None:  # noqa: ARG002
        """See to it that `get` has credentials for a caller's session: None if it has, else what to await for that.

        Awaiting takes at most ten seconds, and raises CredentialsUnavailable if there are none then. However many
        requests wait, the role is assumed once; after a failure, not again for some seconds. Without a session there is
        nothing to do, because targets' credentials are fetched ahead.
        """
        if session is None:
            return None
        source = self._callers.get(session)
        if source is not None and self._clock() < source.usable_until:
            return None
        return self._fetch(session)

    async def _fetch(self, session: RoleSession) -> None:
        source = self._caller(session)
        source.begin_if_due()
        await _settled(source, _OBTAIN_DEADLINE)
        if not source.is_usable():
            raise source.unavailable()

    def _caller(self, session: RoleSession) -> Source:
        """The source of a caller's session, made if there is none yet. Raises CredentialsUnavailable if none may be."""
        source = self._callers.get(session)
        if source is None:
            if self._closed:
                raise CredentialsUnavailable(f"{session.label}: the proxy is ending")
            self._make_room()
            fetch, drop = partial(self._assume, session, self._caller_threads), partial(self._drop, session)
            source = self._callers[session] = Source(session.label, fetch, self._clock, drop=drop)
            source.start(asyncio.get_running_loop())
        source.used_at = self._clock()
        return source

    def _make_room(self) -> None:
        """Give up the session that was used least recently, if there are as many as there may be."""
        if len(self._callers) < _CALLER_SESSIONS:
            return
        idle = (item for item in self._callers.items() if not item[1].in_flight)
        oldest = min(idle, key=lambda item: item[1].used_at, default=None)
        if oldest is None:
            raise CredentialsUnavailable(
                f"roles are being assumed for {_CALLER_SESSIONS} callers already; try again in a moment"
            )
        session, source = oldest
        source.stop()
        self._drop(session)

    def _drop(self, session: RoleSession) -> None:
        del self._callers[session]

    async def wait_refreshed(
        self,
        target: Target,
        timeout: float,  # noqa: ASYNC109  (used with no other waits)
        session: RoleSession | None = None,
    ) -> Credentials:
        """Renew, because AWS called the credentials expired or unknown: wait at most `timeout` seconds for new ones.

        For repeating one refused request. If the last fetch ended moments ago, its result is given at once. Raises
        CredentialsUnavailable if that fetch failed or takes longer.
        """
        source = self._sources[target.name] if session is None else self._caller(session)
        source.begin_if_due()
        await _settled(source, timeout)
        if source.error is not None:
            raise source.unavailable()
        return self.get(target, session)

    def status(self, target: Target) -> CredentialStatus:
        """For readiness and `check`."""
        source = self._sources[target.name]
        credentials, usable = source.current, source.is_usable()
        return CredentialStatus(
            usable=usable,
            provider=credentials.provider if credentials else None,
            access_key=credentials.access_key if credentials else None,
            expires_at=credentials.expires_at if credentials else None,
            error=None if usable and source.error is None else source.reason(),
        )

    async def identity(self, target: Target) -> str:
        """The ARN that STS knows the target's credentials by. Raises CredentialsUnavailable if STS won't tell."""
        call = partial(
            sessions.caller_identity, self.get(target), self._aws, region=target.arn.region, proxy=self._proxy
        )
        try:
            return await self._threads.run(call, _IDENTITY_DEADLINE)
        except Exception as error:
            raise CredentialsUnavailable(sessions.explain(error, self._aws)) from None

    def _all(self) -> tuple[Source, ...]:
        return (self._chain, *self._roles.values(), *self._callers.values())

    # Below, `from None`: an error's own text may hold a secret, and a traceback in a log would show it.

    async def _walk_chain(self, region: str) -> Credentials:
        call = partial(sessions.from_chain, self._aws, region=region, proxy=self._proxy)
        try:
            return await self._threads.run(call, _FETCH_DEADLINE)
        except Exception as error:
            raise _unavailable(error, self._aws) from None

    async def _assume(self, role: RoleSession, threads: Threads) -> Credentials:
        async def ask(*, renew: bool) -> Credentials:
            call = partial(self._sts.assume_role, role, await self._base(renew=renew))
            return await threads.run(call, _FETCH_DEADLINE)

        try:
            try:
                return await ask(renew=False)
            except ClientError as error:
                if sessions.error_code(error) not in _BASE_IS_BAD:
                    raise
            return await ask(renew=True)
        except Exception as error:
            raise _unavailable(error, self._aws, role) from None

    async def _base(self, *, renew: bool) -> Credentials:
        """The chain's credentials, which roles are assumed with."""
        if renew or not self._chain.is_usable():
            self._chain.begin_if_due()
            await self._chain.settled()
        if self._chain.current is None or not self._chain.is_usable():
            raise self._chain.unavailable()
        return self._chain.current


def _role(target: Target) -> RoleSession | None:
    if target.assume_role_arn is None:
        return None
    return RoleSession(target.assume_role_arn, target.external_id, target.arn.region, target.session_name)


def _unavailable(error: Exception, aws: Aws, role: RoleSession | None = None) -> CredentialsUnavailable:
    return CredentialsUnavailable(sessions.explain(error, aws, role), lasting=sessions.is_lasting(error))


async def _settled(source: Source, timeout: float) -> None:  # noqa: ASYNC109  (used with no other waits)
    """Wait for the fetch under way; raises CredentialsUnavailable if it takes longer than `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            await source.settled()
    except TimeoutError:
        raise CredentialsUnavailable(f"{source.name}: no new credentials within {timeout:g} s") from None
