"""Runs the gateway on Granian: listening, TLS, worker processes, restarts of workers that died, draining at the end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

from granian import Granian, _signals
from granian.constants import HTTPModes, Interfaces, Loops, RuntimeModes, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels

from mlflow_proxy import gateway, runtime  # workers are forked: what is imported before costs once
from mlflow_proxy.settings import CONFIG_VARIABLE, Settings

# Connections that the kernel holds while all workers are busy.
_BACKLOG = 2048
_STOPS = (signal.SIGINT, signal.SIGTERM)
# Granian's own log would go to standard output, which is the request log's.
_TO_STDERR = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "generic"}


def serve(settings: Settings, config: Path | None) -> None:
    """Serve until SIGINT or SIGTERM; `config` is the file that `settings` came from, read again by each worker."""
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config.resolve())
    server = settings.server
    _refuse_taken_address(server.host, server.port)
    lose_no_stop_while_forking()
    _end_workers_that_still_start()
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
        log_dictconfig={"handlers": dict.fromkeys(("console", "access"), _TO_STDERR)},
        ssl_cert=server.tls_certificate,
        ssl_key=server.tls_key,
        ssl_protocol_min=SSLProtocols.tls12,
        respawn_failed_workers=True,
        respawn_interval=1.0,
        workers_kill_timeout=int(server.drain_timeout),
    )
    with runtime.prepared(settings.oidc) as prepared:
        granian.serve(target_loader=partial(gateway.create_app, prepared, settings), wrap_loader=False)


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


def lose_no_stop_while_forking() -> None:
    """A worker that is told to stop before it has signal handlers of its own ends at once.

    Otherwise such a stop takes all of drain_timeout. A fresh child still has its parent's handlers, and Python drops
    what arrived before it has set the child up: so the signals wait until they have their usual effect there.
    """
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, _STOPS),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, _STOPS),
        after_in_child=_take_the_usual_signals,
    )


def _take_the_usual_signals() -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _end_workers_that_still_start() -> None:
    """Granian forgets a signal that arrives while the application starts, and would wait all of drain_timeout for it.

    Nothing has been served by then, so such a worker ends at once. Private, so a later Granian may lack it; then only
    this is lost.
    """
    original = getattr(_signals, "set_loop_signals", None)
    if original is None:
        return

    def set_loop_signals(loop: asyncio.AbstractEventLoop) -> Any:
        event = original(loop)
        for number in _STOPS:
            loop.add_signal_handler(number, _stop_worker, event)
        return event

    _signals.set_loop_signals = set_loop_signals


def _stop_worker(event: Any) -> None:
    if not gateway.serving.is_set():
        os._exit(0)
    event.set()
