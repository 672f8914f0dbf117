"""`mlflow-proxy validate`: a live deployment tried from outside, as its callers use it, and left as it was found.

It needs an address and a key or token, no AWS credentials and no configuration. What a configuration says, and whether
it fits its targets, is `mlflow-proxy check`'s business, on the proxy's own host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import click

from mlflow_proxy.validate import reach
from mlflow_proxy.validate.calls import Calls
from mlflow_proxy.validate.deployment import Deployment
from mlflow_proxy.validate.interruption import Interrupted, Interruption
from mlflow_proxy.validate.lifecycle import Lifecycle
from mlflow_proxy.validate.outcome import Outcome
from mlflow_proxy.validate.permissions import Permissions
from mlflow_proxy.validate.report import Report

PASSED, FAILED, UNREACHABLE = 0, 1, 2

CLEAN_UP = "clean-up"


class Row(NamedTuple):
    """A step of the table, and how it is taken."""

    name: str
    work: Callable[[], Outcome]


class Steps:
    """All steps for one deployment, in their order."""

    def __init__(self, deployment: Deployment, *, read_only: bool) -> None:
        calls = Calls(deployment)
        permissions = Permissions(deployment, calls)
        lifecycle = Lifecycle(calls, read_only=read_only)
        self.reach = (
            Row("DNS", partial(reach.name, deployment)),
            Row("TLS", partial(reach.tls, deployment)),
            Row("health", partial(reach.health, calls)),
        )
        self.rules = (
            Row("plain HTTP", partial(reach.plain_http, deployment)),
            Row("stranger", permissions.stranger),
            Row("identity", permissions.identity),
            Row("may read", permissions.may_read),
            Row("may delete", permissions.may_delete),
        )
        self.calls = (
            Row("experiments/create", lifecycle.create_experiment),
            Row("experiments/search", lifecycle.search_experiments),
            Row("experiments/get", lifecycle.get_experiment),
            Row("runs/create", lifecycle.create_run),
            Row("artifacts/list", lifecycle.list_artifacts),
            Row("runs/set-tag", lifecycle.set_tag),
            Row("runs/delete", lifecycle.delete_run),
        )
        self.clean_up = Row(CLEAN_UP, lifecycle.clean_up)
        self.ui = (Row("UI link", permissions.ui_link), Row("UI page", permissions.ui_page))


def run(deployment: Deployment, *, read_only: bool, as_json: bool, wait: float) -> int:
    """Take all steps and print what comes of them. Returns the exit code: PASSED, FAILED, UNREACHABLE, or 128 and a
    signal's number.
    """
    report = Report(as_json=as_json, secret=deployment.credential)
    ending = ""
    try:
        if wait:
            reach.wait_until_healthy(deployment, wait, partial(click.echo, err=True))
        report.title(deployment.url)
        steps = Steps(deployment, read_only=read_only)
        code = _take(steps, report)
        if code != PASSED:
            ending = "Some steps failed; see the advice above."
            if report.done[-1].step.name != steps.ui[-1].name:
                ending += " Without the last one, further steps would tell nothing, so they were left out."
    except KeyboardInterrupt:
        code, ending = 130, "Interrupted."
    except Interrupted as interrupted:
        code, ending = 128 + interrupted.signal, "Interrupted."
    report.finish(code, ending, url=deployment.url, read_only=read_only)
    return code


def _take(steps: Steps, report: Report) -> int:
    unreachable = _all(steps.reach, report)
    if unreachable is not None:
        return UNREACHABLE if unreachable.unreachable else FAILED
    if _all(steps.rules, report) is None:
        with Interruption() as interruption:
            try:
                _all(steps.calls, report, interruption)
            finally:
                report.run(*steps.clean_up)
            _all(steps.ui, report, interruption)
    return FAILED if any(done.step.good is False for done in report.done) else PASSED


def _all(rows: tuple[Row, ...], report: Report, interruption: Interruption | None = None) -> Outcome | None:
    """Take steps. Returns the outcome of the one after which the others are of no use, if there is one."""
    for row in rows:
        outcome = report.run(*row)
        if interruption is not None:
            interruption.check()
        if outcome.fatal or outcome.unreachable:
            return outcome
    return None
