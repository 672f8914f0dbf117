"""The audit log: what is in it, that nothing is lost lightly, and that its lines are whole whoever writes beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_proxy.targets import TARGET_NAME
from mlflow_proxy.telemetry import audit as module
from mlflow_proxy.telemetry.audit import AuditLog, problem_with
from mlflow_proxy.telemetry.record import Record

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")


def record_of(**values: Any) -> Record:
    record = Record("POST", "request-00000001")
    usual = {
        "caller": "key:ci",
        "way": "key",
        "credential": "k1",
        "caller_address": "198.51.100.7",
        "role": "writer",
        "target": "dev",
        "action": "DeleteRun",
        "route": "/api/2.0/mlflow/runs/delete",
        "writes": True,
        "status": 200,
        "resources": {"run_id": "r1"},
    }
    for name, value in {**usual, **values}.items():
        setattr(record, name, value)
    return record


def lines_of(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def audited(file: Path, *records: Record) -> list[dict[str, Any]]:
    log = AuditLog(str(file))
    for record in records:
        log.request(record)
    log.close()
    return lines_of(file) if file.exists() else []


# What is written


def test_a_write(tmp_path: Path) -> None:
    before = time.time()
    (line,) = audited(tmp_path / "audit", record_of())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert abs(time.mktime(time.strptime(line.pop("time")[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone - before) < 60
    assert list(line.items()) == [
        ("audit", 1),
        ("event", "write"),
        ("request_id", "request-00000001"),
        ("caller", "key:ci"),
        ("way", "key"),
        ("credential", "k1"),
        ("client", "198.51.100.7"),
        ("role", "writer"),
        ("target", "dev"),
        ("action", "DeleteRun"),
        ("method", "POST"),
        ("route", "/api/2.0/mlflow/runs/delete"),
        ("status", 200),
        ("resources", {"run_id": "r1"}),
    ]


@pytest.mark.parametrize(
    ("values", "event"),
    [
        ({}, "write"),
        ({"status": 500}, "write"),
        ({"status": 429, "limit": "caller rate"}, "write"),
        ({"status": 0}, "write"),
        ({"writes": False}, None),
        ({"writes": False, "status": 404}, None),
        ({"writes": False, "status": 429, "limit": "caller rate"}, None),
        ({"writes": False, "status": 401}, "denied"),
        ({"writes": False, "status": 403}, "denied"),
        ({"status": 403}, "denied"),
        ({"writes": False, "status": 429, "limit": "failures"}, "denied"),
        ({"action": "CreatePresignedMlflowAppUrl"}, "link"),
        ({"action": "CreatePresignedMlflowTrackingServerUrl", "status": 403}, "denied"),
        ({"action": "CreatePresignedUploadUrl"}, "write"),
    ],
)
def test_events(values: dict[str, Any], event: str | None, tmp_path: Path) -> None:
    lines = audited(tmp_path / "audit", record_of(**values))
    assert [line["event"] for line in lines] == ([event] if event else [])


def test_the_reason_of_a_denial(tmp_path: Path) -> None:
    (line,) = audited(tmp_path / "audit", record_of(status=401, caller="", error="not identified: no such key"))
    assert line["reason"] == "not identified: no such key"
    assert "reason" not in audited(tmp_path / "other", record_of())[0]


def test_what_was_not_looked_into_is_said(tmp_path: Path) -> None:
    read, unread = audited(tmp_path / "audit", record_of(), record_of(resources={}, not_looked_into="too-large"))
    assert "not_looked_into" not in read
    assert (unread["resources"], unread["not_looked_into"]) == ({}, "too-large")


def test_without_resources_there_is_an_empty_object(tmp_path: Path) -> None:
    assert audited(tmp_path / "audit", record_of(resources=None))[0]["resources"] == {}


@pytest.mark.parametrize("evil", ['a"}\n{"event": "sign-in', "a\r\u2028\x85b", "\ud800", "\x1b[2J", "ü" * 9])
def test_nobody_forges_a_line(evil: str, tmp_path: Path) -> None:
    record = record_of(caller=evil, action=evil, error=evil, route=evil, resources={"name": evil})
    file = tmp_path / "audit"
    audited(file, record)
    data = file.read_bytes()
    assert data.isascii()
    assert len(data.decode("ascii").splitlines()) == 1
    line = json.loads(data)
    assert (line["event"], line["caller"], line["reason"], line["resources"]) == ("write", evil, evil, {"name": evil})


texts = st.one_of(st.text(max_size=20), st.text(min_size=250, max_size=260), st.just("ü" * 5000))
ANY = ("caller", "way", "credential", "caller_address", "role", "action", "method", "route", "error")


@settings(max_examples=150, deadline=None)
@given(
    texts=st.tuples(*[texts] * len(ANY)),
    resources=st.one_of(st.none(), st.dictionaries(texts, st.one_of(texts, st.lists(texts, max_size=3)), max_size=3)),
    target=st.from_regex(TARGET_NAME, fullmatch=True),
    status=st.integers(0, 599),
)
def test_a_line_is_what_json_makes_of_the_fields(
    texts: tuple[str, ...], resources: dict[str, Any] | None, target: str, status: int
) -> None:
    values = dict(zip(ANY, texts, strict=True))
    record = record_of(**values, resources=resources, target=target, status=status)
    line = module._request_line("write", record)
    error = values["error"]
    fields = {
        "time": json.loads(line)["time"],
        "audit": 1,
        "event": "write",
        "request_id": record.request_id,
        "caller": values["caller"],
        "way": values["way"],
        "credential": values["credential"],
        "client": values["caller_address"],
        "role": values["role"],
        "target": target,
        "action": values["action"] if len(values["action"]) <= 256 else values["action"][:256] + "…",
        "method": values["method"],
        "route": values["route"],
        "status": status,
        "resources": resources or {},
        **({"reason": error if len(error) <= 1000 else error[:1000] + "…"} if error else {}),
    }
    assert line == json.dumps(fields)


def test_other_events(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    log = AuditLog(str(file))
    log.write("key-created", caller="os:root", key="k1", role="writer", expires=None)
    log.close()
    (line,) = lines_of(file)
    assert list(line)[:3] == ["time", "audit", "event"]
    assert {"event": "key-created", "key": "k1", "expires": None}.items() <= line.items()


# Where it is written


PROGRAM = """
import sys
from mlflow_proxy.telemetry.audit import AuditLog
log = AuditLog(sys.argv[1])
for number in range(1000):
    log.write("sign-in", number=number)
