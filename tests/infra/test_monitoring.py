"""Metrics from the log, dashboard, anomaly detection, alarms. The log's own words are taken from the proxy."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.infra.variants import COMPUTES, MODES, synthesize

from mlflow_proxy.aws.sessions import CredentialsUnavailable
from mlflow_proxy.errors import Refusal
from mlflow_proxy.sending import _no_credentials
from mlflow_proxy.targets import Target, default_endpoint, parse_arn
from mlflow_proxy.telemetry.record import Record


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


def line(status: int, *, limit: str = "", error: str = "") -> dict[str, Any]:
    record = Record("GET", "id")
    record.status, record.limit, record.error = status, limit, error
    return dict(json.loads(record.json_line()))


def counted(given: dict[str, Any]) -> set[str]:
    return {name.removeprefix("tracking-") for name, pattern in filters().items() if matches(pattern, given)}


def no_credentials() -> Refusal:
    arn = parse_arn("arn:aws:sagemaker:eu-central-1:123456789012:mlflow-tracking-server/x")
    target = Target(name="x", arn=arn, endpoint=default_endpoint(arn), assume_role_arn=None, external_id=None,
                    session_name="s", ca_bundle=None, default=True)  # fmt: skip
    return _no_credentials(target, CredentialsUnavailable("expired"))


def test_each_kind_of_request_line_is_counted_where_it_belongs() -> None:
    every = {"Requests", "Latency"}
    assert counted(line(200)) == every
    assert counted(line(500)) == every | {"Errors"}
    assert counted(line(401)) == every | {"AuthFailures"}
    assert counted(line(403)) == every | {"Denied"}
    assert counted(line(429)) == every | {"Throttled"}
    assert counted(line(429, limit="caller rate")) == every | {"Throttled", "Limited"}
    refusal = no_credentials()
    assert counted(line(refusal.status, error=refusal.message)) == every | {"Errors", "CredentialFailures"}
    assert counted(line(503, error="busy")) == every | {"Errors"}


def test_audit_lines_in_the_same_log_are_not_counted() -> None:
    assert counted({"time": "t", "audit": 1, "event": "denied", "status": 401, "action": "GetRun"}) == set()


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
        "UnusualTraffic",
        "UnusualErrors",
    }
    (topic,) = synthesize(mode, compute).resources("flaskapp", "AWS::SNS::Topic")
    for name, alarm in found.items():
        assert alarm["AlarmActions"] == alarm["OKActions"] == [{"Ref": topic}], name
        assert alarm["AlarmDescription"].startswith(f"MLflow proxy ({mode}): ")
        assert alarm["TreatMissingData"] == "notBreaching"


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
