"""The proxy as processes: workers that die come back, SIGTERM lets requests finish, and logs never stop service."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
from tests.faults.callers import Answer, Caller, call, request
from tests.faults.proxies import SERVER_ARN, Proxy, Table, free_port, running, target
from tests.faults.upstreams import Arrived, Peer, Upstream, answer


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.close()


def targets(upstream: Upstream) -> list[Table]:
    return [target("prod", f"http://127.0.0.1:{upstream.port}")]


def assert_nobody_left(family: list[psutil.Process], port: int) -> None:
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    with socket.create_server(("127.0.0.1", port)):
        pass  # the port is free again


def family_of(proxy: Proxy) -> list[psutil.Process]:
    process = psutil.Process(proxy.process.pid)
    return [process, *process.children(recursive=True)]


def test_a_killed_worker_is_replaced(tmp_path: Path, upstream: Upstream) -> None:
    with running(tmp_path / "proxy", targets(upstream), server={"workers": 2}) as proxy:
        before = {worker.pid for worker in proxy.workers}
        assert len(before) == 2
        for victim in sorted(before):
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: _has_two_without(proxy, victim))  # noqa: B023
        assert not before & {worker.pid for worker in proxy.workers}
        wait_until(lambda: _serves(proxy.port))
        for _ in range(20):
            assert call(proxy.port, "/x").status == 200
        family = family_of(proxy)
        assert proxy.stop() == 0
        assert_nobody_left(family, proxy.port)
    # The server tells of it where errors go; standard output is the request log's alone.
    assert "ended unexpectedly (SIGKILL); another one takes its place" in proxy.stderr.read_text()
    assert all(json.loads(line) for line in proxy.stdout.read_text().splitlines())


def test_the_other_worker_serves_meanwhile(tmp_path: Path, upstream: Upstream) -> None:
    with running(tmp_path / "proxy", targets(upstream), server={"workers": 2}) as proxy:
        wait_until(lambda: all(listens(worker) for worker in proxy.workers))
        os.kill(proxy.workers[0].pid, signal.SIGKILL)
        served = sum(_serves(proxy.port) for _ in range(50))
        assert served >= 45  # what the dead one had accepted is lost, nothing else


@pytest.mark.parametrize("pause", [0.0, 0.05, 0.1, 0.2, 0.3])
def test_a_stop_while_workers_start_is_quick(tmp_path: Path, upstream: Upstream, pause: float) -> None:
    with running(tmp_path / "proxy", targets(upstream), server={"workers": 2}) as proxy:
        wait_until(lambda: len(proxy.workers) == 2)
        family = family_of(proxy)
        os.kill(proxy.workers[0].pid, signal.SIGKILL)
        time.sleep(pause)
        assert proxy.stop(15) == 0  # less than drain_timeout
        assert_nobody_left(family, proxy.port)


def test_ctrl_c_and_repeated_stops_end_all_at_once(tmp_path: Path, upstream: Upstream) -> None:
    """A terminal sends SIGINT to the workers, too, and the main process tells them again."""
    with running(tmp_path / "proxy", targets(upstream), server={"workers": 2}) as proxy:
        wait_until(lambda: all(listens(worker) for worker in proxy.workers))
        family = family_of(proxy)
        for _ in range(30):
            for worker in proxy.workers:
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGINT)
        assert len(proxy.workers) == 2, "the main process decides when its workers end"
        proxy.process.send_signal(signal.SIGINT)
        for _ in range(30):
            for worker in family[1:]:
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGTERM)
        assert proxy.stop(15) == 0  # less than drain_timeout
        assert_nobody_left(family, proxy.port)
    said = proxy.stderr.read_text()
    assert "killed" not in said
    assert "unexpectedly" not in said


def test_too_many_callers_take_no_files_from_the_way_to_the_targets(tmp_path: Path, upstream: Upstream) -> None:
    """Beyond what the process may hold, connections wait in the kernel."""
    waiting = threading.Event()

    def together(peer: Peer, arrived: Arrived) -> None:
        if arrived.target == "/together":
            assert waiting.wait(60)
        peer.send(answer(b"whole"))

    upstream.script = together
    server, files = {"workers": 1, "drain_timeout": 5}, 160
    with running(tmp_path / "proxy", targets(upstream), server=server, files=files) as proxy, ExitStack() as stack:
        said = proxy.stderr.read_text()
        assert "the limit of open files is 160: each worker holds at most 32 connections of callers" in said
        callers = [stack.enter_context(Caller(proxy.port)) for _ in range(20)]
        for caller in callers:
            caller.send(request("/x"))
            assert caller.answer().status == 200
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port)))
        wait_until(lambda: "all 32 connections of callers" in proxy.stderr.read_text())
        for caller in callers:
            caller.send(request("/together"))
        upstream.wait_for(40)
        assert proxy.workers[0].num_fds() < files
        waiting.set()
        assert {caller.answer().status for caller in callers} == {200}
        stack.close()
        wait_until(lambda: _serves(proxy.port))


@pytest.mark.parametrize(("signal_", "workers"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_stop_lets_requests_finish(tmp_path: Path, upstream: Upstream, signal_: int, workers: int) -> None:
    stopping = threading.Event()

    def slow(peer: Peer, arrived: Arrived) -> None:
        if arrived.target == "/stream":
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
        assert stopping.wait(20)
        time.sleep(1)
        peer.send(b"def" if arrived.target == "/stream" else answer(b"whole"))

    upstream.script = slow
    with running(tmp_path / "proxy", targets(upstream), server={"workers": workers}) as proxy:
        family = family_of(proxy)
        with Caller(proxy.port) as first, Caller(proxy.port) as second:
            first.send(request("/whole"))
            second.send(request("/stream"))
            response = second.head()
            upstream.wait_for(2)
            proxy.process.send_signal(signal_)
            wait_until(lambda: _refuses(proxy.port))
            stopping.set()
            assert first.answer().body == b"whole"
            assert response.read() == b"abcdef"
        assert proxy.process.wait(20) == 0
        assert_nobody_left(family, proxy.port)


def test_a_stop_does_not_wait_for_ever(tmp_path: Path, upstream: Upstream) -> None:
    def silent(peer: Peer, _: Arrived) -> None:
        peer.wait_closed(30)
        peer.close()

    upstream.script = silent
    server = {"drain_timeout": 1}
    with running(tmp_path / "proxy", targets(upstream), server=server) as proxy:
        family = family_of(proxy)
        with Caller(proxy.port) as caller:
            caller.send(request("/never"))
            upstream.wait_for(1)
            proxy.process.send_signal(signal.SIGTERM)
            proxy.process.wait(20)
            with pytest.raises((HTTPException, OSError)):
                caller.answer()
        assert_nobody_left(family, proxy.port)


def test_unused_connections_of_callers_do_not_hold_up_a_stop(tmp_path: Path, upstream: Upstream) -> None:
    with (
        running(tmp_path / "proxy", targets(upstream)) as proxy,
        Caller(proxy.port) as used,
        Caller(proxy.port),
    ):
        used.send(request("/x"))
        assert used.answer().status == 200
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(15) == 0


def test_every_line_is_written_before_the_end(tmp_path: Path, upstream: Upstream) -> None:
    with running(tmp_path / "proxy", targets(upstream), server={"workers": 2}) as proxy:
        for number in range(100):
            call(proxy.port, "/x", "GET", f"X-Request-Id: line-{number:08d}")
        assert proxy.stop() == 0
        log = proxy.stdout.read_text()
        assert [number for number in range(100) if f'"line-{number:08d}"' not in log] == []


def test_a_log_on_a_full_disk_does_not_stop_service(tmp_path: Path, upstream: Upstream) -> None:
    with (
        Path("/dev/full").open("wb") as full,
        running(tmp_path / "proxy", targets(upstream), stdout=full) as proxy,
    ):
        for _ in range(5):
            for _ in range(50):
                assert call(proxy.port, "/x").status == 200
            time.sleep(0.15)
        assert proxy.stop() == 0


def test_a_log_that_nobody_reads_does_not_stop_service(tmp_path: Path, upstream: Upstream) -> None:
    """First a pipe that is full, then one that is closed."""
    read, write = os.pipe()
    with running(tmp_path / "proxy", targets(upstream), stdout=write) as proxy:
        os.close(write)
        for _ in range(400):
            assert call(proxy.port, "/x").status == 200
        os.close(read)
        for _ in range(5):
            for _ in range(20):
                assert call(proxy.port, "/x").status == 200
            time.sleep(0.15)
        assert len(proxy.workers) == 1


def test_a_second_proxy_on_the_port_says_so_and_ends(tmp_path: Path, upstream: Upstream) -> None:
    with running(tmp_path / "proxy", targets(upstream)) as proxy:
        command = psutil.Process(proxy.process.pid).cmdline()
        env = psutil.Process(proxy.process.pid).environ()
        second = subprocess.run(command, env=env, capture_output=True, timeout=30, check=False)
        assert second.returncode != 0
        assert f"127.0.0.1:{proxy.port}" in second.stderr.decode()
        assert b"already in use" in second.stderr
        assert call(proxy.port, "/x").status == 200


def test_of_two_proxies_started_at_once_one_runs(tmp_path: Path, upstream: Upstream) -> None:
    """Whatever their addresses are, as long as these overlap; and again right after a stop."""
    port = free_port()
    for hosts in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "::")):
        started = [_start(tmp_path / f"{number}.toml", upstream, host, port) for number, host in enumerate(hosts)]
        try:
            wait_until(lambda: any(process.poll() is not None for process in started), 60)  # noqa: B023
            loser, winner = sorted(started, key=lambda process: process.poll() is None)
            assert loser.returncode == 1
            assert f":{port} (server.host, server.port): [Errno 98] Address already in use" in loser.communicate()[1]
            wait_until(lambda: _is_healthy(port), 60)
            winner.terminate()
            assert winner.wait(30) == 0
        finally:
            for process in started:
                with process:
                    process.kill()


def _start(config: Path, upstream: Upstream, host: str, port: int) -> subprocess.Popen[str]:
    config.write_text(
        f'[server]\nhost = "{host}"\nport = {port}\nworkers = 1\n'
        f'[access]\nkeys_file = "{config.with_suffix(".keys")}"\n'
        '[[roles]]\nname = "reader"\ntargets = ["*"]\nallow = ["*"]\n'
        f'[[targets]]\nname = "prod"\narn = "{SERVER_ARN}"\nendpoint = "http://127.0.0.1:{upstream.port}"\n'
    )
    command = [str(Path(sys.executable).with_name("mlflow-proxy")), "serve", "-c", str(config)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _is_healthy(port: int) -> bool:
    with suppress(OSError, HTTPException):
        return call(port, "/-/health").status == 200
    return False


def _serves(port: int) -> bool:
    with suppress(OSError, HTTPException):
        got: Answer = call(port, "/x")
        return got.status == 200
    return False


def _has_two_without(proxy: Proxy, victim: int) -> bool:
    pids = {worker.pid for worker in proxy.workers}
    return len(pids) == 2 and victim not in pids


def listens(process: psutil.Process) -> bool:
    return any(connection.status == psutil.CONN_LISTEN for connection in process.net_connections("tcp"))


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(psutil.NoSuchProcess):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)
