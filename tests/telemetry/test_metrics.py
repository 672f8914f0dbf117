"""Numbers of all workers together: right, bounded, and never smaller than before, whatever becomes of a worker."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlflow_proxy.telemetry import metrics as module
from mlflow_proxy.telemetry.metrics import BOUNDS, FAMILIES, PREFIX, Metrics, State, exposition
from mlflow_proxy.telemetry.record import Record

FORK = multiprocessing.get_context("fork")

Numbers = dict[tuple[str, frozenset[tuple[str, str]]], float]


def record_of(seconds: float = 0.0, **values: Any) -> Record:
    record = Record("GET", "request-00000001")
    record.started = time.perf_counter() - seconds
    usual = {"target": "dev", "action": "GetRun", "status": 200, "bytes_in": 10, "bytes_out": 200}
    for name, value in {**usual, **values}.items():
        setattr(record, name, value)
    return record


def numbers(folder: Path) -> Numbers:
    """All samples of an exposition, as Prometheus's own parser reads them, by name without our prefix and labels."""
    text, content_type = exposition(folder)
    assert content_type.startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())] = sample.value
    return found


def number(folder: Path, name: str, **labels: str) -> float | None:
    return numbers(folder).get((name, frozenset(labels.items())))


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def metrics(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Metrics]:
    metrics = Metrics(tmp_path, version="1.2.3")
    metrics.start(loop)
    yield metrics
    metrics.close()


# What is counted


def test_requests(metrics: Metrics, tmp_path: Path) -> None:
    for status in (200, 201, 404, 499, 500, 502):
        metrics.observe(record_of(status=status))
    metrics.observe(record_of(target="app"))
    metrics.observe(record_of(target="-", action=""))
    metrics.observe(record_of(target="", action="", status=0))
    metrics.close()
    for labels, count in {
        ("dev", "GetRun", "2xx"): 2,
        ("dev", "GetRun", "4xx"): 2,
        ("dev", "GetRun", "5xx"): 2,
        ("app", "GetRun", "2xx"): 1,
        ("-", "none", "2xx"): 1,
        ("none", "none", "none"): 1,
    }.items():
        named = dict(zip(("target", "action", "status"), labels, strict=True))
        assert number(tmp_path, "requests_total", **named) == count
    assert number(tmp_path, "request_bytes_total", target="dev", direction="in") == 60
    assert number(tmp_path, "request_bytes_total", target="dev", direction="out") == 1200


def test_durations(metrics: Metrics, tmp_path: Path) -> None:
    """One in the middle of each bucket; the bounds are far enough apart for a slow machine."""
    middles = [low + (high - low) / 3 for low, high in zip((0.0, *BOUNDS), BOUNDS, strict=False)] + [100.0]
    for middle in middles:
        metrics.observe(record_of(middle))
    metrics.observe(record_of(0.3, action="SearchRuns", status=201))
    metrics.observe(record_of(0.3, status=404))
    metrics.close()
    labels = {"target": "dev", "status": "2xx"}
    found = [number(tmp_path, "request_duration_seconds_bucket", **labels, le=str(bound)) for bound in BOUNDS]
    expected = [at + 1 + (bound >= 0.5) for at, bound in enumerate(BOUNDS)]
    assert found == expected
    assert number(tmp_path, "request_duration_seconds_bucket", **labels, le="+Inf") == len(middles) + 1
    assert number(tmp_path, "request_duration_seconds_count", **labels) == len(middles) + 1
    total = number(tmp_path, "request_duration_seconds_sum", **labels)
    assert total is not None
    assert sum(middles) + 0.3 <= total < sum(middles) + 0.3 + 2
    assert number(tmp_path, "request_duration_seconds_count", target="dev", status="4xx") == 1


