"""Signed tokens (JWS in compact form, RFC 7515): taken apart strictly, and remembered once verified.

The bytes only: which algorithms, keys and claims count is for those who use it. Everything here is judged before a
signature is, so whatever a stranger sends ends in Unauthenticated.
"""

from __future__ import annotations

import base64
import json
import re
from collections import OrderedDict
from collections.abc import Collection
from hashlib import sha256
from typing import Any, NamedTuple, NoReturn

from joserfc.errors import JoseError
from joserfc.jwk import Key
from joserfc.jws import JWSRegistry

from mlflow_proxy.access.caller import Caller, Unauthenticated

LONGEST_TOKEN = 16 << 10
_LONGEST_SHOWN = 80
# base64url without padding (RFC 7515 section 2), and as AWS's load balancers write it, with.
_UNPADDED = re.compile(r"[A-Za-z0-9_-]*")
_PADDED = re.compile(r"(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?")


class Token(NamedTuple):
    """A token's parts; nothing of it is verified yet."""

    header: dict[str, Any]
    payload: bytes
    signed: bytes
    signature: bytes

    def claims(self) -> dict[str, Any]:
        """The payload's claims. Raises Unauthenticated."""
        return _object(self.payload, "payload")


def digest(token: str) -> bytes:
    """What a token is remembered by, so that no token is kept in memory. Raises Unauthenticated if it can't be one."""
    if len(token) > LONGEST_TOKEN:
        raise Unauthenticated(f"a token longer than {LONGEST_TOKEN} bytes")
    try:
        return sha256(token.encode("ascii")).digest()
    except UnicodeEncodeError:
        raise Unauthenticated("a token with characters that none has") from None


def short_name(token_digest: bytes) -> str:
    """How a token without an id of its own is called in the audit log."""
    return f"sha256:{token_digest.hex()[:16]}"


def parse(token: str, *, padded: bool = False) -> Token:
    """Take a token apart; `padded` allows base64 padding. Raises Unauthenticated."""
    segments = token.split(".")
    if len(segments) == 5:
        raise Unauthenticated("an encrypted token (JWE); only signed ones count")
    if len(segments) != 3:
        raise Unauthenticated("not a token: it has no three parts")
    header, payload, signature = (_decoded(segment, padded=padded) for segment in segments)
    signed = token[: -len(segments[2]) - 1]
    return Token(_object(header, "header"), payload, signed.encode("ascii"), signature)


def algorithm(token: Token, allowed: Collection[str], types: Collection[str]) -> str:
    """The token's algorithm, which must be one of `allowed`; its type, where it names one, one of `types`.

    Extensions that must be understood are not (RFC 7515 section 4.1.11, RFC 7797). Keys and addresses of keys in the
    header (`jwk`, `jku`, `x5c`, `x5u`) count for nothing. Raises Unauthenticated.
    """
    header = token.header
    name = header.get("alg")
    if not isinstance(name, str) or name not in allowed:
        raise Unauthenticated(f"its algorithm {shown(name)} is not one of {', '.join(sorted(allowed))}")
    for extension in ("crit", "b64", "enc", "zip"):
        if extension in header:
            raise Unauthenticated(f"its header has {extension!r}, which no token here has")
    kind = header.get("typ")
    if kind is not None and not (isinstance(kind, str) and kind.lower().removeprefix("application/") in types):
        raise Unauthenticated(f"its type {shown(kind)} is not one of {', '.join(sorted(types))}")
    return name


def is_signed_by(token: Token, key: Key, name: str) -> bool:
    """Whether `key` made the signature with this algorithm, and is one for it: by its type, curve, use and `alg`."""
    model = JWSRegistry.algorithms[name]
    try:
        model.check_key(key)
        return model.verify(token.signed, token.signature, key)
    except (JoseError, ValueError):
        return False


def shown(value: Any) -> str:
    """What a stranger wrote, as a log may show it: ASCII, and cut."""
    text = ascii(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


class Verified:
    """Callers by the digest of what they have shown, until it expires; the least recently used go first."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._known: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, token_digest: bytes, now: float) -> Caller | None:
        """The caller, if the token was verified before and is still valid at `now`, in seconds since the epoch."""
        known = self._known.get(token_digest)
        if known is None:
            return None
        if known[0] <= now:
            del self._known[token_digest]
            return None
        self._known.move_to_end(token_digest)
        return known[1]

    def add(self, token_digest: bytes, until: float, caller: Caller) -> None:
        """Remember a caller until that time, in seconds since the epoch."""
        self._known[token_digest] = (until, caller)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def clear(self) -> None:
        """Forget all, because a key that vouched for some may no longer count."""
        self._known.clear()


def _decoded(segment: str, *, padded: bool) -> bytes:
    if _UNPADDED.fullmatch(segment) and len(segment) % 4 != 1:
        return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    if padded and _PADDED.fullmatch(segment):
        return base64.urlsafe_b64decode(segment)
    raise Unauthenticated("not a token: a part is not base64url")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")  # readers differ in which one they take
    return found


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_doubles, parse_constant=_no_constants)


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = _DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Unauthenticated(f"not a token: its {where} is not plain JSON") from None
    if not isinstance(found, dict):
        raise Unauthenticated(f"not a token: its {where} is not a JSON object")
    return found
