"""Sign-in by browser at an OpenID Connect provider, and sign-out: the pages. What a session is, is in `access.session`.

The authorization code flow with PKCE, state and nonce (OpenID Connect Core 1.0 section 3.1, RFC 7636, RFC 9700). What
the flow must remember is in a sealed cookie of the browser that began it, so that an answer which another browser
began, or somebody else, is worth nothing. Everything here answers a person: with pages, not with JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from flask import Blueprint, Response, g, make_response, redirect, render_template, request

from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.seal import LARGEST_COOKIE, cookie_name, cookie_value
from mlflow_proxy.access.session import ATTRIBUTES, SessionTooLarge
from mlflow_proxy.errors import Refusal
from mlflow_proxy.portal.places import DEADLINE, Busy
from mlflow_proxy.portal.provider import OPERATOR, SIGN_OUT, TRY_AGAIN, Provider, SignInFailed, invalid, unreachable
from mlflow_proxy.requests import up
from mlflow_proxy.settings import is_loopback

if TYPE_CHECKING:
    from werkzeug.wrappers import Response as BaseResponse

    from mlflow_proxy.portal import Portal

STATE_COOKIE = "__Host-mlflow-proxy-signin"
# The ID token, which some providers demand at sign-out. Only that page gets it, so the prefix cannot be __Host-.
HINT_COOKIE = "__Secure-mlflow-proxy-id-token"

# Seconds to wait for discovery, whose answer is mostly at hand: strangers can ask for it.
_DISCOVERY_DEADLINE = 10.0
# Seconds that somebody has for the provider's pages.
_MOST_SECONDS = 600
# A path of this proxy, in printable ASCII: no second slash and no backslash, which browsers take for one, may make it
# another host's; no control character may split a header.
_LOCAL_PATH = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]{0,1022})?")
# Parameters of the provider's answer.
_ANSWER = ("code", "state", "error", "iss")

T = TypeVar("T")


class _Pending(NamedTuple):
    """A sign-in under way, as the browser keeps it. `begun` in seconds since the epoch."""

    state: str
    nonce: str
    verifier: str
    next: str
    begun: float


def blueprint(portal: Portal) -> Blueprint:
    """The pages, bound to one worker's parts, among which there must be sessions and tokens."""
    pages = Blueprint("signin", __name__, template_folder="templates", url_prefix="/-")
    flow = _Flow(portal)
    pages.get("/sign-in")(flow.sign_in)
    pages.get("/signed-in")(flow.signed_in)
    pages.get("/sign-out")(flow.ask)
    pages.post("/sign-out")(flow.sign_out)
    pages.register_error_handler(SignInFailed, flow.failed)
    return pages