def test_troubles(metrics: Metrics, tmp_path: Path) -> None:
    metrics.observe(record_of(retries=2, upstream_error="connect", status=502))
    metrics.observe(record_of(retries=1))
    metrics.observe(record_of(limit="caller rate", status=429))
    metrics.observe(record_of(limit="waited 120 ms"))
    metrics.observe(record_of(limit="waited 7 ms", upstream_error="who knows"))
    metrics.observe(record_of(limit="of a new kind"))
    metrics.close()
    found = numbers(tmp_path)

    def of(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    assert of("upstream_retries_total", target="dev") == 3
    assert of("upstream_errors_total", target="dev", kind="connect") == 1
    assert of("upstream_errors_total", target="dev", kind="other") == 1
    assert of("limited_requests_total", target="dev", limit="caller rate") == 1
    assert of("limited_requests_total", target="dev", limit="waited") == 2
    assert of("limited_requests_total", target="dev", limit="other") == 1


def test_identity(metrics: Metrics, tmp_path: Path) -> None:
    metrics.auth_failure("key")
    metrics.auth_failure("key")
    metrics.auth_failure("x" * 1000)
    metrics.dropped_identity(3)
    metrics.dropped_identity(1)
    metrics.close()
    assert number(tmp_path, "auth_failures_total", way="key") == 2
    assert number(tmp_path, "auth_failures_total", way="other") == 1
    assert number(tmp_path, "dropped_identity_headers_total") == 4


def test_state(metrics: Metrics, loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    """Gauges are the sum of all living workers, expiry the least; what is told of drops is counted on."""
    other = Metrics(tmp_path, version="1.2.3")
    other.start(loop)
    for one, seconds, place in ((metrics, 900.0, (64, 3, 1)), (other, 600.0, (40, 2, 0))):
        one.in_flight = place[1] + 1
        one.state = lambda seconds=seconds, place=place: State(
            places=[("dev", *place)],
            credential_expiry={"dev": seconds},
            storage_failures=2,
            log_lines_dropped=3,
            audit_lines_dropped=4,
        )
        one._tick(loop)
    assert eventually(lambda: number(tmp_path, "concurrency_limit", target="dev") == 104)
    assert number(tmp_path, "concurrency_in_flight", target="dev") == 5
    assert number(tmp_path, "concurrency_waiting", target="dev") == 1
    assert number(tmp_path, "credential_expiry_seconds", target="dev") == 600
    assert number(tmp_path, "requests_in_flight") == 7
    assert number(tmp_path, "build_info", version="1.2.3") == 1
    other.close()
    assert number(tmp_path, "credential_expiry_seconds", target="dev") == 900
    assert number(tmp_path, "concurrency_limit", target="dev") == 64
    assert number(tmp_path, "requests_in_flight") == 4
    for name, count in (("limits_storage_failures", 4), ("log_lines_dropped", 6), ("audit_lines_dropped", 8)):
        assert number(tmp_path, f"{name}_total") == count


def test_every_family_is_described_even_before_the_first_request(metrics: Metrics, tmp_path: Path) -> None:
    text = exposition(tmp_path)[0].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, family in FAMILIES.items():
        found = families[PREFIX + name.removesuffix("_total")]
        assert found.type == family.kind
        assert found.documentation == family.help
        assert (family.kind == "counter") == name.endswith("_total")
    assert len(families) == len(FAMILIES)


# What callers choose does not make more of them


def series(folder: Path) -> int:
    return len(numbers(folder))


def test_unknown_actions_are_one(metrics: Metrics, tmp_path: Path) -> None:
    for number_ in range(20_000):
        metrics.observe(record_of(action=f"Unknown:GET /x/{number_}", status=404))
        metrics.observe(record_of(action=f"GetRun SearchRuns {number_}"))
    assert len(metrics._found) == 0
    metrics.close()
    assert number(tmp_path, "requests_total", target="dev", action="Unknown", status="4xx") == 20_000
    assert number(tmp_path, "requests_total", target="dev", action="GraphQL", status="2xx") == 20_000
    assert series(tmp_path) < 100


def test_series_are_bounded(metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SERIES", 50)
    monkeypatch.setattr(module, "_MOST_KEYS", 80)
    for number_ in range(10_000):
        metrics.observe(record_of(action=f"Action{number_ % 5000}", status=200 + number_ % 500))
    metrics.close()
    found = {labels: value for (name, labels), value in numbers(tmp_path).items() if name == "requests_total"}
    assert len(found) <= 50 + 5
    assert sum(found.values()) == 10_000
    assert len(metrics._found) <= 80


def test_labels_are_escaped(metrics: Metrics, tmp_path: Path) -> None:
    metrics.observe(record_of(action='a"}\n\\evil{x="'))
    metrics.close()
    assert number(tmp_path, "requests_total", target="dev", action='a"}\n\\evil{x="', status="2xx") == 1


# Once a second


def test_numbers_come_without_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INTERVAL", 0.02)

    async def run() -> None:
        metrics = Metrics(tmp_path, version="1")
        metrics.start(asyncio.get_running_loop())
        for count in (1, 2):
            metrics.observe(record_of())
            while number(tmp_path, "requests_total", target="dev", action="GetRun", status="2xx") != count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        metrics.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_slow_disk_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named pipe in the way of the new file: whoever opens it waits for a reader."""
    monkeypatch.setattr(module, "_INTERVAL", 0.01)

    async def run() -> None:
        metrics = Metrics(tmp_path, version="1")
        metrics.start(asyncio.get_running_loop())
        pipe = tmp_path / f"{metrics._worker._name}.new"
        os.mkfifo(pipe)
        for _ in range(50):
            metrics.observe(record_of())
            await asyncio.sleep(0.01)
        held_up = metrics._written  # the one; later ones come and go with each tick
        assert held_up is not None
        assert not held_up.done()
        assert metrics._thread._work_queue.qsize() == 0  # what nobody can write is not kept either
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        while not held_up.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.close(reader)
        (tmp_path / f"{metrics._worker._name}.json").unlink()  # it is the pipe now
        metrics.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert number(tmp_path, "requests_total", target="dev", action="GetRun", status="2xx") == 50


def test_a_folder_that_went_away_is_told_once(
    tmp_path: Path, loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    metrics = Metrics(folder, version="1")
    metrics.start(loop)
    folder.rename(tmp_path / "elsewhere")
    for _ in range(3):
        metrics._tick(loop)
        assert metrics._written is not None
        metrics._written.result(20)
    metrics.close()
    assert caplog.text.count("metrics: ") == 1
    assert "No such file" in caplog.text


# Workers that come and go


def work(folder: Path, orders: Connection) -> None:
    """A worker that does as it is told: counts requests, or ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    async def run() -> None:
        metrics = Metrics(folder, version="1")
        metrics.start(asyncio.get_running_loop())
        metrics.in_flight = 1
        orders.send("ready")
        while True:
            while not orders.poll():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            order = orders.recv()
            if order is None:
                break
            for _ in range(order):
                metrics.observe(record_of())
            metrics._write(metrics._samples())
            orders.send("done")
        metrics.close()

    asyncio.run(run())


class Worker:
    def __init__(self, folder: Path) -> None:
        self.orders, theirs = FORK.Pipe()
        self.process: BaseProcess = FORK.Process(target=work, args=(folder, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self.orders.recv() == "ready"

    def count(self, requests: int) -> None:
        self.orders.send(requests)
        assert self.orders.recv() == "done"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        self.orders.send(None)
        self.process.join(30)
        assert self.process.exitcode == 0


def requests(folder: Path) -> float:
    return number(folder, "requests_total", target="dev", action="GetRun", status="2xx") or 0.0


def test_workers_are_added_up_and_dead_ones_stay_counted(tmp_path: Path) -> None:
    first, second = Worker(tmp_path), Worker(tmp_path)
    first.count(10)
    second.count(5)
    assert requests(tmp_path) == 15
    assert number(tmp_path, "requests_in_flight") == 2
    first.kill()
    assert requests(tmp_path) == 15
    assert number(tmp_path, "requests_in_flight") == 1
    second.stop()
    assert requests(tmp_path) == 15
    assert number(tmp_path, "requests_in_flight") is None
    third = Worker(tmp_path)  # adds the others to the base
    assert [file.stem for file in tmp_path.glob("worker-*.json")] == [
        file.stem for file in tmp_path.glob("worker-*.lock")
    ]
    assert len(list(tmp_path.glob("worker-*.json"))) == 1
    assert requests(tmp_path) == 15
    third.count(1)
    assert requests(tmp_path) == 16
    assert number(tmp_path, "request_duration_seconds_count", target="dev", status="2xx") == 16
    assert number(tmp_path, "request_bytes_total", target="dev", direction="out") == 3200
    third.stop()
    Worker(tmp_path).stop()
    assert requests(tmp_path) == 16


def test_an_addition_that_was_interrupted_counts_nothing_twice(tmp_path: Path) -> None:
    """It ended after the base was written and before the files were gone."""
    worker = Worker(tmp_path)
    worker.count(7)
    worker.kill()
    kept = {file: file.read_bytes() for file in tmp_path.glob("worker-*")}
    Worker(tmp_path).stop()
    assert requests(tmp_path) == 7
    for file, data in kept.items():
        file.write_bytes(data)
    assert requests(tmp_path) == 7
    Worker(tmp_path).stop()
    assert requests(tmp_path) == 7
    assert not any(file.exists() for file in kept)
    assert json.loads((tmp_path / "base.json").read_text())["merged"] != []


def test_counters_never_go_backwards(tmp_path: Path) -> None:
    """While workers are started, ended and killed, a reader in another process looks on all the time."""
    seen, told = FORK.Pipe(duplex=False)
    end = FORK.Event()

    def look_on() -> None:
        values = [0.0]
        while not end.is_set():
            values.append(requests(tmp_path))
        told.send((len(values), [pair for pair in pairwise(values) if pair[0] > pair[1]]))

    reader = FORK.Process(target=look_on, daemon=True)
    reader.start()
    told.close()
    workers: list[Worker] = []
    expected = 0
    choose = random.Random(7)
    for step in range(60):
        workers.append(Worker(tmp_path))
        for worker in workers:
            worker.count(step)
            expected += step
        if len(workers) > 3:
            one = workers.pop(choose.randrange(len(workers)))
            one.kill() if choose.random() < 0.5 else one.stop()
        assert requests(tmp_path) == expected
    for worker in workers:
        worker.stop()
    end.set()
    looks, backwards = seen.recv()
    reader.join()
    assert looks > 60
    assert backwards == []
    assert requests(tmp_path) == expected


def test_an_empty_folder(tmp_path: Path) -> None:
    assert numbers(tmp_path) == {}
