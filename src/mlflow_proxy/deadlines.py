"""Many deadlines for little: one tick a worker instead of one timer a wait.

Nearly every deadline is called off again within milliseconds. Here that is a dictionary entry set and removed; the
tick looks at what is left ten times a second, and rests when there is nothing. So a deadline ends up to a tick late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

TICK = 0.1


class Deadlines:
    """The deadlines of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self._ticking = False

    def set(self, key: Hashable, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` in `seconds`, unless `clear` comes first. A second `set` for a key replaces the first."""
        self._due[key] = (self._loop.time() + seconds, action)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK, self._tick)

    def clear(self, key: Hashable) -> None:
        """Call off; nothing happens if there is no such deadline."""
        self._due.pop(key, None)

    def _tick(self) -> None:
        now = self._loop.time()
        due = [(key, action) for key, (at, action) in self._due.items() if at <= now]
        for key, action in due:
            del self._due[key]
            action()
        self._ticking = bool(self._due)
        if self._ticking:
            self._loop.call_later(TICK, self._tick)
