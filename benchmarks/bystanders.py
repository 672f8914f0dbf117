"""How much of the machine other programs used during a measurement: what tells a disturbed one from a calm one.

Time that the hypervisor gave to other machines counts too, where it says so.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence

import psutil

from benchmarks.processes import Server

# Of all processor time: what others may have of it in a measurement that counts.
CALM = 0.08


class Bystanders:
    """Counts from its making until `share` is asked for."""

    def __init__(self, ours: Sequence[Server]) -> None:
        self._ours = ours
        self._began = time.monotonic()
        self._before = self._foreign()

    def share(self) -> float:
        """The part of all processor time that went to none of our servers, this program or its ended children."""
        seconds = (time.monotonic() - self._began) * len(os.sched_getaffinity(0))
        return max(0.0, self._foreign() - self._before) / seconds

    def _foreign(self) -> float:
        whole, ended = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = sum(server.cpu_seconds() for server in self._ours)
        busy = whole.user + whole.nice + whole.system + whole.steal
        return busy - ours - ended.ru_utime - ended.ru_stime - time.process_time()
