"""Blocking calls in threads: how many, for how long, and what comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from mlflow_proxy.threads import Threads


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.01)


def test_results_and_errors_come_back() -> None:
    async def main() -> None:
        threads = Threads("test", 1)
        assert await threads.run(lambda: threading.current_thread().name, 60) == "test"
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0, 60)
        assert await threads.run(lambda: 7, 60) == 7

    asyncio.run(main())


def test_only_so_many_at_once() -> None:
    release = threading.Event()
    begun: list[int] = []

    def call() -> bool:
        begun.append(1)
        return release.wait(60)

    async def main() -> None:
        threads = Threads("test", 2)
        calls = [asyncio.ensure_future(threads.run(call, 60)) for _ in range(5)]
        await until(lambda: len(begun) == 2)
        await asyncio.sleep(0.1)
        assert len(begun) == 2
        release.set()
        assert await asyncio.gather(*calls) == [True] * 5

    asyncio.run(main())


def test_a_call_that_hangs_is_given_up_but_keeps_its_place() -> None:
    release = threading.Event()

    async def main() -> None:
        threads = Threads("test", 1)
        with pytest.raises(TimeoutError):
            await threads.run(lambda: release.wait(60), 0.05)
        with pytest.raises(TimeoutError):  # the wait for a place counts, too
            await threads.run(lambda: True, 0.05)
        release.set()
        assert await threads.run(lambda: 7, 60) == 7

    asyncio.run(main())


def test_the_loop_may_end_before_the_call() -> None:
    release, done = threading.Event(), threading.Event()

    def call() -> None:
        release.wait(60)
        done.set()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await Threads("test", 1).run(call, 0.05)

    asyncio.run(main())
    release.set()
    assert done.wait(60)
