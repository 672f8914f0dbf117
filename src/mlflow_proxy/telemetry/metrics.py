"""Numbers for Prometheus: of all workers of an instance together, whichever of them is asked.

Requests are counted in plain dictionaries. Once a second each worker writes its counts to a file of its own; a page
reads the files of all and adds them up. A worker that ends leaves its file, so that counters never go backwards; the
next one to start adds it to a common base. Nothing is known here of pages and roles.

Labels are bounded: targets are configured, actions are those of a table or `Unknown`, a status is its class.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlflow_proxy.telemetry.record import Record

logger = logging.getLogger(__name__)

PREFIX = "mlflow_proxy_"
# Upper bounds of the buckets of durations, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# What may stand in a record's `upstream_error`: no connection, no answer in time, an answer that broke off, all
# connections taken, throttled to the end, another error of AWS's, an answer that ended after it had begun.
UPSTREAM_ERRORS = frozenset({"connect", "timeout", "broken", "busy", "throttled", "aws", "cut"})
# The verdicts of limits; `waited` is one that was served later.
LIMITS = frozenset(
    {"caller rate", "role rate", "target rate", "failures", "queue full", "queue time", "storage away", "waited"}
)
WAYS = frozenset({"key", "token", "load-balancer", "certificate", "session"})

_INTERVAL = 1.0
# Pairs of target and action with their status; further actions of a worker are counted as `Unknown`.
_MOST_SERIES = 2000
# Keys under which series are found, of which exact statuses make more.
_MOST_KEYS = 8192
_UNKNOWN = "Unknown"
_NONE = "none"
_OTHER = "other"

# Labels of a series, and its numbers: one, or a histogram's sum and buckets.
_Samples = dict[tuple[str, ...], list[float]]


class Family(NamedTuple):
    """One metric: how it is described, and how the numbers of several workers become one."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    merge: Callable[[tuple[float, float]], float] = sum


FAMILIES = {
    "requests_total": Family("counter", ("target", "action", "status"), "Requests, by class of their status."),
    "request_duration_seconds": Family(
        "histogram", ("target", "status"), "Time from a request's first line to the last byte of its answer."
    ),
    "request_bytes_total": Family("counter", ("target", "direction"), "Bytes of bodies, of requests and of answers."),
    "requests_in_flight": Family("gauge", (), "Requests under way."),
    "upstream_errors_total": Family("counter", ("target", "kind"), "Requests that SageMaker did not serve."),
    "upstream_retries_total": Family("counter", ("target",), "Further attempts at SageMaker."),
    "limited_requests_total": Family("counter", ("target", "limit"), "Requests that a limit refused or held up."),
    "concurrency_limit": Family("gauge", ("target",), "Requests that may be under way to a target, as adapted."),
    "concurrency_in_flight": Family("gauge", ("target",), "Requests under way to a target."),
    "concurrency_waiting": Family("gauge", ("target",), "Requests that wait for a place."),
    "limits_storage_failures_total": Family("counter", (), "Calls of the limits' shared storage that failed."),
    "credential_expiry_seconds": Family(
        "gauge", ("target",), "Seconds until a target's AWS credentials expire, the least of all workers.", min
    ),
    "auth_failures_total": Family("counter", ("way",), "Credentials that identified nobody, by way of identifying."),
    "dropped_identity_headers_total": Family(
        "counter", (), "Headers that claimed an identity and came from elsewhere than a trusted proxy."
    ),
    "log_lines_dropped_total": Family("counter", (), "Log lines that were never written."),
    "audit_lines_dropped_total": Family("counter", (), "Audit lines that were never written."),
    "build_info": Family("gauge", ("version",), "Always 1; the label says which version runs.", max),
}


class State(NamedTuple):
    """What a worker's other parts say of themselves, once a second. `dropped` and `failures` count from its start.

    `places`: target, limit, in flight and waiting of each. `credential_expiry`: seconds, for targets whose credentials
    expire.
    """

    places: Iterable[tuple[str, int, int, int]] = ()
    credential_expiry: Mapping[str, float] = {}
    storage_failures: int = 0
    log_lines_dropped: int = 0
    audit_lines_dropped: int = 0


class _Series:
    """What is counted of the requests with one target, action and class of status."""

    __slots__ = ("bytes_in", "bytes_out", "durations", "requests")

    def __init__(self, durations: list[float]) -> None:
        self.requests = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.durations = durations


