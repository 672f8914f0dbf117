"""The request's way from a caller to SageMaker MLflow and back, step by step, each step a module of its own."""

from __future__ import annotations

import asyncio

from mlflow_proxy.bodies import Bodies, Receive
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.relay import Send, downstream_headers, relay, send_whole
from mlflow_proxy.requests import Request
from mlflow_proxy.routing import Routes
from mlflow_proxy.sending import Sender
from mlflow_proxy.signing import NO_PAYLOAD, Payload
from mlflow_proxy.telemetry.record import Record

# Bodies from this size on are hashed in a thread, lest all other requests wait for it.
_LARGE = 1 << 20


class Forwarder:
    """Forwards the requests of one worker."""

    def __init__(
        self, routes: Routes, bodies: Bodies, sender: Sender, deadlines: Deadlines, *, idle_timeout: float
    ) -> None:
        self._routes = routes
        self._bodies = bodies
        self._sender = sender
        self._deadlines = deadlines
        self._idle_timeout = idle_timeout

    async def __call__(self, request: Request, receive: Receive, send: Send, record: Record) -> None:
        """Serve one request. Raises Refusal as long as nothing was sent to the caller, afterwards UpstreamError."""
        # 1 transform: `requests` did it while it read the request, for the gateway to tell whose it is.
        # 2 route
        route = self._routes.find(request.path, request.query)
        record.target = route.target.name
        # 3 identify and 4 authorize come here; without them the proxy listens on loopback only (`mistakes`).
        # 5 limit
        data = await self._bodies.collect(request, receive) if request.has_body else b""
        record.bytes_in = len(data)
        try:
            # 6 sign, 7 send
            body = Payload.of(data) if len(data) < _LARGE else await asyncio.to_thread(Payload.of, data)
            answer = await self._sender.send(route.target, request, route.path, body, record)
        finally:
            self._bodies.release(len(data))
            data, body = b"", NO_PAYLOAD  # a long answer must not hold them
        # 8 relay
        try:
            if answer.error is not None:
                raise answer.error.refusal()
            headers = downstream_headers(answer.headers, route.target.endpoint, route.prefix)
            headers.append((b"x-request-id", record.request_id.encode("ascii")))
            record.status = answer.status
            if answer.connection is None:
                record.add_bytes_out(len(answer.body))
                await send_whole(send, answer.status, headers, answer.body)
                return
            await relay(
                answer.connection,
                answer.body,
                send,
                headers,
                deadlines=self._deadlines,
                between=self._idle_timeout,
                sent=record.add_bytes_out,
            )
        finally:
            if answer.connection is not None:
                self._sender.done(route.target, answer.connection)
        # 9 record: the gateway does it, whatever became of the request.