class _Flow:
    """The pages of one worker. What belongs to one visit is in Flask's `g`."""

    def __init__(self, portal: Portal) -> None:
        parts, settings = portal.parts, portal.parts.settings
        if parts.sessions is None or parts.tokens is None or settings.oidc.client_id is None:
            raise ValueError("sign-in needs oidc.issuer and oidc.client_id")
        self._in_loop = portal.in_loop
        self._place = portal.place
        self._sessions = parts.sessions
        self._tokens = parts.tokens
        self._audit = parts.audit
        self._client_id = settings.oidc.client_id
        self._provider = Provider(settings.oidc, self._client_id, proxy=settings.upstream.proxy)
        address, prefix = settings.server.address, settings.server.prefix
        self._public_url = address.url if address else None
        self._hint_attributes = ATTRIBUTES.replace("Path=/", f"Path={prefix}{SIGN_OUT}")
        self._state_cookie = cookie_name(STATE_COOKIE, prefix)
        self._state_seal = parts.sessions.seal_for(self._state_cookie)
        self._hint_seal = parts.sessions.seal_for(HINT_COOKIE)

    def sign_in(self) -> BaseResponse:
        """Send the browser to the provider."""
        base = self._base()
        parts = urlsplit(base)
        if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
            raise SignInFailed(
                400,
                "Sign-in needs HTTPS",
                "Open this proxy's https address. Its operator can set server.tls_certificate, or, where another "
                "server ends TLS, server.public_url.",
                reason="sign-in over plain HTTP, where browsers keep no secure cookie",
            )
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        url = self._provider.authorization_url(self._metadata(), base, state=state, nonce=nonce, verifier=verifier)
        answer = redirect(url, 302)
        pending = _Pending(state, nonce, verifier, local_path(request.args.get("next")), time.time())
        sealed = self._state_seal.seal(json.dumps(pending).encode())
        answer.headers.add("set-cookie", f"{self._state_cookie}={sealed}; Max-Age={_MOST_SECONDS}{ATTRIBUTES}")
        return answer

    def signed_in(self) -> BaseResponse:
        """Take the provider's answer: check it, begin a session, and send the browser where it wanted to go."""
        answer = _parameters()
        pending = self._pending(answer.get("state", ""))
        if pending is None:
            reason = "the answer does not belong to a sign-in that this browser began, or it came too late"
            if self._sessions.identify(_cookies()) is not None:  # another tab was faster, or a page was loaded again
                self._record_failure(reason)
                return redirect(up(request.path), 303)
            raise SignInFailed(
                400,
                "This sign-in is no longer valid",
                "It may have been begun in another tab, under another address of this proxy, or more than ten minutes "
                "ago; or the browser keeps no cookies. Try again.",
                reason=reason,
            )
        g.pending = pending
        code = self._provider.code(answer)
        work = self._identified(code, pending, self._base(), self._sessions.new_id())
        id_token, caller = self._ask_provider(work, DEADLINE)
        if not self._sessions.use_once(pending.state, pending.begun + _MOST_SECONDS):
            raise SignInFailed(400, "This sign-in was used before", "Try again.", reason="the state was used before")
        return self._begin(caller, id_token, pending.next)

    def ask(self) -> BaseResponse:
        """The button that signs out; without a session, what one sees after it."""
        session = self._sessions.identify(_cookies())
        if session is None:
            return _signed_out()
        subject = session[0].subject.partition(":")[2]
        return _notice("Sign out?", f"You are signed in as {subject}.", sign_out="sign-out")

    def sign_out(self) -> BaseResponse:
        """End the session here, then at the provider, if it has a page for that.

        Not by a redirect: Chromium holds those that follow a form to the page's form-action too, and where providers
        lead on is not known here. So a page that leads there.
        """
        cookies = _cookies()
        session = self._sessions.identify(cookies)
        removal = self._sessions.end(cookies)
        url = None
        if session is not None:
            self._record("sign-out", session[0])
            url = self._end_session_url(cookies, session[0].credential)
        if url is None:
            answer = _signed_out()
        else:
            answer = _notice(
                "You are signed out of this proxy", "Now to the provider, to sign out there.", link=(url, "Go on")
            )
            answer.headers["refresh"] = f"0; url={url}"
        answer.headers.add("set-cookie", removal)
        answer.headers.add("set-cookie", f"{HINT_COOKIE}=; Max-Age=0{self._hint_attributes}")
        return answer

    def failed(self, failure: SignInFailed) -> BaseResponse:
        """The page that says what to do, and the audit line that says why."""
        self._record_failure(failure.reason)
        pending: _Pending | None = g.get("pending")
        link = _sign_in_again(pending.next if pending else "/")
        answer = _notice(failure.title, failure.advice, link=link, request_id=g.request_id)
        answer.status_code = failure.status
        if failure.retry_after is not None:
            answer.headers["retry-after"] = str(failure.retry_after)
        if pending is not None:
            self._forget_pending(answer)
        return answer

    def _forget_pending(self, answer: BaseResponse) -> None:
        answer.headers.add("set-cookie", f"{self._state_cookie}=; Max-Age=0{ATTRIBUTES}")

    def _base(self) -> str:
        """This proxy's own address; the Host header was checked when the request was read."""
        return self._public_url or f"{request.scheme}://{request.host}"

    def _pending(self, state: str) -> _Pending | None:
        """The sign-in that an answer with this state ends, if this browser began it, and in time."""
        value = cookie_value(_cookies(), self._state_cookie.encode("ascii"))
        content = None if value is None else self._state_seal.open(value)
        if content is None:
            return None
        pending = _Pending(*json.loads(content))
        own = secrets.compare_digest(pending.state.encode(), state.encode())
        return pending if own and abs(time.time() - pending.begun) < _MOST_SECONDS else None

    def _metadata(self) -> Mapping[str, Any]:
        return self._ask_provider(self._discovered(), _DISCOVERY_DEADLINE)

    def _ask_provider(self, work: Coroutine[Any, Any, T], deadline: float) -> T:
        """Run what talks to the provider in the event loop, for `deadline` seconds at the most."""
        try:
            with self._place():
                return self._in_loop(work, deadline)
        except Busy as busy:
            work.close()
            raise SignInFailed(
                503, "Too many are waiting", TRY_AGAIN, reason=busy.message, retry_after=busy.retry_after
            ) from None
        except Refusal as refusal:
            raise unreachable(f"the provider: {refusal.detail or refusal.message}") from None

    async def _discovered(self) -> Mapping[str, Any]:
        return await self._tokens.metadata()

    async def _identified(self, code: str, pending: _Pending, base: str, session_id: str) -> tuple[str, Caller]:
        """The ID token for a code, and whom it names, with the session's id as credential."""
        metadata = await self._tokens.metadata()
        id_token = await asyncio.to_thread(
            self._provider.id_token, metadata, base, code=code, verifier=pending.verifier
        )
        try:
            claims = await self._tokens.claims(id_token, audience=self._client_id, nonce=pending.nonce)
        except Unauthenticated as error:
            raise invalid(f"the ID token: {error.reason}") from None
        try:
            return id_token, self._tokens.caller_of(claims, way="session", credential=session_id)
        except Unauthenticated as error:
            reason = f"the ID token: {error.reason}"
            raise SignInFailed(403, "Your account may not use this proxy", OPERATOR, reason=reason) from None

    def _begin(self, caller: Caller, id_token: str, path: str) -> BaseResponse:
        """A new session, never one that was there before the sign-in (session fixation)."""
        try:
            cookie = self._sessions.begin(caller)
        except SessionTooLarge as error:
            raise SignInFailed(403, "You are in too many groups", OPERATOR, reason=str(error)) from None
        self._sessions.end(_cookies())
        self._record("sign-in", caller)
        answer = redirect(up(request.path) + path.lstrip("/"), 303)
        answer.headers.add("set-cookie", cookie)
        hint = self._hint_seal.seal(json.dumps([caller.credential, id_token]).encode())
        hint_cookie = f"{HINT_COOKIE}={hint}{self._hint_attributes}"
        if len(hint_cookie) <= LARGEST_COOKIE:
            answer.headers.add("set-cookie", hint_cookie)
        self._forget_pending(answer)
        return answer

    def _end_session_url(self, cookies: list[bytes], session_id: str) -> str | None:
        """The provider's page for signing out, if it has one and answers."""
        value = cookie_value(cookies, HINT_COOKIE.encode("ascii"))
        content = None if value is None else self._hint_seal.open(value)
        hinted_id, id_token = json.loads(content) if content is not None else (None, None)
        hint = id_token if hinted_id == session_id else None
        try:
            metadata = self._metadata()
            has_page = "end_session_endpoint" in metadata
            return self._provider.end_session_url(metadata, self._base(), hint) if has_page else None
        except SignInFailed:
            return None

    def _record(self, event: str, caller: Caller) -> None:
        record = g.visit.record
        record.caller, record.way, record.credential = caller.subject, caller.way, caller.credential
        self._audit.write(
            event,
            request_id=g.request_id,
            caller=caller.subject,
            way=caller.way,
            credential=caller.credential,
            client=g.visit.client,
        )

    def _record_failure(self, reason: str) -> None:
        g.visit.record.error = reason
        self._audit.write("sign-in-failed", request_id=g.request_id, client=g.visit.client, reason=reason)


