"""The request's way from a caller to SageMaker MLflow and back, step by step, each step a module of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from mlflow_proxy.access import graphql
from mlflow_proxy.access.actions import Action, action_of
from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.identity import Identity
from mlflow_proxy.access.policy import UNKNOWN_PREFIX, Decision, Policy
from mlflow_proxy.bodies import Bodies, Body
from mlflow_proxy.errors import Refusal
from mlflow_proxy.inbound.connection import Call
from mlflow_proxy.json_bounds import LARGEST_ON_LOOP
from mlflow_proxy.limits import OWN_PAGES, Limits
from mlflow_proxy.relay import downstream_headers, protected, relay
from mlflow_proxy.requests import Request, refuse_foreign
from mlflow_proxy.routing import Route, Routes
from mlflow_proxy.sending import Answer, Sender
from mlflow_proxy.signing import Payload
from mlflow_proxy.telemetry.record import Record
from mlflow_proxy.telemetry.resources import LARGEST_BODY, Resources, resources_of

T = TypeVar("T")


class Forwarder:
    """Forwards the requests of one worker."""

    def __init__(
        self,
        *,
        identity: Identity,
        routes: Routes,
        policy: Policy,
        limits: Limits,
        bodies: Bodies,
        sender: Sender,
        audited: bool,
        idle_timeout: float,
    ) -> None:
        self._identity = identity
        self._routes = routes
        self._policy = policy
        self._limits = limits
        self._bodies = bodies
        self._sender = sender
        self._audited = audited
        self._idle_timeout = idle_timeout

    async def __call__(self, request: Request, call: Call, record: Record) -> None:
        """Serve one request. Raises Refusal as long as nothing was sent to the caller, afterwards UpstreamError."""
        # 1 transform: `requests` did it while it read the request, for the gateway to tell whose it is.
        # 2 identify, before anything of the configuration shows
        record.step("identify")
        caller = await self._identity.identify(request, record)
        # 3 route, 4 authorize
        try:
            route, action, decision = self._judge(caller, request, record)
        except Refusal:
            await _settled(self._limits.check(caller, None, OWN_PAGES))  # what is refused counts, too
            raise
        target = route.target.name
        # 5 limit: the rate, the body, and a place among the target's requests
        record.step("limit")
        record.role = decision.role if decision else ""
        await _settled(self._limits.check(caller, record.role or None, target))
        limit = graphql.BODY_LIMIT if decision is None else None
        body = await self._bodies.collect(request, call.receive, limit=limit) if request.has_body else self._bodies.none
        record.bytes_in = len(body)
        try:
            if decision is None:
                decision = await self._by_body(caller, target, request, body, record)
                record.role = decision.role
                await _settled(self._limits.check_role(record.role or None))
            if decision.session is not None:  # a wait for STS must hold no place
                await self._sender.prepare(route.target, decision.session)
            pending = self._limits.enter(caller, target)
            if pending is not None:
                waiting = time.perf_counter()
                await pending
                record.limit = f"waited {(time.perf_counter() - waiting) * 1000:.0f} ms"
        except BaseException:
            body.release()
            raise
        answer: Answer | None = None
        try:
            # 6 sign, 7 send
            try:
                payload = await self._prepared(request, route.path, action, body, record)
                answer = await self._sender.send(route.target, request, route.path, payload, record, decision.session)
            finally:
                body.release()  # a long answer must not hold it
            # 8 relay
            record.step("relay")
            await self._relay(answer, route, request.path, call, record)
        finally:
            if answer is not None and answer.connection is not None:
                self._sender.done(route.target, answer.connection)
            self._limits.leave(target, throttled=record.throttled, answered=answer is not None)
        # 9 record: the gateway does it, whatever became of the request.

    def _judge(self, caller: Caller, request: Request, record: Record) -> tuple[Route, Action, Decision | None]:
        """Where the request goes, what it does there, and by which role it may; None: its body has to tell."""
        route = self._routes.find(request.path, request.query, lambda: self._policy.visible(caller))
        record.target = route.target.name
        record.step("authorize")
        action = action_of(request.method, route.path)
        record.action, record.route, record.writes = action.name, action.template, action.writes
        refuse_foreign(request, writes=action.writes)
        if action.by_body and self._policy.restricts:
            return route, action, None
        return route, action, self._policy.decide(caller, route.target.name, action.name)

    async def _relay(self, answer: Answer, route: Route, path: str, call: Call, record: Record) -> None:
        if answer.error is not None:
            raise answer.error.refusal()
        headers = protected(downstream_headers(answer.headers, route.target.endpoint, route.prefix, path), route.path)
        headers.append((b"x-request-id", record.request_id.encode("ascii")))
        if record.set_cookie is not None:  # what a shared cache keeps must not have one person's cookie
            headers = [pair for pair in headers if pair[0] != b"cache-control"]
            headers += [(b"cache-control", b"private, no-store"), (b"set-cookie", record.set_cookie)]
        record.status = answer.status
        if answer.connection is None:
            record.add_bytes_out(len(answer.body))
            call.respond(answer.status, headers, answer.body)
            await call.taken()  # as long as it is held here, it has a place
            return
        await relay(
            answer.connection,
            answer.body,
            call,
            headers,
            between=self._idle_timeout,
            sent=record.add_bytes_out,
        )

    async def _by_body(self, caller: Caller, target: str, request: Request, body: Body, record: Record) -> Decision:
        """GraphQL may ask for many things at once: one role must allow them all, and signs."""
        asked = (request.method, request.content_type, request.query, body.start(graphql.BODY_LIMIT))
        if len(body) > LARGEST_ON_LOOP:
            names = await asyncio.to_thread(_alone, partial(graphql.actions_of, *asked))
        else:
            names = graphql.actions_of(*asked)
        record.action = " ".join(names)
        record.writes = any(name.startswith(UNKNOWN_PREFIX) for name in names)
        refuse_foreign(request, writes=record.writes)
        return self._policy.decide(caller, target, *names)

    async def _prepared(self, request: Request, path: str, action: Action, body: Body, record: Record) -> Payload:
        """The body as it is signed; of one that changes something, the audit log gets what it is about."""
        template = action.template if self._audited and record.writes else ""

        def look() -> Resources:
            start = body.start(LARGEST_BODY + 1)  # of more nothing is read
            return resources_of(template, path, request.query, start, request.headers)

        large = len(body) > LARGEST_ON_LOOP
        if template:
            resources = await asyncio.to_thread(_alone, look) if large else look()
            record.resources, record.not_looked_into = resources, resources.not_looked_into
        return await asyncio.to_thread(Payload.of, body.pieces) if large else Payload.of(body.pieces)


# A parser holds the interpreter: the event loop waits for one of them at the most, not for all that are at work.
_parsing = threading.Lock()


def _alone(parse: Callable[[], T]) -> T:
    with _parsing:
        return parse()


async def _settled(pending: Awaitable[None] | None) -> None:
    if pending is not None:
        await pending
