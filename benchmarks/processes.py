"""A server as an operating-system process: start it, wait until it answers, weigh it, end it.

Everything is counted over the whole process tree, as the kernel reports it. A server is ended through the process
that was started here, and then whatever is left of its own children; nothing is ever found by name.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_DEADLINE = 30.0
END_DEADLINE = 5.0
_POLL = 0.01
_QUIET = 0.3


class ServerError(Exception):
    """A server that ended or did not answer; the message carries the end of its log."""


@dataclass(frozen=True, slots=True)
class Startup:
    """What a start cost, in seconds. `settled_cpu` also counts what the tree did after its first answer."""

    wall: float
    cpu: float
    settled_cpu: float


class Server:
    """A running server and its process tree."""

    def __init__(self, name: str, process: psutil.Popen, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    def tree(self) -> list[psutil.Process]:
        """The started process and all below it."""
        try:
            return [psutil.Process(self._process.pid), *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise ServerError(f"{self.name} ended by itself\n{self.log_tail()}") from None

    def cpu_seconds(self) -> float:
        """User and system time of the tree so far, children that ended included."""
        total = 0.0
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def peak_resident(self) -> int:
        """Bytes of the largest process of the tree at its largest moment (VmHWM)."""
        return max(_peak(process.pid) for process in self.tree())

    def log_tail(self, size: int = 2000) -> str:
        """The end of what it wrote, for error messages."""
        return self.log.read_text("utf-8", errors="replace")[-size:]

    def trim_log(self) -> None:
        """Empty the log, which the server has open for appending, so that a long run does not fill the disk."""
        os.truncate(self.log, 0)

    def wait_for(self, port: int, path: str) -> None:
        """Return once GET `path` answers 200; ServerError when the server ends first or the deadline passes."""
        deadline = time.monotonic() + START_DEADLINE
        while not _answers(port, path):
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} ended while starting\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not answer within {START_DEADLINE:.0f} s\n{self.log_tail()}")
            time.sleep(_POLL)

    def settle(self) -> None:
        """Wait until the tree has used no CPU time for a moment, a few seconds at most."""
        deadline = time.monotonic() + END_DEADLINE
        before = self.cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(_QUIET)
            now = self.cpu_seconds()
            if now - before < 0.01:
                return
            before = now

    def end(self) -> None:
        """SIGTERM to the started process; what has not ended by the deadline is killed, child by child."""
        try:
            tree = self.tree()
        except ServerError:
            return
        with suppress(psutil.NoSuchProcess):
            self._process.terminate()
        _, alive = psutil.wait_procs([self._process, *tree[1:]], timeout=END_DEADLINE)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=END_DEADLINE)


@contextmanager
def running(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Server]:
    """Start `command`, its output going to `log`; it is ended on the way out, however that way is taken."""
    with log.open("ab") as output:
        process = psutil.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the benchmark, which then ends everything in order
        )
    server = Server(name, process, log)
    try:
        yield server
    finally:
        server.end()


def timed_start(server: Server, port: int, path: str) -> Startup:
    """Wait for the first answer of a server just started, and say what it took."""
    began = time.monotonic()
    server.wait_for(port, path)
    wall, cpu = time.monotonic() - began, server.cpu_seconds()
    server.settle()
    return Startup(wall, cpu, server.cpu_seconds())


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _peak(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
