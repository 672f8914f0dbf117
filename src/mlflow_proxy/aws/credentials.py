"""The credentials that requests are signed with: fetched in threads, renewed ahead of expiry, handed out without I/O.

A source is botocore's chain of providers, or one role assumed with what the chain gives; targets that name the same
source share it. Each source has at most one fetch under way, and hands out its old credentials until that ends. How a
fetch is done, and what its failures mean, is in `sessions`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from botocore.exceptions import ClientError

from mlflow_proxy.aws import codes, sessions
from mlflow_proxy.aws.sessions import Credentials, CredentialsUnavailable, Role
from mlflow_proxy.settings import Aws
from mlflow_proxy.targets import Target

__all__ = ["CredentialStatus", "CredentialStore", "Credentials", "CredentialsUnavailable"]

# All in seconds.
_FETCH_DEADLINE = 30.0
_IDENTITY_DEADLINE = 15.0
_LONGEST_LEAD = 15 * 60.0
_LONGEST_MARGIN = 5.0
_SHORT_LIFETIME = 60.0
_LEAST_INTERVAL = 3.0
_METADATA_INTERVAL = 240.0
_LONGEST_BACKOFF = 60.0
_THREADS = 4

# What STS says of a base that has expired or was rotated; the same source may have another by now.
_BASE_IS_BAD = codes.STALE | codes.BAD_SIGNATURE

_UNEXPLAINED = "failed in an unexpected way; see what `aws sts get-caller-identity` says here"

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    """Credentials per target. Made and used in one event loop; `get`, `status` and `refresh_soon` in any thread."""

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
        self._threads = _Threads(_THREADS)
        region = targets[0].arn.region if targets else "us-east-1"
        self._chain = _Source("the credential chain", partial(self._walk_chain, region), clock)
        self._roles: dict[Role, _Source] = {}
        self._sources = {target.name: self._source(_role(target)) for target in targets}

    def _source(self, role: Role | None) -> _Source:
        if role is None:
            return self._chain
        if role not in self._roles:
            self._roles[role] = _Source(f"role {role.arn}", partial(self._assume, role), self._clock)
        return self._roles[role]

    async def start(self) -> None:
        """Fetch for all targets, in parallel, and begin to renew. Failures are kept as reasons, never raised."""
        for source in self._all():
            source.start(asyncio.get_running_loop())
        await asyncio.gather(*(source.settled() for source in self._all()))

    async def close(self) -> None:
        """Stop renewing. A call to AWS that a thread still waits for ends by its own deadline."""
        await asyncio.gather(*(source.close() for source in self._all()))

    def get(self, target: Target) -> Credentials:
        """The current, unexpired credentials; no I/O. Raises CredentialsUnavailable if there are none."""
        source = self._sources[target.name]
        credentials = source.current
        if credentials is not None and self._clock() < source.usable_until:
            return credentials
        source.wake()
        raise CredentialsUnavailable(source.reason())

    def refresh_soon(self, target: Target) -> None:
        """AWS called the credentials expired or unknown: fetch again at once, unless that was done moments ago."""
        self._sources[target.name].wake()

    async def wait_refreshed(self, target: Target, timeout: float) -> Credentials:  # noqa: ASYNC109  (used with no other waits)
        """Renew as `refresh_soon` does, wait for it at most `timeout` seconds, and give the result.

        For repeating one refused request. If the last fetch ended moments ago, its result is given at once. Raises
        CredentialsUnavailable if that fetch failed or takes longer.
        """
        source = self._sources[target.name]
        source.begin_if_due()
        try:
            async with asyncio.timeout(timeout):
                await source.settled()
        except TimeoutError:
            raise CredentialsUnavailable(f"{source.name}: no new credentials within {timeout:g} s") from None
        if source.error is not None:
            raise CredentialsUnavailable(source.reason())
        return self.get(target)

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

    def _all(self) -> tuple[_Source, ...]:
        return (self._chain, *self._roles.values())

    # Below, `from None`: an error's own text may hold a secret, and a traceback in a log would show it.

    async def _walk_chain(self, region: str) -> Credentials:
        call = partial(sessions.from_chain, self._aws, region=region, proxy=self._proxy)
        try:
            return await self._threads.run(call, _FETCH_DEADLINE)
        except Exception as error:
            raise CredentialsUnavailable(sessions.explain(error, self._aws)) from None

    async def _assume(self, role: Role) -> Credentials:
        try:
            try:
                return await self._ask_for(role, await self._base(renew=False))
            except ClientError as error:
                if sessions.error_code(error) not in _BASE_IS_BAD:
                    raise
            return await self._ask_for(role, await self._base(renew=True))
        except Exception as error:
            raise CredentialsUnavailable(sessions.explain(error, self._aws, role)) from None

    async def _ask_for(self, role: Role, base: Credentials) -> Credentials:
        call = partial(sessions.assume_role, role, base, self._aws, proxy=self._proxy)
        return await self._threads.run(call, _FETCH_DEADLINE)

    async def _base(self, *, renew: bool) -> Credentials:
        """The chain's credentials, which roles are assumed with."""
        if renew or not self._chain.is_usable():
            self._chain.begin_if_due()
            await self._chain.settled()
        if self._chain.current is None or not self._chain.is_usable():
            raise CredentialsUnavailable(self._chain.reason())
        return self._chain.current


