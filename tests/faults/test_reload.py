"""SIGHUP, which `systemctl reload` sends: roles and keys are read again while requests go on."""

from __future__ import annotations

import json
import signal
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from http.client import HTTPException, HTTPSConnection, RemoteDisconnected
from pathlib import Path

import pytest
from tests.faults.callers import call
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, Table, running, target
from tests.faults.test_processes import listens, wait_until
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
def serving(folder: Path, upstream: Upstream, *keys: Key, workers: int = 2, host: str = "127.0.0.1") -> Iterator[Proxy]:
    """A proxy that lets the role `reader` read."""
    folder.mkdir()
    (folder / "keys").write_text(lines(keys))
    roles: list[Table] = [{"name": "reader", "targets": ["prod"], "allow": ["Get*"]}]
    with running(
        folder,
        [target("prod", f"http://127.0.0.1:{upstream.port}")],
        server={"host": host, "workers": workers},
        environ={"TMPDIR": str(folder)},
        sections={"access": {"keys_file": str(folder / "keys")}, "limits": {"auth_failure_rate": "none"}},
        roles=roles,
    ) as proxy:
        yield proxy


def replace_file(path: Path, text: str) -> None:
    """All at once, as `mlflow-proxy keys` does."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def proxy_folder(proxy: Proxy) -> Path:
    """What its workers share."""
    return next(proxy.folder.glob("mlflow-proxy-*"))


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


def refused(proxy: Proxy) -> str:
    """The line that a reload leaves that is not taken. It replaces no worker."""
    before, told = {worker.pid for worker in proxy.workers}, proxy.stderr.read_text().count("reload: refused")
    proxy.process.send_signal(signal.SIGHUP)
    wait_until(lambda: proxy.stderr.read_text().count("reload: refused") > told, 60)
    assert {worker.pid for worker in proxy.workers} == before
    return last_line(proxy, "reload: refused, so nothing has changed: ")


def last_line(proxy: Proxy, text: str) -> str:
    return [line for line in proxy.stderr.read_text().splitlines() if text in line][-1].partition(text)[2]


def replace_a_worker(proxy: Proxy) -> None:
    """End the oldest; returns when another one serves in its place."""
    victim, workers = min(proxy.workers, key=lambda worker: float(worker.create_time())), len(proxy.workers)
    victim.kill()
    wait_until(lambda: len(proxy.workers) == workers and victim.pid not in {each.pid for each in proxy.workers}, 60)
    wait_until(lambda: all(listens(worker) for worker in proxy.workers), 60)


def outlive_the_crash_loop(proxy: Proxy) -> None:
    """The server ends if a worker dies that it has replaced less than 5.5 seconds ago."""
    wait_until(lambda: all(time.time() - worker.create_time() > 6 for worker in proxy.workers))


def test_a_refused_reload_changes_nothing_and_says_why(tmp_path: Path, upstream: Upstream) -> None:
    """What an earlier reload closed stays closed, for workers that are born later, too."""
    key, kept = made("reader")
    with serving(tmp_path / "proxy", upstream, kept) as proxy:
        assert status(proxy, key) == 200
        configure(proxy, '["Get*"]', '["Search*"]')
        reload(proxy)
        assert last_line(proxy, "reload: taken; ") == "changed: roles[reader].allow"
        configure(proxy, 'allow = ["Search*"]', 'alow = ["Get*"]')
        configure(proxy, "workers = 2", "workers = 0")
        mistakes = refused(proxy)
        assert "alow: no such option; did you mean allow?" in mistakes
        assert "server.workers" in mistakes
        outlive_the_crash_loop(proxy)
        replace_a_worker(proxy)
        assert {status(proxy, key) for _ in range(10)} == {403}
        (proxy.folder / "proxy.toml").unlink()
        assert "cannot be read (No such file or directory)" in refused(proxy)
        replace_a_worker(proxy)
        assert {status(proxy, key) for _ in range(10)} == {403}


def test_keys_that_cannot_be_read_stay_as_they_were(tmp_path: Path, upstream: Upstream) -> None:
    """Also for workers that are born meanwhile, and with the changes that were made while the service ran."""
    (old, old_key), (new, new_key), (unknown, _) = made("reader"), made("reader"), made("reader")
    with serving(tmp_path / "proxy", upstream, old_key) as proxy:
        assert status(proxy, old) == 200
        path = proxy.folder / "keys"
        replace_file(path, lines([replace(old_key, revoked=old_key.created), new_key]))
        wait_until(lambda: {status(proxy, new) for _ in range(10)} == {200})

        def assert_as_before() -> None:
            answers = {(status(proxy, old), status(proxy, new), status(proxy, unknown)) for _ in range(10)}
            assert answers == {(401, 200, 401)}

        for text, reason in (
            (None, "does not exist; `mlflow-proxy keys new` makes it"),
            ("", "is empty; `mlflow-proxy keys new` adds keys"),
            ('{"id": "half', "line 1: is not JSON"),
        ):
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)
            assert f"access.keys_file: {path} {reason}" in refused(proxy)
            replace_a_worker(proxy)
            assert_as_before()
        path.write_text(lines([old_key]))
        wait_until(lambda: {status(proxy, new) for _ in range(10)} == {401})
        assert status(proxy, old) == 200
        kept = [file for file in proxy_folder(proxy).rglob("keys/*") if file.is_file()]
        assert kept
        assert {file.stat().st_mode & 0o777 for file in kept} == {0o600}
        assert new.rpartition("_")[2] not in "".join(file.read_text() for file in kept)


def test_what_waits_for_a_restart_is_named_and_waits(tmp_path: Path, upstream: Upstream) -> None:
    key, kept = made("reader")
    with serving(tmp_path / "proxy", upstream, kept, workers=1) as proxy:
        configure(proxy, f"port = {proxy.port}", f"port = {proxy.port + 1}\ndrain_timeout = 5\nurl_limit = 2048")
        configure(proxy, "workers = 1", "workers = 2")
        reload(proxy)
        assert last_line(proxy, "reload: taken; ") == (
            "changed: server.url_limit; only a restart changes server.port, server.workers, server.drain_timeout"
        )
        assert status(proxy, key) == 200
        assert call(proxy.port, "/" + "x" * 4096).status == 414


def test_no_reload_opens_an_address_that_stays(tmp_path: Path, upstream: Upstream) -> None:
    """Without keys the new address would be harmless, but the old one counts until a restart."""
    key, kept = made("reader")
    with serving(tmp_path / "proxy", upstream, kept, workers=1, host="0.0.0.0") as proxy:
        configure(proxy, "0.0.0.0", "127.0.0.1")
        configure(proxy, "keys_file", "# keys_file")
        assert "server.host: '0.0.0.0' can be reached from other machines" in refused(proxy)
        assert call(proxy.port, READS).status == 401
        assert status(proxy, key) == 200


def test_certificates_are_renewed_whole_or_not_at_all(tmp_path: Path, upstream: Upstream) -> None:
    authority, other = Authority(tmp_path, "one"), Authority(tmp_path, "other")
    certificate, tls_key, bundle = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"

    def install(authority: Authority) -> None:
        for source, path in zip(authority.issue("127.0.0.1"), (certificate, tls_key), strict=True):
            path.write_bytes(source.read_bytes())

    def verified(authority: Authority) -> bool:
        context = ssl.create_default_context(cafile=authority.bundle)
        with suppress(ssl.SSLCertVerificationError):
            connection = HTTPSConnection("127.0.0.1", proxy.port, timeout=10, context=context)
            connection.request("GET", "/-/health")
            return connection.getresponse().status == 200
        return False

    install(authority)
    bundle.write_bytes(authority.bundle.read_bytes())
    with running(
        tmp_path / "proxy",
        [target("prod", f"https://127.0.0.1:{upstream.port}", ca_bundle=str(bundle))],
        server={"tls_certificate": str(certificate), "tls_key": str(tls_key), "workers": 2},
    ) as proxy:
        assert verified(authority)
        for path, option in ((certificate, "server.tls_certificate"), (bundle, "targets[1].ca_bundle")):
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            assert option in refused(proxy)
            replace_a_worker(proxy)
            assert verified(authority)
            path.write_bytes(whole)
        install(other)
        before = {worker.pid for worker in proxy.workers}
        proxy.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & {worker.pid for worker in proxy.workers}, 60)
        assert all(verified(other) for _ in range(10))
        assert last_line(proxy, "reload: taken; ") == (
            "changed: server.tls_certificate (contents), server.tls_key (contents)"
        )


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
