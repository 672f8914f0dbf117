"""Strangers and wrong credentials: whom the proxy takes for the caller, whom it locks out, and how much it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.callers import Caller, call, request
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


def test_a_wrong_key_keeps_out_no_right_key_of_the_same_address(proxy: Proxy) -> None:
    right = new_key(proxy)
    assert [wrong_key(proxy, BESIDE) for _ in range(FAILURES + 5)] == [401] * FAILURES + [429] * 5
    for _ in range(5):
        assert wrong_key(proxy, BESIDE) == 429
        assert call(proxy.port, "/x", "GET", f"X-Forwarded-For: {BESIDE}", f"X-Api-Key: {right}").status == 200


def test_a_flood_of_strangers_fills_neither_log_nor_audit_log(proxy: Proxy) -> None:
    flood = 5000
    for _ in range(flood // 50):
        with Caller(proxy.port) as caller:
            caller.send(request("/x", "GET", f"X-Forwarded-For: {BESIDE}") * 50)
            assert {caller.answer().status for _ in range(50)} == {401}
    assert proxy.stop() == 0
    for output in (proxy.stdout, proxy.stderr):
        lines = [json.loads(line) for line in output.read_text().splitlines() if line.startswith("{")]
        counted = [line for line in lines if line.get("client") == BESIDE]
        assert len(counted) < flood // 4
        assert sum(1 + line.get("repeated", 0) for line in counted) == flood


def new_key(proxy: Proxy) -> str:
    made = ["keys", "new", "--name", "right", "--role", "all", "-c", str(proxy.folder / "proxy.toml")]
    command = [sys.executable, "-m", "mlflow_proxy", *made]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    key = re.search(r"mlp_\w+", done.stdout)
    assert key is not None, done.stdout
    end = time.monotonic() + 20
    while call(proxy.port, "/x", "GET", f"X-Api-Key: {key[0]}").status != 200:  # read within a second
        assert time.monotonic() < end
        time.sleep(0.1)
    return key[0]
