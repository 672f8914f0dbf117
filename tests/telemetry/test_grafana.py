"""Dashboard and alert rules ask for metrics that there are, and for all of them; a real Prometheus answers them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from mlflow_proxy.telemetry.metrics import FAMILIES, LIMITS, PREFIX, UPSTREAM_ERRORS, Metrics, State, exposition
from mlflow_proxy.telemetry.record import Record

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))["groups"] for rule in group["rules"]
]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PANEL_EXPRESSIONS: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES: list[str] = [
    variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable
]
EXPRESSIONS = [*PANEL_EXPRESSIONS, *VARIABLES, *(str(rule["expr"]) for rule in RULES)]

_NAME = re.compile(r"\bmlflow_proxy_\w+")
_MATCHERS = re.compile(r"(mlflow_proxy_\w+)\{([^}]*)\}")
_GROUPED = re.compile(r"\b(?:by|on) \(([^)]*)\)")


class Served:
    """The metrics of a worker that had everything happen to it, where Prometheus can fetch them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times = 0
        self.metrics = Metrics(folder, version="1.2.3")
        self.metrics.state = lambda: State(
            places=[("dev", 64, 3, 1)],
            credential_expiry={"dev": 100.0},
            storage_failures=self.times,
            log_lines_dropped=self.times,
            audit_lines_dropped=self.times,
        )
        self.metrics.start(asyncio.new_event_loop())
        self.happen()

    def happen(self) -> None:
        """Everything once more."""
        self.times += 20
        for status in (200, 404, 503):
            record = Record("GET", "request-00000001")
            record.started = time.perf_counter() - 20.0
            record.target, record.action, record.status = "dev", "GetRun", status
            record.bytes_in, record.bytes_out, record.retries = 10, 200, 1
            self.metrics.observe(record)
            for kind in UPSTREAM_ERRORS:
                record.upstream_error = kind
                self.metrics.observe(record)
            for limit in LIMITS:
                record.limit = limit
                self.metrics.observe(record)
        for _ in range(60):
            self.metrics.auth_failure("key")
        self.metrics.dropped_identity(1)
        self.metrics._write(self.metrics._samples())

    def samples(self) -> dict[str, list[dict[str, str]]]:
        """The labels of all samples by name."""
        found: dict[str, list[dict[str, str]]] = {}
        for family in text_string_to_metric_families(exposition(self.folder)[0].decode()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(dict(sample.labels))
        return found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "metrics"
    folder.mkdir()
    served = Served(folder)
    yield served
    served.metrics.close()


# Names


def test_every_metric_that_is_used_exists(served: Served) -> None:
    assert {name for text in EXPRESSIONS for name in _NAME.findall(text)} <= set(served.samples())


def test_every_label_and_value_that_is_used_exists(served: Served) -> None:
    samples = served.samples()
    for text in EXPRESSIONS:
        for name, matchers in _MATCHERS.findall(text):
            for label, how, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
                values = {labels.get(label) for labels in samples[name]}
                assert None not in values, f"{name} has no label {label}"
                for one in [] if value == "$target" else value.split("|"):
                    assert one in values or one == "3xx", f"{name} has no {label}{how}{one}"
        labels = {label.strip() for group in _GROUPED.findall(text) for label in group.split(",")}
        known = {label for name in _NAME.findall(text) for of in samples[name] for label in of}
        assert labels <= known, text


def test_every_metric_is_shown() -> None:
    """On the dashboard, that is; an alert alone shows no history."""
    names = {name for text in PANEL_EXPRESSIONS for name in _NAME.findall(text)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert shown == {PREFIX + name for name in FAMILIES}


# Form


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_are_balanced(text: str) -> None:
    open_ones = []
    for sign in re.sub(r'"[^"]*"', '""', text):
        if sign in "([{":
            open_ones.append(sign)
        elif sign in ")]}":
            assert open_ones, text
            assert open_ones.pop() + sign in ("()", "[]", "{}"), text
    assert open_ones == []
    assert text.count('"') % 2 == 0


def test_counters_are_only_read_by_their_increase() -> None:
    counters = [f"{PREFIX}{name}" for name, family in FAMILIES.items() if family.kind == "counter"]
    counters += [f"{PREFIX}request_duration_seconds_{part}" for part in ("bucket", "sum", "count")]
    for text in [*PANEL_EXPRESSIONS, *(str(rule["expr"]) for rule in RULES)]:
        for name in counters:
            uses = len(re.findall(rf"\b{name}\b", text))
            assert len(re.findall(rf"(?:rate|increase)\({name}(?:\{{[^}}]*\}})?\[[^]]+\]\)", text)) == uses, text


def test_panels() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = re.search(r"by \(([^)]*)\)", target["expr"])
            kept = {label.strip() for label in grouped[1].split(",")} - {"le"} if grouped else set()
            assert shown == kept, target["expr"]
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "target"]
    assert "id" not in DASHBOARD  # Grafana gives it


def test_alerts() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description"} == set(rule["annotations"])
        by = re.findall(r"by \(([^)]*)\)", rule["expr"])
        kept = {label.strip() for group in by for label in group.split(",")} - {"le"}
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= kept, rule["alert"]


# Prometheus itself, where it is installed


needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed (the package prometheus)",
)

