"""AWS Signature Version 4, as SageMaker MLflow checks it: pure functions, and a cache for what stays the same all day.

Not for S3, whose paths are encoded once instead of twice, and not for presigned URLs. Source: "Create a signed AWS API
request" in the IAM user guide; botocore is the oracle in the tests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from functools import lru_cache
from time import gmtime, strftime

ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

_NEEDS_ENCODING = re.compile(r"[^A-Za-z0-9._~/-]")


def payload_hash(pieces: Sequence[bytes | memoryview]) -> str:
    """The value of x-amz-content-sha256 for a body in pieces: these endpoints take no unsigned payload."""
    if not pieces:
        return EMPTY_SHA256
    payload = hashlib.sha256(pieces[0])
    for piece in pieces[1:]:
        payload.update(piece)
    return payload.hexdigest()


def canonical_uri(path: str) -> str:
    """The path of a canonical request: every service but S3 encodes the already encoded path once more.

    `path` is normalised already (no empty or dot segments), as mlflow_proxy.transform leaves it.
    """
    if _NEEDS_ENCODING.search(path) is None:
        return path
    return _NEEDS_ENCODING.sub(lambda match: f"%{ord(match[0]):02X}", path)


def canonical_query(query: str) -> str:
    """The query of a canonical request: sorted by encoded name, then by encoded value."""
    if "&" not in query:
        return query
    pairs = sorted(piece.split("=", 1) for piece in query.split("&"))
    return "&".join([f"{name}={value}" for name, value in pairs])


def canonical_request(
    method: str, path: str, query: str, headers: list[tuple[str, str]], hashed_payload: str
) -> tuple[str, str]:
    """Canonical request and signed header names. `headers`: lower-case names in order, values without outer spaces."""
    signed = ";".join([header[0] for header in headers])
    lines = "".join(["%s:%s\n" % header for header in headers])  # noqa: UP031  (quicker than unpacking)
    return (
        f"{method}\n{canonical_uri(path)}\n{canonical_query(query)}\n{lines}\n{signed}\n{hashed_payload}",
        signed,
    )


def string_to_sign(amz_date: str, scope: str, canonical: str) -> str:
    """What the signing key signs. `scope` is `<day>/<region>/<service>/aws4_request`."""
    return f"{ALGORITHM}\n{amz_date}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"


def signing_key(secret_key: str, day: str, region: str, service: str) -> bytes:
    """The derived key of a day, region, service and secret."""
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


class SigningKey:
    """A derived key, ready to sign: the two blocks of HMAC are hashed once (RFC 2104 section 4), not each time."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        block = key.ljust(64, b"\0")  # derived keys are 32 bytes, SHA-256 works on 64
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def sign(self, text: str) -> str:
        """HMAC-SHA256 of `text`, in hex."""
        inner = self._inner.copy()
        inner.update(text.encode())
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.hexdigest()


@lru_cache(maxsize=2048)  # a caller's session each, in every worker
def key_for(secret_key: str, day: str, region: str, service: str) -> SigningKey:
    """The key that signs on `day`; kept, since it stays the same for a day, region, service and secret."""
    return SigningKey(signing_key(secret_key, day, region, service))


@lru_cache(maxsize=8)
def amz_date_of(second: int) -> str:
    """`20261124T053000Z` for whole seconds since the epoch."""
    return strftime("%Y%m%dT%H%M%SZ", gmtime(second))


def sign(
    *,
    access_key: str,
    secret_key: str,
    region: str,
    service: str,
    method: str,
    path: str,
    query: str,
    headers: list[tuple[str, str]],
    hashed_payload: str,
    amz_date: str,
) -> str:
    """The Authorization header of one request.

    `headers` are the signed ones in the order of their names, x-amz-date among them. The caller sends exactly these,
    with the given path and query.
    """
    day = amz_date[:8]
    canonical, signed = canonical_request(method, path, query, headers, hashed_payload)
    scope = f"{day}/{region}/{service}/aws4_request"
    signature = key_for(secret_key, day, region, service).sign(string_to_sign(amz_date, scope, canonical))
    return f"{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
