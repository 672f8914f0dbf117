"""The table of actions against MLflow itself: what it serves, how it routes, and what AWS calls it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_proxy.access.actions import Action, action_of, routes
from mlflow_proxy.errors import Refusal
from mlflow_proxy.local.actions import mlflow_action
from mlflow_proxy.transform import canonical_path

ROOT = Path(__file__).parents[2]

# AWS's list of actions of the service prefix sagemaker-mlflow, as in the service authorization reference.
_READS = """
AccessUI GetDownloadURIForModelVersionArtifacts GetExperiment GetExperimentByName GetLoggedModel GetMetricHistory
GetModelVersion GetModelVersionByAlias GetRegisteredModel GetRun GetTraceInfo SearchExperiments SearchLoggedModels
SearchModelVersions SearchRegisteredModels SearchRuns SearchTraces GetLatestModelVersions ListArtifacts
ListLoggedModelArtifacts
"""
_WRITES = """
CreateExperiment CreateModelVersion CreateRegisteredModel CreateRun DeleteExperiment DeleteLoggedModel
DeleteLoggedModelTag DeleteModelVersion DeleteModelVersionTag DeleteRegisteredModel DeleteRegisteredModelAlias
DeleteRegisteredModelTag DeleteRun DeleteTag DeleteTraceTag DeleteTraces EndTrace FinalizeLoggedModel LogBatch LogInputs
LogLoggedModelParams LogMetric LogModel LogOutputs LogParam RenameRegisteredModel RestoreExperiment RestoreRun
SetExperimentTag SetLoggedModelTags SetModelVersionTag SetRegisteredModelAlias SetRegisteredModelTag SetTag SetTraceTag
StartTrace TransitionModelVersionStage UpdateExperiment UpdateModelVersion UpdateRegisteredModel UpdateRun
"""
AWS_READS, AWS_WRITES = frozenset(_READS.split()), frozenset(_WRITES.split())
READ_NAMES = ("Get*", "List*", "Search*", "Access*")


class Served(NamedTuple):
    """A route of a running MLflow. `kind` is the framework that serves it: they write parameters differently."""

    method: str
    rule: str
    kind: str


# Run by the interpreter of each MLflow, so nothing of this project is in it.
LISTING = """
import json, warnings
warnings.simplefilter("ignore")
from mlflow.server import app
found = [(method, rule.rule, "flask") for rule in app.url_map.iter_rules() for method in rule.methods]
try:
    from mlflow.server.fastapi_app import app as asgi
except ImportError:
    pass
else:
    from fastapi.routing import iter_route_contexts
    found += [(method, route.path, "fastapi") for route in iter_route_contexts(asgi.routes)
              for method in route.methods or ()]
