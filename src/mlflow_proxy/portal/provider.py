"""The proxy as a client of its OpenID Connect provider: where to send a browser, and what a code is worth.

Authlib speaks the protocol; here is how it is used, what may go wrong, and what to say then. No pages, no cookies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import requests

from mlflow_proxy.access.fetch import system_cas
from mlflow_proxy.settings import Oidc, is_loopback

logger = logging.getLogger(__name__)

SIGNED_IN = "/-/signed-in"
SIGN_OUT = "/-/sign-out"

TRY_AGAIN = "Try again. If that does not help, tell the operator of this proxy the request id below."
OPERATOR = "Tell the operator of this proxy the request id below; its audit log has the reason."

# Seconds to connect to the provider's token endpoint, and to wait for its answer.
_TIMEOUT = (5, 10)
# The provider's error codes (RFC 6749 section 4.1.2.1, OpenID Connect Core section 3.1.2.6) that mean "not this
# person", or that another attempt may help; all others are mistakes of a configuration.
_DENIED = frozenset({"access_denied", "consent_required", "interaction_required", "login_required"})
_PASSING = frozenset({"temporarily_unavailable", "server_error"})


class SignInFailed(Exception):
    """A sign-in that comes to nothing. `title` and `advice` are for the person, `reason` for log and audit.

    `retry_after` is in seconds.
    """

    def __init__(self, status: int, title: str, advice: str, *, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.title = title
        self.advice = advice
        self.reason = reason
        self.retry_after = retry_after


class Provider:
    """One provider, and the client that the proxy is there. `proxy` is the HTTP proxy on the way out.

    `metadata` is the provider's discovery document, `base` the proxy's own origin as browsers see it. All methods
    raise SignInFailed.
    """

    def __init__(self, oidc: Oidc, client_id: str, *, proxy: str | None = None) -> None:
        self._oidc = oidc
        self._client_id = client_id
        self._proxy = proxy

    def authorization_url(
        self, metadata: Mapping[str, Any], base: str, *, state: str, nonce: str, verifier: str
    ) -> str:
        """Where a browser goes to sign in; it comes back to SIGNED_IN."""
        url = _endpoint(metadata, "authorization_endpoint")
        with self._client(metadata, base) as client:
            return str(client.create_authorization_url(url, state=state, nonce=nonce, code_verifier=verifier)[0])

    def code(self, answer: Mapping[str, str]) -> str:
        """The authorization code that a browser brings back, by the parameters of its request."""
        issuer, error, code = answer.get("iss"), answer.get("error"), answer.get("code")
        if issuer is not None and issuer != self._oidc.issuer:  # RFC 9207
            raise SignInFailed(400, "The answer is another provider's", OPERATOR, reason="iss is not oidc.issuer")
        if code and error is None:
            return code
        reason = f"the provider answered with error {error!r:.80}" if error else "the provider sent no code"
        if error in _DENIED:
            raise SignInFailed(403, "The provider did not sign you in", f"It says {error}. Try again.", reason=reason)
        if error in _PASSING:
            raise SignInFailed(503, "The provider cannot sign you in now", TRY_AGAIN, reason=reason)
        raise SignInFailed(502, "The provider refused to sign you in", OPERATOR, reason=reason)

    def id_token(self, metadata: Mapping[str, Any], base: str, *, code: str, verifier: str) -> str:
        """The ID token for a code (OpenID Connect Core section 3.1.3), not yet verified. Blocks."""
        from authlib.common.errors import AuthlibBaseError  # type: ignore[import-untyped]  # noqa: PLC0415

        url = _endpoint(metadata, "token_endpoint")
        try:
            with self._client(metadata, base) as client:
                token = client.fetch_token(
                    url,
                    grant_type="authorization_code",
                    code=code,
                    code_verifier=verifier,
                    timeout=_TIMEOUT,
                    allow_redirects=False,
                )
        except requests.RequestException as error:
            raise unreachable(f"the token endpoint: {type(error).__name__}") from None
        except AuthlibBaseError as error:
            reason = f"the token endpoint answered with error {error.error!r:.80}"
            if error.error == "invalid_grant":
                raise SignInFailed(400, "This sign-in is no longer valid", "Try again.", reason=reason) from None
            raise SignInFailed(502, "The provider refused to sign you in", OPERATOR, reason=reason) from None
        except ValueError:
            raise invalid("the token endpoint's answer is not a JSON object") from None
        id_token = token.get("id_token")
        if not isinstance(id_token, str):
            raise invalid("the provider sent no ID token; oidc.scopes must have openid")
        return id_token

    def end_session_url(self, metadata: Mapping[str, Any], base: str, id_token: str | None) -> str:
        """Where a browser signs out there, to come back to SIGN_OUT (OpenID Connect RP-Initiated Logout 1.0)."""
        endpoint = _endpoint(metadata, "end_session_endpoint")
        query = {"client_id": self._client_id, "post_logout_redirect_uri": base + SIGN_OUT}
        if id_token is not None:
            query["id_token_hint"] = id_token
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}"

    def _client(self, metadata: Mapping[str, Any], base: str) -> Any:
        """Authlib's client. The environment has no say: neither its proxies, nor .netrc, nor its CA bundles."""
        from authlib.integrations.requests_client import OAuth2Session  # type: ignore[import-untyped]  # noqa: PLC0415

        secret = self._secret()
        methods = metadata.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        only_post = "client_secret_basic" not in methods and "client_secret_post" in methods
        client = OAuth2Session(
            self._client_id,
            secret,
            scope=" ".join(self._oidc.scopes),
            redirect_uri=base + SIGNED_IN,
            code_challenge_method="S256",
            token_endpoint_auth_method="client_secret_post" if secret and only_post else None,
        )
        client.trust_env = False
        client.verify = str(self._oidc.ca_bundle) if self._oidc.ca_bundle else system_cas()
        if self._proxy and not is_loopback(urlsplit(_endpoint(metadata, "token_endpoint")).hostname or ""):
            client.proxies = {"http": self._proxy, "https": self._proxy}
        return client

    def _secret(self) -> str | None:
        """The client's secret as its file has it now, so that it can be exchanged without a restart."""
        if self._oidc.client_secret_file is None:
            return None
        try:
            return read_client_secret(self._oidc.client_secret_file)
        except ValueError as error:
            raise _misconfigured(f"oidc.client_secret_file {error}") from None


def read_client_secret(path: Path) -> str:
    """The secret in a file. Raises ValueError with the reason why it cannot be used."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise ValueError(f"cannot be read: {why}") from None
    if not secret:
        raise ValueError("is empty")
    return secret


def unreachable(reason: str) -> SignInFailed:
    """The provider does not answer."""
    return SignInFailed(503, "The provider cannot be reached", TRY_AGAIN, reason=reason)


def invalid(reason: str) -> SignInFailed:
    """The provider's answer is not one that can be believed."""
    return SignInFailed(502, "The provider's answer is not valid", OPERATOR, reason=reason)


def _misconfigured(reason: str) -> SignInFailed:
    logger.error("sign-in: %s", reason)
    return SignInFailed(500, "Sign-in is not set up correctly", OPERATOR, reason=reason)


def _endpoint(metadata: Mapping[str, Any], name: str) -> str:
    """A URL of the discovery document. Without TLS, only on this machine: codes and secrets go there."""
    url = metadata.get(name)
    if not isinstance(url, str) or not re.fullmatch(r"https?://[!-~]+", url):
        raise _misconfigured(f"the provider's discovery document has no {name}")
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise _misconfigured(f"the provider's {name} is not an https URL")
    return url
