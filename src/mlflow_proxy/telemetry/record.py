"""Step 9 of a request's way: one line per request. Never a header value, a path, a body, a query or a key.

Lines are collected and written by a thread, many at once: a slow disk or pipe must not hold up requests. If it is too
slow for too long, lines are dropped and their number is written instead.
"""

from __future__ import annotations

import json
import os
import re
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:  # at run time only where traces are on
    from mlflow_proxy.telemetry.tracing import RequestTrace

_MOST_WAITING = 20_000
_INTERVAL = 0.1
# So much goes into one write, where it is never divided.
_WHOLE = 1 << 20
# Of what a caller chose, so much is written.
_LONGEST = 256
# Of an error, which may repeat what a caller or a service sent. Callers are sent here for the reason of what the
# operator has to mend, and the longest of those, with advice, have about 900 characters.
_LONGEST_ERROR = 1000
# What would end a line or steer a terminal, and what cannot be encoded.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_TEXT = (
    "{time} {status:>3} {method:<6} {duration_ms:>8.1f} ms  {target:<12} {caller:<20} {action:<22} "
    "{route}  {request_id}"
)

# What `limits` says of a request whose address has failed to authenticate too often.
AUTH_FAILURES = "failures"


class Record:
    """What is known of one request while it is on its way; each step writes what it found out.

    `caller` is the subject, `way` how it was identified and `credential` the public id of what was shown. `route` is
    the template of MLflow's rule, `action` its name for roles, and `writes` says whether it may change something; then
    `resources` are the identifiers that it named, for the audit log, and `not_looked_into` says why there may be more.
    `limit` is what a limit had to say: nothing,
    `waited 120 ms`, or which one refused (`caller rate`, `queue full`, …). `upstream_error` is the kind of failure
    between proxy and service, one of `metrics.UPSTREAM_ERRORS`; `throttled`: the service refused an attempt for now.
    `repeated`: so many more requests of strangers at the same address there were, which have no line of their own.
    `set_cookie` is a header that the answer is to carry, and `trace` the request's spans, if traces are on.
    """

    __slots__ = (
        "action",
        "bytes_in",
        "bytes_out",
        "caller",
        "caller_address",
        "credential",
        "error",
        "limit",
        "method",
        "not_looked_into",
        "repeated",
        "request_id",
        "resources",
        "retries",
        "role",
        "route",
        "set_cookie",
        "started",
        "status",
        "target",
        "throttled",
        "trace",
        "upstream_error",
        "upstream_request_id",
        "upstream_seconds",
        "way",
        "writes",
    )

    def __init__(self, method: str, request_id: str) -> None:
        self.method = method
        self.request_id = request_id
        self.started = time.perf_counter()
        self.caller_address = ""
        self.caller = ""
        self.way = ""
        self.credential = ""
        self.role = ""
        self.target = ""
        self.action = ""
        self.route = ""
        self.writes = False
        self.resources: Mapping[str, str | list[str]] | None = None
        self.not_looked_into = ""
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.retries = 0
        self.throttled = False
        self.upstream_seconds = 0.0
        self.upstream_request_id = ""
        self.upstream_error = ""
        self.limit = ""
        self.repeated = 0
        self.error = ""
        self.set_cookie: bytes | None = None
        self.trace: RequestTrace | None = None

    def add_bytes_out(self, size: int) -> None:
        """Count a chunk of the answer."""
        self.bytes_out += size

    def step(self, name: str) -> None:
        """The request's next step begins."""
        if self.trace is not None:
            self.trace.step(name)

    def json_line(self) -> str:
        """What `json.dumps(self.fields())` gives, several times faster: most texts repeat, and are quoted once.

        Request ids and names of targets are judged before; all other texts may hold anything.
        """
        now = time.time()
        second = int(now)
        caller, action, route = self.caller, self.action, self.route
        ids = self.upstream_request_id
        return (
            f'{{"time": "{_second_text(second)}.{int((now - second) * 1000):03d}Z", "request_id": "{self.request_id}", '
            f'"client": {_quoted(self.caller_address)}, '
            f'"caller": {_quoted(caller) if len(caller) <= _LONGEST else json.dumps(cut(caller))}, '
            f'"role": {_quoted(self.role)}, "target": "{self.target}", '
            f'"action": {_quoted(action) if len(action) <= _LONGEST else json.dumps(cut(action))}, '
            f'"method": {_quoted(self.method)}, '
            f'"route": {_quoted(route) if len(route) <= _LONGEST else json.dumps(cut(route))}, '
            f'"status": {self.status}, "bytes_in": {self.bytes_in}, "bytes_out": {self.bytes_out}, '
            f'"duration_ms": {round((time.perf_counter() - self.started) * 1000, 2)}, '
            f'"upstream_ms": {round(self.upstream_seconds * 1000, 2)}, '
            f'"upstream_request_id": {json.dumps(ids) if ids else _EMPTY}, "retries": {self.retries}, '
            f'"limit": {json.dumps(self.limit) if self.limit else _EMPTY}'
            f"{f', {_REPEATED}: {self.repeated}' if self.repeated else ''}"
            f"{f', {_ERROR}: {json.dumps(cut_error(self.error))}' if self.error else ''}}}"
        )

    def fields(self) -> dict[str, str | int | float]:
        """The line's fields, in their documented order."""
        fields: dict[str, str | int | float] = {
            "time": timestamp(),
            "request_id": self.request_id,
            "client": self.caller_address,
            "caller": cut(self.caller),
            "role": self.role,
            "target": self.target,
            "action": cut(self.action),
            "method": self.method,
            "route": cut(self.route),
            "status": self.status,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "duration_ms": round((time.perf_counter() - self.started) * 1000, 2),
            "upstream_ms": round(self.upstream_seconds * 1000, 2),
            "upstream_request_id": self.upstream_request_id,
            "retries": self.retries,
            "limit": self.limit,
        }
        if self.repeated:
            fields["repeated"] = self.repeated
        if self.error:
            fields["error"] = cut_error(self.error)
        return fields


