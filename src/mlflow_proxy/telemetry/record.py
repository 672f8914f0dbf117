"""Step 9 of a request's way: one line per request. Never a header value, a body, a query or a key.

Lines are collected and written by a thread, many at once: a slow disk or pipe must not hold up requests. If it is too
slow for too long, lines are dropped and their number is written instead.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import UTC, datetime
from typing import TextIO

_MOST_WAITING = 20_000
_INTERVAL = 0.1
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


class RequestLog:
    """Writes records. One per worker; `close` writes what is left."""

    def __init__(self, *, as_json: bool, stream: TextIO | None = None) -> None:
        self._format = json.dumps if as_json else _text
        self._stream = stream or sys.stdout
        self._lines: list[dict[str, str | int | float]] = []
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
        self._lines.append(record.fields())
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
        lines, self._lines = self._lines, []
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append({"dropped_lines": dropped})
        try:
            self._stream.write("".join([self._format(line) + "\n" for line in lines]))
            self._stream.flush()
        except (OSError, ValueError):  # a full disk or closed pipe costs log lines, never requests
            self._dropped += len(lines) + dropped


def _text(fields: dict[str, str | int | float]) -> str:
    if "dropped_lines" in fields:
        return f"{fields['dropped_lines']} log lines were dropped: the output was too slow"
    line = _TEXT.format(**fields)
    return f"{line}  {fields['error']}" if "error" in fields else line
