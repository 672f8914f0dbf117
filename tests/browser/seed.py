"""An experiment worth looking at, logged through the proxy with plain HTTP: runs with curves, traces, a model."""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass
from typing import Any

import requests

STEPS = 40
# learning rate and depth of each run
RUNS = {
    "steady-heron": (0.05, 4),
    "quick-otter": (0.2, 6),
    "patient-lynx": (0.01, 8),
    "bold-falcon": (0.4, 5),
    "quiet-marten": (0.1, 6),
}
_MLMODEL = """artifact_path: model
flavors:
  python_function:
    loader_module: mlflow.sklearn
    python_version: 3.11.9
mlflow_version: 3.17.2
signature:
  inputs: '[{"name": "calls", "type": "long", "required": true}]'
  outputs: '[{"name": "leaves", "type": "boolean", "required": true}]'
"""
QUESTION = "Which customers are likely to leave?"


@dataclass(frozen=True)
class Seeded:
    """What was logged, under which names."""

    base: str
    experiment: str
    experiment_id: str
    runs: dict[str, str]  # name → id
    trace_id: str
    model: str
    workspace: str  # "" where MLflow has none

    def page(self, fragment: str) -> str:
        """The address of a page of the UI; without its workspace in it, an App's UI would ask for one first."""
        if not self.workspace:
            return f"{self.base}/#{fragment}"
        return f"{self.base}/#{fragment}{'&' if '?' in fragment else '?'}workspace={self.workspace}"

    def run(self, run_id: str) -> dict[str, Any]:
        """A run as the API has it now, through the proxy."""
        answer = requests.get(f"{self.base}/api/2.0/mlflow/runs/get", {"run_id": run_id}, timeout=30)
        answer.raise_for_status()
        run: dict[str, Any] = answer.json()["run"]
        return run


def seed(base: str, label: str = "customer churn") -> Seeded:
    """Log everything to the target at `base`, the proxy's URL with or without `/t/<name>`."""

    def call(path: str, body: dict[str, Any]) -> Any:
        answer = requests.post(f"{base}/api/2.0/mlflow/{path}", json=body, timeout=60)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    experiment_id = call("experiments/create", {"name": label})["experiment_id"]
    now = int(time.time() * 1000)
    runs = {}
    for number, (name, (rate, depth)) in enumerate(RUNS.items()):
        begun = now - (len(RUNS) - number) * 900_000
        run = {"experiment_id": experiment_id, "run_name": name, "start_time": begun}
        info = call("runs/create", run)["run"]["info"]
        run_id = runs[name] = info["run_id"]
        batch = {
            "run_id": run_id,
            "params": [{"key": "learning_rate", "value": str(rate)}, {"key": "depth", "value": str(depth)}],
            "tags": [{"key": "team", "value": "retention"}],
            "metrics": _curves(rate, depth, begun),
        }
        call("runs/log-batch", batch)
        call("runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": begun + 420_000})
    trace_id = _trace(base, experiment_id)
    best, root = run_id, info["artifact_uri"]  # the last one's
    put = call("artifacts/presigned-upload-url", {"run_id": best, "path": "model/MLmodel"})
    stored = requests.put(put["presigned_url"], _MLMODEL, headers=put.get("headers"), timeout=30)
    assert stored.status_code == 200, stored.text
    model = f"{label} model"
    call("registered-models/create", {"name": model, "description": "Logged through the proxy"})
    call("model-versions/create", {"name": model, "source": f"{root}/model", "run_id": best})
    call("registered-models/alias", {"name": model, "alias": "champion", "version": "1"})
    has_workspaces = requests.get(f"{base}/api/3.0/mlflow/server-info", timeout=30).json()["workspaces_enabled"]
    return Seeded(base, label, experiment_id, runs, trace_id, model, "default" if has_workspaces else "")


def _curves(rate: float, depth: int, begun: int) -> list[dict[str, Any]]:
    """Loss and accuracy, one point a step."""
    points = []
    for step in range(STEPS):
        ripple = 0.03 * math.sin(step * 1.3 + depth)
        fallen = math.exp(-rate * step)
        values = {"loss": 0.15 + 0.85 * fallen + ripple * fallen, "accuracy": 0.93 - 0.4 * fallen - 0.02 * ripple}
        when = begun + step * 10_000
        points += [{"key": key, "value": value, "timestamp": when, "step": step} for key, value in values.items()]
    return points


def _trace(base: str, experiment_id: str) -> str:
    """A trace of three spans as OTLP/JSON. Returns MLflow's id of it."""
    trace_id, root = secrets.token_hex(16), secrets.token_hex(8)
    end = time.time_ns()

    def span(name: str, kind: str, begin_ms: int, end_ms: int, **more: Any) -> dict[str, Any]:
        attributes = {
            "mlflow.spanType": f'"{kind}"',
            "mlflow.spanInputs": f'{{"question": "{QUESTION}"}}',
            "mlflow.spanOutputs": '{"answer": "Those who called support twice."}',
        }
        return {
            "traceId": trace_id,
            "spanId": secrets.token_hex(8),
            "name": name,
            "kind": 1,
            "startTimeUnixNano": str(end - 1_000_000 * (1000 - begin_ms)),
            "endTimeUnixNano": str(end - 1_000_000 * (1000 - end_ms)),
            "attributes": [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()],
            "status": {"code": 1},
            **more,
        }

    spans = [
        span("answer", "CHAIN", 0, 900, spanId=root),
        span("retrieve", "RETRIEVER", 20, 300, parentSpanId=root),
        span("complete", "LLM", 310, 880, parentSpanId=root),
    ]
    answer = requests.post(
        f"{base}/v1/traces",
        json={"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {"name": "seed"}, "spans": spans}]}]},
        headers={"x-mlflow-experiment-id": experiment_id},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return f"tr-{trace_id}"
