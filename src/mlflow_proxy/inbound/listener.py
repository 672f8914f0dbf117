"""Accepts callers' connections on a socket that all workers share, no more than there may be, and ends them."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import time
from collections.abc import Callable

from mlflow_proxy.inbound.connection import HANDSHAKE_SECONDS, Connection

logger = logging.getLogger(__name__)

# What a caller is offered in TLS; HTTP/2 ends at the load balancer.
PROTOCOLS = ["http/1.1"]
# Seconds without accepting after the system had no file or memory left, and between two lines about that.
_PAUSE = 0.2
_REMIND = 60.0
_OUT_OF_SOMETHING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# Seconds for which a listener that leaves still serves what arrives on kept connections.
_GRACE = 1.0
# Connections that it takes from the kernel's queue before it leaves.
_MOST_AT_THE_END = 1024


class Listener:
    """The connections of one worker. `most` is how many it holds at once; further ones wait in the kernel."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        connection: Callable[[Callable[[Connection], None]], Connection],
        most: int,
        tls: ssl.SSLContext | None,
    ) -> None:
        """`connection` makes one; it is given what to call when it is lost."""
        self._listening = listening
        self._connection = connection
        self._most = most
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._open: set[Connection] = set()
        self._shaking: set[asyncio.Task[None]] = set()
        self._accepting = False
        self._leaving = False
        self._all_gone: asyncio.Future[None] | None = None
        self._told = -_REMIND

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def start(self) -> None:
        """Accept from now on."""
        self._listening.setblocking(False)
        self._resume()

    async def stop(self, seconds: float) -> None:
        """Accept no more; let requests under way finish, for so many seconds at the most.

        What waits in the kernel by then is accepted. What is asked on kept connections in the first moment is served,
        too, and its answer says that the connection ends.
        """
        deadline = self._loop.time() + seconds
        for _ in range(_MOST_AT_THE_END):
            if not self._accept_one():
                break
        self._pause()
        self._leaving = True
        self._listening.close()
        for connection in self._open:
            connection.leave()
        await self._wait_until_gone(min(deadline, self._loop.time() + _GRACE))
        for connection in list(self._open):
            connection.end()
        await self._wait_until_gone(deadline)
        if self._open:
            logger.warning("%d connections were cut, since drain_timeout is over", len(self._open))
        for connection in list(self._open):
            connection.abort()

    async def _wait_until_gone(self, deadline: float) -> None:
        if self._open:
            self._all_gone = self._loop.create_future()
            timer = self._loop.call_at(deadline, self._note_gone)
            await self._all_gone
            timer.cancel()

    def _note_gone(self) -> None:
        if self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    # Accepting

    def _resume(self) -> None:
        if not (self._accepting or self._leaving):
            self._accepting = True
            self._loop.add_reader(self._listening, self._accept_one)

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listening)

    def _accept_one(self) -> bool:
        """One at a time, so that the worker with less to do takes the next."""
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            if error.errno in _OUT_OF_SOMETHING:
                self._pause()
                self._loop.call_later(_PAUSE, self._resume)
                self._tell("cannot accept a connection (%s); trying again", error.strerror)
            return False
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._connection(self._lost)
        self._open.add(connection)
        if self._leaving:
            connection.leave()
        task = self._loop.create_task(self._take(accepted, connection))
        self._shaking.add(task)
        task.add_done_callback(self._taken)
        if self.connections >= self._most:
            self._pause()
            self._tell(
                "all %d connections of callers that this worker may hold are in use; further ones wait", self._most
            )
        return True

    async def _take(self, accepted: socket.socket, connection: Connection) -> None:
        try:
            if self._tls is None:
                await self._loop.connect_accepted_socket(lambda: connection, accepted)
            else:
                await self._loop.connect_accepted_socket(
                    lambda: connection, accepted, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_SECONDS
                )
        except (OSError, TimeoutError) as error:  # a handshake that came to nothing
            logger.debug("a connection was not made: %s", error)
            self._lost(connection)
            accepted.close()

    def _taken(self, task: asyncio.Task[None]) -> None:
        self._shaking.discard(task)

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if self.connections < self._most:
            self._resume()
        if not self._open:
            self._note_gone()

    def _tell(self, line: str, *values: object) -> None:
        now = time.monotonic()
        if now - self._told >= _REMIND:
            self._told = now
            logger.warning(line, *values)
