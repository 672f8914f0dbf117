"""What AWS's own MLflow plugin does against a target; run as a script with the target in MLFLOW_TRACKING_URI."""

import os
from collections.abc import Callable
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sagemaker_mlflow.presigned_url import get_presigned_url

NAME = 'it\'s "quoted" + 東京 🚀'

client = MlflowClient()
experiment = client.create_experiment(NAME, tags={"team": "a b"})
assert client.get_experiment_by_name(NAME).experiment_id == experiment
assert experiment in [each.experiment_id for each in client.search_experiments(filter_string="tags.team = 'a b'")]
client.set_experiment_tag(experiment, "k", "v")
client.rename_experiment(experiment, NAME + "!")

run = client.create_run(experiment, run_name="first run")
run_id = run.info.run_id
metrics = [Metric("loss", 1 / (step + 1), 1_700_000_000_000 + step, step) for step in range(1000)]
client.log_batch(run_id, metrics=metrics, params=[Param("lr", "0.1")], tags=[RunTag("a b", "c+d")])
client.log_metric(run_id, "accuracy", 0.9)
client.log_param(run_id, "depth", 3)
client.set_tag(run_id, "state", "done")
client.delete_tag(run_id, "state")
assert len(client.get_metric_history(run_id, "loss")) == 1000
found = client.search_runs([experiment], "metrics.accuracy > 0.5 and params.lr = '0.1' and tags.`a b` = 'c+d'")
assert [each.info.run_id for each in found] == [run_id]
client.set_terminated(run_id)
client.delete_run(run_id)
client.restore_run(run_id)
assert client.get_run(run_id).data.params == {"lr": "0.1", "depth": "3"}
client.log_text(run_id, "hello", "notes/a b.txt")
assert [each.path for each in client.list_artifacts(run_id, "notes")] == ["notes/a b.txt"]

os.environ["SAGEMAKER_PRESIGNED_URL_UPLOAD_ENABLED"] = "true"
client.log_text(run_id, "by presigned URL", "notes/presigned.txt")
assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/notes/presigned.txt") == "by presigned URL"

client.create_registered_model("model", description="d")
version = client.create_model_version("model", source=run.info.artifact_uri, run_id=run_id).version
client.set_registered_model_alias("model", "best", version)
assert client.get_model_version_by_alias("model", "best").version == version
client.set_model_version_tag("model", version, "k", "v 1")
assert [each.version for each in client.search_model_versions("name = 'model'")] == [version]
assert client.get_latest_versions("model")
client.delete_registered_model_alias("model", "best")
client.update_registered_model("model", description="e")
client.rename_registered_model("model", "renamed")
client.delete_registered_model("renamed")

mlflow.set_experiment(experiment_id=experiment)
with mlflow.start_span("outer") as span:
    span.set_inputs({"x": 1})
mlflow.flush_trace_async_logging()
assert mlflow.search_traces(locations=[experiment], return_type="list")

url = get_presigned_url()
browser = requests.Session()
assert "<title>MLflow</title>" in browser.get(url).text
assert requests.get(url).status_code == 403
client.delete_experiment(experiment)


def refused(call: Callable[..., Any], *words: str) -> str:
    """The message of the error that a call ends in."""
    try:
        call(*words)
    except MlflowException as error:
        return str(error)
    raise AssertionError(f"{call.__name__} was not refused")


if ":mlflow-app/" in os.environ["MLFLOW_TRACKING_URI"]:
    assert "default" in [workspace.name for workspace in mlflow.list_workspaces()]
    created = mlflow.create_workspace("plugin-team", description="first")
    assert (created.name, created.description) == ("plugin-team", "first")
    assert "exists" in refused(mlflow.create_workspace, "plugin-team")
    assert refused(mlflow.create_workspace, "No Name!")
    assert mlflow.update_workspace("plugin-team", description="second").description == "second"
    assert mlflow.get_workspace("plugin-team").description == "second"
    mlflow.set_workspace("plugin-team")
    inside = client.create_experiment("inside")
    mlflow.set_workspace(None)
    assert inside not in [each.experiment_id for each in client.search_experiments()]
    mlflow.delete_workspace("plugin-team", mode="CASCADE")
    assert "RESOURCE_DOES_NOT_EXIST" in refused(mlflow.get_workspace, "plugin-team")
else:
    assert refused(mlflow.list_workspaces)
print("all accepted")
