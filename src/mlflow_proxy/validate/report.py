"""What `mlflow-proxy validate` prints: a table that grows step by step, or one JSON object at the end.

Whatever a deployment answers is made harmless first: no key, no control characters, no more than a few lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from mlflow_proxy.check_table import Step, print_step
from mlflow_proxy.validate.outcome import Outcome

_WIDTH = 18
_LONGEST = 400


class Done(NamedTuple):
    """A step and the id of the request that failed it, or the last one."""

    step: Step
    request_id: str

    @property
    def result(self) -> str:
        """As the JSON has it."""
        if self.step.skipped:
            return "skipped"
        return {True: "passed", False: "failed", None: "warning"}[self.step.good]


class Report:
    """The steps so far. `secret` is never shown. Output that goes nowhere any more ends nothing."""

    def __init__(self, *, as_json: bool, secret: str | None) -> None:
        self.done: list[Done] = []
        self._as_json = as_json
        self._secret = secret
        self._live = not as_json and sys.stdout.isatty()
        self._begin = time.monotonic()

    def title(self, text: str) -> None:
        """What is validated, above the table."""
        if not self._as_json:
            self._print(lambda: click.secho(f"\n{text}", bold=True))

    def run(self, name: str, work: Callable[[], Outcome]) -> Outcome:
        """One step: its name while it runs, on a terminal; then its row."""
        if self._live:
            self._print(lambda: click.echo(f"  … {name}", nl=False))
        begin = time.monotonic()
        outcome = work()
        milliseconds = None if outcome.skipped else (time.monotonic() - begin) * 1000
        advice = self._harmless(outcome.advice)
        if outcome.good is False and outcome.request_id:
            advice = f"{advice} (request {self._harmless(outcome.request_id)})".lstrip()
        step = Step(name, outcome.good, self._harmless(outcome.found), advice, outcome.skipped, milliseconds)
        self.done.append(Done(step, self._harmless(outcome.request_id)))
        if not self._as_json:
            self._print(lambda: self._row(step))
        return outcome

    def finish(self, exit_code: int, ending: str = "", **about: Any) -> None:
        """The last line, or the whole as JSON. `ending` says why not all steps were taken."""
        seconds = time.monotonic() - self._begin
        if self._as_json:
            whole = {
                **about,
                "passed": exit_code == 0,
                "exit_code": exit_code,
                "seconds": round(seconds, 3),
                "steps": [self._fields(each) for each in self.done],
            }
            self._print(lambda: click.echo(json.dumps(whole, indent=2, ensure_ascii=False)))
            return
        counts = {result: [each for each in self.done if each.result == result] for result in _RESULTS}
        summary = ", ".join(f"{len(found)} {result}" for result, found in counts.items() if found)
        lines = [f"\n{summary}, in {seconds:.1f} s.{self._slowest()}"]
        lines += [ending] if ending else []
        self._print(lambda: click.echo("\n".join(lines)))

    def _row(self, step: Step) -> None:
        if self._live:
            click.echo("\r\033[K", nl=False)
        print_step(step, width=_WIDTH, timed=True)

    def _slowest(self) -> str:
        timed = [each.step for each in self.done if each.step.milliseconds is not None]
        slowest = max(timed, key=lambda step: step.milliseconds or 0, default=None)
        return "" if slowest is None else f" Slowest: {slowest.name}, {slowest.milliseconds:.0f} ms."

    def _fields(self, done: Done) -> dict[str, Any]:
        step = done.step
        return {
            "name": step.name,
            "result": done.result,
            "found": step.found,
            "advice": step.advice,
            "milliseconds": None if step.milliseconds is None else round(step.milliseconds, 1),
            "request_id": done.request_id or None,
        }

    def _harmless(self, text: str) -> str:
        if self._secret:
            text = text.replace(self._secret, "…")
        text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

    def _print(self, write: Callable[[], None]) -> None:
        try:
            write()
            sys.stdout.flush()
        except OSError:  # `| head`, or the terminal was closed: what was made is still to be removed
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())


_RESULTS = ("passed", "failed", "warning", "skipped")