class Metrics:
    """The numbers of one worker. `in_flight` is the gateway's to count; `state` is asked once a second, if set."""

    def __init__(self, folder: Path, *, version: str) -> None:
        self.in_flight = 0
        self.state: Callable[[], State] | None = None
        self._version = version
        self._worker = _Worker(folder)
        self._found: dict[tuple[str, str, int], _Series] = {}
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._durations: _Samples = {}
        self._rare: dict[str, _Samples] = {name: {} for name in FAMILIES}
        self._dropped_identity = 0
        self._next: asyncio.TimerHandle | None = None
        self._written: Future[None] | None = None
        self._failing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take part from now on. Raises OSError if the folder cannot be written to."""
        self._worker.start()
        self._worker.write(self._samples())
        self._next = loop.call_later(_INTERVAL, self._tick, loop)

    def close(self) -> None:
        """Write what was counted last."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
            self._thread.shutdown()
            self._write(self._samples())
        self._worker.close()

    def observe(self, record: Record) -> None:
        """Count one finished request."""
        series = self._found.get((record.target, record.action, record.status)) or self._find(record)
        series.requests += 1
        series.bytes_in += record.bytes_in
        series.bytes_out += record.bytes_out
        durations = series.durations
        duration = time.perf_counter() - record.started
        durations[0] += duration
        durations[bisect_left(BOUNDS, duration) + 1] += 1
        if record.retries or record.limit or record.upstream_error:
            self._observe_trouble(record)

    def auth_failure(self, way: str) -> None:
        """Count credentials that did not identify anybody."""
        self._add("auth_failures_total", (way if way in WAYS else _OTHER,))

    def dropped_identity(self, count: int) -> None:
        """Count headers that claimed an identity and may not."""
        self._dropped_identity += count

    def _find(self, record: Record) -> _Series:
        """The series of a request, under names of which there is a bounded number."""
        action = record.action
        if action.startswith(_UNKNOWN):
            action = _UNKNOWN
        elif " " in action:  # several, asked for in one
            action = "GraphQL"
        status = f"{record.status // 100}xx" if record.status else _NONE
        labels = (record.target or _NONE, action or _NONE, status)
        if labels not in self._series and len(self._series) >= _MOST_SERIES:
            labels = (labels[0], _UNKNOWN, status)
        series = self._series.get(labels)
        if series is None:
            durations = self._durations.setdefault((labels[0], status), [0.0] * (len(BOUNDS) + 2))
            series = self._series[labels] = _Series(durations)
        if action == record.action and len(self._found) < _MOST_KEYS:
            self._found[record.target, action, record.status] = series
        return series

    def _observe_trouble(self, record: Record) -> None:
        target = record.target or _NONE
        if record.retries:
            self._add("upstream_retries_total", (target,), record.retries)
        if record.limit:
            limit = "waited" if record.limit.startswith("waited") else record.limit
            self._add("limited_requests_total", (target, limit if limit in LIMITS else _OTHER))
        if record.upstream_error:
            kind = record.upstream_error if record.upstream_error in UPSTREAM_ERRORS else _OTHER
            self._add("upstream_errors_total", (target, kind))

    def _add(self, family: str, labels: tuple[str, ...], count: float = 1) -> None:
        self._rare[family].setdefault(labels, [0])[0] += count

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._next = loop.call_later(_INTERVAL, self._tick, loop)
        if self._written is None or self._written.done():  # a slow disk gets fewer snapshots, and holds up nobody
            self._written = self._thread.submit(self._write, self._samples())

    def _write(self, samples: dict[str, _Samples]) -> None:
        """Where that fails, the numbers from before stand until it succeeds again."""
        try:
            self._worker.write(samples)
        except OSError as error:
            if not self._failing:
                logger.error("metrics: %s; they stand still until that is put right", error)
            self._failing = True
        else:
            self._failing = False

    def _samples(self) -> dict[str, _Samples]:
        """All numbers as they stand."""
        state = self.state() if self.state is not None else State()
        samples = {family: {labels: [*numbers] for labels, numbers in of.items()} for family, of in self._rare.items()}
        moved = samples["request_bytes_total"]
        for labels, series in self._series.items():
            samples["requests_total"][labels] = [series.requests]
            for direction, size in (("in", series.bytes_in), ("out", series.bytes_out)):
                moved.setdefault((labels[0], direction), [0])[0] += size
        samples["request_duration_seconds"] = {labels: [*numbers] for labels, numbers in self._durations.items()}
        for target, *numbers in state.places:
            for family, number in zip(_PLACES, numbers, strict=True):
                samples[family][target,] = [number]
        for target, seconds in state.credential_expiry.items():
            samples["credential_expiry_seconds"][target,] = [seconds]
        for family, number in (
            ("requests_in_flight", self.in_flight),
            ("dropped_identity_headers_total", self._dropped_identity),
            ("limits_storage_failures_total", state.storage_failures),
            ("log_lines_dropped_total", state.log_lines_dropped),
            ("audit_lines_dropped_total", state.audit_lines_dropped),
        ):
            samples[family][()] = [number]
        samples["build_info"][self._version,] = [1]
        return samples


