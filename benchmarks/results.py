"""Figures of a run: medians over its rounds, ratios between peers, and which of the targets are reached."""

# ruff: noqa: RUF001 - the multiplication sign is meant

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.load import LOADS, TLS_LOAD, Load, Sample, Transfer
from benchmarks.peers import PEERS, Peer
from benchmarks.processes import Startup

LEAST_OF_NAIVE = 15.0
LEAST_OF_ENVOY = 0.65
LEAST_OF_BARE = 0.8
LEAST_OF_DIRECT = 0.6
MOST_RESIDENT = 130_000_000
MOST_GROWTH = 16_000_000
MOST_STARTUP = 1.5
TARGET_CONNECTIONS = (32, 256)
_NAMES = {"envoy": "Envoy", "naive": "the naive design", "proxy-bare": "the bare forwarder"}


@dataclass(frozen=True, slots=True)
class Row:
    """One peer under one load. Ratios are of requests per second; None where that peer did not take part."""

    load: Load
    peer: Peer
    rate: float
    cpu: float
    p50: float
    p99: float
    failed: int
    to_envoy: float | None
    to_naive: float | None
    to_bare: float | None


@dataclass(frozen=True, slots=True)
class DownloadRow:
    """One peer's download: bytes per second, CPU seconds for all of it, and the growth of a process in bytes."""

    peer: Peer
    rate: float
    cpu: float
    growth: int
    to_direct: float | None


@dataclass(frozen=True, slots=True)
class SizeRow:
    """What a peer weighs: seconds to start, and the largest process at its largest moment in bytes."""

    peer: Peer
    wall: float
    cpu: float
    settled_cpu: float
    peak: int


@dataclass(frozen=True, slots=True)
class Goal:
    """One target: what was asked for, what was measured."""

    title: str
    asked: str
    measured: str
    reached: bool


@dataclass(slots=True)
class Results:
    """All that was measured. Filled by the runner, read by the report.

    `disturbances`: for each measurement, the part of the machine's processor time that other programs had meanwhile.
    """

    samples: dict[tuple[Load, str], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    transfers: dict[str, list[Transfer]] = field(default_factory=lambda: defaultdict(list))
    startups: dict[str, list[Startup]] = field(default_factory=lambda: defaultdict(list))
    peaks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    disturbances: list[float] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def rows(self, loads: Sequence[Load] = LOADS) -> list[Row]:
        """One row per load and peer, in the order of both."""
        return [self._row(load, peer) for load in loads for peer in PEERS if (load, peer.key) in self.samples]

    def tls_rows(self) -> list[Row]:
        """The same for the upstream with TLS."""
        return self.rows([TLS_LOAD])

    def download_rows(self) -> list[DownloadRow]:
        """One row per peer."""
        return [self._download_row(peer) for peer in PEERS if peer.key in self.transfers]

    def size_rows(self) -> list[SizeRow]:
        """One row per peer that was started for this."""
        return [self._size_row(peer) for peer in PEERS if peer.key in self.startups and not peer.tls]

    def goals(self) -> list[Goal]:
        """The targets for the proxy as it runs in production, those for which all that is needed took part."""
        goals: list[Goal] = []
        for row in self.rows():
            if row.peer.key == "proxy" and row.load.connections in TARGET_CONNECTIONS:
                goals += _at_least(row.load.label, "naive", LEAST_OF_NAIVE, row.to_naive)
                goals += _at_least(row.load.label, "envoy", LEAST_OF_ENVOY, row.to_envoy)
            if row.peer.key == "proxy-no-audit" and row.load.connections in TARGET_CONNECTIONS:
                goals += _at_least(f"{row.load.label}, no audit", "proxy-bare", LEAST_OF_BARE, row.to_bare)
        goals += [goal for row in self.download_rows() if row.peer.key == "proxy" for goal in _download_goals(row)]
        goals += [goal for row in self.size_rows() if row.peer.key == "proxy" for goal in _size_goals(row)]
        return goals

    def failed(self) -> int:
        """Requests that were refused or broke off, over the whole run."""
        return sum(sample.failed for samples in self.samples.values() for sample in samples)

    def _row(self, load: Load, peer: Peer) -> Row:
        samples = self.samples[load, peer.key]
        suffix = "-tls" if load.tls else ""
        return Row(
            load=load,
            peer=peer,
            rate=_rate(samples),
            cpu=median(sample.cpu for sample in samples),
            p50=median(sample.p50 for sample in samples),
            p99=median(sample.p99 for sample in samples),
            failed=sum(sample.failed for sample in samples),
            to_envoy=_ratio(_rate(samples), _rate(self.samples.get((load, "envoy" + suffix), []))),
            to_naive=_ratio(_rate(samples), _rate(self.samples.get((load, "naive" + suffix), []))),
            to_bare=_ratio(_rate(samples), _rate(self.samples.get((load, "proxy-bare" + suffix), []))),
        )

    def _download_row(self, peer: Peer) -> DownloadRow:
        transfers = self.transfers[peer.key]
        rate = _rate(transfers)
        return DownloadRow(
            peer=peer,
            rate=rate,
            cpu=median(transfer.cpu for transfer in transfers),
            growth=max(transfer.growth for transfer in transfers),
            to_direct=_ratio(rate, _rate(self.transfers.get("direct", []))),
        )

    def _size_row(self, peer: Peer) -> SizeRow:
        startups = self.startups[peer.key]
        return SizeRow(
            peer=peer,
            wall=median(startup.wall for startup in startups),
            cpu=median(startup.cpu for startup in startups),
            settled_cpu=median(startup.settled_cpu for startup in startups),
            peak=max(self.peaks[peer.key]),
        )


def _rate(measured: Iterable[Sample | Transfer]) -> float:
    rates = [one.rate for one in measured]
    return median(rates) if rates else 0.0


def _ratio(rate: float, other: float) -> float | None:
    return rate / other if other else None


def _at_least(label: str, peer: str, least: float, measured: float | None) -> list[Goal]:
    if measured is None:
        return []
    digits = 1 if least >= 10 else 2
    return [
        Goal(
            f"{label}: requests per second",
            f"≥ {least:g} × {_NAMES[peer]}",
            f"{measured:.{digits}f} ×",
            measured >= least,
        )
    ]


def _download_goals(row: DownloadRow) -> list[Goal]:
    flat = Goal(
        "memory while the download streams",
        f"grows < {MOST_GROWTH / 1e6:.0f} MB",
        f"{row.growth / 1e6:.1f} MB",
        row.growth < MOST_GROWTH,
    )
    if row.to_direct is None:
        return [flat]
    rate = Goal(
        "download: bytes per second",
        f"≥ {LEAST_OF_DIRECT:g} × without a proxy",
        f"{row.to_direct:.2f} ×",
        row.to_direct >= LEAST_OF_DIRECT,
    )
    return [rate, flat]


def _size_goals(row: SizeRow) -> list[Goal]:
    return [
        Goal(
            "resident memory of the largest process, at its peak",
            f"< {MOST_RESIDENT / 1e6:.0f} MB",
            f"{row.peak / 1e6:.0f} MB",
            row.peak < MOST_RESIDENT,
        ),
        Goal(
            "CPU time until the first answer, all processes",
            f"< {MOST_STARTUP} s",
            f"{row.cpu:.2f} s",
            row.cpu < MOST_STARTUP,
        ),
    ]
