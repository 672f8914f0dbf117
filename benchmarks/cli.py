"""The command line: `python -m benchmarks` compares, `python -m benchmarks profile` profiles the proxy."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from benchmarks import profiling, report
from benchmarks.load import LoadError, find_wrk
from benchmarks.machine import machine, programs
from benchmarks.peers import PEERS, ROOT, Peer
from benchmarks.processes import ServerError
from benchmarks.runner import Plan, measure

COMMAND = "make bench"


def _peers(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[Peer, ...]:
    if value is None:
        return PEERS
    known = {peer.key: peer for peer in PEERS}
    wanted = [key.strip() for key in value.split(",")]
    if unknown := [key for key in wanted if key not in known]:
        raise click.BadParameter(f"no peer {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[key] for key in wanted)


@click.group(invoke_without_command=True)
@click.option("--peers", callback=_peers, help="Only these, with commas between: " + ", ".join(p.key for p in PEERS))
@click.option("--quick", is_flag=True, help="Everything once and short: shows that it works, not how fast it is.")
@click.option("--seconds", type=click.FloatRange(0.1, 60), help="Length of each load on each peer. Default: 1.5")
@click.option("--rounds", type=click.IntRange(1, 50), help="How often each peer has its turn. Default: 3")
@click.option("--no-write", is_flag=True, help="Leave docs/performance.md as it is.")
@click.pass_context
def main(
    context: click.Context,
    *,
    peers: tuple[Peer, ...],
    quick: bool,
    seconds: float | None,
    rounds: int | None,
    no_write: bool,
) -> None:
    """Compare the proxy's speed and size with Envoy, nginx and the naive design, and write docs/performance.md."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended either way, the servers are ended too
    if context.invoked_subcommand is not None:
        return
    plan = make_plan(peers, quick=quick, seconds=seconds, rounds=rounds)
    facts = report.Facts(
        date=datetime.now(UTC).date().isoformat(),
        machine=machine(),
        programs=programs(),
        command=COMMAND,
        rounds=plan.rounds,
        seconds=plan.seconds,
        download_size=plan.download_size,
    )
    print(f"{facts.machine}\n{facts.programs}", flush=True)
    began = time.monotonic()
    results = measure(plan, lambda line: print(line, flush=True))
    for table in report.tables(results, facts):
        print(f"\n{report.as_text(table)}")
    print(f"\n{time.monotonic() - began:.0f} s; requests failed: {results.failed()}\n{report.disturbance(results)}")
    if no_write or quick or results.missing or len(peers) < len(PEERS):
        print("docs/performance.md is left as it was" + ("" if no_write else ": it takes a full run with all peers"))
        return
    for path in report.write(results, facts, ROOT / "docs"):
        print(f"wrote {path.relative_to(ROOT)}")


@main.command()
@click.option(
    "--load", "kind", type=click.Choice(["get", "post"]), default="get", help="Which request, at 32 connections."
)
@click.option("--seconds", type=click.IntRange(1, 300), default=10, show_default=True, help="How long to sample.")
@click.option("--native", is_flag=True, help="Frames of C and Rust too.")
def profile(kind: str, seconds: int, native: bool) -> None:
    """Sample the proxy under load with py-spy and write a speedscope file to .cache/."""
    path = profiling.profile(kind, seconds, native=native)
    print(f"wrote {path.relative_to(ROOT)}; open it at https://www.speedscope.app (it stays in the browser)")


def make_plan(peers: Sequence[Peer], *, quick: bool, seconds: float | None, rounds: int | None) -> Plan:
    """The full run, or the quick one; explicit options count for both."""
    if quick:
        return Plan(peers, rounds or 1, seconds or 0.25, warm_up=0.0, download_size=128 << 20, retakes=0)
    return Plan(peers, rounds or 3, seconds or 1.5)


def run() -> None:
    """Entry point: mistakes and interruptions end with one readable line."""
    try:
        find_wrk()
        main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (LoadError, ServerError) as error:
        sys.exit(f"benchmarks: {error}")
    except (KeyboardInterrupt, click.Abort):
        sys.exit("benchmarks: interrupted; everything started has been ended")
