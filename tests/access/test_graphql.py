"""GraphQL requests: which actions they need, against MLflow's own schema and its own way of reading them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import graphql
import pytest
from hypothesis import example, given, settings
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
        ("{ a(b: [" + "1 " * 16_001 + "]) }", "more than 16000 tokens"),
        ("#\n" * 8_000, "cannot be read"),
        ("{ a }" + " " * 65_536, "longer than 65536"),
        ('{ a(b: "' + '\\"' * 30_000, "cannot be read"),
        ('{ a(b: """' + '""\\' * 20_000, "cannot be read"),
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


@pytest.mark.parametrize("depth", [10, 11, 132, 5000])
@pytest.mark.parametrize("unit", ["{ a", "{ ... { a", "{ ... on X @b(c: {d: [1]}) { a: a(b: {c: [1]})"])
def test_deep_but_balanced_documents_end_well(depth: int, unit: str) -> None:
    braces = 1 if unit == "{ a" else 2
    found = outcome(body(unit * depth + " }" * braces * depth))
    assert found == ("Unknown:POST /graphql a",) if depth <= 10 else "GraphQL document" in found


def test_the_same_action_counts_once() -> None:
    roots = " ".join(f"a{n}: mlflowGetRun {{ experiment {{ id }} }}" for n in range(10))
    assert actions(f"{{ {roots} }}") == ("GetRun", "GetExperiment")
    assert len(actions("{ " + " ".join(f"a{n}" for n in range(10)) + " }")) == 10


# --- What MLflow answers, and what it does not ------------------------------------------------------------------------


def runs(number: int, fields: int, depth: int = 3) -> str:
    """A document that asks for so many runs under aliases, as the UI does, with `fields` fields each."""
    inner = " ".join(["runId", "status", "runName"] * (fields // 3 + 1)).split()[: fields - depth + 1]
    one = "info {" * (depth - 2) + " ".join(inner) + "}" * (depth - 2)
    roots = (f'r{at}: mlflowGetRun(input: {{runId: "{at:032}"}}) {{ {one} }}' for at in range(number))
    return "query Compare { " + "\n".join(roots) + " }"


def mlflow_refuses(document: str) -> bool:
    """Whether MLflow's own scan finds too much in a document; of aliases below the roots, there is nothing here."""
    from mlflow.server.graphql.graphql_no_batching import check_query_safety

    return check_query_safety(graphql.parse(document)) is not None


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (runs(8, 50), ""),
        (runs(10, 100), ""),
        (runs(10, 100, 10), ""),
        (runs(1, 1000), ""),
        (runs(11, 5), "more than 10 root fields"),
        (runs(10, 101), "more than 1000 fields"),
        (runs(1, 1001), "more than 1000 fields"),
        (runs(1, 20, 11), "nested too deeply"),
        ("query A {" + " a" * 6 + "} query B {" + " a" * 5 + "}", "more than 10 root fields"),
        ("{ " + " a { ...F }" * 10 + " } fragment F on X {" + " b" * 99 + "}", ""),
        ("{ " + " a { ...F }" * 10 + " } fragment F on X {" + " b" * 100 + "}", "more than 1000 fields"),
        ("{ a { ...F ...F ... { ...F } } } fragment F on X {" + " b" * 999 + "}", ""),
        ("{ ...F } fragment F on Query {" + " a" * 11 + "}", "more than 10 root fields"),
        ("{ a { ... { ... { ...F } } } } fragment F on X " + "{ b" * 9 + "}" * 9, ""),
        ("{ a { ...F } } fragment F on X " + "{ b" * 10 + "}" * 10, "nested too deeply"),
    ],
)  # fmt: skip
def test_mlflows_own_bounds_count_and_are_counted_alike(document: str, message: str) -> None:
    assert mlflow_refuses(document) == bool(message)
    found = outcome(body(document))
    assert (message in found) if message else isinstance(found, tuple)


def test_fragments_that_double_are_walked_once() -> None:
    doubling = "".join(f" fragment F{n} on Query {{ ...F{n + 1} ...F{n + 1} }}" for n in range(38))
    assert actions("{ ...F0 }" + doubling + " fragment F38 on Query { mlflowGetRun }") == ("GetRun",)


def test_fragments_in_fragments_without_end_are_not_followed_without_end() -> None:
    fragment = "fragment F on X {" + " ... {" * 2500 + " a " + "}" * 2501
    assert "more than 1000 fields" in refusal("{ a {" + " b { ...F }" * 900 + " } } " + fragment)


# --- GraphQL's own parser reads a document alike ----------------------------------------------------------------------


def fields_by_the_parser(document: str) -> tuple[set[str], set[str]] | None:
    """The names of root fields and of those below, wherever a document has them; None if it is none to execute."""
    try:
        tree = graphql.parse(document, no_location=True)
    except (graphql.GraphQLError, RecursionError):
        return None
    fragments = {node.name.value: node for node in tree.definitions if isinstance(node, graphql.FragmentDefinitionNode)}
    operations = [node for node in tree.definitions if isinstance(node, graphql.OperationDefinitionNode)]
    if len(fragments) + len(operations) != len(tree.definitions):
        return None
    roots: set[str] = set()
    below: set[str] = set()

    def walk(selections: graphql.SelectionSetNode, names: set[str], seen: frozenset[str]) -> None:
        for node in selections.selections:
            if isinstance(node, graphql.FieldNode):
                names.add(node.name.value)
                if node.selection_set:
                    walk(node.selection_set, below, seen)
            elif isinstance(node, graphql.InlineFragmentNode):
                walk(node.selection_set, names, seen)
            elif isinstance(node, graphql.FragmentSpreadNode) and node.name.value in fragments.keys() - seen:
                walk(fragments[node.name.value].selection_set, names, seen | {node.name.value})

    for operation in operations:
        walk(operation.selection_set, roots, frozenset())
    return roots, below


