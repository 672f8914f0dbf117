"""Strangers get few lines, and every one of their requests is counted in one."""

from __future__ import annotations

import asyncio

import pytest

from mlflow_proxy.telemetry import strangers as module
from mlflow_proxy.telemetry.record import Record
from mlflow_proxy.telemetry.strangers import BURST, MOST, Strangers


def stranger(address: str) -> Record:
    record = Record("GET", "0123456789abcdef")
    record.caller_address, record.status = address, 401
    return record


def written(*addresses: str) -> tuple[int, list[tuple[str, int]]]:
    """How many records of these requests got a line at once, and of whom lines counted others."""
    later: list[tuple[str, int]] = []

    async def main() -> int:
        strangers = Strangers(lambda record: later.append((record.caller_address, record.repeated)))
        at_once = sum(strangers.gets_line(stranger(address)) for address in addresses)
        strangers.close()
        return at_once

    return asyncio.run(main()), later


def test_a_few_requests_have_a_line_each() -> None:
    assert written(*["192.0.2.1"] * BURST, "192.0.2.2") == (BURST + 1, [])


def test_a_flood_is_counted_in_one_line() -> None:
    assert written(*["192.0.2.1"] * (BURST + 5000), "192.0.2.2") == (BURST + 1, [("192.0.2.1", 4999)])


def test_hosts_of_one_ipv6_network_are_one() -> None:
    at_once, later = written(*[f"2001:db8::{number:x}" for number in range(BURST + 10)])
    assert (at_once, [count for _, count in later]) == (BURST, [9])


def test_many_addresses_fill_no_more_than_all_may() -> None:
    addresses = [f"10.{number >> 8}.{number & 255}.1" for number in range(10 * MOST)]
    at_once, later = written(*addresses)
    assert at_once <= module.ALL_BURST + 1
    assert len(later) <= MOST + 1
    assert at_once + sum(1 + count for _, count in later) == len(addresses)


def test_what_was_counted_is_written_while_the_flood_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    told: list[int] = []

    async def main() -> None:
        wrote = asyncio.Event()

        def write(record: Record) -> None:
            told.append(record.repeated)
            wrote.set()

        strangers = Strangers(write)
        for _ in range(BURST + 20):
            strangers.gets_line(stranger("192.0.2.1"))
        await wrote.wait()
        strangers.close()

    asyncio.run(main())
    assert told == [19]
