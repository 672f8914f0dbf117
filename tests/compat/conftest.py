"""MLflow servers of other versions, each with a proxy before it.

The newest and the oldest run with all tests; those between only when these tests are asked for: `make compat`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.compat.environments import ROOT, python_of
from tests.faults.proxies import running


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("compat" in argument for argument in config.args):
        return
    for item in items:
        if item.get_closest_marker("compat"):
            item.add_marker(pytest.mark.skip(reason="make compat runs it"))


@contextmanager
def proxy_before(version: str, folder: Path) -> Iterator[str]:
    """The URL of a proxy before a local SageMaker whose servers are of this version."""
    with (folder / "log").open("w") as log:
        stand_in = subprocess.Popen(
            [sys.executable, "-m", "tests.compat.stand_in", str(folder / "state"), str(python_of(version))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert stand_in.stdin is not None
    assert stand_in.stdout is not None
    try:
        line = stand_in.stdout.readline()
        assert line, (folder / "log").read_text()[-3000:]
        summary = json.loads(line)
        with running(folder / "proxy", summary["tables"], environ=summary["environment"]) as proxy:
            yield f"http://127.0.0.1:{proxy.port}"
    finally:
        stand_in.stdin.close()
        try:
            stand_in.wait(30)
        finally:
            stand_in.kill()
            stand_in.wait()
            stand_in.stdout.close()


@pytest.fixture(scope="module")
def server_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A proxy's URL and the version of the servers behind it."""
    version = str(request.param)
    with proxy_before(version, tmp_path_factory.mktemp("compat")) as url:
        yield url, version
