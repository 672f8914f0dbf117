"""Step 7 of a request's way: connections to one target, pooled and bounded, with a deadline on every wait.

TLS is verified against the system's CAs or the target's own bundle. An outgoing HTTP proxy is used only where it is
configured; the environment's is ignored. What happens on a connection is `http1`'s business; whether to try again is
the sender's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import deque

from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.http1 import Connection, NotSent, UpstreamError
from mlflow_proxy.settings import Upstream as UpstreamSettings
from mlflow_proxy.targets import Target
from mlflow_proxy.tunnel import TunnelRefused, open_tunnel

# Callers wait for a place before they come here (`limits`), and there are no more places than connections. Only the
# proxy's own requests may find none free.
_MOST_WAITING = 64
# The resolver is sure that there is no such name, or no address for it, while EAI_AGAIN is the resolver's own trouble.
_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})


class NotConnected(NotSent):
    """No connection was made. `lasting`: the configuration, or what the upstream shows, has to change first."""

    def __init__(self, words: str, *, detail: str = "", lasting: bool = False) -> None:
        super().__init__(words, detail=detail)
        self.lasting = lasting


class Busy(UpstreamError):
    """All connections are in use, and too many requests wait already, or one waited too long."""


class Pool:
    """The connections of one worker to one target."""

    def __init__(self, target: Target, settings: UpstreamSettings, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._loop = asyncio.get_running_loop()
        self._endpoint = target.endpoint
        self._settings = settings
        self._tls = tls_context(target.ca_bundle) if target.endpoint.scheme == "https" else None
        self._idle: deque[Connection] = deque()  # the longest unused one stands left
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._open = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._found = False  # whether there ever was a connection, so that the name exists

    @property
    def connections(self) -> int:
        """How many are open, or being opened."""
        return self._open

    def take_idle(self) -> Connection | None:
        """A connection that served before, if there is one: the quick half of `acquire`."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
            self._open -= 1
        return None

    async def acquire(self, *, fresh: bool = False) -> Connection:
        """A connection for one exchange; give it back with `release`. Raises NotConnected or Busy.

        `fresh`: not one that served before, since such a one may have been closed by the upstream in this moment.
        """
        connection = None if fresh else self.take_idle()
        if connection is not None:
            return connection
        if self._open >= self._settings.connections and self._idle:
            self._discard(self._idle.popleft())
        if self._open < self._settings.connections:
            return await self._connect()
        handed_over = await self._wait_turn()
        if handed_over is not None and not fresh and handed_over.reusable:
            return handed_over
        if handed_over is not None:
            self._discard(handed_over)
        return await self._connect()

    def release(self, connection: Connection) -> None:
        """Take a connection back: whole exchanges let it serve again, anything else closes it."""
        if not connection.reusable or self._closed:
            connection.abort()
            self._open -= 1
            self._hand_over(None)
            return
        if self._waiting:
            self._hand_over(connection)
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._schedule_sweep(self._settings.keep_alive)

    def close(self) -> None:
        """Close unused connections now, and those in use as they come back."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        while self._idle:
            self._discard(self._idle.pop())

    def _discard(self, connection: Connection) -> None:
        connection.abort()
        self._open -= 1

    def _hand_over(self, connection: Connection | None) -> None:
        """Give a connection, or the right to open one, to the request that has waited longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                if connection is None:
                    self._open += 1  # reserved, so that nobody overtakes
                turn.set_result(connection)
                return
        if connection is not None:
            self.release(connection)

    async def _wait_turn(self) -> Connection | None:
        if len(self._waiting) >= _MOST_WAITING:
            raise Busy(
                f"all {self._settings.connections} connections are in use and {len(self._waiting)} requests wait"
            )
        turn: asyncio.Future[Connection | None] = self._loop.create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                connection = await turn
        except BaseException as error:
            self._give_up(turn)
            if isinstance(error, TimeoutError):
                raise Busy(f"no connection became free within {self._settings.connect_timeout:g} s") from None
            raise
        if connection is None:
            self._open -= 1  # the reservation; _connect counts for itself
        return connection

    def _give_up(self, turn: asyncio.Future[Connection | None]) -> None:
        """Nobody waits for this turn any more; what it was given in the same moment goes to the next one."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        if turn.cancelled() or not turn.done():
            return
        connection = turn.result()
        if connection is not None:
            self.release(connection)
        else:
            self._lost_one()

    async def _connect(self) -> Connection:
        self._open += 1
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                connection = await self._dial()
                self._found = True
                return connection
        except TimeoutError:
            error = NotConnected(f"no connection within {self._settings.connect_timeout:g} s")
        except UnicodeError:
            error = NotConnected("its host is not a DNS name; a label has at most 63 characters", lasting=True)
        except OSError as cause:
            error = _not_connected(cause, found_before=self._found)
        except BaseException:
            self._lost_one()
            raise
        self._lost_one()
        raise error

    def _lost_one(self) -> None:
        self._open -= 1
        self._hand_over(None)

    async def _dial(self) -> Connection:
        loop = self._loop
        host, port = self._endpoint.host, self._endpoint.port
        connection = Connection(loop, self._deadlines)
        if self._settings.proxy is not None:
            return await open_tunnel(self._settings.proxy, host, port, self._tls, connection)
        try:
            await loop.create_connection(
                lambda: connection, host, port, ssl=self._tls, server_hostname=host if self._tls else None
            )
        except BaseException:
            connection.abort()  # it may have been made in the moment in which the wait for it ended
            raise
        return connection

    def _schedule_sweep(self, delay: float) -> None:
        self._sweeper = self._loop.call_later(delay, self._sweep)

    def _sweep(self) -> None:
        """Close connections unused for a while, before the upstream does it in the middle of a request."""
        self._sweeper = None
        oldest = self._loop.time() - self._settings.keep_alive
        while self._idle and (self._idle[0].idle_since <= oldest or not self._idle[0].reusable):
            self._discard(self._idle.popleft())
        if self._idle:
            self._schedule_sweep(max(self._idle[0].idle_since - oldest, 0.05))


def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """Verifying TLS for upstreams: the system's CAs, or those in `ca_bundle`."""
    context = ssl.create_default_context(cafile=ca_bundle)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _not_connected(cause: OSError, *, found_before: bool) -> NotConnected:
    """What became of an attempt to connect; the texts of others, which name this network's hosts, as its detail.

    A name that exists nowhere is a mistake in the configuration, unless it was found before: then the resolver errs.
    """
    match cause:
        case TunnelRefused():
            return NotConnected(cause.words, detail=cause.detail, lasting=cause.lasting)
        case socket.gaierror():
            unknown = cause.errno in _NO_SUCH_NAME and not found_before
            return NotConnected("its name is not found", detail=str(cause.strerror or ""), lasting=unknown)
        case ssl.SSLCertVerificationError():
            return NotConnected("its TLS certificate is not trusted", detail=cause.verify_message, lasting=True)
        case ssl.SSLError():
            return NotConnected("the TLS handshake failed", detail=str(cause))
    if cause.errno and cause.errno > 0:
        return NotConnected(os.strerror(cause.errno).lower())
    return NotConnected("the connection failed", detail=str(cause) or type(cause).__name__)
