"""What `mlflow-proxy validate` is told: the address of a deployment, and what to show there. Nothing is sent from here.

A key or token comes from a file or the environment, never from an argument: arguments are in every process list.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from mlflow_proxy.access.fetch import system_cas
from mlflow_proxy.routing import OWN_PREFIX, PREFIX
from mlflow_proxy.settings import KEY_VARIABLE, is_loopback
from mlflow_proxy.targets import TARGET_NAME, TargetError, parse_public_url

# As MLflow's own clients take it.
TOKEN_VARIABLE = "MLFLOW_TRACKING_TOKEN"  # noqa: S105  (a name)
_DEFAULT_PORTS = {"https": 443, "http": 80}


class Mistake(ValueError):
    """What was asked for cannot be done; the text says what to write instead."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A proxy to validate. `host` has no brackets, `prefix` is the path below which it is. `credential` is sent as
    a bearer token, to this address only.

    `ca` is a PEM file to trust instead of the system's CAs, `client_certificate` the files of a certificate and of its
    key; `timeout` is in seconds, for one call as a whole.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""
    target: str | None = None
    credential: str | None = field(default=None, repr=False)
    ca: str | None = None
    client_certificate: tuple[str, str] | None = None
    timeout: float = 30.0

    @property
    def origin(self) -> str:
        """`https://host`, with the port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.has_default_port else f":{self.port}")

    @property
    def base(self) -> str:
        """The proxy's address, to which its paths are added."""
        return self.origin + self.prefix

    @property
    def url(self) -> str:
        """What a caller has in MLFLOW_TRACKING_URI."""
        return self.base + (f"{PREFIX}{self.target}" if self.target else "")

    @property
    def has_default_port(self) -> bool:
        """Whether it is where people look for its scheme."""
        return self.port == _DEFAULT_PORTS[self.scheme]

    @property
    def is_loopback(self) -> bool:
        """Whether no network lies between."""
        return is_loopback(self.host)

    @property
    def trusted(self) -> str | bool:
        """The file or folder of CAs, as requests takes it."""
        return self.ca or system_cas()

    def tls_context(self) -> ssl.SSLContext:
        """For a connection that is verified as the calls are."""
        trusted = self.trusted
        folder = isinstance(trusted, str) and Path(trusted).is_dir()
        context = ssl.create_default_context(
            cafile=trusted if isinstance(trusted, str) and not folder else None,
            capath=trusted if isinstance(trusted, str) and folder else None,
        )
        if self.client_certificate is not None:
            context.load_cert_chain(*self.client_certificate, password=_no_password)
        return context


def deployment(
    url: str,
    *,
    target: str | None = None,
    key: str | None = None,
    token: str | None = None,
    environ: Mapping[str, str],
    ca: Path | None = None,
    client_cert: Path | None = None,
    client_key: Path | None = None,
    timeout: float = 30.0,
) -> Deployment:
    """What these options and variables mean. `key` and `token` are what the files hold. Raises Mistake."""
    found = _at(url, target)
    if key is not None and token is not None:
        raise Mistake("--key-file and --token-file exclude each other; give one")
    credential = _credential(key, token, environ)
    if found.scheme == "http" and not found.is_loopback and credential is not None:
        raise Mistake(
            f"{found.origin} is plain HTTP, and a key must not travel in the clear; write https://, or validate from "
            "the proxy's own host by http://127.0.0.1:<port>"
        )
    if client_key is not None and client_cert is None:
        raise Mistake("--client-key needs --client-cert")
    certificate = None
    if client_cert is not None:
        certificate = (str(client_cert), str(client_key or client_cert))
    made = replace(
        found,
        credential=credential,
        ca=None if ca is None else str(ca),
        client_certificate=certificate,
        timeout=timeout,
    )
    _check_files(made)
    return made


def _at(url: str, target: str | None) -> Deployment:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Mistake("--url is not a URL; write one like https://mlflow.example.com") from None
    if parts.scheme not in _DEFAULT_PORTS or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise Mistake("--url is not an address of a proxy; write one like https://mlflow.example.com")
    if parts.username is not None:
        raise Mistake(f"--url holds a password; give the key in {KEY_VARIABLE} or by --key-file instead")
    if parts.query or parts.fragment:
        raise Mistake("--url has a query or fragment; write only scheme, host, port, and /t/<target>")
    before, slash, named = parts.path.rstrip("/").partition(PREFIX)
    try:
        prefix = parse_public_url(f"{parts.scheme}://{parts.netloc}{before}").prefix
    except TargetError as error:
        raise Mistake(f"--url {error}; write one like https://mlflow.example.com{PREFIX}<target>") from None
    if slash and not named:
        raise Mistake(f"--url names no target; write one like https://mlflow.example.com{PREFIX}<target>")
    if target is not None and named and target != named:
        raise Mistake(f"--url says {PREFIX}{named}, --target says {target}; give one")
    wanted = target or named or None
    if wanted is not None and not TARGET_NAME.fullmatch(wanted):
        raise Mistake(f"{wanted!r} is not the name of a target; the overview at {prefix}{OWN_PREFIX} lists them")
    return Deployment(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], prefix, wanted)


def _credential(key: str | None, token: str | None, environ: Mapping[str, str]) -> str | None:
    """What to show, from the first place that has it; the proxy tells keys from tokens by their prefix."""
    for where, text in (
        ("--key-file", key),
        ("--token-file", token),
        (KEY_VARIABLE, environ.get(KEY_VARIABLE) or None),
        (TOKEN_VARIABLE, environ.get(TOKEN_VARIABLE) or None),
    ):
        if text is None:
            continue
        credential = text.strip()
        if not credential:
            raise Mistake(f"{where} is empty; it has to hold a key or token, and nothing else")
        if not (credential.isascii() and credential.isprintable()) or " " in credential:
            raise Mistake(f"{where} holds something else than one key or token")
        return credential
    return None


def _check_files(made: Deployment) -> None:
    try:
        replace(made, client_certificate=None).tls_context()
    except OSError:  # an ssl.SSLError is one, too
        raise Mistake(f"--ca: {made.trusted} is not a PEM file with certificates") from None
    try:
        made.tls_context()
    except (OSError, _HasPassword):
        raise Mistake("--client-cert, --client-key: not a certificate and its key in PEM without a password") from None


class _HasPassword(Exception):
    """Nobody is there to be asked."""


def _no_password() -> str:
    raise _HasPassword
