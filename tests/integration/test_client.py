"""MLflow's own client, without AWS's plugin, AWS variables or AWS credentials, in both modes."""

from __future__ import annotations

from pathlib import Path

from tests.compat.client_runs import FOUND, run_lifecycle
from tests.compat.environments import NEWEST, OLDEST, python_of


def test_the_whole_lifecycle(mode_url: str, tmp_path: Path) -> None:
    answer = run_lifecycle(python_of(NEWEST), mode_url, NEWEST, tmp_path)
    assert answer == {"client": NEWEST, "found": FOUND, "skipped": {}}


def test_an_old_client(mode_url: str, tmp_path: Path) -> None:
    answer = run_lifecycle(python_of(OLDEST), mode_url, NEWEST, tmp_path)
    later = {"logged models", "traces", "assessments", "spans"}
    assert set(answer["skipped"]) == later
    assert answer["found"] == {name: found for name, found in FOUND.items() if name not in later}
