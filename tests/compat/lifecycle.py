"""The lifecycle of an MLflow client's things, by MLflow's own client and nothing else.

Run by the tests in an environment without AWS: `MLFLOW_TRACKING_URI` is a proxy, the first argument the version of the
MLflow server behind it. Prints JSON: what each part found, and which parts were left out and why. It runs with every
client from 2.16 on, so it uses what they all have; parts that came later say since when.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Any, Callable, NamedTuple  # noqa: UP035  # 3.9's typing would do

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType

SCRIPTS = {
    "latin": "größe naïve Ærøskøbing",
    "cyrillic": "модель",
    "greek": "μοντέλο",
    "arabic": "نموذج",
    "hebrew": "מודל",
    "devanagari": "प्रतिरूप",
    "thai": "แบบจำลอง",
    "chinese": "模型",
    "japanese": "モデル",
    "korean": "모델",
    "emoji": "🚀👩🏽‍🔬🇪🇺",
    "combining": "e\u0301",
    "signs": "50% + a&b=c; #1 ~ 'x' \"y\" \\z",
}

client = MlflowClient()
SERVER = tuple(int(part) for part in sys.argv[1].split(".")[:2])
CLIENT = tuple(int(part) for part in mlflow.__version__.split(".")[:2])
WORD = uuid.uuid4().hex[:8]


class Part(NamedTuple):
    """One part of the lifecycle, and the first versions of client and server that have it."""

    run: Callable[[], Any]
    client: tuple[int, int] = (2, 0)
    server: tuple[int, int] = (2, 0)


def new_experiment(name: str) -> str:
    return str(client.create_experiment(f"{name} {WORD}"))


def pages(search: Callable[[Any], Any]) -> list[list[Any]]:
    """All pages of a search."""
    found, token = [], None
    while True:
        page = search(token)
        found.append(list(page))
        token = page.token
        if not token:
            return found


def experiments() -> Any:
    ids = [new_experiment(f"paged {n}") for n in range(5)]
    named = new_experiment("it's")
    client.rename_experiment(named, f'it\'s "renamed" {WORD}')
    client.set_experiment_tag(named, "owner", "O'Neil")
    got = client.get_experiment(named)
    by_name = client.get_experiment_by_name(f'it\'s "renamed" {WORD}')
    client.delete_experiment(named)
    deleted = client.get_experiment(named).lifecycle_stage
    in_bin = [e.experiment_id for e in client.search_experiments(view_type=ViewType.DELETED_ONLY)]
    client.restore_experiment(named)
    found = pages(
        lambda token: client.search_experiments(
            filter_string=f"name LIKE 'paged % {WORD}'", max_results=2, order_by=["name ASC"], page_token=token
        )
    )
    tagged = client.search_experiments(filter_string='tags.owner = "O\'Neil"')
    return {
        "renamed": got.name == f'it\'s "renamed" {WORD}',
        "by name": by_name.experiment_id == named,
        "tag": got.tags["owner"],
        "deleted": deleted,
        "in bin": named in in_bin,
        "restored": client.get_experiment(named).lifecycle_stage,
        "pages": [len(page) for page in found],
        "paged": [e.experiment_id for page in found for e in page] == ids,
        "quoted": named in [e.experiment_id for e in tagged],
        "missing": client.get_experiment_by_name(f"none {WORD}") is None,
    }


def runs() -> Any:
    experiment = new_experiment("runs")
    with mlflow.start_run(experiment_id=experiment, run_name="parent") as parent:
        mlflow.log_param("rate", 0.1)
        mlflow.log_params({"depth": 4, "näme": "wért"})
        mlflow.log_metric("loss", 0.5, step=1)
        mlflow.log_metrics({"loss": 0.25, "acc": 0.75}, step=2)
        mlflow.set_tags({"team": "it's ours"})
        with mlflow.start_run(experiment_id=experiment, run_name="child", nested=True) as child:
            mlflow.log_metric("loss", 1)
    got = client.get_run(parent.info.run_id)
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    client.set_tag(parent.info.run_id, "gone", "soon")
    client.delete_tag(parent.info.run_id, "gone")
    client.update_run(child.info.run_id, status="FAILED", name="renamed child")
    client.delete_run(child.info.run_id)
    deleted = client.get_run(child.info.run_id).info.lifecycle_stage
    client.restore_run(child.info.run_id)
    restored = client.get_run(child.info.run_id)
    return {
        "params": dict(got.data.params),
        "metrics": dict(got.data.metrics),
        "history": [(m.step, m.value) for m in client.get_metric_history(parent.info.run_id, "loss")],
        "tag": got.data.tags["team"],
        "status": got.info.status,
        "children": [run.info.run_id for run in children] == [child.info.run_id],
        "deleted": deleted,
        "restored": [restored.info.lifecycle_stage, restored.info.status, restored.info.run_name],
        "tag gone": "gone" not in client.get_run(parent.info.run_id).data.tags,
    }


def batch() -> Any:
    run = client.create_run(new_experiment("batch")).info.run_id
    now = int(time.time() * 1000)
    client.log_batch(
        run,
        metrics=[Metric(f"m{n % 10}", n / 7, now + n, n) for n in range(1000)],
        params=[],
        tags=[],
    )
    client.log_batch(
        run,
        metrics=[],
        params=[Param(f"p{n}", str(n)) for n in range(100)],
        tags=[RunTag(f"t{n}", str(n)) for n in range(100)],
    )
    client.set_terminated(run)
    got = client.get_run(run)
    history = [client.get_metric_history(run, f"m{n}") for n in range(10)]
    return {
        "metrics": sum(len(each) for each in history),
        "last": got.data.metrics["m9"] == 999 / 7,
        "params": len(got.data.params),
        "tags": len([tag for tag in got.data.tags if tag.startswith("t")]),
    }


def run_search() -> Any:
    experiment = new_experiment("search")
    for n in range(7):
        run = client.create_run(experiment, run_name=f"run {n}", tags={"kind": "O'Neil" if n % 2 else "größe 🙂"})
        client.log_metric(run.info.run_id, "score", n)
        client.log_param(run.info.run_id, "note", f'a "{n}"')
    found = pages(
        lambda token: client.search_runs(
            [experiment], "metrics.score >= 1", max_results=4, order_by=["metrics.score DESC"], page_token=token
        )
    )
    return {
        "pages": [len(page) for page in found],
        "order": [run.data.metrics["score"] for page in found for run in page],
        "quote": len(client.search_runs([experiment], 'tags.kind = "O\'Neil"')),
        "unicode": len(client.search_runs([experiment], "tags.kind = 'größe 🙂'")),
        "like": len(client.search_runs([experiment], "params.note LIKE '%\"3\"'")),
        "name": len(client.search_runs([experiment], "attributes.run_name = 'run 5'")),
        "none": len(client.search_runs([experiment], "metrics.score > 100")),
    }


def scripts() -> Any:
    same = {}
    for script, text in SCRIPTS.items():
        name = f"{text} {WORD}"
        experiment = client.create_experiment(name, tags={"text": text})
        run = client.create_run(experiment, run_name=text, tags={"text": text})
        client.log_param(run.info.run_id, "text", text)
        back = client.get_run(run.info.run_id)
        by_name = client.get_experiment_by_name(name)
        same[script] = (
            by_name.experiment_id == experiment
            and by_name.name == name
            and by_name.tags["text"] == text
            and back.data.tags["text"] == back.data.params["text"] == back.info.run_name == text
        )
    return same


def datasets() -> Any:
    experiment = new_experiment("datasets")
    run = client.create_run(experiment).info.run_id
    dataset = Dataset(name="iris 🌸", digest="ab12", source_type="http", source='{"url": "https://data.invalid/a b"}')
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    inputs = client.get_run(run).inputs.dataset_inputs
    return {
        "names": [each.dataset.name for each in inputs],
        "tags": [tag.value for each in inputs for tag in each.tags],
        "found": len(client.search_runs([experiment], "dataset.name = 'iris 🌸'")),
    }


def ask(method: str, route: str, **data: Any) -> Any:
    """A call that MLflow's client has no function for."""
    where = "params" if method == "GET" else "json"
    answer = mlflow.utils.rest_utils.http_request(
        mlflow.utils.credentials.get_default_host_creds(mlflow.get_tracking_uri()),
        f"/api/2.0/mlflow/{route}",
        method,
        **{where: data},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def artifacts() -> Any:
    """Listing goes through the server; up- and download would need AWS credentials here."""
    run = client.create_run(new_experiment("artifacts"))
    listed = ask("GET", "artifacts/list", run_id=run.info.run_id)
    return {
        "files": listed.get("files", []),
        "on s3": listed["root_uri"] == run.info.artifact_uri and run.info.artifact_uri.startswith("s3://"),
    }


def registry() -> Any:
    name = f"модель {WORD}"
    run = client.create_run(new_experiment("registry"))
    client.create_registered_model(name, tags={"team": "größe"}, description="it's “new”")
    source = f"{run.info.artifact_uri}/model"
    versions = [client.create_model_version(name, source, run.info.run_id) for _ in range(3)]
    client.set_registered_model_tag(name, "gone", "soon")
    client.delete_registered_model_tag(name, "gone")
    client.update_registered_model(name, "now old")
    client.set_model_version_tag(name, "1", "quality", "gut 👍")
    client.set_model_version_tag(name, "1", "gone", "soon")
    client.delete_model_version_tag(name, "1", "gone")
    client.update_model_version(name, "1", "first")
    client.set_registered_model_alias(name, "champion", "2")
    by_alias = client.get_model_version_by_alias(name, "champion").version
    client.delete_registered_model_alias(name, "champion")
    client.transition_model_version_stage(name, "3", "Production")
    latest = client.get_latest_versions(name, ["Production"])
    for n in range(4):
        client.create_registered_model(f"paged {n} {WORD}")
    found = pages(
        lambda token: client.search_registered_models(
            f"name LIKE 'paged % {WORD}'", max_results=3, order_by=["name ASC"], page_token=token
        )
    )
    first = client.get_model_version(name, "1")
    download = client.get_model_version_download_uri(name, "1")
    client.delete_model_version(name, "2")
    model = client.get_registered_model(name)
    left = client.search_model_versions(f"name = '{name}'")
    client.rename_registered_model(name, f"renamed {WORD}")
    renamed = client.get_registered_model(f"renamed {WORD}").name
    client.delete_registered_model(f"renamed {WORD}")
    return {
        "versions": [str(version.version) for version in versions],
        "alias": str(by_alias),
        "stage": [(str(version.version), version.current_stage) for version in latest],
        "description": [model.description, first.description],
        "tags": [dict(model.tags), dict(first.tags)],
        "download": download == source,
        "pages": [len(page) for page in found],
        "left": sorted(str(version.version) for version in left),
        "renamed": renamed == f"renamed {WORD}",
        "gone": len(client.search_registered_models(f"name = 'renamed {WORD}'")),
    }


def trace_infos() -> Any:
    """What the tracking server keeps of traces in every version: all but the spans."""
    experiment = new_experiment("trace infos")
    begun = ask(
        "POST",
        "traces",
        experiment_id=experiment,
        timestamp_ms=1700000000000,
        tags=[{"key": "colour", "value": "grün"}],
    )
    trace = begun["trace_info"]["request_id"]
    ask("PATCH", f"traces/{trace}", timestamp_ms=1700000001000, status="OK")
    ask("PATCH", f"traces/{trace}/tags", key="mood", value="gut 👍")
    ask("PATCH", f"traces/{trace}/tags", key="gone", value="soon")
    ask("DELETE", f"traces/{trace}/tags", key="gone")
    info = ask("GET", f"traces/{trace}/info")["trace_info"]
    found = ask("GET", "traces", experiment_ids=experiment, filter="tags.mood = 'gut 👍'")
    ask("POST", "traces/delete-traces", experiment_id=experiment, request_ids=[trace])
    left = ask("GET", "traces", experiment_ids=experiment)
    return {
        "status": info["status"],
        "tags": {tag["key"]: tag["value"] for tag in info["tags"] if "." not in tag["key"]},
        "found": [each["request_id"] == trace for each in found["traces"]],
        "left": left.get("traces", []),
    }


def traces() -> Any:
    experiment = new_experiment("traces")
    mlflow.set_experiment(experiment_id=experiment)
    for n in range(3):
        with mlflow.start_span(name=f"größe {n}") as span:
            span.set_inputs({"question": "größe? 🙂"})
            with mlflow.start_span(name="inner") as inner:
                inner.set_outputs({"n": n})
            span.set_outputs("42")
        trace_id = span.trace_id
    mlflow.flush_trace_async_logging()
    client.set_trace_tag(trace_id, "colour", "grün")
    client.set_trace_tag(trace_id, "gone", "soon")
    client.delete_trace_tag(trace_id, "gone")
    search = {"experiment_ids": [experiment], "include_spans": False}
    found = pages(lambda token: client.search_traces(**search, max_results=2, page_token=token))
    tagged = client.search_traces(**search, filter_string="tags.colour = 'grün'")
    deleted = client.delete_traces(experiment, trace_ids=[trace_id])
    return {
        "pages": [len(page) for page in found],
        "states": sorted({str(trace.info.state.value) for page in found for trace in page}),
        "tagged": [trace.info.trace_id for trace in tagged] == [trace_id],
        "tags": [{key: value for key, value in trace.info.tags.items() if "." not in key} for trace in tagged],
        "deleted": deleted,
        "left": len(client.search_traces(**search)),
    }


def spans() -> Any:
    """Spans that the server keeps; older ones leave them in S3, where this client has no access."""
    mlflow.set_experiment(experiment_id=new_experiment("spans"))
    with mlflow.start_span(name="outer") as span:
        span.set_inputs({"question": "größe? 🙂"})
        with mlflow.start_span(name="inner"):
            pass
    mlflow.flush_trace_async_logging()
    trace = client.get_trace(span.trace_id)
    outer = next(each for each in trace.data.spans if each.name == "outer")
    return {"spans": sorted(each.name for each in trace.data.spans), "inputs": outer.inputs}


def assessments() -> Any:
    mlflow.set_experiment(experiment_id=new_experiment("assessments"))
    with mlflow.start_span(name="judged") as span:
        pass
    mlflow.flush_trace_async_logging()
    human = mlflow.entities.AssessmentSource(source_type="HUMAN", source_id="zoë")
    feedback = mlflow.log_feedback(trace_id=span.trace_id, name="good", value=True, rationale="gut 👍", source=human)
    mlflow.log_expectation(trace_id=span.trace_id, name="answer", value={"n": 42}, source=human)
    mlflow.update_assessment(
        span.trace_id,
        feedback.assessment_id,
        mlflow.entities.Feedback(name="good", value=False, rationale="doch nicht"),
    )
    got = mlflow.get_assessment(span.trace_id, feedback.assessment_id)
    mlflow.delete_assessment(span.trace_id, feedback.assessment_id)
    left = client.search_traces(experiment_ids=[got_experiment()], include_spans=False)[0].info.assessments
    return {"value": got.value, "rationale": got.rationale, "left": [each.name for each in left]}


def got_experiment() -> str:
    return str(mlflow.get_experiment_by_name(f"assessments {WORD}").experiment_id)


def logged_models() -> Any:
    experiment = new_experiment("logged models")
    run = client.create_run(experiment)
    model = client.create_logged_model(
        experiment, name="model", source_run_id=run.info.run_id, params={"depth": "4"}, tags={"team": "größe"}
    )
    client.log_model_params(model.model_id, {"rate": "0.1"})
    client.set_logged_model_tags(model.model_id, {"quality": "gut 👍", "gone": "soon"})
    client.delete_logged_model_tag(model.model_id, "gone")
    ready = client.finalize_logged_model(model.model_id, "READY")
    got = client.get_logged_model(model.model_id)
    found = client.search_logged_models([experiment], filter_string="name = 'model'")
    client.delete_logged_model(model.model_id)
    return {
        "status": str(ready.status.value if hasattr(ready.status, "value") else ready.status),
        "params": dict(got.params),
        "tags": {key: value for key, value in got.tags.items() if "." not in key},
        "found": [each.model_id for each in found] == [model.model_id],
        "left": len(client.search_logged_models([experiment])),
    }


PARTS = {
    "experiments": Part(experiments),
    "runs": Part(runs),
    "batch": Part(batch),
    "run search": Part(run_search),
    "scripts": Part(scripts),
    "datasets": Part(datasets),
    "artifacts": Part(artifacts),
    "registry": Part(registry),
    "trace infos": Part(trace_infos),
    "logged models": Part(logged_models, client=(3, 0), server=(3, 0)),
    # Before 3.6, the client itself writes spans to S3, and a trace comes to nothing where it cannot.
    "traces": Part(traces, client=(3, 6), server=(3, 6)),
    "assessments": Part(assessments, client=(3, 6), server=(3, 6)),
    "spans": Part(spans, client=(3, 6), server=(3, 6)),
}


def main() -> None:
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, part in PARTS.items():
        if part.client > CLIENT:
            skipped[name] = "came with client {}.{}".format(*part.client)
        elif part.server > SERVER:
            skipped[name] = "came with server {}.{}".format(*part.server)
        else:
            began = time.monotonic()
            found[name] = part.run()
            print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps({"client": mlflow.__version__, "found": found, "skipped": skipped}))


if __name__ == "__main__":
    main()