log.close()
"""


@pytest.mark.parametrize("to", ["stdout", "stderr", "off"])
def test_streams(to: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, to], capture_output=True, check=True)
    for name, data in (("stdout", done.stdout), ("stderr", done.stderr)):
        numbers = [json.loads(line)["number"] for line in data.splitlines()]
        assert numbers == (list(range(1000)) if name == to else [])


def test_a_file_is_appended_to_and_only_its_user_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    mask = os.umask(0)
    try:
        audited(file, record_of(caller="one"))
        audited(file, record_of(caller="two"))
    finally:
        os.umask(mask)
    assert [line["caller"] for line in lines_of(file)] == ["one", "two"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_that_root_makes_is_that_of_the_folders_owner(tmp_path: Path) -> None:
    """`mlflow-proxy keys` may run as root before the service's first start."""
    file = tmp_path / "folder" / "audit"
    file.parent.mkdir()
    os.chown(file.parent, 65534, 65533)
    audited(file, record_of())
    assert (file.stat().st_uid, file.stat().st_gid, stat.S_IMODE(file.stat().st_mode)) == (65534, 65533, 0o600)
    os.chown(file, 0, 0)
    assert len(audited(file, record_of())) == 2
    assert file.stat().st_uid == 0  # one that is there stays whose it is


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_link_gives_no_file_away(tmp_path: Path) -> None:
    """The folder's owner can put a link there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for name in ("there", "new"):
        (folder / name).symlink_to(tmp_path / name)
    (tmp_path / "there").touch()
    for name in ("there", "new"):
        audited(folder / name, record_of())
        assert (tmp_path / name).stat().st_uid == 0
        assert len(lines_of(tmp_path / name)) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder another user's")
def test_only_root_gives_files_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    file = tmp_path / "folder" / "audit"
    file.parent.mkdir()
    os.chown(file.parent, 65534, 65534)
    audited(file, record_of())
    assert file.stat().st_uid == 0


def test_off_has_no_thread_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = AuditLog("off")
    log.request(record_of())
    log.write("sign-in")
    log.close()
    assert not any(tmp_path.iterdir())
    assert not any(thread.name == "audit-log" for thread in threading.enumerate())


def test_lines_come_without_close(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    log = AuditLog(str(file))
    for count in (1, 2):
        log.request(record_of())
        assert eventually(lambda count=count: file.exists() and len(lines_of(file)) == count)  # type: ignore[misc]
    log.close()
    assert not log._thread.is_alive()


def write_many(to: str, worker: int, pause: float = 0.001) -> None:
    log = AuditLog(to)
    for number in range(3000):
        log.write("write", worker=worker, number=number, padding="x" * (200 * worker))
        if number % 100 == 0:
            time.sleep(pause)
    log.close()


def check_all(lines: list[dict[str, Any]], workers: int) -> None:
    """All lines of all workers, each once, and each worker's in order."""
    assert Counter(line["worker"] for line in lines) == dict.fromkeys(range(workers), 3000)
    for worker in range(workers):
        assert [line["number"] for line in lines if line["worker"] == worker] == list(range(3000))


