"""The pure rules: which action a route needs, and what a policy says."""

import re
from pathlib import Path

import pytest

from mlflow_proxy.local.actions import mlflow_action
from mlflow_proxy.local.policy import Decision, evaluate, trusts

PROTOCOL_READS = (
    "AccessUI GetDownloadURIForModelVersionArtifacts GetExperiment GetExperimentByName GetLoggedModel "
    "GetMetricHistory GetModelVersion GetModelVersionByAlias GetRegisteredModel GetRun GetTraceInfo "
    "SearchExperiments SearchLoggedModels SearchModelVersions SearchRegisteredModels SearchRuns SearchTraces "
    "GetLatestModelVersions ListArtifacts ListLoggedModelArtifacts"
)
PROTOCOL_WRITES = (
    "CreateExperiment CreateModelVersion CreateRegisteredModel CreateRun DeleteExperiment DeleteLoggedModel "
    "DeleteLoggedModelTag DeleteModelVersion DeleteModelVersionTag DeleteRegisteredModel "
    "DeleteRegisteredModelAlias DeleteRegisteredModelTag DeleteRun DeleteTag DeleteTraceTag DeleteTraces EndTrace "
    "FinalizeLoggedModel LogBatch LogInputs LogLoggedModelParams LogMetric LogModel LogOutputs LogParam "
    "RenameRegisteredModel RestoreExperiment RestoreRun SetExperimentTag SetLoggedModelTags SetModelVersionTag "
    "SetRegisteredModelAlias SetRegisteredModelTag SetTag SetTraceTag StartTrace TransitionModelVersionStage "
    "UpdateExperiment UpdateModelVersion UpdateRegisteredModel UpdateRun"
)


def routes() -> list[tuple[str, str]]:
    """Every rule of the installed MLflow, with ids filled in."""
    handlers = pytest.importorskip("mlflow.server.handlers")
    found = {(method, path) for path, _, methods in handlers.get_endpoints() for method in methods}
    return sorted((method, re.sub(r"<(path:)?\w+>", "x1", path)) for method, path in found)


def test_every_action_that_aws_lists_is_some_routes() -> None:
    actions = {mlflow_action(method, path) for method, path in routes()}
    listed = set(f"{PROTOCOL_READS} {PROTOCOL_WRITES}".split())
    assert listed - actions - {"AccessUI"} == set()


def test_reading_names_belong_to_reading_routes() -> None:
    """So that a policy with Get*, Search* and List* is a policy for readers."""
    for method, path in routes():
        action = mlflow_action(method, path)
        if method in ("DELETE", "PATCH", "PUT"):
            assert not re.match("Get|Search|List|AccessUI", action), (method, path, action)
        if method == "GET":
            assert re.match("Get|Search|List|AccessUI", action), (method, path, action)


@pytest.mark.parametrize("twin", ["api", "ajax-api"])
def test_twins_need_the_same_action(twin: str) -> None:
    assert mlflow_action("POST", f"/{twin}/2.0/mlflow/runs/create") == "CreateRun"
    assert mlflow_action("POST", f"/{twin}/3.0/mlflow/traces/search") == "SearchTraces"


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("GET", "/", "AccessUI"),
        ("GET", "/static-files/static/js/main.js", "AccessUI"),
        ("POST", "/graphql", "AccessUI"),
        ("POST", "/v1/traces", "StartTrace"),
        ("HEAD", "/api/2.0/mlflow/runs/get", "GetRun"),
        ("POST", "/api/2.0/preview/mlflow/runs/create", "CreateRun"),
        ("POST", "/api/2.0/mlflow/../mlflow/runs/create", "CreateRun"),
        ("POST", "/static-files/../api/2.0/mlflow/runs/create", "CreateRun"),
        ("POST", "/api/2.0/mlflow/%72uns/create", "CreateRun"),
        ("POST", "/api/2.0/mlflow/runs%2Fcreate", "CreateRun"),
        ("POST", "//api/2.0/mlflow//runs/create", "CreateRun"),
        ("GET", "/api/3.0/mlflow/datasets/d-17", "GetDatasets"),
        ("POST", "/api/3.0/mlflow/datasets/create", "CreateDatasets"),
        ("PATCH", "/api/2.0/mlflow/webhooks/17", "UpdateWebhooks"),
        ("POST", "/api/9.9/mlflow/something-new", "CreateSomethingNew"),
        ("PROPFIND", "/x", "PropfindX"),
    ],
)
def test_action_of_a_route(method: str, path: str, action: str) -> None:
    assert mlflow_action(method, path) == action


