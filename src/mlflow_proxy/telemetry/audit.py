"""The audit log: who changed what, who was refused, who signed in, and which links and keys were made. Append-only.

One JSON object a line, in a stream of its own. Unlike log lines, these are kept while the disk is full or the reader
slow, and tried again; only beyond 20 000 waiting ones are new ones lost, counted, and their number written. Not in it:
reads that succeeded, bodies, values, and anything secret.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mlflow_proxy.telemetry.record import AUTH_FAILURES, Record, cut, cut_error, pieces, quoted, timestamp

logger = logging.getLogger(__name__)

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]

# Of the schema in docs/audit.md: it grows when a field changes its meaning or goes away.
VERSION = 1
_MOST_WAITING = 20_000
# Seconds that lines are collected for one write, and between two attempts after a failed one.
_INTERVAL = 0.02
_RETRY = 1.0
# How long `close` tries to write what is left, in seconds.
_CLOSING = 5.0
_REFUSED = frozenset({401, 403})
_LINK = "CreatePresignedMlflow"
_DESCRIPTORS = {"stdout": 1, "stderr": 2}


class AuditLog:
    """Writes audit lines to `stderr`, `stdout`, `off`, or a file by its path. One per process; usable from any thread.

    A file that cannot be opened or written raises nothing here: lines wait, and the program's log says why. Ask
    `problem_with` before, where that should be a mistake. `dropped` counts the lines that were never taken.
    """

    def __init__(self, to: str) -> None:
        self.dropped = 0
        self._told = 0
        self._counting = threading.Lock()
        self._lines: deque[str] = deque()
        self._held: list[str] = []  # taken from `_lines` by the thread, and not yet written
        self._wake = threading.Event()
        self._end = threading.Event()
        self._failing = False
        self._output = _output(to)
        self._thread = threading.Thread(target=self._run, name="audit-log", daemon=True)
        if self._output is not None:
            self._thread.start()

    def write(self, event: str, **fields: JSON) -> None:
        """Take one event with its fields; returns at once. Names of events and fields are in docs/audit.md."""
        if self._output is not None and self._has_room():
            self._add(_line(event, fields))

    def request(self, record: Record) -> None:
        """Write what one finished request did, if it may have changed something, made a link, or was refused."""
        if self._output is None:
            return
        refused = record.status in _REFUSED or record.limit == AUTH_FAILURES
        if not refused and not record.writes:
            return
        if self._has_room():
            event = "denied" if refused else "link" if record.action.startswith(_LINK) else "write"
            self._add(_request_line(event, record))

    def _has_room(self) -> bool:
        """Whether one more line may wait; if not, it is counted."""
        if len(self._lines) + len(self._held) < _MOST_WAITING:
            return True
        with self._counting:
            self.dropped += 1
        return False

    def _add(self, line: str) -> None:
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> int:
        """Write what is left, for five seconds at the most. Gives the number of lines that could not be written."""
        self._end.set()
        self._wake.set()
        if self._output is None:
            return 0
        self._thread.join(timeout=_CLOSING)
        left = len(self._lines) + len(self._held)
        if left:
            logger.error("audit log: %d lines could not be written before the end", left)
        return left

    def _run(self) -> None:
        assert self._output is not None  # noqa: S101  # without one there is no thread
        while not self._end.is_set():
            self._wake.wait()
            self._end.wait(_RETRY if self._failing else _INTERVAL)
            self._wake.clear()
            self._flush(self._output)
            if self._failing:
                self._wake.set()
        until = time.monotonic() + _CLOSING
        while (self._lines or self._held) and time.monotonic() < until:
            self._flush(self._output)
            time.sleep(_INTERVAL if self._failing else 0)

    def _flush(self, output: _Output) -> None:
        """Write all that waits, piece by piece; a line is let go only when it is written."""
        self._held += [self._lines.popleft() for _ in range(len(self._lines))]
        written = 0
        try:
            for count, piece in pieces(self._held, output.piece):
                output.append(piece.encode("ascii"))
                written += count
            untold = self.dropped - self._told
            if untold:
                output.append(f"{_line('lines-dropped', {'lines': untold})}\n".encode("ascii"))
                self._told += untold
        except OSError as error:
            self._note_failure(error)
        else:
            if self._failing:
                logger.warning("audit log: it can be written again")
            self._failing = False
        finally:
            del self._held[:written]

    def _note_failure(self, error: OSError) -> None:
        if not self._failing:
            logger.error("audit log: %s; lines wait, and it is tried again", error)
        self._failing = True


def problem_with(to: str) -> str | None:
    """Why no audit lines can be appended to `to`, in words; None if they can. Makes no file."""
    if to == "off" or to in _DESCRIPTORS:
        return None
    path = Path(to)
    if not path.exists():
        if not path.parent.is_dir():
            return f"the folder {path.parent} does not exist; make it"
        may = os.access(path.parent, os.W_OK | os.X_OK)
        return None if may else f"the folder {path.parent} cannot be written to; give this user the right to"
    if not path.is_file():
        return f"{path} is not a regular file; name one, or write stdout or stderr"
    return None if os.access(path, os.W_OK) else f"{path} cannot be written to; give this user the right to"


class _Output(Protocol):
    """Where lines go. `append` writes whole lines, or raises OSError; `piece` is how many bytes it takes undivided."""

    piece: int

    def append(self, data: bytes) -> None: ...


class _File:
    """A file that several processes append to, and that may be rotated any time."""

    piece = 256 * 1024

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1

    def append(self, data: bytes) -> None:
        """Write all or nothing: what a full disk cut short is taken back, under the lock that all writers take."""
        descriptor = self._current()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, data) < len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, "No space left for a whole line", self._path)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _current(self) -> int:
        """The descriptor of the file that has this name now: logrotate moves the old one away."""
        if self._descriptor >= 0:
            try:
                if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                    return self._descriptor
            except FileNotFoundError:
                pass
            os.close(self._descriptor)
            self._descriptor = -1
        descriptor = self._open()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "Not a regular file", self._path)
        self._descriptor = descriptor
        return descriptor

    def _open(self) -> int:
        # Without O_NONBLOCK, to open a named pipe that nobody reads would never return.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(self._path, flags, 0o600)
        # Only of a file that was made here: whoever owns the folder could have put a link to any other there.
        if os.geteuid() == 0:
            self._give_away(descriptor)
        return descriptor

    def _give_away(self, descriptor: int) -> None:
        """Make root's new file that of its folder's owner: `keys` may run as root before the service's first start."""
        try:
            folder = os.stat(os.path.dirname(os.path.abspath(self._path)))
            if folder.st_uid != 0:
                os.fchown(descriptor, folder.st_uid, folder.st_gid)
        except OSError as error:
            logger.error("audit log: %s stays root's (%s); give it to the service's user", self._path, error.strerror)