print("ROUTES", json.dumps([one for one in found if one[0] != "OPTIONS"]))
"""


@cache
def served_by(python: Path) -> list[Served]:
    done = subprocess.run([python, "-c", LISTING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ROUTES "))
    return [Served(*one) for one in json.loads(line.removeprefix("ROUTES "))]


def installed() -> list[Served]:
    return served_by(Path(sys.executable))


def older(version: str) -> list[Served]:
    python = ROOT / f".venv-mlflow-{version}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"`make compat` makes the environment of MLflow {version}")
    return served_by(python)


def example(served: Served, word: str = "x-1", words: str = "io.github.x/weather.txt") -> str:
    """A path that the route is for."""
    if served.kind == "flask":
        path = re.sub(r"<(path:)?\w+>", lambda parameter: words if parameter[1] else word, served.rule)
    else:
        path = re.sub(r"\{\w+(:path)?\}", lambda parameter: words if parameter[1] else word, served.rule)
    return canonical_path(quote(path, safe="/:").encode())


def shape(rule: str) -> str:
    """A rule without the names of its parameters, which differ from one MLflow to the next."""
    return re.sub(r"<(?:path:)?[\w]+>|\{[\w.]+(?::path)?\}", "{}", rule)


def unclassified(served: Iterable[Served]) -> list[Served]:
    return [one for one in served if action_of(one.method, example(one)).name.startswith("Unknown")]


def mistaken(served: Iterable[Served]) -> list[tuple[Served, str]]:
    found = [(one, action_of(one.method, example(one)).template) for one in served]
    return [(one, template) for one, template in found if shape(template) != shape(one.rule)]


def test_every_route_of_the_installed_mlflow_has_an_action() -> None:
    served = installed()
    assert len(served) > 500
    assert {one.kind for one in served} == {"flask", "fastapi"}
    assert unclassified(served) == []
    assert mistaken(served) == []


def test_a_route_that_mlflow_adds_would_be_noticed() -> None:
    added = [
        Served("POST", "/api/3.0/mlflow/runs/teleport", "flask"),
        Served("PUT", "/api/2.0/mlflow/logged-models/<model_id>", "flask"),
        Served("GET", "/api/2.0/mlflow/runs/<run_id>/notes", "flask"),
        Served("DELETE", "/gateway/{name}/cache", "fastapi"),
    ]
    assert unclassified([*installed(), *added]) == added


@pytest.mark.parametrize("version", ["2.16.2", "3.0.1", "3.10.1"])
def test_every_route_of_an_older_mlflow_has_an_action(version: str) -> None:
    served = older(version)
    assert len(served) > 100
    assert unclassified(served) == []
    assert mistaken(served) == []


# Rows that no MLflow serves, and why they are there all the same. A row that only older ones serve belongs here, too,
# with the last version that does.
SERVED_BY_NONE = {
    ("GET", "/index.html"): "people type it",
    ("GET", "/favicon.ico"): "browsers ask for it unbidden",
    ("GET", "/mlflow/users/current"): "MLflow's UI asks for it, and goes on when there is none",
}


def row_of(method: str, rule: str) -> tuple[str, str]:
    """What the twins of a route have in common: /api/ and /ajax-api/, both versions, MLflow 1's /preview/."""
    return method, re.sub(r"^/(?:ajax-)?api/[23]\.0(?:/preview)?", "", shape(rule))


def test_every_row_is_a_route_of_mlflow() -> None:
    real = {row_of(one.method, one.rule) for one in installed()}
    rows = {row_of(method, rule) for method, rule, _ in routes() if method != "HEAD"}
    assert rows - real == SERVED_BY_NONE.keys()


def test_the_table_has_no_row_twice() -> None:
    keys = [(method, rule) for method, rule, _ in routes()]
    assert len(set(keys)) == len(keys)


def test_every_action_of_aws_is_in_the_table_and_kept_apart() -> None:
    actions = {action.name: action for _, _, action in routes()}
    assert actions.keys() >= AWS_READS | AWS_WRITES
    assert {name for name in AWS_READS if actions[name].writes} == set()
    assert {name for name in AWS_WRITES if not actions[name].writes} == set()


def test_a_name_that_sounds_like_reading_reads_and_no_other_does() -> None:
    for _, rule, action in routes():
        reads = any(fnmatchcase(action.name, pattern) for pattern in READ_NAMES)
        assert reads is not action.writes or action.name == "GraphQL", (rule, action)  # its body says what it does


def test_a_name_is_a_read_everywhere_or_nowhere() -> None:
    kinds: dict[str, set[bool]] = {}
    for _, _, action in routes():
        kinds.setdefault(action.name, set()).add(action.writes)
    assert {name for name, found in kinds.items() if len(found) > 1} == set()


def test_names_are_written_like_those_of_aws() -> None:
    assert [
        name for name in {action.name for _, _, action in routes()} if not re.fullmatch(r"[A-Z][A-Za-z]+", name)
    ] == []


def test_no_name_is_one_of_the_control_plane() -> None:
    """Roles treat `CreatePresigned…` apart: those are links that open a browser session past the proxy."""
    assert [
        rule for _, rule, action in routes() if action.name.startswith(("CreatePresigned", "proxy:", "Unknown"))
    ] == []


