"""The endpoint that clients sign for: both modes on one port, told apart by the ARN header.

It stands where `<region>.experiments.sagemaker.aws` and `mlflow.sagemaker.<region>.app.aws` stand, and checks
what they check before anything reaches MLflow.
"""

from __future__ import annotations

from .asgi import ClientGone, Receive, Request, Scope, Send, read_request
from .data_plane import DataPlane, unless_gone
from .errors import AwsError, validation_error
from .journal import Entry
from .service import Service
from .targets import APP_HEADER, TRACKING_HEADER, Arn, Target


class Gate:
    """ASGI application of the data plane."""

    def __init__(self, service: Service, plane: DataPlane) -> None:
        self._targets = service.targets
        self._checker = service.checker
        self._journal = service.journal
        self._plane = plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, judge and answer one request."""
        try:
            request = await read_request(scope, receive)
        except ClientGone:
            return
        entry = self._journal.open("mlflow", request)
        await unless_gone(lambda: self._answer(request, entry, send), receive, entry)

    async def _answer(self, request: Request, entry: Entry, send: Send) -> None:
        try:
            target = self._admit(request, entry)
            await self._plane.serve(request, target, entry, send)
        except AwsError as error:
            await self._plane.refuse(error, entry, request, send)

    def _admit(self, request: Request, entry: Entry) -> Target:
        """The target, once signature and permission have been checked."""
        if not request.values("authorization"):
            raise AwsError("MissingAuthenticationTokenException", "Missing Authentication Token")
        arn = _target_arn(request)
        required = {arn.kind.header, "x-amz-content-sha256"}
        principal = self._checker.check(request, arn.kind.service, required)
        self._plane.permit(request, principal, arn, entry)
        target = self._targets.by_arn(arn.text)
        if target is None:
            raise AwsError("ResourceNotFoundException", f"Resource {arn.text} does not exist.", status=404)
        return target


def _target_arn(request: Request) -> Arn:
    values = [(name, value) for name, value in request.headers if name in (TRACKING_HEADER, APP_HEADER)]
    if len(values) != 1:
        stated = f"{len(values)} were given" if values else "none was given"
        raise validation_error(f"Exactly one of {TRACKING_HEADER} and {APP_HEADER} is needed; {stated}.")
    name, text = values[0]
    arn = Arn.parse(text)
    if arn is None or arn.kind.header != name:
        raise validation_error(f"Value '{text}' at '{name}' is not the ARN of a resource that this header names.")
    return arn
