"""Ctrl-C and SIGTERM while something is there to be removed: the call under way may end, then there is clean-up.

A second signal gives that call up, a third one the clean-up.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

import click

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """By a signal, whose number is `signal`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Interruption:
    """Holds signals back while entered; `check` tells of the one that came."""

    def __init__(self) -> None:
        self._came: int | None = None
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # nohup, or a shell's background
                self._before[number] = before  # type: ignore[assignment]
                signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def check(self) -> None:
        """Between two steps. Raises Interrupted."""
        if self._came is not None:
            raise Interrupted(self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (signal's)
        if self._came is not None:
            raise Interrupted(number)
        self._came = number
        try:
            click.echo("Stopping after this call, then cleaning up; once more does not wait for the call.", err=True)
        except OSError:
            sys.stderr = open("/dev/null", "w")  # noqa: SIM115
