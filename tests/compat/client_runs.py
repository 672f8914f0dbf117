"""Runs lifecycle.py with some MLflow client, in an environment without AWS, and knows what it must find."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

LIFECYCLE = Path(__file__).with_name("lifecycle.py")

FOUND: dict[str, Any] = {
    "experiments": {
        "renamed": True,
        "by name": True,
        "tag": "O'Neil",
        "deleted": "deleted",
        "in bin": True,
        "restored": "active",
        "pages": [2, 2, 1],
        "paged": True,
        "quoted": True,
        "missing": True,
    },
    "runs": {
        "params": {"rate": "0.1", "depth": "4", "näme": "wért"},
        "metrics": {"loss": 0.25, "acc": 0.75},
        "history": [[1, 0.5], [2, 0.25]],
        "tag": "it's ours",
        "status": "FINISHED",
        "children": True,
        "deleted": "deleted",
        "restored": ["active", "FAILED", "renamed child"],
        "tag gone": True,
    },
    "batch": {"metrics": 1000, "last": True, "params": 100, "tags": 100},
    "run search": {
        "pages": [4, 2],
        "order": [6, 5, 4, 3, 2, 1],
        "quote": 3,
        "unicode": 4,
        "like": 1,
        "name": 1,
        "none": 0,
    },
    "scripts": dict.fromkeys(
        [
            "latin",
            "cyrillic",
            "greek",
            "arabic",
            "hebrew",
            "devanagari",
            "thai",
            "chinese",
            "japanese",
            "korean",
            "emoji",
            "combining",
            "signs",
        ],
        True,
    ),
    "datasets": {"names": ["iris 🌸"], "tags": ["training"], "found": 1},
    "artifacts": {"files": [], "on s3": True},
    "registry": {
        "versions": ["1", "2", "3"],
        "alias": "2",
        "stage": [["3", "Production"]],
        "description": ["now old", "first"],
        "tags": [{"team": "größe"}, {"quality": "gut 👍"}],
        "download": True,
        "pages": [3, 1],
        "left": ["1", "3"],
        "renamed": True,
        "gone": 0,
    },
    "trace infos": {"status": "OK", "tags": {"colour": "grün", "mood": "gut 👍"}, "found": [True], "left": []},
    "logged models": {
        "status": "READY",
        "params": {"depth": "4", "rate": "0.1"},
        "tags": {"quality": "gut 👍", "team": "größe"},
        "found": True,
        "left": 0,
    },
    "traces": {
        "pages": [2, 1],
        "states": ["OK"],
        "tagged": True,
        "tags": [{"colour": "grün"}],
        "deleted": 1,
        "left": 2,
    },
    "assessments": {"value": False, "rationale": "doch nicht", "left": ["answer"]},
    "spans": {"spans": ["inner", "outer"], "inputs": {"question": "größe? 🙂"}},
}


def run_lifecycle(python: Path, url: str, server: str, home: Path) -> dict[str, Any]:
    """What the client of an environment found behind `url`, where MLflow of version `server` is."""
    done = subprocess.run(
        [str(python), str(LIFECYCLE), server],
        env=bare_environment(url, home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def bare_environment(url: str, home: Path) -> dict[str, str]:
    """An environment with the address of MLflow, and nothing else."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "MLFLOW_TRACKING_URI": url,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
