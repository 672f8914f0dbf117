"""A simulation of callers, places and a service that throttles by rate, in virtual time. docs/limits.md shows it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from tests.limits.virtual_time import run_in_virtual_time

from mlflow_proxy import retries
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits.places import Places

SECONDS = 30
# In seconds: from a read of one run to a search; refusals come at once.
_SERVICE_TIMES = (0.02, 0.05, 0.1, 0.3)
_THROTTLED_TIME = 0.015


# Calls per second that the service allows, and callers at once.
CASES = ((25, 40), (25, 200), (100, 250), (400, 250))


@dataclass
class Outcome:
    """What callers got, and how often the service throttled."""

    answered: int = 0
    refused: int = 0
    attempts: int = 0
    throttled: int = 0

    def row(self, allowed: int, callers: int) -> str:
        """A row of the table in docs/limits.md."""
        refused = 100 * self.refused / (self.answered + self.refused)
        throttled = 100 * self.throttled / self.attempts
        return f"| {allowed} | {callers} | {self.answered / SECONDS:.1f} | {throttled:.1f} % | {refused:.1f} % |"


class _Service:
    """A token bucket that holds what it lets through in a second."""

    def __init__(self, allowed: int, outcome: Outcome) -> None:
        self._allowed = allowed
        self._tokens = float(allowed)
        self._filled_at = asyncio.get_running_loop().time()
        self._outcome = outcome

    async def answers(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._tokens = min(self._allowed, self._tokens + (now - self._filled_at) * self._allowed)
        self._filled_at = now
        self._outcome.attempts += 1
        if self._tokens < 1:
            self._outcome.throttled += 1
            await asyncio.sleep(_THROTTLED_TIME)
            return False
        self._tokens -= 1
        await asyncio.sleep(random.choice(_SERVICE_TIMES))
        return True


async def _send(places: Places, service: _Service) -> tuple[bool, bool]:
    """As `sending` does it: whether there was an answer in the end, and whether any attempt was throttled."""
    for attempt in range(1, 4):
        if await service.answers():
            return True, attempt > 1
        places.pace.throttled()
        if attempt < 3:
            pause = max(retries.delay(attempt, throttled=True), places.pace.wait())
            await asyncio.sleep(max(pause, places.pace.reserve()))
            places.pace.count()
    return False, True


async def _caller(name: str, places: Places, service: _Service, outcome: Outcome) -> None:
    """Calls again as soon as it was answered, and a second after a refusal, as it was told."""
    while True:
        try:
            if not places.take():
                await places.wait(name)
        except Refusal:
            outcome.refused += 1
            await asyncio.sleep(1)
            continue
        answered, throttled = await _send(places, service)
        places.leave(throttled=throttled, answered=True)
        if answered:
            outcome.answered += 1
        else:
            outcome.refused += 1
            await asyncio.sleep(1)


async def _simulate(allowed: int, callers: int) -> Outcome:
    random.seed(8)
    outcome = Outcome()
    deadlines = Deadlines(asyncio.get_running_loop())
    places = Places("team", deadlines, least=4, most=128, queue=256, queue_timeout=10)
    service = _Service(allowed, outcome)
    tasks = [asyncio.create_task(_caller(str(n), places, service, outcome)) for n in range(callers)]
    await asyncio.sleep(SECONDS)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return outcome


def simulate(allowed: int, callers: int) -> Outcome:
    """What `callers` at once got in `SECONDS` from a service that lets `allowed` calls a second through."""
    return run_in_virtual_time(_simulate(allowed, callers))
