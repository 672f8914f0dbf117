"""Whom the deployment takes the caller for, and whether its rules hold: for strangers, roles, and links."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from mlflow_proxy.access.own_pages import LINKS
from mlflow_proxy.access.policy import EXPLICIT_PREFIX
from mlflow_proxy.routing import PREFIX
from mlflow_proxy.validate.calls import Calls, Unanswered
from mlflow_proxy.validate.deployment import Deployment
from mlflow_proxy.validate.outcome import Outcome, failed, is_down, is_role_refusal, skipped, unanswered, words

# Seconds, AWS's least: the link is not used.
_LINK_EXPIRES = 5
_SEARCH: Mapping[str, Any] = {"max_results": 1}
_WAYS = {
    "key": "by an API key",
    "token": "by a token",
    "load-balancer": "by the load balancer's sign-in",
    "certificate": "by a client certificate",
    "session": "by a browser session",
}


class Permissions:
    """The steps, in their order; `identity` learns which target is meant, which later ones need."""

    def __init__(self, deployment: Deployment, calls: Calls) -> None:
        self._deployment = deployment
        self._calls = calls
        self._target = ""
        self._may_link = False

    def stranger(self) -> Outcome:
        """Somebody who shows nothing must get 401, as MLflow's clients understand it."""
        try:
            reply = Calls(self._deployment, as_stranger=True).mlflow("experiments/search", _SEARCH)
        except Unanswered as failure:
            if self._deployment.client_certificate is not None and not failure.late:
                return Outcome(True, "no connection without a client certificate")
            return unanswered(failure)
        asks_for_certificate = reply.status == 400 and b"certificate" in reply.body.lower()
        if self._deployment.client_certificate is not None and asks_for_certificate:
            return Outcome(True, "400 without a client certificate")
        if reply.status == 401 and reply.error_code:
            return Outcome(True, "401, as JSON")
        if reply.status in (200, 404) and not reply.is_html:
            return self._anybody()
        return failed(reply)

    def identity(self) -> Outcome:
        """Who the caller is to the proxy, and which target is meant."""
        try:
            reply = self._calls.own("whoami")
        except Unanswered as failure:
            return unanswered(failure, fatal=True)
        told = reply.json or {}
        targets = told.get("targets")
        if is_role_refusal(reply):
            advice = "The caller is known, but has no role: name its subject or group in [[roles]]."
            return failed(reply, fatal=True)._replace(advice=advice)
        if reply.status != 200 or not _are_targets(targets):
            return failed(reply, fatal=True)
        missing = self._choose(targets)
        if missing is not None:
            return missing._replace(request_id=reply.request_id)
        self._may_link = targets[self._target].get("ui_link") is True
        where = f"target {self._target}, {targets[self._target].get('mode')}"
        if told.get("way") == "anonymous":
            return Outcome(None, f"nobody is identified; {where}", "Callers have no names in logs, and no roles.")
        roles = told.get("roles")
        named = ", ".join(map(str, roles)) if isinstance(roles, list) and roles else "none"
        return Outcome(True, f"{told.get('caller')} {_WAYS.get(str(told.get('way')), '')}, role {named}; {where}")

    def may_read(self) -> Outcome:
        """An action that every role should allow."""
        try:
            reply = self._calls.mlflow("experiments/search", _SEARCH)
        except Unanswered as failure:
            return unanswered(failure, fatal=True)
        if reply.status == 200 and reply.json is not None:
            return Outcome(True, "SearchExperiments is allowed")
        return failed(reply, fatal=is_down(reply) or reply.leads_to is not None)

    def may_delete(self) -> Outcome:
        """An action that readers must not have: the deletion of a run that nobody can have made."""
        try:
            reply = self._calls.mlflow("runs/delete", {"run_id": uuid.uuid4().hex})
        except Unanswered as failure:
            return unanswered(failure)
        if is_role_refusal(reply) and "DeleteRun" in reply.message:
            return Outcome(True, f"403: {words(reply)}")
        if reply.status == 404 and reply.error_code == "RESOURCE_DOES_NOT_EXIST":
            return Outcome(True, "DeleteRun is allowed; MLflow knows no run of a random id")
        return failed(reply)

    def ui_link(self) -> Outcome:
        """A presigned link, for roles that may have one. It is not used, and void after seconds."""
        page = f"{LINKS.removeprefix('/-/')}{self._target}"
        try:
            reply = self._calls.own(page, "POST", params={"link_expires": str(_LINK_EXPIRES)})
        except Unanswered as failure:
            return unanswered(failure)
        if is_role_refusal(reply) and not self._may_link:
            return skipped(f"the role names no {EXPLICIT_PREFIX}… action")
        link = urlsplit(str((reply.json or {}).get("authorized_url") or ""))
        if reply.status == 200 and link.hostname:
            return Outcome(True, f"a link to {link.hostname}, void after {_LINK_EXPIRES} s; not used")
        return failed(reply)

    def ui_page(self) -> Outcome:
        """MLflow's UI through the proxy, for roles with AccessUI."""
        try:
            reply = self._calls.ui()
        except Unanswered as failure:
            return unanswered(failure)
        if is_role_refusal(reply):
            return skipped("the role does not allow AccessUI")
        if reply.status == 200 and reply.is_html and b"mlflow" in reply.body.lower():
            return Outcome(True, "MLflow's page, through the proxy")
        return failed(reply)

    def _anybody(self) -> Outcome:
        found = "a stranger is served: whoever reaches this address has the proxy's AWS rights"
        if self._deployment.is_loopback:
            return Outcome(None, found, "Nobody but this machine reaches it by this address; else identify callers.")
        return Outcome(False, found, "Turn on a way of identifying callers, such as API keys: docs/access.md.")

    def _choose(self, targets: Mapping[str, Mapping[str, Any]]) -> Outcome | None:
        """Keep which target is meant; what is wrong, if none can be."""
        wanted = self._deployment.target
        self._target = wanted or next((name for name, each in targets.items() if each.get("default")), "")
        if self._target in targets:
            return None
        if not targets:
            return Outcome(False, "the caller's roles are for no target", "Use another key, or a role.", fatal=True)
        known = " or ".join(f"--target {name}" for name in targets)
        found = f"this caller has no target {wanted}" if wanted else f"{PREFIX[:1]} has no target for this caller"
        return Outcome(False, found, f"Write {known}.", fatal=True)


def _are_targets(told: object) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(told, dict) and all(isinstance(each, dict) for each in told.values())
