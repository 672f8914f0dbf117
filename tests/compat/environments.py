"""Environments with one MLflow each and nothing of this project, made when they are first needed (a few seconds with a
warm cache, up to a minute without).
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEWEST = importlib.metadata.version("mlflow")
OLDEST = "2.16.2"

# What they need beside themselves: boto3 for artifacts on S3; for the older ones pkg_resources, which setuptools 81
# dropped, and a class that SQLAlchemy 2.1 dropped. They cap neither.
_BESIDE = ("boto3", "setuptools<81", "sqlalchemy<2.1")

# The newest Python that an MLflow can be installed in: 2.16 wants pyarrow below 18, which has no wheels for 3.13.
_NEWEST_PYTHON = {OLDEST: (3, 12)}


def python_of(version: str) -> Path:
    """The interpreter of an environment in which exactly this MLflow is installed.

    Skips the test if this machine has no Python that this MLflow can be installed in.
    """
    folder = ROOT / f".venv-mlflow-{version}"
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if not complete.exists():
        uv = str(Path(sys.executable).with_name("uv"))
        _run(uv, "venv", "--quiet", "--clear", "--python", _base_python(uv, version), str(folder))
        _run(uv, "pip", "install", "--quiet", "--python", str(python), f"mlflow=={version}", *_BESIDE)
        complete.touch()
    return python


def _base_python(uv: str, version: str) -> str:
    newest = _NEWEST_PYTHON.get(version)
    if newest is None or sys.version_info[:2] <= newest:
        return sys.executable
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    for minor in range(newest[1], 10, -1):
        command = [uv, "python", "find", "--system", f"3.{minor}"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    pytest.skip(f"MLflow {version} needs Python 3.11 to {newest[0]}.{newest[1]}, and none is installed")


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