def test_lines_of_several_workers_do_not_mix_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    workers = [FORK.Process(target=write_many, args=(str(file), worker)) for worker in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    check_all(lines_of(file), 4)


@pytest.mark.parametrize("kind", ["pipe", "nonblocking pipe", "socket"])
def test_lines_of_several_workers_do_not_mix_in_a_stream(kind: str) -> None:
    """What systemd and containers give them: one pipe or socket for all."""
    if kind == "socket":
        ours, theirs = socket.socketpair()
        reader, writer = ours.detach(), theirs.detach()
    else:
        reader, writer = os.pipe()
    os.set_blocking(writer, kind != "nonblocking pipe")

    def work(worker: int) -> None:
        os.dup2(writer, 2)
        write_many("stderr", worker)

    workers = [FORK.Process(target=work, args=(worker,), daemon=True) for worker in range(4)]
    for process in workers:
        process.start()
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        lines = [json.loads(line) for line in source]
    for process in workers:
        process.join()
    check_all(lines, 4)


def test_long_lines_reach_a_slow_reader_whole() -> None:
    """More than a pipe takes at once, and it says so instead of waiting."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def work() -> None:
        os.dup2(writer, 2)
        log = AuditLog("stderr")
        for number in range(100):
            log.write("write", number=number, padding="x" * 10_000)
        log.close()

    process = FORK.Process(target=work)
    process.start()
    os.close(writer)
    time.sleep(0.3)
    with os.fdopen(reader, "rb") as source:
        assert [json.loads(line)["number"] for line in source] == list(range(100))
    process.join()


def test_nothing_is_lost_while_the_file_is_rotated(tmp_path: Path) -> None:
    """As logrotate does it: moved away, made anew by the next write, several workers writing."""
    file = tmp_path / "audit"
    workers = [FORK.Process(target=write_many, args=(str(file), worker, 0.03)) for worker in range(2)]
    for process in workers:
        process.start()
    moved: list[Path] = []
    while any(process.is_alive() for process in workers):
        if file.exists():
            moved.append(tmp_path / f"audit.{len(moved):04d}")
            file.rename(moved[-1])
        time.sleep(0.005)
    lines = lines_of(*moved, *([file] if file.exists() else []))
    assert len(moved) > 3
    assert Counter((line["worker"], line["number"]) for line in lines) == dict.fromkeys(
        [(worker, number) for worker in range(2) for number in range(3000)], 1
    )


def test_many_threads(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    log = AuditLog(str(file))

    def work(thread: int) -> None:
        for number in range(1000):
            log.write("sign-in", thread=thread, number=number)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert Counter(line["thread"] for line in lines_of(file)) == dict.fromkeys(range(8), 1000)


# Where it cannot be written


FULL = """
import json, resource, sys, time
from pathlib import Path
from mlflow_proxy.telemetry import audit
audit._RETRY = 0.05
file = Path(sys.argv[1])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))   # the kernel cuts a write short there, as on a full disk
log = audit.AuditLog(str(file))
for number in range(20_500):
    log.write("write", number=number)
    if number == 1000:
        time.sleep(0.5)
time.sleep(0.5)
held = file.read_bytes()
dropped = log.dropped
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
end = time.monotonic() + 60
while b"lines-dropped" not in file.read_bytes() and time.monotonic() < end:
    time.sleep(0.05)
log.write("write", number=-1)
log.close()
print(json.dumps([held.decode(), dropped]))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """No line is cut, those that wait are written later, and the rest is counted."""
    file = tmp_path / "audit"
    done = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=True)
    held, dropped = json.loads(done.stdout)
    assert held.endswith("\n") or held == ""
    whole = [json.loads(line)["number"] for line in held.splitlines()]
    lines = lines_of(file)
    numbers = [line["number"] for line in lines if line["event"] == "write"]
    assert dropped == 20_500 - 20_000 - len(whole)
    assert numbers == [*range(20_000 + len(whole)), -1]
    assert [line["lines"] for line in lines if line["event"] == "lines-dropped"] == [dropped]
    assert done.stderr.count("it is tried again") == 1
    assert done.stderr.count("it can be written again") == 1


