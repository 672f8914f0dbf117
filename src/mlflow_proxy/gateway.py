"""One worker's application: reads each request once, gives it to the forwarder or to the proxy's own pages, records it.

`/-/` is the proxy's own; everything else belongs to MLflow. Health is answered here, before anything that could be
slow or refuse, so that a load balancer never kills a host for being busy.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from mlflow_proxy import __version__
from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.identity import Identity, build_ways, forwarded_identity
from mlflow_proxy.access.own_pages import LINKS, OwnPage, own_page
from mlflow_proxy.access.policy import Patterns, Policy, link_action
from mlflow_proxy.access.session import Sessions
from mlflow_proxy.aws.credentials import CredentialStore
from mlflow_proxy.bodies import Bodies
from mlflow_proxy.deadlines import Deadlines, Timeout
from mlflow_proxy.errors import NO_FRAMES, NO_SNIFFING, Refusal
from mlflow_proxy.forwarder import Forwarder
from mlflow_proxy.http1 import UpstreamError
from mlflow_proxy.inbound.connection import Call, CallerGone
from mlflow_proxy.limits import OWN_PAGES, Limits
from mlflow_proxy.portal import VISIT, Parts, Portal, Visit
from mlflow_proxy.readiness import Readiness
from mlflow_proxy.requests import Request, RequestIds, RequestReader, refuse_foreign, wants_page
from mlflow_proxy.routing import OWN_PREFIX, Routes
from mlflow_proxy.runtime import Runtime
from mlflow_proxy.sending import Sender
from mlflow_proxy.settings import Settings
from mlflow_proxy.targets import Target
from mlflow_proxy.telemetry.audit import AuditLog
from mlflow_proxy.telemetry.metrics import Metrics, State
from mlflow_proxy.telemetry.record import Record, RequestLog, cut_error
from mlflow_proxy.telemetry.strangers import Strangers

if TYPE_CHECKING:
    from mlflow_proxy.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_HEALTH_PATH = b"/-/health"
_OWN_ROOT = OWN_PREFIX.rstrip("/")
_HEALTH = b'{"status": "ok"}\n'
_HEALTH_HEADERS = [
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    NO_SNIFFING,
    NO_FRAMES,
]
# nginx's word for a request whose caller went away; only the log sees it.
_CALLER_GONE = 499
# No page of the proxy's own takes more.
_OWN_BODY_LIMIT = 16 * 1024
# Of the body of a refused request, so much is taken off the connection, within so many seconds.
_TAKEN_OFF = 256 * 1024
_TAKEN_WITHIN = 2.0


class Gateway:
    """One worker's application. Its parts live from the server's start-up to its shutdown."""

    def __init__(self, config: Settings, runtime: Runtime) -> None:
        self._settings = config
        self._runtime = runtime
        self._ids = RequestIds()
        self._reader = RequestReader(config.server, forwarded_identity(config))
        as_json = config.log.format == "json" or (config.log.format == "auto" and not sys.stdout.isatty())
        self._log = RequestLog(as_json=as_json) if config.log.requests else None

    async def __call__(self, call: Call) -> None:
        """Answer one request."""
        call.path = self._reader.below_prefix(call.path)
        if call.path == _HEALTH_PATH and call.problem is None:
            call.respond(200, _HEALTH_HEADERS, _HEALTH)
        else:
            await self._serve(call)

    async def _serve(self, call: Call) -> None:
        self._metrics.in_flight += 1
        record = Record(call.method, self._ids.of(call.headers))
        if self._tracing is not None:
            record.trace = self._tracing.request(record.method, call.headers)
        request: Request | None = None
        try:
            record.caller_address = call.peer
            request = self._reader.read(call)
            record.caller_address = request.client
            await self._answer(request, call, record)
        except Refusal as refusal:
            if request is None:
                record.caller_address = self._reader.client(call)[0]
            else:
                await self._take_body(request, call, refusal)
            self._refuse(call, refusal, record)
        except CallerGone:
            record.status = _CALLER_GONE
        except asyncio.CancelledError:
            if not call.gone:
                raise
            record.status = _CALLER_GONE
        except (UpstreamError, TimeoutError) as error:
            # The answer had begun: the connection must be cut, since the caller would take a clean end for a whole one.
            call.cut()
            record.error = f"answer cut short: {error}" if str(error) else "the caller stopped reading"
            record.upstream_error = "cut" if isinstance(error, UpstreamError) else ""
        except Exception:
            logger.exception("request %s failed", record.request_id)
            self._refuse(call, Refusal(500, "The proxy failed.", in_log=True), record)
        finally:
            self._keep(record)

    async def _answer(self, request: Request, call: Call, record: Record) -> None:
        if request.path.startswith(OWN_PREFIX):
            await self._own(request, call, record)
        elif request.path == _OWN_ROOT:
            raise Refusal(
                308, f"Use {self._settings.server.prefix}/-/.", error_code="REDIRECT", headers=[("location", "-/")]
            )
        else:
            await self._forwarder(request, call, record)

    def _refuse(self, call: Call, refusal: Refusal, record: Record) -> None:
        record.error = refusal.reason
        record.limit = refusal.limit or record.limit
        if call.begun:
            return
        if refusal.status >= 400 and wants_page(call):
            status, headers, body = self._notice(refusal, record, call.path.decode("latin-1"))
        else:
            status, headers, body = refusal.answer(record.request_id)
        headers += (NO_SNIFFING, NO_FRAMES)
        record.status = status
        record.add_bytes_out(len(body))
        call.keep = call.keep and not refusal.close
        call.respond(status, headers, body)

    async def _take_body(self, request: Request, call: Call, refusal: Refusal) -> None:
        """Take the body of a refused request off the connection, if it is short, so that this can be kept."""
        if call.complete or refusal.close or call.awaits_continue:
            return
        try:
            with Timeout(self.deadlines, _TAKEN_WITHIN):
                (await self._bodies.collect(request, call.receive, limit=_TAKEN_OFF)).release()
        except (Refusal, CallerGone, TimeoutError):
            refusal.close = True

    def _keep(self, record: Record) -> None:
        """Step 9 of a request's way: what became of it, to metrics, audit and log."""
        self._metrics.in_flight -= 1
        if self._settings.log.metrics:
            self._metrics.observe(record)
        if record.trace is not None:
            record.trace.end(record)
        if record.caller or self._strangers.gets_line(record):
            self._write(record)

    def _write(self, record: Record) -> None:
        # The sign-in has audit lines of its own.
        if (record.writes or record.status >= 400) and not record.route.startswith("/-/sign"):
            self._audit.request(record)
        if self._log is not None:
            self._log.write(record)
        elif record.error and (record.status >= 500 or record.upstream_error == "aws"):  # callers are told to ask here
            logger.warning("request %s: %d: %s", record.request_id, record.status, cut_error(record.error))

    async def _own(self, request: Request, call: Call, record: Record) -> None:
        """The proxy's own pages, in Flask. They see the canonical path and query, and a body that is all there: none of
        their few threads ever waits for a caller.
        """
        page = own_page(request.path)
        record.target, record.route, record.action = OWN_PAGES, page.route, page.action
        if page.stranger:
            caller = None
            if page.answers_provider:
                self._limits.check_failures(request.client)
            refuse_foreign(request, writes=False)
        else:
            caller = await self._identity.identify(request, record)
            await self._admit(page, caller, request, record)
        report = await self._readiness.report() if page.needs_readiness else None  # no thread waits for AWS
        body = self._bodies.none
        if request.has_body:
            body = await self._bodies.collect(request, call.receive, limit=_OWN_BODY_LIMIT)
        record.bytes_in = len(body)
        own = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "path": request.path,
            "raw_path": request.path.encode("ascii"),
            "query_string": request.query.encode("ascii"),
            "headers": call.headers,
            "scheme": request.scheme,
            "client": (call.peer, 0),
            "server": (request.host, None),
            "root_path": "",
            VISIT: Visit(
                record, request.client, caller, report, call.path.decode("latin-1") if wants_page(call) else None
            ),
        }

        headers: list[tuple[bytes, bytes]] = []
        pieces: list[bytes] = []

        async def gathered(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers.extend(message["headers"])
                headers.append((b"x-request-id", record.request_id.encode("ascii")))
                if record.set_cookie is not None:
                    headers.append((b"set-cookie", record.set_cookie))
            else:
                pieces.append(message.get("body", b""))

        async def received() -> dict[str, Any]:
            return {"type": "http.request", "body": body.start(_OWN_BODY_LIMIT), "more_body": False}

        try:
            await self._portal(own, received, gathered)
        finally:
            body.release()
        page_body = b"".join(pieces)
        record.add_bytes_out(len(page_body))
        call.respond(record.status, headers, page_body)
        if page.stranger and record.error and not request.behind_proxy:
            await _settled(self._limits.add_failure(request.client))

    async def _admit(self, page: OwnPage, caller: Caller, request: Request, record: Record) -> None:
        """Authorize and limit the caller of a page of our own. Raises Refusal."""
        target = OWN_PAGES
        try:
            refuse_foreign(request, writes=False)
            if page.is_link:
                wanted = self._routes.by_name(request.path.removeprefix(LINKS), lambda: self._policy.visible(caller))
                target, record.target, record.writes = wanted.name, wanted.name, True
                record.action = link_action(wanted)
                record.role = self._policy.decide(caller, target, record.action).role
            elif page.action:
                record.role = self._policy.decide_own(caller, page.action).role
            else:
                self._policy.require_any_role(caller)
        except Refusal:
            await _settled(self._limits.check(caller, None, OWN_PAGES))  # what is refused counts, too
            raise
        await _settled(self._limits.check(caller, record.role or None, target))

    async def start(self) -> None:
        """Make the parts, in the event loop that serves."""
        settings = self._settings
        targets = settings.build_targets()
        self.deadlines = Deadlines(asyncio.get_running_loop())
        self._bodies = Bodies(settings.server, self.deadlines)
        self._strangers = Strangers(self._write)
        self._metrics = Metrics(self._runtime.metrics, version=__version__)
        self._audit = AuditLog(settings.audit.to)
        self._limits = Limits(settings, self.deadlines)
        self._policy = Policy(settings.roles, targets)
        sessions = _sessions(settings, self._runtime) if settings.oidc.client_id else None
        ways = build_ways(settings, sessions, self._runtime.keys)
        self._identity = Identity(
            ways,
            self._limits,
            self._metrics,
            sign_in=sessions is not None,
        )
        self._credentials = CredentialStore(targets, settings.aws, proxy=settings.upstream.proxy)
        await asyncio.gather(self._credentials.start(), self._identity.start(), self._limits.start())
        self._sender = Sender(targets, settings.upstream, self._credentials, self.deadlines, self._limits.paces)
        routes = self._routes = Routes(targets, settings.server.prefix)
        self._forwarder = Forwarder(
            identity=self._identity,
            routes=routes,
            policy=self._policy,
            limits=self._limits,
            bodies=self._bodies,
            sender=self._sender,
            audited=settings.audit.to != "off",
            idle_timeout=settings.upstream.idle_timeout,
        )
        readiness = self._readiness = Readiness(targets, self._sender, self._credentials, settings.server.ready_max_age)
        parts = Parts(
            settings,
            self._runtime,
            routes,
            self._policy,
            self._credentials,
            readiness,
            self._audit,
            sessions,
            ways.tokens,
        )
        portal = Portal(parts)
        self._portal, self._notice = portal.asgi, portal.notice
        self._tracing = _tracing(settings)
        self._metrics.state = partial(self._state, targets)
        self._metrics.start(asyncio.get_running_loop())

    def _state(self, targets: Iterable[Target]) -> State:
        """What the parts say of themselves, for the metrics."""
        now = time.time()
        ends = {target.name: self._credentials.status(target).expires_at for target in targets}
        return State(
            places=self._limits.states(),
            credential_expiry={name: end - now for name, end in ends.items() if end is not None},
            storage_failures=self._limits.storage_failures,
            log_lines_dropped=self._log.dropped if self._log is not None else 0,
            audit_lines_dropped=self._audit.dropped,
        )

    async def stop(self) -> None:
        """End them, and write what is to be written; nothing is served any more."""
        self._strangers.close()
        self._sender.close()
        await asyncio.gather(self._credentials.close(), self._identity.close(), self._limits.close())
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        self._metrics.close()
        self._audit.close()
        if self._log is not None:
            self._log.close()


def _sessions(settings: Settings, runtime: Runtime) -> Sessions:
    named = Patterns(pattern for role in settings.roles for pattern in role.groups)
    return Sessions(
        settings.oidc,
        runtime.session_secret,
        relevant=named.match,
        revocations=runtime.revocations,
        prefix=settings.server.prefix,
    )


def _tracing(settings: Settings) -> Tracing | None:
    if settings.tracing.endpoint is None:
        return None
    from mlflow_proxy.telemetry.tracing import Tracing  # noqa: PLC0415  # an extra, and slow to import

    return Tracing(settings.tracing, version=__version__)


async def _settled(pending: Awaitable[None] | None) -> None:
    if pending is not None:
        await pending


def create_app(settings: Settings, runtime: Runtime) -> Gateway:
    """The application of one worker process, by the configuration that the main process accepted last."""
    logging.basicConfig(level=settings.log.level.upper(), format=LOG_FORMAT, force=True)
    logger.debug("mlflow-proxy %s starts", __version__)
    return Gateway(settings, runtime)
