"""SIGHUP, which `systemctl reload` sends: roles and keys are read again while requests go on."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.client import HTTPException, RemoteDisconnected
from pathlib import Path

import pytest
from tests.faults.callers import call
from tests.faults.proxies import Proxy, Table, running, target
from tests.faults.test_processes import wait_until
from tests.faults.upstreams import Upstream

from mlflow_proxy.access.key_record import Key, make_key

READS, WRITES = "/api/2.0/mlflow/runs/get", "/api/2.0/mlflow/runs/delete"


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.close()


def made(role: str) -> tuple[str, Key]:
    return make_key(f"robot-{role}", role, created=datetime.now(UTC), expires=None)


def lines(keys: Iterable[Key]) -> str:
    return "".join(f"{json.dumps(key.fields())}\n" for key in keys)


@contextmanager
def serving(folder: Path, upstream: Upstream, *keys: Key, workers: int = 2) -> Iterator[Proxy]:
    """A proxy that lets the role `reader` read."""
    folder.mkdir()
    (folder / "keys").write_text(lines(keys))
    roles: list[Table] = [{"name": "reader", "targets": ["prod"], "allow": ["Get*"]}]
    with running(
        folder,
        [target("prod", f"http://127.0.0.1:{upstream.port}")],
        server={"workers": workers},
        sections={"access": {"keys_file": str(folder / "keys")}},
        roles=roles,
    ) as proxy:
        yield proxy


def configure(proxy: Proxy, old: str, new: str) -> None:
    config = proxy.folder / "proxy.toml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def reload(proxy: Proxy) -> None:
    """Returns when each worker is a new one that serves."""
    before, workers = {worker.pid for worker in proxy.workers}, len(proxy.workers)
    proxy.process.send_signal(signal.SIGHUP)

    def replaced() -> bool:
        now = {worker.pid for worker in proxy.workers}
        return len(now) == workers and not now & before

    wait_until(replaced, 60)
    wait_until(lambda: answers(proxy), 60)


def answers(proxy: Proxy) -> bool:
    with suppress(OSError, HTTPException):
        return call(proxy.port, "/-/health").status == 200
    return False


def status(proxy: Proxy, key: str, path: str = READS) -> int:
    return call(proxy.port, path, "GET" if path == READS else "POST", f"X-API-Key: {key}").status


def test_new_roles_and_new_keys_count_after_a_reload(tmp_path: Path, upstream: Upstream) -> None:
    old, kept = made("reader")
    new, added = made("deleter")
    with serving(tmp_path / "proxy", upstream, kept) as proxy:
        assert [status(proxy, old), status(proxy, old, WRITES), status(proxy, new)] == [200, 403, 401]
        (proxy.folder / "keys").write_text(lines([added]))
        configure(
            proxy, "[[roles]]\n", '[[roles]]\nname = "deleter"\ntargets = ["prod"]\nallow = ["DeleteRun"]\n[[roles]]\n'
        )
        reload(proxy)
        for _ in range(10):  # whichever worker
            assert [status(proxy, old), status(proxy, new), status(proxy, new, WRITES)] == [401, 403, 200]


def test_a_role_that_lost_an_action_loses_it_with_the_reload(tmp_path: Path, upstream: Upstream) -> None:
    key, kept = made("reader")
    with serving(tmp_path / "proxy", upstream, kept) as proxy:
        configure(proxy, '["Get*"]', '["Search*"]')
        assert status(proxy, key) == 200
        reload(proxy)
        assert {status(proxy, key) for _ in range(10)} == {403}


def test_a_reload_with_mistakes_changes_nothing_and_says_why(tmp_path: Path, upstream: Upstream) -> None:
    key, kept = made("reader")
    with serving(tmp_path / "proxy", upstream, kept) as proxy:
        configure(proxy, "allow = ", "alow = ")
        reload(proxy)
        assert {status(proxy, key) for _ in range(10)} == {200}
        said = proxy.stderr.read_text()
        assert "the configuration has a mistake, so the one from start-up stays in force" in said
        assert "alow" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_go_on_during_reloads(tmp_path: Path, upstream: Upstream, workers: int) -> None:
    """A connection that a worker has just accepted when it stops is closed without an answer, and callers of HTTP try
    again then (RFC 9112, section 9.3.1): that is seldom, and nothing else is lost.
    """
    key, kept = made("reader")
    stop = threading.Event()
    served: list[int] = []
    closed: list[str] = []

    def ask(proxy: Proxy) -> None:
        while not stop.is_set():
            try:
                served.append(status(proxy, key))
            except (RemoteDisconnected, ConnectionResetError) as error:
                closed.append(repr(error))
                served.append(status(proxy, key))

    with serving(tmp_path / "proxy", upstream, kept, workers=workers) as proxy:
        callers = [threading.Thread(target=ask, args=(proxy,)) for _ in range(3)]
        for caller in callers:
            caller.start()
        try:
            for _ in range(2):
                reload(proxy)
        finally:
            stop.set()
            for caller in callers:
                caller.join(60)
    assert set(served) == {200}
    assert len(served) > 100
    assert len(closed) <= 2 * workers * len(callers)
