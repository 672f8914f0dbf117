"""A real Redis server for the tests of the shared storage."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RedisServer:
    """One that can be killed, stopped for a while, and started again on its port; it keeps nothing."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        self.port = free_port()
        self._folder = folder
        self._options = (*options, *(("--port", "0", "--tls-port") if tls else ("--port",)), str(self.port))
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *self._options]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        while self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError((self._folder / "redis.log").read_text("utf-8"))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes connections and answers nothing: the kernel goes on accepting for a stopped process."""
        process = self._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)  # nothing happens if it was killed meanwhile

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, decode_responses=True)

    def command(self, *words: str) -> None:
        execute: Callable[..., object] = self.client().execute_command
        execute(*words)