# What changes nothing in MLflow by its method or its name, but calls out, spends, or deals in what works as a key.
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/ajax-api/2.0/mlflow/gateway-proxy"),
        ("POST", "/gateway/mlflow/v1/chat/completions"),
        ("POST", "/gateway/proxy/openai/v1/files"),
        ("POST", "/gateway/gemini/v1beta/models/pro:generateContent"),
        ("POST", "/ajax-api/3.0/mlflow/scorer/invoke"),
        ("POST", "/ajax-api/3.0/mlflow/genai/evaluate/invoke"),
        ("POST", "/ajax-api/3.0/mlflow/issues/invoke"),
        ("GET", "/ajax-api/3.0/mlflow/assistant/sessions/1/stream"),
        ("GET", "/ajax-api/3.0/mlflow/assistant/providers/ollama/models"),
        ("GET", "/ajax-api/3.0/mlflow/assistant/providers/ollama/health"),
        ("POST", "/api/2.0/mlflow/webhooks/1/test"),
        ("GET", "/api/2.0/mlflow/webhooks"),
        ("GET", "/api/2.0/mlflow/webhooks/1"),
        ("GET", "/api/3.0/mlflow/gateway/secrets/get"),
        ("GET", "/api/3.0/mlflow/gateway/secrets/list"),
        ("GET", "/ajax-api/3.0/mlflow/gateway/secrets/config"),
        ("GET", "/api/2.0/mlflow-artifacts/presigned/1/model.pkl"),
        ("POST", "/api/2.0/mlflow/artifacts/presigned-download-url"),
        ("POST", "/api/2.0/mlflow/artifacts/presigned-upload-url"),
        ("POST", "/api/3.0/mlflow/review-queues/get-or-create-user"),
        ("POST", "/ajax-api/3.0/jobs/"),
        ("POST", "/api/3.0/mlflow/prompt-optimization/jobs"),
    ],
)
def test_a_reader_may_not(method: str, path: str) -> None:
    action = action_of(method, path)
    assert action.template != "unknown"
    assert action.writes
    assert not any(fnmatchcase(action.name, pattern) for pattern in READ_NAMES)


@pytest.mark.parametrize(
    ("method", "path", "name", "template"),
    [
        ("GET", "/", "AccessUI", "/"),
        ("GET", "/static-files/static/js/main.js", "AccessUI", "/static-files/{path}"),
        ("GET", "/api/2.0/mlflow/runs/get", "GetRun", "/api/2.0/mlflow/runs/get"),
        ("HEAD", "/api/2.0/mlflow/runs/get", "GetRun", "/api/2.0/mlflow/runs/get"),
        ("GET", "/ajax-api/2.0/preview/mlflow/runs/get", "GetRun", "/ajax-api/2.0/preview/mlflow/runs/get"),
        ("POST", "/api/2.0/mlflow/runs/search", "SearchRuns", "/api/2.0/mlflow/runs/search"),
        ("POST", "/api/2.0/mlflow/experiments/search", "SearchExperiments", "/api/2.0/mlflow/experiments/search"),
        ("POST", "/api/3.0/mlflow/traces/search", "SearchTraces", "/api/3.0/mlflow/traces/search"),
        ("PATCH", "/api/3.0/mlflow/traces/tr-1/tags", "SetTraceTag", "/api/3.0/mlflow/traces/{trace_id}/tags"),
        ("GET", "/api/2.0/mlflow/logged-models/search", "GetLoggedModel", "/api/2.0/mlflow/logged-models/{model_id}"),
        ("POST", "/api/2.0/mlflow/logged-models/search", "SearchLoggedModels", "/api/2.0/mlflow/logged-models/search"),
        (
            "GET",
            "/api/3.0/mlflow/mcp-servers/io.github.x%2Fweather/versions/1%2F2",
            "GetMcpServerVersion",
            "/api/3.0/mlflow/mcp-servers/{name}/versions/{version}",
        ),
        (
            "PUT",
            "/api/2.0/mlflow-artifacts/artifacts/1/a%20b%2Fc",
            "UploadProxiedArtifact",
            "/api/2.0/mlflow-artifacts/artifacts/{artifact_path}",
        ),
    ],
)
def test_examples(method: str, path: str, name: str, template: str) -> None:
    action = action_of(method, path)
    assert (action.name, action.template) == (name, template)


