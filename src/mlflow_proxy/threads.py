"""Blocking calls off the event loop: a few at a time, and none waited for longer than its deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """At most `limit` calls at once, each in a new thread called `name`.

    Not a ThreadPoolExecutor: the interpreter waits for that one's threads at exit, and a call that hangs would keep a
    worker from ending. For calls so rare that a new thread for each costs nothing.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._free = asyncio.Semaphore(limit)

    async def run(self, call: Callable[[], T], deadline: float) -> T:
        """The result of `call`, or TimeoutError after `deadline` seconds, in which the wait for a thread counts."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(done: Callable[[], None]) -> None:
            self._free.release()  # only now: a call whose caller has given up still has its thread
            if not result.done():
                done()

        def work() -> None:
            done: Callable[[], None]
            try:
                done = partial(result.set_result, call())
            except Exception as error:
                done = partial(result.set_exception, error)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, done)

        async with asyncio.timeout(deadline):
            await self._free.acquire()
            threading.Thread(target=work, name=self._name, daemon=True).start()
            return await result
