"""Step 5 of a request's way: rates per caller, role and target, places per target, failed authentications per address.

Everything that a worker usually decides alone is decided at once, without a coroutine: methods give None, or something
to await. What is limited, and by how much, is configured; who calls and in which role was found out before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable
from typing import NamedTuple

from limits.strategies import SlidingWindowCounterRateLimiter

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits.counters import Counters
from mlflow_proxy.limits.failures import Failures
from mlflow_proxy.limits.pace import Pace
from mlflow_proxy.limits.places import Places
from mlflow_proxy.limits.rates import Counted, Rate, rates, refusal, take
from mlflow_proxy.limits.storage import SharedStorage, StorageAway
from mlflow_proxy.settings import LimitSettings, Settings

__all__ = ["OWN_PAGES", "Limits", "TargetState"]

# Stands for a target where a page of the proxy's own is asked for; no target can be named like that.
OWN_PAGES = "-"
# Callers whose requests one worker counts; beyond it the longest unseen are forgotten.
CALLERS = 16_384
_LONG_SUBJECT = 256


class TargetState(NamedTuple):
    """How a target's places stand in this worker."""

    target: str
    limit: int
    in_flight: int
    waiting: int


class Limits:
    """The limits of one worker. Made in the event loop that uses them."""

    def __init__(self, settings: Settings, deadlines: Deadlines) -> None:
        options = settings.limits
        self._storage = _storage(options)
        self._closed_without = options.storage_away == "closed"
        # With a storage, a worker counts alone only while that is away, and then must not refuse what it would not.
        sharers = 1 if self._storage is not None else settings.server.workers
        self._caller_rates = rates("caller", "", options.caller_rate, sharers)
        self._callers = SlidingWindowCounterRateLimiter(Counters(CALLERS * len(self._caller_rates)))
        of_roles: dict[str | None, tuple[Rate, ...]] = {None: ()}
        for role in settings.roles:
            of_roles[role.name] = rates("role", role.name, role.rate, sharers)
        of_targets = {t.name: rates("target", t.name, t.rate, sharers) for t in settings.targets}
        # Callers come and go; the counts of roles and targets all have room, lest any be forgotten.
        count = sum(map(len, (*of_roles.values(), *of_targets.values())))
        shared = SlidingWindowCounterRateLimiter(Counters(2 * count))
        self._shared = {
            (role, target): tuple(Counted(shared, rate, "") for rate in of_role + of_target)
            for target, of_target in {**of_targets, OWN_PAGES: ()}.items()
            for role, of_role in of_roles.items()
        }
        self._failures = Failures(rates("failures", "", options.auth_failure_rate, sharers), self._storage)
        self._places = {
            target.name: Places(
                target.name,
                deadlines,
                least=max(1, options.concurrency_min // settings.server.workers),
                # More than there are connections would only wait for one, and not in turn.
                most=min(
                    max(1, (target.concurrency_max or options.concurrency_max) // settings.server.workers),
                    settings.upstream.connections,
                ),
                queue=options.queue,
                queue_timeout=options.queue_timeout,
            )
            for target in settings.targets
        }

    @property
    def paces(self) -> dict[str, Pace]:
        """The pace of each target's attempts, by its name."""
        return {target: places.pace for target, places in self._places.items()}

    async def start(self) -> None:
        """Connect to the shared storage, if there is one. Never raises: it may come later."""
        if self._storage is not None:
            await self._storage.start()

    async def close(self) -> None:
        """Let go of the shared storage."""
        if self._storage is not None:
            await self._storage.close()

    def check(self, caller: Caller, role: str | None, target: str) -> Awaitable[None] | None:
        """Count a request in the rates of its caller, its role and its target, if it fits into all of them.

        Raises Refusal 429, which then has counted nowhere; 503 if the storage is away and that is configured to refuse.
        """
        counted = self._shared[role, target]
        if self._caller_rates:
            name = _name(caller.subject)
            counted = (*[Counted(self._callers, rate, name) for rate in self._caller_rates], *counted)
        return self._take(counted)

    def check_role(self, role: str | None) -> Awaitable[None] | None:
        """The same for a role alone, where it was not known yet when the rest was counted."""
        return self._take(self._shared[role, OWN_PAGES])

    def _take(self, counted: tuple[Counted, ...]) -> Awaitable[None] | None:
        if not counted:
            return None
        if self._storage is not None and not self._storage.away:
            return self._check_shared(self._storage, counted)
        self._check_alone(counted)
        return None

    def _check_alone(self, counted: tuple[Counted, ...]) -> None:
        if self._storage is not None and self._closed_without:
            raise Refusal(
                503,
                "The limits cannot be checked: their storage does not answer. Try again in a second.",
                retry_after=1,
                limit="storage away",
            )
        full = take(counted)
        if full is not None:
            raise refusal(full)

    async def _check_shared(self, storage: SharedStorage, counted: tuple[Counted, ...]) -> None:
        try:
            full = await storage.take(counted)
        except StorageAway:
            self._check_alone(counted)
        else:
            if full is not None:
                raise refusal(full)

    def enter(self, caller: Caller, target: str) -> Awaitable[None] | None:
        """Take one of the target's places, which `leave` gives back; what is to be awaited then has none yet.

        Raises Refusal 503: at once if too many wait already, or after limits.queue_timeout. Then, and if the wait is
        cancelled, no place is held.
        """
        places = self._places[target]
        return None if places.take() else places.wait(caller.subject)

    def leave(self, target: str, *, throttled: bool, answered: bool) -> None:
        """Give a place back. `throttled`: SageMaker said so, at least once; `answered`: there was any other answer."""
        self._places[target].leave(throttled=throttled, answered=answered)

    def check_failures(self, address: str) -> None:
        """Raises Refusal 429 if too many authentications from `address` failed. Ask before looking at credentials."""
        self._failures.check(address)

    def add_failure(self, address: str) -> Awaitable[None] | None:
        """Count a failed authentication: credentials were shown and did not identify anybody. Never raises."""
        return self._failures.add(address)

    def states(self) -> list[TargetState]:
        """Per target, for metrics and the overview."""
        return [TargetState(name, p.allowed, p.in_flight, p.waiting) for name, p in self._places.items()]

    @property
    def storage_away(self) -> bool:
        """Whether a shared storage is configured and does not answer."""
        return self._storage is not None and self._storage.away

    @property
    def storage_failures(self) -> int:
        """Questions to the shared storage that failed since the start; it grows by one a second while it is away."""
        return self._storage.failures if self._storage is not None else 0


def _storage(options: LimitSettings) -> SharedStorage | None:
    if options.storage is None:
        return None
    meanwhile = (
        "requests are refused with 503"
        if options.storage_away == "closed"
        else "each worker counts alone, with the whole rates"
    )
    return SharedStorage(options.storage, timeout=options.storage_timeout, meanwhile=meanwhile)


def _name(subject: str) -> str:
    """A subject of bounded length; subjects begin with where they come from, so that none is like a digest."""
    if len(subject) <= _LONG_SUBJECT:
        return subject
    return hashlib.blake2b(subject.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