def test_the_actions_of_graphql_are_in_its_body_whatever_the_method() -> None:
    """MLflow reads the body of a GET, too: see test_graphql.py."""
    by_body = {(method, rule) for method, rule, action in routes() if action.by_body}
    assert by_body == {("GET", "/graphql"), ("HEAD", "/graphql"), ("POST", "/graphql")}
    assert action_of("POST", "/graphql") == Action("GraphQL", "/graphql", writes=False, by_body=True)


def test_twins_have_the_same_action() -> None:
    names: dict[tuple[str, str], set[str]] = {}
    for method, rule, action in routes():
        names.setdefault(row_of(method, rule), set()).add(action.name)
    assert {row: found for row, found in names.items() if len(found) > 1} == {}
    twins = {rule for _, rule, _ in routes() if rule.startswith("/api/")}
    assert twins == {rule.replace("/ajax-api/", "/api/", 1) for _, rule, _ in routes() if rule.startswith("/ajax-api/")}


UNKNOWN = [
    # Methods that MLflow does not have there.
    ("OPTIONS", "/api/2.0/mlflow/runs/get"),
    ("POST", "/api/2.0/mlflow/runs/get"),
    ("GET", "/api/2.0/mlflow/runs/delete"),
    ("HEAD", "/api/2.0/mlflow/runs/delete"),
    ("PUT", "/api/2.0/mlflow/logged-models/m-1"),
    ("get", "/api/2.0/mlflow/runs/get"),
    ("", ""),
    # Trailing slashes: MLflow has one route with one, and matches exactly.
    ("GET", "/api/2.0/mlflow/runs/get/"),
    ("GET", "/api/2.0/mlflow/logged-models/m-1/"),
    ("GET", "/api/2.0/mlflow/logged-models/"),
    ("POST", "/ajax-api/3.0/jobs"),
    ("DELETE", "/api/3.0/mlflow/mcp-servers/x/versions/"),
    ("GET", "/static-files/"),
    ("GET", "/graphql/"),
    # Case, versions, prefixes.
    ("GET", "/API/2.0/mlflow/runs/get"),
    ("GET", "/api/2.0/mlflow/Runs/get"),
    ("GET", "/api/3.0/mlflow/runs/get"),
    ("GET", "/api/1.0/mlflow/runs/get"),
    ("GET", "/api/2.0/runs/get"),
    ("GET", "/api/2.0/mlflow/preview/runs/get"),
    ("GET", "/t/other/api/2.0/mlflow/runs/get"),
    # A parameter is one segment where MLflow says so.
    ("GET", "/api/2.0/mlflow/logged-models/a/b"),
    ("DELETE", "/api/2.0/mlflow/logged-models/a/tags/b/c"),
    # What the canonical path cannot be, and this module would not trust.
    ("GET", "//api/2.0/mlflow/runs/get"),
    ("GET", "/api/2.0/mlflow//runs/get"),
    ("GET", "/api/2.0/mlflow/logged-models/.."),
    ("GET", "/api/2.0/mlflow/logged-models/../runs/delete"),
    ("GET", "/static-files/../graphql"),
    ("GET", "/static-files/%2E%2E/graphql"),
    ("GET", "/static-files/..%2Fgraphql"),
    ("GET", "/static-files/%2Fetc/passwd"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts/a%2F%2Fb"),
    ("GET", "/api/2.0/mlflow/logged-models/a%2fb"),
    ("GET", "/api/2.0/mlflow/logged-models/a%00"),
    ("GET", "/api/2.0/mlflow/logged-models/a%5Cb"),
    ("GET", "/api/2.0/mlflow/logged-models/a%zz"),
    ("GET", "/api/2.0/mlflow/logged-models/a%"),
    # Decoded twice, they would be elsewhere.
    ("GET", "/api/2.0/mlflow/logged-models/a%252Ftags"),
    ("GET", "/static-files/%252E%252E/graphql"),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/%252e%252e/x"),
    # Some servers cut a segment at its semicolon.
    ("GET", "/api/2.0/mlflow/logged-models/m-1;v=1"),
    ("PATCH", "/api/2.0/mlflow/logged-models/;/tags"),
    ("GET", "/api/2.0/mlflow/runs/get;x"),
    # Apps of MLflow's that SageMaker does not run: basic-auth, the Prometheus exporter, static prefixes.
    ("GET", "/api/2.0/mlflow/users/list"),
    ("POST", "/api/2.0/mlflow/users/create"),
    ("GET", "/ajax-api/3.0/mlflow/roles/list"),
    ("GET", "/signup"),
    ("GET", "/metrics"),
    ("GET", "/mlflow/api/2.0/mlflow/runs/get"),
    ("GET", "/anything"),
    ("GET", "*"),
]


@pytest.mark.parametrize(("method", "path"), UNKNOWN)
def test_what_is_not_surely_known_is_unknown(method: str, path: str) -> None:
    expected = Action(f"Unknown:{method} {path}", "unknown", writes=True, by_body=False)
    assert action_of(method, path) == expected


def test_an_encoded_slash_counts_as_the_slash_that_mlflow_makes_of_it() -> None:
    assert action_of("POST", "/api/2.0/mlflow%2Fruns%2Fdelete").name == "DeleteRun"
    assert action_of("DELETE", "/api/3.0/mlflow/mcp-servers/x%2Ftags%2Fy").name == "DeleteMcpServerTag"
    assert action_of("GET", "/api/2.0/mlflow/logged-models/a%2Fb").name.startswith("Unknown:")
    assert action_of("GET", "/api/3.0/mlflow/traces%2Fget").name == "GetTrace"


def test_the_path_of_an_unknown_action_is_cut() -> None:
    assert action_of("GET", "/" + "x" * 5000).name == "Unknown:GET /" + "x" * 199


def test_actions_are_shared_between_requests() -> None:
    first, second = (action_of("GET", f"/api/2.0/mlflow/logged-models/{model}") for model in ("m-1", "m-2"))
    assert first is second


def test_a_hostile_path_takes_no_longer_than_its_length_allows() -> None:
    """Ambiguous rules such as {name:path}/versions/{version:path}/tags invite quadratic time: 25 ms at this length."""
    path = "/api/3.0/mlflow/mcp-servers/a" + "/versions/a" * 1400 + "/x"
    spent = []
    for _ in range(5):
        started = time.perf_counter()
        action_of("POST", path)
        spent.append(time.perf_counter() - started)
    assert min(spent) < 0.005


# --- Another table of the same facts: the stand-in for AWS has its own, written apart from this one -------------------

# Where the two differ over one of AWS's actions, which names no such route.
ANOTHER_OPINION = {
    ("GET", "/mlflow/traces/get"): "GetTraceInfo, but this is the trace with all that it contains",
    ("GET", "/mlflow/traces/batchGet"): "GetTraceInfo: the same",
    ("POST", "/mlflow/traces/batchGetInfos"): "GetTraceInfo, but of many traces",
    ("POST", "/mlflow/traces/metrics"): "SearchTraces, but this counts",
    ("POST", "/mlflow/traces/calculate-filter-correlation"): "SearchTraces: the same",
    ("POST", "/v1/traces"): "StartTrace, but this sends any number of spans",
    ("GET", "/mlflow/metrics/get-history-bulk"): "AccessUI, since only the UI asks for it",
    ("GET", "/mlflow/metrics/get-history-bulk-interval"): "AccessUI for the UI's twin",
}
# What a GET may look like, and is counted as a write here.
OUTWARD = {
    "PresignArtifactDownload",
    "InspectGatewaySecret",
    "InspectGatewaySecrets",
    "InspectGatewaySecretsConfig",
    "InspectWebhook",
    "InspectWebhooks",
    "InvokeAssistant",
    "InvokeAssistantProvider",
    "InvokeGateway",
    "LogUiTelemetry",
}


def test_the_stand_in_for_aws_names_the_same_actions() -> None:
    aws = (AWS_READS | AWS_WRITES) - {"AccessUI"}
    for one in installed():
        path = example(one)
        action, other = action_of(one.method, path), mlflow_action(one.method, path)
        other_reads = any(fnmatchcase(other, pattern) for pattern in READ_NAMES)
        if {action.name, other} & aws and row_of(one.method.replace("HEAD", "GET"), one.rule) not in ANOTHER_OPINION:
            assert action.name == other, one
        assert other_reads is not action.writes or action.name in OUTWARD, (one, action.name, other)


# --- As MLflow routes -------------------------------------------------------------------------------------------------


@cache
def router() -> Callable[[str, str], str | None]:
    """What the installed MLflow makes of a method and a path: the rule, or None. FastAPI's routes come first."""
    import mlflow.server.fastapi_app
    from fastapi.routing import iter_route_contexts
    from starlette.routing import compile_path
    from werkzeug.exceptions import HTTPException
    from werkzeug.routing import RequestRedirect

    native = [
        (set(route.methods), compile_path(route.path)[0], route.path)
        for route in iter_route_contexts(mlflow.server.fastapi_app.app.routes)
        if route.methods and route.path
    ]
    flask = mlflow.server.app.url_map.bind("localhost")

    def route(method: str, path: str) -> str | None:
        decoded = unquote(path)
        for methods, pattern, rule in native:
            if method in methods and pattern.match(decoded):
                return rule
        try:
            return str(flask.match(decoded, method, return_rule=True)[0].rule)
        except (HTTPException, RequestRedirect):
            return None

    return route


_WORDS = """
x m-1 search get list create tags versions endpoints aliases records info cancel proxy mlflow invocations artifacts
files test jobs 1.0 io.github.x a%20b a%2Fb x%2Fversions%2F1 x%2Ftags%2Fy %2Fx x%2F a%3Ab pro:generateContent
pro%3AgenerateContent %7Bassessment.trace_id%7D a%252Fb 100%25.txt a;b .. . %C3%A9 *
"""
WORDS = st.sampled_from(_WORDS.split())


@st.composite
def paths(draw: st.DrawFn) -> str:
    """A route of MLflow's with odd parameters, and perhaps bent out of shape."""
    rule = draw(st.sampled_from(sorted({one.rule for one in installed()})))
    segments = re.sub(r"<(?:path:)?\w+>|\{\w+(?::path)?\}", lambda _: draw(WORDS), rule).split("/")[1:]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(segments)))
        cut = draw(st.integers(0, 2))
        segments[at : at + cut] = draw(st.lists(WORDS, max_size=2))
    return "/" + "/".join(segments) + draw(st.sampled_from(["", "", "", "/"]))


METHODS = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"])


@settings(max_examples=1500, deadline=None)
@given(METHODS, paths())
def test_no_path_is_taken_for_another_route_than_mlflow_takes_it_for(method: str, path: str) -> None:
    try:
        path = canonical_path(path.encode())
    except Refusal:
        return
    action, rule = action_of(method, path), router()(method, path)
    if action.template == "unknown":
        plain = not re.search(r"%25|;|%2F|/\Z", path)
        assert rule is None or not plain
    else:
        assert rule is None or shape(action.template) == shape(rule)


@settings(max_examples=500, deadline=None)
@given(METHODS | st.text(max_size=9), st.text(max_size=80) | paths() | st.binary(max_size=80).map(quote))
def test_any_path_has_an_action(method: str, path: str) -> None:
    action = action_of(method, path)
    assert action.name
    assert (action.template == "unknown") is action.name.startswith("Unknown:")
