"""Failed authentications: who fails too often waits; nobody else does, and memory stays bounded."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import pytest

from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits import failures as module
from mlflow_proxy.limits.failures import Failures
from mlflow_proxy.limits.rates import rates


def failures(text: str | None = "3/minute") -> Failures:
    return Failures(rates("failures", "", text))


def blocked(of: Failures, address: str) -> int | None:
    """The seconds that an address is told to wait; None if it is free."""
    try:
        of.check(address)
    except Refusal as refusal:
        told = refusal
    else:
        return None
    assert told.status == 429
    assert told.retry_after is not None
    return told.retry_after


def fail(of: Failures, address: str, times: int = 1) -> None:
    for _ in range(times):
        assert of.add(address) is None


def test_as_many_failures_as_the_rate_says(clock: SimpleNamespace) -> None:
    of = failures()
    for _ in range(3):
        assert blocked(of, "192.0.2.7") is None
        fail(of, "192.0.2.7")
    assert blocked(of, "192.0.2.7") is not None
    assert blocked(of, "192.0.2.8") is None


def test_free_again_when_time_has_passed(clock: SimpleNamespace) -> None:
    of = failures()
    fail(of, "192.0.2.7", 3)
    seconds = blocked(of, "192.0.2.7")
    assert seconds == 61  # the window's rest, and the whole second after
    clock.now += seconds - 2
    assert blocked(of, "192.0.2.7") is not None
    clock.now += 2
    assert blocked(of, "192.0.2.7") is None
    fail(of, "192.0.2.7")  # one in twenty seconds now
    seconds = blocked(of, "192.0.2.7")
    assert seconds is not None
    assert 15 < seconds <= 21


def test_more_failures_do_not_shorten_the_wait(clock: SimpleNamespace) -> None:
    of = failures("3/minute;6/hour")
    fail(of, "192.0.2.7", 3)
    clock.now += 61
    fail(of, "192.0.2.7")
    clock.now += 61
    fail(of, "192.0.2.7", 50)
    seconds = blocked(of, "192.0.2.7")
    fail(of, "192.0.2.7", 50)
    assert blocked(of, "192.0.2.7") == seconds


def test_each_address_has_its_own_wait(clock: SimpleNamespace) -> None:
    of = failures()
    fail(of, "192.0.2.1", 3)
    clock.now += 30
    fail(of, "192.0.2.2", 3)
    first, second = blocked(of, "192.0.2.1"), blocked(of, "192.0.2.2")
    assert first is not None
    assert second is not None
    clock.now += first
    assert blocked(of, "192.0.2.1") is None
    fail(of, "192.0.2.3", 3)
    assert blocked(of, "192.0.2.3") is not None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.7", "192.0.2.8", False),
        ("2001:db8:1:2::7", "2001:db8:1:2:ffff::8", True),
        ("2001:db8:1:2::7", "2001:db8:1:3::7", False),
        ("2001:0DB8:1:2::7", "2001:db8:1:2:0:0:0:7", True),
        ("::ffff:192.0.2.7", "192.0.2.7", True),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.8", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("::1", "::ffff:192.0.2.7", False),
        ("", "192.0.2.7", False),
        ("not:an:address", "192.0.2.7", False),
    ],
)
def test_what_counts_as_one_address(clock: SimpleNamespace, one: str, other: str, same: bool) -> None:
    of = failures()
    fail(of, one, 3)
    assert blocked(of, one) is not None
    assert (blocked(of, other) is not None) == same


def test_no_rate_no_limit(clock: SimpleNamespace) -> None:
    of = failures(None)
    fail(of, "192.0.2.7", 1000)
    assert blocked(of, "192.0.2.7") is None


def test_many_addresses_take_bounded_memory(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as many as are remembered, all of them blocked: the second half costs nothing any more."""
    monkeypatch.setattr(module, "ADDRESSES", 1000)
    of = failures("1/hour")

    def attack(network: int) -> None:
        for number in range(5000):
            fail(of, f"2001:db8:{network:x}:{number:x}::1")

    attack(1)
    tracemalloc.start()
    try:
        attack(2)
        grown, _ = tracemalloc.get_traced_memory()
        attack(3)
        attack(4)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < grown * 1.5
    assert blocked(of, f"2001:db8:4:{4999:x}::1") is not None
    assert blocked(of, "2001:db8:1:1::1") is None


def test_asking_is_free_again_when_nobody_waits(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    network = module.network_of

    def noted(address: str) -> str:
        asked.append(address)
        return network(address)

    of = failures()
    fail(of, "192.0.2.7", 3)
    monkeypatch.setattr(module, "network_of", noted)
    assert blocked(of, "2001:db8::1") is None
    assert asked == ["2001:db8::1"]
    clock.now += 3600
    assert [blocked(of, "2001:db8::1") for _ in range(3)] == [None] * 3
    assert asked == ["2001:db8::1"]
