"""Which IAM action a request to MLflow needs on a tracking server.

The table holds MLflow's routes beside the actions that AWS lists ("Actions, resources, and condition keys
for Amazon SageMaker with MLflow"). A route that AWS lists no action for is named after its path, so that
`Get*`, `Search*` and the like in a policy still mean what they say. `/ajax-api/` twins, which MLflow's UI
calls, need the action of their REST route; what only the UI has needs `AccessUI`. For an MLflow App one
action covers everything.
"""

from __future__ import annotations

import re
from posixpath import normpath
from urllib.parse import unquote

from .targets import Arn, Kind

ACCESS_UI = "AccessUI"

_API = re.compile(r"/(?P<twin>ajax-api|api)/\d\.\d/(?:preview/)?mlflow/(?P<route>.+)")
_UI = re.compile(
    r"/(index\.html|static-files/.*|graphql|favicon\.ico|version|health|get-artifact|"
    r"model-versions/get-artifact|(ajax-api/\d\.\d/mlflow/)(logged-models/[^/]+/artifacts/files|get-artifact|"
    r"metrics/get-history-bulk.*|get-trace-artifact|ui-telemetry|.*gateway-proxy))?"
)
_OTLP = "/v1/traces"

# {} stands for one path segment.
_TABLE = """
GET artifacts/list ListArtifacts
POST experiments/create CreateExperiment
POST experiments/delete DeleteExperiment
GET experiments/get GetExperiment
GET experiments/get-by-name GetExperimentByName
POST experiments/restore RestoreExperiment
GET experiments/search SearchExperiments
POST experiments/search SearchExperiments
GET experiments/list SearchExperiments
POST experiments/set-experiment-tag SetExperimentTag
POST experiments/update UpdateExperiment
POST logged-models CreateLoggedModel
DELETE logged-models/{} DeleteLoggedModel
GET logged-models/{} GetLoggedModel
PATCH logged-models/{} FinalizeLoggedModel
GET logged-models/{}/artifacts/directories ListLoggedModelArtifacts
POST logged-models/{}/params LogLoggedModelParams
PATCH logged-models/{}/tags SetLoggedModelTags
DELETE logged-models/{}/tags/{} DeleteLoggedModelTag
POST logged-models/search SearchLoggedModels
GET metrics/get-history GetMetricHistory
GET metrics/get-history-bulk-interval GetMetricHistory
POST model-versions/create CreateModelVersion
DELETE model-versions/delete DeleteModelVersion
DELETE model-versions/delete-tag DeleteModelVersionTag
GET model-versions/get GetModelVersion
GET model-versions/get-download-uri GetDownloadURIForModelVersionArtifacts
GET model-versions/search SearchModelVersions
POST model-versions/set-tag SetModelVersionTag
POST model-versions/transition-stage TransitionModelVersionStage
PATCH model-versions/update UpdateModelVersion
DELETE registered-models/alias DeleteRegisteredModelAlias
GET registered-models/alias GetModelVersionByAlias
POST registered-models/alias SetRegisteredModelAlias
POST registered-models/create CreateRegisteredModel
DELETE registered-models/delete DeleteRegisteredModel
DELETE registered-models/delete-tag DeleteRegisteredModelTag
GET registered-models/get GetRegisteredModel
GET registered-models/get-latest-versions GetLatestModelVersions
POST registered-models/get-latest-versions GetLatestModelVersions
POST registered-models/rename RenameRegisteredModel
GET registered-models/search SearchRegisteredModels
POST registered-models/set-tag SetRegisteredModelTag
PATCH registered-models/update UpdateRegisteredModel
POST runs/create CreateRun
POST runs/delete DeleteRun
POST runs/delete-tag DeleteTag
GET runs/get GetRun
POST runs/log-batch LogBatch
POST runs/log-inputs LogInputs
POST runs/log-metric LogMetric
POST runs/log-model LogModel
POST runs/log-parameter LogParam
POST runs/outputs LogOutputs
POST runs/restore RestoreRun
POST runs/search SearchRuns
POST runs/set-tag SetTag
POST runs/update UpdateRun
GET traces SearchTraces
POST traces StartTrace
GET traces/batchGet GetTraceInfo
POST traces/batchGetInfos GetTraceInfo
POST traces/calculate-filter-correlation SearchTraces
POST traces/delete-traces DeleteTraces
GET traces/get GetTraceInfo
POST traces/metrics SearchTraces
POST traces/search SearchTraces
GET traces/{} GetTraceInfo
PATCH traces/{} EndTrace
GET traces/{}/info GetTraceInfo
DELETE traces/{}/tags DeleteTraceTag
PATCH traces/{}/tags SetTraceTag
"""

_VERBS = {
    "create", "search", "list", "get", "delete", "update", "register", "add", "remove", "attach", "detach", "cancel"
}  # fmt: skip
_METHODS = {"GET": "Get", "HEAD": "Get", "POST": "Create", "PATCH": "Update", "PUT": "Put", "DELETE": "Delete"}


def _rows() -> list[tuple[str, re.Pattern[str], str]]:
    rows = (line.split() for line in _TABLE.strip().splitlines())
    compiled = [
        (method, re.compile(path.replace("{}", "[^/]+")), action, "{}" in path) for method, path, action in rows
    ]
    return [row[:3] for row in sorted(compiled, key=lambda row: row[3])]


_ROWS = _rows()


def action_of(arn: Arn, method: str, raw_path: str) -> tuple[str, str]:
    """The IAM action that a request to `arn` needs, and the resource it is needed on."""
    if arn.kind is Kind.APP:
        return "sagemaker:CallMlflowAppApi", arn.text
    action = mlflow_action(method, raw_path)
    return f"sagemaker-mlflow:{action}", "*" if action == ACCESS_UI else arn.text


def mlflow_action(method: str, raw_path: str) -> str:
    """The action without its prefix."""
    path = as_mlflow_reads(raw_path)
    method = "GET" if method == "HEAD" else method
    if path == _OTLP:
        return "StartTrace"
    if _UI.fullmatch(path):
        return ACCESS_UI
    api = _API.fullmatch(path)
    route = api["route"] if api else path.strip("/")
    if api:
        for listed, pattern, action in _ROWS:
            if listed == method and pattern.fullmatch(route):
                return action
        if api["twin"] == "ajax-api" and method == "GET":
            return ACCESS_UI
    return _named_after(method, route)


def as_mlflow_reads(raw_path: str) -> str:
    """The path, decoded and normalised."""
    return normpath("/" + unquote(raw_path).lstrip("/"))


def _named_after(method: str, route: str) -> str:
    """`POST datasets/create` is CreateDatasets, `PATCH webhooks/7f3` UpdateWebhooks."""
    segments = [segment for segment in route.split("/") if segment and not re.search(r"\d", segment)]
    words = [word for segment in segments for word in re.findall("[A-Za-z]+", segment)]
    verb = _METHODS.get(method, method.title())
    leads = next((word for word in reversed(words) if word.lower() in _VERBS), None)
    if leads is not None:
        words.remove(leads)
        verb = leads.title()
    return verb + "".join(word[:1].upper() + word[1:] for word in words)
