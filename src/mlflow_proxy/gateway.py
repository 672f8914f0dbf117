"""The ASGI application: reads each request once, gives it to the forwarder or to the proxy's own pages, records it.

`/-/` is the proxy's own; everything else belongs to MLflow. Health is answered here, before anything that could be
slow or refuse, so that a load balancer never kills a host for being busy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

from mlflow_proxy import __version__, configuration
from mlflow_proxy.aws.credentials import CredentialStore
from mlflow_proxy.bodies import Bodies, CallerGone, Receive
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.forwarder import Forwarder
from mlflow_proxy.http1 import UpstreamError
from mlflow_proxy.relay import Send
from mlflow_proxy.requests import Request, RequestIds, RequestReader, Scope
from mlflow_proxy.routing import OWN_PREFIX, Routes
from mlflow_proxy.sending import Sender
from mlflow_proxy.settings import CONFIG_VARIABLE, Settings
from mlflow_proxy.telemetry.record import Record, RequestLog
from mlflow_proxy.watch import CallerWatch

logger = logging.getLogger(__name__)

_HEALTH_PATH = b"/-/health"
_HEALTH = b'{"status": "ok"}\n'
# nginx's word for a request whose caller went away; only the log sees it.
_CALLER_GONE = 499
# Of a refused path, so much is logged.
_LOGGED_PATH = 256
# No page of the proxy's own takes more.
_OWN_BODY_LIMIT = 16 * 1024


class Gateway:
    """One worker's application. Its parts live from the server's start-up to its shutdown."""

    def __init__(self, config: Settings) -> None:
        self._settings = config
        self._ids = RequestIds()
        self._reader = RequestReader(config.server)
        as_json = config.log.format == "json" or (config.log.format == "auto" and not sys.stdout.isatty())
        self._log = RequestLog(as_json=as_json) if config.log.requests else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["raw_path"] == _HEALTH_PATH:
            await _answer_health(send)
            return
        record = Record(scope["method"], self._ids.of(scope))
        watch = CallerWatch(receive, self._deadlines)
        try:
            record.caller_address = scope["client"][0] if scope.get("client") else ""
            request = self._reader.read(scope)
            record.path, record.caller_address = request.path, request.client
            if request.path.startswith(OWN_PREFIX):
                await self._own(scope, request, watch.receive, send, record)
            else:
                await self._forwarder(request, watch.receive, send, record)
        except Refusal as refusal:
            record.path = record.path or quote_from_bytes(scope["raw_path"][:_LOGGED_PATH], safe="/")
            await _refuse(send, refusal, record)
        except CallerGone:
            await _refuse(send, _body_broke_off(), record)  # reaches a caller that is there but framed it wrongly
            record.status = _CALLER_GONE
        except asyncio.CancelledError:
            if not watch.gone:
                raise
            record.status = _CALLER_GONE
        except (UpstreamError, TimeoutError) as error:
            # The answer had begun: leaving without its end makes the server cut the connection, as it must, since
            # the caller would take a clean end for a whole answer.
            record.error = f"answer cut short: {error}" if str(error) else "the caller stopped reading"
        except Exception:
            logger.exception("request %s failed", record.request_id)
            await _refuse(send, Refusal(500, "The proxy failed; its log has the reason."), record)
        finally:
            watch.close()
            if self._log is not None:
                self._log.write(record)

    async def _own(self, scope: Scope, request: Request, receive: Receive, send: Send, record: Record) -> None:
        """The proxy's own pages, in Flask. They see the canonical path and query, and a body that is all there: none of
        their few threads ever waits for a caller.
        """
        record.target = "-"
        body = await self._bodies.collect(request, receive, limit=_OWN_BODY_LIMIT) if request.has_body else b""
        record.bytes_in = len(body)
        own = {
            **scope,
            "path": request.path,
            "raw_path": request.path.encode("ascii"),
            "query_string": request.query.encode("ascii"),
            "scheme": request.scheme,
            "state": {},
            "root_path": "",
            "mlflow_proxy.request_id": record.request_id,
        }

        async def recorded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode("ascii"))]
            else:
                record.add_bytes_out(len(message.get("body", b"")))
            await send(message)

        async def received() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._portal(own, received, recorded)
        finally:
            self._bodies.release(len(body))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start()
        except Exception as error:
            logger.exception("start-up failed")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        # Flask and its pages are imported here, in the worker only.
        from mlflow_proxy.portal import Portal  # noqa: PLC0415
        from mlflow_proxy.readiness import Readiness  # noqa: PLC0415

        targets = self._settings.build_targets()
        self._deadlines = Deadlines(asyncio.get_running_loop())
        self._bodies = Bodies(self._settings.server, self._deadlines)
        self._credentials = CredentialStore(targets, self._settings.aws, proxy=self._settings.upstream.proxy)
        await self._credentials.start()
        upstream = self._settings.upstream
        self._sender = Sender(targets, upstream, self._credentials, self._deadlines)
        routes = Routes(targets)
        self._forwarder = Forwarder(
            routes, self._bodies, self._sender, self._deadlines, idle_timeout=upstream.idle_timeout
        )
        readiness = Readiness(targets, self._sender, self._credentials, self._settings.server.ready_max_age)
        self._portal = Portal(self._settings, routes, self._credentials, readiness).asgi

    async def _stop(self) -> None:
        self._sender.close()
        await self._credentials.close()
        if self._log is not None:
            self._log.close()


def _body_broke_off() -> Refusal:
    return Refusal(400, "The body ended before it was whole, or its chunked coding is not valid.", close=True)


async def _refuse(send: Send, refusal: Refusal, record: Record) -> None:
    record.error = refusal.detail or refusal.message
    if record.status:  # an answer has begun
        return
    status, headers, body = refusal.answer(record.request_id)
    record.status = status
    record.add_bytes_out(len(body))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _answer_health(send: Send) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(_HEALTH)),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _HEALTH})


def create_app(last_good: Settings | None = None) -> Gateway:
    """The application of one worker process, by the configuration as it stands now.

    A configuration that has mistakes meanwhile must not end the service when a worker is replaced: then `last_good`
    is taken, and the mistakes are logged.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    mistakes: list[str] = []
    try:
        config = configuration.load(Path(path) if path else None)
    except configuration.SettingsError as error:
        if last_good is None:
            raise
        config, mistakes = last_good, error.problems
    logging.basicConfig(level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logger.debug("mlflow-proxy %s starts", __version__)
    for mistake in mistakes:
        logger.error("the configuration has a mistake, so the one from start-up stays in force: %s", mistake)
    return Gateway(config)