class _Source:
    """One origin of credentials: what it gave last, and when it is asked again."""

    def __init__(self, name: str, fetch: Callable[[], Awaitable[Credentials]], clock: Callable[[], float]) -> None:
        self.name = name
        self.current: Credentials | None = None
        self.usable_until = 0.0  # seconds since the epoch; infinite for credentials that don't expire
        self.error: str | None = "not fetched yet"
        self._fetch = fetch
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flight: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = -math.inf  # of the last fetch, by the loop's clock
        self._failed = 0  # fetches in a row
        self._closed = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the first fetch; its end sets the timer for the next, and so on."""
        self._loop = loop
        self._begin()

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait([self._flight])

    def is_usable(self) -> bool:
        return self.current is not None and self._clock() < self.usable_until

    def reason(self) -> str:
        """Why there is nothing to hand out."""
        if self.error is None:
            return f"{self.name}: the credentials have expired and are being renewed"
        return f"{self.name}: {self.error}"

    def wake(self) -> None:
        """Fetch, unless that is being done or was done moments ago. From any thread."""
        if self._loop is not None and not self._closed:
            with suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self.begin_if_due)

    def begin_if_due(self) -> None:
        if self._loop is not None and self._loop.time() - self._ended >= _LEAST_INTERVAL:
            self._begin()

    async def settled(self) -> None:
        """Wait for the fetch under way, if any; never raises what the fetch raised."""
        if self._flight is not None:
            await asyncio.wait([self._flight])

    def _begin(self) -> None:
        if self._loop is None or self._closed or (self._flight is not None and not self._flight.done()):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._flight = self._loop.create_task(self._fly(self._loop))

    async def _fly(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            delay = self._accept(await self._fetch())
        except CredentialsUnavailable as error:
            delay = self._reject(error.reason)
        except Exception:  # its text may hold a secret; and without a timer nothing would ever be fetched again
            delay = self._reject(_UNEXPLAINED)
        self._ended = loop.time()
        if delay is not None:
            self._timer = loop.call_later(delay, self._begin)

    def _accept(self, fetched: Credentials) -> float | None:
        """Take over what was fetched, and say in how many seconds to fetch again; None for never."""
        now = self._clock()
        expires_at = fetched.expires_at
        if expires_at is not None and expires_at <= now:
            raise CredentialsUnavailable(
                f"the credentials expired {now - expires_at:.0f} s ago already; check this machine's clock"
            )
        rotated = self.current is None or self.current.access_key != fetched.access_key
        self.current = fetched
        self.usable_until = math.inf if expires_at is None else expires_at - _margin(expires_at - now)
        self.error = None
        self._failed = 0
        lasts = "without end" if expires_at is None else f"for {expires_at - now:.0f} s"
        level = logging.INFO if rotated else logging.DEBUG
        logger.log(level, "credentials of %s: %s from %s, %s", self.name, fetched.access_key, fetched.provider, lasts)
        return _renewal_delay(fetched, now, rotated=rotated)

    def _reject(self, reason: str) -> float:
        self.error = reason
        self._failed += 1
        delay = _backoff(self._failed)
        logger.warning("credentials of %s: %s (next attempt in %.0f s)", self.name, reason, delay)
        return delay


class _Threads:
    """Blocking calls off the event loop, a few at a time, none waited for longer than its deadline.

    Not a ThreadPoolExecutor: the interpreter waits for that one's threads at exit, and a call to AWS that hangs would
    keep a worker from ending. Fetches are so rare that a new thread for each costs nothing.
    """

    def __init__(self, limit: int) -> None:
        self._free = asyncio.Semaphore(limit)

    async def run(self, call: Callable[[], T], deadline: float) -> T:
        """The result of `call`, or TimeoutError after `deadline` seconds, in which the wait for a thread counts."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(done: Callable[[], None]) -> None:
            self._free.release()  # only now: a call whose caller has given up still has its thread
            if not result.done():
                done()

        def work() -> None:
            done: Callable[[], None]
            try:
                done = partial(result.set_result, call())
            except Exception as error:
                done = partial(result.set_exception, error)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, done)

        async with asyncio.timeout(deadline):
            await self._free.acquire()
            threading.Thread(target=work, name="aws-credentials", daemon=True).start()
            return await result


def _role(target: Target) -> Role | None:
    if target.assume_role_arn is None:
        return None
    return Role(target.assume_role_arn, target.external_id, target.session_name, target.arn.region)


def _margin(lifetime: float) -> float:
    """Seconds before the stated expiry from which credentials count as expired: a request takes time to arrive."""
    return _LONGEST_MARGIN if lifetime > _SHORT_LIFETIME else lifetime / 12


def _renewal_delay(fetched: Credentials, now: float, *, rotated: bool) -> float | None:
    """Seconds until the next fetch; None if the credentials don't expire.

    That is a quarter of their life before expiry, at most 15 minutes, spread so that workers don't ask together. If the
    source gave the same ones again, which container and instance do until they rotate them, it is about a minute.
    """
    if fetched.expires_at is None:
        return None
    remaining = fetched.expires_at - now
    lead = min(_LONGEST_LEAD, remaining / 4)
    delay = remaining - lead if rotated else min(60.0, remaining / 4)
    if fetched.provider == "iam-role":
        # botocore moves the expiry of instance credentials up to 25 minutes ahead when they are near it, so it can't be
        # relied upon; AWS rotates them five minutes before or earlier, and the endpoint is local.
        delay = min(delay, _METADATA_INTERVAL)
    return max(1.0, delay - min(lead, delay) * random.uniform(0, 0.25))  # noqa: S311


def _backoff(failed: int) -> float:
    """Seconds until the next attempt after `failed` failures in a row: 1, 2, 4, … at most 60, and some jitter."""
    return float(min(_LONGEST_BACKOFF, 2 ** min(failed - 1, 10)) * random.uniform(0.75, 1.25))  # noqa: S311