_JSON_NOTICE = '{{"dropped_lines": {}}}'
_TEXT_NOTICE = "{} log lines were dropped: the output was too slow"
_EMPTY = '""'
_ERROR = '"error"'
_REPEATED = '"repeated"'


def timestamp() -> str:
    """Now, as all records write it: UTC, to the millisecond."""
    now = time.time()
    second = int(now)
    return f"{_second_text(second)}.{int((now - second) * 1000):03d}Z"


def cut(text: str) -> str:
    """A text that a caller chose, at most 256 characters of it, and an ellipsis if there was more."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def cut_error(text: str) -> str:
    """Why something failed, at most 1000 characters of it, and an ellipsis if there was more."""
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}…"


def quoted(text: str) -> str:
    """What `json.dumps` gives, at once for texts that repeat."""
    return _quoted(text) if len(text) <= _LONGEST else json.dumps(text)


@lru_cache(maxsize=4)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


@lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    return json.dumps(text)


class RequestLog:
    """Writes records. One per worker; `close` writes what is left."""

    def __init__(self, *, as_json: bool, stream: TextIO | None = None) -> None:
        self._format = Record.json_line if as_json else _text_line
        self._notice = _JSON_NOTICE if as_json else _TEXT_NOTICE
        self._stream = stream or sys.stdout
        self._piece = _undivided(self._stream)
        self._lines: deque[str] = deque()
        self._refused = 0  # counted by whoever writes records
        self._lost = 0  # counted by the thread
        self._told = 0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many lines were never written, since the start."""
        return self._refused + self._lost

    def write(self, record: Record) -> None:
        """Take one record; returns at once."""
        if len(self._lines) >= _MOST_WAITING:
            self._refused += 1
            return
        self._lines.append(self._format(record))
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Write what is left, for two seconds at the most."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            if not self._closing:
                time.sleep(_INTERVAL)
            self._wake.clear()
            self._flush()
            if self._closing and not self._lines:
                return

    def _flush(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        untold = self.dropped - self._told
        written = 0
        try:
            for count, piece in pieces(lines, self._piece):
                self._stream.write(piece)
                self._stream.flush()
                written += count
            if untold:
                self._stream.write(f"{self._notice.format(untold)}\n")
                self._stream.flush()
                self._told += untold
        except (OSError, ValueError):  # a full disk or closed pipe costs log lines, never requests
            self._lost += len(lines) - written


def pieces(lines: Iterable[str], size: int) -> Iterator[tuple[int, str]]:
    """Whole lines with their ends, joined to pieces of at most `size` characters, or of one line; with their number."""
    piece: list[str] = []
    length = 0
    for line in lines:
        length += len(line) + 1
        if length > size and piece:
            yield len(piece), "\n".join([*piece, ""])
            piece, length = [], len(line) + 1
        piece.append(line)
    if piece:
        yield len(piece), "\n".join([*piece, ""])


def _undivided(stream: TextIO) -> int:
    """How much a stream takes in one piece, so that the lines of several workers do not mix.

    A file takes any amount. A pipe that is full takes what fits, and then another worker's, but never divides
    PIPE_BUF bytes (POSIX); neither does a socket, in practice.
    """
    try:
        is_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return _WHOLE
    return _WHOLE if is_file else select.PIPE_BUF


def _text_line(record: Record) -> str:
    fields = {name: "-" if value == "" else value for name, value in record.fields().items()}
    line = _TEXT.format(**fields)
    repeated = f"and {record.repeated} more like this" if record.repeated else ""
    for more in (record.limit, cut_error(record.error), repeated):
        line = f"{line}  {more}" if more else line
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], line)
