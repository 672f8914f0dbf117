"""What all tests share: one local SageMaker for the session, because it takes seconds to start; two halves of tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_proxy.local import LocalSageMaker


@pytest.fixture(scope="session")
def sagemaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSageMaker]:
    """A running local SageMaker with the targets tracking, app and cross-account."""
    state: Path = tmp_path_factory.mktemp("sagemaker")
    with LocalSageMaker(state, cross_account=True) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup` the service's tests run in one process, those of its deployment in another.

    Each half keeps its order and its session's fixtures, and nothing that one of them uses is the other's.
    """
    here = Path(__file__).parent
    deployment = (here / "infra", here / "deploy")
    for item in items:
        is_deployment = any(item.path.is_relative_to(folder) for folder in deployment)
        item.add_marker(pytest.mark.xdist_group("deployment" if is_deployment else "service"))
