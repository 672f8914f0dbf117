"""SageMaker's API for MLflow, as far as a proxy and its users need it: presigned URLs, describe, list, start, stop.

The JSON 1.1 protocol that botocore's `sagemaker` client speaks. Names are those of the caller's account.
Source: the SageMaker API reference and botocore's service model.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .asgi import ClientGone, Receive, Request, Scope, Send, read_request, respond
from .errors import AwsError, validation_error
from .identity import Principal
from .journal import Entry
from .service import Service
from .targets import Arn, Kind, Target

Body = dict[str, Any]
_PREFIX = "SageMaker."


@dataclass(frozen=True)
class _Operation:
    """An API operation on one target, or on all of a kind."""

    kind: Kind
    act: Callable[[Principal, Target, Body], Body] | None = None


class ControlPlane:
    """ASGI application of the SageMaker API."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._checker = service.checker
        self._operations = {
            "CreatePresignedMlflowTrackingServerUrl": _Operation(Kind.TRACKING, self._presign),
            "CreatePresignedMlflowAppUrl": _Operation(Kind.APP, self._presign),
            "DescribeMlflowTrackingServer": _Operation(Kind.TRACKING, _describe_server),
            "DescribeMlflowApp": _Operation(Kind.APP, _describe_app),
            "ListMlflowTrackingServers": _Operation(Kind.TRACKING),
            "ListMlflowApps": _Operation(Kind.APP),
            "StartMlflowTrackingServer": _Operation(Kind.TRACKING, _start),
            "StopMlflowTrackingServer": _Operation(Kind.TRACKING, _stop),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one API call."""
        try:
            request = await read_request(scope, receive)
        except ClientGone:
            return
        entry = self._service.journal.open("sagemaker", request)
        try:
            answer, entry.status = await self._answer(request, entry), 200
        except AwsError as error:
            # JSON services answer errors of the caller with 400, refused signatures included.
            entry.status = error.status if error.status == 429 or error.status >= 500 else 400
            if entry.verdict != "allowed":
                entry.verdict = error.type
            entry.reason = error.reason
            answer = {"__type": error.type, "message": error.message}
        headers = [
            ("content-type", "application/x-amz-json-1.1"),
            ("x-amzn-requestid", str(uuid.uuid4())),
            ("date", self._service.clock.http_date()),
        ]
        await respond(send, entry.status, headers, json.dumps(answer).encode())

    async def _answer(self, request: Request, entry: Entry) -> Body:
        principal = self._checker.check(request, "sagemaker", {"x-amz-target"})
        name = (request.value("x-amz-target") or "").removeprefix(_PREFIX)
        entry.identify(principal)
        entry.action = f"sagemaker:{name}"
        operation = self._operations.get(name)
        if operation is None:
            raise AwsError("UnknownOperationException", f"{name} is not offered by the local SageMaker.", status=400)
        body = _parse(request.body)
        target = self._permit(operation, entry.action, principal, body)
        entry.verdict = "allowed"
        await self._meet_fault(request, entry)
        if operation.act is None or target is None:
            return self._list(operation.kind, principal, body)
        return operation.act(principal, target, body)

    def _permit(self, operation: _Operation, action: str, principal: Principal, body: Body) -> Target | None:
        """The target that a call is about, None for a list; raises AwsError if it is denied or missing."""
        if operation.act is None:
            self._service.directory.authorize(principal, action, "*", principal.account)
            return None
        arn = self._named(operation.kind, principal, body)
        self._service.directory.authorize(principal, action, arn.text, arn.account)
        target = self._service.targets.by_arn(arn.text)
        if target is None:
            raise AwsError("ResourceNotFound", f"Resource {arn.text} does not exist.", status=400)
        return target

    def _named(self, kind: Kind, principal: Principal, body: Body) -> Arn:
        field = "Arn" if kind is Kind.APP else "TrackingServerName"
        value = body.get(field)
        if not isinstance(value, str) or not value:
            raise _constraint(value, field, "Member must not be null")
        text = (
            value
            if kind is Kind.APP
            else f"arn:aws:sagemaker:{self._service.region}:{principal.account}:{kind.value}/{value}"
        )
        arn = Arn.parse(text)
        if arn is None or arn.kind is not kind:
            raise _constraint(value, field, "Member must satisfy regular expression pattern")
        return arn

    async def _meet_fault(self, request: Request, entry: Entry) -> None:
        fault = self._service.faults.take("sagemaker", request.method, request.path)
        if fault is None:
            return
        entry.fault = str(fault)
        await asyncio.sleep(fault.latency)
        refusal = fault.refusal()
        if refusal is not None:
            raise refusal

    def _presign(self, principal: Principal, target: Target, body: Body) -> Body:
        expires = _bounded(body, "ExpiresInSeconds", 5, 300, default=300)
        session = _bounded(body, "SessionExpirationDurationInSeconds", 1800, 43200, default=43200)
        return {"AuthorizedUrl": self._service.sessions.presign(principal, target, expires, session)}

    def _list(self, kind: Kind, principal: Principal, body: Body) -> Body:
        """All of the caller's account, sorted and paged as asked."""
        summarize = _server_summary if kind is Kind.TRACKING else _app_summary
        found = [t for t in self._service.targets if t.arn.kind is kind and t.arn.account == principal.account]
        wanted = body.get("TrackingServerStatus") or body.get("Status")
        found = [target for target in found if wanted in (None, target.status)]
        by_name = body.get("SortBy") == "Name"
        found.sort(key=lambda target: target.name if by_name else target.created.isoformat())
        if body.get("SortOrder", "Descending") == "Descending":
            found.reverse()
        start = int(body.get("NextToken") or 0)
        end = start + _bounded(body, "MaxResults", 1, 100, default=10)
        field = "TrackingServerSummaries" if kind is Kind.TRACKING else "Summaries"
        more = {"NextToken": str(end)} if end < len(found) else {}
        return {field: [summarize(target) for target in found[start:end]], **more}


def _parse(body: bytes) -> Body:
    try:
        parsed = json.loads(body or b"{}")
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise AwsError("SerializationException", "The body is not a JSON object.", status=400)
    return parsed


def _bounded(body: Body, name: str, least: int, most: int, *, default: int) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise AwsError("SerializationException", f"{name} is not an integer.", status=400)
    if value < least:
        raise _constraint(value, name, f"Member must have value greater than or equal to {least}")
    if value > most:
        raise _constraint(value, name, f"Member must have value less than or equal to {most}")
    return value


def _constraint(value: object, name: str, constraint: str) -> AwsError:
    shown = "null" if value is None else f"'{value}'"
    place = name[0].lower() + name[1:]
    return validation_error(
        f"1 validation error detected: Value {shown} at '{place}' failed to satisfy constraint: {constraint}"
    )


def _start(_: Principal, target: Target, _body: Body) -> Body:
    return _move(target, "Start", "Started", possible=not target.running)


def _stop(_: Principal, target: Target, _body: Body) -> Body:
    return _move(target, "Stop", "Stopped", possible=target.running)


def _move(target: Target, verb: str, status: str, *, possible: bool) -> Body:
    """Start or stop at once, where the service takes many minutes."""
    if not possible:
        message = f"Cannot {verb.lower()} tracking server {target.arn.resource} in status {target.status}."
        raise AwsError("ConflictException", message, status=400)
    target.move(status)
    return {"TrackingServerArn": target.arn.text}


def _times(target: Target) -> Body:
    return {"CreationTime": target.created.timestamp(), "LastModifiedTime": target.modified.timestamp()}


def _server_summary(target: Target) -> Body:
    return {
        "TrackingServerArn": target.arn.text,
        "TrackingServerName": target.arn.resource,
        "TrackingServerStatus": target.status,
        "IsActive": "Active" if target.running else "Inactive",
        "MlflowVersion": target.mlflow_version,
        **_times(target),
    }


def _app_summary(target: Target) -> Body:
    return {
        "Arn": target.arn.text,
        "Name": target.name,
        "Status": target.status,
        "MlflowVersion": target.mlflow_version,
        **_times(target),
    }


def _describe_server(_: Principal, target: Target, _body: Body) -> Body:
    return {
        **_server_summary(target),
        "ArtifactStoreUri": target.artifact_root,
        "TrackingServerSize": "Small",
        "TrackingServerUrl": target.ui_origin,
        "RoleArn": f"arn:aws:iam::{target.arn.account}:role/mlflow-service",
        "WeeklyMaintenanceWindowStart": "Sun:03:00",
        "AutomaticModelRegistration": False,
    }


def _describe_app(_: Principal, target: Target, _body: Body) -> Body:
    return {
        **_app_summary(target),
        "ArtifactStoreUri": target.artifact_root,
        "RoleArn": f"arn:aws:iam::{target.arn.account}:role/mlflow-service",
        "ModelRegistrationMode": "AutoModelRegistrationDisabled",
        "AccountDefaultStatus": "DISABLED",
        "WeeklyMaintenanceWindowStart": "Sun:03:00",
    }
