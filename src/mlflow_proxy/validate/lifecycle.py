"""The seven calls of an HTTP-only client, in their order, on an experiment of their own, and its removal afterwards."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from mlflow_proxy.validate.calls import API, Calls, Reply, Unanswered
from mlflow_proxy.validate.interruption import Interrupted
from mlflow_proxy.validate.outcome import Outcome, Refused, failed, is_down, skipped, unanswered

# Of clean-up: how often a call is tried that may succeed later, and the longest pause between, in seconds.
_TRIES = 3
_LONGEST_PAUSE = 5.0
_GONE = "RESOURCE_DOES_NOT_EXIST"


def new_name() -> str:
    """A name for an experiment that says what it is, and that nobody has."""
    return f"mlflow-proxy-validate-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


class Lifecycle:
    """An experiment and a run, from their making to their deletion. With `read_only`, what is there is looked at."""

    def __init__(self, calls: Calls, *, read_only: bool) -> None:
        self._calls = calls
        self._read_only = read_only
        self._name = new_name()
        self._experiment: str | None = None
        self._run: str | None = None
        self._may_be_made = False
        self._found: Mapping[str, Any] = {}

    def create_experiment(self) -> Outcome:
        """`POST experiments/create`."""
        if self._read_only:
            return skipped("it writes, and --read-only was asked for")
        self._may_be_made = True
        try:
            reply = self._calls.mlflow("experiments/create", {"name": self._name})
        except Unanswered as failure:
            return unanswered(failure)
        self._may_be_made = not 300 <= reply.status < 500
        if reply.status != 200:
            return failed(reply)
        self._experiment = _text(reply.json or {}, "experiment_id")
        return _expect(self._experiment, f"experiment {self._experiment}: {self._name}")

    def search_experiments(self) -> Outcome:
        """`POST experiments/search`: the new one is found by its name."""
        filtered = {"filter": f"name = '{self._name}'"} if self._experiment else {}
        told = self._call("experiments/search", {"max_results": 1, **filtered})
        if isinstance(told, Outcome):
            return told
        experiments = told.get("experiments") or []
        if not isinstance(experiments, list) or not all(isinstance(each, dict) for each in experiments):
            return _strange(told)
        self._found = experiments[0] if experiments else {}
        if self._experiment and self._found.get("experiment_id") != self._experiment:
            return Outcome(False, "the new experiment is not found by its name", "Does every call reach one MLflow?")
        return Outcome(True, f"{len(experiments)} found")

    def get_experiment(self) -> Outcome:
        """`GET experiments/get`."""
        wanted = self._experiment or _text(self._found, "experiment_id")
        if wanted is None:
            return skipped("there is no experiment to look at")
        told = self._call("experiments/get", experiment_id=wanted)
        if isinstance(told, Outcome):
            return told
        experiment = told.get("experiment")
        name = _text(experiment if isinstance(experiment, dict) else {}, "name")
        return _expect(name == (self._name if self._experiment else self._found.get("name")), f"experiment {wanted}")

    def create_run(self) -> Outcome:
        """`POST runs/create`."""
        if self._experiment is None:
            return self._without("an experiment")
        data = {"experiment_id": self._experiment, "run_name": "validate", "start_time": int(time.time() * 1000)}
        told = self._call("runs/create", data)
        if isinstance(told, Outcome):
            return told
        run = told.get("run")
        info = run.get("info") if isinstance(run, dict) else None
        self._run = _text(info if isinstance(info, dict) else {}, "run_id")
        return _expect(self._run, f"run {self._run}")

    def list_artifacts(self) -> Outcome:
        """`GET artifacts/list`: of a new run, none."""
        if self._run is None:
            return self._without("a run")
        told = self._call("artifacts/list", run_id=self._run)
        return told if isinstance(told, Outcome) else Outcome(True, f"{len(told.get('files') or [])} files")

    def set_tag(self) -> Outcome:
        """`POST runs/set-tag`."""
        if self._run is None:
            return self._without("a run")
        told = self._call("runs/set-tag", {"run_id": self._run, "key": "validated", "value": "yes"})
        return told if isinstance(told, Outcome) else Outcome(True, "tagged")

    def delete_run(self) -> Outcome:
        """`POST runs/delete`."""
        if self._run is None:
            return self._without("a run")
        told = self._call("runs/delete", {"run_id": self._run})
        if isinstance(told, Outcome):
            return told
        self._run = None
        return Outcome(True, "deleted")

    def clean_up(self) -> Outcome:
        """Delete whatever was made, also if it is not known whether it was; then say what is left."""
        if not self._may_be_made:
            return skipped("nothing was made")
        try:
            if self._experiment is None:
                self._experiment = self._by_name()
            if self._experiment is None:
                return Outcome(True, f"no experiment {self._name} is there")
            if self._run is not None:
                self._delete("runs/delete", {"run_id": self._run})
            self._delete("experiments/delete", {"experiment_id": self._experiment})
        except Refused as refused:
            return self._left_behind(refused.outcome)
        except Interrupted:
            return self._left_behind(Outcome(False, "interrupted"))
        return Outcome(
            True,
            f"experiment {self._experiment} is deleted, runs included; MLflow keeps it in the lifecycle stage "
            "'deleted', where lists do not show it",
        )

    def _call(self, route: str, data: Mapping[str, Any] | None = None, **query: str) -> dict[str, Any] | Outcome:
        """A good answer, or what came instead."""
        try:
            reply = self._calls.mlflow(route, data, **query)
        except Unanswered as failure:
            return unanswered(failure)
        told = reply.json
        return told if reply.status == 200 and told is not None else failed(reply)

    def _by_name(self) -> str | None:
        """The experiment whose making was not answered, and may still go on; None if there is none. Raises Refused."""
        for pause in range(_TRIES):
            time.sleep(pause)
            reply = self._try("experiments/get-by-name", experiment_name=self._name)
            experiment = (reply.json or {}).get("experiment")
            if reply.status == 200 and isinstance(experiment, dict):
                return _text(experiment, "experiment_id")
            if reply.error_code != _GONE:
                raise Refused(failed(reply))
        return None

    def _delete(self, route: str, data: Mapping[str, str]) -> None:
        """Raises Refused. What is gone already is deleted, too."""
        reply = self._try(route, data)
        if reply.status != 200 and reply.error_code != _GONE:
            raise Refused(failed(reply))

    def _try(self, route: str, data: Mapping[str, str] | None = None, **query: str) -> Reply:
        """A call that is worth repeating, and may be repeated. Raises Refused."""
        for attempt in range(_TRIES):
            pause = float(attempt + 1)
            try:
                reply = self._calls.mlflow(route, data, **query)
            except Unanswered as failure:
                outcome = unanswered(failure)
            else:
                if not is_down(reply):
                    return reply
                outcome = failed(reply)
                wait = reply.headers.get("retry-after", "")
                pause = float(wait) if wait.isdigit() else pause
            if attempt < _TRIES - 1:
                time.sleep(min(pause, _LONGEST_PAUSE))
        raise Refused(outcome)

    def _left_behind(self, outcome: Outcome) -> Outcome:
        if self._experiment is None:
            return outcome._replace(
                found=f"whether the experiment {self._name} was made is not known: {outcome.found}",
                advice=f"Look for it in MLflow, and delete it. {outcome.advice}",
            )
        data = json.dumps({"experiment_id": self._experiment})
        return outcome._replace(
            found=f"experiment {self._experiment}, {self._name}, is still there: {outcome.found}",
            advice=f"Delete it with a key that may: POST …{API}experiments/delete {data}. {outcome.advice}",
        )

    def _without(self, what: str) -> Outcome:
        if self._read_only:
            return skipped(f"it needs {what} of its own, and --read-only makes none")
        return skipped(f"there is no {what.partition(' ')[2]}, see above")


def _text(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    return value if isinstance(value, str) and value else None


def _expect(is_right: object, found: str) -> Outcome:
    return Outcome(True, found) if is_right else _strange({})


def _strange(told: Mapping[str, Any]) -> Outcome:
    names = f", with {', '.join(sorted(told)[:5])}" if told else ""
    return Outcome(False, f"200, but not the answer that MLflow gives{names}", "Is it MLflow that answers there?")
