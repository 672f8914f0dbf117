"""A mapping of bounded size: what was used lately stays, the rest is forgotten. No timers, no sweeps."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Makes the value of a key when it is first asked for; holds at most `size` of them, `size` being even.

    Entries live in two generations. When the young one has grown to half the size, the old one is dropped and the
    young one becomes it; what is used moves into the young one. So the latest half always stays, and nothing is ever
    searched.
    """

    def __init__(self, size: int, make: Callable[[K], V]) -> None:
        self._half = size // 2
        self._make = make
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def __getitem__(self, key: K) -> V:
        value = self._young.get(key)
        if value is None:
            value = self._old.pop(key, None)
            if value is None:
                value = self._make(key)
            if len(self._young) >= self._half:
                self._old, self._young = self._young, {}
            self._young[key] = value
        return value

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
