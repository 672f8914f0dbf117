"""Runs the gateway on Granian: listening, TLS, worker processes, restarts of workers that died, draining at the end."""

from __future__ import annotations

import os
import resource
import signal
import socket
from functools import partial
from pathlib import Path

from granian import Granian
from granian.constants import HTTPModes, Interfaces, Loops, RuntimeModes, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels

from mlflow_proxy import gateway, portal, readiness
from mlflow_proxy.settings import CONFIG_VARIABLE, Settings

# Workers are forked: what is imported here costs its time once and its memory once.
_PRELOADED = (gateway, portal, readiness)

# Connections that the kernel holds while all workers are busy.
_BACKLOG = 2048


def serve(settings: Settings, config: Path | None) -> None:
    """Serve until SIGINT or SIGTERM; `config` is the file that `settings` came from, read again by each worker."""
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config.resolve())
    server = settings.server
    _refuse_taken_address(server.host, server.port)
    os.register_at_fork(after_in_child=_forget_the_parents_signals)
    _raise_file_limit()
    granian = Granian(
        "mlflow_proxy.gateway",
        address=server.host,
        port=server.port,
        interface=Interfaces.ASGI,
        workers=server.workers,
        runtime_mode=RuntimeModes.st,
        loop=Loops.uvloop,
        http=HTTPModes.auto,
        websockets=False,
        backlog=_BACKLOG,
        backpressure=server.connections,
        http1_settings=HTTP1Settings(header_read_timeout=int(server.header_timeout * 1000)),
        http2_settings=HTTP2Settings(
            max_concurrent_streams=128, max_headers_size=2 * int(server.header_limit), keep_alive_interval=30_000
        ),
        log_level=LogLevels.warning,
        ssl_cert=server.tls_certificate,
        ssl_key=server.tls_key,
        ssl_protocol_min=SSLProtocols.tls12,
        respawn_failed_workers=True,
        respawn_interval=1.0,
        workers_kill_timeout=int(server.drain_timeout),
    )
    granian.serve(target_loader=partial(gateway.create_app, settings), wrap_loader=False)


def _raise_file_limit() -> None:
    """Every connection is an open file, and the usual limit of 1024 is for programs that never raise it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _refuse_taken_address(host: str, port: int) -> None:
    """Exit with the reason if somebody listens there already.

    Granian shares its port with whoever else asks to (SO_REUSEPORT): a proxy started twice would run twice, each taking
    some of the requests.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise SystemExit(f"Error: cannot listen on {host}:{port} (server.host, server.port): {error}") from None


def _forget_the_parents_signals() -> None:
    """Until a new worker has signal handlers of its own, it would swallow SIGTERM with those it got from its parent.

    A stop in that moment would then take all of drain_timeout.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
