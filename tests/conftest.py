"""What all tests share: one local SageMaker for the session, because it takes seconds to start; two halves of tests."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from mlflow_proxy.local import LocalSageMaker

# What nohup and a shell's background may have told this process, and so all programs that it starts, to ignore.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def pytest_configure() -> None:
    """The programs under test hear signals, however the tests were started; the tests go on ignoring what they were
    told to ignore.

    A program inherits that a signal is ignored, but not that it is caught.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


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
