"""The mapping that forgets what was not used lately."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.limits.recent import Recent


def test_makes_a_value_once() -> None:
    made: list[str] = []

    def make(key: str) -> object:
        made.append(key)
        return object()

    recent = Recent(4, make)
    first = recent["a"]
    assert recent["a"] is first
    assert recent["b"] is not first
    assert made == ["a", "b"]


@given(st.lists(st.integers(0, 40), max_size=300), st.integers(1, 8))
def test_holds_no_more_than_its_size_and_always_the_latest_half(keys: list[int], half: int) -> None:
    recent: Recent[int, list[int]] = Recent(2 * half, lambda key: [key])
    values: dict[int, list[int]] = {}
    used: list[int] = []  # the latest last
    for key in keys:
        latest = used[-half:]
        value = recent[key]
        assert value == [key]
        if key in latest:
            assert value is values[key]
        values[key] = value
        used = [other for other in used if other != key] + [key]
        assert len(recent) <= 2 * half


def test_what_is_not_used_is_forgotten() -> None:
    recent: Recent[int, list[int]] = Recent(8, lambda key: [key])
    first = recent[0]
    for key in range(1, 9):
        assert recent[key] == [key]
    assert recent[0] is not first


def test_what_is_used_all_the_time_stays() -> None:
    recent: Recent[int, list[int]] = Recent(8, lambda key: [key])
    first = recent[0]
    for key in range(1, 1000):
        assert recent[key] == [key]
        assert recent[0] is first
