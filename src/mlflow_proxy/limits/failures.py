"""Failed authentications per client address: whoever fails too often is not listened to for a while.

What an address is, is the reader's business (behind trusted proxies the caller's own). A host of IPv6 has a whole /64
to choose addresses from, so that network counts as one.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from contextlib import suppress
from ipaddress import IPv6Address

from limits.strategies import SlidingWindowCounterRateLimiter

from mlflow_proxy.limits.counters import Counters
from mlflow_proxy.limits.rates import Counted, Full, Rate, fullest, refusal, take
from mlflow_proxy.limits.storage import SharedStorage, StorageAway

# Addresses that one worker remembers; beyond it the longest unseen are forgotten.
ADDRESSES = 65_536


class Failures:
    """Counts in this worker, and in the storage, if there is one: there all workers count together.

    A worker hears of an address that failed elsewhere when it fails here. While the storage is away, each worker counts
    alone.
    """

    def __init__(self, rates: tuple[Rate, ...], storage: SharedStorage | None = None) -> None:
        self._rates = rates
        self._storage = storage
        self._limiter = SlidingWindowCounterRateLimiter(Counters(ADDRESSES * len(rates)))
        # Since asking must cost nothing, those who have to wait stand apart: until when (monotonic), for which rate.
        self._blocked: dict[str, tuple[float, Rate]] = {}
        self._all_free = 0.0

    def check(self, address: str) -> None:
        """Raises Refusal 429 while `address` has to wait."""
        if not self._blocked:
            return
        now = time.monotonic()
        if now >= self._all_free:
            self._blocked.clear()
            return
        blocked = self._blocked.get(network_of(address))
        if blocked is not None and now < blocked[0]:
            raise refusal(Full(blocked[1], blocked[0] - now))

    def add(self, address: str) -> Awaitable[None] | None:
        """Count a failure. Never raises: the caller gets its 401 in any case."""
        if not self._rates:
            return None
        network = network_of(address)
        counted = [Counted(self._limiter, rate, network) for rate in self._rates]
        take(counted)
        self._block(network, fullest(counted))
        if self._storage is None or self._storage.away:
            return None
        return self._add_shared(self._storage, network, counted)

    async def _add_shared(self, storage: SharedStorage, network: str, counted: list[Counted]) -> None:
        with suppress(StorageAway):  # it was counted here
            self._block(network, await storage.take(counted) or await storage.fullest(counted))

    def _block(self, network: str, full: Full | None) -> None:
        if full is None:
            return
        now = time.monotonic()
        while self._blocked:  # those that need not wait any more, and the first when there are too many
            first = next(iter(self._blocked))
            if self._blocked[first][0] > now and len(self._blocked) < ADDRESSES:
                break
            del self._blocked[first]
        until = now + full.wait
        self._blocked.pop(network, None)  # so that it comes last
        self._blocked[network] = (until, full.rate)
        self._all_free = max(self._all_free, until)


def network_of(address: str) -> str:
    """What counts as one: an IPv4 address, or the /64 of an IPv6 address (RFC 6177: the least that a site gets)."""
    if ":" not in address:
        return address
    try:
        parsed = IPv6Address(address)
    except ValueError:
        return address[:64]
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{int(parsed) >> 64:x}::/64"
