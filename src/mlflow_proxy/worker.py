"""One worker process: an event loop in which callers' connections, the gateway and SageMaker's connections live."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
from pathlib import Path

import uvloop

from mlflow_proxy.gateway import Gateway
from mlflow_proxy.inbound.connection import Connection, Terms
from mlflow_proxy.inbound.listener import PROTOCOLS, Listener
from mlflow_proxy.settings import Server
from mlflow_proxy.supervisor import Lifelines

logger = logging.getLogger(__name__)


def work(gateway: Gateway, server: Server, listening: socket.socket, tls: Path | None, lifelines: Lifelines) -> int:
    """Serve until SIGTERM, or until the main process is gone. Gives the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(gateway, server, listening, tls, lifelines))


async def _serve(
    gateway: Gateway, server: Server, listening: socket.socket, tls: Path | None, lifelines: Lifelines
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_reader(lifelines.supervisor, stop.set)
    try:
        await gateway.start()
    except Exception:
        logger.exception("start-up failed")
        return 1
    terms = Terms(
        head_limit=int(server.header_limit) + int(server.url_limit) + 64 * server.header_count_limit,
        unused=server.header_timeout,
        head=server.header_timeout,
        window=server.body_timeout,
        most_headers=server.header_count_limit,
    )
    listener = Listener(
        listening,
        connection=lambda lost: Connection(loop, gateway.deadlines, terms, gateway, lost),
        most=server.connections,
        tls=_tls(tls) if tls else None,
    )
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    listener.start()
    os.write(lifelines.ready, b"1")
    os.close(lifelines.ready)
    await stop.wait()
    loop.remove_reader(lifelines.supervisor)
    await listener.stop(server.drain_timeout)
    await gateway.stop()
    return 0


def _tls(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(PROTOCOLS)
    context.load_cert_chain(path)
    return context
