"""Where a presigned URL leads: MLflow's own UI for one target, to browsers that hold its session cookie.

A session acts with the permissions of whoever asked for the URL *(assumed: AWS does not say)*.
"""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from .asgi import ClientGone, Receive, Request, Scope, Send, read_request, respond
from .data_plane import DataPlane, unless_gone
from .errors import AwsError
from .identity import Principal
from .journal import Entry
from .service import Service
from .sessions import cookie_name
from .targets import Target

_AUTH = "/auth"


class UiGate:
    """ASGI application of one target's UI origin."""

    def __init__(self, target: Target, service: Service, plane: DataPlane) -> None:
        self._target = target
        self._sessions = service.sessions
        self._journal = service.journal
        self._plane = plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Redeem a presigned URL, or serve the UI to an open session."""
        try:
            request = await read_request(scope, receive)
        except ClientGone:
            return
        entry = self._journal.open("ui", request, hide_query=request.path == _AUTH)
        entry.target = self._target.name
        await unless_gone(lambda: self._answer(request, entry, send), receive, entry)

    async def _answer(self, request: Request, entry: Entry, send: Send) -> None:
        if request.path == _AUTH and request.method == "GET":
            await self._open(request, entry, send)
            return
        principal = self._session(request)
        if principal is None:
            await self._no_session(entry, send)
            return
        try:
            _check_origin(request)
            self._plane.permit(request, principal, self._target.arn, entry)
            await self._plane.serve(_without_origin(request), self._target, entry, send)
        except AwsError as error:
            await self._plane.refuse(error, entry, request, send)

    async def _open(self, request: Request, entry: Entry, send: Send) -> None:
        tokens = parse_qs(request.query).get("authToken", [])
        session = self._sessions.redeem(tokens[0], self._target) if len(tokens) == 1 else None
        if session is None:
            entry.verdict, entry.status = "AccessDeniedException", 403
            text = "This link was used before, has expired, or is not whole. Ask for a new presigned URL."
            await _page(send, 403, "Link not valid", text)
            return
        value, seconds = session
        cookie = f"{cookie_name(self._target)}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax"
        entry.verdict, entry.status = "allowed", 302
        headers = [("location", "/"), ("set-cookie", cookie), ("cache-control", "no-store")]
        await respond(send, 302, headers, b"")

    async def _no_session(self, entry: Entry, send: Send) -> None:
        entry.verdict, entry.status = "MissingAuthenticationTokenException", 403
        text = "There is no open session in this browser, or it has ended. Ask for a new presigned URL."
        await _page(send, 403, "No session", text)

    def _session(self, request: Request) -> Principal | None:
        cookie = SimpleCookie()
        try:
            cookie.load("; ".join(request.values("cookie")))
        except CookieError:
            return None
        found = cookie.get(cookie_name(self._target))
        return None if found is None else self._sessions.find(found.value, self._target)


def _check_origin(request: Request) -> None:
    """Other sites must not act with the browser's cookie; MLflow itself checks the same for its own origin."""
    origins = request.values("origin")
    own = f"http://{request.value('host')}"
    if origins and origins != [own]:
        raise AwsError("AccessDeniedException", "Cross-origin request refused.")


def _without_origin(request: Request) -> Request:
    """MLflow knows itself by another origin and would refuse this one, which has been checked."""
    kept = tuple((name, value) for name, value in request.headers if name not in ("origin", "referer"))
    return Request(request.method, request.path, request.query, kept, request.body)


async def _page(send: Send, status: int, title: str, text: str) -> None:
    """A small page for people whose browser has no session."""
    page = f"<!doctype html><html lang=en><title>{title}</title><h1>{title}</h1><p>{text}</p></html>\n"
    headers = [("content-type", "text/html; charset=utf-8"), ("cache-control", "no-store")]
    await respond(send, status, headers, page.encode())
