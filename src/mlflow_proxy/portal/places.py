"""How pages wait for others: only some at once, and none for ever, so that the rest always find a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow_proxy.errors import Refusal

# Pages wait for AWS or the provider at the most this long, in seconds.
DEADLINE = 30.0
# And so many of them at once, in each worker.
MOST_WAITING = 4
_RETRY_AFTER = 5


class Busy(Refusal):
    """As many pages wait as may."""


class Places:
    """A limited number of places for pages that wait for others."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MOST_WAITING)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place. Raises Busy (503) at once if none is free."""
        if not self._free.acquire(blocking=False):
            raise Busy(
                503,
                f"{MOST_WAITING} pages of this worker already wait for AWS or the identity provider. Try again later.",
                retry_after=_RETRY_AFTER,
            )
        try:
            yield
        finally:
            self._free.release()
