"""The API keys that any worker of an instance read last, for workers that are born while their source cannot be read.

One file for each source, in a folder that only the service's user can read. As in a keys file, it holds digests, never
a key.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from mlflow_proxy.access.key_record import Key, KeysError, parse_keys

logger = logging.getLogger(__name__)


class KeptKeys:
    """The keys of the source that is called `source`, in `folder`."""

    def __init__(self, folder: Path, source: str) -> None:
        self._path = folder / sha256(source.encode()).hexdigest()[:16]

    def load(self) -> list[Key]:
        """Those that were saved last; none if there are none."""
        try:
            return list(parse_keys(self._path.read_bytes()).values())
        except (OSError, KeysError):
            return []

    def save(self, keys: Iterable[Key]) -> None:
        """Replace them. A failure is logged: it only matters if the source fails, too."""
        text = "".join(f"{json.dumps(key.fields())}\n" for key in keys)
        try:
            handle, fresh = tempfile.mkstemp(dir=self._path.parent)  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(fresh).replace(self._path)
        except OSError as error:
            logger.warning("API keys cannot be kept for workers that start later: %s", error)
