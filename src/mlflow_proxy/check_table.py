"""The table of `mlflow-proxy check` and `validate`: a row per step, each with a mark, and advice where it is needed."""

from __future__ import annotations

from typing import NamedTuple

import click

_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("?", "yellow")}
_SKIPPED = ("-", "bright_black")


class Step(NamedTuple):
    """One row of the table. `good` is None for what could not be found out, or is worth a look but works.

    A `skipped` one was left out on purpose. `milliseconds` is how long it took, where that is told.
    """

    name: str
    good: bool | None
    found: str
    advice: str = ""
    skipped: bool = False
    milliseconds: float | None = None


def print_step(step: Step, *, width: int = 14, timed: bool = False) -> None:
    """Write the row; names have `width` columns. A `timed` table has a column for how long steps took."""
    mark, colour = _SKIPPED if step.skipped else _MARKS[step.good]
    took = ""
    if timed:
        took = f"{'' if step.milliseconds is None else f'{step.milliseconds:.0f} ms':>9}  "
    click.echo(f"  {click.style(mark, fg=colour)} {step.name:<{width}} {took}{step.found}")
    if step.advice:
        click.echo(f"    {'':<{width}} {' ' * len(took)}→ {step.advice}")
