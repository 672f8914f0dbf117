"""What the audit log says a request is about: what MLflow goes by, and nothing else. MLflow's parser is the oracle."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urlencode

import flask
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.protos import model_registry_pb2, service_pb2, webhooks_pb2
from mlflow.server import handlers
from tests.integration.routes import FAMILIES, Call

from mlflow_proxy.access.actions import action_of
from mlflow_proxy.telemetry import resources as module
from mlflow_proxy.telemetry.resources import Resources, resources_of

DELETE_RUN = "/api/2.0/mlflow/runs/delete"
APP = flask.Flask("oracle")
Pairs = tuple[tuple[bytes, bytes], ...]


def of(
    body: bytes | dict[str, Any], template: str = DELETE_RUN, path: str = "", query: str = "", headers: Pairs = ()
) -> Resources:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return resources_of(template, path or template, query, data, headers)


def values(found: Resources, name: str) -> list[str]:
    value = found.get(name, [])
    return value if isinstance(value, list) else [value]


# Fields


def test_identifiers_of_a_body() -> None:
    body = {"run_id": "r1", "experiment_id": "7", "value": "v", "metrics": [{"key": "loss"}], "name": "n", "version": 3}
    assert of(body) == {"run_id": "r1", "experiment_id": "7", "name": "n", "version": "3"}


def test_old_names_and_camel_case_are_recorded_as_one() -> None:
    assert of({"runUuid": "r1"}) == of({"run_uuid": "r1"}) == of({"runId": "r1"}) == {"run_id": "r1"}
    assert of({"experimentIds": ["1", "2"]}) == {"experiment_ids": ["1", "2"]}
    assert of({"request_ids": ["tr-1"]}) == of({"traceIds": ["tr-1"]}) == {"trace_ids": "tr-1"}


@pytest.mark.parametrize(
    ("template", "taken"),
    [
        ("/api/2.0/mlflow/runs/set-tag", True),
        ("/api/2.0/mlflow/runs/delete-tag", True),
        ("/api/2.0/mlflow/experiments/set-experiment-tag", True),
        ("/api/3.0/mlflow/traces/{trace_id}/tags", True),
        ("/api/2.0/mlflow/runs/log-parameter", False),
        ("/api/2.0/mlflow/runs/log-metric", False),
        ("/api/2.0/mlflow/model-versions/transition-stage", False),
    ],
)
def test_a_key_is_taken_where_it_is_a_tags(template: str, taken: bool) -> None:
    assert ("key" in of({"key": "k", "value": "v"}, template)) == taken


def test_path_parameters() -> None:
    template = "/api/2.0/mlflow/logged-models/{model_id}/tags/{tag_key}"
    assert of(b"", template, "/api/2.0/mlflow/logged-models/m-1/tags/a%20b%C3%BC") == {"model_id": "m-1", "key": "a bü"}
    template = "/api/3.0/mlflow/mcp-servers/{name}/versions/{version}"
    for name in ("a/b/c", "a%2Fb%2Fc", "a%2Fb/c"):
        path = f"/api/3.0/mlflow/mcp-servers/{name}/versions/1.0"
        assert of(b"", template, path) == {"name": "a/b/c", "version": "1.0"}
    assert of(b"", template, "/api/3.0/mlflow/mcp-servers/a/b%2Fversions%2F1.0") == {"name": "a/b", "version": "1.0"}


def test_inside_traces_and_models() -> None:
    trace = {"trace_info": {"trace_id": "tr-1", "trace_location": {"mlflow_experiment": {"experiment_id": "7"}}}}
    assert of({"trace": trace}, "/api/3.0/mlflow/traces") == {"trace_id": "tr-1", "experiment_id": "7"}
    models = [{"model_id": "m-1", "step": 1}, {"modelId": "m-2"}]
    assert of({"run_id": "r", "models": models}) == {"run_id": "r", "model_id": ["m-1", "m-2"]}
    assert of({"tags": [{"name": "t"}], "dataset": {"name": "d"}, "config": {"run_id": "r"}}) == {}


def test_what_is_named_twice_is_recorded_twice() -> None:
    """A decoy beside the run that MLflow goes by hides nothing; which of them it is differs by route and version."""
    assert of({"run_id": "real"}, query="run_id=decoy") == {"run_id": ["real", "decoy"]}
    assert of({"run_id": "a", "runId": "b", "run_uuid": "c"}) == {"run_id": ["a", "b", "c"]}
    assert of({"run_id": "same"}, query="run_id=same&run_uuid=same") == {"run_id": "same"}


@pytest.mark.parametrize(
    "prefix",
    ["/api/2.0/mlflow-artifacts/artifacts/{artifact_path}", "/gateway/x/invocations", "/v1/traces", "/graphql"],
)
def test_files_and_messages_are_not_looked_into(prefix: str) -> None:
    found = of({"run_id": "in a file"}, prefix, prefix)
    assert "run_id" not in found
    assert found.not_looked_into == "opaque"
    assert of(b"", prefix, prefix).not_looked_into == ""


def test_headers_that_name_something() -> None:
    headers = ((b"x-mlflow-experiment-id", b"7"), (b"accept", b"*/*"), (b"x-mlflow-workspace", b"team"))
    assert of(b"\x0a\x00", "/v1/traces", headers=headers) == {"experiment_id": "7", "workspace": "team"}
    assert of({"experiment_id": "8"}, headers=headers[:1]) == {"experiment_id": ["8", "7"]}
    assert of(b"", headers=((b"x-mlflow-workspace", b"w" * 300),)) == {"workspace": "w" * 256 + "…"}


@pytest.mark.parametrize(("coding", "why"), [(b"gzip", "encoded"), (b"identity", ""), (b"", "")])
def test_a_compressed_body_is_not_looked_into(coding: bytes, why: str) -> None:
    found = of({"run_id": "r"}, query="name=n", headers=((b"content-encoding", coding),))
    assert found.not_looked_into == why
    assert found == ({"name": "n"} if why else {"run_id": "r", "name": "n"})


def test_an_uploaded_file_is_known_by_its_query() -> None:
    route = "/ajax-api/2.0/mlflow/upload-artifact"
    assert of({"run_uuid": "x"}, route, query="run_uuid=r&path=a%2Fb") == {"run_id": "r", "path": "a/b"}


# Bounds


def test_long_values_and_lists_are_cut() -> None:
    found = of({"run_id": "r" * 300, "request_ids": [f"tr-{number}" for number in range(250)], "name": "n" * 256})
    assert found["run_id"] == "r" * 256 + "…"
    assert found["name"] == "n" * 256
    assert found["trace_ids"] == [*(f"tr-{number}" for number in range(100)), "+150"]


def test_many_values_in_other_ways_are_cut_too() -> None:
    query = urlencode([("run_id", f"r{number}") for number in range(150)])
    assert of(b"", query=query)["run_id"] == [*(f"r{number}" for number in range(100)), "+50"]
    found = of({"models": [{"model_id": f"m{number}"} for number in range(150)]})
    assert found["model_id"] == [f"m{number}" for number in range(100)]
    assert found["models"] == "+50"


def test_a_line_stays_short_and_names_everything_at_least_once() -> None:
    found = of({name: [f"{number:0255}" for number in range(20)] for name in sorted(module._NAMES)})
    assert len(json.dumps(found)) < 40_000
    assert set(found) == set(module._NAMES.values())


def test_no_part_of_a_request_crowds_out_another() -> None:
    """However many decoys stand in one, what MLflow goes by in another is there."""
    decoys = [f"d{number}" for number in range(300)]
    query = urlencode([("run_id", decoy) for decoy in decoys])
    assert "real" in values(of({"run_id": "real"}, query=query), "run_id")
    assert "real" in values(of({"run_id": decoys}, query="run_id=real"), "run_id")
    template = "/api/3.0/mlflow/traces/{trace_id}"
    assert "real" in values(of({"trace_id": decoys}, template, "/api/3.0/mlflow/traces/real", query), "trace_id")


def test_a_path_of_any_length_with_slashes_is_taken_apart() -> None:
    template = "/api/3.0/mlflow/mcp-servers/{name}/versions/{version}/tags/{key}"
    name = "/versions/a" * 1000 + "%2F/tags/b"
    found = of(b"", template, f"/api/3.0/mlflow/mcp-servers/{name[1:]}/versions/1/tags/k")
    assert found == {"name": unquote(name[1:257]) + "…", "version": "1", "key": "k"}


pieces = st.sampled_from(["/", "a", "/versions/", "/tags/", "b%2Fc", "/tags", "versions/"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(pieces, max_size=9).map("".join),
    st.sampled_from(["/{version}", "/{version}/tags", "/{version}/tags/{key}"]),
)
@example("a/versions/b/versions//tags/x", "/{version}/tags/{key}")
def test_the_first_of_parameters_with_slashes_takes_as_much_as_it_can(middle: str, rest: str) -> None:
    """As a regular expression has it, whose time may be the square of the length."""
    template = f"/api/3.0/mlflow/mcp-servers/{{name}}/versions{rest}"
    path = f"/api/3.0/mlflow/mcp-servers/{middle}"
    plain, greedy = (re.sub(r"\{(\w+)\}", rf"(?P<\1>{value})", template) for value in ("[^/]+", ".+"))
    match = re.fullmatch(plain, path) or re.fullmatch(greedy, path.replace("%2F", "/"))
    assert of(b"", template, path) == (
        {key: unquote(value) for key, value in match.groupdict().items()} if match else {}
    )


# What it may cost

_IDS = b",".join(b'{"run_id": "%032x"}' % number for number in range(20_000))
_NESTED: Any = [{"run_id": str(number)} for number in range(95)]
for _level in range(2):
    _NESTED = [{"models": _NESTED}] * 5

COSTLY = [
    (b'{"run_id": "r", "x": "' + b"x" * (1 << 20) + b'"}', "too-large"),
    (b'{"run_id": "r", "run_ids": [' + b"[]," * 300_000 + b"0]}", "too-many-elements"),
    (b'{"run_id": "r", "run_ids": [' + b'{"":0},' * 100_000 + b"0]}", "too-many-elements"),
    (b'{"run_id": "r", "models": [' + _IDS + b"]}", "too-many-elements"),
    (b'{"run_id": "r", "run_ids": ' + b"[" * 500_000 + b"]" * 500_000 + b"}", "too-many-elements"),
    (b'{"run_id": "r", "run_ids": [' + b",".join([b"9" * 4300] * 200) + b"]}", "too-large"),
    (b'{"run_id": "\\ud800", "x": [' + b"[]," * 300_000 + b"0]}", "too-many-elements"),
    (b'{"\xed\xa0\x80": 1, "run_id": "r", "x": [' + b"[]," * 300_000 + b"0]}", "too-many-elements"),
    (json.dumps({"run_id": "r", "x": [[]] * 120_000}).encode("utf-16"), "too-many-elements"),
    (json.dumps(json.dumps({"run_id": "r", "x": [[]] * 200_000})).encode(), "too-many-elements"),
    (b'"{\\"run_ids\\": [' + b"\\u005b\\u005d\\u002c" * 50_000 + b'0]}"', "too-many-elements"),
    (json.dumps(json.dumps({"run_ids": [int("9" * 4000)] * 100})).encode("utf-16-le"), "too-large"),
    (b'{"run_id": "r", ' + b",".join(b'"%x": 0' % number for number in range(90_000)) + b"}", ""),
    (b'{"run_id": "r", "metrics": [' + b",".join([b'{"key": "loss", "value": 0.5}'] * 30_000) + b"]}", ""),
    (b'{"run_id": "r", "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "too-deep"),
    (json.dumps({"run_id": "r", "models": _NESTED}).encode(), ""),
    (b"\x0a\x05hello", "not-json"),
    (b'{"run_id": "r"', "not-json"),
]


@pytest.mark.parametrize(("body", "why"), COSTLY, ids=range(len(COSTLY)))
def test_what_a_body_costs_is_bounded_and_what_is_left_out_is_said(body: bytes, why: str) -> None:
    """A body that is not read is never recorded as one that names nothing. Its own size is not counted here."""
    tracemalloc.start()
    try:
        found = of(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.not_looked_into == why
    assert found or why
    assert peak < 8 << 20


def test_too_deep_is_also_what_stands_deeper_than_mlflow_has_it() -> None:
    inside: dict[str, Any] = {"trace_id": "hidden"}
    for _ in range(5):
        inside = {"trace": inside}
    found = of(inside)
    assert (found, found.not_looked_into) == ({}, "too-deep")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"trace":' * 500 + b"1" + b"}" * 500,
        b'{"run_id": ' + b"9" * 50_000 + b"}",
        b'{"run_id": 1e999, "version": NaN}',
        b'{"run_id": true, "name": null, "version": 1.5, "alias": {"a": 1}, "run_ids": [[["x"]], {}, null]}',
        b'{"run_id": "\xff"}',
        b'{"\xff": 1}',
        b'{"run_id": "a", "\xff": 1}',
        b'{"run_id": "a"} x',
        b'"\\"\\\\\\""',
        b"\x00\x00\x00",
        b"\xff\xfe",
        b"",
        b"null",
        b"[1]",
    ],
)
def test_hostile_bodies_name_nothing(body: bytes) -> None:
    assert of(body) == {}


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200), path=st.text(max_size=50), query=st.text(max_size=50))
def test_nothing_raises(body: bytes, path: str, query: str) -> None:
    for template in (DELETE_RUN, "/api/3.0/mlflow/traces/{trace_id}/tags"):
        found = resources_of(template, path, query, body)
        assert json.loads(json.dumps(found)) == found


@settings(max_examples=500, deadline=None)
@given(at=st.integers(0, 79), byte=st.binary(min_size=0, max_size=2))
def test_nothing_raises_for_a_body_with_a_flaw(at: int, byte: bytes) -> None:
    body = b'{"run_id": "abc", "trace": {"trace_info": {"trace_id": "tr-1"}}, "models": [{"a": 1}]}'
    of(body[:at] + byte + body[at + 1 :])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from([*sorted(module._TAG_NAMES), *sorted(module._CONTAINERS)]) | st.text(max_size=9)


@settings(max_examples=200, deadline=None)
@given(content=st.dictionaries(names, json_values, max_size=6))
def test_only_known_names_come_out(content: dict[str, Any]) -> None:
    found = of(content)
    assert set(found) <= set(module._NAMES.values()) | module._CONTAINERS
    for value in found.values():
        assert value
        assert all(isinstance(item, str) for item in (value if isinstance(value, list) else [value]))


# What MLflow goes by


def mlflow_goes_by(body: bytes, method: str, content_type: str, query: str) -> str | None:
    """The run that MLflow would delete; None if it refuses the request."""
    url = f"{DELETE_RUN}?{query}"
    with APP.test_request_context(url, data=body, method=method, content_type=content_type):
        try:
            return str(handlers._get_request_message(service_pb2.DeleteRun()).run_id)
        except (MlflowException, ValueError, RecursionError, AttributeError):
            return None


encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
run_names = st.sampled_from(["run_id", "runId", "run_\\u0069d", "run_uuid", "runUuid", "RUN_ID", "run_id "])
padding = st.sampled_from(["", '"x": ' + "[" * 300 + "]" * 300, '"x": "\\ud800"', '"y": NaN', '"z": 1e400', '"w": {}'])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    fields = draw(st.lists(st.tuples(run_names, st.text("ab\u00e9\U0001f642", min_size=1, max_size=3)), max_size=4))
    texts = [f'"{name}": {json.dumps(value, ensure_ascii=draw(st.booleans()))}' for name, value in fields]
    texts.insert(draw(st.integers(0, len(texts))), draw(padding))
    text = draw(st.sampled_from(["", " ", "\n\t"])) + "{" + ", ".join(filter(None, texts)) + "}"
    if draw(st.booleans()):
        text = json.dumps(text)
    return text.encode(draw(encodings))


@settings(max_examples=500, deadline=None)
@given(
    body=bodies(),
    method=st.sampled_from(["POST", "PATCH", "DELETE", "GET"]),
    content_type=st.sampled_from(["application/json", "text/plain", "application/x-www-form-urlencoded", "a/b"]),
    query=st.sampled_from(["", "run_id=decoy", "runId=decoy", "run_id=a&run_id=b"]),
)
@example(b'{"run_id": "a", "run_id": "b"}', "POST", "application/json", "")
@example(json.dumps('{"run_id": "a"}').encode("utf-16"), "PATCH", "text/plain", "")
@example(b'{"run_id": "a", "x": ' + b"[" * 800 + b"]" * 800 + b"}", "POST", "application/json", "run_id=decoy")
def test_the_run_that_mlflow_goes_by_is_recorded(body: bytes, method: str, content_type: str, query: str) -> None:
    """Whatever the encoding, spelling, depth or content type: nobody deletes one run and has another recorded."""
    run = mlflow_goes_by(body, method, content_type, query)
    if run:
        assert run in values(of(body, query=query), "run_id")


def test_the_oracle_tells_runs_apart() -> None:
    assert mlflow_goes_by(b'{"run_id": "a"}', "POST", "application/json", "run_id=b") == "a"
    assert mlflow_goes_by(b'{"run_id": "a", "run_id": "c"}', "POST", "application/json", "") == "c"
    assert mlflow_goes_by(b'{"run_id": "a"}', "POST", "text/plain", "") is None
    assert mlflow_goes_by(b'{"run_id": "a"}', "DELETE", "text/plain", "") == "a"
    assert mlflow_goes_by(json.dumps('{"runId": "a"}').encode("utf-16"), "PATCH", "a/b", "") == "a"
    assert mlflow_goes_by(b"{}", "GET", "a/b", "run_id=b") == "b"


# All of MLflow's requests

# Names in requests that name no resource: people, settings, and Databricks' own.
NO_RESOURCES = {
    *("user_id", "sql_warehouse_id", "source_databricks_request_id", "run_tracking_server_id", "deployment_job_id"),
    *("metric_name", "dataset_name", "model_name", "scorer_version", "action_endpoint_id"),
    *("artifact_directory_path", "update_schema_ids"),
}


def request_fields() -> Iterator[tuple[str, str]]:
    for part in (service_pb2, model_registry_pb2, webhooks_pb2):
        for service in part.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                for field in method.input_type.fields:
                    yield f"{method.name}.{field.name}", field.name


def test_every_name_in_mlflows_requests_is_recorded_or_left_out_on_purpose() -> None:
    named = {
        (where, field)
        for where, field in request_fields()
        if re.search(r"(^|_)(ids?|uuid|name|alias|version|path)$", field)
    }
    assert len(named) > 100
    assert {where for where, field in named if field not in module._TAG_NAMES and field not in NO_RESOURCES} == set()
    assert NO_RESOURCES.isdisjoint(module._TAG_NAMES)


WRITES = [
    pytest.param(call, id=f"{call.method} {call.rule}")
    for family in FAMILIES.values()
    for call in family
    if action_of(call.method, re.sub(r"<[^>]*>|\{[^}]*\}", "x", call.rule)).writes and isinstance(call.data, dict)
]


@pytest.mark.parametrize("call", WRITES)
def test_of_valid_writes_only_identifiers_are_taken(call: Call) -> None:
    """With a mark in every value: what comes out stands under a name that is recorded, as it was sent."""
    marked = {name: f"<{name}>" if isinstance(value, str) else value for name, value in dict(call.data or {}).items()}
    rule = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", call.rule)
    path = re.sub(r"\{(\w+)\}", lambda match: quote(f"<{match[1]}>"), rule)
    template = action_of(call.method, path).template
    for name, value in of(marked, template, path).items():
        for item in value if isinstance(value, list) else [value]:
            match = re.fullmatch(r"<(\w+)>", item)
            if match:
                assert module._TAG_NAMES[match[1]] == name
    for secret in ("value", "description", "secret", "url", "source", "model_json", "serialized_scorer"):
        assert f"<{secret}>" not in json.dumps(of(marked, template, path))
