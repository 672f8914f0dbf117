"""MLflow tracking servers as subprocesses.

For the MLflow of this interpreter the very uvicorn command is run that `mlflow server` ends in, without the
command line before it, which would import MLflow a second time: three seconds and 260 MB instead of six and
520 MB. Another interpreter's MLflow, of whatever version, is run through its `mlflow server`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from .errors import LocalError

_LAUNCH = Path(__file__).with_name("launch.py")
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0


class MlflowServer:
    """One `mlflow server`: SQLite, artifacts on S3 and not served by it, one worker, 127.0.0.1."""

    def __init__(
        self, name: str, folder: Path, artifact_root: str, *, workspaces: bool, python: Path | None = None
    ) -> None:
        self.name = name
        self.log = folder / "mlflow.log"
        self._folder = folder
        self._database = f"sqlite:///{folder / 'mlflow.db'}"
        self._artifact_root = artifact_root
        self._workspaces = workspaces
        self._python = python
        self._reserved = _reserve_port()
        self._port = int(self._reserved.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Its process, which leads a group of its own."""
        return None if self._process is None else self._process.pid

    def start(self, aws: Mapping[str, str]) -> None:
        """Start the process; `aws` is the environment in which it finds S3."""
        self._folder.mkdir(parents=True, exist_ok=True)
        launch = [str(self._python or sys.executable), str(_LAUNCH), str(os.getpid())]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (fixed arguments)
                [*launch, *(self._direct() if self._python is None else self._command_line())],
                cwd=self._folder,
                env=self._environment(aws),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers a search, which it does once its database is made; raises LocalError."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise LocalError(f"MLflow for {self.name} ended while starting; see {self.log}\n{self._tail()}")
            if self._answers():
                return
            time.sleep(0.05)
        raise LocalError(f"MLflow for {self.name} did not answer in {_START_SECONDS:g} s; see {self.log}")

    def version(self) -> str:
        """Its MLflow version, asked of the server itself."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request("GET", "/version")
        answer = connection.getresponse().read().decode()
        connection.close()
        return answer

    def stop(self) -> None:
        """End the process and its group."""
        self._reserved.close()
        if self._process is None:
            return
        _signal_group(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        _signal_group(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _direct(self) -> list[str]:
        listen = ["--host", "127.0.0.1", "--port", str(self._port), "--timeout-graceful-shutdown", "2"]
        return ["uvicorn", "mlflow.server.fastapi_app:app", "--workers", "1", "--no-access-log", *listen]

    def _command_line(self) -> list[str]:
        store = ["--backend-store-uri", self._database, "--default-artifact-root", self._artifact_root]
        listen = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        return ["mlflow", "server", "--no-serve-artifacts", *store, *listen]

    def _environment(self, aws: Mapping[str, str]) -> dict[str, str]:
        foreign = ("MLFLOW_", "_MLFLOW_", "AWS_", "PYTHON")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        # Without PYTHONDONTWRITEBYTECODE (dropped with the rest), only the first start ever compiles MLflow.
        return {
            **inherited,
            **aws,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "MLFLOW_MODEL_CATALOG_URI": "",  # the models that MLflow came with, without asking GitHub
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ENABLE_WORKSPACES": str(self._workspaces).lower(),  # MLflow before 3.10 does not know it
            "_MLFLOW_SERVER_FILE_STORE": self._database,
            "_MLFLOW_SERVER_REGISTRY_STORE": self._database,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": self._artifact_root,
            "_MLFLOW_SGI_NAME": "uvicorn",
        }

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            body = json.dumps({"max_results": 1})
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/api/2.0/mlflow/experiments/search", body, headers)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _reserve_port() -> socket.socket:
    """A socket that keeps a free port from being given to anyone who asks for any port, until it is closed.

    It does not listen, and allows reuse as MLflow's server does, so that server can listen there.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
