"""The figures as people read them: tables for the terminal, docs/performance.md and its chart."""

# ruff: noqa: RUF001 - the multiplication sign and the dash are meant

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bystanders import CALM
from benchmarks.chart import chart
from benchmarks.results import DownloadRow, Goal, Results, Row, SizeRow

PAGE, CHART = "performance.md", "performance.svg"
MARKS = {True: "✓ reached", False: "✗ not reached"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reader must know to judge the figures."""

    date: str
    machine: str
    programs: str
    command: str
    rounds: int
    seconds: float
    download_size: int


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its headline. All columns but the first `texts` hold figures."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    texts: int = 1


def tables(results: Results, facts: Facts) -> list[Table]:
    """Everything measured, the targets first."""
    found = [
        _goals(results.goals()),
        *_load_tables(results.rows()),
        _downloads(results.download_rows(), facts),
        _sizes(results.size_rows()),
        *_load_tables(results.tls_rows()),
    ]
    return [table for table in found if table.lines]


def as_text(table: Table) -> str:
    """For a terminal."""
    lines = [table.columns, *table.lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]

    def align(line: Sequence[str]) -> str:
        cells = [
            text.ljust(width) if column < table.texts else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([table.title, *(f"  {align(line)}" for line in lines)])


def as_markdown(table: Table) -> str:
    """For a page."""
    rule = ["---" if column < table.texts else "---:" for column in range(len(table.columns))]
    lines = [table.columns, rule, *table.lines]
    return "\n".join([f"### {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def write(results: Results, facts: Facts, folder: Path) -> list[Path]:
    """Write the page and its chart; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(page(results, facts), "utf-8")
    (folder / CHART).write_text(chart(results.rows(), results.download_rows()), "utf-8")
    return [folder / PAGE, folder / CHART]


def page(results: Results, facts: Facts) -> str:
    """The text of docs/performance.md."""
    missing = "".join(f"\nNot in this run: {reason}.\n" for reason in results.missing)
    return _PAGE.format(
        facts=facts,
        tables="\n\n".join(as_markdown(table) for table in tables(results, facts)),
        missing=missing,
        failed=results.failed() or "none",
        chart=CHART,
        calm=disturbance(results),
        size=_size(facts.download_size),
    )


def disturbance(results: Results) -> str:
    """One sentence: how busy other programs kept the machine."""
    shares = sorted(results.disturbances)
    if not shares:
        return "Other programs were not watched."
    middle, most = shares[len(shares) // 2], shares[-1]
    text = f"Other programs had {middle:.0%} of the processor time in the median measurement, {most:.0%} in the worst."
    return text if middle <= CALM else f"{text} **The machine was busy: measure again before you trust these figures.**"


_PAGE = """\
# Performance

How fast the proxy is and what it takes, side by side with others on one machine, in one run. Written by
`{facts.command}` on {facts.date}; do not edit.

- Machine: {facts.machine}; load, proxies and upstream share it.
- Programs: {facts.programs}.
- {facts.rounds} rounds of {facts.seconds:g} s for each load and peer, turns interleaved; figures are
  medians of the rounds. A measurement disturbed by other programs is taken again.
- {calm}
- Requests refused or broken off in the whole run: {failed}.
{missing}
![Requests per second and download rate of each peer]({chart})

## Who takes part

| | |
|---|---|
| mlflow-proxy | 2 workers, as in production: API key, role, rate limit in memory, log line, audit, metrics |
| mlflow-proxy, no audit | the same with `audit.to = "off"` |
| mlflow-proxy, bare | the same without any of these: it signs and forwards for anybody |
| Envoy, SigV4 filter | Envoy with its `aws_request_signing` filter, 2 threads, payload hashed, no access log |
| naive design | Flask on gunicorn (2 workers, 16 threads each), a new connection each time, botocore signing; no log |
| nginx, not signing | nginx as a plain reverse proxy, 2 workers, kept connections: the limit of a proxy here |
| no proxy at all | the load straight at the upstream: the limit of load and upstream themselves |

The upstream is an nginx that answers 300 bytes of JSON, refuses whatever is not signed, and reads a POST's body
whole before it answers.

## How to read it

- **req/s**: requests per second that wrk got answered, one thread, keeping its connections.
- **CPU µs**: CPU time of all the peer's processes for one request. It tells more than req/s: it does not
  depend on how load, proxy and upstream share the cores, and it is what a request costs.
- **p50, p99**: the time within which half, or 99 of 100, of the requests were answered. wrk sends the next request as
  soon as the last is answered, so at 32 and 256 connections these show a machine that is full.
- **failed**: answers of 400 and above, and connections that broke; all rounds together.
- **× Envoy, × naive, × bare**: req/s divided by theirs.
- **peak memory**: the largest process at its largest moment, after all loads and downloads (VmHWM); shared
  libraries are included. **grew by**: how much a process grew while the {size} streamed through.
- **CPU to start**: of all processes, until the first answer (for the proxy `/-/health`), and until
  they were idle again.

Figures of other machines differ; the ratios hold better. Run `make bench` for your own.

## Figures

{tables}
"""


def _goals(goals: Sequence[Goal]) -> Table:
    lines = [[goal.title, goal.asked, goal.measured, MARKS[goal.reached]] for goal in goals]
    return Table("Targets", ("", "target", "measured", ""), lines, texts=2)


def _load_tables(rows: Sequence[Row]) -> list[Table]:
    columns = ("", "req/s", "CPU µs", "p50 ms", "p99 ms", "failed", "× Envoy", "× naive", "× bare")
    loads = dict.fromkeys(row.load for row in rows)
    return [Table(load.label, columns, [_load_line(row) for row in rows if row.load == load]) for load in loads]


def _load_line(row: Row) -> list[str]:
    return [
        row.peer.title,
        f"{row.rate:,.0f}".replace(",", " "),
        f"{row.cpu:.0f}",
        f"{row.p50:.2f}",
        f"{row.p99:.2f}",
        str(row.failed),
        _times(row.to_envoy),
        _times(row.to_naive),
        _times(row.to_bare),
    ]


def _downloads(rows: Sequence[DownloadRow], facts: Facts) -> Table:
    columns = ("", "GB/s", "× no proxy", "CPU s", "grew by")
    lines = [
        [
            row.peer.title,
            f"{row.rate / 1e9:.2f}",
            _times(row.to_direct),
            f"{row.cpu:.2f}",
            f"{row.growth / 1e6:.1f} MB",
        ]
        for row in rows
    ]
    return Table(f"Download of {_size(facts.download_size)}, one caller", columns, lines)


def _sizes(rows: Sequence[SizeRow]) -> Table:
    columns = ("", "peak memory", "CPU to start", "until idle", "time to start")
    lines = [[row.peer.title, f"{row.peak / 1e6:.0f} MB", *_startup(row)] for row in rows]
    return Table("Memory and start", columns, lines)


def _startup(row: SizeRow) -> list[str]:
    return [f"{seconds:.2f} s" for seconds in (row.cpu, row.settled_cpu, row.wall)]


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def _size(size: int) -> str:
    return f"{size / 2**30:g} GiB" if size >= 1 << 30 else f"{size / 2**20:g} MiB"
