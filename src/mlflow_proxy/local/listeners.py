"""The event loop of the stand-in, in a thread of its own, and the ports it listens on."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvicorn

Result = TypeVar("Result")


class Listeners:
    """Runs ASGI applications on ports of one host until stopped."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-sagemaker", daemon=True)
        self._servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def call(self, make: Callable[[], Result]) -> Result:
        """Call a function on the loop, for what must be made there."""

        async def called() -> Result:
            return make()

        return self.run(called())

    def bind(self, port: int = 0, *, loopback: bool = False) -> socket.socket:
        """A port to listen on; 0 takes a free one. Raises OSError when the port is taken."""
        host = "127.0.0.1" if loopback else self._host
        # With the protocol named, asyncio sets TCP_NODELAY; without it, every answer takes 40 ms longer.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        return bound

    def serve(self, app: Any, bound: socket.socket) -> None:
        """Serve `app` on a bound port from now on."""
        self.run(self._serve(app, bound))

    async def _serve(self, app: Any, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            http="httptools",
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.005)
            if task.done():
                task.result()
        self._servers.append((server, task))

    def stop(self) -> None:
        """Close all ports, end what is under way after a second, and end the loop."""
        if not self._thread.is_alive():
            return
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.gather(*(task for _, task in self._servers), return_exceptions=True)
        self._servers.clear()


def address(bound: socket.socket) -> str:
    """`http://host:port` of a bound port."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
