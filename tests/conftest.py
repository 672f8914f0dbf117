"""What all tests share: one local SageMaker for the whole session, because it takes seconds to start."""

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
