"""The journal, container credentials, and who may use the admin endpoint."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.credentials import Credentials

SEARCH = "/api/2.0/mlflow/experiments/search"
ONE = {"max_results": 1}


def test_journal_tells_what_arrived(developer: Any, sagemaker: Any, admin: Any) -> None:
    wire = developer.sign("GET", "/api/2.0/mlflow/runs/get", signed_query="run_id=%20x&a=", sent_query="run_id=+x&a")
    wire.with_header("x-request-id", "7").send(sagemaker.endpoint)
    entry = admin.last()
    expected = {
        "plane": "mlflow",
        "method": "GET",
        "path": "/api/2.0/mlflow/runs/get",
        "query": "run_id=+x&a",
        "target": "tracking",
        "principal": "arn:aws:iam::111122223333:user/developer",
        "access_key": developer.credentials.access_key,
        "action": "sagemaker-mlflow:GetRun",
        "session_tags": {},
        "source_identity": None,
        "verdict": "allowed",
        "status": 404,
        "fault": None,
        "amz_date": wire.header("x-amz-date"),
    }
    assert {name: entry[name] for name in expected} == expected
    assert {"x-request-id", "authorization", "host"} <= set(entry["header_names"])


def test_journal_tells_why_a_request_was_refused(developer: Any, sagemaker: Any, admin: Any) -> None:
    wire = developer.sign("POST", SEARCH, b"{}")
    replace(wire, body=b"{ }").send(sagemaker.endpoint)
    entry = admin.last()
    assert (entry["verdict"], entry["status"]) == ("InvalidSignatureException", 403)
    assert entry["reason"] == "x-amz-content-sha256 is not the body's hash"


def test_journal_is_bounded_and_can_be_cleared(developer: Any, admin: Any) -> None:
    for _ in range(3):
        developer.call("POST", SEARCH, ONE)
    numbers = [entry["number"] for entry in admin("GET", "requests?last=2")["requests"]]
    assert numbers[1] == numbers[0] + 1
    admin("DELETE", "requests")
    assert admin("GET", "requests")["requests"] == []
    assert admin("GET", "requests?last=x")["status"] == 400


def test_container_credentials(developer: Any, admin: Any) -> None:
    given = admin("GET", "container-credentials/writer?lifetime=2")
    expiry = datetime.fromisoformat(given["Expiration"])
    assert timedelta(0) < expiry - datetime.now(UTC) <= timedelta(seconds=2)
    credentials = Credentials(given["AccessKeyId"], given["SecretAccessKey"], given["Token"])
    container = replace(developer, credentials=credentials)
    assert container.call("POST", SEARCH, ONE).status == 200
    time.sleep(2.1)
    assert container.call("POST", SEARCH, ONE).error == "ExpiredTokenException"
    assert admin("GET", "container-credentials/absent")["status"] == 404


def test_botocore_takes_container_credentials(sagemaker: Any) -> None:
    code = (
        "import botocore.session as s; c = s.get_session().get_credentials(); "
        "print(c.method, c.get_frozen_credentials().access_key)"
    )
    url = f"{sagemaker.admin_endpoint}/_local/container-credentials/cross-account?lifetime=3600"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = url
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    method, key = done.stdout.split()
    assert method == "container-role"
    assert key.startswith("ASIA")


def test_environment(sagemaker: Any, admin: Any) -> None:
    told = admin("GET", "environment")
    assert told["endpoint"] == sagemaker.endpoint
    assert told["targets"] == {
        "tracking": sagemaker.tracking_arn,
        "app": sagemaker.app_arn,
        "cross-account": sagemaker.cross_account_arn,
    }
    assert told["environment"] == sagemaker.environment()


def test_stop_and_start(developer: Any, admin: Any) -> None:
    assert admin("POST", "servers/tracking/stop") == {"status": "Stopped"}
    assert developer.call("POST", SEARCH, ONE).status == 503
    assert admin("POST", "servers/tracking/start") == {"status": "Started"}
    assert developer.call("POST", SEARCH, ONE).status == 200
    assert admin("POST", "servers/app/stop")["status"] == 404


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
)
def test_foreign_host_or_origin(admin: Any, headers: dict[str, str]) -> None:
    assert admin("GET", "environment", headers=headers)["status"] == 403


def test_unknown_control(admin: Any) -> None:
    answer = admin("GET", "absent")
    assert answer["status"] == 404
    assert "POST /_local/faults" in answer["error"]