# What makes each alert fire: series as promtool writes them (a start and its growth a minute), and the minute.
FIRES: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "MlflowProxyGone": ({}, "6m", {}),
    "MlflowProxyErrors": (
        {
            'requests_total{target="dev",status="5xx"}': "0+60x40",
            'requests_total{target="dev",status="2xx"}': "0+600x40",
        },
        "20m",
        {"target": "dev"},
    ),
    "MlflowProxySlow": (
        {
            'request_duration_seconds_bucket{target="dev",status="2xx",le="5.0"}': "0+90x60",
            'request_duration_seconds_bucket{target="dev",status="2xx",le="10.0"}': "0+100x60",
            'request_duration_seconds_bucket{target="dev",status="2xx",le="+Inf"}': "0+100x60",
        },
        "30m",
        {"target": "dev"},
    ),
    "MlflowProxyUpstreamUnreachable": (
        {'upstream_errors_total{target="dev",kind="connect"}': "0+3x40"},
        "15m",
        {"target": "dev"},
    ),
    "MlflowProxyThrottled": (
        {'upstream_errors_total{target="dev",kind="throttled"}': "0+3x40"},
        "20m",
        {"target": "dev"},
    ),
    "MlflowProxyQueueFull": (
        {'limited_requests_total{target="dev",limit="queue full"}': "0+3x40"},
        "15m",
        {"target": "dev"},
    ),
    "MlflowProxyCredentialsExpire": (
        {'credential_expiry_seconds{target="dev"}': "120-10x10", 'credential_expiry_seconds{target="app"}': "900x10"},
        "3m",
        {"target": "dev"},
    ),
    "MlflowProxyLimitsStorageAway": ({"limits_storage_failures_total": "0+60x40"}, "10m", {}),
    "MlflowProxyAuthFailures": ({'auth_failures_total{way="key"}': "0+120x40"}, "20m", {"way": "key"}),
    "MlflowProxyForgedIdentity": ({"dropped_identity_headers_total": "0 0 0 1 1 1 1 1"}, "5m", {}),
    "MlflowProxyAuditLinesDropped": ({"audit_lines_dropped_total": "0 0 0 7 7 7 7 7"}, "5m", {}),
    "MlflowProxyLogLinesDropped": ({"log_lines_dropped_total": "0 0 0 7 7 7 7 7"}, "5m", {}),
}
# A service that is well used and well: none of them may fire.
WELL = {
    "build_info": "1x40",
    'requests_total{target="dev",status="5xx"}': "0+1x40",
    'requests_total{target="dev",status="2xx"}': "0+600x40",
    'requests_total{target="rare",status="5xx"}': "0 1x39",
    'request_duration_seconds_bucket{target="dev",status="2xx",le="0.5"}': "0+99x40",
    'request_duration_seconds_bucket{target="dev",status="2xx",le="+Inf"}': "0+100x40",
    'request_duration_seconds_bucket{target="dev",status="5xx",le="0.5"}': "0x40",
    'request_duration_seconds_bucket{target="dev",status="5xx",le="+Inf"}': "0+100x40",
    'upstream_errors_total{target="dev",kind="aws"}': "0+100x40",
    'upstream_errors_total{target="dev",kind="connect"}': "0 1x39",
    'limited_requests_total{target="dev",limit="caller rate"}': "0+100x40",
    'limited_requests_total{target="dev",limit="waited"}': "0+100x40",
    'credential_expiry_seconds{target="dev"}': "900x40",
    'auth_failures_total{way="key"}': "0+10x40",
    "limits_storage_failures_total": "0 1x39",
    "dropped_identity_headers_total": "5x40",
    "audit_lines_dropped_total": "5x40",
    "log_lines_dropped_total": "5x40",
}