def local_path(text: str | None) -> str:
    """A path of this proxy to go to after sign-in: what was asked for if it is one, else the front page.

    Paths of the sign-in itself are none: they would lead in a circle.
    """
    if text is None or not _LOCAL_PATH.fullmatch(text) or text.startswith("/-/sign"):
        return "/"
    return text


def _notice(
    title: str,
    text: str,
    *,
    link: tuple[str, str] | None = None,
    sign_out: str | None = None,
    request_id: str | None = None,
) -> Response:
    page = render_template("notice.html", title=title, text=text, link=link, sign_out=sign_out, request_id=request_id)
    return make_response(page)


def _signed_out() -> Response:
    return _notice("You are signed out", "To use this proxy again, sign in.", link=_sign_in_again("/"))


def _sign_in_again(path: str) -> tuple[str, str]:
    return f"sign-in?next={quote(path, safe='')}", "Sign in"


def _cookies() -> list[bytes]:
    """The Cookie headers as they came: WSGI joins several with a comma, which is not how cookies are parted."""
    return [value for name, value in request.environ["asgi.scope"]["headers"] if name == b"cookie"]


def _parameters() -> dict[str, str]:
    """The parameters of the provider's answer; none at all if one is there twice (RFC 6749 section 3.1)."""
    found = {name: request.args.getlist(name) for name in _ANSWER}
    if any(len(values) > 1 for values in found.values()):
        return {}
    return {name: values[0] for name, values in found.items() if values}
