"""Identity providers for tests: the real oidc-provider-mock, and an issuer whose keys and documents a test changes."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import requests
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its use of authlib.jose
    import oidc_provider_mock  # type: ignore[import-untyped]

CLIENT = "mlflow"
_REDIRECT = "http://localhost/-/signed-in"


class MockProvider(NamedTuple):
    """A running oidc-provider-mock. Its tokens name no key id, and its access tokens are no JWTs: use ID tokens."""

    port: int

    @property
    def issuer(self) -> str:
        return f"http://localhost:{self.port}"

    def token(
        self,
        user: str = "alice",
        claims: Mapping[str, Any] | None = None,
        *,
        client: str = CLIENT,
        nonce: str = "",
        host: str = "localhost",
    ) -> str:
        """The ID token of a sign-in. Reached by another `host`, the provider names itself so as the issuer."""
        base = f"http://{host}:{self.port}"
        with requests.Session() as session:
            session.trust_env = False
            session.put(f"{base}/users/{user}", json=dict(claims or {})).raise_for_status()
            wanted = {"client_id": client, "response_type": "code", "redirect_uri": _REDIRECT, "scope": "openid email"}
            if nonce:
                wanted["nonce"] = nonce
            answer = session.post(f"{base}/oauth2/authorize", params=wanted, data={"sub": user}, allow_redirects=False)
            code = parse_qs(urlsplit(answer.headers["location"]).query)["code"][0]
            form = {"grant_type": "authorization_code", "code": code, "redirect_uri": _REDIRECT}
            form |= {"client_id": client, "client_secret": "any"}
            return str(session.post(f"{base}/oauth2/token", data=form).json()["id_token"])

    def public_key(self) -> RSAKey:
        """The key that it signs with, as everybody can have it."""
        with requests.Session() as session:
            session.trust_env = False
            return RSAKey.import_key(session.get(f"{self.issuer}/jwks").json()["keys"][0])


@contextmanager
def mock_provider(port: int = 0, *, token_age: timedelta = timedelta(hours=1)) -> Iterator[MockProvider]:
    """The real oidc-provider-mock on this port, or a free one. Each run has a key of its own."""
    before = os.environ.get("AUTHLIB_INSECURE_TRANSPORT")
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
    try:
        with oidc_provider_mock.run_server_in_thread(port, access_token_max_age=token_age) as server:
            yield MockProvider(server.server_port)
    finally:
        if before is None:
            del os.environ["AUTHLIB_INSECURE_TRANSPORT"]
        else:
            os.environ["AUTHLIB_INSECURE_TRANSPORT"] = before


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Answer(NamedTuple):
    """What a path answers. `drip` sends the body byte by byte, with so many seconds between."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = {}
    drip: float = 0.0


class Documents:
    """An HTTP server on loopback that answers what a test puts in, and counts who asks.

    `answers` is by path; `asked` counts by path, `held` (when set) keeps every request waiting until it is released.
    """

    def __init__(self, port: int = 0) -> None:
        self.answers: dict[str, Answer | Callable[[], Answer]] = {}
        self.asked: Counter[str] = Counter()
        self.held: threading.Event | None = None
        self._server = _Server(("127.0.0.1", port), self)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Go away: from now on nobody listens on the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], documents: Documents) -> None:
        super().__init__(address, _Handler)
        self.documents = documents


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        documents = self.server.documents
        documents.asked[self.path] += 1
        if documents.held is not None:
            documents.held.wait(60)
        found = documents.answers.get(self.path, Answer(b"no such document", 404))
        answer = found() if callable(found) else found
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        try:
            if not answer.drip:
                self.wfile.write(answer.body)
                return
            for index in range(len(answer.body)):
                self.wfile.write(answer.body[index : index + 1])
                time.sleep(answer.drip)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Issuer(Documents):
    """An issuer whose keys a test makes, publishes and takes away; `published` are those in its JWK set."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.published: list[dict[str, Any]] = []
        self.key = self.publish(RSAKey.generate_key(2048))
        self.answers["/.well-known/openid-configuration"] = self._discovery
        self.answers["/jwks"] = self._jwks

    def publish(self, key: Key, kid: str | None = None, **parameters: Any) -> Key:
        """Put a key's public half into the JWK set, with a kid; gives the private one with it."""
        name = kid or str(uuid.uuid4())
        self.published.append({**key.as_dict(private=False), "kid": name, **parameters})
        return type(key).import_key({**key.as_dict(private=True), "kid": name})

    def rotate(self) -> Key:
        """Sign with a new key, and publish only that."""
        self.published.clear()
        self.key = self.publish(RSAKey.generate_key(2048))
        return self.key

    def claims(self, **more: Any) -> dict[str, Any]:
        """The claims of a good token; None takes one away."""
        now = int(time.time())
        claims = {"iss": self.url, "aud": CLIENT, "sub": "alice", "iat": now, "exp": now + 3600, "jti": "token-7"}
        return {name: value for name, value in (claims | more).items() if value is not None}

    def token(self, header: Mapping[str, Any] | None = None, key: Key | None = None, **claims: Any) -> str:
        """A good token, but for what is changed. A header's None takes it away."""
        signer = key or self.key
        whole = {"alg": algorithm_of(signer), "kid": signer.get("kid"), "typ": "JWT", **(header or {})}
        whole = {name: value for name, value in whole.items() if value is not None}
        return seal(whole, self.claims(**claims), signer)

    def _discovery(self) -> Answer:
        return json_answer({"issuer": self.url, "jwks_uri": f"{self.url}/jwks"})

    def _jwks(self) -> Answer:
        return json_answer({"keys": self.published})


def json_answer(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


def algorithm_of(key: Key) -> str:
    if isinstance(key, RSAKey):
        return "RS256"
    if isinstance(key, ECKey):
        return {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}[key.curve_name]
    if isinstance(key, OKPKey):
        return "EdDSA"
    return "HS256"


def seal(
    header: Mapping[str, Any] | bytes,
    claims: Mapping[str, Any] | bytes,
    key: Key | None,
    *,
    name: str | None = None,
    padded: bool = False,
) -> str:
    """Sign whatever is given, in compact form, with no checks; without a key, there is an empty signature.

    `name` is the algorithm where the header's is not the true one; `padded` as AWS's load balancers do it.
    """
    encoded = b".".join(_encode(part, padded=padded) for part in (header, claims))
    signature = b""
    if key is not None:
        stated = header.get("alg") if isinstance(header, Mapping) else None
        signature = JWSRegistry.algorithms[name or stated or algorithm_of(key)].sign(encoded, key)
    return (encoded + b"." + _encode(signature, padded=padded)).decode()


def _encode(part: Mapping[str, Any] | bytes, *, padded: bool) -> bytes:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    encoded = base64.urlsafe_b64encode(data)
    return encoded if padded else encoded.rstrip(b"=")


def pem(key: Key) -> bytes:
    """A key's public half, as a PEM."""
    assert isinstance(key, RSAKey | ECKey | OKPKey)
    return key.as_pem(private=False)
