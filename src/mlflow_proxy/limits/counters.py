"""What one worker counts alone: a storage in memory for the library `limits`, plugged in where it lets one in.

How a window counts, and when it has room again, is the business of the library's strategy; here are two numbers per
key and nothing else. The library's own storage in memory does not fit a service: it starts a thread every 10 ms as long
as requests come, and a caller who comes from ever new addresses makes it grow without a bound.
"""

from __future__ import annotations

import math
import time
from typing import NoReturn

from limits.storage import SlidingWindowCounterSupport, Storage

from mlflow_proxy.limits.recent import Recent


class _Window:
    """The requests of the window `number` (windows begin at multiples of their length) and of the one before."""

    __slots__ = ("current", "number", "previous")

    def __init__(self, _key: str) -> None:
        self.number = -1.0
        self.previous = 0
        self.current = 0


class Counters(Storage, SlidingWindowCounterSupport):
    """Counts of the latest `size` keys, for the sliding window counter; the longest unseen are forgotten.

    For one thread. Other than the library's storages it takes lengths that are not whole seconds.
    """

    STORAGE_SCHEME = None

    def __init__(self, size: int) -> None:
        super().__init__()
        self._windows: Recent[str, _Window] = Recent(size, _Window)

    def __len__(self) -> int:
        return len(self._windows)

    def _window(self, key: str, length: float) -> tuple[_Window, float]:
        """The key's window as it is now, and how many seconds of it are left."""
        window = self._windows[key]
        number, elapsed = divmod(time.monotonic(), length)
        if window.number != number:
            window.previous = window.current if window.number == number - 1 else 0
            window.current = 0
            window.number = number
        return window, length - elapsed

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: float, amount: int = 1) -> bool:
        """Count `amount` requests if they fit."""
        window, left = self._window(key, expiry)
        if math.floor(window.previous * left / expiry + window.current) + amount > limit:
            return False
        window.current += amount
        return True

    def get_sliding_window(self, key: str, expiry: float) -> tuple[int, float, int, float]:
        """Requests of the window before and seconds for which they count, and the same of the running window."""
        window, left = self._window(key, expiry)
        # The strategy takes a window of which all is left for one of which nothing is.
        return window.previous, left, window.current, min(left + expiry, math.nextafter(2 * expiry, 0))

    # What the library wants of a storage besides, for its other strategies and for taking counts back.

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        """Nothing here fails."""
        return ()

    def check(self) -> bool:
        """It is always there."""
        return True

    def _unsupported(self, *_args: object, **_options: object) -> NoReturn:
        raise NotImplementedError("counts are kept for the sliding window counter alone, and end by themselves")

    incr = get = get_expiry = reset = clear = clear_sliding_window = _unsupported
