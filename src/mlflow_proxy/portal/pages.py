"""Overview, readiness, version, and who the caller is."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from flask import Blueprint, Response, g, jsonify, render_template, request

from mlflow_proxy import __version__
from mlflow_proxy.access.caller import ANONYMOUS
from mlflow_proxy.access.policy import OWN_PREFIX
from mlflow_proxy.portal.notices import COPY_SCRIPT
from mlflow_proxy.telemetry.metrics import exposition

if TYPE_CHECKING:
    from mlflow_proxy.portal import Portal

_READY, _NOT_READY, _UNKNOWN = "All targets are ready.", "Not every target is ready.", "Targets are being checked."


def blueprint(portal: Portal) -> Blueprint:
    """The pages, bound to one worker's parts."""
    pages = Blueprint("pages", __name__, template_folder="templates", url_prefix="/-")

    parts = portal.parts
    all_targets = parts.settings.build_targets()
    address = parts.settings.server.address

    @pages.get("/")
    def overview() -> str:
        """What this proxy serves, for people: the targets they may see, with their state and the ways into their UI."""
        caller = g.visit.caller
        operates = parts.policy.allows_own(caller, f"{OWN_PREFIX}GetReadiness")
        targets = portal.in_loop(parts.readiness.known(parts.policy.visible(caller), for_operator=operates))
        return render_template(
            "overview.html",
            state=_state_of_all([target["ready"] for target in targets.values()]),
            unmeasured=any(target["ready"] is None for target in targets.values()),
            copy_script=COPY_SCRIPT,
            targets=targets,
            default=next((name for name in targets if parts.routes.is_default(name)), None),
            address=address.url if address else request.host_url.rstrip("/"),
            version=__version__,
            caller=None if caller == ANONYMOUS else caller.subject,
            roles=parts.policy.role_names(caller),
            may_sign_out=caller.way == "session",
            sees_readiness=operates,
            opens={name for name in targets if parts.policy.allows(caller, name, "AccessUI")},
            sees_metrics=parts.policy.allows_own(caller, f"{OWN_PREFIX}GetMetrics"),
            links={name for name in targets if parts.policy.allows_link(caller, name)},
        )

    @pages.get("/ready")
    def ready() -> tuple[Response, int]:
        """200 if every target is ready, else 503; the reason per target as JSON."""
        report = g.visit.report
        reasons = [f"{name}: {state['reason']}" for name, state in report["targets"].items() if not state["ready"]]
        g.visit.record.error = "; ".join(reasons)
        return jsonify(report), 200 if report["ready"] else 503

    @pages.get("/metrics")
    def metrics() -> Response:
        """Prometheus metrics of all workers together."""
        text, content_type = exposition(parts.runtime.metrics)
        return Response(text, content_type=content_type)

    @pages.get("/version")
    def version() -> Response:
        """The versions of proxy and Python."""
        return jsonify({"version": __version__, "python": platform.python_version()})

    @pages.get("/whoami")
    def whoami() -> Response:
        """Whom the proxy takes the caller for, and the targets they may know of, for programs. Asks no target."""
        caller, policy = g.visit.caller, parts.policy
        visible = policy.visible(caller)
        targets = {
            target.name: {
                "mode": target.arn.mode.resource_type,
                "default": parts.routes.is_default(target.name),
                "ui_link": policy.allows_link(caller, target.name),
            }
            for target in all_targets
            if target.name in visible
        }
        roles = policy.role_names(caller)
        return jsonify({"caller": caller.subject, "way": caller.way, "roles": roles, "targets": targets})

    return pages


def _state_of_all(ready: list[bool | None]) -> str:
    """What the overview says of all its targets; None is one that nothing is known of yet."""
    if False in ready:
        return _NOT_READY
    return _UNKNOWN if None in ready else _READY
