"""Ends a request's work when its caller goes away, so that nobody computes answers for nobody.

Most requests are answered before it is worth looking: the watch begins after a short while, and costs the others one
timer.
"""

from __future__ import annotations

import asyncio

from mlflow_proxy.bodies import Receive

_PATIENCE = 0.25


class CallerWatch:
    """Cancels the current task when the caller disconnects; `gone` tells that this is why."""

    __slots__ = ("_looking", "_receive", "_task", "_timer", "gone")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task = asyncio.current_task()
        self._looking: asyncio.Task[None] | None = None
        self.gone = False
        self._timer = asyncio.get_running_loop().call_later(_PATIENCE, self._begin)

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()

    def _begin(self) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._task is not None:
            self._task.cancel()
