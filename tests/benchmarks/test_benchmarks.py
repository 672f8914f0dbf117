"""The benchmark's machinery on very short runs: every row is there, nothing failed, nothing is left behind.

How fast anything is, is not asserted.
"""

# ruff: noqa: RUF001 - the multiplication sign is meant

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest
from benchmarks.load import LOADS, TLS_LOAD, Sample, Transfer, batch_body
from benchmarks.peers import PEERS, find_nginx
from benchmarks.processes import Startup
from benchmarks.results import Results
from benchmarks.runner import Plan, measure

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
FACTS = report.Facts("2030-01-02", "a machine", "some programs", "make bench", 3, 1.5, 1 << 30)

needs_tools = pytest.mark.skipif(
    find_nginx() is None or shutil.which("wrk") is None,
    reason="nginx and wrk are needed: scripts/system-packages bench",
)


def made_up_results() -> Results:
    results = Results(disturbances=[0.01, 0.02, 0.5])
    for index, peer in enumerate(PEERS):
        for load in [TLS_LOAD] if peer.tls else LOADS:
            for round_ in (1, 2, 3):
                sample = Sample(requests=1000 * (index + 1) * round_, seconds=1.0, failed=0, p50=1, p99=2, cpu=50)
                results.samples[load, peer.key].append(sample)
        if not peer.tls:
            results.transfers[peer.key].append(Transfer(1 << 30, 1.0 + index, 0.5, 1_000_000))
        results.startups[peer.key].append(Startup(1.0, 0.9, 1.1))
        results.peaks[peer.key].append(70_000_000)
    return results


def svg_texts(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_text("utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def check_markdown(text: str) -> None:
    """Every table line has as many cells as its headline."""
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block


@needs_tools
def test_a_short_run_has_every_row_and_nothing_fails(tmp_path: Path) -> None:
    said: list[str] = []
    plan = Plan(PEERS, rounds=1, seconds=0.25, warm_up=0.0, download_size=16 << 20, retakes=0)
    results = measure(plan, said.append)

    absent = {reason.partition(":")[0] for reason in results.missing}
    present = [peer for peer in PEERS if peer.key not in absent]
    plain = [peer.key for peer in present if not peer.tls]
    assert {peer.key for peer in PEERS if peer.missing()} == absent
    assert {"nginx", "direct"} <= set(plain)
    assert [(row.load, row.peer.key) for row in results.rows()] == [(load, key) for load in LOADS for key in plain]
    assert [row.peer.key for row in results.tls_rows()] == [peer.key for peer in present if peer.tls]
    assert [row.peer.key for row in results.download_rows()] == plain
    assert [row.peer.key for row in results.size_rows()] == [key for key in plain if key != "direct"]
    assert results.failed() == 0
    assert len(results.disturbances) == plan.turns() - sum(1 if peer.tls else 7 for peer in PEERS if peer.key in absent)
    assert all(row.rate > 0 and row.p99 >= row.p50 > 0 for row in results.rows())
    assert all(row.peak > 1_000_000 for row in results.size_rows())
    assert all(any(reason in line for line in said) for reason in absent)

    page, chart = report.write(results, FACTS, tmp_path)
    check_markdown(page.read_text("utf-8"))
    assert "download, one caller" in svg_texts(chart)


@needs_tools
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_what_it_started(how: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # its sockets' paths have 108 bytes at the most
        interrupt(Path(short), how)


def interrupt(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--peers", "nginx,direct", "--seconds", "20"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = psutil.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    for line in run.stdout:
        if b"started nginx" in line:
            break
    servers = run.children(recursive=True)
    assert servers
    run.send_signal(how)
    _, complaint = run.communicate(timeout=30)
    _, alive = psutil.wait_procs(servers, timeout=5)
    assert (run.returncode, alive, list(tmp_path.iterdir())) == (1, [], [])
    assert b"interrupted" in complaint


def test_the_page_and_the_chart_show_the_medians(tmp_path: Path) -> None:
    page, chart = report.write(made_up_results(), FACTS, tmp_path)
    text, texts = page.read_text("utf-8"), svg_texts(chart)

    check_markdown(text)
    for fact in (
        "2030-01-02",
        "a machine",
        "some programs",
        "make bench",
        "(performance.svg)",
        "1 GiB",
        "2% of",
        "50% in",
    ):
        assert fact in text
    for peer in PEERS:
        assert peer.title in text
    assert "| mlflow-proxy | 2 000 | 50 |" in text
    assert "small GET, 32 connections" in texts
    assert {"2 000", "1.07"} <= set(texts)


def test_a_busy_machine_is_named() -> None:
    assert "busy" not in report.disturbance(Results(disturbances=[0.0, 0.01, 0.9]))
    assert "busy" in report.disturbance(Results(disturbances=[0.0, 0.3, 0.9]))


def test_targets_are_marked_by_what_was_measured() -> None:
    results = made_up_results()
    marks = {(goal.title, goal.asked): goal.reached for goal in results.goals()}
    assert marks["small GET, 256 connections: requests per second", "≥ 0.65 × Envoy"] is False
    assert marks["download: bytes per second", "≥ 0.6 × without a proxy"] is True
    assert marks["CPU time until the first answer, all processes", "< 1.5 s"] is True
    assert sum("requests per second" in title for title, _ in marks) == 12
    assert marks["20 KB POST, 32 connections, no audit: requests per second", "≥ 0.8 × the bare forwarder"] is False


def test_a_peer_that_took_no_part_leaves_its_ratios_out() -> None:
    results = made_up_results()
    for load in LOADS:
        del results.samples[load, "envoy"]
    assert all(row.to_envoy is None and row.to_naive for row in results.rows())
    assert not any("Envoy" in goal.asked for goal in results.goals())


def test_the_batch_is_twenty_kilobytes_of_json() -> None:
    assert len(batch_body()) == 20_480
    assert batch_body().startswith(b'{"run_id"')
    assert batch_body().endswith(b"}")
