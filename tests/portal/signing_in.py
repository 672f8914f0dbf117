"""A provider to sign in at, a proxy that knows it, and a browser without a screen."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qsl, urlencode, urlsplit

import requests
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, free_port, running, target
from werkzeug.serving import make_server

from mlflow_proxy.access.session import Sessions
from mlflow_proxy.settings import Oidc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its use of authlib.jose
    import oidc_provider_mock._app  # type: ignore[import-untyped]

Environ = dict[str, Any]
Answer = tuple[str, list[tuple[str, str]], bytes]

SECRET = bytes(range(64, 96))
GROUPS = "ml-*"
PUBLIC_URL = "https://mlflow.example.com"
# As it comes, the provider has no public clients.
_METHODS = ["client_secret_basic", "client_secret_post", "none"]
# Of no target is anything asked here; this one cannot even be reached.
_NOWHERE = target("team", "http://127.0.0.1:9")


@dataclass
class Provider:
    """oidc-provider-mock, which itself does not check PKCE, behind a door that does, as RFC 7636 section 4.6 says.

    `documents` changes what discovery says (None: says nothing of it), `token_answer` answers instead of the token
    endpoint. `tokens` are the requests that the token endpoint got. `stop` ends it for good. People reach it by
    `address`, trusting `bundle`.
    """

    issuer: str
    address: str
    bundle: str | None = None
    client_id: str = ""
    client_secret: str = ""
    documents: dict[str, Any] = field(default_factory=dict)
    token_answer: Callable[[], Answer] | None = None
    tokens: list[dict[str, str]] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None
    _challenges: dict[str, str] = field(default_factory=dict)

    def register(self, *redirect_uris: str, method: str = "client_secret_basic") -> None:
        """Register the proxy; from then on the provider takes no other redirect URI, and no other secret."""
        body = {"redirect_uris": redirect_uris, "token_endpoint_auth_method": method, "scope": "openid email profile"}
        answer = self.request("POST", "/oauth2/clients", json=body)
        client = answer.json()
        self.client_id, self.client_secret = client["client_id"], client["client_secret"]

    def user(self, subject: str, **claims: Any) -> None:
        self.request("PUT", f"/users/{subject}", json=claims)

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        answer = requests.request(
            method, self.address + path, timeout=60, allow_redirects=False, verify=self.bundle or True, **options
        )
        answer.raise_for_status()
        return answer

    def door(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """WSGI around the provider."""

        def entered(environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/oauth2/token":
                return self._token(app, environ, start)
            if path == "/oauth2/authorize" and environ["REQUEST_METHOD"] == "POST":
                return self._authorize(app, environ, start)
            if path == "/.well-known/openid-configuration" and self.documents:
                return self._discover(app, environ, start)
            return app(environ, start)

        return entered

    def _authorize(
        self, app: Callable[..., Iterable[bytes]], environ: Environ, start: Callable[..., Any]
    ) -> Iterable[bytes]:
        asked = dict(parse_qsl(environ["QUERY_STRING"]))

        def noted(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            location = next((value for name, value in headers if name.lower() == "location"), "")
            code = dict(parse_qsl(urlsplit(location).query)).get("code")
            if code and asked.get("code_challenge_method") == "S256":
                self._challenges[code] = asked["code_challenge"]
            return start(status, headers, *rest)

        return app(environ, noted)

    def _token(
        self, app: Callable[..., Iterable[bytes]], environ: Environ, start: Callable[..., Any]
    ) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        form = dict(parse_qsl(body.decode()))
        self.tokens.append({**form, "authorization": environ.get("HTTP_AUTHORIZATION", "")})
        if self.token_answer is not None:
            status, headers, content = self.token_answer()
            start(status, headers)
            return [content]
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if self._challenges.get(form.get("code", "")) != urlsafe_b64encode(digest).rstrip(b"=").decode():
            start("400 Bad Request", [("content-type", "application/json")])
            return [b'{"error": "invalid_grant", "error_description": "PKCE"}']
        return app({**environ, "wsgi.input": io.BytesIO(body)}, start)

    def _discover(
        self, app: Callable[..., Iterable[bytes]], environ: Environ, start: Callable[..., Any]
    ) -> Iterable[bytes]:
        document = json.loads(b"".join(app(environ, lambda *_: None)))
        changed = {name: value for name, value in {**document, **self.documents}.items() if value is not None}
        start("200 OK", [("content-type", "application/json")])
        return [json.dumps(changed).encode()]


@contextmanager
def provider(authority: Authority | None = None, name: str = "") -> Iterator[Provider]:
    """A running provider, at which only registered clients may sign in, and only with a nonce.

    With a certificate authority, it is the https server `name`, which is to be reached through an HTTP proxy.
    """
    app = oidc_provider_mock.app(require_client_registration=True, require_nonce=True)
    tls = authority.server(name, "localhost") if authority else None
    server = make_server("localhost", 0, app, threaded=True, ssl_context=tls)
    address = f"{'https' if tls else 'http'}://localhost:{server.server_port}"
    made = Provider(f"https://{name}" if name else address, address, str(authority.bundle) if authority else None)
    server.app = made.door(app)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join(10)
        server.server_close()

    made.stop = stop
    try:
        with patch.object(oidc_provider_mock._app.AuthorizationCodeGrant, "TOKEN_ENDPOINT_AUTH_METHODS", _METHODS):
            yield made
    finally:
        stop()


@dataclass
class Site:
    """A proxy with sign-in. `client_id` is it at the provider, `url` its origin, `audit` its audit log."""

    proxy: Proxy
    provider: Provider
    client_id: str
    url: str
    bundle: Path
    audit: Path

    def events(self, request_id: str, seconds: float = 10.0) -> list[dict[str, Any]]:
        """What the audit log says of a request, as soon as it says something."""
        end = time.monotonic() + seconds
        while True:
            lines = self.audit.read_text().splitlines() if self.audit.exists() else []
            found = [fields for fields in map(json.loads, lines) if fields.get("request_id") == request_id]
            if found:
                return found
            assert time.monotonic() < end, f"nothing about {request_id} in the audit log"
            time.sleep(0.02)

    @property
    def oidc(self) -> Oidc:
        """The options as the proxy has them, for making its cookies here."""
        return Oidc(
            issuer=self.provider.issuer,
            client_id=self.client_id,
            audience=[self.client_id],
            groups_claim="groups",
        )

    @property
    def sessions(self) -> Sessions:
        return Sessions(self.oidc, SECRET)


@contextmanager
def site(
    folder: Path,
    at: Provider,
    *,
    tls: bool = True,
    method: str = "client_secret_basic",
    started: bool = True,
    workers: int = 1,
    server: Mapping[str, Any] | None = None,
    targets: list[Mapping[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Site]:
    """A proxy that signs people in at a provider, with sessions sealed by SECRET.

    `method` is how it authenticates there. Without `started`, the provider is gone when the proxy starts.
    """
    folder.mkdir(exist_ok=True)
    authority = Authority(folder, "authority")
    certificate, key = authority.issue("localhost", "127.0.0.1")
    secret, client_secret = folder / "session-secret", folder / "client-secret"
    secret.write_bytes(SECRET)
    client_secret.write_text("")
    oidc: dict[str, Any] = {
        "issuer": at.issuer,
        "groups_claim": "groups",
        "session_secret_file": str(secret),
        **({} if method == "none" else {"client_secret_file": str(client_secret)}),
    }
    scheme, port = "https" if tls else "http", free_port()
    uris = [f"{scheme}://{host}:{port}/-/signed-in" for host in ("127.0.0.1", "localhost")]
    uris.append(f"{(server or {}).get('public_url', PUBLIC_URL)}/-/signed-in")
    at.register(*uris, method=method)
    client_secret.write_text(f"{at.client_secret}\n")
    oidc |= {"client_id": at.client_id, "audience": json.dumps([at.client_id])}
    variables = {f"MLFLOW_PROXY_OIDC__{name.upper()}": value for name, value in oidc.items()}
    roles = [{"name": "person", "groups": [GROUPS], "targets": ["*"], "allow": ["*"]}]
    listening = {"workers": workers, **(server or {})}
    if tls:
        listening |= {"tls_certificate": str(certificate), "tls_key": str(key)}
    audit = folder / "audit.jsonl"
    options = {"MLFLOW_PROXY_ROLES": json.dumps(roles), "MLFLOW_PROXY_AUDIT__TO": str(audit)}
    options["MLFLOW_PROXY_LIMITS__AUTH_FAILURE_RATE"] = "none"  # failing is what many tests here are about
    if not started:
        at.stop()
    # The provider must know the proxy's address before the proxy can start with what the provider calls it.
    with ExitStack() as stack:
        with patch("tests.faults.proxies.free_port", return_value=port):
            variables |= options | dict(environ or {})
            proxy = stack.enter_context(running(folder, targets or [_NOWHERE], server=listening, environ=variables))
        yield Site(proxy, at, at.client_id, f"{scheme}://127.0.0.1:{port}", authority.bundle, audit)


class Person:
    """Somebody with a browser: keeps cookies, fills in the provider's form, follows what it is told to follow."""

    def __init__(self, at: Site) -> None:
        self.site = at
        self.http = requests.Session()
        self.http.trust_env = False
        self.http.verify = str(at.bundle)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.http.get(self.site.url + path, allow_redirects=False, timeout=60, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return self.http.post(self.site.url + path, allow_redirects=False, timeout=60, **options)

    def ask(self, path: str = "/-/sign-in", **query: str) -> str:
        """Begin to sign in; the provider's address that the proxy leads to."""
        answer = self.get(f"{path}?{urlencode(query)}" if query else path)
        assert answer.status_code == 302, answer.text
        return answer.headers["location"]

    def agree(self, url: str, subject: str, action: str = "") -> str:
        """Fill in the provider's form; the proxy's address that the provider leads back to."""
        form = {"action": action} if action else {"sub": subject}
        answer = self.site.provider.request("POST", url.removeprefix(self.site.provider.issuer), data=form)
        assert answer.status_code == 302, answer.text
        return answer.headers["location"]

    def back(self, url: str) -> requests.Response:
        """Bring the provider's answer to the proxy."""
        assert url.startswith(self.site.url), url
        return self.get(url.removeprefix(self.site.url))

    def sign_in(self, subject: str = "ada", **query: str) -> requests.Response:
        """All of it; the proxy's last answer."""
        return self.back(self.agree(self.ask(**query), subject))

    def known(self) -> bool:
        """Whether the proxy knows who this is."""
        status = self.get("/-/version").status_code
        assert status in (200, 401), status
        return status == 200

    def cookie(self, name: str = Sessions.COOKIE) -> str:
        """The value of a cookie of the proxy's; empty if there is none."""
        return self.http.cookies.get(name) or ""
