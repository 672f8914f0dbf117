"""One run: rounds in which every peer is started, loaded and ended, their turns interleaved.

Machines are noisy and drift. So the peers take turns load by load, each round begins with another peer, and what is
reported is the median of the rounds. A measurement during which other programs were busy is taken again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.bystanders import CALM, Bystanders
from benchmarks.load import LOADS, TLS_LOAD, Load, LoadError, batch_body, download, expect_answer, put_on
from benchmarks.peers import Peer, Running, find_nginx, started
from benchmarks.processes import Server, timed_start
from benchmarks.results import Results
from benchmarks.upstream import Upstream, upstream

Say = Callable[[str], None]
Taken = TypeVar("Taken")

MOST_TRIES = 4
_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `download_size` in bytes, `seconds` and `warm_up` for each load and peer.

    `retakes`: how many times, in the whole run, a disturbed measurement may be taken again.
    """

    peers: Sequence[Peer]
    rounds: int = 3
    seconds: float = 1.5
    warm_up: float = 0.3
    download_size: int = 1 << 30
    retakes: int = 40
    loads: Sequence[Load] = LOADS

    def turns(self) -> int:
        """How many times a load is put on a peer, or a file read through it, in all."""
        return self.rounds * sum(1 if peer.tls else len(self.loads) + 1 for peer in self.peers)


def measure(plan: Plan, say: Say) -> Results:
    """Run the plan; `say` is given a line of progress now and then. All that was started is ended on return."""
    nginx = find_nginx()
    if nginx is None:
        raise LoadError(
            "nginx, the upstream of all, is not installed; on Debian and Ubuntu: apt-get install nginx-light"
        )
    results = Results()
    with tempfile.TemporaryDirectory(prefix="mlflow-proxy-bench-") as folder:
        _Run(plan, results, Path(folder), nginx, say).run()
    return results


class _Run:
    """A plan under way."""

    def __init__(self, plan: Plan, results: Results, folder: Path, nginx: str, say: Say) -> None:
        self._plan = plan
        self._results = results
        self._folder = folder
        self._nginx = nginx
        self._say = say
        self._done = 0
        self._retakes = plan.retakes
        self._servers: list[Server] = []
        self._body = folder / "body.json"

    def run(self) -> None:
        self._body.write_bytes(batch_body())
        present = []
        for peer in self._plan.peers:
            if (reason := peer.missing()) is None:
                present.append(peer)
            else:
                self._results.missing.append(f"{peer.key}: {reason}")
                self._say(f"without {peer.key}: {reason}")
        size = self._plan.download_size
        with upstream(self._nginx, self._folder / "upstream", size) as answering:
            download(answering.server, answering.plain, size)  # fills the page cache
            for number in range(1, self._plan.rounds + 1):
                shift = (number - 1) % max(1, len(present))
                self._round(number, [*present[shift:], *present[:shift]], answering)

    def _round(self, number: int, peers: Sequence[Peer], answering: Upstream) -> None:
        with ExitStack() as stack:
            up = [self._start(stack, number, peer, answering) for peer in peers]
            self._servers = [answering.server, *(one.server for one in up if one.peer.command)]
            for load in self._plan.loads:
                for one in up:
                    if not one.peer.tls:
                        self._load(number, one, load)
            for one in up:
                if one.peer.tls:
                    self._load(number, one, TLS_LOAD)
                else:
                    self._download(number, one)
            for one in up:
                self._results.peaks[one.peer.key].append(one.server.peak_resident())

    def _start(self, stack: ExitStack, number: int, peer: Peer, answering: Upstream) -> Running:
        one = stack.enter_context(started(peer, self._folder / f"{peer.key}-{number}", answering))
        if peer.command is not None:
            startup = timed_start(one.server, one.port, peer.ready_path)
            self._results.startups[peer.key].append(startup)
            self._say(f"round {number}  started {peer.key}: {startup.cpu:.2f} s of CPU, {startup.wall:.2f} s")
        return one

    def _load(self, number: int, one: Running, load: Load) -> None:
        headers = one.peer.headers
        expect_answer(one.port, load, self._body.read_bytes(), headers)
        if self._plan.warm_up:
            put_on(load, one.server, one.port, self._body, self._plan.warm_up, headers=headers)
        sample = self._calm(lambda: put_on(load, one.server, one.port, self._body, self._plan.seconds, headers=headers))
        one.server.trim_log()
        self._results.samples[load, one.peer.key].append(sample)
        failed = f"  {sample.failed} failed" if sample.failed else ""
        self._progress(
            number, f"{load.label:26} {one.peer.key:10} {sample.rate:9,.0f} req/s {sample.cpu:7.1f} µs{failed}"
        )

    def _download(self, number: int, one: Running) -> None:
        transfer = self._calm(lambda: download(one.server, one.port, self._plan.download_size, one.peer.headers))
        one.server.trim_log()
        self._results.transfers[one.peer.key].append(transfer)
        rate = f"{transfer.rate / 1e9:.2f} GB/s"
        self._progress(number, f"{'download':26} {one.peer.key:10} {rate}, grew {transfer.growth / 1e6:.1f} MB")

    def _calm(self, take: Callable[[], Taken]) -> Taken:
        """What `take` measured; of several tries the one that other programs disturbed least."""
        tries = [self._watched(take)]
        while tries[-1][0] > CALM and len(tries) < MOST_TRIES and self._retakes > 0:
            self._retakes -= 1
            time.sleep(_PAUSE)
            tries.append(self._watched(take))
        share, taken = min(tries, key=lambda one: one[0])
        self._results.disturbances.append(share)
        return taken

    def _watched(self, take: Callable[[], Taken]) -> tuple[float, Taken]:
        bystanders = Bystanders(self._servers)
        taken = take()
        return bystanders.share(), taken

    def _progress(self, number: int, text: str) -> None:
        self._done += 1
        share = self._results.disturbances[-1]
        others = f"  (others had {share:.0%} of the machine)" if share > CALM else ""
        self._say(f"round {number}  {self._done:3}/{self._plan.turns()}  {text}{others}")
