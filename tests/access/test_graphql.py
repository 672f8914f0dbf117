"""GraphQL requests: which actions they need, against MLflow's own schema and its own way of reading them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import graphql
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_proxy.access.actions import action_of, routes
from mlflow_proxy.access.graphql import NESTED_FIELDS, ROOT_FIELDS, actions_of
from mlflow_proxy.errors import Refusal

ROOT = Path(__file__).parents[2]
JSON = "application/json"
INTROSPECTION = {"__schema", "__type", "__typename"}


def body(document: str, **more: Any) -> bytes:
    return json.dumps({"query": document, **more}).encode()


def actions(document: str, **more: Any) -> tuple[str, ...]:
    return actions_of("POST", JSON, "", body(document, **more))


def outcome(data: bytes, content_type: str = JSON, query: str = "") -> tuple[str, ...] | str:
    """The actions, or the message with which they were refused."""
    try:
        return actions_of("POST", content_type, query, data)
    except Refusal as refused:
        if refused.status != 400:
            raise
        return refused.message


def refusal(document: str) -> str:
    with pytest.raises(Refusal) as refused:
        actions(document)
    assert refused.value.status == 400
    return refused.value.message


# --- MLflow's schema --------------------------------------------------------------------------------------------------


def schema() -> graphql.GraphQLSchema:
    from mlflow.server.graphql.graphql_schema_extensions import schema as found

    real: graphql.GraphQLSchema = found.graphql_schema
    return real


def unmapped(found: graphql.GraphQLSchema) -> set[str]:
    roots = (found.query_type, found.mutation_type, found.subscription_type)
    return {name for root in roots if root for name in root.fields} - ROOT_FIELDS.keys()


def test_every_root_field_of_mlflow_has_an_action_and_no_other() -> None:
    found = schema()
    assert found.query_type
    assert found.mutation_type
    assert unmapped(found) == set()
    assert ROOT_FIELDS.keys() - INTROSPECTION == {*found.query_type.fields, *found.mutation_type.fields}


def test_a_root_field_that_mlflow_adds_would_be_noticed() -> None:
    added = graphql.extend_schema(schema(), graphql.parse("extend type Mutation { mlflowDeleteRun(id: ID): Boolean }"))
    assert unmapped(added) == {"mlflowDeleteRun"}
    assert actions("mutation { mlflowDeleteRun(id: 1) }") == ("Unknown:POST /graphql mlflowDeleteRun",)


def test_every_field_below_the_roots_that_mlflow_looks_up_has_an_action() -> None:
    found = schema()
    looked_up = {
        name
        for kind in found.type_map.values()
        if isinstance(kind, graphql.GraphQLObjectType) and kind not in (found.query_type, found.mutation_type)
        for name in kind.fields
        if hasattr(getattr(kind, "graphene_type", None), f"resolve_{_snake(name)}")
    }
    assert looked_up - {"value"} == NESTED_FIELDS.keys()  # a metric's value is only converted


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


@pytest.mark.parametrize("version", ["2.16.2", "3.0.1", "3.10.1"])
def test_older_mlflows_have_no_other_root_fields(version: str) -> None:
    python = ROOT / f".venv-mlflow-{version}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"`make compat` makes the environment of MLflow {version}")
    listing = """
