"""One line per request: whole, valid, and never at the price of requests."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_proxy.targets import TARGET_NAME
from mlflow_proxy.telemetry import record as module
from mlflow_proxy.telemetry.record import Record, RequestLog

FIELDS = [
    *("time", "request_id", "client", "caller", "role", "target", "action", "method", "route", "status"),
    *("bytes_in", "bytes_out", "duration_ms", "upstream_ms", "upstream_request_id", "retries", "limit"),
]
ROUTE = "/api/2.0/mlflow/runs/get"


def record_of(number: int = 1, **values: str | int | float) -> Record:
    record = Record("GET", f"request-{number:08d}")
    usual: dict[str, str | int | float] = {
        "caller": "key:ci",
        "role": "reader",
        "target": "dev",
        "action": "GetRun",
        "route": ROUTE,
        "status": 200,
    }
    for name, value in {**usual, **values}.items():
        setattr(record, name, value)
    return record


def written(records: list[Record], *, as_json: bool) -> str:
    stream = io.StringIO()
    log = RequestLog(as_json=as_json, stream=stream)
    for record in records:
        log.write(record)
    log.close()
    return stream.getvalue()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_json_line() -> None:
    record = record_of(
        caller_address="198.51.100.7",
        bytes_in=12,
        retries=1,
        upstream_seconds=0.25,
        upstream_request_id="abc",
        limit="waited 120 ms",
        error="upstream closed",
    )
    record.add_bytes_out(3)
    record.add_bytes_out(4)
    before = datetime.now(UTC)
    line = json.loads(written([record], as_json=True))
    assert list(line) == [*FIELDS, "error"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert abs((datetime.fromisoformat(line["time"]) - before).total_seconds()) < 5
    assert 0 <= line["duration_ms"] < 5000
    assert {name: line[name] for name in FIELDS if name not in ("time", "duration_ms")} == {
        "request_id": "request-00000001",
        "client": "198.51.100.7",
        "caller": "key:ci",
        "role": "reader",
        "target": "dev",
        "action": "GetRun",
        "method": "GET",
        "route": ROUTE,
        "status": 200,
        "bytes_in": 12,
        "bytes_out": 7,
        "upstream_ms": 250.0,
        "upstream_request_id": "abc",
        "retries": 1,
        "limit": "waited 120 ms",
    }
    assert line["error"] == "upstream closed"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_long_error_is_cut(as_json: bool) -> None:
    line = written([record_of(error="e" * 1000)], as_json=as_json)
    assert "e" * 1000 in line
    line = written([record_of(error="e" * 100_000)], as_json=as_json)
    shown = json.loads(line)["error"] if as_json else line.rstrip("\n").rpartition("  ")[2]
    assert shown == "e" * 1000 + "…"


def test_line_without_error_has_no_such_field() -> None:
    assert list(json.loads(written([record_of()], as_json=True))) == FIELDS


def test_what_is_secret_or_for_others_is_not_in_the_line() -> None:
    record = record_of(way="key", credential="k1")
    record.set_cookie = b"__Host-mlflow-proxy=sealed"
    record.resources = {"run_id": "r1"}
    line = written([record], as_json=True)
    assert list(json.loads(line)) == FIELDS
    assert "sealed" not in line


def test_text_line() -> None:
    start = r"\S+Z 200 GET +\d+\.\d ms  dev +key:ci +GetRun +/api/2\.0/mlflow/runs/get  request-00000001"
    assert re.fullmatch(start + "\n", written([record_of()], as_json=False))
    line = written([record_of(limit="queue full", error="it broke")], as_json=False)
    assert re.fullmatch(start + "  queue full  it broke\n", line)


def test_text_lines_are_aligned_and_have_no_holes() -> None:
    records = [record_of(), record_of(target="", caller="", action="", route="", status=0), record_of(target="-")]
    lines = written(records, as_json=False).splitlines()
    words = [list(re.finditer(r"\S+", line)) for line in lines]
    assert len({tuple(word.start() for word in line[4:9]) for line in words}) == 1  # ms, target, caller, action, route
    assert [word[0] for word in words[1]][4:] == ["ms", "-", "-", "-", "-", "request-00000001"]


any_text = st.text(st.characters(), max_size=20)
# What others say; the rest is judged before. Callers choose some of it, at any length.
FREE = ["error", "caller_address", "upstream_request_id", "method", "role", "limit"]
CHOSEN = ["caller", "action", "route"]
chosen_text = st.one_of(any_text, st.text(st.characters(), min_size=250, max_size=260), st.just("ü" * 40_000))


@settings(max_examples=150, deadline=None)
@given(
    texts=st.tuples(*[any_text] * len(FREE)),
    chosen=st.tuples(*[chosen_text] * len(CHOSEN)),
    target=st.from_regex(TARGET_NAME, fullmatch=True),
)
def test_json_line_is_what_json_makes_of_the_fields(
    texts: tuple[str, ...], chosen: tuple[str, ...], target: str
) -> None:
    record = record_of(target=target, bytes_in=7, retries=2, upstream_seconds=0.012345)
    for name, text in zip([*FREE, *CHOSEN], [*texts, *chosen], strict=True):
        setattr(record, name, text)
    line = record.json_line()
    assert len(line.splitlines()) == 1
    assert line.isascii()
    assert len(line) < 12_000  # nobody fills a disk with one name: an escaped character takes twelve at the most
    content, expected = json.loads(line), json.loads(json.dumps(record.fields()))
    assert list(content) == list(expected)
    for fields in (content, expected):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
        assert fields.pop("duration_ms") >= 0
    assert content == expected
    for name, text in zip(CHOSEN, chosen, strict=True):
        assert content[name] == (text if len(text) <= 256 else text[:256] + "…")


@settings(max_examples=25, deadline=None)
@given(texts=st.tuples(*[any_text] * (len(FREE) + len(CHOSEN) + 1)))
def test_text_line_is_one_line_whatever_the_values(texts: tuple[str, ...]) -> None:
    record = record_of()
    for name, text in zip([*FREE, *CHOSEN, "target"], texts, strict=True):
        setattr(record, name, text)
    line = written([record], as_json=False)
    assert len(line.splitlines()) == 1
    assert line.encode("utf-8").endswith(b"\n")


FORGED = 'key:x", "caller": "key:admin"}\n{"time": "2026-01-01T00:00:00.000Z", "caller": "key:admin'


@pytest.mark.parametrize("name", [*FREE, *CHOSEN])
def test_nobody_forges_a_line(name: str) -> None:
    """Log injection: what a caller chose stays within its field."""
    record = record_of()
    setattr(record, name, FORGED)
    lines = written([record], as_json=True).splitlines()
    assert len(lines) == 1
    content = json.loads(lines[0], object_pairs_hook=lambda pairs: pairs)
    assert [key for key, _ in content] == [*FIELDS, *(["error"] if name == "error" else [])]
    field = {"caller_address": "client"}.get(name, name)
    assert dict(content)[field] == FORGED


@pytest.mark.parametrize("evil", ["a\nb", "a\r\nb", "a\u2028b", "a\x85b", "a\x1b[2Jb", "a\x00b", "a\x0bb", "a\ud800b"])
def test_text_line_shows_what_it_escapes(evil: str) -> None:
    text = written([record_of(error=evil)], as_json=False)
    assert text.count("\n") == 1
    assert ascii(evil)[1:-1] in text
    assert text.strip("\n").isprintable()


def test_braces_and_names_in_values_are_only_text() -> None:
    assert "{status} {0} %s" in written([record_of(route="{status} {0} %s")], as_json=False)


def test_many_lines_keep_their_order() -> None:
    lines = written([record_of(number) for number in range(5000)], as_json=True).splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == [f"request-{number:08d}" for number in range(5000)]


def test_no_line_is_lost_between_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` and the writing thread meet as often as can be."""
    monkeypatch.setattr(module, "_INTERVAL", 0.0)
    stream = io.StringIO()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        log = RequestLog(as_json=True, stream=stream)
        count, end = 0, time.monotonic() + 1.0
        while time.monotonic() < end:
            log.write(record_of(count))
            count += 1
        log.close()
    finally:
        sys.setswitchinterval(interval)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = sum(line.get("dropped_lines", 0) for line in lines)
    assert len({line["request_id"] for line in lines if "request_id" in line}) + told == count


