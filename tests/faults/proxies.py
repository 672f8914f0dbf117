"""The real proxy in a process of its own, as an operator runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ACCESS_KEY = "AKIDEXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SERVER_ARN = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/team"
APP_ARN = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-app/app-ABCDEFGHIJKL"

Table = Mapping[str, Any]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def target(name: str, endpoint: str, **options: Any) -> Table:
    return {"name": name, "arn": SERVER_ARN, "endpoint": endpoint, **options}


class Proxy:
    """One `mlflow-proxy serve` under a configuration of its own."""

    def __init__(
        self,
        folder: Path,
        targets: list[Table],
        *,
        server: Table | None = None,
        upstream: Table | None = None,
        sections: Mapping[str, Table] | None = None,
        roles: list[Table] | None = None,
        environ: Table | None = None,
        stdout: Any = None,
        port: int | None = None,
        files: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.folder = folder
        self.secure = "tls_certificate" in (server or {})
        self.stdout = folder / "stdout"
        self.stderr = folder / "stderr"
        tables = {
            "server": {"port": self.port, "workers": 1, **(server or {})},
            "upstream": upstream or {},
            **(sections or {}),
        }
        text = "".join(f"[{name}]\n{_toml(table)}" for name, table in tables.items())
        text += "".join(f"[[roles]]\n{_toml(table)}" for table in roles or ())
        text += "".join(f"[[targets]]\n{_toml(table)}" for table in targets)
        config = folder / "proxy.toml"
        config.write_text(text)
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            **(environ or {}),
        }
        command = [str(Path(sys.executable).with_name("mlflow-proxy")), "serve", "-c", str(config)]
        if files is not None:
            command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout or out, stderr=err
            )
        try:
            self.wait_until_serving()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def wait_until_serving(self, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.stderr.read_text()
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
                    # The main process listens before there are workers, which this wait is for.
                    probe.settimeout(max(0.1, end - time.monotonic()))
                    if not self.secure:
                        probe.sendall(b"GET /-/health HTTP/1.0\r\nHost: localhost\r\n\r\n")
                        assert probe.recv(12) == b"HTTP/1.1 200"
                    elif len(self.workers) == 0:
                        raise OSError
                    return
            except OSError:
                assert time.monotonic() < end, self.stderr.read_text()
                time.sleep(0.05)

    @property
    def workers(self) -> list[psutil.Process]:
        """The worker processes, without multiprocessing's own helper."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    def log_line(self, request_id: str, seconds: float = 10.0) -> dict[str, Any]:
        """What the proxy logged about a request."""
        return self._line(self.stdout, f'"{request_id}"', seconds)

    def audit_line(self, request_id: str, seconds: float = 10.0) -> dict[str, Any]:
        """What the audit log, on standard error, has about a request."""
        return self._line(self.stderr, f'"request_id": "{request_id}"', seconds)

    def _line(self, file: Path, mark: str, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            for line in file.read_text().splitlines():
                if mark in line:
                    fields = json.loads(line)
                    assert isinstance(fields, dict)
                    return fields
            assert time.monotonic() < end, f"no line with {mark}"
            time.sleep(0.05)

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def running(
    folder: Path,
    targets: list[Table],
    *,
    server: Table | None = None,
    upstream: Table | None = None,
    sections: Mapping[str, Table] | None = None,
    roles: list[Table] | None = None,
    environ: Table | None = None,
    stdout: Any = None,
    port: int | None = None,
    files: int | None = None,
) -> Iterator[Proxy]:
    """A proxy that may have `files` open, and is ended with its process tree, whatever happens."""
    folder.mkdir(exist_ok=True)
    proxy = Proxy(
        folder,
        targets,
        server=server,
        upstream=upstream,
        sections=sections,
        roles=roles,
        environ=environ,
        stdout=stdout,
        port=port,
        files=files,
    )
    tree = psutil.Process(proxy.process.pid)
    try:
        yield proxy
    finally:
        family = [tree, *tree.children(recursive=True)] if tree.is_running() else []
        try:
            proxy.stop()
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
            proxy.process.wait(10)


def _toml(table: Table) -> str:
    return "".join(f"{name} = {_value(value)}\n" for name, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_value(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)
