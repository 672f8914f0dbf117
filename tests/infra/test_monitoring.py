"""Metrics from the log, dashboard, anomaly detection, alarms. The log lines are those of a running proxy."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from tests.faults.proxies import Proxy, running, target
from tests.infra.variants import COMPUTES, MODES, REGION, as_list, synthesize

from mlflow_proxy.access.key_record import make_key


def filters() -> dict[str, str]:
    return {
        one["Properties"]["MetricTransformations"][0]["MetricName"]: one["Properties"]["FilterPattern"]
        for one in synthesize().resources("flaskapp", "AWS::Logs::MetricFilter").values()
    }


def matches(pattern: str, line: dict[str, Any]) -> bool:
    """CloudWatch's JSON patterns, as far as they are used here (its guide, "Filter and pattern syntax")."""
    conditions = pattern.strip("{} ").split(" && ")
    return all(_holds(condition.strip(), line) for condition in conditions)


def _holds(condition: str, line: dict[str, Any]) -> bool:
    match = re.fullmatch(r'\$\.(\w+) (>=|=|!=) (?:"(.*)"|(\d+))', condition)
    assert match is not None, condition
    name, sign, text, number = match.groups()
    if name not in line:
        return False
    value = line[name]
    if number is not None:
        return bool({">=": value >= int(number), "=": value == int(number)}[sign])
    same = re.fullmatch(re.escape(text).replace(r"\*", ".*"), str(value)) is not None
    return same if sign == "=" else not same


class Mlflow(http.server.BaseHTTPRequestHandler):
    """Answers with the status that an experiment's id names."""

    def do_GET(self) -> None:
        (status,) = parse_qs(urlsplit(self.path).query)["experiment_id"]
        body = b"{}"
        self.send_response(int(status))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.path = "/?experiment_id=200"
        self.do_GET()

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(folder: Path, environ: dict[str, str]) -> Iterator[tuple[Proxy, str]]:
    """A proxy that logs as the deployed ones do, and a key for it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mlflow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shown, key = make_key("tester", "tester", created=datetime.now(UTC), expires=None)
    keys = folder / "keys.jsonl"
    keys.write_text(json.dumps(key.fields()) + "\n")
    role = {"name": "tester", "targets": ["*"], "allow": ["GetExperiment", "CreateExperiment", "GetRun"]}
    sections = {
        "log": {"format": "json"},
        "audit": {"to": "stdout"},
        "access": {"keys_file": str(keys)},
        "limits": {"caller_rate": "8/hour"},
    }
    targets = [target("team", f"http://127.0.0.1:{server.server_port}")]
    try:
        with running(folder, targets, upstream={"retries": 0}, sections=sections, roles=[role], environ=environ) as one:
            yield one, shown
    finally:
        server.shutdown()
        server.server_close()


def request_line(proxy: Proxy, answer: requests.Response) -> dict[str, Any]:
    """What the proxy logged of a request; the audit log may have a line of it, too."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for text in proxy.stdout.read_text().splitlines():
            line = json.loads(text)
            if line.get("request_id") == answer.headers["x-request-id"] and "audit" not in line:
                return dict(line)
        time.sleep(0.02)
    raise AssertionError("no line")


def counted(line: dict[str, Any]) -> set[str]:
    return {name.removeprefix("tracking-") for name, pattern in filters().items() if matches(pattern, line)}


CALL = "/api/2.0/mlflow/experiments/get?experiment_id="
EVERY = {"Requests", "Latency"}