def allow(action: str, resource: str = "*", **more: object) -> dict[str, object]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


@pytest.mark.parametrize(
    ("statements", "decision"),
    [
        ([], Decision.IMPLICIT),
        ([allow("s:GetRun")], Decision.ALLOW),
        ([allow("S:getrun")], Decision.ALLOW),
        ([allow("s:Get*")], Decision.ALLOW),
        ([allow("s:Get?un")], Decision.ALLOW),
        ([allow("s:Get.un")], Decision.IMPLICIT),
        ([allow("s:Get")], Decision.IMPLICIT),
        ([allow("*", "arn:one")], Decision.ALLOW),
        ([allow("*", "arn:ONE")], Decision.IMPLICIT),
        ([allow("*", "arn:on")], Decision.IMPLICIT),
        ([{"Effect": "Allow", "NotAction": "s:Delete*", "Resource": "*"}], Decision.ALLOW),
        ([{"Effect": "Allow", "NotAction": "s:Get*", "Resource": "*"}], Decision.IMPLICIT),
        ([{"Effect": "Allow", "Action": "*", "NotResource": "arn:one"}], Decision.IMPLICIT),
        ([allow("*"), {**allow("s:GetRun"), "Effect": "Deny"}], Decision.DENY),
        ([allow("*", Condition={"StringEquals": {"aws:PrincipalArn": "me"}})], Decision.ALLOW),
        ([allow("*", Condition={"StringEquals": {"AWS:principalarn": ["you", "me"]}})], Decision.ALLOW),
        ([allow("*", Condition={"StringEquals": {"aws:PrincipalArn": "you"}})], Decision.IMPLICIT),
        ([allow("*", Condition={"StringEquals": {"aws:Absent": "x"}})], Decision.IMPLICIT),
        ([allow("*", Condition={"StringLike": {"aws:PrincipalArn": "m*"}})], Decision.ALLOW),
        ([allow("*", Condition={"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}})], Decision.IMPLICIT),
        (
            [allow("*"), {**allow("*", Condition={"IpAddress": {"aws:SourceIp": "::/0"}}), "Effect": "Deny"}],
            Decision.DENY,
        ),
    ],
)
def test_policy(statements: list[dict[str, object]], decision: Decision) -> None:
    document = {"Version": "2012-10-17", "Statement": statements}
    assert evaluate([document], "s:GetRun", "arn:one", {"aws:PrincipalArn": "me"}) is decision


@pytest.mark.parametrize(
    ("principal", "trusted"),
    [
        ("*", True),
        ({"AWS": "1"}, True),
        ({"AWS": ["2", "arn:me"]}, True),
        ({"AWS": "2"}, False),
        ({"Service": "ec2"}, False),
    ],
)
def test_trust(principal: object, trusted: bool) -> None:
    statement = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}
    assert trusts({"Statement": [statement]}, "sts:AssumeRole", ["1", "arn:me"], {}) is trusted


def test_the_stand_in_uses_nothing_of_the_proxy() -> None:
    """Else it would prove nothing: the proxy would be judged by its own code."""
    local = Path(__file__).parents[2] / "src" / "mlflow_proxy" / "local"
    for module in local.glob("*.py"):
        if module.name == "demo.py":  # the proxy before the stand-in: outside of what judges it
            continue
        text = module.read_text()
        assert not re.search(r"^\s*(from|import) +(mlflow_proxy\b|\.\.)", text, re.MULTILINE), module
