"""What is asked of each peer, and the tools that ask: wrk for small requests, a small reader for the download."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.processes import Server

WRK_SCRIPT = Path(__file__).with_name("wrk.lua")
READY_PATH = "/api/2.0/mlflow/experiments/get?experiment_id=1"
DOWNLOAD_PATH = "/get-artifact?path=model.bin&run_uuid=0f3c1b7e5d2a49c68b0a7d1e2f3c4b5a"
NO_HEADERS: Mapping[str, str] = {}
_SAMPLE_EVERY = 0.05
_BUFFER = 1 << 20


class LoadError(Exception):
    """A load that could not be put on, or an answer that was not the expected one."""


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of request at one number of connections."""

    title: str
    method: str
    path: str
    connections: int
    tls: bool = False

    @property
    def label(self) -> str:
        """As it is written in tables."""
        return f"{self.title}, {self.connections} connection{'s' if self.connections > 1 else ''}"


def _get(connections: int, *, tls: bool = False) -> Load:
    return Load("GET over TLS" if tls else "small GET", "GET", READY_PATH, connections, tls)


def _post(connections: int) -> Load:
    return Load("20 KB POST", "POST", "/api/2.0/mlflow/runs/log-batch", connections)


LOADS = (_get(1), _get(32), _get(256), _post(1), _post(32), _post(256))
TLS_LOAD = _get(32, tls=True)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run of a load showed. Latencies in milliseconds, CPU time of the peer in microseconds a request."""

    requests: int
    seconds: float
    failed: int
    p50: float
    p99: float
    cpu: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one download showed. `growth`: by how much the fastest growing process grew meanwhile, in bytes."""

    bytes: int
    seconds: float
    cpu: float
    growth: int

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds


def find_wrk() -> str:
    """The load generator's path; LoadError when it is not installed."""
    found = shutil.which("wrk")
    if found is None:
        raise LoadError("wrk is not installed; on Debian and Ubuntu: apt-get install wrk")
    return found


def batch_body() -> bytes:
    """A log-batch request as MLflow's clients send it, 20 KB."""
    metrics = [
        {
            "key": f"train/loss_{index:04d}",
            "value": 0.5 + index / 4096,
            "timestamp": 1700000000000 + index,
            "step": index,
        }
        for index in range(215)
    ]
    body = json.dumps({"run_id": "0f3c1b7e5d2a49c68b0a7d1e2f3c4b5a", "metrics": metrics}).encode()
    return body[:-1] + b" " * (20_480 - len(body)) + b"}"


def expect_answer(port: int, load: Load, body: bytes, extra: Mapping[str, str]) -> None:
    """One request of this load must give 200 and JSON, before anything is measured."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {**extra, **({"Content-Type": "application/json"} if load.method == "POST" else {})}
        connection.request(load.method, load.path, body if load.method == "POST" else None, headers)
        response = connection.getresponse()
        text = response.read()
        if response.status != 200 or b'"experiments"' not in text:
            raise LoadError(f"{load.method} {load.path} answered {response.status}: {text[:300]!r}")
    except OSError as error:
        raise LoadError(f"{load.method} {load.path} was not answered: {error}") from error
    finally:
        connection.close()


def put_on(
    load: Load, server: Server, port: int, body: Path, seconds: float, *, headers: Mapping[str, str] = NO_HEADERS
) -> Sample:
    """Run wrk for `seconds`, a fraction allowed, and count what the server's processes spent meanwhile."""
    before = server.cpu_seconds()
    shown = _run_wrk(load, port, body, seconds, headers)
    cpu = server.cpu_seconds() - before
    requests = int(shown["requests"])
    if requests == 0:
        raise LoadError(f"{server.name} answered nothing within {seconds} s ({load.label})\n{server.log_tail()}")
    return Sample(
        requests=requests,
        seconds=shown["microseconds"] / 1e6,
        failed=int(shown["refused"] + shown["broken"]),
        p50=shown["p50"] / 1e3,
        p99=shown["p99"] / 1e3,
        cpu=cpu / requests * 1e6,
    )


def _run_wrk(load: Load, port: int, body: Path, seconds: float, headers: Mapping[str, str]) -> dict[str, float]:
    command = [find_wrk(), "-t1", f"-c{load.connections}", "-d60s", "--timeout", "30s", "--latency"]
    command += [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    command += ["-s", str(WRK_SCRIPT), f"http://127.0.0.1:{port}{load.path}", "--", load.method]
    command += [str(body)] if load.method == "POST" else []
    # wrk takes whole seconds only, but ends at once and in order on SIGINT.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as wrk:
        try:
            time.sleep(seconds)
            wrk.send_signal(signal.SIGINT)
            output = wrk.communicate(timeout=30)[0]
        except BaseException:
            wrk.kill()
            raise
    lines = output.strip().splitlines()
    if wrk.returncode or not lines or not lines[-1].startswith("{"):
        raise LoadError(f"wrk failed ({wrk.returncode}): {output[-300:]}")
    shown: dict[str, float] = json.loads(lines[-1])
    return shown


def download(server: Server, port: int, size: int, headers: Mapping[str, str] = NO_HEADERS) -> Transfer:
    """Read a file of `size` bytes through the peer, and watch the memory of its processes while it streams."""
    tree = server.tree()
    watch = _Watch(tree)
    before, began = server.cpu_seconds(), time.monotonic()
    received = _read(port, headers, watch.look)
    seconds = time.monotonic() - began
    if received != size:
        raise LoadError(f"{server.name} sent {received} of {size} bytes\n{server.log_tail()}")
    return Transfer(received, seconds, server.cpu_seconds() - before, watch.growth)


def _read(port: int, headers: Mapping[str, str], each: Callable[[], None]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", DOWNLOAD_PATH, headers=dict(headers))
        response = connection.getresponse()
        if response.status != 200:
            raise LoadError(f"the download answered {response.status}: {response.read(300)!r}")
        buffer, received = memoryview(bytearray(_BUFFER)), 0
        while count := response.readinto(buffer):
            received += count
            each()
        return received
    except (OSError, http.client.HTTPException) as error:
        raise LoadError(f"the download broke off: {error}") from error
    finally:
        connection.close()


class _Watch:
    """The resident memory of some processes, looked at every now and then."""

    def __init__(self, tree: list[psutil.Process]) -> None:
        self._first = {process: process.memory_info().rss for process in tree}
        self._next = 0.0
        self.growth = 0

    def look(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _SAMPLE_EVERY
        for process, first in self._first.items():
            with suppress(psutil.NoSuchProcess):
                self.growth = max(self.growth, process.memory_info().rss - first)
