"""What all workers of one instance share: made by the main process before it forks them, gone with it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


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

    @property
    def keys(self) -> Path:
        """Where workers keep the API keys that they read last, as digests."""
        return self.folder / "keys"

    @property
    def files(self) -> Path:
        """Copies of certificates that the configuration names, as they were when it was judged."""
        return self.folder / "files"


@contextmanager
def prepared() -> Iterator[Runtime]:
    """A runtime of this process's own, with a random session secret. Its folder only its user can read."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-proxy-"))
    try:
        runtime = Runtime(folder, secrets.token_bytes(32))
        for path in (runtime.metrics, runtime.keys, runtime.files):
            path.mkdir()
        yield runtime
    finally:
        shutil.rmtree(folder, ignore_errors=True)