def actions_by_the_parser(document: str) -> set[str] | None:
    fields = fields_by_the_parser(document)
    if fields is None:
        return None
    roots, below = fields
    named = {ROOT_FIELDS.get(name, f"Unknown:POST /graphql {name}") for name in roots}
    return named | {NESTED_FIELDS[name] for name in below & NESTED_FIELDS.keys()}


NOISE = [" ", "\n", ",", "\t", "\r\n", ' # } { mlflowListArtifacts " \n', "#\r", "\ufeff", '#"""\n']
NAMES = ["mlflowGetRun", "mlflowSearchRuns", "experiment", "modelVersions", "test", "on", "fragment", "query"]
STRINGS = [
    *(
        '""',
        '"a"',
        '"} { mlflowListArtifacts"',
        '"\\""',
        '"\\\\"',
        '"\\\\\\""',
        '"#"',
        '"\\u007b"',
        '"\u2028"',
        '"(@:"',
    ),
    *('""""""', '"""a"""', '"""} " "" { x"""', '"""\\"""} {"""', '"""\\\\"""} """', '"""\n#\r\n"""'),
    *('"""a\\"""', '""""a"""'),
]
FLAWS = ["", "", "", '"', '"""', "\\", "{", "}", "#", "\n", "...", "a", ":", "(", ")", "@", "1"]

space = st.sampled_from(NOISE)
name = st.sampled_from(NAMES)
string = st.sampled_from(STRINGS)
value = st.recursive(
    string | st.sampled_from(["1", "-1.5e3", "$a", "null", "ENUM", "0"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{' '.join(items)}]")
        | st.lists(st.tuples(name, inner), max_size=3).map(
            lambda items: "{" + " ".join(f"{key}: {item}" for key, item in items) + "}"
        )
    ),
    max_leaves=6,
)


@st.composite
def arguments(draw: st.DrawFn) -> str:
    given = draw(st.lists(st.tuples(name, space, value), max_size=2))
    return f"({' '.join(f'{key}{gap}:{item}' for key, gap, item in given)})" if given else ""


@st.composite
def directives(draw: st.DrawFn) -> str:
    return "".join(f"@{draw(name)}{draw(arguments())}" for _ in range(draw(st.integers(0, 2))))


@st.composite
def selections(draw: st.DrawFn, fragments: str, depth: int = 0) -> str:
    items = [f"...{fragment}" for fragment in fragments if depth == 0]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["field", "leaf", "spread", "inline"] if depth < 3 else ["leaf"]))
        if kind == "spread" and fragments:
            items.append(f"...{draw(space)}{draw(st.sampled_from(fragments))} {draw(directives())}")
        elif kind == "inline":
            condition = draw(st.sampled_from(["", "on Query", "on\non", "on#\nX"]))
            items.append(f"...{condition} {draw(directives())}{draw(selections(fragments, depth + 1))}")
        else:
            alias = draw(st.sampled_from(["", "a:", "test :", "mlflowListArtifacts,:#\n", "on: "]))
            inner = draw(selections(fragments, depth + 1)) if kind == "field" else ""
            items.append(f"{alias}{draw(name)}{draw(space)}{draw(arguments())}{draw(directives())}{inner}")
    return "{" + draw(space) + f"{draw(space)} ".join(items) + "}"


@st.composite
def documents(draw: st.DrawFn) -> str:
    fragments = draw(st.sampled_from(["", "A", "AB"]))
    kind = draw(st.sampled_from(["", "query ", "mutation on", "subscription fragment", "query query"]))
    variables = draw(st.sampled_from(["", '($a: [Int!]! = [1] @b(c: ")") , $b:X={a:"("})'])) if kind else ""
    parts = [f"{kind}{variables}{draw(directives()) if kind else ''}{draw(selections(fragments))}"]
    for at, fragment in enumerate(fragments):
        inner = draw(selections(fragments[at + 1 :]))
        parts.append(f"fragment {fragment} on{draw(space)} on {draw(directives())}{inner}")
    text = f"{draw(space)} ".join(draw(st.permutations(parts)))
    at = draw(st.integers(0, len(text)))  # sometimes a flaw, which makes it another document, or none
    return text[:at] + draw(st.sampled_from(FLAWS)) + text[at:]


@settings(max_examples=100, deadline=None)
@given(documents() | st.text('{}()"\\#.:@ \nab1', max_size=30))
@example('{ a(b: """" } { mlflowListArtifacts """) }')
@example('{ a(b: "\\\\") { experiment } c(d: "") }')
def test_what_the_parser_reads_is_read_alike(document: str) -> None:
    """Not a field more, and not one less; what only this reads, MLflow does not carry out."""
    expected = actions_by_the_parser(document)
    found = outcome(body(document))
    if expected is not None and isinstance(found, tuple):
        assert set(found) == expected
    elif expected is not None:
        assert any(words in found for words in ("not define", "not use", "circle", "root fields", "different names"))


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
