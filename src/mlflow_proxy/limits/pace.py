"""The pace of attempts to one target, learned from throttling: SageMaker throttles by rate, and says no number.

While it throttles, the attempts that pass are what it allows; so that becomes the pace. While nothing is throttled the
pace grows, faster each second, and after half a minute there is none. A few throttled answers set no pace. Nothing
is known here of places, callers or other workers.
"""

from __future__ import annotations

from collections.abc import Callable

# Seconds over which attempts and throttled answers are counted.
_WINDOW = 1.0
# So many throttled answers, and such a share of all attempts, are a rate limit; fewer are chance.
_EVIDENCE = 8
_TOLERATED_SHARE = 0.02
# A pace that was not used to this share is not what was throttled.
_IN_USE = 0.5
# Growth in the first second without throttling; in each further one by as much more.
_GROWTH = 0.05
# After so many seconds without throttling there is no pace.
_FORGOTTEN = 30.0
_SLOWEST = 1.0
# Seconds by which attempts may come late and still count as in time, since timers are not exact.
_SLACK = 0.02


class Pace:
    """`rate` is in attempts per second; None while there is no pace. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.rate: float | None = None
        self._next = 0.0
        self._began = clock()
        self._attempts = 0
        self._throttled = 0
        self._passed_before = 0
        self._quiet = 0.0

    def wait(self) -> float:
        """Seconds until the next attempt may be made; 0 if at once."""
        if self.rate is None:
            return 0.0
        now = self._clock()
        self._turn_window(now)
        return 0.0 if self.rate is None else max(0.0, self._next - now)

    def begin(self) -> None:
        """An attempt is made now."""
        self.reserve()
        self.count()

    def count(self) -> None:
        """An attempt is made, whose turn `reserve` has given or which asked for none."""
        self._turn_window(self._clock())
        self._attempts += 1

    def throttled(self) -> None:
        """An attempt was throttled."""
        now = self._clock()
        self._turn_window(now)
        self._throttled += 1
        if self._throttled >= _EVIDENCE and self._share() > _TOLERATED_SHARE:
            passed = self._passed_before + max(0, self._attempts - self._throttled)
            allowed = max(_SLOWEST, passed / (_WINDOW + now - self._began))
            if self.rate is None:
                self._next = now
            if self.rate is None or self._quiet < _WINDOW:
                self.rate = min(allowed, self.rate or allowed)

    def reserve(self) -> float:
        """Take the next turn; gives the seconds until then, 0 if at once."""
        if self.rate is None:
            return 0.0
        now = self._clock()
        turn = max(self._next, now - _SLACK)
        self._next = turn + 1 / self.rate
        return max(0.0, turn - now)

    def _share(self) -> float:
        return self._throttled / max(1, self._attempts)

    def _turn_window(self, now: float) -> None:
        elapsed = now - self._began
        if elapsed < _WINDOW:
            return
        if self.rate is not None:
            self._adjust(elapsed)
        passed = max(0, self._attempts - self._throttled)
        self._passed_before = passed if elapsed < 2 * _WINDOW else 0
        self._began, self._attempts, self._throttled = now, 0, 0

    def _adjust(self, elapsed: float) -> None:
        assert self.rate is not None  # noqa: S101  # the caller's condition, for the type checker
        if self._throttled and self._share() > _TOLERATED_SHARE:
            self._quiet = elapsed - _WINDOW
            passed = (self._attempts - self._throttled) / min(elapsed, 2 * _WINDOW)
            if self._attempts >= self.rate * _IN_USE * _WINDOW:
                self.rate = max(_SLOWEST, min(self.rate, passed))
        else:
            self._quiet += elapsed
            self.rate *= 1 + _GROWTH * self._quiet
        if self._quiet >= _FORGOTTEN:
            self.rate, self._quiet = None, 0.0