def test_each_kind_of_request_line_is_counted_where_it_belongs(tmp_path: Path) -> None:
    with serving(tmp_path, {}) as (proxy, key):

        def ask(path: str, credential: str, method: str = "GET") -> tuple[int, set[str]]:
            headers = {"Authorization": f"Bearer {credential}", "Content-Type": "application/json"}
            url = f"http://127.0.0.1:{proxy.port}{path}"
            body = "{}" if method == "POST" else None
            answer = requests.request(method, url, headers=headers, data=body, timeout=30)
            return answer.status_code, counted(request_line(proxy, answer))

        assert ask(f"{CALL}200", key) == (200, EVERY)
        assert ask(f"{CALL}404", key) == (404, EVERY)
        assert ask(f"{CALL}500", key) == (500, EVERY | {"Errors"})
        assert ask(f"{CALL}503", key) == (503, EVERY | {"Errors"})
        assert ask(f"{CALL}429", key) == (429, EVERY | {"Throttled"})
        assert ask(f"{CALL}200", "wrong") == (401, EVERY | {"AuthFailures"})
        assert ask("/api/2.0/mlflow/experiments/delete", key, "POST") == (403, EVERY | {"Denied"})
        assert ask("/api/2.0/mlflow/experiments/create", key, "POST") == (200, EVERY)
        limited = [ask(f"{CALL}200", key) for _ in range(8)]
        assert limited[-1] == (429, EVERY | {"Throttled", "Limited"})

        lines = [json.loads(line) for line in proxy.stdout.read_text().splitlines()]
        audit = [line for line in lines if "audit" in line]
        assert {line["event"] for line in audit} >= {"denied", "write"}
        assert all(counted(line) == set() for line in audit), "audit lines are in the same log and are no requests"


def test_missing_aws_credentials_are_counted(tmp_path: Path) -> None:
    environ = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    with serving(tmp_path, environ) as (proxy, key):
        headers = {"Authorization": f"Bearer {key}"}
        answer = requests.get(f"http://127.0.0.1:{proxy.port}{CALL}200", headers=headers, timeout=60)
        assert answer.status_code == 501
        assert counted(request_line(proxy, answer)) == EVERY | {"Errors", "CredentialFailures"}


def test_latency_is_measured_in_milliseconds() -> None:
    (latency,) = (
        one["Properties"]["MetricTransformations"][0]
        for one in synthesize().resources("flaskapp", "AWS::Logs::MetricFilter").values()
        if one["Properties"]["MetricTransformations"][0]["MetricName"].endswith("Latency")
    )
    assert (latency["MetricValue"], latency["Unit"]) == ("$.duration_ms", "Milliseconds")


