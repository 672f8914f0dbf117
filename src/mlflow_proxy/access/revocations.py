"""Ids that no longer count although what carries them is still valid: of sessions that were signed out of, of used
sign-ins. Known to all workers of one instance at once, and to nobody else.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# So many ids at least are held before those are left out whose time is over.
_LEAST = 1000
_PIECE = 1 << 16


class Revocations:
    """The ids of one instance, each until the time from which on it would not count anyway.

    They are lines in the file `path`, which workers only append to, and which whoever finds it too long writes anew.
    To ask costs one fstat of the open file, which tells whether it has grown or was replaced. Without a path they are
    this object's own. Usable from any thread. A file that cannot be read or written is logged, and costs other
    workers the knowledge of what is added here, never this one what it knows.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()
        self._file = -1
        self._read_to = 0
        self._most = _LEAST
        self._failing = False
        if path is not None:
            self._catch_up(path)

    def __contains__(self, item: str) -> bool:
        if self._path is not None and self._has_news():
            with self._lock:
                self._catch_up(self._path)
        return item in self._until

    def add(self, item: str, until: float) -> bool:
        """Revoke an id, a text without spaces, until a time (seconds since the epoch). False if it was revoked before.

        Of several workers that add the same id at the same time, exactly one gets True.
        """
        with self._lock:
            if self._path is None:
                return self._note(item, until)
            try:
                with self._alone(self._path):
                    if item in self._until:
                        return False
                    self._append(f"{item} {until:.0f}\n".encode("ascii"))
                    self._until[item] = until
                    if len(self._until) > self._most:
                        self._compact(self._path)
            except OSError as error:
                self._complain(error)
                return self._note(item, until)
            return True

    def _note(self, item: str, until: float) -> bool:
        new = item not in self._until
        self._until[item] = until
        if len(self._until) > self._most:
            self._drop_past()
        return new

    def _drop_past(self) -> None:
        now = self._clock()
        self._until = {item: until for item, until in self._until.items() if until > now}
        self._most = max(_LEAST, 2 * len(self._until))

    def _has_news(self) -> bool:
        try:
            state = os.fstat(self._file)
        except OSError:  # it could not be opened
            return True
        return state.st_size != self._read_to or state.st_nlink == 0

    def _catch_up(self, path: Path) -> None:
        try:
            self._open_current(path)
            self._read()
            self._failing = False
        except OSError as error:
            self._complain(error)

    def _open_current(self, path: Path) -> None:
        """Open the file that has the name now, made if need be, unless it is the one that is open."""
        if self._file >= 0:
            if os.fstat(self._file).st_nlink:
                return
            os.close(self._file)
            self._file = -1
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._read_to = 0

    def _read(self) -> None:
        """Take in the lines that are new. What cannot be a line is skipped: a full disk may have left half of one."""
        text = b""
        while piece := os.pread(self._file, _PIECE, self._read_to + len(text)):
            text += piece
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.decode("ascii", "replace").splitlines():
            item, _, until = line.partition(" ")
            if until.isdigit():
                self._until[item] = float(until)
        if len(self._until) > self._most:
            self._drop_past()

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Hold the file's lock, with all that the others wrote taken in."""
        while True:
            self._open_current(path)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if os.fstat(self._file).st_nlink:
                break
            fcntl.flock(self._file, fcntl.LOCK_UN)  # replaced while this one waited
        locked = self._file
        try:
            self._read()
            yield
        finally:
            fcntl.flock(locked, fcntl.LOCK_UN)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        written = os.write(self._file, line)
        if written < len(line):
            os.ftruncate(self._file, size)
            raise OSError(28, "no space left", str(self._path))

    def _compact(self, path: Path) -> None:
        """Replace the file by one without the ids whose time is over. The others see that theirs has no name left."""
        self._drop_past()
        new = path.with_name(path.name + ".new")
        with new.open("w", encoding="ascii") as file:
            file.writelines(f"{item} {until:.0f}\n" for item, until in self._until.items())
        new.chmod(0o600)
        new.replace(path)

    def _complain(self, error: OSError) -> None:
        if not self._failing:  # once, not for each request
            logger.error("sign-outs do not reach the other workers of this instance: %s", error)
        self._failing = True
