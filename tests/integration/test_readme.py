"""What README tells people to paste works as it stands there, in both modes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.compat.client_runs import bare_environment
from tests.compat.environments import NEWEST, ROOT, python_of

from mlflow_proxy.local.walkthrough import CLIENT, CURL

README = (ROOT / "README.md").read_text("utf-8")


def block_with(text: str) -> str:
    """The block of README that holds `text`."""
    blocks: list[str] = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if text in block]
    return block


def test_readme_has_the_commands_of_the_demo() -> None:
    assert CURL in block_with("curl -s")
    assert CLIENT in block_with("import mlflow")


def test_the_seven_calls(mode_url: str, tmp_path: Path) -> None:
    block = block_with("curl -s")
    lines = block.splitlines()
    assert lines[0].startswith("PROXY=http://127.0.0.1:8080")
    assert lines[1].startswith("# PROXY=http://127.0.0.1:8080/t/app")
    assert len(re.findall(r"^(?:[A-Z]+=\$\()?curl ", block, re.MULTILINE)) == 7
    script = "\n".join([f"PROXY={mode_url}", *lines[1:]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=bare_environment("", tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    named = re.match(r"experiment (\d+)\n", done.stdout)
    assert named is not None, done.stdout
    run = re.search(r"run ([0-9a-f]{32})$", done.stdout, re.MULTILINE)
    assert run is not None, done.stdout
    answers = _json_values(done.stdout)
    search, got, listed, *rest = answers
    assert named[1] in [each["experiment_id"] for each in search["experiments"]]
    assert got["experiment"]["experiment_id"] == named[1]
    assert got["experiment"]["name"].startswith("hello-")
    assert listed["root_uri"].startswith("s3://")
    assert run[1] in listed["root_uri"]
    assert rest == [{}, {}]
    assert "error_code" not in done.stdout


@pytest.mark.parametrize("place", ["clone", "elsewhere"])
def test_the_client(mode_url: str, place: str, tmp_path: Path) -> None:
    """As printed, in a folder that has the clone's `.venv`, or one with nothing but MLflow in it."""
    lines = block_with("import mlflow").splitlines()
    assert lines[0].startswith("export MLFLOW_TRACKING_URI=http://127.0.0.1:8080 ")
    assert lines[1].startswith("# export MLFLOW_TRACKING_URI=http://127.0.0.1:8080/t/app ")
    venv = Path(sys.prefix) if place == "clone" else python_of(NEWEST).parent.parent
    (tmp_path / ".venv").symlink_to(venv)
    environment = bare_environment("", tmp_path)
    del environment["MLFLOW_TRACKING_URI"]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([f"export MLFLOW_TRACKING_URI={mode_url}", *lines[1:]])],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^0 +[0-9a-f]{32} +0\.5$", done.stdout, re.MULTILINE), done.stdout


def _json_values(text: str) -> list[dict[str, Any]]:
    """All JSON objects in a text, in order."""
    decoder = json.JSONDecoder()
    found = []
    at = text.find("{")
    while at >= 0:
        value, end = decoder.raw_decode(text, at)
        found.append(value)
        at = text.find("{", end)
    return found
