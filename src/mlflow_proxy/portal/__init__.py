"""The Flask application under `/-/`: what people and operators look at. MLflow itself is never served from here."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from a2wsgi import WSGIMiddleware
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.oidc import TokenVerifier
from mlflow_proxy.access.policy import Policy
from mlflow_proxy.access.session import Sessions
from mlflow_proxy.aws.credentials import CredentialStore
from mlflow_proxy.errors import NO_FRAMES, NO_SNIFFING, Refusal
from mlflow_proxy.portal import pages, ui
from mlflow_proxy.portal.notices import CONTENT_POLICY, refusal_page
from mlflow_proxy.portal.places import DEADLINE, MOST_WAITING, Places
from mlflow_proxy.readiness import Readiness
from mlflow_proxy.routing import Routes
from mlflow_proxy.runtime import Runtime
from mlflow_proxy.settings import Settings
from mlflow_proxy.telemetry.audit import AuditLog
from mlflow_proxy.telemetry.record import Record

# More than may wait: the others are for metrics, readiness and the overview.
_THREADS = 2 * MOST_WAITING

# The key of the ASGI scope that holds the Visit.
VISIT = "mlflow_proxy.visit"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """What pages need of their worker."""

    settings: Settings
    runtime: Runtime
    routes: Routes
    policy: Policy
    credentials: CredentialStore
    readiness: Readiness
    audit: AuditLog
    sessions: Sessions | None
    tokens: TokenVerifier | None


class Visit(NamedTuple):
    """Who asks for a page, for its log line too. `caller` is None on pages that strangers may see; `report` is how the
    targets are, on the page that shows it. `navigated` is the path as a browser sees it that wants to show the answer.
    """

    record: Record
    client: str
    caller: Caller | None
    report: dict[str, Any] | None
    navigated: str | None


class Portal:
    """The application, made in the event loop that serves it. `asgi` is what to mount."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._loop = asyncio.get_running_loop()
        self.place = Places().place
        flask = _flask(self)
        wsgi: Any = flask
        self.asgi: Any = WSGIMiddleware(wsgi, workers=_THREADS)
        self.notice = partial(refusal_page, flask.jinja_env, sign_in=parts.sessions is not None)

    def in_loop(self, work: Coroutine[Any, Any, T], deadline: float = DEADLINE) -> T:
        """Run a coroutine in the event loop and wait for it, from a page's thread, for `deadline` seconds.

        What may wait for others must hold a `place`. Raises Refusal 504 when late.
        """
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, deadline), self._loop)
        try:
            return future.result()
        except TimeoutError:
            raise Refusal(504, f"There was no answer within {deadline:g} s. Try again.") from None


def _flask(portal: Portal) -> Flask:
    app = Flask("mlflow_proxy.portal", static_folder=None)
    prefix = portal.parts.settings.server.prefix
    app.json.compact = app.json.ensure_ascii = False  # type: ignore[attr-defined]
    app.register_blueprint(pages.blueprint(portal))
    app.register_blueprint(ui.blueprint(portal))
    if portal.parts.sessions is not None:
        from mlflow_proxy.portal import signin  # noqa: PLC0415  (Authlib is slow to import)

        app.register_blueprint(signin.blueprint(portal))

    @app.before_request
    def _remember_visit() -> None:
        g.visit = request.environ["asgi.scope"][VISIT]
        g.request_id = g.visit.record.request_id

    @app.after_request
    def _protect(response: Response) -> Response:
        response.headers.setdefault("cache-control", "no-store")
        for name, value in (NO_SNIFFING, NO_FRAMES):
            response.headers[name.decode()] = value.decode()
        response.headers["referrer-policy"] = "no-referrer"
        response.headers["content-security-policy"] = CONTENT_POLICY
        return response

    @app.errorhandler(Refusal)
    def _refused(refusal: Refusal) -> Response:
        record = g.visit.record
        record.error, record.limit = refusal.reason, refusal.limit
        if refusal.status >= 400 and g.visit.navigated is not None:
            status, headers, body = portal.notice(refusal, record, g.visit.navigated)
        else:
            status, headers, body = refusal.answer(g.request_id)
        sent = [(name.decode(), value.decode("latin-1")) for name, value in headers if name != b"x-request-id"]
        return Response(body, status, sent)

    @app.errorhandler(HTTPException)
    def _http_error(error: HTTPException) -> Response:
        if error.code == 404:
            return _refused(
                Refusal(404, f"The proxy has no page {prefix}{request.path}. See {prefix}/-/ for those it has.")
            )
        allowed = [(name, value) for name, value in error.get_headers() if name.lower() == "allow"]
        return _refused(Refusal(error.code or 500, error.description or error.name, headers=allowed))

    @app.errorhandler(Exception)
    def _failed(error: Exception) -> Response:
        app.logger.exception("request %s failed", g.request_id, exc_info=error)
        return _refused(Refusal(500, "The proxy failed.", in_log=True))

    return app
