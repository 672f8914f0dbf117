"""A valid call of every route that MLflow has, in an order in which each finds what it needs.

A family is a story about one kind of resource: make it, look at it, change it, delete it. Values that a call's answer
brings are kept under a name and used by later calls as `$name`; `$lane` is a word that differs between the callers
that are compared, so that each has resources of its own. Rules are written as `/api/…`, and stand for their
`/ajax-api/…` twins too; those that begin with `/ajax-api/` have no twin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One valid request. `expect` is the status that MLflow gives to it, for the reason in `why` if it is an error.

    `on_tracking` is the status of a tracking server, where that differs from an App's.
    """

    method: str
    rule: str
    data: Values | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    path: Mapping[str, str] = field(default_factory=dict)
    expect: int = 200
    on_tracking: int | None = None
    why: str = ""
    body: Callable[[Values], bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    before: Call | None = None
    volatile: tuple[str, ...] = ()

    def expected_of(self, mode: str) -> int:
        """The status in the mode `tracking` or `app`."""
        return self.expect if mode == "app" or self.on_tracking is None else self.on_tracking


def call(method: str, rule: str, data: Values | None = None, **more: Any) -> Call:
    return Call(method, rule, data, **more)


V2 = "/api/2.0/mlflow"
V3 = "/api/3.0/mlflow"
AJAX2 = "/ajax-api/2.0/mlflow"
AJAX3 = "/ajax-api/3.0/mlflow"

DISABLED = "the server is started with --no-serve-artifacts, as in SageMaker"
NO_JOBS = "the local server runs no jobs"
NO_WORKSPACES: Mapping[str, Any] = {"on_tracking": 503, "why": "only Apps have workspaces"}
WORKSPACE = {"workspace_name": "ws-$lane"}
REMOTE = "the assistant is for callers on MLflow's own host"

EXPERIMENT = call("POST", f"{V2}/experiments/create", {"name": "exp $lane"}, keep={"experiment": "experiment_id"})
RUN = call(
    "POST",
    f"{V2}/runs/create",
    {"experiment_id": "$experiment", "run_name": "run $lane", "start_time": 1700000000000},
    keep={"run": "run.info.run_id"},
)


def _trace_info(values: Values) -> dict[str, Any]:
    return {
        "trace_id": f"tr-{values['hex']}",
        "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": values["experiment"]}},
        "request_preview": '{"question": "größe?"}',
        "response_preview": '"42 🙂"',
        "request_time": "2026-01-02T03:04:05.678Z",
        "execution_duration": "1.5s",
        "state": "OK",
        "trace_metadata": {"mlflow.trace_schema.version": "3", "mlflow.trace.session": "one"},
        "tags": {"colour": "grün"},
    }


def _trace(values: Values) -> bytes:
    return json.dumps({"trace": {"trace_info": _trace_info(values)}}).encode()


def _spans(values: Values) -> bytes:
    """An OTLP export of one span of the trace."""
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add()
    span.trace_id = bytes.fromhex(values["hex2"])
    span.span_id = bytes.fromhex("00f067aa0ba902b7")
    span.name = "predict"
    span.start_time_unix_nano = 1_700_000_000_000_000_000
    span.end_time_unix_nano = 1_700_000_001_000_000_000
    attribute = span.attributes.add(key="mlflow.traceRequestId")
    attribute.value.string_value = json.dumps(f"tr-{values['hex2']}")
    data: bytes = request.SerializeToString()
    return data


TRACE = call("POST", f"{V3}/traces", body=_trace, keep={"trace": "trace.trace_info.trace_id"})

SCORER = json.dumps(
    {
        "name": "polite",
        "aggregations": None,
        "is_session_level_scorer": False,
        "mlflow_version": "3.17.2",
        "serialization_version": 1,
        "builtin_scorer_class": "Guidelines",
        "builtin_scorer_pydantic_data": {"name": "polite", "required_columns": ["inputs"], "guidelines": "be polite"},
    }
)

_CHAT = {"model": "none", "messages": [{"role": "user", "content": "hi"}]}
_ENDPOINT = {"endpoint_name": "none"}
_ASSISTANT = {"session_id": "none", "provider": "none"}
_MCP = "com.example/$lane"
_MCP_PATH = {"name": _MCP}
_MCP_VERSION = {**_MCP_PATH, "version": "1.0.0"}

