"""Step 2 of a request's way: who calls.

The ways of identifying are asked in one order, and the first that finds something of its own in the request decides
alone: a caller who shows a wrong key is nobody, whatever else a browser or load balancer added.

    1  X-API-Key                       an API key
    2  Authorization                   an API key (Bearer, or the password of Basic), or a token of the OIDC provider
    3  x-amzn-oidc-data                a load balancer that signed somebody in
    4  the certificate headers         a load balancer or nginx that verified a client certificate
    5  the session cookie              somebody who signed in here; one that is not valid counts as none

Nobody learns from the answer what was wrong with what they showed; the log tells.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from mlflow_proxy.access.caller import ANONYMOUS, Caller, Unauthenticated
from mlflow_proxy.access.certificates import CertificateIdentity, header_names
from mlflow_proxy.access.keys import KeyRing
from mlflow_proxy.access.load_balancer import LoadBalancerIdentity
from mlflow_proxy.access.oidc import TokenVerifier
from mlflow_proxy.access.session import Sessions
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits import Limits
from mlflow_proxy.requests import Request, up
from mlflow_proxy.settings import Settings
from mlflow_proxy.telemetry.metrics import Metrics
from mlflow_proxy.telemetry.record import Record

SIGN_IN = "/-/sign-in"
KEY_PREFIX = "mlp_"
_REALM = "mlflow-proxy"
_API = re.compile(r"(/t/[^/]*)?/(ajax-)?api/")
_NOTHING = "Authentication required."
_WRONG = "The API key or token in this request is not valid."
_HOW = (
    "Send an API key or a token in the header Authorization, after the word Bearer; MLflow clients do so if it is in "
    "the environment variable MLFLOW_TRACKING_TOKEN."
)


class Ways(NamedTuple):
    """The ways of identifying that a configuration turns on; None for those it does not."""

    keys: KeyRing | None = None
    tokens: TokenVerifier | None = None
    load_balancer: LoadBalancerIdentity | None = None
    certificates: CertificateIdentity | None = None
    sessions: Sessions | None = None


def build_ways(settings: Settings, sessions: Sessions | None, kept_keys: Path | None = None) -> Ways:
    """What the configuration names. Made in the event loop that uses it. `kept_keys`: see KeyRing."""
    access, oidc = settings.access, settings.oidc
    certificates, load_balancer = settings.certificates, settings.load_balancer
    has_keys = access.keys_file is not None or access.keys_secret is not None
    proxy = settings.upstream.proxy
    return Ways(
        keys=KeyRing(access, settings.aws, proxy=proxy, kept=kept_keys) if has_keys else None,
        tokens=TokenVerifier(oidc, proxy=proxy) if oidc.issuer else None,
        load_balancer=LoadBalancerIdentity(load_balancer, proxy=proxy) if load_balancer.arn else None,
        certificates=CertificateIdentity(certificates) if certificates.subject_header else None,
        sessions=sessions,
    )


def forwarded_identity(settings: Settings) -> frozenset[bytes]:
    """The headers by which trusted proxies may say whom they have identified."""
    return header_names(settings.certificates, settings.load_balancer)


class Identity:
    """Identifies the callers of one worker."""

    def __init__(self, ways: Ways, limits: Limits, metrics: Metrics, *, sign_in: bool) -> None:
        self._ways = ways
        self._limits = limits
        self._metrics = metrics
        self._sign_in = sign_in
        self._anyone = not any(ways)
        self._challenges = _challenges(ways, sign_in=sign_in)
        self._after_wrong = _challenges(ways, sign_in=sign_in, error=', error="invalid_token"')

    async def start(self) -> None:
        """Load keys; from then on they are kept up to date. Failures are logged, never raised."""
        for way in (self._ways.keys, self._ways.tokens, self._ways.load_balancer):
            if way is not None:
                await way.start()

    async def close(self) -> None:
        """Stop keeping keys up to date."""
        for way in (self._ways.keys, self._ways.tokens, self._ways.load_balancer):
            if way is not None:
                await way.close()

    async def identify(self, request: Request, record: Record) -> Caller:
        """The caller of a request; the record learns of it. Raises Refusal: 401, 303 to the sign-in, 429 or 503."""
        if request.dropped_identity:
            self._metrics.dropped_identity(request.dropped_identity)
        if self._anyone:
            record.caller, record.way = ANONYMOUS.subject, ANONYMOUS.way
            return ANONYMOUS
        if request.presented:
            try:
                caller = self._recognised(request, record)
                if isinstance(caller, Coroutine):
                    caller = await self._fetched(request, caller)
            except Unauthenticated as failure:
                self._metrics.auth_failure(_way_shown(request))
                self._limits.check_failures(request.client)
                if not request.behind_proxy:
                    pending = self._limits.add_failure(request.client)
                    if pending is not None:
                        await pending
                raise self._unknown(request, failure.reason) from None
            if caller is not None:
                record.caller, record.way, record.credential = caller.subject, caller.way, caller.credential
                return caller
        raise self._unknown(request, "nothing that identifies a caller")

    async def _fetched(self, request: Request, caller: Coroutine[Any, Any, Caller]) -> Caller:
        """A caller for whom the provider has to be asked: not at the wish of an address that has to wait."""
        try:
            self._limits.check_failures(request.client)
        except Refusal:
            caller.close()
            raise
        return await caller

    def _recognised(self, request: Request, record: Record) -> Caller | Coroutine[Any, Any, Caller] | None:
        """Whom the credentials name; to be awaited only if a provider must be asked, all else takes microseconds.

        So a good caller is recognised whatever others do at the same address, a NAT's or a cluster's.
        """
        presented, ways = request.presented, self._ways
        if b"x-api-key" in presented:
            return self._by_key(_single(presented[b"x-api-key"]))
        if b"authorization" in presented:
            return self._by_authorization(_single(presented[b"authorization"]))
        if b"x-amzn-oidc-data" in presented and ways.load_balancer is not None:
            return ways.load_balancer.identify(_single(presented[b"x-amzn-oidc-data"]))
        if ways.certificates is not None:
            caller = ways.certificates.identify(presented)
            if caller is not None:
                return caller
        if b"cookie" in presented and ways.sessions is not None:
            session = ways.sessions.identify(presented[b"cookie"])
            if session is not None:
                record.set_cookie = session[1]
                return session[0]
        return None

    def _by_key(self, key: str) -> Caller:
        if self._ways.keys is None:
            raise Unauthenticated("an API key was shown, but none are configured")
        return self._ways.keys.identify(key)

    def _by_authorization(self, value: str) -> Caller | Coroutine[Any, Any, Caller]:
        scheme, _, rest = value.partition(" ")
        scheme, rest = scheme.lower(), rest.strip(" ")
        if scheme == "basic":
            return self._by_key(_password(rest))
        if scheme != "bearer":
            raise Unauthenticated("an Authorization header that is neither Bearer nor Basic")
        if rest.startswith(KEY_PREFIX):
            return self._by_key(rest)
        if self._ways.tokens is None:
            raise Unauthenticated("a bearer token was shown, but no OIDC provider is configured")
        return self._ways.tokens.identify(rest)

    def _unknown(self, request: Request, reason: str) -> Refusal:
        """A browser that wants a page is sent to sign in; everybody else gets 401, always the same."""
        if self._sign_in and request.navigates and _may_be_a_person(request):
            target = request.path + (f"?{request.query}" if request.query else "")
            location = f"{up(request.path)}{SIGN_IN.lstrip('/')}?next={quote(target, safe='')}"
            return Refusal(
                303, "Sign in first.", error_code="REDIRECT", headers=[("location", location)], detail=reason
            )
        shown = b"authorization" in request.presented or b"x-api-key" in request.presented
        message = f"{_WRONG if shown else _NOTHING} {_HOW}"
        challenges = self._after_wrong if shown else self._challenges
        return Refusal(401, message, headers=challenges, detail=f"not identified: {reason}")


def _may_be_a_person(request: Request) -> bool:
    """A program that shows something else than a cookie, or asks the API, is never sent to sign in."""
    return request.presented.keys() <= {b"cookie"} and not _API.match(request.path)


def _challenges(ways: Ways, *, sign_in: bool, error: str = "") -> list[tuple[str, str]]:
    """WWW-Authenticate (RFC 9110 section 11.6.1). Basic makes browsers ask; where one can sign in, they must not.

    `error` says that there was a token, and that it is wrong (RFC 6750 section 3.1).
    """
    challenges = [("www-authenticate", f'Bearer realm="{_REALM}"{error}')]
    if ways.keys is not None and not sign_in:
        challenges.append(("www-authenticate", f'Basic realm="{_REALM}", charset="UTF-8"'))
    return challenges


def _single(values: list[bytes]) -> str:
    if len(values) != 1:
        raise Unauthenticated("a header that identifies the caller was sent more than once")
    try:
        return values[0].decode("ascii")
    except UnicodeDecodeError:
        raise Unauthenticated("a header that identifies the caller is not ASCII") from None


def _password(encoded: str) -> str:
    """The password of Basic credentials (RFC 7617); the user name may be anything."""
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        raise Unauthenticated("Basic credentials that cannot be decoded") from None
    _, colon, password = text.partition(":")
    if not colon:
        raise Unauthenticated("Basic credentials without a password")
    return password


def _way_shown(request: Request) -> str:
    """By which way a failure came, for the metric."""
    presented = request.presented
    if b"x-api-key" in presented:
        return "key"
    if b"authorization" in presented:
        value = presented[b"authorization"][0].lower()
        return "token" if value.startswith(b"bearer") and not value.startswith(b"bearer mlp_") else "key"
    return "load-balancer" if b"x-amzn-oidc-data" in presented else "certificate"
