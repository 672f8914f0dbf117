"""Whom the proxy takes for the caller behind a load balancer in whose network other callers live, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.callers import call
from tests.faults.proxies import Proxy, running, target
from tests.faults.upstreams import Upstream

# The load balancer is 127.0.0.1; a caller beside it is in its network, too.
BESIDE = "127.50.7.1"
FAILURES = 5


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    upstream = Upstream()
    with running(
        tmp_path / "proxy",
        [target("prod", f"http://127.0.0.1:{upstream.port}")],
        server={"trusted_proxies": ["127.0.0.0/8"]},
        sections={
            "access": {"keys_file": str(tmp_path / "keys")},
            "limits": {"auth_failure_rate": f"{FAILURES}/hour"},
        },
        roles=[{"name": "all", "targets": ["*"], "allow": ["*"]}],
    ) as running_proxy:
        yield running_proxy
    upstream.close()


def wrong_key(proxy: Proxy, forwarded: str) -> int:
    return call(proxy.port, "/x", "GET", f"X-Forwarded-For: {forwarded}", "X-Api-Key: mlp_wrong").status


def test_a_forged_address_is_not_the_callers(proxy: Proxy) -> None:
    forged = call(proxy.port, "/x", "GET", f"X-Forwarded-For: 203.0.113.66, {BESIDE}", "X-Request-Id: forged-one")
    assert forged.status == 401
    assert proxy.log_line("forged-one")["client"] == BESIDE


def test_forged_addresses_neither_evade_a_lockout_nor_lock_out_others(proxy: Proxy) -> None:
    statuses = [wrong_key(proxy, f"203.0.113.{number}, {BESIDE}") for number in range(FAILURES)]
    assert statuses == [401] * FAILURES
    assert wrong_key(proxy, f"203.0.113.99, {BESIDE}") == 429
    for other in ("127.50.1.5", "203.0.113.1"):
        assert [wrong_key(proxy, f"{other}, 127.50.7.{number}") for number in range(10, 10 + FAILURES)] == [
            401
        ] * FAILURES
        assert wrong_key(proxy, other) == 401
