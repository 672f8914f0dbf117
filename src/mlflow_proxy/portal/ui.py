"""Presigned links to the MLflow UI: a browser is sent there, a program gets the link. Never cached, never logged."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from flask import Blueprint, Response, g, jsonify, redirect, request

from mlflow_proxy.access.policy import link_action
from mlflow_proxy.aws.credentials import CredentialsUnavailable
from mlflow_proxy.aws.presign import presigned_url
from mlflow_proxy.errors import Refusal
from mlflow_proxy.portal.places import DEADLINE, MOST_WAITING
from mlflow_proxy.threads import Threads

if TYPE_CHECKING:
    from werkzeug.wrappers import Response as BaseResponse

    from mlflow_proxy.aws.credentials import Credentials
    from mlflow_proxy.aws.role_sessions import RoleSession
    from mlflow_proxy.portal import Portal
    from mlflow_proxy.targets import Target


def blueprint(portal: Portal) -> Blueprint:
    """The pages, bound to one worker's parts."""
    pages = Blueprint("ui", __name__, url_prefix="/-/ui")
    # Of their own: calls that were given up may hang on, and must not hold the threads of the event loop.
    threads = Threads("presigned-links", MOST_WAITING)

    @pages.before_request
    def _refuse_embedding() -> None:
        """A page of another site may link here, but not fetch links by the way, as an image of its own."""
        site = request.headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and request.headers.get("sec-fetch-dest") != "document":
            raise Refusal(403, "A page of another site sent this request. Open the link itself instead.")

    @pages.get("/<name>", provide_automatic_options=False)
    def visit(name: str) -> BaseResponse:
        """Send the browser to a fresh link."""
        if request.method == "HEAD":  # a link is good for one visit, and a look is no visit
            raise Refusal(405, "Use GET to visit the UI, or POST for a link.", headers=[("allow", "GET, POST")])
        return redirect(_link(name), 302)

    @pages.post("/<name>")
    def link(name: str) -> Response:
        """Answer a fresh link as JSON."""
        return jsonify({"authorized_url": _link(name), "expires_in_seconds": _option("link_expires")})

    def _option(option: str) -> int:
        text = request.args.get(option)
        if text is None:
            return int(getattr(portal.parts.settings.ui, option))
        if not (text.isascii() and text.isdigit() and len(text) < 8):
            raise Refusal(400, f"{option} is not a number of seconds.", error_code="INVALID_PARAMETER_VALUE")
        return int(text)

    def _link(name: str) -> str:
        parts, visit = portal.parts, g.visit
        target = parts.routes.by_name(name, lambda: parts.policy.visible(visit.caller))
        action = link_action(target)
        visit.record.target, visit.record.action = target.name, action
        decision = parts.policy.decide(visit.caller, target.name, action)
        visit.record.role = decision.role
        times = {option: _option(option) for option in ("link_expires", "session_expires")}
        unknown = sorted(set(request.args) - set(times))
        if unknown:
            raise Refusal(400, f"There is no option {unknown[0]!r}; there are {' and '.join(times)}.")
        visit.record.resources = {
            "link_expires": str(times["link_expires"]),
            "session_expires": str(times["session_expires"]),
        }
        with portal.place():
            credentials = portal.in_loop(_credentials(target, decision.session))
            proxy = parts.settings.upstream.proxy
            ask = partial(presigned_url, target, credentials, parts.settings.aws, proxy=proxy, **times)
            return portal.in_loop(threads.run(ask, DEADLINE))

    async def _credentials(target: Target, session: RoleSession | None) -> Credentials:
        try:
            pending = portal.parts.credentials.obtain(target, session)
            if pending is not None:
                await pending
            return portal.parts.credentials.get(target, session)
        except CredentialsUnavailable as unavailable:
            raise unavailable.refusal(target.name) from None

    return pages
