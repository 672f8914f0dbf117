"""Places: adapted to throttling, handed out fairly, none lost and none too many, whatever happens to those who wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.limits.simulation import CASES, SECONDS, simulate
from tests.limits.virtual_time import run_in_virtual_time

from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits.places import Places

LONG = 3600.0


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario in a loop of its own; an error that nobody saw fails, too."""
    unseen: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(str(context)))
        await scenario()

    run_in_virtual_time(main())
    assert unseen == []


def places(most: int, *, least: int = 1, queue: int = 100, queue_timeout: float = LONG) -> Places:
    deadlines = Deadlines(asyncio.get_running_loop())
    return Places("team", deadlines, least=least, most=most, queue=queue, queue_timeout=queue_timeout)


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(10):
        await asyncio.sleep(0)


def good(of: Places, times: int = 1) -> None:
    for _ in range(times):
        of.leave(throttled=False, answered=True)


class Line:
    """Requests of callers, in the order in which they came to their places or were refused."""

    def __init__(self, of: Places) -> None:
        self._places = of
        self.served: list[str] = []
        self.refused: list[tuple[str, str | None]] = []

    async def _wait(self, caller: str, name: str) -> None:
        try:
            await self._places.wait(caller)
        except Refusal as refusal:
            told = refusal
        else:
            self.served.append(name)
            return
        assert (told.status, told.retry_after) == (503, 1)
        assert "team" in told.message
        self.refused.append((name, told.limit))

    async def come(self, caller: str, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._wait(caller, name))
        await settle()
        return task


# Room


def test_no_more_than_allowed() -> None:
    async def scenario() -> None:
        of = places(3)
        assert [of.take() for _ in range(5)] == [True, True, True, False, False]
        good(of)
        assert [of.take() for _ in range(2)] == [True, False]
        assert of.in_flight == 3

    run(scenario)


def test_who_waits_gets_the_place_that_is_given_back() -> None:
    async def scenario() -> None:
        of = places(1)
        assert of.take()
        line = Line(of)
        await line.come("a", "first")
        assert (line.served, of.waiting) == ([], 1)
        good(of)
        assert not of.take()  # it belongs to the first already
        await settle()
        assert (line.served, of.waiting, of.in_flight) == (["first"], 0, 1)

    run(scenario)


# Adapting


def test_throttling_takes_the_limit_down_once_for_a_round() -> None:
    async def scenario() -> None:
        of = places(100)
        for _ in range(100):
            assert of.take()
        for _ in range(100):  # all of them met the same overload
            of.leave(throttled=True, answered=False)
        assert of.allowed == 70
        for _ in range(70):
            assert of.take()
        of.leave(throttled=True, answered=False)
        assert of.allowed == 49

    run(scenario)


@pytest.mark.parametrize("used", [1, 10, 89])
def test_throttling_says_nothing_of_a_limit_that_was_not_in_use(used: int) -> None:
    async def scenario() -> None:
        of = places(100)
        for _ in range(used):
            assert of.take()
        for _ in range(used):
            of.leave(throttled=True, answered=True)
        assert of.allowed == 100

    run(scenario)


def test_a_limit_nearly_in_use_falls_from_the_limit() -> None:
    async def scenario() -> None:
        of = places(100)
        for _ in range(95):
            assert of.take()
        of.leave(throttled=True, answered=False)
        assert of.allowed == 70

    run(scenario)


def test_never_below_the_least_nor_above_the_most() -> None:
    async def scenario() -> None:
        of = places(10, least=4)
        for _ in range(50):
            while of.take():
                pass
            of.leave(throttled=True, answered=False)
            while of.in_flight:
                of.leave(throttled=False, answered=False)
        assert of.allowed == 4
        for _ in range(2000):
            while of.take():
                pass
            good(of)
        assert of.allowed == 10
        assert of.limit == 10.0
        low = places(2, least=4)
        assert [low.take() for _ in range(3)] == [True, True, False]

    run(scenario)


def test_time_brings_all_places_back() -> None:
    async def scenario() -> None:
        of = places(128)
        for _ in range(20):
            while of.take():
                pass
            of.leave(throttled=True, answered=False)
            while of.in_flight:
                of.leave(throttled=False, answered=False)
        assert of.allowed == 1
        await asyncio.sleep(30)
        assert of.take()
        assert 60 <= of.allowed <= 70
        await asyncio.sleep(60)
        assert of.take()
        assert of.allowed == 128

    run(scenario)


def test_a_full_round_of_answers_adds_about_one() -> None:
    async def scenario() -> None:
        of = places(100)
        while of.take():
            pass
        of.leave(throttled=True, answered=False)
        good(of, 99)
        assert (of.allowed, of.in_flight) == (70, 0)
        while of.take():
            pass
        for _ in range(72):
            good(of)
            of.take()
        assert of.allowed == 71

    run(scenario)