import json
from mlflow.server.graphql.graphql_schema_extensions import schema
found = schema.graphql_schema
print("FIELDS", json.dumps([*found.query_type.fields, *found.mutation_type.fields]))
"""
    done = subprocess.run([python, "-c", listing], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIELDS "))
    assert set(json.loads(line.removeprefix("FIELDS "))) <= ROOT_FIELDS.keys()


@pytest.mark.parametrize(
    ("field", "method", "path"),
    [
        ("mlflowGetExperiment", "GET", "/api/2.0/mlflow/experiments/get"),
        ("mlflowGetMetricHistoryBulkInterval", "GET", "/api/2.0/mlflow/metrics/get-history-bulk-interval"),
        ("mlflowGetRun", "GET", "/api/2.0/mlflow/runs/get"),
        ("mlflowListArtifacts", "GET", "/api/2.0/mlflow/artifacts/list"),
        ("mlflowSearchDatasets", "POST", "/ajax-api/2.0/mlflow/experiments/search-datasets"),
        ("mlflowSearchModelVersions", "GET", "/api/2.0/mlflow/model-versions/search"),
        ("mlflowSearchRuns", "POST", "/api/2.0/mlflow/runs/search"),
        ("test", "GET", "/"),
        ("testMutation", "GET", "/"),
    ],
)
def test_a_field_needs_the_action_of_its_rest_route(field: str, method: str, path: str) -> None:
    found = schema()
    assert found.query_type
    operation = "query" if field in found.query_type.fields else "mutation"
    document = f"{operation} {{ it: {field} {{ __typename }} }}"
    assert graphql.validate(found, graphql.parse(document)) == []
    assert actions(document) == (action_of(method, path).name,)


def test_all_actions_are_known_reads() -> None:
    reads = {action.name for _, _, action in routes() if not action.writes}
    assert {*ROOT_FIELDS.values(), *NESTED_FIELDS.values()} <= reads


# --- How MLflow reads a request ---------------------------------------------------------------------------------------


def ask_mlflow(method: str = "POST", url: str = "/graphql", content_type: str = JSON, data: bytes = b"") -> str:
    """What MLflow answers: the echo of a `test` field, or nothing."""
    import mlflow.server

    client = mlflow.server.app.test_client()
    answer = client.open(url, method=method, data=data, content_type=content_type)
    found = answer.get_json(silent=True) if answer.status_code == 200 else None
    fields = (found or {}).get("data") or {}
    return " ".join(f"{name}={value['output']}" for name, value in fields.items())


ECHO = '{ test(inputString: "a") { output } }'
OTHER = '{ test(inputString: "b") { output } }'


def test_mlflow_reads_json_from_the_body_of_any_method_and_so_does_this() -> None:
    for method in ("GET", "POST"):
        assert ask_mlflow(method, data=body(ECHO)) == "test=a"
        assert actions_of(method, JSON, "", body(ECHO)) == ("AccessUI",)


def test_mlflow_does_not_read_the_url_and_other_servers_might() -> None:
    url = "query=%7B%20test%28inputString%3A%20%22b%22%29%20%7B%20output%20%7D%20%7D"
    assert ask_mlflow(url=f"/graphql?{url}", data=body(ECHO)) == "test=a"
    assert ask_mlflow("GET", url=f"/graphql?{url}") == ""
    for query in (url, "operationName=x", "variables=", "extensions=%7B%7D", "a=b&quer%79=x"):
        with pytest.raises(Refusal, match="from the body only"):
            actions_of("GET", JSON, query, body(ECHO))
    assert actions_of("POST", JSON, "workspace=default&x=", body(ECHO)) == ("AccessUI",)


def test_mlflow_takes_the_last_of_two_keys_and_this_neither() -> None:
    twice = b'{"query": %s, "query": %s}' % (json.dumps(ECHO).encode(), json.dumps(OTHER).encode())
    assert ask_mlflow(data=twice) == "test=b"
    for data in (twice, b'{"query": "{test}", "\\u0071uery": "{mlflowGetRun}"}', b'{"variables":{"a":1,"a":2}}'):
        with pytest.raises(Refusal, match="the same key twice"):
            actions_of("POST", JSON, "", data)


def test_mlflow_reads_other_encodings_and_this_refuses_them() -> None:
    for encoding in ("utf-16-le", "utf-32", "utf-8-sig"):
        data = json.dumps({"query": ECHO}).encode(encoding)
        assert ask_mlflow(data=data) == "test=a"
        with pytest.raises(Refusal, match="JSON object in UTF-8"):
            actions_of("POST", JSON, "", data)


def test_the_chosen_operation_is_mlflows_business_all_are_counted() -> None:
    document = 'query A { test(inputString: "a") { output } } query B { mlflowSearchRuns { runs { info { runId } } } }'
    assert ask_mlflow(data=body(document, operationName="A")) == "test=a"
    assert actions(document, operationName="A") == ("AccessUI", "SearchRuns")
    assert actions(document, operationName="none") == ("AccessUI", "SearchRuns")


# --- Documents --------------------------------------------------------------------------------------------------------

UI_QUERY = """
query GetRun($data: MlflowGetRunInput!) @component(name: "MLflow.ExperimentRunTracking") {
  mlflowGetRun(input: $data) {
    apiError { helpUrl code message __typename }
    run {
      info { runName status runUuid experimentId __typename }
      experiment { experimentId name tags { key value } }
      modelVersions { status version name source }
      data { metrics { key value step } params { key value } }
      inputs { datasetInputs { dataset { digest name } tags { key value } } }
    }
    __typename
  }
}
"""


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (UI_QUERY, ("GetRun", "GetExperiment", "SearchModelVersions")),
        ("{ mlflowGetRun { run { info { runId } } } }", ("GetRun",)),
        ("{ test: mlflowGetRun { apiError { code } } }", ("GetRun",)),
        ("{ a: mlflowGetRun b: mlflowGetRun c: mlflowListArtifacts }", ("GetRun", "ListArtifacts")),
        ("{ mlflowGetRun { run { x: experiment { name } } } }", ("GetRun", "GetExperiment")),
        ("{ experiment { name } }", ("Unknown:POST /graphql experiment",)),
        ("{ ... { ... on Query { ... @include(if: false) { mlflowSearchRuns } } } }", ("SearchRuns",)),
        ("{ mlflowGetRun @skip(if: true) }", ("GetRun",)),
        ("{ ...A } fragment A on Query { ...B } fragment B on Query { mlflowGetRun { run { ...C } } }"
         " fragment C on MlflowRunExtension { modelVersions { name } }", ("GetRun", "SearchModelVersions")),
        ("{ ...A mlflowGetRun { ...A } } fragment A on X { experiment test }",
         ("Unknown:POST /graphql experiment", "AccessUI", "GetRun", "GetExperiment")),
        ("query A { mlflowGetRun } mutation B { mlflowSearchRuns }", ("GetRun", "SearchRuns")),
        ("mutation { mlflowSearchDatasets(input: {experimentIds: [\"1\"]}) { apiError { code } } }",
         ("SearchExperimentDatasets",)),
        ("subscription { mlflowGetRun }", ("GetRun",)),
        ("{ __schema { types { name fields { name } } } __type(name: \"Query\") { name } __typename }", ("AccessUI",)),
        ("{ MlflowGetRun }", ("Unknown:POST /graphql MlflowGetRun",)),
        ("{ " + "x" * 500 + " }", ("Unknown:POST /graphql " + "x" * 200,)),
        ("\ufeff,{,,test,}# { mlflowGetRun }\r{", None),
        ("\ufeff,{,,test,}# { mlflowGetRun }", ("AccessUI",)),
        ('{ test(inputString: """ } { mlflowGetRun """) }', ("AccessUI",)),
    ],
)  # fmt: skip
def test_documents(document: str, expected: tuple[str, ...] | None) -> None:
    if expected is None:
        assert "cannot be read" in refusal(document)
    else:
        assert actions(document) == expected


def test_an_unknown_field_is_named_with_the_method() -> None:
    assert actions_of("GET", JSON, "", body("{ new }")) == ("Unknown:GET /graphql new",)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ("{ a } }", "cannot be read"),
        ("# nothing", "cannot be read"),
        ('{ "\ud800" }', "cannot be read"),
        ("{ ...A }", "does not define"),
        ("{ a { ...A } } fragment B on Query { a }", "does not define"),
        ("{ a } fragment A on Query { b }", "does not use"),
        ("fragment A on Query { b }", "has operations"),
        ("type Query { a: String }", "has operations"),
        ("{ a } extend type Query { a: String }", "has operations"),
        ("{ ...A } fragment A on Query { a } fragment A on Query { b }", "different names"),
        ("{ ...A } fragment A on Query { ...A }", "in a circle"),
        ("{ ...A } fragment A on Query { a { ... { ...B } } } fragment B on Query { b { ...A } }", "in a circle"),
        ("{ " + "a " * 401 + "}", "more than 400 tokens"),
        ("{ " + " ".join(f"a{n}" for n in range(21)) + " }", "more than 20 different actions"),
        ("#\n" * 8_000, "cannot be read"),
        ("{ a }" + " " * 16_384, "longer than 16384"),
    ],
)
def test_what_cannot_be_read_for_certain_is_refused(document: str, message: str) -> None:
    assert message in refusal(document)


@pytest.mark.parametrize(
    ("start", "unit"), [("", "{ a "), ("", "{ ... "), ("{ a(x: ", "["), ("{ a(x: ", "{ b: "), ("query ($x: ", "[")]
)
@pytest.mark.parametrize("depth", [50, 200, 400, 2000])
def test_deep_nesting_is_refused_not_a_crash(start: str, unit: str, depth: int) -> None:
    assert "cannot be read" in refusal(start + unit * depth)


@pytest.mark.parametrize("depth", [10, 40, 120, 132])
def test_deep_but_balanced_documents_end_well(depth: int) -> None:
    found = outcome(body("{ a" * depth + " }" * depth))
    assert found == ("Unknown:POST /graphql a",) or (depth > 40 and "nested too deeply" in found)


def test_the_same_action_counts_once() -> None:
    roots = " ".join(f"a{n}: mlflowGetRun {{ experiment {{ id }} }}" for n in range(30))
    assert actions(f"{{ {roots} }}") == ("GetRun", "GetExperiment")
    assert len(actions("{ " + " ".join(f"a{n}" for n in range(20)) + " }")) == 20


def test_fragments_that_double_are_walked_once() -> None:
    doubling = "".join(f" fragment F{n} on Query {{ ...F{n + 1} ...F{n + 1} }}" for n in range(38))
    assert actions("{ ...F0 }" + doubling + " fragment F38 on Query { mlflowGetRun }") == ("GetRun",)


@pytest.mark.parametrize(
    ("content_type", "data", "message"),
    [
        ("", body(ECHO), "Content-Type: application/json"),
        ("application/graphql", ECHO.encode(), "Content-Type: application/json"),
        ("application/x-www-form-urlencoded", b"query=%7Btest%7D", "Content-Type: application/json"),
        ("multipart/form-data; boundary=x", b"--x--", "Content-Type: application/json"),
        ("application/jsonx", body(ECHO), "Content-Type: application/json"),
        (JSON, b"", "not a JSON object"),
        (JSON, b"\xff", "not a JSON object"),
        (JSON, b"null", "not a JSON object"),
        (JSON, b'"{test}"', "not a JSON object"),
        (JSON, b"[" + body(ECHO) + b"]", "not a JSON object"),
        (JSON, b"{}", "not a JSON object"),
        (JSON, b'{"query": null}', "not a JSON object"),
        (JSON, b'{"query": ["{test}"]}', "not a JSON object"),
        (JSON, b'{"Query": "{test}"}', "not a JSON object"),
        (JSON, body(ECHO) + b"{}", "not a JSON object"),
        (JSON, b'{"query": "{test}", "x": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (JSON, b"[" * 100_000, "not a JSON object"),
        (JSON, b'{"a":' * 50_000, "not a JSON object"),
        (JSON, body(ECHO, variables={"a": "x" * 300_000}), "larger than 262144 bytes"),
    ],
)
def test_bodies_that_are_refused(content_type: str, data: bytes, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        actions_of("POST", content_type, "", data)
    assert refused.value.status == 400


def test_the_content_type_may_have_parameters() -> None:
    assert actions_of("POST", "Application/JSON ; charset=utf-8", "", body(ECHO)) == ("AccessUI",)


TOKENS = st.sampled_from(
    [*"{}()[]:!=|1#&\n\0\ufeff\ud83dé", "...", "on", "query", "mutation", "fragment", "A", "B", "test", "mlflowGetRun"]
)


@settings(max_examples=1000, deadline=None)
@given(st.lists(TOKENS, max_size=60).map(" ".join) | st.text(max_size=60))
def test_any_document_has_actions_or_is_refused(document: str) -> None:
    found = outcome(body(document))
    assert found
    if isinstance(found, tuple):
        assert all(name in ROOT_FIELDS.values() or name.startswith("Unknown:POST /graphql ") for name in found)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.text(max_size=30), st.text(max_size=30))
def test_any_body_has_actions_or_is_refused(data: bytes, content_type: str, query: str) -> None:
    assert outcome(data)
    assert outcome(data, content_type, query)
