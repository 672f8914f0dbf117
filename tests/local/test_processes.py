"""Nothing that the stand-in started outlives it, however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlflow_proxy.local import LocalError, LocalSageMaker

Command = subprocess.Popen[str]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """`mlflow-proxy local`, once it says that it is ready."""
    code = (
        "import sys; from pathlib import Path; from mlflow_proxy.local import run_local; "
        "sys.exit(run_local(Path(sys.argv[1]), port=0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    process.kill()
    process.wait()


def read_until(process: Command, text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"it ended before it said {text!r}: {seen}")


def gone_within(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended; a zombie has, and only waits for whoever inherited it to take note."""
    deadline = time.monotonic() + seconds
    while any(_runs(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end(command: Command, number: signal.Signals) -> None:
    said = read_until(command, "Ctrl-C ends it.")
    for needed in ("export AWS_ACCESS_KEY_ID=AKIA", "export MLFLOW_TRACKING_URI=arn:", "[[targets]]", "/_local/faults"):
        assert needed in said
    children = psutil.Process(command.pid).children(recursive=True)
    assert len(children) == 2
    command.send_signal(number)
    assert command.wait(30) == 0
    assert gone_within(children, 10)


def test_told_to_end_while_starting(command: Command) -> None:
    read_until(command, "starts")
    children = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(signal.SIGTERM)
    assert command.wait(30) == 0
    assert gone_within(children, 10)


def test_it_says_that_it_is_still_starting(command: Command) -> None:
    read_until(command, "MLflow for app starts")
    children = psutil.Process(command.pid).children(recursive=True)
    for child in children:
        child.suspend()
    said = read_until(command, "still starting after")
    assert said.endswith("s: MLflow for tracking and app\n")
    for child in children:
        child.kill()
    assert command.wait(30) == 1


@pytest.mark.parametrize("when", ["starts", "Ctrl-C ends it."])
def test_killed(command: Command, when: str) -> None:
    read_until(command, when)
    children = psutil.Process(command.pid).children(recursive=True)
    assert children
    command.kill()
    command.wait()
    assert gone_within(children, 30)


def test_port_in_use(tmp_path: Path) -> None:
    code = """
import socket, sys
from pathlib import Path
from mlflow_proxy.local import run_local
taken = socket.socket(); taken.bind(("127.0.0.1", 0)); taken.listen()
sys.exit(run_local(Path(sys.argv[1]), port=taken.getsockname()[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"did not start: Port \d+ on 127.0.0.1 cannot be had.*Choose another", done.stdout)


def test_mlflow_that_does_not_start(tmp_path: Path) -> None:
    """The error names the log and shows its end; nothing is left running."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no mlflow here\nexit 3\n")
    broken.chmod(0o755)
    code = """
import sys
import time
from pathlib import Path
from mlflow_proxy.local import LocalError, LocalSageMaker
try:
    LocalSageMaker(Path(sys.argv[1]), mlflow_python=Path(sys.argv[2])).start()
except LocalError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state"), str(broken)], capture_output=True, text=True, check=False
    )
    assert re.search(r"MLflow for \w+ ended while starting; see .*/mlflow.log\nno mlflow here", done.stdout), done


def test_another_interpreters_mlflow(tmp_path: Path) -> None:
    """With `mlflow_python` the command line of that environment's MLflow runs, whose server is a child of its own."""
    code = """
import sys, time
from pathlib import Path
from mlflow_proxy.local import LocalSageMaker
with LocalSageMaker(Path(sys.argv[1]), app=False, mlflow_python=Path(sys.executable)) as running:
    print(*running.mlflow_pids.values(), running.mlflow_urls, flush=True)
    sys.stdin.read()
"""
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    read_until(command, "tracking")
    children = psutil.Process(command.pid).children(recursive=True)
    assert len(children) >= 2
    command.kill()
    command.communicate()
    assert gone_within(children, 30)


def test_before_it_was_started(tmp_path: Path) -> None:
    idle = LocalSageMaker(tmp_path)
    with pytest.raises(LocalError, match="has not been started"):
        idle.environment()
    idle.stop()
    assert os.listdir(tmp_path) == []
