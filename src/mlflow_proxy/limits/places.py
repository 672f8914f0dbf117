"""Places: how many requests one worker has under way to one target, and the queue of those that wait for one.

The number adapts to throttling (additive increase, multiplicative decrease, as TCP's congestion window: RFC 5681): a
throttled answer takes it down if nearly all places were taken, else it says nothing of their number. Time brings it up
again, and so do answers while all places are taken. Once throttling has set a pace (`pace`), that alone holds requests
back. Waiting requests take turns between callers, so that one caller's burst does not hold up the others. Nothing is
known here of other workers or targets.
"""

from __future__ import annotations

import asyncio
from collections import deque

from mlflow_proxy.deadlines import Deadlines, Timeout
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits.pace import Pace

_DECREASE = 0.7
# The limit was in use if such a share of it was.
_IN_USE = 0.9
# From nothing to all places without throttling, in seconds.
_RECOVERY = 60.0
# Callers are told to come back after so many seconds: a place is free again after any one answer.
_RETRY_AFTER = 1


class Places:
    """The places of one target. `in_flight` are taken, `allowed` may be; `limit` is the same with its fraction."""

    def __init__(
        self, target: str, deadlines: Deadlines, *, least: int, most: int, queue: int, queue_timeout: float
    ) -> None:
        self._target = target
        self._deadlines = deadlines
        self._least = min(least, most)
        self._most = most
        self._queue_size = queue
        self._queue_timeout = queue_timeout
        self.limit = float(most)
        self.allowed = most
        self.in_flight = 0
        self.waiting = 0
        self.pace = Pace(deadlines.loop.time)
        self._unheeded = 0
        self._recovered_at = 0.0
        self._paced: asyncio.TimerHandle | None = None
        # Those who wait: by caller, in the order of their turns. True: has a place; False: had to make room.
        self._queue: dict[str, deque[asyncio.Future[bool]]] = {}

    def take(self) -> bool:
        """Take a place if there is one. Whoever waits has been given one as soon as there was room."""
        if self.limit < self._most:
            self._recover()
        if self.in_flight >= self.allowed or self.waiting or self.pace.wait():
            return False
        self.in_flight += 1
        self.pace.begin()
        return True

    def leave(self, *, throttled: bool, answered: bool) -> None:
        """Give a place back and learn from how its request ended."""
        used = self.in_flight
        self.in_flight = used - 1
        if self._unheeded:
            self._unheeded -= 1
        elif throttled:
            if used >= self.allowed * _IN_USE and self.pace.rate is None:
                self._decrease(used)
        elif answered and used >= self.allowed:
            self._set_limit(self.limit + 1 / self.limit)
        if self.waiting:
            self._hand_out()

    def _decrease(self, used: int) -> None:
        """The other requests under way met the same overload, so the next answers, as many as they are, are not
        heeded.
        """
        self._set_limit(self.limit * _DECREASE)
        self._unheeded = used - 1
        self._recovered_at = self._deadlines.loop.time()

    def _recover(self) -> None:
        now = self._deadlines.loop.time()
        self._set_limit(self.limit + self._most * (now - self._recovered_at) / _RECOVERY)
        self._recovered_at = now
        if self.waiting:
            self._hand_out()

    def _set_limit(self, limit: float) -> None:
        self.limit = min(max(limit, float(self._least)), float(self._most))
        self.allowed = int(self.limit)

    async def wait(self, caller: str) -> None:
        """Wait for a place, in turn. Raises Refusal 503 when the queue is full or it takes too long."""
        if self.take():  # one may have become free before this was awaited
            return
        if self.waiting >= self._queue_size:
            self._make_room(caller)
        turn: asyncio.Future[bool] = self._deadlines.loop.create_future()
        self._queue.setdefault(caller, deque()).append(turn)
        self.waiting += 1
        self._hand_out()  # a pace may hold it back, which only a timer ends
        try:
            with Timeout(self._deadlines, self._queue_timeout):
                has_place = await turn
        except BaseException as error:
            self._give_up(caller, turn)
            if isinstance(error, TimeoutError):
                raise self._refusal(f"no place became free in {self._queue_timeout:g} s", "queue time") from None
            raise
        if not has_place:
            raise self._refusal("others wait who have asked for less", "queue full")

    def _make_room(self, caller: str) -> None:
        """The caller with the most waiting requests loses its latest, if the newcomer has clearly fewer."""
        own = len(self._queue.get(caller, ()))
        greediest = max(self._queue, key=lambda name: len(self._queue[name]), default=caller)
        if len(self._queue.get(greediest, ())) <= own + 1:
            raise self._refusal(f"{self.waiting} requests wait already", "queue full")
        turn = self._queue[greediest].pop()  # it has others left
        self.waiting -= 1
        if not turn.done():  # else its task is being cancelled
            turn.set_result(False)

    def _hand_out(self) -> None:
        """Give free places to those who wait, one caller after the other."""
        while self.waiting and self.in_flight < self.allowed:
            pause = self.pace.wait()
            if pause:
                self._hand_out_in(pause)
                return
            caller = next(iter(self._queue))
            turns = self._queue.pop(caller)
            turn = turns.popleft()
            if turns:
                self._queue[caller] = turns  # behind all others
            self.waiting -= 1
            if not turn.done():  # else its task is being cancelled
                self.in_flight += 1
                self.pace.begin()
                turn.set_result(True)

    def _hand_out_in(self, seconds: float) -> None:
        if self._paced is None:
            self._paced = self._deadlines.loop.call_later(seconds, self._paced_turn)

    def _paced_turn(self) -> None:
        self._paced = None
        self._hand_out()

    def _give_up(self, caller: str, turn: asyncio.Future[bool]) -> None:
        """Nobody waits for this turn any more; a place that came in the same moment goes to the next one."""
        turns = self._queue.get(caller)
        if turns is not None and turn in turns:
            turns.remove(turn)
            self.waiting -= 1
            if not turns:
                del self._queue[caller]
        elif turn.done() and not turn.cancelled() and turn.result():
            self.in_flight -= 1
            self._hand_out()

    def _refusal(self, why: str, verdict: str) -> Refusal:
        return Refusal(
            503,
            f"Too many requests to {self._target} at once: {why}. Try again in {_RETRY_AFTER} s.",
            retry_after=_RETRY_AFTER,
            limit=verdict,
        )