def test_lines_come_without_close() -> None:
    stream = io.StringIO()
    log = RequestLog(as_json=True, stream=stream)
    for number in (1, 2):
        log.write(record_of(number))
        assert eventually(lambda number=number: stream.getvalue().count("\n") == number)  # type: ignore[misc]
    log.close()


def test_close_ends_the_thread() -> None:
    log = RequestLog(as_json=True, stream=io.StringIO())
    log.close()
    assert not log._thread.is_alive()


# A stream that is stuck, full or closed


class Pipe:
    """A pipe that nobody reads until `drain`."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.stream = os.fdopen(writer, "w", encoding="utf-8")
        self.text = ""
        self._thread = threading.Thread(target=self._read)

    def drain(self) -> None:
        self._thread.start()

    def _read(self) -> None:
        data = b""
        while chunk := os.read(self.reader, 1 << 16):
            data += chunk
        self.text = data.decode()

    def finish(self) -> str:
        self.stream.close()
        self._thread.join(10)
        os.close(self.reader)
        return self.text


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


@pytest.mark.parametrize("as_json", [True, False])
def test_stuck_stream_holds_up_nobody_and_dropped_lines_are_counted(pipe: Pipe, as_json: bool) -> None:
    log = RequestLog(as_json=as_json, stream=pipe.stream)
    for number in range(1000):  # more than a pipe holds (64 KiB)
        log.write(record_of(number, route="/" + "a" * 200))
    assert eventually(lambda: not log._lines)  # the thread has them, and is stuck
    for number in range(1000, 26_000):
        log.write(record_of(number))  # returns, though nobody reads
    assert len(log._lines) == 20_000
    pipe.drain()
    assert eventually(lambda: not log._lines, 10)
    log.close()
    lines = pipe.finish().splitlines()
    assert len(lines) == 21_001
    if as_json:
        assert json.loads(lines[-1]) == {"dropped_lines": 5000}
    else:
        assert lines[-1] == "5000 log lines were dropped: the output was too slow"
    assert [re.findall(r"request-\d+", line) for line in lines[:-1]] == [[f"request-{n:08d}"] for n in range(21_000)]


def test_close_does_not_wait_for_a_stuck_stream(pipe: Pipe) -> None:
    log = RequestLog(as_json=True, stream=pipe.stream)
    for number in range(1000):
        log.write(record_of(number, route="/" + "a" * 200))
    assert eventually(lambda: not log._lines)
    log.close()  # returns, though nobody reads
    pipe.drain()
    log._thread.join(10)
    assert pipe.finish().count("\n") == 1000


def test_closed_stream_does_not_raise() -> None:
    stream = io.StringIO()
    stream.close()
    log = RequestLog(as_json=True, stream=stream)
    for number in range(3):
        log.write(record_of(number))
    assert eventually(lambda: log.dropped == 3)
    assert log._thread.is_alive()
    log.close()
    assert not log._thread.is_alive()


def test_pipe_whose_reader_went_away_does_not_raise() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    log = RequestLog(as_json=False, stream=stream)
    log.write(record_of())
    assert eventually(lambda: log.dropped == 1)
    log.close()
    assert not log._thread.is_alive()
    with pytest.raises(BrokenPipeError):
        stream.close()


class Full(io.StringIO):
    """A disk that is full for a while."""

    full = True

    def write(self, text: str, /) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_full_disk_loses_lines_and_says_how_many_later() -> None:
    stream = Full()
    log = RequestLog(as_json=True, stream=stream)
    for number in range(7):
        log.write(record_of(number))
        assert eventually(lambda number=number: log.dropped == number + 1)  # type: ignore[misc]
    stream.full = False
    log.write(record_of(7))
    log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[0]["request_id"] == "request-00000007"
    assert lines[1:] == [{"dropped_lines": 7}]
    assert log.dropped == 7


# Several workers


def write_many(worker: int, stream: TextIO) -> None:
    log = RequestLog(as_json=True, stream=stream)
    for number in range(5000):
        log.write(record_of(number, caller=f"key:worker-{worker}", route="/" + "a" * worker * 50))
    log.close()


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_lines_of_several_workers_do_not_mix(kind: str, tmp_path: Path) -> None:
    """They share one output, and a full pipe takes a part of a large write and then another worker's."""
    file = tmp_path / "log"
    if kind == "pipe":
        reader, writer = os.pipe()
    elif kind == "socket":
        ours, theirs = socket.socketpair()
        reader, writer = ours.detach(), theirs.detach()
    else:
        reader, writer = -1, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=write_many, args=(worker, stream)) for worker in range(1, 5)]
        for process in workers:
            process.start()
    if reader >= 0:
        with os.fdopen(reader, "rb") as source:
            data = source.read()
    for process in workers:
        process.join()
    if reader < 0:
        data = file.read_bytes()
    callers = [json.loads(line)["caller"] for line in data.splitlines()]
    assert Counter(callers) == {f"key:worker-{worker}": 5000 for worker in range(1, 5)}
