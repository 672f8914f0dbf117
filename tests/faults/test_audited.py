"""What is audited of requests whose subject is not in their body or that are not known, and who may send them."""

from __future__ import annotations

import json

import pytest
from tests.faults.conftest import Stage
from tests.faults.upstreams import answer, answers


def audited(stage: Stage, path: str, method: str, *headers: str, body: bytes = b"") -> dict[str, object]:
    got = stage.call(path, method, *headers, body=body)
    return stage.proxy.audit_line(got.value("x-request-id"))


def test_the_experiment_and_the_workspace_of_headers(steady: Stage) -> None:
    named = ("X-MLflow-Experiment-Id: 7", "X-MLflow-Workspace: team")
    line = audited(steady, "/v1/traces", "POST", *named, "Content-Type: application/x-protobuf", body=b"\x0a\x00")
    assert (line["action"], line["resources"]) == ("LogTraces", {"experiment_id": "7", "workspace": "team"})
    assert line["not_looked_into"] == "opaque"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_every_unknown_action(steady: Stage, method: str) -> None:
    line = audited(steady, "/api/2.0/mlflow/new?run_id=r", method, "X-MLflow-Workspace: team")
    assert (line["event"], line["action"]) == ("write", f"Unknown:{method} /api/2.0/mlflow/new")
    assert line["resources"] == {"run_id": "r", "workspace": "team"}


@pytest.mark.parametrize("site", ["Sec-Fetch-Site: cross-site", "Origin: https://evil.example"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_a_page_of_another_site_reads_nothing_unknown(steady: Stage, method: str, site: str) -> None:
    assert steady.call("/api/2.0/mlflow/new", method, site).status == 403
    assert steady.upstream.arrived == []
    assert steady.call("/", "GET", site).status == 200
    assert steady.call("/api/2.0/mlflow/new", method, "Sec-Fetch-Site: same-origin").status == 200


def test_a_large_body_is_forwarded_and_not_looked_into(steady: Stage) -> None:
    delete = "/api/2.0/mlflow/runs/delete"
    body = json.dumps({"run_id": "r", "x": "x" * (1 << 20)}).encode()
    line = audited(steady, delete, "POST", "Content-Type: application/json", body=body)
    assert (line["status"], line["resources"], line["not_looked_into"]) == (200, {}, "too-large")
    smaller = json.dumps({"run_id": "r", "x": "x" * (1 << 19)}).encode()
    line = audited(steady, delete, "POST", "Content-Type: application/json", body=smaller)
    assert (line["resources"], "not_looked_into" in line) == ({"run_id": "r"}, False)


def test_browsers_are_told_not_to_guess_types_and_not_to_frame(steady: Stage) -> None:
    def told(path: str, *headers: str) -> list[list[str]]:
        got = steady.call(path, "GET", *headers)
        return [got.values("x-content-type-options"), got.values("x-frame-options")]

    assert told("/") == [["nosniff"], ["SAMEORIGIN"]]
    for path in ("/-/health", "/-/version", "/-/none", "/-/"):
        assert told(path) == [["nosniff"], ["DENY"]], path
    assert told("/new", "Sec-Fetch-Site: cross-site") == [["nosniff"], ["DENY"]]

    steady.upstream.script = answers(
        answer(b"{}", "200 OK", "x-content-type-options: nosniff", "X-Frame-Options: DENY")
    )
    assert told("/") == [["nosniff"], ["DENY"]]
