"""AWS's own MLflow plugin takes the stand-in for the service, in both modes and with an assumed role."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CLIENT = Path(__file__).with_name("plugin_client.py")


def run_plugin(sagemaker: Any, arn: str, **more: str) -> subprocess.CompletedProcess[str]:
    foreign = ("AWS_", "MLFLOW_", "SAGEMAKER_", "PYTHONDONTWRITEBYTECODE")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
        **sagemaker.environment(),
        "MLFLOW_TRACKING_URI": arn,
        "SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT": sagemaker.endpoint,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        **more,
    }
    return subprocess.run(
        [sys.executable, str(CLIENT)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("mode", ["tracking_arn", "app_arn"])
def test_the_plugin_is_accepted(sagemaker: Any, admin: Any, mode: str) -> None:
    admin("DELETE", "requests")
    done = run_plugin(sagemaker, getattr(sagemaker, mode))
    assert done.stdout.endswith("all accepted\n"), done.stderr[-4000:]
    verdicts = {entry["verdict"] for entry in sagemaker.journal.last(1000) if entry["plane"] == "mlflow"}
    assert verdicts == {"allowed"}


def test_the_plugin_with_a_role(sagemaker: Any) -> None:
    role = sagemaker.roles["reader"]
    done = run_plugin(sagemaker, sagemaker.tracking_arn, SAGEMAKER_MLFLOW_ASSUME_ROLE_ARN=role)
    assert "assumed-role/reader/AuthBotoSagemakerMlFlow is not authorized" in done.stderr
    assert "sagemaker-mlflow:CreateExperiment" in done.stderr
