"""Counts that many instances share, in Valkey or Redis (5 or later: one protocol, one client for both).

The library `limits` counts there, by its sliding window counter, in scripts of its own: each rate is judged at once
(nothing is let in twice), by the storage's clock alone. A request with one rate is one script call; one with several
asks all of them first and then counts in all, lest a caller who is refused use up what others share.

A storage that fails or is slow is `away`: nobody waits for it any more, until a probe, once a second, succeeds.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar, cast
from uuid import uuid4

from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from mlflow_proxy.limits.rates import Counted, Full, Rate

# What all keys begin with.
_PREFIX = "mlflow-proxy"
# Requests of one worker that ask at the same time, with a connection for each of their rates. A script takes about
# 0.1 ms of the worker, so that more would only wait for one another while their time runs out.
_TOGETHER = 8
# In seconds. Nobody waits for a probe, and it may have to connect.
_PROBE_INTERVAL = 1.0
_PROBE_DEADLINE = 5.0
# Each probe counts for somebody new, lest it only read: a full storage lets scripts go on that change what it has.
_PROBE = Rate("failures", "probe", 1, 1.0, "")

T = TypeVar("T")
# A rate, and whose: not by name.
_Key = tuple[Rate, str]

logger = logging.getLogger(__name__)


class StorageAway(Exception):
    """The shared storage gave no answer; what was asked may have been counted or not."""


class _Storage(RedisStorage):
    """The library's, with one correction: it takes a window that began in this millisecond for one that ends in it."""

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        previous, previous_left, current, left = await super().get_sliding_window(key, expiry)
        return previous, previous_left, current, min(left, math.nextafter(2 * expiry, 0))


class SharedStorage:
    """The shared storage, as one worker sees it. Made in the event loop that uses it.

    `failures` counts the questions that failed, probes included; `meanwhile` says for the log what becomes of requests
    while it is away.
    """

    def __init__(self, url: str, *, timeout: float, meanwhile: str) -> None:
        self._timeout = timeout
        self._meanwhile = meanwhile
        self._pool: ConnectionPool = ConnectionPool.from_url(
            url.replace("valkey", "redis", 1) if url.startswith("valkey") else url,
            max_connections=2**16,  # it is bounded by how many ask
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # what may have been counted must not be sent again
            socket_timeout=None,  # there is one deadline, for all of a question
            socket_connect_timeout=None,
        )
        # The address is the pool's alone: the library wants a port in it, and writes it into its errors.
        storage = _Storage(
            "async+redis://",
            implementation="redispy",
            key_prefix=_PREFIX,
            connection_pool=self._pool,  # type: ignore[arg-type]  # documented, but not typed
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._turns = asyncio.Semaphore(_TOGETHER)
        self._probing: asyncio.Task[None] | None = None
        self.away = False
        self.failures = 0

    async def start(self) -> None:
        """Connect. A storage that cannot be reached is away; never raises."""
        await self._probe()

    async def close(self) -> None:
        """Ask no more; who still waits for an answer finds the storage away."""
        self.away = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        await self._pool.disconnect()

    async def take(self, of: Sequence[Counted]) -> Full | None:
        """Count a request in all rates, if it fits into each; else says for which one to wait longest.

        A request that is refused counts nowhere, unless it met others at the same instant: then in those rates that had
        room for it. Raises StorageAway.
        """
        return await self._ask(self._take, of)

    async def fullest(self, of: Sequence[Counted]) -> Full | None:
        """The rate to wait longest for; None if a request fits into each. Raises StorageAway."""
        return await self._ask(self._fullest, of)

    async def _ask(
        self, question: Callable[[list[_Key]], Awaitable[Full | None]], of: Sequence[Counted]
    ) -> Full | None:
        async with self._turns:
            if self.away:
                raise StorageAway
            try:
                async with asyncio.timeout(self._timeout):
                    return await question([(each.rate, _digest(each.subject)) for each in of])
            except Exception as error:  # whatever it is, there is no answer
                if not self.away:  # else it is known already
                    self._lost(error)
                raise StorageAway from error

    async def _take(self, of: list[_Key]) -> Full | None:
        refused = await self._refused(of, self._limiter.test) if len(of) > 1 else []
        if not refused:
            refused = await self._refused(of, self._limiter.hit)
        if not refused:
            return None
        # There may be room again by now: then the wait is over.
        return await self._fullest(refused) or Full(refused[0][0], 0.0)

    async def _refused(self, of: list[_Key], ask: Callable[[Rate, str], Awaitable[bool]]) -> list[_Key]:
        answers = await _together(ask(rate, subject) for rate, subject in of)
        return [key for key, fits in zip(of, answers, strict=True) if not fits]

    async def _fullest(self, of: list[_Key]) -> Full | None:
        stats = await _together(self._limiter.get_window_stats(rate, subject) for rate, subject in of)
        now = time.time()
        full = [
            Full(rate, reset - now) for (rate, _), (reset, remaining) in zip(of, stats, strict=True) if not remaining
        ]
        return max(full, key=lambda each: each.wait, default=None)

    def _lost(self, error: Exception) -> None:
        self.failures += 1
        if self.away:
            return
        self.away = True
        reason = f"no answer within {self._timeout:g} s" if isinstance(error, TimeoutError) else _in_words(error)
        logger.warning("limits.storage is away (%s); until it answers again, %s", reason, self._meanwhile)
        self._probing = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Probe until the storage answers."""
        since = time.monotonic()
        while self.away:
            await asyncio.sleep(_PROBE_INTERVAL)
            await self._probe()
        self._probing = None
        logger.warning("limits.storage answers again after %.0f s", time.monotonic() - since)

    async def _probe(self) -> None:
        """Count something: a storage that answers but may not write is away, too."""
        try:
            async with asyncio.timeout(_PROBE_DEADLINE):
                await self._limiter.hit(_PROBE, uuid4().hex)
        except Exception as error:
            self._lost(error)
        else:
            self.away = False


async def _together(questions: Iterable[Awaitable[T]]) -> list[T]:
    """All answers, or the first error when none is under way any more."""
    answers = await asyncio.gather(*questions, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return cast(list[T], answers)


def _digest(subject: str) -> str:
    """Names of callers and their addresses are nobody's business in the storage."""
    return hashlib.blake2b(subject.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