def test_what_is_not_used_does_not_grow() -> None:
    async def scenario() -> None:
        of = places(100)
        while of.take():
            pass
        of.leave(throttled=True, answered=False)
        good(of, 99)
        for _ in range(1000):
            assert of.take()
            good(of)
        assert of.allowed == 70

    run(scenario)


def test_no_answer_changes_nothing() -> None:
    async def scenario() -> None:
        of = places(10)
        for _ in range(3):
            while of.take():
                pass
            of.leave(throttled=True, answered=False)
            while of.in_flight:
                of.leave(throttled=False, answered=False)
        low = of.limit
        assert low < 5
        for _ in range(100):
            while of.take():
                pass
            of.leave(throttled=False, answered=False)
        assert of.limit == low

    run(scenario)


def test_growing_lets_in_who_waits() -> None:
    async def scenario() -> None:
        of = places(4)
        while of.take():
            pass
        of.leave(throttled=True, answered=False)  # 2.8
        good(of, 3)
        assert [of.take() for _ in range(3)] == [True, True, False]
        line = Line(of)
        for number in range(3):
            await line.come("a", str(number))
        good(of)  # 2.8 + 1 / 2.8: one place given back and one more
        await settle()
        assert line.served == ["0", "1"]

    run(scenario)


# Fairness


def test_callers_take_turns() -> None:
    async def scenario() -> None:
        of = places(1)
        assert of.take()
        line = Line(of)
        for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
            await line.come(name[0], name)
        for _ in range(6):
            good(of)
            await settle()
        assert line.served == ["a1", "b1", "c1", "a2", "b2", "a3"]

    run(scenario)


def test_full_queue_refuses_at_once() -> None:
    async def scenario() -> None:
        of = places(1, queue=2)
        assert of.take()
        line = Line(of)
        for name in ("a1", "b1", "c1", "a2"):
            await line.come(name[0], name)
        assert line.refused == [("c1", "queue full"), ("a2", "queue full")]
        assert of.waiting == 2

    run(scenario)


def test_no_queue_at_all() -> None:
    async def scenario() -> None:
        of = places(1, queue=0)
        assert of.take()
        line = Line(of)
        await line.come("a", "a1")
        assert line.refused == [("a1", "queue full")]

    run(scenario)


def test_who_fills_the_queue_makes_room_for_others() -> None:
    async def scenario() -> None:
        of = places(1, queue=4)
        assert of.take()
        line = Line(of)
        for name in ("a1", "a2", "a3", "a4", "b1", "b2", "b3", "c1"):
            await line.come(name[0], name)
        # b3 would leave a with fewer than b; then c1 finds two callers with two requests each.
        assert [name for name, _ in line.refused] == ["a4", "a3", "b3", "a2"]
        for _ in range(4):
            good(of)
            await settle()
        assert line.served == ["a1", "b1", "c1", "b2"]
        assert (of.waiting, of.in_flight) == (0, 1)

    run(scenario)


# Waits that end otherwise


def test_time_is_up() -> None:
    async def scenario() -> None:
        of = places(1, queue_timeout=0.05)
        assert of.take()
        line = Line(of)
        await (await line.come("a", "a1"))
        assert line.refused == [("a1", "queue time")]
        assert of.waiting == 0
        good(of)
        assert of.take()

    run(scenario)


def test_who_goes_away_leaves_the_queue() -> None:
    async def scenario() -> None:
        of = places(1)
        assert of.take()
        line = Line(of)
        tasks = [await line.come("a", name) for name in ("a1", "a2", "a3")]
        tasks[1].cancel()
        await settle()
        assert of.waiting == 2
        for _ in range(2):
            good(of)
            await settle()
        assert line.served == ["a1", "a3"]
        good(of)
        assert of.in_flight == 0

    run(scenario)


@pytest.mark.parametrize("cancel_first", [True, False], ids=["cancelled before the place came", "and after"])
def test_place_given_to_one_who_goes_away_in_that_moment_goes_to_the_next(cancel_first: bool) -> None:
    async def scenario() -> None:
        of = places(1)
        assert of.take()
        line = Line(of)
        first, _ = await line.come("a", "a1"), await line.come("b", "b1")
        if cancel_first:
            first.cancel()
        good(of)
        if not cancel_first:
            first.cancel()
        await settle()
        assert line.served == ["b1"]
        good(of)
        assert (of.in_flight, of.waiting) == (0, 0)

    run(scenario)


