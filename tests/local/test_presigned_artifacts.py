"""MLflow's endpoints for presigned URLs of artifacts: S3 answers what they hand out, and they can be switched off."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from mlflow_proxy.local.service import Features

API = "/api/2.0/mlflow"
ENDPOINTS = [
    f"{root}/mlflow/artifacts/presigned-{way}-url"
    for root in ("/api/2.0", "/ajax-api/2.0")
    for way in ("upload", "download")
]


@pytest.fixture(params=["tracking_arn", "app_arn"])
def mode(request: Any, sagemaker: Any) -> str:
    return str(getattr(sagemaker, request.param))


@pytest.fixture
def run(developer: Any, mode: str) -> str:
    run = developer.call("POST", f"{API}/runs/create", {"experiment_id": "0"}, arn=mode).json()["run"]
    return str(run["info"]["run_id"])


@pytest.fixture
def features(sagemaker: Any) -> Iterator[Features]:
    yield sagemaker.features
    sagemaker.features.presigned_artifacts = True


def test_what_is_uploaded_can_be_downloaded(developer: Any, mode: str, run: str) -> None:
    content = uuid.uuid4().bytes * 100
    named = {"run_id": run, "path": "models/a b/größe.bin"}
    upload = developer.call("POST", f"{API}/artifacts/presigned-upload-url", named, arn=mode).json()
    requests.put(upload["presigned_url"], content, headers=upload.get("headers")).raise_for_status()
    download = developer.call("POST", f"{API}/artifacts/presigned-download-url", named, arn=mode).json()
    assert int(download["file_size"]) == len(content)
    assert requests.get(download["presigned_url"], headers=download.get("headers")).content == content
    listed = developer.call("GET", f"{API}/artifacts/list", signed_query=f"path=models%2Fa%20b&run_id={run}", arn=mode)
    assert [file["path"] for file in listed.json()["files"]] == [named["path"]]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_switched_off_they_are_no_routes(developer: Any, mode: str, run: str, features: Features, path: str) -> None:
    no_route = developer.call("POST", f"{API}/artifacts/absent", {}, arn=mode)
    features.presigned_artifacts = False
    answer = developer.call("POST", path, {"run_id": run, "path": "a.txt"}, arn=mode)
    assert (answer.status, answer.body) == (404, no_route.body)
    assert answer.headers["content-type"] == no_route.headers["content-type"]
    features.presigned_artifacts = True
    upload = "upload" in path
    assert developer.call("POST", path, {"run_id": run, "path": "a.txt"}, arn=mode).status == (200 if upload else 404)


def test_who_may_not_call_is_refused_first(developer: Any, mode: str, features: Features) -> None:
    features.presigned_artifacts = False
    answer = developer.assume("nothing").call("POST", ENDPOINTS[0], {}, arn=mode)
    assert answer.error == "AccessDeniedException"


def test_the_switch_is_one_of_the_controls(sagemaker: Any, admin: Any, features: Features) -> None:
    assert admin("GET", "features") == {"presigned_artifacts": True}
    assert admin("POST", "features", {"presigned_artifacts": False}) == {"presigned_artifacts": False}
    assert not features.presigned_artifacts
    for wrong in ({"presigned_artifacts": "no"}, {"workspaces": True}, ["presigned_artifacts"]):
        assert admin("POST", "features", wrong)["status"] == 400