FAMILIES: dict[str, list[Call]] = {
    "experiments": [
        EXPERIMENT,
        call("GET", f"{V2}/experiments/get", {"experiment_id": "$experiment"}),
        call("GET", f"{V2}/experiments/get-by-name", {"experiment_name": "exp $lane"}),
        call("GET", f"{V2}/experiments/search", {"max_results": 5, "order_by": "name ASC"}),
        call("POST", f"{V2}/experiments/search", {"max_results": 5, "filter": "name ILIKE 'exp%' AND name != 'it''s'"}),
        call("POST", f"{V2}/experiments/update", {"experiment_id": "$experiment", "new_name": "größer $lane 🚀"}),
        call(
            "POST",
            f"{V2}/experiments/set-experiment-tag",
            {"experiment_id": "$experiment", "key": "équipe", "value": "данные 数据 🙂"},
        ),
        call("POST", f"{V2}/experiments/delete-experiment-tag", {"experiment_id": "$experiment", "key": "équipe"}),
        call("POST", f"{V2}/experiments/delete", {"experiment_id": "$experiment"}),
        call("POST", f"{V2}/experiments/restore", {"experiment_id": "$experiment"}),
    ],
    "runs": [
        EXPERIMENT,
        RUN,
        call("GET", f"{V2}/runs/get", {"run_id": "$run"}),
        call(
            "POST",
            f"{V2}/runs/log-batch",
            {
                "run_id": "$run",
                "metrics": [{"key": "loss", "value": 1 / n, "timestamp": 1700000000000 + n, "step": n} for n in (1, 2)],
                "params": [{"key": "rate", "value": "0.1"}],
                "tags": [{"key": "note", "value": "it's “quoted”"}],
            },
        ),
        call(
            "POST",
            f"{V2}/runs/log-metric",
            {"run_id": "$run", "key": "acc", "value": 0.5, "timestamp": 1700000000000, "step": 3},
        ),
        call("POST", f"{V2}/runs/log-parameter", {"run_id": "$run", "key": "depth", "value": "4"}),
        call("POST", f"{V2}/runs/set-tag", {"run_id": "$run", "key": "stage", "value": "trial"}),
        call("POST", f"{V2}/runs/delete-tag", {"run_id": "$run", "key": "stage"}),
        call("POST", f"{V2}/runs/search", {"experiment_ids": ["$experiment"], "filter": "metrics.loss < 2"}),
        call("POST", f"{V2}/runs/update", {"run_id": "$run", "status": "FINISHED", "end_time": 1700000009000}),
        call(
            "POST",
            f"{V2}/runs/log-inputs",
            {
                "run_id": "$run",
                "datasets": [
                    {
                        "tags": [{"key": "mlflow.data.context", "value": "training"}],
                        "dataset": {"name": "iris", "digest": "ab12", "source_type": "http", "source": "{}"},
                    }
                ],
            },
        ),
        call("POST", f"{AJAX2}/experiments/search-datasets", {"experiment_ids": ["$experiment"]}),
        call(
            "POST",
            "/api/2.0mlflow/experiments/search-datasets",
            {"experiment_ids": ["$experiment"]},
            expect=404,
            why="a slip of MLflow's, which lists this rule without its slash, and then does not serve it",
        ),
        call(
            "POST",
            f"{V2}/runs/log-model",
            {
                "run_id": "$run",
                "model_json": '{"run_id": "$run", "artifact_path": "m", "flavors": {}, "utc_time_created": "2026"}',
            },
        ),
        call("GET", f"{V2}/metrics/get-history", {"run_id": "$run", "metric_key": "loss"}),
        call("GET", f"{AJAX2}/metrics/get-history-bulk", {"run_id": "$run", "metric_key": "loss"}),
        call("GET", f"{V2}/metrics/get-history-bulk-interval", {"run_ids": "$run", "metric_key": "loss"}),
        call(
            "POST",
            f"{AJAX2}/runs/create-promptlab-run",
            {
                "experiment_id": "$experiment",
                "run_name": "prompt $lane",
                "prompt_template": "say {{word}}",
                "prompt_parameters": [{"key": "word", "value": "hi"}],
                "model_route": "chat",
                "model_parameters": [{"key": "temperature", "value": "0"}],
                "model_input": "say hi",
                "model_output": "hi",
                "mlflow_version": "3.0.0",
                "start_time": 1700000000000,
            },
        ),
        call("POST", f"{V2}/runs/delete", {"run_id": "$run"}),
        call("POST", f"{V2}/runs/restore", {"run_id": "$run"}),
    ],
    "artifacts": [
        EXPERIMENT,
        RUN,
        call(
            "POST",
            f"{AJAX2}/upload-artifact",
            {"run_uuid": "$run", "path": "notes/größe.txt"},
            body=lambda _: "größe 🙂\n".encode(),
            headers={"content-type": "text/plain"},
        ),
        call("GET", f"{V2}/artifacts/list", {"run_id": "$run", "path": ""}),
        call(
            "GET",
            "/get-artifact",
            {"run_id": "$run", "path": "notes/größe.txt"},
            volatile=("etag", "last-modified"),
        ),
        call("POST", f"{V2}/artifacts/presigned-upload-url", {"run_id": "$run", "path": "a b.txt"}),
        call("POST", f"{V2}/artifacts/presigned-download-url", {"run_id": "$run", "path": "notes/größe.txt"}),
        call(
            "GET",
            f"{AJAX2}/get-trace-artifact",
            {"request_id": "tr-none"},
            expect=404,
            why="the traces of this server are in its database",
        ),
        call(
            "GET", f"{AJAX3}/get-trace-artifact", {"request_id": "tr-none"}, expect=404, why="as its version 2.0 above"
        ),
        call("GET", "/api/2.0/mlflow-artifacts/artifacts", {"path": "a"}, expect=503, why=DISABLED),
        *(
            call(
                method,
                f"/api/2.0/mlflow-artifacts/{kind}/{{artifact_path}}",
                data,
                path={"artifact_path": "a/b c.txt"},
                expect=503,
                why=DISABLED,
            )
            for method, kind, data in (
                ("GET", "artifacts", None),
                ("PUT", "artifacts", {"any": "bytes"}),
                ("DELETE", "artifacts", None),
                ("GET", "presigned", None),
                ("POST", "mpu/create", {"path": "b c.txt", "num_parts": 2}),
                ("POST", "mpu/complete", {"path": "b c.txt", "upload_id": "1", "parts": []}),
                ("POST", "mpu/abort", {"path": "b c.txt", "upload_id": "1"}),
            )
        ),
    ],
    "registry": [
        EXPERIMENT,
        RUN,
        call("POST", f"{V2}/registered-models/create", {"name": "модель $lane", "description": "d"}),
        call("GET", f"{V2}/registered-models/get", {"name": "модель $lane"}),
        call("PATCH", f"{V2}/registered-models/update", {"name": "модель $lane", "description": "e"}),
        call("POST", f"{V2}/registered-models/set-tag", {"name": "модель $lane", "key": "k", "value": "v 🙂"}),
        call("GET", f"{V2}/registered-models/search", {"filter": "name LIKE '%$lane'", "max_results": 2}),
        call(
            "POST",
            f"{V2}/model-versions/create",
            {"name": "модель $lane", "source": "s3://local-sagemaker-mlflow/$run/m", "run_id": "$run"},
            keep={"version": "model_version.version"},
        ),
        call("GET", f"{V2}/model-versions/get", {"name": "модель $lane", "version": "1"}),
        call("GET", f"{V2}/model-versions/get-download-uri", {"name": "модель $lane", "version": "1"}),
        call("GET", f"{V2}/model-versions/search", {"filter": "name = 'модель $lane'"}),
        call("PATCH", f"{V2}/model-versions/update", {"name": "модель $lane", "version": "1", "description": "f"}),
        call(
            "POST",
            f"{V2}/model-versions/set-tag",
            {"name": "модель $lane", "version": "1", "key": "k", "value": "v"},
        ),
        call("DELETE", f"{V2}/model-versions/delete-tag", {"name": "модель $lane", "version": "1", "key": "k"}),
        call(
            "POST",
            f"{V2}/model-versions/transition-stage",
            {"name": "модель $lane", "version": "1", "stage": "Staging", "archive_existing_versions": False},
        ),
        call("GET", f"{V2}/registered-models/get-latest-versions", {"name": "модель $lane", "stages": "Staging"}),
        call("POST", f"{V2}/registered-models/get-latest-versions", {"name": "модель $lane", "stages": ["Staging"]}),
        call("POST", f"{V2}/registered-models/alias", {"name": "модель $lane", "alias": "best", "version": "1"}),
        call("GET", f"{V2}/registered-models/alias", {"name": "модель $lane", "alias": "best"}),
        call("DELETE", f"{V2}/registered-models/alias", {"name": "модель $lane", "alias": "best"}),
        call("DELETE", f"{V2}/registered-models/delete-tag", {"name": "модель $lane", "key": "k"}),
        call(
            "GET",
            "/model-versions/get-artifact",
            {"name": "модель $lane", "version": "1", "path": "none.txt"},
            expect=500,
            why="no artifact was uploaded for this version",
        ),
        call("DELETE", f"{V2}/model-versions/delete", {"name": "модель $lane", "version": "1"}),
        call("POST", f"{V2}/registered-models/rename", {"name": "модель $lane", "new_name": "model $lane"}),
        call("DELETE", f"{V2}/registered-models/delete", {"name": "model $lane"}),
    ],
    "logged models": [
        EXPERIMENT,
        RUN,
        call(
            "POST",
            f"{V2}/logged-models",
            {"experiment_id": "$experiment", "name": "model", "source_run_id": "$run"},
            keep={"model_id": "model.info.model_id"},
        ),
        call("GET", f"{V2}/logged-models/{{model_id}}"),
        call(
            "POST",
            f"{V2}/logged-models/{{model_id}}/params",
            {"model_id": "$model_id", "params": [{"key": "p", "value": "1"}]},
        ),
        call("PATCH", f"{V2}/logged-models/{{model_id}}/tags", {"tags": [{"key": "t a g", "value": "é"}]}),
        call("DELETE", f"{V2}/logged-models/{{model_id}}/tags/{{tag_key}}", path={"tag_key": "t a g"}),
        call("PATCH", f"{V2}/logged-models/{{model_id}}", {"model_id": "$model_id", "status": "LOGGED_MODEL_READY"}),
        call("POST", f"{V2}/runs/outputs", {"run_id": "$run", "models": [{"model_id": "$model_id", "step": 1}]}),
        call("POST", f"{V2}/logged-models/search", {"experiment_ids": ["$experiment"], "filter": "name = 'model'"}),
        call("GET", f"{V2}/logged-models/{{model_id}}/artifacts/directories"),
        call(
            "GET",
            f"{AJAX2}/logged-models/{{model_id}}/artifacts/files",
            {"artifact_file_path": "none.txt"},
            expect=500,
            why="no artifact was uploaded for this model",
        ),
        call("DELETE", f"{V2}/logged-models/{{model_id}}"),
    ],
    "traces": [
        EXPERIMENT,
        RUN,
        TRACE,
        call("GET", f"{V3}/traces/{{trace_id}}", path={"trace_id": "$trace"}),
        call("POST", f"{V3}/traces/batchGetInfos", {"trace_ids": ["$trace"]}),
        call(
            "POST",
            f"{V3}/traces/search",
            {
                "locations": [
                    {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "$experiment"}},
                ],
                "filter": "tags.colour = 'grün'",
                "max_results": 3,
            },
        ),
        call(
            "PATCH",
            f"{V3}/traces/{{trace_id}}/tags",
            {"key": "a", "value": "b"},
            path={"trace_id": "$trace"},
        ),
        call("DELETE", f"{V3}/traces/{{trace_id}}/tags", {"key": "a"}, path={"trace_id": "$trace"}),
        call(
            "POST",
            f"{V3}/traces/metrics",
            {
                "experiment_ids": ["$experiment"],
                "view_type": "TRACES",
                "metric_name": "latency",
                "aggregations": [{"aggregation_type": "AVG"}],
            },
        ),
        call(
            "POST",
            f"{V3}/traces/calculate-filter-correlation",
            {"experiment_ids": ["$experiment"], "filter_string1": "tags.a = 'b'", "filter_string2": "tags.c = 'd'"},
        ),
        call(
            "POST",
            f"{V3}/traces/{{trace_id}}/assessments",
            {
                "assessment": {
                    "assessment_name": "good",
                    "source": {"source_type": "HUMAN", "source_id": "zoë"},
                    "feedback": {"value": True},
                    "rationale": "because 🙂",
                }
            },
            path={"trace_id": "$trace"},
            keep={"assessment_id": "assessment.assessment_id"},
        ),
        call("GET", f"{V3}/traces/{{trace_id}}/assessments/{{assessment_id}}", path={"trace_id": "$trace"}),
        call(
            "PATCH",
            f"{V3}/traces/{{trace_id}}/assessments/{{assessment_id}}",
            {
                "assessment": {
                    "assessment_id": "$assessment_id",
                    "trace_id": "$trace",
                    "assessment_name": "better",
                    "feedback": {"value": False},
                },
                "update_mask": "assessment_name,feedback",
            },
            path={"trace_id": "$trace"},
        ),
        call("DELETE", f"{V3}/traces/{{trace_id}}/assessments/{{assessment_id}}", path={"trace_id": "$trace"}),
        call("POST", f"{V2}/traces/link-to-run", {"trace_ids": ["$trace"], "run_id": "$run"}),
        call(
            "POST",
            f"{V2}/traces/link-prompts",
            {"trace_id": "$trace", "prompt_versions": [{"name": "p", "version": "1"}]},
        ),
        call("GET", f"{V2}/unified-traces", {"experiment_ids": "$experiment"}, expect=404, why="Databricks has it"),
        call("GET", f"{V2}/get-online-trace-details", {"trace_id": "$trace"}, expect=404, why="Databricks has it"),
        call(
            "POST",
            "/v1/traces",
            body=_spans,
            headers={"content-type": "application/x-protobuf", "x-mlflow-experiment-id": "$experiment"},
        ),
        call("GET", f"{V3}/traces/get", {"trace_id": "tr-$hex2", "allow_partial": "true"}),
        call("GET", f"{V3}/traces/batchGet", {"trace_ids": "tr-$hex2"}),
        call("POST", f"{V3}/traces/delete-traces", {"experiment_id": "$experiment", "request_ids": ["$trace"]}),
    ],
    "traces of version 2": [
        EXPERIMENT,
        call(
            "POST",
            f"{V2}/traces",
            {
                "experiment_id": "$experiment",
                "timestamp_ms": 1700000000000,
                "tags": [{"key": "colour", "value": "grün"}],
            },
            keep={"request_id": "trace_info.request_id"},
        ),
        call(
            "PATCH",
            f"{V2}/traces/{{request_id}}",
            {"timestamp_ms": 1700000001000, "status": "OK", "request_metadata": [{"key": "a", "value": "b"}]},
        ),
        call("GET", f"{V2}/traces/{{request_id}}/info"),
        call("PATCH", f"{V2}/traces/{{request_id}}/tags", {"key": "a", "value": "b"}),
        call("DELETE", f"{V2}/traces/{{request_id}}/tags", {"key": "a"}),
        call("GET", f"{V2}/traces", {"experiment_ids": "$experiment", "max_results": 2}),
        call("POST", f"{V2}/traces/delete-traces", {"experiment_id": "$experiment", "request_ids": ["$request_id"]}),
    ],
    "datasets": [
        EXPERIMENT,
        call(
            "POST",
            f"{V3}/datasets/create",
            {"name": "data $lane", "experiment_ids": ["$experiment"], "tags": '{"a": "b"}'},
            keep={"dataset_id": "dataset.dataset_id"},
        ),
        call("GET", f"{V3}/datasets/{{dataset_id}}"),
        call("GET", f"{V3}/datasets/search", {"experiment_ids": "$experiment"}),
        call("POST", f"{V3}/datasets/search", {"experiment_ids": ["$experiment"], "max_results": 2}),
        call("PATCH", f"{V3}/datasets/{{dataset_id}}/tags", {"tags": '{"c": "d"}'}),
        call("DELETE", f"{V3}/datasets/{{dataset_id}}/tags/{{key}}", path={"key": "c"}),
        call(
            "POST",
            f"{V3}/datasets/{{dataset_id}}/records",
            {"records": '[{"inputs": {"q": "größe?"}, "expectations": {"a": "42"}}]'},
        ),
        call("GET", f"{V3}/datasets/{{dataset_id}}/records", {"max_results": 5}),
        call("GET", f"{V3}/datasets/{{dataset_id}}/experiment-ids"),
        call("POST", f"{V3}/datasets/{{dataset_id}}/remove-experiments", {"experiment_ids": ["$experiment"]}),
        call("POST", f"{V3}/datasets/{{dataset_id}}/add-experiments", {"experiment_ids": ["$experiment"]}),
        call("DELETE", f"{V3}/datasets/{{dataset_id}}/records", {"dataset_record_ids": ["none"]}),
        call("DELETE", f"{V3}/datasets/{{dataset_id}}"),
    ],
    "scorers": [
        EXPERIMENT,
        TRACE,
        call(
            "POST",
            f"{V3}/scorers/register",
            {"experiment_id": "$experiment", "name": "polite", "serialized_scorer": SCORER},
            keep={"scorer": "scorer_id"},
        ),
        call("GET", f"{V3}/scorers/list", {"experiment_id": "$experiment"}),
        call("GET", f"{V3}/scorers/versions", {"experiment_id": "$experiment", "name": "polite"}),
        call("GET", f"{V3}/scorers/get", {"experiment_id": "$experiment", "name": "polite", "version": 1}),
        call("GET", f"{V3}/scorers/online-configs", {"scorer_ids": "$scorer"}),
        call(
            "PUT",
            f"{V3}/scorers/online-config",
            {"experiment_id": "$experiment", "name": "polite", "sample_rate": 0},
        ),
        call(
            "POST",
            f"{AJAX3}/scorer/invoke",
            {"experiment_id": "$experiment", "serialized_scorer": SCORER, "trace_ids": ["$trace"]},
            expect=500,
            why=NO_JOBS,
        ),
        call(
            "POST",
            f"{AJAX3}/genai/evaluate/invoke",
            {"experiment_id": "$experiment", "serialized_scorers": [SCORER], "trace_ids": ["$trace"]},
            expect=500,
            why=NO_JOBS,
        ),
        call("DELETE", f"{V3}/scorers/delete", {"experiment_id": "$experiment", "name": "polite"}),
    ],
    "issues": [
        EXPERIMENT,
        TRACE,
        call(
            "POST",
            f"{V3}/issues",
            {"experiment_id": "$experiment", "name": "slow", "description": "zu langsam", "status": "pending"},
            keep={"issue_id": "issue.issue_id"},
        ),
        call("GET", f"{V3}/issues/{{issue_id}}"),
        call("PATCH", f"{V3}/issues/{{issue_id}}", {"issue_id": "$issue_id", "name": "slower"}),
        call("POST", f"{V3}/issues/search", {"experiment_id": "$experiment", "max_results": 5}),
        call(
            "POST",
            f"{AJAX3}/issues/invoke",
            {
                "experiment_id": "$experiment",
                "trace_ids": ["$trace"],
                "categories": ["latency"],
                "provider": "openai",
                "model": "gpt",
                "secret_id": "none",
            },
            expect=404,
            why="there is no such secret",
        ),
    ],
    "labels and reviews": [
        EXPERIMENT,
        TRACE,
        call(
            "POST",
            f"{V3}/label-schemas/create",
            {
                "experiment_id": "$experiment",
                "name": "quality",
                "type": "FEEDBACK",
                "input": {"categorical": {"options": ["gut", "schlecht"], "multi_select": False}},
                "instruction": "Urteile!",
            },
            keep={"schema": "label_schema.schema_id"},
        ),
        call("GET", f"{V3}/label-schemas/get", {"schema_id": "$schema"}),
        call("GET", f"{V3}/label-schemas/get-by-name", {"experiment_id": "$experiment", "name": "quality"}),
        call("GET", f"{V3}/label-schemas/list", {"experiment_id": "$experiment"}),
        call("PATCH", f"{V3}/label-schemas/update", {"schema_id": "$schema", "instruction": "Urteile milde!"}),
        call(
            "POST",
            f"{V3}/review-queues/create",
            {
                "experiment_id": "$experiment",
                "name": "queue",
                "queue_type": "CUSTOM",
                "users": ["zoë"],
                "schema_ids": ["$schema"],
            },
            keep={"queue": "review_queue.queue_id"},
        ),
        call("POST", f"{V3}/review-queues/get-or-create-user", {"experiment_id": "$experiment", "user": "zoë"}),
        call("GET", f"{V3}/review-queues/get", {"queue_id": "$queue"}),
        call("GET", f"{V3}/review-queues/get-by-name", {"experiment_id": "$experiment", "name": "queue"}),
        call("GET", f"{V3}/review-queues/list", {"experiment_id": "$experiment"}),
        call("POST", f"{V3}/review-queues/update", {"queue_id": "$queue", "name": "queue 2"}),
        call(
            "POST",
            f"{V3}/review-queues/items/add",
            {"queue_id": "$queue", "item_type": "TRACE", "item_ids": ["$trace"]},
        ),
        call("GET", f"{V3}/review-queues/items/list", {"queue_id": "$queue"}),
        call(
            "POST",
            f"{V3}/review-queues/items/set-status",
            {"queue_id": "$queue", "item_id": "$trace", "status": "COMPLETE", "completed_by": "zoë"},
        ),
        call("POST", f"{V3}/review-queues/items/remove", {"queue_id": "$queue", "item_ids": ["$trace"]}),
        call("POST", f"{V3}/review-queues/delete", {"queue_id": "$queue"}),
        call("DELETE", f"{V3}/label-schemas/delete", {"schema_id": "$schema"}),
    ],
    "webhooks": [
        call(
            "POST",
            f"{V2}/webhooks",
            {
                "name": "hook-$lane",
                "url": "https://[4000::1]/$lane",  # public, and nobody's: RFC 4291 leaves 4000::/3 unassigned
                "events": [{"entity": "REGISTERED_MODEL", "action": "CREATED"}],
                "status": "DISABLED",
            },
            keep={"webhook_id": "webhook.webhook_id"},
        ),
        call("GET", f"{V2}/webhooks", {"max_results": 50}),
        call("GET", f"{V2}/webhooks/{{webhook_id}}"),
        call("PATCH", f"{V2}/webhooks/{{webhook_id}}", {"description": "übung"}),
        call("DELETE", f"{V2}/webhooks/{{webhook_id}}"),
        call("POST", f"{V2}/webhooks/{{webhook_id}}/test", {}, expect=404, why="it was deleted: nobody is called"),
    ],
    "workspaces": [
        call("POST", f"{V3}/workspaces", {"name": "ws-$lane", "description": "d"}, expect=201, **NO_WORKSPACES),
        call("GET", f"{V3}/workspaces", **NO_WORKSPACES),
        call("GET", f"{V3}/workspaces/{{workspace_name}}", path=WORKSPACE, **NO_WORKSPACES),
        call("PATCH", f"{V3}/workspaces/{{workspace_name}}", {"description": "e"}, path=WORKSPACE, **NO_WORKSPACES),
        call("DELETE", f"{V3}/workspaces/{{workspace_name}}", path=WORKSPACE, expect=204, **NO_WORKSPACES),
    ],
    "gateway resources": [
        EXPERIMENT,
        call(
            "POST",
            f"{V3}/gateway/secrets/create",
            {
                "secret_name": "key $lane",
                "secret_value": [{"key": "api_key", "value": "sk-not-a-key"}],
                "provider": "openai",
            },
            keep={"secret": "secret.secret_id"},
        ),
        call("GET", f"{V3}/gateway/secrets/get", {"secret_id": "$secret"}),
        call("GET", f"{V3}/gateway/secrets/list", {"provider": "openai"}),
        call(
            "POST",
            f"{V3}/gateway/secrets/update",
            {"secret_id": "$secret", "secret_value": [{"key": "api_key", "value": "sk-still-none"}]},
        ),
        call("GET", f"{AJAX3}/gateway/secrets/config"),
        call("GET", f"{AJAX3}/gateway/supported-providers"),
        call("GET", f"{AJAX3}/gateway/supported-models", {"provider": "openai"}),
        call("GET", f"{AJAX3}/gateway/provider-config", {"provider": "openai"}),
        call(
            "POST",
            f"{V3}/gateway/model-definitions/create",
            {"name": "model $lane", "secret_id": "$secret", "provider": "openai", "model_name": "gpt-4o"},
            keep={"definition": "model_definition.model_definition_id"},
        ),
        call(
            "POST",
            f"{V3}/gateway/model-definitions/create",
            {"name": "second $lane", "secret_id": "$secret", "provider": "openai", "model_name": "gpt-4o-mini"},
            keep={"second": "model_definition.model_definition_id"},
        ),
        call("GET", f"{V3}/gateway/model-definitions/get", {"model_definition_id": "$definition"}),
        call("GET", f"{V3}/gateway/model-definitions/list", {"secret_id": "$secret"}),
        call(
            "POST",
            f"{V3}/gateway/model-definitions/update",
            {"model_definition_id": "$definition", "model_name": "gpt-4.1"},
        ),
        call(
            "POST",
            f"{V3}/gateway/endpoints/create",
            {
                "name": "chat-$lane",
                "model_configs": [{"model_definition_id": "$definition", "linkage_type": "PRIMARY", "weight": 1.0}],
                "experiment_id": "$experiment",
                "usage_tracking": False,
            },
            keep={"endpoint": "endpoint.endpoint_id"},
        ),
        call("GET", f"{V3}/gateway/endpoints/get", {"endpoint_id": "$endpoint"}),
        call("GET", f"{V3}/gateway/endpoints/list", {"secret_id": "$secret"}),
        call("POST", f"{V3}/gateway/endpoints/update", {"endpoint_id": "$endpoint", "name": "talk-$lane"}),
        call(
            "POST",
            f"{V3}/gateway/endpoints/models/attach",
            {
                "endpoint_id": "$endpoint",
                "model_config": {"model_definition_id": "$second", "linkage_type": "PRIMARY", "weight": 1.0},
            },
        ),
        call(
            "POST",
            f"{V3}/gateway/endpoints/models/detach",
            {"endpoint_id": "$endpoint", "model_definition_id": "$second"},
        ),
        call("POST", f"{V3}/gateway/endpoints/set-tag", {"endpoint_id": "$endpoint", "key": "k", "value": "v"}),
        call("DELETE", f"{V3}/gateway/endpoints/delete-tag", {"endpoint_id": "$endpoint", "key": "k"}),
        call(
            "POST",
            f"{V3}/gateway/endpoints/bindings/create",
            {"endpoint_id": "$endpoint", "resource_type": "scorer", "resource_id": "r"},
        ),
        call("GET", f"{V3}/gateway/endpoints/bindings/list", {"endpoint_id": "$endpoint"}),
        call(
            "DELETE",
            f"{V3}/gateway/endpoints/bindings/delete",
            {"endpoint_id": "$endpoint", "resource_type": "scorer", "resource_id": "r"},
        ),
        call(
            "POST",
            f"{V3}/scorers/register",
            {"experiment_id": "$experiment", "name": "polite", "serialized_scorer": SCORER},
            keep={"scorer": "scorer_id"},
        ),
        call(
            "POST",
            f"{V3}/gateway/guardrails/create",
            {
                "name": "guard $lane",
                "scorer_id": "$scorer",
                "scorer_version": 1,
                "stage": "BEFORE",
                "action": "VALIDATION",
            },
            keep={"guardrail": "guardrail.guardrail_id"},
        ),
        call("GET", f"{V3}/gateway/guardrails/get", {"guardrail_id": "$guardrail"}),
        call("GET", f"{V3}/gateway/guardrails/list"),
        call(
            "POST",
            f"{V3}/gateway/guardrails/add-to-endpoint",
            {"endpoint_id": "$endpoint", "guardrail_id": "$guardrail", "execution_order": 1},
        ),
        call("GET", f"{V3}/gateway/guardrails/list-for-endpoint", {"endpoint_id": "$endpoint"}),
        call(
            "PATCH",
            f"{V3}/gateway/guardrails/update-config",
            {"endpoint_id": "$endpoint", "guardrail_id": "$guardrail", "execution_order": 2},
        ),
        call(
            "DELETE",
            f"{V3}/gateway/guardrails/remove-from-endpoint",
            {"endpoint_id": "$endpoint", "guardrail_id": "$guardrail"},
        ),
        call("DELETE", f"{V3}/gateway/guardrails/delete", {"guardrail_id": "$guardrail"}),
        call("DELETE", f"{V3}/gateway/endpoints/delete", {"endpoint_id": "$endpoint"}),
        call("DELETE", f"{V3}/gateway/model-definitions/delete", {"model_definition_id": "$definition"}),
        call("DELETE", f"{V3}/gateway/model-definitions/delete", {"model_definition_id": "$second"}),
        call("DELETE", f"{V3}/gateway/secrets/delete", {"secret_id": "$secret"}),
        call(
            "POST",
            f"{V3}/gateway/budgets/create",
            {
                "budget_unit": "USD",
                "budget_amount": 12.5,
                "duration": {"unit": "DAYS", "value": 1},
                "target_scope": "GLOBAL",
                "budget_action": "ALERT",
            },
            keep={"budget": "budget_policy.budget_policy_id"},
        ),
        call("GET", f"{V3}/gateway/budgets/get", {"budget_policy_id": "$budget"}),
        call("GET", f"{V3}/gateway/budgets/list"),
        call("GET", f"{V3}/gateway/budgets/windows"),
        call("POST", f"{V3}/gateway/budgets/update", {"budget_policy_id": "$budget", "budget_amount": 13}),
        call("DELETE", f"{V3}/gateway/budgets/delete", {"budget_policy_id": "$budget"}),
        call("GET", f"{AJAX2}/gateway-proxy", {"gateway_path": "api/2.0/endpoints/"}),
        call("POST", f"{AJAX2}/gateway-proxy", {"gateway_path": "gateway/chat/invocations", "json_data": {}}),
    ],
    "gateway": [
        call("GET", "/gateway/mlflow/v1/models"),
        *(
            call("POST", f"/gateway/{rule}", data, path=path, expect=404, why="there is no endpoint of this name")
            for rule, data, path in (
                ("{endpoint_name}/mlflow/invocations", {"messages": [{"role": "user", "content": "hi"}]}, _ENDPOINT),
                ("mlflow/v1/chat/completions", _CHAT, {}),
                ("openai/v1/chat/completions", _CHAT, {}),
                ("openai/v1/embeddings", {"model": "none", "input": "hi"}, {}),
                ("typesafe/v1/systemone", _CHAT, {}),
                ("openai/v1/responses", {"model": "none", "input": "hi"}, {}),
                ("openai/v1/responses/compact", {"model": "none", "input": "hi"}, {}),
                ("anthropic/v1/messages", {**_CHAT, "max_tokens": 5}, {}),
                ("gemini/v1beta/models/{endpoint_name}:generateContent", {"contents": []}, _ENDPOINT),
                ("gemini/v1beta/models/{endpoint_name}:streamGenerateContent", {"contents": []}, _ENDPOINT),
                ("proxy/{endpoint_name}/{path}", {"any": "thing"}, {**_ENDPOINT, "path": "v1/any/thing"}),
            )
        ),
    ],
    "prompt optimization": [
        EXPERIMENT,
        call(
            "POST",
            f"{V3}/prompt-optimization/jobs",
            {
                "experiment_id": "$experiment",
                "source_prompt_uri": "prompts:/p/1",
                "config": {"optimizer_type": "OPTIMIZER_TYPE_GEPA", "dataset_id": "d", "scorers": ["polite"]},
            },
            expect=404,
            why="there is no such prompt",
        ),
        call("GET", f"{V3}/prompt-optimization/jobs/search", {"experiment_id": "$experiment"}),
        call("POST", f"{V3}/prompt-optimization/jobs/search", {"experiment_id": "$experiment"}),
        *(
            call(method, f"{V3}/prompt-optimization/jobs/{rule}", path={"job_id": "none"}, expect=404, why=NO_JOBS)
            for method, rule in (("GET", "{job_id}"), ("POST", "{job_id}/cancel"), ("DELETE", "{job_id}"))
        ),
    ],
    "jobs": [
        call("GET", "/ajax-api/3.0/jobs/{job_id}", path={"job_id": "none"}, expect=404, why=NO_JOBS),
        call(
            "POST",
            "/ajax-api/3.0/jobs/",
            {"job_name": "none", "params": {}},
            expect=400,
            why="there is no job of this name",
        ),
        call("PATCH", "/ajax-api/3.0/jobs/cancel/{job_id}", path={"job_id": "none"}, expect=404, why=NO_JOBS),
        call("POST", "/ajax-api/3.0/jobs/search", {}),
        call("GET", f"{AJAX3}/jobs/{{job_id}}", path={"job_id": "none"}, expect=404, why=NO_JOBS),
        call("PATCH", f"{AJAX3}/jobs/cancel/{{job_id}}", path={"job_id": "none"}, expect=404, why=NO_JOBS),
    ],
    "assistant": [
        *(
            call(method, f"{AJAX3}/assistant/{rule}", data, path=_ASSISTANT, expect=expect, why=why)
            for method, rule, data, expect, why in (
                ("POST", "message", {"message": "hi"}, 403, REMOTE),
                ("GET", "sessions/{session_id}/stream", None, 403, REMOTE),
                ("PATCH", "sessions/{session_id}", {"status": "cancelled"}, 403, REMOTE),
                ("POST", "sessions/{session_id}/permission", {"request_id": "1", "decision": "allow"}, 403, REMOTE),
                ("POST", "sessions/{session_id}/tool-result", {"tool_call_id": "1", "result": "r"}, 403, REMOTE),
                ("GET", "providers/{provider}/health", None, 403, REMOTE),
                ("GET", "providers", None, 200, ""),
                ("GET", "config", None, 200, ""),
                ("PUT", "config", {}, 403, REMOTE),
                ("POST", "skills/install", {"type": "global"}, 403, REMOTE),
                ("GET", "providers/{provider}/models", None, 403, REMOTE),
            )
        ),
    ],
    "mcp servers": [
        call("POST", f"{V3}/mcp-servers", {"name": _MCP, "description": "wetter"}),
        call("GET", f"{V3}/mcp-servers", {"max_results": 50}),
        call("GET", f"{V3}/mcp-servers/{{name}}", path=_MCP_PATH),
        call("PATCH", f"{V3}/mcp-servers/{{name}}", {"display_name": "Wetter 🌦"}, path=_MCP_PATH),
        call("POST", f"{V3}/mcp-servers/{{name}}/tags", {"key": "k/ey", "value": "v"}, path=_MCP_PATH),
        call("DELETE", f"{V3}/mcp-servers/{{name}}/tags/{{key}}", path={**_MCP_PATH, "key": "k/ey"}),
        call(
            "POST",
            f"{V3}/mcp-servers/{{name}}/versions",
            {
                "server_json": {
                    "name": _MCP,
                    "version": "1.0.0",
                    "description": "d",
                    "remotes": [{"type": "streamable-http", "url": "https://mcp.invalid/"}],
                },
                "status": "active",
            },
            path=_MCP_PATH,
        ),
        call("GET", f"{V3}/mcp-servers/{{name}}/versions", path=_MCP_PATH),
        call("GET", f"{V3}/mcp-servers/{{name}}/versions/{{version}}", path=_MCP_VERSION),
        call("PATCH", f"{V3}/mcp-servers/{{name}}/versions/{{version}}", {"status": "deprecated"}, path=_MCP_VERSION),
        call(
            "POST",
            f"{V3}/mcp-servers/{{name}}/versions/{{version}}/tags",
            {"key": "k", "value": "v"},
            path=_MCP_VERSION,
        ),
        call(
            "DELETE", f"{V3}/mcp-servers/{{name}}/versions/{{version}}/tags/{{key}}", path={**_MCP_VERSION, "key": "k"}
        ),
        call("POST", f"{V3}/mcp-servers/{{name}}/aliases", {"alias": "best", "version": "1.0.0"}, path=_MCP_PATH),
        call("GET", f"{V3}/mcp-servers/{{name}}/aliases/{{alias}}", path={**_MCP_PATH, "alias": "best"}),
        call(
            "POST",
            f"{V3}/mcp-servers/{{name}}/endpoints",
            {"url": "https://mcp.invalid/$lane", "server_version": "1.0.0"},
            path=_MCP_PATH,
            keep={"endpoint_id": "id"},
        ),
        call("GET", f"{V3}/mcp-servers/endpoints"),
        call("GET", f"{V3}/mcp-servers/{{name}}/endpoints", path=_MCP_PATH),
        call("GET", f"{V3}/mcp-servers/{{name}}/endpoints/{{endpoint_id}}", path=_MCP_PATH),
        call(
            "PATCH",
            f"{V3}/mcp-servers/{{name}}/endpoints/{{endpoint_id}}",
            {"url": "https://mcp2.invalid/$lane"},
            path=_MCP_PATH,
        ),
        call("DELETE", f"{V3}/mcp-servers/{{name}}/endpoints/{{endpoint_id}}", path=_MCP_PATH),
        call("DELETE", f"{V3}/mcp-servers/{{name}}/aliases/{{alias}}", path={**_MCP_PATH, "alias": "best"}),
        call("DELETE", f"{V3}/mcp-servers/{{name}}/versions/{{version}}", path=_MCP_VERSION),
        call("DELETE", f"{V3}/mcp-servers/{{name}}", path=_MCP_PATH),
    ],
    "demo": [
        call(
            "POST",
            f"{AJAX3}/demo/generate",
            {"features": ["prompts"]},
            before=call("POST", f"{AJAX3}/demo/delete", {}),
        ),
        call(
            "POST",
            f"{AJAX3}/demo/delete",
            {},
            before=call("POST", f"{AJAX3}/demo/generate", {"features": ["prompts"]}),
        ),
    ],
    "ui and service": [
        call("GET", "/"),
        call("GET", "/health"),
        call("GET", "/version"),
        call("GET", f"{V3}/server-info"),
        call("GET", f"{AJAX3}/ui-telemetry"),
        call("POST", f"{AJAX3}/ui-telemetry", {"records": []}),
        call("GET", "/static-files/{path}", path={"path": "manifest.json"}),
        call("GET", "/build/{filename}", path={"filename": "manifest.json"}),
        EXPERIMENT,
        RUN,
        call(
            "POST", "/graphql", {"query": 'query { mlflowGetRun(input: {runId: "$run"}) { run { info { runName } } } }'}
        ),
        call("GET", "/graphql", {"query": "query { __typename }"}, expect=500, why="MLflow reads the body only"),
    ],
}
