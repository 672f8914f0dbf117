"""Serves: one listening socket, and worker processes that share it."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

from mlflow_proxy import gateway, runtime, worker  # workers are forked: what is imported before costs once
from mlflow_proxy.configuration import SettingsError
from mlflow_proxy.file_limit import raise_file_limit, warn_of_low_limit
from mlflow_proxy.reloads import InForce
from mlflow_proxy.settings import Settings
from mlflow_proxy.supervisor import Lifelines, Supervisor

# Connections that the kernel holds while all workers are busy.
_BACKLOG = 2048


def serve(settings: Settings, config: Path | None) -> None:
    """Serve until SIGINT or SIGTERM; `config` is the file that `settings` came from, read again at SIGHUP."""
    logging.basicConfig(level=settings.log.level.upper(), format=gateway.LOG_FORMAT)
    files = raise_file_limit()
    server = settings.server
    with runtime.prepared() as prepared:
        try:
            in_force = InForce(settings, prepared, config.resolve() if config else None, files)
        except SettingsError as error:
            raise SystemExit(f"Error: {error}") from None
        listening = _listen(server.host, server.port)
        warn_of_low_limit(settings, files, in_force.connections)

        def work(lifelines: Lifelines) -> int:
            fitted, application = in_force.application()
            return worker.work(application, fitted.server, listening, in_force.tls, lifelines)

        Supervisor(
            work,
            count=server.workers,
            drain=server.drain_timeout,
            reload=in_force.try_reload,
            stopping=listening.close,
        ).run()


def _listen(host: str, port: int) -> socket.socket:
    """Exits with the reason if another process has the address; of several that start at once one gets it."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # Else closed connections of the last run would keep it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise SystemExit(f"Error: cannot listen on {host}:{port} (server.host, server.port): {error}") from None
    return listening
