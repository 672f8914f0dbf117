"""What all tests share: one local SageMaker for the session, because it takes seconds to start; two halves of tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from mlflow_proxy.local import LocalSageMaker


@pytest.fixture(scope="session")
def sagemaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSageMaker]:
    """A running local SageMaker with the targets tracking, app and cross-account."""
    state: Path = tmp_path_factory.mktemp("sagemaker")
    with LocalSageMaker(state, cross_account=True) as running:
        yield running


class Halves(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """With `-n 2` the tests of the service run in one process, those of its deployment in another.

    Each half keeps its order and its session's fixtures, and nothing that one of them uses is the other's.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "deployment" if nodeid.startswith(("tests/infra/", "tests/deploy/")) else "service"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Halves:
    """xdist's question, how to share the tests out."""
    return Halves(config, log)
