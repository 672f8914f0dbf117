"""Many deadlines for little: one tick a worker instead of one timer a wait.

Nearly every deadline is called off again within milliseconds. Here that is a dictionary entry set and removed; the
tick looks at what is left ten times a second, and rests when there is nothing. So a deadline ends up to a tick late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Self

TICK = 0.1


class Deadlines:
    """The deadlines of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._due: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self._ticking = False

    def set(self, key: Hashable, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` in `seconds`, unless `clear` comes first. A second `set` for a key replaces the first."""
        self._due[key] = (self.loop.time() + seconds, action)
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(TICK, self._tick)

    def clear(self, key: Hashable) -> None:
        """Call off; nothing happens if there is no such deadline."""
        self._due.pop(key, None)

    def _tick(self) -> None:
        now = self.loop.time()
        due = [(key, entry) for key, entry in self._due.items() if entry[0] <= now]
        try:
            for key, entry in due:
                if self._due.get(key) is entry:  # an action before may have called it off, or set it anew
                    del self._due[key]
                    entry[1]()
        finally:  # an action that fails must not stop the others for ever
            self._ticking = bool(self._due)
            if self._ticking:
                self.loop.call_later(TICK, self._tick)


class Timeout:
    """`with Timeout(deadlines, seconds):` ends what the current task awaits inside, with TimeoutError.

    What asyncio.timeout does, without a timer of its own; `extend` moves the deadline.
    """

    __slots__ = ("_deadlines", "_expired", "_seconds", "_task")

    def __init__(self, deadlines: Deadlines, seconds: float) -> None:
        self._deadlines = deadlines
        self._seconds = seconds
        self._task = asyncio.current_task(deadlines.loop)  # to find the loop takes a system call
        self._expired = False

    def __enter__(self) -> Self:
        self._deadlines.set(self, self._seconds, self._expire)
        return self

    def extend(self, seconds: float) -> None:
        """The deadline is in `seconds` from now."""
        self._deadlines.set(self, seconds, self._expire)

    def _expire(self) -> None:
        self._expired = True
        if self._task is not None:
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines.clear(self)
        # Someone else may have cancelled the task as well; then that stands (as in asyncio.timeout).
        if self._expired and self._task is not None and self._task.uncancel() <= 0 and kind is asyncio.CancelledError:
            raise TimeoutError from error
