"""Deadlines of one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from mlflow_proxy.deadlines import TICK, Deadlines, Timeout


def run(scenario: Callable[[Deadlines, list[str]], Any]) -> list[str]:
    """Run a scenario in a loop of its own; what happened, in order, and what went wrong in callbacks."""
    happened: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: happened.append(f"error: {context.get('exception')!r}")
        )
        await scenario(Deadlines(asyncio.get_running_loop()), happened)

    asyncio.run(main())
    return happened


def test_actions_come_after_their_time() -> None:
    times: dict[str, float] = {}

    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()

        def note(name: str) -> None:
            times[name] = loop.time() - started

        all_came = asyncio.Event()
        deadlines.set("last", 0.5, all_came.set)
        for name, seconds in (("c", 0.3), ("a", 0.0), ("b", 0.12)):
            deadlines.set(name, seconds, partial(note, name))
        await all_came.wait()

    run(scenario)
    for name, seconds in (("a", 0.0), ("b", 0.12), ("c", 0.3)):
        assert times[name] >= seconds


def test_cleared_deadline_never_comes() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        deadlines.set("a", 0.05, lambda: happened.append("a"))
        deadlines.set("b", 0.05, lambda: happened.append("b"))
        deadlines.clear("a")
        deadlines.clear("a")
        deadlines.clear("never set")
        await asyncio.sleep(3 * TICK)

    assert run(scenario) == ["b"]


def test_second_set_replaces_the_first() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        deadlines.set("a", 0.05, lambda: happened.append("early"))
        deadlines.set("a", 0.3, lambda: happened.append("late"))
        await asyncio.sleep(2 * TICK)
        assert happened == []
        await asyncio.sleep(3 * TICK)

    assert run(scenario) == ["late"]


def test_action_happens_once_and_may_set_again() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        def again() -> None:
            happened.append("x")
            if len(happened) < 3:
                deadlines.set("a", 0.0, again)

        deadlines.set("a", 0.0, again)
        await asyncio.sleep(6 * TICK)

    assert run(scenario) == ["x"] * 3


def test_action_may_call_off_or_postpone_another_that_is_due() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        def first() -> None:
            happened.append("first")
            deadlines.clear("second")
            deadlines.set("third", 0.25, lambda: happened.append("third, later"))

        deadlines.set("first", 0.0, first)
        deadlines.set("second", 0.0, lambda: happened.append("second"))
        deadlines.set("third", 0.0, lambda: happened.append("third"))
        deadlines.set("fourth", 0.0, lambda: happened.append("fourth"))
        await asyncio.sleep(2 * TICK)
        assert happened == ["first", "fourth"]
        await asyncio.sleep(4 * TICK)

    assert run(scenario) == ["first", "fourth", "third, later"]


def test_failing_action_stops_no_other() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        def fail() -> None:
            raise RuntimeError("broken action")

        deadlines.set("a", 0.0, fail)
        deadlines.set("b", 0.0, lambda: happened.append("b"))
        await asyncio.sleep(3 * TICK)
        deadlines.set("c", 0.0, lambda: happened.append("c"))
        await asyncio.sleep(3 * TICK)

    assert run(scenario) == ["error: RuntimeError('broken action')", "b", "c"]


def test_rests_when_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timer is left running, so an idle worker sleeps."""

    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        loop = asyncio.get_running_loop()
        later = loop.call_later

        def noted(delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
            if delay == TICK:
                happened.append("tick set")
            return later(delay, callback, *args)

        monkeypatch.setattr(loop, "call_later", noted)
        deadlines.set("a", 10.0, lambda: happened.append("a"))
        deadlines.clear("a")
        await asyncio.sleep(5.5 * TICK)

    assert run(scenario) == ["tick set"]


# Timeouts


def test_timeout_ends_what_is_awaited() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        with pytest.raises(TimeoutError), Timeout(deadlines, 0.05):
            await asyncio.sleep(5)
        await asyncio.sleep(0)  # the task is not cancelled any more
        happened.append("went on")

    assert run(scenario) == ["went on"]


def test_timeout_that_is_not_needed_leaves_nothing() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        with Timeout(deadlines, 0.05):
            await asyncio.sleep(0)
        with pytest.raises(KeyError), Timeout(deadlines, 0.05):
            raise KeyError
        await asyncio.sleep(3 * TICK)
        happened.append("undisturbed")

    assert run(scenario) == ["undisturbed"]


def test_timeout_moves() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        with Timeout(deadlines, 0.1) as timeout:
            timeout.extend(0.6)
            await asyncio.sleep(0.35)
            happened.append("in time")
            timeout.extend(0.0)
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                happened.append("ended")

    assert run(scenario) == ["in time", "ended"]


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_cancellation_by_somebody_else_stands(seconds: float) -> None:
    """Also when the deadline passed in the same moment."""

    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        async def work() -> None:
            with Timeout(deadlines, seconds):
                await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        if seconds == 0:  # both before the task runs again
            deadlines._tick()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        happened.append("cancelled")

    assert run(scenario) == ["cancelled"]


def test_inner_timeout_leaves_the_outer_one() -> None:
    async def scenario(deadlines: Deadlines, happened: list[str]) -> None:
        with Timeout(deadlines, 0.45):
            for _ in range(2):
                try:
                    with Timeout(deadlines, 0.05):
                        await asyncio.sleep(5)
                except TimeoutError:
                    happened.append("inner")
            try:
                with Timeout(deadlines, 60):
                    await asyncio.sleep(5)
            except TimeoutError:
                happened.append("wrong one")
            except asyncio.CancelledError:
                happened.append("outer")
                raise

    def expect_timeout(deadlines: Deadlines, happened: list[str]) -> Any:
        async def wrapped() -> None:
            with pytest.raises(TimeoutError):
                await scenario(deadlines, happened)

        return wrapped()

    assert run(expect_timeout) == ["inner", "inner", "outer"]


# The watch
