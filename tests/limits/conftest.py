"""What several tests of limits need."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import limits.strategies
import pytest
from tests.limits.servers import RedisServer


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still in memory, the library's part included; `now` sets it."""
    clock = SimpleNamespace(now=6000.0)
    still = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    for module in ("counters", "failures", "rates"):
        monkeypatch.setattr(import_module(f"mlflow_proxy.limits.{module}"), "time", still)
    monkeypatch.setattr(limits.strategies, "time", still)
    return clock
