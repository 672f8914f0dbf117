"""Workspaces, which Apps have and tracking servers do not; the callers' side of them is in plugin_client.py."""

import uuid
from typing import Any

WORKSPACES = "/api/3.0/mlflow/workspaces"
EXPERIMENTS = "/api/2.0/mlflow/experiments"


def named(name: str) -> dict[str, str]:
    return {"x-mlflow-workspace": name}


def test_experiments_belong_to_a_workspace(developer: Any, sagemaker: Any) -> None:
    name = f"team-{uuid.uuid4()}"

    def call(method: str, path: str, body: object = None, **options: Any) -> Any:
        return developer.call(method, path, body, arn=sagemaker.app_arn, **options)

    created = call("POST", WORKSPACES, {"name": name, "description": "a team's"})
    assert (created.status, created.json()["workspace"]) == (201, {"name": name, "description": "a team's"})
    experiment = call("POST", f"{EXPERIMENTS}/create", {"name": "hello"}, headers=named(name)).json()["experiment_id"]
    read = f"experiment_id={experiment}"
    inside = call("GET", f"{EXPERIMENTS}/get", signed_query=read, headers=named(name)).json()["experiment"]
    assert inside["artifact_location"] == f"s3://{sagemaker.bucket}/app/workspaces/{name}/{experiment}"
    assert call("GET", f"{EXPERIMENTS}/get", signed_query=read).status == 404
    assert call("DELETE", f"{WORKSPACES}/{name}", signed_query="mode=CASCADE").status == 204
    assert call("GET", f"{WORKSPACES}/{name}").status == 404


def test_without_the_header_it_is_the_default_workspace(developer: Any, sagemaker: Any) -> None:
    listed = developer.call("GET", WORKSPACES, arn=sagemaker.app_arn).json()["workspaces"]
    assert "default" in [workspace["name"] for workspace in listed]
    query = "experiment_id=0"
    answers = [
        developer.call("GET", f"{EXPERIMENTS}/get", arn=sagemaker.app_arn, signed_query=query, headers=headers)
        for headers in ({}, named("default"))
    ]
    assert [answer.status for answer in answers] == [200, 200]
    assert answers[0].body == answers[1].body


def test_a_tracking_server_has_none(developer: Any) -> None:
    assert developer.call("GET", WORKSPACES).status == 503
    answer = developer.call("POST", f"{EXPERIMENTS}/search", {"max_results": 1}, headers=named("default"))
    assert answer.json()["error_code"] == "FEATURE_DISABLED"