def write_into_little_room(to: str, worker: int) -> None:
    """The disk is full again and again: the limit on a file's size grows by little."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    module._RETRY = module._INTERVAL = 0.001
    log = AuditLog(to)
    for number in range(3000):
        log.write("write", worker=worker, number=number, padding="x" * (number * 7 % 200))
        if number % 10 == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (number * 300 + 777, hard))
            time.sleep(0.002)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()


def test_a_disk_that_is_full_now_and_then_for_several_workers(tmp_path: Path) -> None:
    """Who takes back what was cut short takes nothing of the others'."""
    file = tmp_path / "audit"
    workers = [FORK.Process(target=write_into_little_room, args=(str(file), worker)) for worker in range(3)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    check_all(lines_of(file), 3)


def test_a_folder_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RETRY", 0.02)
    file = tmp_path / "later" / "audit"
    log = AuditLog(str(file))
    log.request(record_of(caller="one"))
    assert eventually(lambda: log._failing)
    log.request(record_of(caller="two"))
    file.parent.mkdir()
    assert eventually(lambda: file.exists() and len(lines_of(file)) == 2)
    log.close()
    assert [line["caller"] for line in lines_of(file)] == ["one", "two"]
    assert [message for message in caplog.messages if "No such file" in message] == caplog.messages[:1]
    assert log.dropped == 0


def test_close_says_what_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_CLOSING", 0.2)
    log = AuditLog(str(tmp_path / "nowhere" / "audit"))
    for _ in range(3):
        log.request(record_of())
    assert log.close() == 3
    assert "3 lines could not be written" in caplog.text
    other = AuditLog(str(tmp_path / "audit"))
    other.request(record_of())
    assert other.close() == 0


def test_a_named_pipe_is_no_file_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSING", 0.2)
    os.mkfifo(tmp_path / "pipe")
    log = AuditLog(str(tmp_path / "pipe"))
    log.request(record_of())
    assert eventually(lambda: log._failing)
    log.close()
    log._thread.join(10)
    assert not log._thread.is_alive()


def test_problems(tmp_path: Path) -> None:
    for good in ("off", "stderr", "stdout", str(tmp_path / "audit")):
        assert problem_with(good) is None
    assert not any(tmp_path.iterdir())
    (tmp_path / "there").write_text("")
    assert problem_with(str(tmp_path / "there")) is None
    assert f"{tmp_path / 'no'} does not exist" in (problem_with(str(tmp_path / "no" / "audit")) or "")
    assert "not a regular file" in (problem_with(str(tmp_path)) or "")
    assert "not a regular file" in (problem_with("/dev/full") or "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try as another user")
def test_problems_of_another_user(tmp_path: Path) -> None:
    """Root may write everywhere, so that a process of nobody's has to ask."""
    file = tmp_path / "audit"
    file.write_text("")
    os.chmod(file, 0o600)
    answers = FORK.Queue()

    def ask() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        for path in (file, file.with_name("new")):
            answers.put(problem_with(str(path)))

    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and parent != Path("/") and "pytest" in str(parent):
            os.chmod(parent, 0o755)
    process = FORK.Process(target=ask)
    process.start()
    found = [answers.get(timeout=20) for _ in range(2)]
    process.join()
    assert "cannot be written to" in (found[0] or "")
    assert "folder" in (found[1] or "")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


# Asking it


def test_who_deleted_run_x(tmp_path: Path) -> None:
    """The commands of docs/audit.md, on a file that an audit log wrote."""
    text = (ROOT / "docs" / "audit.md").read_text("utf-8")
    commands = re.findall(r"^jq .*$", text, re.MULTILINE)
    assert len(commands) >= 4
    file = tmp_path / "audit.jsonl"
    log = AuditLog(str(file))
    run = "0123456789abcdef0123456789abcdef"
    log.request(record_of(caller="key:good", resources={"run_id": "other"}))
    log.request(record_of(caller="key:reader", action="GetRun", writes=False, resources={"run_id": run}))
    log.request(record_of(caller="key:late", resources={"run_id": run}, status=404))
    log.request(record_of(caller="user:eve@example.com", resources={"run_id": ["decoy", run]}))
    log.request(record_of(caller="key:ci", status=403, error="The role 'reader' does not allow DeleteRun"))
    log.close()
    answers = []
    for command in commands:
        script = command.replace("RUN_ID", run).replace("/var/log/mlflow-proxy/audit.jsonl", str(file))
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert re.fullmatch(r'\["\S+Z","user:eve@example.com","198\.51\.100\.7","k1"\]\n', answers[0])
    assert all(answers)
