"""Ends a request's work when its caller goes away, so that nobody computes answers for nobody.

Most requests are answered before it is worth looking: the watch begins after a short while, and costs the others
next to nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from mlflow_proxy.bodies import Receive
from mlflow_proxy.deadlines import Deadlines

_PATIENCE = 0.25


class CallerWatch:
    """Cancels the current task when the caller disconnects; `gone` tells that this is why."""

    __slots__ = ("_deadlines", "_looking", "_receive", "_task", "gone")

    def __init__(self, receive: Receive, deadlines: Deadlines) -> None:
        self._receive = receive
        self._deadlines = deadlines
        self._task = asyncio.current_task(deadlines.loop)  # to find the loop takes a system call
        self._looking: asyncio.Task[None] | None = None
        self.gone = False
        deadlines.set(self, _PATIENCE, self._begin)

    async def receive(self) -> dict[str, Any]:
        """The caller's next message, for who collects the body: only one may receive, so nobody looks meanwhile."""
        self._deadlines.clear(self)
        message = await self._receive()
        self._deadlines.set(self, _PATIENCE, self._begin)
        return message

    def close(self) -> None:
        """Stop looking."""
        self._deadlines.clear(self)
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
