"""Proxies before scripted upstreams, one pair for each configuration that many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from tests.faults.callers import Answer, call
from tests.faults.proxies import APP_ARN, Proxy, running, target
from tests.faults.upstreams import Upstream


class Stage(NamedTuple):
    """A proxy and the upstream behind it."""

    proxy: Proxy
    upstream: Upstream

    @property
    def port(self) -> int:
        return self.proxy.port

    def call(self, target: str = "/", method: str = "GET", *headers: str, body: bytes = b"") -> Answer:
        return call(self.port, target, method, *headers, body=body)


@pytest.fixture(scope="session")
def _steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    upstream = Upstream()
    url = f"http://127.0.0.1:{upstream.port}"
    targets = [target("prod", url, default=True), {**target("app", url), "arn": APP_ARN}]
    with running(tmp_path_factory.mktemp("steady"), targets) as proxy:
        yield Stage(proxy, upstream)
    upstream.close()


@pytest.fixture
def steady(_steady: Stage) -> Stage:
    """Every option at its default."""
    _steady.upstream.reset()
    return _steady


@pytest.fixture(scope="session")
def _hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    upstream = Upstream()
    with running(
        tmp_path_factory.mktemp("hasty"),
        [target("prod", f"http://127.0.0.1:{upstream.port}")],
        server={"body_limit": 1 << 20, "body_budget": 3 << 19, "body_timeout": 1, "header_timeout": 1},
        upstream={"connect_timeout": 1, "first_byte_timeout": 1, "idle_timeout": 1, "keep_alive": 1},
    ) as proxy:
        yield Stage(proxy, upstream)
    upstream.close()


@pytest.fixture
def hasty(_hasty: Stage) -> Stage:
    """Deadlines of a second; bodies of 1 MiB, and 1.5 MiB of them together."""
    _hasty.upstream.reset()
    return _hasty


@pytest.fixture(scope="session")
def _narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    upstream = Upstream()
    with running(
        tmp_path_factory.mktemp("narrow"),
        [target("prod", f"http://127.0.0.1:{upstream.port}")],
        upstream={"connections": 2},
        sections={"limits": {"queue": 2, "queue_timeout": 3}},
    ) as proxy:
        yield Stage(proxy, upstream)
    upstream.close()


@pytest.fixture
def narrow(_narrow: Stage) -> Stage:
    """Two connections upstream, and two requests that may wait for them."""
    _narrow.upstream.reset()
    return _narrow
