"""One origin of credentials: what it gave last, and when it is asked again.

What is asked, and who gets what, is decided in `credentials`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

from mlflow_proxy.aws.sessions import Credentials, CredentialsUnavailable

# All in seconds.
_LONGEST_LEAD = 15 * 60.0
_LONGEST_MARGIN = 5.0
_SHORT_LIFETIME = 60.0
_LEAST_INTERVAL = 3.0
_METADATA_INTERVAL = 240.0
_LONGEST_BACKOFF = 60.0

_UNEXPLAINED = "failed in an unexpected way; see what `aws sts get-caller-identity` says here"

logger = logging.getLogger(__name__)


class Source:
    """Asked once at the start, then ahead of each expiry; with one fetch under way at most.

    With `drop` it is kept only while it is used: when it is time to renew what nobody used since it was fetched, or
    what could not be fetched, it calls `drop` instead. Made and used in one event loop, but for `wake`.
    """

    def __init__(
        self,
        name: str,
        fetch: Callable[[], Awaitable[Credentials]],
        clock: Callable[[], float],
        *,
        drop: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.current: Credentials | None = None
        self.usable_until = 0.0  # seconds since the epoch; infinite for credentials that don't expire
        self.used_at = clock()  # seconds since the epoch; whoever hands them out writes it
        self.error: str | None = "not fetched yet"
        self._fetch = fetch
        self._clock = clock
        self._drop = drop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flight: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._fetched_at = 0.0  # seconds since the epoch, of what is current
        self._ended = -math.inf  # of the last fetch, by the loop's clock
        self._failed = 0  # fetches in a row
        self._lasting = False  # what the last failure was
        self._closed = False

    @property
    def in_flight(self) -> bool:
        """Whether a fetch is under way."""
        return self._flight is not None and not self._flight.done()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the first fetch; its end sets the timer for the next, and so on."""
        self._loop = loop
        self._begin()

    def stop(self) -> None:
        """Begin no more fetches."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    async def close(self) -> None:
        """Stop, and end the fetch under way; its thread ends by its own deadline."""
        self.stop()
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait([self._flight])

    def is_usable(self) -> bool:
        """Whether there are credentials that have not expired."""
        return self.current is not None and self._clock() < self.usable_until

    def reason(self) -> str:
        """Why there is nothing to hand out."""
        if self.error is None:
            return f"{self.name}: the credentials have expired and are being renewed"
        return f"{self.name}: {self.error}"

    def unavailable(self) -> CredentialsUnavailable:
        """The same, to be raised."""
        return CredentialsUnavailable(self.reason(), lasting=self.error is not None and self._lasting)

    def wake(self) -> None:
        """Fetch, unless that is being done or was done moments ago. From any thread."""
        if self._loop is not None and not self._closed:
            with suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self.begin_if_due)

    def begin_if_due(self) -> None:
        """Fetch, unless that is being done or was done moments ago."""
        if self._loop is not None and self._loop.time() - self._ended >= _LEAST_INTERVAL:
            self._begin()

    async def settled(self) -> None:
        """Wait for the fetch under way, if any; never raises what the fetch raised."""
        if self._flight is not None:
            await asyncio.wait([self._flight])

    def _begin(self) -> None:
        if self._loop is None or self._closed or self.in_flight:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._flight = self._loop.create_task(self._fly(self._loop))

    def _renew(self) -> None:
        if self._drop is not None and (not self.is_usable() or self.used_at < self._fetched_at):
            self.stop()
            self._drop()
        else:
            self._begin()

    async def _fly(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            delay = self._accept(await self._fetch())
        except CredentialsUnavailable as error:
            delay = self._reject(error.reason, lasting=error.lasting)
        except Exception:  # its text may hold a secret; and without a timer nothing would ever be fetched again
            delay = self._reject(_UNEXPLAINED)
        self._ended = loop.time()
        if delay is not None:
            self._timer = loop.call_later(delay, self._renew)

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
        self._fetched_at = now
        self._failed = 0
        lasts = "without end" if expires_at is None else f"for {expires_at - now:.0f} s"
        level = logging.INFO if rotated and self._drop is None else logging.DEBUG  # there can be very many of callers
        logger.log(level, "credentials of %s: %s from %s, %s", self.name, fetched.access_key, fetched.provider, lasts)
        return _renewal_delay(fetched, now, rotated=rotated)

    def _reject(self, reason: str, *, lasting: bool = False) -> float:
        self.error = reason
        self._lasting = lasting
        self._failed += 1
        delay = _backoff(self._failed)
        if self._drop is not None and not self.is_usable():
            logger.warning("credentials of %s: %s (next attempt when they are needed again)", self.name, reason)
            return max(delay, _LEAST_INTERVAL)  # forgotten any sooner, it could be asked for again at once
        logger.warning("credentials of %s: %s (next attempt in %.0f s)", self.name, reason, delay)
        return delay


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
