"""Step 9 of a request's way: one line per request. Never a header value, a body, a query or a key.

Lines are collected and written by a thread, many at once: a slow disk or pipe must not hold up requests. If it is too
slow for too long, lines are dropped and their number is written instead.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from functools import lru_cache
from typing import TextIO

_MOST_WAITING = 20_000
_INTERVAL = 0.1
# What would end a line or steer a terminal, and what cannot be encoded.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_TEXT = "{time} {method} {path} {status} {duration_ms:.1f} ms  {target} {request_id}"


class Record:
    """What is known of one request while it is on its way."""

    __slots__ = (
        "bytes_in",
        "bytes_out",
        "caller_address",
        "error",
        "method",
        "path",
        "request_id",
        "retries",
        "started",
        "status",
        "target",
        "upstream_request_id",
        "upstream_seconds",
    )

    def __init__(self, method: str, request_id: str) -> None:
        self.method = method
        self.request_id = request_id
        self.started = time.perf_counter()
        self.caller_address = ""
        self.target = ""
        self.path = ""
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.retries = 0
        self.upstream_seconds = 0.0
        self.upstream_request_id = ""
        self.error = ""

    def add_bytes_out(self, size: int) -> None:
        """Count a chunk of the answer."""
        self.bytes_out += size

    def json_line(self) -> str:
        """What `json.dumps(self.fields())` gives, several times faster: nearly all fields need no escaping.

        Paths are canonical and request ids judged; what the upstream or an error says may hold anything.
        """
        now = time.time()
        second = int(now)
        ids = self.upstream_request_id
        return (
            f'{{"time": "{_second_text(second)}.{int((now - second) * 1000):03d}Z", "request_id": "{self.request_id}", '
            f'"client": {_quoted(self.caller_address)}, "target": "{self.target}", "method": {_quoted(self.method)}, '
            f'"path": "{self.path}", "status": {self.status}, '
            f'"bytes_in": {self.bytes_in}, "bytes_out": {self.bytes_out}, '
            f'"duration_ms": {round((time.perf_counter() - self.started) * 1000, 2)}, '
            f'"upstream_ms": {round(self.upstream_seconds * 1000, 2)}, '
            f'"upstream_request_id": {json.dumps(ids) if ids else _EMPTY}, "retries": {self.retries}'
            f"{f', {_ERROR}: {json.dumps(self.error)}' if self.error else ''}}}"
        )

    def fields(self) -> dict[str, str | int | float]:
        """The line's fields, in their documented order."""
        fields: dict[str, str | int | float] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request_id": self.request_id,
            "client": self.caller_address,
            "target": self.target,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "duration_ms": round((time.perf_counter() - self.started) * 1000, 2),
            "upstream_ms": round(self.upstream_seconds * 1000, 2),
            "upstream_request_id": self.upstream_request_id,
            "retries": self.retries,
        }
        if self.error:
            fields["error"] = self.error
        return fields


_JSON_NOTICE = '{{"dropped_lines": {}}}'
_TEXT_NOTICE = "{} log lines were dropped: the output was too slow"
_EMPTY = '""'
_ERROR = '"error"'


@lru_cache(maxsize=4)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


@lru_cache(maxsize=256)
def _quoted(text: str) -> str:
    return json.dumps(text)


class RequestLog:
    """Writes records. One per worker; `close` writes what is left."""

    def __init__(self, *, as_json: bool, stream: TextIO | None = None) -> None:
        self._format = Record.json_line if as_json else _text_line
        self._notice = _JSON_NOTICE if as_json else _TEXT_NOTICE
        self._stream = stream or sys.stdout
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Take one record; returns at once."""
        if len(self._lines) >= _MOST_WAITING:
            self._dropped += 1
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
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append(self._notice.format(dropped))
        try:
            self._stream.write("\n".join([*lines, ""]))
            self._stream.flush()
        except (OSError, ValueError):  # a full disk or closed pipe costs log lines, never requests
            self._dropped += len(lines) + dropped - bool(dropped)


def _text_line(record: Record) -> str:
    line = _TEXT.format(**record.fields())
    line = f"{line}  {record.error}" if record.error else line
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], line)
