"""What happens to a request once the stand-in knows who sent it and for which target: permission, faults, relay.

Both entrances, signed calls and browser sessions, end here, so that they differ in nothing but how a caller
is recognised.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

from werkzeug.exceptions import NotFound

from .actions import action_of, as_mlflow_reads
from .asgi import ClientGone, Receive, Request, Send, error_answer, respond
from .errors import AwsError
from .identity import Principal
from .journal import Entry
from .relay import Relay
from .service import Service
from .targets import Arn, Target

_PRESIGNED = re.compile(r"/(ajax-)?api/2\.0/mlflow/artifacts/presigned-(upload|download)-url")
# What MLflow answers where it has no route.
_NO_ROUTE = NotFound()
# Seconds that work may take to end after its caller has closed the connection.
_ENDING = 0.2


class DataPlane:
    """Serves admitted requests of all targets."""

    def __init__(self, service: Service, relay: Relay) -> None:
        self._service = service
        self._relay = relay

    def permit(self, request: Request, principal: Principal, arn: Arn, entry: Entry) -> None:
        """Raise AccessDeniedException unless the principal may make this call; the journal learns both."""
        action, resource = action_of(arn, request.method, request.path)
        entry.action = action
        entry.identify(principal)
        self._service.directory.authorize(principal, action, resource, arn.account)

    async def serve(self, request: Request, target: Target, entry: Entry, send: Send) -> None:
        """Answer a permitted request, or break as a fault wants."""
        entry.target = target.name
        fault = self._service.faults.take("mlflow", request.method, request.path, target.name)
        entry.verdict = "allowed"
        if fault is not None:
            entry.fault = str(fault)
            await asyncio.sleep(fault.latency)
            refusal = fault.refusal()
            if refusal is not None:
                raise refusal
        if not target.running:
            message = f"Tracking server {target.arn.text} is not in service: its status is {target.status}."
            raise AwsError("ServiceUnavailableException", message, status=503)
        if not self._service.features.presigned_artifacts and _PRESIGNED.fullmatch(as_mlflow_reads(request.path)):
            await self._answer_no_route(request, entry, send)
            return
        entry.status = await self._relay.forward(request, target, fault, send)

    async def _answer_no_route(self, request: Request, entry: Entry, send: Send) -> None:
        entry.status = 404
        headers = [("content-type", "text/html; charset=utf-8"), ("date", self._service.clock.http_date())]
        await respond(send, 404, headers, _NO_ROUTE.get_body().encode(), head=request.method == "HEAD")

    async def refuse(self, error: AwsError, entry: Entry, request: Request, send: Send) -> None:
        """Answer an error in AWS's shape and note it."""
        if entry.verdict != "allowed":
            entry.verdict = error.type
        entry.reason, entry.status = error.reason, error.status
        headers, body = error_answer(error, self._service.clock.http_date())
        await respond(send, error.status, headers, body, head=request.method == "HEAD")


async def unless_gone(work: Callable[[], Awaitable[None]], receive: Receive, entry: Entry) -> None:
    """Do `work`, but stop when the caller closes its connection first, as a service would notice it.

    A caller may close as soon as it has the whole answer. That is not leaving; the work then ends by itself, at once.
    """
    doing = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            await asyncio.wait({doing}, timeout=_ENDING)
        if not doing.done():
            entry.verdict = "abandoned"
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
            return
        doing.result()
    except ClientGone:
        entry.verdict = "abandoned"
    finally:
        leaving.cancel()
        doing.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