def as_test(series: dict[str, str], expected: dict[str, tuple[str, list[dict[str, str]]]]) -> dict[str, Any]:
    return {
        "interval": "1m",
        "input_series": [{"series": PREFIX + name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"alertname": name, "eval_time": when, "exp_alerts": [{"exp_labels": labels} for labels in alerts]}
            for name, (when, alerts) in expected.items()
        ],
    }


@needs_prometheus
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    assert set(FIRES) == {rule["alert"] for rule in RULES}
    severity = {rule["alert"]: rule["labels"]["severity"] for rule in RULES}
    rules = [{**rule, "annotations": {}} for rule in RULES]  # promtool would compare the texts, too
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    tests = [as_test(WELL, {name: (f"{minute}m", []) for name in FIRES}) for minute in (5, 20, 39)]
    for name, (series, when, labels) in FIRES.items():
        tests.append(as_test(series, {name: (when, [{**labels, "severity": severity[name]}])}))
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_exposition_is_as_prometheus_likes_it(served: Served) -> None:
    """Its linter also knows conventions: units, suffixes, help."""
    text = exposition(served.folder)[0]
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()


@pytest.fixture
def prometheus(served: Served, tmp_path: Path) -> Iterator[str]:
    """A real Prometheus with the alert rules, which scrapes; its URL. More happens from scrape to scrape."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.happen()
            body, content_type = exposition(served.folder)
            self.send_response(200)
            self.send_header("content-type", content_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(FOLDER / "alerts.yml")],
        "scrape_configs": [{"job_name": "proxy", "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (
        (tmp_path / "prometheus.log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}"

        def scraped_thrice() -> bool:
            query = {"query": "count_over_time(mlflow_proxy_build_info[1m])"}
            try:
                answer = requests.get(f"{url}/api/v1/query", query, timeout=30)
            except requests.ConnectionError:
                return False
            found = answer.json()["data"]["result"] if answer.ok else []
            return bool(found) and int(found[0]["value"][1]) >= 3

        try:
            assert eventually(scraped_thrice), (tmp_path / "prometheus.log").read_text()
            yield url
        finally:
            process.terminate()
            process.wait(30)
            server.shutdown()


@needs_prometheus
def test_a_real_prometheus_answers_every_question(prometheus: str) -> None:
    for text in PANEL_EXPRESSIONS:
        query = text.replace("$__rate_interval", "30s").replace("$target", ".*")
        answer = requests.get(f"{prometheus}/api/v1/query", {"query": query}, timeout=30).json()
        assert answer["status"] == "success", (query, answer)
        assert answer["data"]["result"], query
        assert all(sample["value"][1] != "NaN" for sample in answer["data"]["result"]), query
    groups = requests.get(f"{prometheus}/api/v1/rules", timeout=30).json()["data"]["groups"]
    assert [rule["name"] for group in groups for rule in group["rules"]] == [rule["alert"] for rule in RULES]

    def states() -> dict[str, str]:
        groups = requests.get(f"{prometheus}/api/v1/rules", timeout=30).json()["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
        return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}

    def inactive() -> list[str]:
        return [name for name, state in states().items() if state == "inactive"]

    # With all of that happening each second, all are at least on their way; only that no proxy is there is not so.
    eventually(lambda: inactive() == ["MlflowProxyGone"])
    assert inactive() == ["MlflowProxyGone"]
    at_once = {"MlflowProxyForgedIdentity", "MlflowProxyAuditLinesDropped", "MlflowProxyLogLinesDropped"}
    eventually(lambda: {name for name in at_once if states()[name] == "firing"} == at_once)
    assert {name for name in at_once if states()[name] == "firing"} == at_once
