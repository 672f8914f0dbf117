"""How many lines strangers may fill: requests of callers that nobody has identified.

A person who tries something finds each of the requests in the log. A flood of them gets one line in ten seconds, which
says how many there were besides, per address and for all addresses together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from mlflow_proxy.limits.failures import network_of
from mlflow_proxy.telemetry.record import Record

# Lines that an address, and all together, may have at once; and how many of them come back each second.
BURST, ALL_BURST = 1000, 5000
_RATE, _ALL_RATE = 1.0, 10.0
# Seconds between two lines that count.
INTERVAL = 10.0
# Addresses that are told apart; all further ones are counted together.
MOST = 1024
_OTHERS = "others"


class _Bucket:
    """Lines that may be written now. `held` is the last record that got none, `more` is how many were before it."""

    __slots__ = ("duration", "held", "lines", "more", "seen")

    def __init__(self, lines: float) -> None:
        self.lines = lines
        self.seen = time.monotonic()
        self.held: Record | None = None
        self.duration = 0.0
        self.more = 0

    def take(self, now: float, rate: float, most: float) -> bool:
        self.lines = min(most, self.lines + (now - self.seen) * rate)
        self.seen = now
        if self.lines < 1:
            return False
        self.lines -= 1
        return True

    def hold(self, record: Record) -> None:
        self.more += self.held is not None
        self.held = record
        self.duration = time.perf_counter() - record.started


class Strangers:
    """Decides which of one worker's requests of strangers get a line; `write` is given those that count others.

    Made, used and closed in one event loop.
    """

    def __init__(self, write: Callable[[Record], None]) -> None:
        self._write = write
        self._buckets: dict[str, _Bucket] = {}
        self._all = _Bucket(ALL_BURST)
        self._timer: asyncio.TimerHandle | None = None

    def gets_line(self, record: Record) -> bool:
        """Whether the record gets a line of its own; if not, it is counted, and a later line says so."""
        now = time.monotonic()
        network = network_of(record.caller_address)
        bucket = self._buckets.get(network)
        if bucket is None:
            if len(self._buckets) >= MOST:
                network = _OTHERS
            bucket = self._buckets.setdefault(network, _Bucket(BURST))
        if bucket.held is None and bucket.take(now, _RATE, BURST) and self._all.take(now, _ALL_RATE, ALL_BURST):
            return True
        bucket.hold(record)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._count)
        return False

    def close(self) -> None:
        """Write what was counted."""
        if self._timer is not None:
            self._timer.cancel()
        self._count()

    def _count(self) -> None:
        self._timer = None
        now = time.monotonic()
        for network, bucket in list(self._buckets.items()):
            record = bucket.held
            if record is None:
                if now - bucket.seen > BURST / _RATE:  # nothing is left to remember
                    del self._buckets[network]
                continue
            record.repeated = bucket.more
            record.started = time.perf_counter() - bucket.duration
            bucket.held, bucket.more = None, 0
            self._write(record)
        if self._buckets:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._count)