class _Stream:
    """Standard output or error, which all workers share."""

    piece = select.PIPE_BUF

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def append(self, data: bytes) -> None:
        """Write all of it, however slow the reader, and also where another process made the pipe non-blocking."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select((), (self._descriptor,), ())


def _output(to: str) -> _Output | None:
    if to == "off":
        return None
    return _Stream(_DESCRIPTORS[to]) if to in _DESCRIPTORS else _File(to)


def _line(event: str, fields: Mapping[str, JSON]) -> str:
    return json.dumps({"time": timestamp(), "audit": VERSION, "event": event, **fields})


def _request_line(event: str, record: Record) -> str:
    """What `_line` gives for a request's fields, several times faster: most texts repeat, and are quoted once.

    Request ids and names of targets are judged before; all other texts may hold anything.
    """
    resources = json.dumps(record.resources) if record.resources else "{}"
    more = f', "not_looked_into": "{record.not_looked_into}"' if record.not_looked_into else ""
    if record.repeated:
        more = f'{more}, "repeated": {record.repeated}'
    reason = f', "reason": {json.dumps(cut_error(record.error))}' if record.error else ""
    return (
        f'{{"time": "{timestamp()}", "audit": {VERSION}, "event": "{event}", "request_id": "{record.request_id}", '
        f'"caller": {quoted(record.caller)}, "way": {quoted(record.way)}, "credential": {quoted(record.credential)}, '
        f'"client": {quoted(record.caller_address)}, "role": {quoted(record.role)}, "target": "{record.target}", '
        f'"action": {quoted(cut(record.action))}, "method": {quoted(record.method)}, "route": {quoted(record.route)}, '
        f'"status": {record.status}, "resources": {resources}{more}{reason}}}'
    )
