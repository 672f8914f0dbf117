"""Ends a request's work when its caller goes away, so no work is done for a caller that has left.

A caller's messages come in one queue: first its body, then the news that it has gone. Whoever takes a message has it
alone, so the watch begins only when the body is whole. It also begins after a short while, as most requests are
answered before, and it then costs them next to nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from mlflow_proxy.bodies import Receive
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.requests import Request

_PATIENCE = 0.25


class CallerWatch:
    """Cancels the current task when the caller disconnects; `gone` tells that this is why.

    `awaits_body`: the request's body is not whole yet, so only its collector may receive.
    """

    __slots__ = ("_deadlines", "_left", "_looking", "_receive", "_task", "awaits_body", "gone")

    def __init__(self, receive: Receive, deadlines: Deadlines) -> None:
        self._receive = receive
        self._deadlines = deadlines
        self._task = asyncio.current_task(deadlines.loop)  # to find the loop takes a system call
        self._looking: asyncio.Task[None] | None = None
        self._left: int | None = None
        self.awaits_body = False
        self.gone = False

    def start(self, request: Request) -> None:
        """Watch from now on, or from the end of the request's body."""
        self.awaits_body = request.has_body
        self._left = request.content_length
        if not self.awaits_body:
            self._look_soon()

    async def receive(self) -> dict[str, Any]:
        """The caller's next message, for the collector of its body."""
        message = await self._receive()
        if self._left is not None:
            self._left -= len(message.get("body", b""))
        if self._left == 0 or not message.get("more_body"):
            self.awaits_body = False
            self._look_soon()
        return message

    def close(self) -> None:
        """Stop looking."""
        self._deadlines.clear(self)
        if self._looking is not None:
            self._looking.cancel()

    def _look_soon(self) -> None:
        self._deadlines.set(self, _PATIENCE, self._begin)

    def _begin(self) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._task is not None:
            self._task.cancel()