def test_who_must_make_room_may_go_away_in_that_moment() -> None:
    async def scenario() -> None:
        of = places(1, queue=2)
        assert of.take()
        line = Line(of)
        await line.come("a", "a1")
        second = await line.come("a", "a2")
        second.cancel()
        await line.come("b", "b1")
        for _ in range(2):
            good(of)
            await settle()
        assert (line.served, line.refused) == (["a1", "b1"], [])

    run(scenario)


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "enter", "enter", "leave", "leave", "throttled", "failed", "cancel", "settle"]),
        st.integers(0, 5),
    ),
    max_size=120,
)


@settings(max_examples=400, deadline=None)
@given(STEPS, st.integers(1, 6), st.integers(1, 3), st.integers(0, 6))
def test_never_too_many_and_never_stuck(steps: list[Step], most: int, least: int, queue: int) -> None:
    """Any schedule of arrivals, answers and cancellations."""

    async def scenario() -> None:
        of = places(most, least=least, queue=queue)
        tasks: list[asyncio.Task[None]] = []
        held = 0

        async def wait(caller: str) -> None:
            nonlocal held
            try:
                await of.wait(caller)
            except Refusal:
                return
            held += 1

        def act(action: str, number: int) -> None:
            nonlocal held
            if action == "enter":
                if of.take():
                    held += 1
                else:
                    tasks.append(asyncio.create_task(wait(f"caller {number}")))
            elif action == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif action != "settle" and held:
                held -= 1
                of.leave(throttled=action == "throttled", answered=action == "leave")

        for action, number in steps:
            before, allowed = of.in_flight, of.allowed
            act(action, number)
            if action == "settle":
                await settle()
                assert of.in_flight == held
                assert of.waiting == sum(not task.done() for task in tasks)
            assert of.in_flight <= max(before, allowed, of.allowed)
            if of.in_flight > before:
                assert of.in_flight <= of.allowed
            assert not of.waiting or of.in_flight >= of.allowed
            assert of.waiting <= queue
        await settle()
        while held:
            act("leave", 0)
            await settle()
        assert all(task.done() for task in tasks)
        assert (of.in_flight, of.waiting) == (0, 0)
        assert of.take()

    run(scenario)


def test_nobody_starves_beside_a_flood() -> None:
    """One caller always has its queue full; the other's single requests still come through at once, in turn."""

    async def scenario() -> None:
        of = places(2, queue=20)
        while of.take():
            pass
        line = Line(of)
        flood = [await line.come("flood", f"f{number}") for number in range(20)]
        for number in range(10):
            await line.come("modest", f"m{number}")
            good(of, 2)
            await settle()
            flood += [await line.come("flood", f"more{number}.{each}") for each in range(2)]
        modest = [name for name in line.served if name.startswith("m") and "more" not in name]
        assert modest == [f"m{number}" for number in range(10)]
        for task in flood:
            task.cancel()
        await settle()
        good(of, of.in_flight)
        assert (of.in_flight, of.waiting) == (0, 0)

    run(scenario)


# The pace


def test_a_single_throttled_answer_sets_no_pace() -> None:
    async def scenario() -> None:
        of = places(100)
        assert of.take()
        of.pace.throttled()
        of.leave(throttled=True, answered=True)
        assert (of.pace.rate, of.allowed) == (None, 100)

    run(scenario)


def test_a_pace_is_forgotten_when_nothing_is_throttled_any_more() -> None:
    async def scenario() -> None:
        of = places(100)
        for _ in range(40):
            assert of.take()
        for _ in range(30):
            of.pace.throttled()
        assert of.pace.rate is not None
        assert of.pace.rate < 20
        good(of, 40)
        await asyncio.sleep(60)
        assert [of.take() for _ in range(100)] == [True] * 100
        assert of.pace.rate is None

    run(scenario)


def test_who_waits_for_the_pace_is_served_though_nobody_leaves() -> None:
    async def scenario() -> None:
        of = places(100)
        for _ in range(40):
            assert of.take()
        for _ in range(30):
            of.pace.throttled()
        of.take()
        line = Line(of)
        tasks = [await line.come("a", str(number)) for number in range(5)]
        await asyncio.gather(*tasks)
        assert line.served == ["0", "1", "2", "3", "4"]

    run(scenario)


@pytest.mark.parametrize(("allowed", "callers"), CASES)
def test_a_service_that_throttles_by_rate_is_used_fully_and_refuses_nearly_nobody(allowed: int, callers: int) -> None:
    outcome = simulate(allowed, callers)
    assert outcome.answered >= 0.9 * allowed * SECONDS
    assert outcome.refused <= 0.01 * outcome.answered
    documented = Path(__file__).parents[2] / "docs/limits.md"
    assert outcome.row(allowed, callers) in documented.read_text()