def alarms(mode: str = "tracking", compute: str = "ec2") -> dict[str, dict[str, Any]]:
    found = synthesize(mode, compute).resources("flaskapp", "AWS::CloudWatch::Alarm")
    return {re.sub(r"^Monitoring|[0-9A-F]{8}$", "", name): one["Properties"] for name, one in found.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", COMPUTES)
def test_alarms_tell_the_topic(mode: str, compute: str) -> None:
    found = alarms(mode, compute)
    assert set(found) == {
        "Proxy5xx",
        "Balancer5xx",
        "SlowAnswers",
        "UnhealthyHosts",
        "Throttling",
        "NoCredentials",
        "AuthFailureBurst",
        "CertificateExpires",
        "UnusualTraffic",
        "UnusualErrors",
    }
    (topic,) = synthesize(mode, compute).resources("flaskapp", "AWS::SNS::Topic")
    for name, alarm in found.items():
        assert alarm["AlarmActions"] == alarm["OKActions"] == [{"Ref": topic}], name
        assert alarm["AlarmDescription"].startswith(f"MLflow proxy ({mode}): ")
        assert alarm["TreatMissingData"] == ("ignore" if name == "CertificateExpires" else "notBreaching")


@pytest.mark.parametrize("mode", MODES)
def test_alarms_on_the_log_watch_metrics_that_the_log_gives(mode: str) -> None:
    made = synthesize(mode)
    given = {
        one["Properties"]["MetricTransformations"][0]["MetricName"]
        for one in made.resources("flaskapp", "AWS::Logs::MetricFilter").values()
    }
    watched = {
        metric
        for alarm in made.resources("flaskapp", "AWS::CloudWatch::Alarm").values()
        for metric in re.findall(r'"MetricName": "([^"]+)"', json.dumps(alarm["Properties"]))
    }
    of_log = {name for name in watched if name.startswith(f"{mode}-")}
    assert of_log == {f"{mode}-{name}" for name in ("Throttled", "CredentialFailures", "AuthFailures", "Errors")}
    assert of_log <= given


def test_certificate_that_nobody_renews_is_told_in_time() -> None:
    made = synthesize()
    alarm = alarms()["CertificateExpires"]
    assert (alarm["Namespace"], alarm["MetricName"], alarm["Statistic"]) == (
        "AWS/CertificateManager",
        "DaysToExpiry",
        "Minimum",
    )
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (30, "LessThanOrEqualToThreshold")
    (certificate,) = made.resources("flaskapp", "Custom::SelfSignedCertificate")
    assert alarm["Dimensions"] == [{"Name": "CertificateArn", "Value": {"Ref": certificate}}]


def test_slow_answers_are_judged_by_their_99th_percentile() -> None:
    slow = alarms()["SlowAnswers"]
    assert (slow["ExtendedStatistic"], slow["MetricName"]) == ("p99", "TargetResponseTime")


def test_anomalies_of_traffic_and_errors_are_detected() -> None:
    for name, metric in (("UnusualTraffic", "RequestCount"), ("UnusualErrors", "tracking-Errors")):
        alarm = alarms()[name]
        text = json.dumps(alarm["Metrics"])
        assert "ANOMALY_DETECTION_BAND" in text
        assert f'"MetricName": "{metric}"' in text
        assert alarm["ThresholdMetricId"]


def test_alarms_may_publish_and_nothing_goes_without_tls() -> None:
    policy = synthesize().one("flaskapp", "AWS::SNS::TopicPolicy")["PolicyDocument"]["Statement"]
    by_effect = {one["Effect"]: one for one in policy}
    assert by_effect["Allow"]["Principal"] == {"Service": "cloudwatch.amazonaws.com"}
    assert by_effect["Allow"]["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}
    assert by_effect["Deny"]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


@pytest.mark.parametrize(("compute", "users"), [("ec2", {"Alarms", "ScalingEvents"}), ("fargate", {"Alarms"})])
def test_topic_has_a_key_that_its_publishers_may_use(compute: str, users: set[str]) -> None:
    made = synthesize("tracking", compute)
    (name,) = made.resources("flaskapp", "AWS::KMS::Key")
    assert made.one("flaskapp", "AWS::SNS::Topic")["KmsMasterKeyId"] == {"Fn::GetAtt": [name, "Arn"]}
    key = made.one("flaskapp", "AWS::KMS::Key")
    assert key["EnableKeyRotation"] is True
    found = {one["Sid"]: one for one in key["KeyPolicy"]["Statement"] if "Sid" in one}
    assert set(found) == users
    for statement in found.values():
        assert set(as_list(statement["Action"])) == {"kms:Decrypt", "kms:GenerateDataKey"}
    assert found["Alarms"]["Principal"] == {"Service": "cloudwatch.amazonaws.com"}
    assert found["Alarms"]["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}
    if "ScalingEvents" in found:
        condition = found["ScalingEvents"]["Condition"]["StringEquals"]
        assert "AWSServiceRoleForAutoScaling" in json.dumps(condition["aws:PrincipalArn"])
        assert condition["kms:ViaService"] == f"sns.{REGION}.amazonaws.com"


def test_somebody_is_told_by_mail_if_named() -> None:
    made = synthesize(alarm_email="ops@example.com").one("flaskapp", "AWS::SNS::Subscription")
    assert (made["Protocol"], made["Endpoint"]) == ("email", "ops@example.com")
    assert not synthesize().resources("flaskapp", "AWS::SNS::Subscription")


def test_dashboard_shows_what_operators_ask_for() -> None:
    body = json.dumps(synthesize().one("flaskapp", "AWS::CloudWatch::Dashboard")["DashboardBody"])
    for title in ("Traffic", "Errors", "Latency", "Throttling", "Hosts", "Callers refused"):
        assert f'\\"title\\":\\"{title}' in body.replace("\\\\", "\\"), title


def test_logs_are_kept_for_the_time_that_was_asked_for() -> None:
    for chosen, days in (({}, 14), ({"log_retention_days": "90"}, 90)):
        for group in synthesize(**chosen).resources("flaskapp", "AWS::Logs::LogGroup").values():
            assert group["Properties"]["RetentionInDays"] == days