_PLACES = ("concurrency_limit", "concurrency_in_flight", "concurrency_waiting")


class _Worker:
    """The file of one worker. While the worker lives, it holds a lock, which the system takes from it when it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"worker-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = -1

    def start(self) -> None:
        """Be alive, and add to the base what those left who died before."""
        self._lock = os.open(self._folder / f"{self._name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with _locked(self._folder, fcntl.LOCK_EX):
            _absorb(self._folder)

    def write(self, samples: dict[str, _Samples]) -> None:
        """Replace the file by one with these numbers."""
        _write(self._folder / f"{self._name}.json", _encoded(samples))

    def close(self) -> None:
        """From now on the worker counts as dead."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def exposition(folder: Path) -> tuple[bytes, str]:
    """The numbers of all workers as text for Prometheus, and its content type. Reads files."""
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415  # only where it is needed
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4  # noqa: PLC0415

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(folder))
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


class _Collector:
    """What prometheus_client asks for metrics (its interface for custom collectors)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import (  # noqa: PLC0415
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        samples = _all_samples(self._folder)
        for name, family in FAMILIES.items():
            metric = kinds[family.kind](PREFIX + name, family.help, labels=family.labels)
            for labels, numbers in sorted(samples[name].items()):
                if family.kind == "histogram":
                    counts = zip([*map(str, BOUNDS), "+Inf"], accumulate(numbers[1:]), strict=True)
                    metric.add_metric(labels, list(counts), numbers[0])
                else:
                    metric.add_metric(labels, numbers[0])
            yield metric


def _all_samples(folder: Path) -> dict[str, _Samples]:
    """The base, all that dead workers counted, and all that living ones say."""
    with _locked(folder, fcntl.LOCK_SH):
        samples, merged = _base(folder)
        for file in folder.glob("worker-*.json"):
            if file.stem not in merged:
                _merge(samples, _decoded(json.loads(file.read_bytes())), lasting_only=not _is_alive(file))
        return samples


def _absorb(folder: Path) -> None:
    """Add the files of dead workers to the base and remove them. Should it end half-way, none counts twice."""
    samples, merged = _base(folder)
    dead = [file for file in folder.glob("worker-*.json") if not _is_alive(file)]
    for file in dead:
        if file.stem not in merged:
            _merge(samples, _decoded(json.loads(file.read_bytes())), lasting_only=True)
    _write(folder / "base.json", {"merged": [file.stem for file in dead], "samples": _encoded(samples)})
    for file in dead:
        for suffix in (".json", ".lock", ".new"):
            file.with_suffix(suffix).unlink(missing_ok=True)


def _base(folder: Path) -> tuple[dict[str, _Samples], set[str]]:
    """What was added up of dead workers, and the names of those whose files may still be there."""
    file = folder / "base.json"
    base = json.loads(file.read_bytes()) if file.exists() else {"merged": [], "samples": {}}
    return {name: {} for name in FAMILIES} | _decoded(base["samples"]), set(base["merged"])


def _merge(into: dict[str, _Samples], samples: dict[str, _Samples], *, lasting_only: bool) -> None:
    """Add a worker's numbers; of a dead one, only those that last."""
    for name, of in samples.items():
        family = FAMILIES[name]
        if lasting_only and family.kind == "gauge":
            continue
        for labels, numbers in of.items():
            known = into[name].get(labels)
            if known is None:
                into[name][labels] = numbers
            else:
                into[name][labels] = [family.merge(pair) for pair in zip(known, numbers, strict=True)]


def _is_alive(file: Path) -> bool:
    """Whether the worker that wrote a file still holds its lock."""
    try:
        descriptor = os.open(file.with_suffix(".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Readers share this lock; who changes the base has it alone, so that nobody sees that half done."""
    descriptor = os.open(folder / "base.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _write(file: Path, content: Any) -> None:
    """Replace a file, so that whoever reads it meets the old or the new one."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content), "ascii")
    new.replace(file)


def _encoded(samples: dict[str, _Samples]) -> dict[str, list[tuple[tuple[str, ...], list[float]]]]:
    return {name: list(of.items()) for name, of in samples.items()}


def _decoded(encoded: dict[str, list[tuple[list[str], list[float]]]]) -> dict[str, _Samples]:
    return {name: {tuple(labels): numbers for labels, numbers in of} for name, of in encoded.items()}
