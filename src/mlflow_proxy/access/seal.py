"""Sealed cookies: what the proxy lets a browser keep, so that nobody can read, change or exchange it.

Authenticated encryption and the rules of the Cookie header, no more: what a cookie means is in `session` and in
`portal.signin`.
"""

from __future__ import annotations

import base64
import binascii
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

# What every browser keeps of one cookie: name, value and attributes together (RFC 6265 section 6.1).
LARGEST_COOKIE = 4096
SMALLEST_SECRET = 32

_VERSION = b"\x01"
_NONCE = 12
_TAG = 16
# The alphabet of base64url (RFC 4648 section 5); Python's decoder would skip anything else.
_BASE64URL = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class Seal:
    """Seals the content of one cookie with AES-256-GCM (NIST SP 800-38D).

    The key is derived from `secret` (HKDF, RFC 5869) for this cookie's name and `context` alone, and the name is
    authenticated again with each value: what was sealed as one cookie never opens as another, nor in another context.
    """

    def __init__(self, secret: bytes, cookie: str, context: str) -> None:
        if len(secret) < SMALLEST_SECRET:
            raise ValueError(f"the secret that seals cookies has {len(secret)} bytes; use {SMALLEST_SECRET} or more")
        info = f"mlflow-proxy\n{cookie}\n{context}".encode()
        self._cipher = AESGCM(HKDF(SHA256(), 32, salt=None, info=info).derive(secret))
        self._bound = _VERSION + cookie.encode("ascii")

    def seal(self, content: bytes) -> str:
        """The cookie's value for `content`, in base64url: another one each time."""
        nonce = os.urandom(_NONCE)
        sealed = _VERSION + nonce + self._cipher.encrypt(nonce, content, self._bound)
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode("ascii")

    def open(self, value: bytes) -> bytes | None:
        """The content of a cookie's value, or None if it was not sealed here, for this, or as it stands."""
        if len(value) > LARGEST_COOKIE or value.translate(None, _BASE64URL):
            return None
        try:
            sealed = base64.urlsafe_b64decode(value + b"=" * (-len(value) % 4))
        except binascii.Error:
            return None
        if len(sealed) < 1 + _NONCE + _TAG or sealed[:1] != _VERSION:
            return None
        try:
            return self._cipher.decrypt(sealed[1 : 1 + _NONCE], sealed[1 + _NONCE :], self._bound)
        except InvalidTag:
            return None


def cookie_name(name: str, prefix: str) -> str:
    """The name of a cookie of a proxy below a path such as `/mlflow`: two proxies on one host need two.

    Their paths cannot tell them apart, since a name that begins with `__Host-` demands `Path=/`.
    """
    return name + prefix.replace("/", ".")


def cookie_value(headers: list[bytes], name: bytes) -> bytes | None:
    """The value of a cookie in the Cookie headers of a request; None if it is not there, or more than once.

    A browser never sends two of a name that begins with `__Host-`. Somebody who can plant a second one, from a
    neighbouring host or on a connection without TLS, must not choose which of them counts.
    """
    values = cookie_values(headers, name)
    return values[0] if len(values) == 1 else None


def cookie_values(headers: list[bytes], name: bytes) -> list[bytes]:
    """All values of a cookie in the Cookie headers of a request (RFC 6265 section 4.2); HTTP/2 may send several."""
    found = []
    for header in headers:
        if name in header:
            for pair in header.split(b";"):
                key, _, value = pair.strip(b" \t").partition(b"=")
                if key == name:
                    found.append(value)
    return found
