"""The table of `mlflow-proxy check`: a row per step, each with a mark, and advice where something is wrong."""

from __future__ import annotations

from typing import NamedTuple

import click

_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("?", "yellow")}


class Step(NamedTuple):
    """One row of the table. `good` is None for what could not be found out, or is worth a look but works."""

    name: str
    good: bool | None
    found: str
    advice: str = ""


def print_step(step: Step) -> None:
    """Write the row."""
    mark, colour = _MARKS[step.good]
    click.echo(f"  {click.style(mark, fg=colour)} {step.name:<14} {step.found}")
    if step.advice:
        click.echo(f"    {'':<14} → {step.advice}")
