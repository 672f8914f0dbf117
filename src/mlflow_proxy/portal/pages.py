"""Overview, readiness and version."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, render_template, request

from mlflow_proxy import __version__

if TYPE_CHECKING:
    from mlflow_proxy.portal import Portal


def blueprint(portal: Portal) -> Blueprint:
    """The pages, bound to one worker's parts."""
    pages = Blueprint("pages", __name__, template_folder="templates", url_prefix="/-")

    @pages.get("/")
    def overview() -> str:
        """What this proxy serves, for people: every target with its state and the ways into its UI."""
        ready, report = portal.in_loop(portal.readiness.report())
        targets = report["targets"]
        return render_template(
            "overview.html",
            ready=ready,
            targets=targets,
            default=next((name for name in targets if portal.routes.by_name(name).default), None),
            address=(portal.settings.server.public_url or request.host_url).rstrip("/"),
            version=__version__,
        )

    @pages.get("/ready")
    def ready() -> tuple[Response, int]:
        """200 if every target is ready, else 503; the reason per target as JSON."""
        is_ready, report = portal.in_loop(portal.readiness.report())
        return jsonify(report), 200 if is_ready else 503

    @pages.get("/version")
    def version() -> Response:
        """The versions of proxy and Python."""
        return jsonify({"version": __version__, "python": platform.python_version()})

    return pages
