"""Runs the gateway on Granian: listening, TLS, worker processes, restarts of workers that died, draining at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from granian import Granian, _signals
from granian.constants import HTTPModes, Interfaces, Loops, RuntimeModes, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server import mp
from granian.server.common import AbstractServer

from mlflow_proxy import gateway, runtime  # workers are forked: what is imported before costs once
from mlflow_proxy.configuration import SettingsError
from mlflow_proxy.file_limit import raise_file_limit, warn_of_low_limit
from mlflow_proxy.reloads import InForce, Reloads
from mlflow_proxy.settings import Server, Settings

# Connections that the kernel holds while all workers are busy.
_BACKLOG = 2048
# Of an address that seems taken, some in the course of a quarter of a second.
_ADDRESS_TRIES = 4
_STOPS = (signal.SIGINT, signal.SIGTERM)
# Whether this process, a worker, was told to stop.
_stopping = threading.Event()
# Granian's own log would go to standard output, which is the request log's.
_TO_STDERR = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "generic"}


def serve(settings: Settings, config: Path | None) -> None:
    """Serve until SIGINT or SIGTERM; `config` is the file that `settings` came from, read again at SIGHUP."""
    logging.basicConfig(level=settings.log.level.upper(), format=gateway.LOG_FORMAT)
    address = _take_address(settings.server.host, settings.server.port)
    lose_no_stop_while_forking()
    _end_workers_that_still_start()
    trust_no_worker_to_live_that_is_gone()
    files = raise_file_limit()
    with address, runtime.prepared() as prepared:
        try:
            in_force = InForce(settings, prepared, config.resolve() if config else None, files)
        except SettingsError as error:
            raise SystemExit(f"Error: {error}") from None
        warn_of_low_limit(settings, files, in_force.connections)
        granian = _granian(settings.server, in_force.connections, in_force.tls)
        granian.on_startup(Reloads(in_force).begin)
        granian.serve(target_loader=in_force.application, wrap_loader=False)


def _granian(server: Server, connections: int, tls: Path | None) -> AbstractServer[Any]:
    return Granian(
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
        backpressure=connections,
        http1_settings=HTTP1Settings(header_read_timeout=int(server.header_timeout * 1000)),
        http2_settings=HTTP2Settings(
            max_concurrent_streams=128, max_headers_size=2 * int(server.header_limit), keep_alive_interval=30_000
        ),
        log_level=LogLevels.warning,
        log_dictconfig={"handlers": dict.fromkeys(("console", "access"), _TO_STDERR)},
        ssl_cert=tls,
        ssl_key=tls,
        ssl_protocol_min=SSLProtocols.tls12,
        respawn_failed_workers=True,
        respawn_interval=1.0,
        workers_kill_timeout=int(server.drain_timeout),
    )


def _take_address(host: str, port: int) -> socket.socket:
    """Keep an address for this process and its workers, until the socket is closed. Exits with the reason if another
    process has it.

    Granian shares its port with every process of the same user that asks to (SO_REUSEPORT), so a proxy started twice
    would run twice, each taking some of the requests. This socket is bound without sharing, which the kernel grants to
    one process only, and stays bound; then it lets the workers join. It never accepts a connection.
    """
    for _ in range(_ADDRESS_TRIES):
        try:
            return _bind_exclusively(host, port)
        except OSError as error:
            reason = error
        time.sleep(random.uniform(0.02, 0.2))  # noqa: S311  # two that listen in the same instant both fail
    raise SystemExit(f"Error: cannot listen on {host}:{port} (server.host, server.port): {reason}")


def _bind_exclusively(host: str, port: int) -> socket.socket:
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else closed connections of the last run keep it
        held.bind((host, port))
        held.listen()  # what decides between processes that have bound it at the same time
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.shutdown(socket.SHUT_RD)  # listens no more, and stays bound
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        held.close()
        raise
    return held


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A terminal sends Ctrl-C to workers, too. The main process stops them then, in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
        loop.add_signal_handler(signal.SIGTERM, _stop_worker, event)
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return event

    _signals.set_loop_signals = set_loop_signals


def _stop_worker(event: Any) -> None:
    if not gateway.serving.is_set():
        os._exit(0)
    if not _stopping.is_set():  # Granian's event, set twice, may hang for ever
        _stopping.set()
        event.set()


def trust_no_worker_to_live_that_is_gone() -> None:
    """Let a stop say that it kills a worker only where it does.

    Granian waits for each worker in two threads. The one to which the kernel does not give the exit code takes the
    worker for alive until the other has noted it, "kills" it and says so. Private, so a later Granian may lack it.
    """
    worker = getattr(mp, "WorkerProcess", None)
    if worker is None:
        return
    is_alive = worker.is_alive
    worker.is_alive = lambda self: is_alive(self) and _exists(self.inner.pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
