"""What all workers of one instance share: made by the main process before it forks them, gone with it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlflow_proxy.settings import Oidc


@dataclass(frozen=True, slots=True)
class Runtime:
    """A folder for what workers tell each other, and the secret that seals session cookies."""

    folder: Path
    session_secret: bytes = field(repr=False)

    @property
    def metrics(self) -> Path:
        """Where each worker writes its counters."""
        return self.folder / "metrics"

    @property
    def revocations(self) -> Path:
        """The sessions that were signed out of before their time."""
        return self.folder / "signed-out"


@contextmanager
def prepared(oidc: Oidc) -> Iterator[Runtime]:
    """A runtime of this process's own. Its folder only its user can read."""
    secret_file = oidc.session_secret_file
    secret = secret_file.read_bytes() if secret_file is not None else secrets.token_bytes(32)
    folder = Path(tempfile.mkdtemp(prefix="mlflow-proxy-"))
    try:
        runtime = Runtime(folder, secret)
        runtime.metrics.mkdir()
        yield runtime
    finally:
        shutil.rmtree(folder, ignore_errors=True)
