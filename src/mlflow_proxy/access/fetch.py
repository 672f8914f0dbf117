"""Fetches small documents of identity providers: keys and what describes them. Bounded in time, size and trust.

Blocking: meant for threads. Nothing here knows what the documents mean.
"""

from __future__ import annotations

import json
import ssl
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
import urllib3

from mlflow_proxy.settings import is_loopback

# In seconds; the last is for one document as a whole, however slowly it drips.
_CONNECT_TIMEOUT = 5.0
_READ_TIMEOUT = 5.0
DOCUMENT_DEADLINE = 10.0
_LARGEST = 1 << 20
_CHUNK = 16 << 10


class FetchFailed(Exception):
    """A document could not be had. `reason` is for a log; `status` is the answer's, if there was one."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class Source(NamedTuple):
    """How documents are fetched.

    `ca_bundle` is a PEM file to trust instead of the system's CAs, `proxy` an HTTP proxy on the way out, which loopback
    addresses don't take. The environment's proxies are ignored.
    """

    ca_bundle: str | None = None
    proxy: str | None = None

    def fetch(self, url: str, accept: str = "application/json") -> bytes:
        """The body of a GET. HTTPS only, but for loopback; no redirects; at most 1 MiB. Raises FetchFailed."""
        host = _check_url(url)
        deadline = time.monotonic() + DOCUMENT_DEADLINE
        with requests.Session() as session:
            session.trust_env = False
            session.verify = self.ca_bundle or system_cas()
            if self.proxy and not is_loopback(host):
                session.proxies = {"http": self.proxy, "https": self.proxy}
            headers = {"Accept": accept, "Accept-Encoding": "identity", "User-Agent": "mlflow-proxy"}
            try:
                with session.get(
                    url,
                    headers=headers,
                    timeout=(_CONNECT_TIMEOUT, _READ_TIMEOUT),
                    allow_redirects=False,
                    stream=True,
                ) as response:
                    _check_status(url, response)
                    return _read(url, response, deadline)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise FetchFailed(f"{url} {_in_words(error)}") from None

    def fetch_object(self, url: str) -> dict[str, Any]:
        """A JSON object. Raises FetchFailed."""
        try:
            found = json.loads(self.fetch(url))
        except (ValueError, RecursionError):
            raise FetchFailed(f"{url} does not answer with JSON") from None
        if not isinstance(found, dict):
            raise FetchFailed(f"{url} does not answer with a JSON object")
        return found


def _check_url(url: str) -> str:
    """The URL's host. What arrives without TLS, anybody on the way may have written."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise FetchFailed(f"{url!r} is not a URL") from None
    if not host or parts.username is not None or parts.fragment or not url.isprintable() or " " in url:
        raise FetchFailed(f"{url!r} is not a plain URL with a host")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise FetchFailed(f"{url} is not an https URL")
    return host


def _check_status(url: str, response: requests.Response) -> None:
    status = response.status_code
    if 300 <= status < 400:
        raise FetchFailed(f"{url} answers with a redirect; configure the address that it leads to", status)
    if status != 200:
        raise FetchFailed(f"{url} answers {status}", status)


def _read(url: str, response: requests.Response, deadline: float) -> bytes:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchFailed(f"{url} answers compressed, which was not asked for")
    body = bytearray()
    while chunk := response.raw.read1(_CHUNK):  # what has arrived, so that a slow answer ends at the deadline
        body += chunk
        if len(body) > _LARGEST:
            raise FetchFailed(f"{url} answers with more than {_LARGEST >> 20} MiB")
        if time.monotonic() > deadline:
            raise FetchFailed(f"{url} took longer than {DOCUMENT_DEADLINE:g} s")
    return bytes(body)


def system_cas() -> str | bool:
    """Where OpenSSL looks, like for SageMaker; the library's own list only where the system has none."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath or True


def _in_words(error: BaseException) -> str:
    """Why a request failed, without the library's text, which may repeat a proxy's password."""
    if isinstance(error, requests.exceptions.ProxyError):
        return "cannot be reached: the HTTP proxy on the way out (upstream.proxy) fails"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "does not answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"has a TLS certificate that is not trusted ({cause.verify_message})"
        if isinstance(cause, OSError) and cause.strerror:
            return f"cannot be reached ({cause.strerror})"
        cause = cause.__cause__ or cause.__context__
    return f"cannot be fetched ({type(error).__name__})"
