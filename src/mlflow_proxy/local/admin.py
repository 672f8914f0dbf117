"""The stand-in's own controls: faults, features, clock, journal, server state, container credentials.

Not a part of SageMaker: on a port of its own, bound to loopback, closed to requests whose Host or Origin is
not its own, so that no web page can reach it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

from .accounts import open_session
from .asgi import Request, Scope, Send, read_request, respond_json
from .faults import Fault
from .service import Service
from .targets import Kind

_ROOT = "/_local/"
_SETTINGS = ("clock_skew", "credential_lifetime", "session_lifetime")
Answer = tuple[int, object]


class Refused(Exception):
    """A request that the admin endpoint cannot follow; the message says why."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Admin:
    """ASGI application of the admin endpoint; what each path does is said in the method that does it."""

    def __init__(self, service: Service, roles: Mapping[str, str], summary: Callable[[], Mapping[str, Any]]) -> None:
        self._service = service
        self._roles = roles
        self._summary = summary
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
            ("GET", re.compile("environment"), self._environment),
            ("GET", re.compile("faults"), self._show_faults),
            ("POST", re.compile("faults"), self._add_fault),
            ("DELETE", re.compile("faults"), self._clear_faults),
            ("DELETE", re.compile(r"faults/(\d+)"), self._remove_fault),
            ("GET", re.compile("features"), self._show_features),
            ("POST", re.compile("features"), self._change_features),
            ("GET", re.compile("requests"), self._requests),
            ("DELETE", re.compile("requests"), self._clear_requests),
            ("POST", re.compile(r"servers/([\w-]+)/(start|stop)"), self._move_server),
            ("GET", re.compile(r"container-credentials/([\w-]+)"), self._credentials),
        ]

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Answer one request in JSON."""
        request = await read_request(scope, receive)
        try:
            status, answer = self._answer(scope, request)
        except Refused as refused:
            status, answer = refused.status, {"error": str(refused)}
        await respond_json(send, status, answer, [("cache-control", "no-store")])

    def _answer(self, scope: Scope, request: Request) -> Answer:
        host, port = scope["server"]
        own = {f"{name}:{port}" for name in (host, "localhost", "127.0.0.1")}
        if request.value("host") not in own:
            raise Refused("The Host header names another host.", 403)
        if any(origin.removeprefix("http://") not in own for origin in request.values("origin")):
            raise Refused("Requests from web pages of other origins are refused.", 403)
        for method, pattern, handle in self._routes:
            match = pattern.fullmatch(request.path.removeprefix(_ROOT))
            if match and method == request.method and request.path.startswith(_ROOT):
                return handle(request, *match.groups())
        paths = ", ".join(f"{method} {_ROOT}{pattern.pattern}" for method, pattern, _ in self._routes)
        raise Refused(f"No such control. There are: {paths}", 404)

    def _environment(self, _: Request) -> Answer:
        """Endpoints, ARNs, roles, and the environment variables of the default principal."""
        return 200, self._summary()

    def _show_faults(self, _: Request) -> Answer:
        """All faults in force with counts, and the three settings."""
        return 200, {
            "clock_skew": self._service.clock.skew,
            "credential_lifetime": self._service.directory.credential_lifetime,
            "session_lifetime": self._service.sessions.lifetime,
            "faults": self._service.faults.state(),
        }

    def _add_fault(self, request: Request) -> Answer:
        """Add a fault (fields of `faults.Fault`), change settings (those of `_SETTINGS`, in seconds), or both."""
        try:
            values = _json_object(request.body)
            settings = {name: values.pop(name) for name in _SETTINGS if name in values}
            number = self._service.faults.add(Fault.parse(values)) if values else None
            self._set(settings)
        except (ValueError, TypeError, re.error) as error:
            raise Refused(f"Not a fault: {error}") from error
        return 201, {"id": number}

    def _set(self, settings: Mapping[str, Any]) -> None:
        values = {name: None if value is None else float(value) for name, value in settings.items()}
        self._service.clock.skew = values.get("clock_skew", self._service.clock.skew) or 0.0
        self._service.directory.credential_lifetime = values.get(
            "credential_lifetime", self._service.directory.credential_lifetime
        )
        self._service.sessions.lifetime = values.get("session_lifetime", self._service.sessions.lifetime)

    def _clear_faults(self, _: Request) -> Answer:
        """End all faults, set the clock right, and let credentials and sessions live as long as they say."""
        self._service.faults.clear()
        self._set(dict.fromkeys(_SETTINGS))
        return 200, {}

    def _remove_fault(self, _: Request, number: str) -> Answer:
        """End one fault."""
        if not self._service.faults.remove(int(number)):
            raise Refused(f"There is no fault {number}.", 404)
        return 200, {}

    def _show_features(self, _: Request) -> Answer:
        """What MLflow offers, by name: true or false."""
        return 200, asdict(self._service.features)

    def _change_features(self, request: Request) -> Answer:
        """Switch features on or off, those of `service.Features`."""
        known = asdict(self._service.features)
        values = _json_object(request.body)
        for name, value in values.items():
            if name not in known or not isinstance(value, bool):
                raise Refused(f"The features are {', '.join(known)}, each true or false.")
        for name, value in values.items():
            setattr(self._service.features, name, value)
        return self._show_features(request)

    def _requests(self, request: Request) -> Answer:
        """The journal, oldest first; `?last=` how many, 100 unless told."""
        return 200, {"requests": self._service.journal.last(_number(request, "last", 100))}

    def _clear_requests(self, _: Request) -> Answer:
        """Empty the journal."""
        self._service.journal.clear()
        return 200, {}

    def _move_server(self, _: Request, name: str, verb: str) -> Answer:
        """Start or stop a tracking server, as the API does, without asking whether that is possible."""
        target = self._service.targets.by_name(name)
        if target is None or target.arn.kind is not Kind.TRACKING:
            raise Refused(f"There is no tracking server {name}.", 404)
        target.move("Stopped" if verb == "stop" else "Started")
        return 200, {"status": target.status}

    def _credentials(self, request: Request, name: str) -> Answer:
        """Fresh session credentials of a role as ECS answers them; `?lifetime=` in seconds, 3600 unless told."""
        role = self._roles.get(name)
        if role is None:
            raise Refused(f"There is no role {name}; there are {', '.join(self._roles)}.", 404)
        lifetime = _number(request, "lifetime", 3600)
        return 200, open_session(role, role.split(":")[4], self._service.region, lifetime)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except ValueError as error:
        raise Refused(f"The body must be a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise Refused("The body must be a JSON object.")
    return values


def _number(request: Request, name: str, default: int) -> int:
    values = parse_qs(request.query).get(name)
    if values is None:
        return default
    if not values[0].isdigit():
        raise Refused(f"{name} must be a whole number, not {values[0]!r}.")
    return int(values[0])
