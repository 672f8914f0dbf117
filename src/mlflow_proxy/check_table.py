"""The table of `mlflow-proxy check` and `validate`: a row per step, each with a mark, and advice where it is needed."""

from __future__ import annotations

from typing import NamedTuple

import click

_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("?", "yellow")}
# Characters of a reason that still fit on a terminal's three lines.
_LONG = 240
_SKIPPED = ("-", "bright_black")


class Step(NamedTuple):
    """One row of the table. `good` is None for what could not be found out, or is worth a look but works.

    A `skipped` one was left out on purpose. `milliseconds` is how long it took, where that is told. `details` are for
    those who ask for them.
    """

    name: str
    good: bool | None
    found: str
    advice: str = ""
    skipped: bool = False
    milliseconds: float | None = None
    details: str = ""

    @classmethod
    def failed(cls, name: str, found: str, reason: str, *, good: bool | None = False) -> Step:
        """A row whose advice is `reason`; of a long one only the first clause, what is wrong, and the last sentence,
        what to do, and all of it in the details.
        """
        what, _, rest = reason.partition("; ")
        if len(reason) <= _LONG or not rest:
            return cls(name, good, found, reason)
        return cls(name, good, found, f"{what}. {rest.rpartition('. ')[2]}", details=reason)


def print_step(step: Step, *, width: int = 14, timed: bool = False, verbose: bool = False) -> None:
    """Write the row; names have `width` columns. A `timed` table has a column for how long steps took."""
    mark, colour = _SKIPPED if step.skipped else _MARKS[step.good]
    took = ""
    if timed:
        took = f"{'' if step.milliseconds is None else f'{step.milliseconds:.0f} ms':>9}  "
    click.echo(f"  {click.style(mark, fg=colour)} {step.name:<{width}} {took}{step.found}")
    margin = f"    {'':<{width}} {' ' * len(took)}"
    if step.advice:
        click.echo(f"{margin}→ {step.advice}")
    if step.details:
        click.echo(f"{margin}  {step.details if verbose else 'more: mlflow-proxy check --verbose'}")
