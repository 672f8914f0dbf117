"""Calls of a deployment over plain HTTP, as curl would make them, and what came of each.

Every call ends within its deadline, however slowly names are found or answers drip; no redirect is followed, so that a
key goes nowhere but to the address that was given.
"""

from __future__ import annotations

import json
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.structures import CaseInsensitiveDict

from mlflow_proxy import __version__
from mlflow_proxy.validate.deployment import Deployment

# Of an answer, so much is read; no step needs more.
_LARGEST = 1 << 20
_CHUNK = 16 << 10
API = "/api/2.0/mlflow/"

T = TypeVar("T")


class Reply(NamedTuple):
    """An answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any] | None:
        """The body, if it is a JSON object."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def error_code(self) -> str:
        """MLflow's, of an error; else empty."""
        return str((self.json or {}).get("error_code") or "")

    @property
    def message(self) -> str:
        """MLflow's words for an error; else empty."""
        return str((self.json or {}).get("message") or "")

    @property
    def request_id(self) -> str:
        """By which the proxy's log has it; empty if something else answered."""
        return self.headers.get("x-request-id", "")

    @property
    def leads_to(self) -> str | None:
        """The host that a redirect names. The rest of its URL may hold what nobody should see."""
        if not 300 <= self.status < 400:
            return None
        return urlsplit(self.headers.get("location", "")).netloc.rpartition("@")[2] or "another path of the same host"

    @property
    def is_html(self) -> bool:
        """A page for people, where JSON was asked for."""
        return self.headers.get("content-type", "").startswith("text/html") or self.body[:32].lstrip()[:1] == b"<"


class Unanswered(Exception):
    """There was no answer, or none that is HTTP. `late`: not in time. `refused_certificate`: TLS says so."""

    def __init__(self, reason: str, *, late: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.late = late


class Calls:
    """Calls of one deployment, as one caller, over one kept connection."""

    def __init__(self, deployment: Deployment, *, as_stranger: bool = False) -> None:
        self._deployment = deployment
        self._as_stranger = as_stranger
        self._session = self._new_session()

    def own(self, path: str, method: str = "GET", **more: Any) -> Reply:
        """A page of the proxy's own, below `/-/`. Raises Unanswered."""
        return self.at(f"{self._deployment.base}/-/{path}", method, **more)

    def mlflow(self, route: str, data: Mapping[str, Any] | None = None, **query: str) -> Reply:
        """A call of MLflow's REST API: a POST of `data`, or a GET. Raises Unanswered."""
        url = f"{self._deployment.url}{API}{route}"
        return self.at(url, "GET", params=query) if data is None else self.at(url, "POST", json=dict(data))

    def ui(self) -> Reply:
        """The first page of MLflow's UI, asked for as a program, lest a refusal be a page, too. Raises Unanswered."""
        return self.at(f"{self._deployment.url}/")

    def at(self, url: str, method: str = "GET", **more: Any) -> Reply:
        """Any URL. Raises Unanswered."""
        session = self._session
        try:
            return within(self._deployment.timeout, lambda: _ask(session, method, url, self._deployment.timeout, more))
        except TimeoutError:
            self._session = self._new_session()  # the other is busy with what came too late
            raise Unanswered(f"no answer within {self._deployment.timeout:g} s", late=True) from None

    def _new_session(self) -> requests.Session:
        deployment = self._deployment
        session = requests.Session()
        session.trust_env = False  # a .netrc would make a stranger somebody
        session.verify = deployment.trusted
        session.proxies = dict(outgoing_proxies(deployment))
        session.headers = CaseInsensitiveDict(
            {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": f"mlflow-proxy/{__version__}"}
        )
        if not self._as_stranger:
            session.cert = deployment.client_certificate
            if deployment.credential is not None:
                session.headers["Authorization"] = f"Bearer {deployment.credential}"
        return session


def outgoing_proxies(deployment: Deployment) -> Mapping[str, str]:
    """The environment's HTTP proxy for this address, as MLflow's clients take it; none on loopback."""
    if deployment.is_loopback:
        return {}
    found: Mapping[str, str] = requests.utils.get_environ_proxies(deployment.origin)
    return {scheme: url for scheme, url in found.items() if scheme in ("http", "https", "all")}


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError after so many seconds, and then it may hang on for ever."""
    done: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            failure = error

            def fail() -> T:
                raise failure

            done.put(fail)
        else:
            done.put(lambda: result)

    threading.Thread(target=run, daemon=True).start()
    try:
        outcome = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    return outcome()


def _ask(session: requests.Session, method: str, url: str, timeout: float, more: Mapping[str, Any]) -> Reply:
    try:
        with session.request(method, url, timeout=timeout, allow_redirects=False, stream=True, **more) as response:
            return Reply(response.status_code, response.headers, _body(response))
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise Unanswered(in_words(error), late=isinstance(error, requests.Timeout)) from None


def _body(response: requests.Response) -> bytes:
    """What has come when it is enough, so that an answer without end ends here."""
    body = bytearray()
    while len(body) < _LARGEST and (chunk := response.raw.read1(_CHUNK)):
        body += chunk
    return bytes(body)


def in_words(error: BaseException) -> str:
    """Why there is no answer, without a library's text, which may repeat what was sent."""
    if isinstance(error, requests.exceptions.ProxyError):
        return "the environment's HTTP proxy (HTTPS_PROXY) cannot reach it"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "no answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and (words := _of_system(cause)):
            return words
        cause = cause.__cause__ or cause.__context__
    return "what answers does not speak HTTP, or the connection was lost"


def _of_system(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {(error.reason or 'the connection was closed').replace('_', ' ').lower()}"
    if isinstance(error, socket.gaierror):
        return f"its name is not found ({error.strerror})"
    return (error.strerror or "").lower()
