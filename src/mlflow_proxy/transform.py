"""Step 1 of a request's way: one canonical path and query, or a refusal. Every later step sees only these.

What comes out is at once what is signed and what is sent. It is also what any URL parser leaves unchanged, so that no
two parties can understand it differently: no dot segments, no empty segments, no backslash, escapes only where needed
and in upper case. What could mean two things is refused, never guessed.
"""

from __future__ import annotations

import re
from urllib.parse import quote_from_bytes, unquote_to_bytes

from mlflow_proxy.errors import Refusal

# Paths and queries of this form are canonical already; nearly every request of an MLflow client is (RFC 3986 pchar).
_PLAIN_PATH = re.compile(rb"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]+)*/?")
_PLAIN_PAIR = re.compile(rb"[A-Za-z0-9._~-]+=[A-Za-z0-9._~-]*")
_PLAIN_QUERY = re.compile(rb"(?:[A-Za-z0-9._~-]+=[A-Za-z0-9._~-]*(?:&(?=.)|\Z))*")

_FORBIDDEN = re.compile(rb"[\x00-\x20#\x7f-\xff\\]")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE_OR_OTHER = re.compile(rb"%([0-9A-Fa-f]{2})|[^A-Za-z0-9._~!$&'()*+,;=:@/-]")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")

# MLflow's routes with a path parameter: only there does an encoded slash have a meaning (the same as a plain one).
# Its client and UI send one in the names of MCP servers, such as io.github.someone/weather.
_ENCODED_SLASH_ROUTES = re.compile(
    r"(?:/t/[^/%]+)?(?:"
    r"/(?:ajax-)?api/2\.0/mlflow-artifacts/(?:artifacts|presigned|mpu/(?:create|complete|abort))/"
    r"|/(?:ajax-)?api/3\.0/mlflow/mcp-servers/"
    r"|/gateway/proxy/(?:(?!%2F)[^/])+/)"
)


def canonical_path(raw: bytes) -> str:
    """The one path that `raw`, a request target's path as received, stands for.

    Escapes of unreserved characters are decoded, other escapes kept in upper case, characters that a URL may not
    contain are encoded, runs of slashes become one (SigV4 signs them so, and what is sent must be what is signed).
    Raises Refusal 400 for what has no single meaning.
    """
    if _PLAIN_PATH.fullmatch(raw) and raw:
        return raw.decode("ascii")
    if not raw.startswith(b"/"):
        raise _bad("The request target must begin with '/'.")
    _refuse_characters(raw, "path")
    segments = [segment for segment in _ESCAPE_OR_OTHER.sub(_canonical_escape, raw).split(b"/") if segment]
    path = "/" + b"/".join(segments).decode("ascii")
    if len(segments) > 0 and raw.endswith(b"/"):
        path += "/"
    if "%2F" in path and not _ENCODED_SLASH_ROUTES.match(path):
        raise _bad("The path contains an encoded slash (%2F) where MLflow has none. Send a plain '/'.")
    if any(part in (".", "..") for part in path.replace("%2F", "/").split("/")):
        raise _bad("The path contains a '.' or '..' segment. Send the path that is meant.")
    _refuse_not_utf8(path.encode("ascii"), "path")
    return path


def canonical_query(raw: bytes) -> str:
    """The query as it is signed and sent: names and values decoded once (a plus is a space) and encoded strictly.

    Order and duplicates stay the caller's; empty pieces vanish; a name without '=' gets one (SigV4, protocol notes).
    Raises Refusal 400 for broken escapes, NUL, control characters, and bytes that are not UTF-8.
    """
    if _PLAIN_QUERY.fullmatch(raw):
        return raw.decode("ascii")
    if re.search(rb"[\x00-\x20#\x7f-\xff]", raw):
        raise _bad("The query contains bytes that a URL may not contain. Percent-encode them.")
    _refuse_broken_escapes(raw, "query")
    _refuse_not_utf8(raw, "query")
    if b"%00" in raw:
        raise _bad("The query contains a NUL character.")
    return "&".join(_canonical_pair(piece) for piece in raw.split(b"&") if piece)


def _canonical_pair(piece: bytes) -> str:
    if _PLAIN_PAIR.fullmatch(piece):
        return piece.decode("ascii")
    name, _, value = piece.partition(b"=")
    return f"{_strictly(name)}={_strictly(value)}"


def _strictly(text: bytes) -> str:
    return quote_from_bytes(unquote_to_bytes(text.replace(b"+", b" ")), safe="-._~")


def _canonical_escape(match: re.Match[bytes]) -> bytes:
    digits = match[1]
    if digits is None:
        return b"%%%02X" % ord(match[0])
    byte = int(digits, 16)
    if byte in _UNRESERVED:
        return bytes((byte,))
    if byte < 0x20 or byte == 0x7F:
        raise _bad("The path contains an encoded control character.")
    if byte == 0x5C:
        raise _bad("The path contains an encoded backslash.")
    return b"%%%02X" % byte


def _refuse_characters(raw: bytes, where: str) -> None:
    found = _FORBIDDEN.search(raw)
    if found:
        kind = {b"\\": "a backslash"}.get(found[0], f"the byte 0x{ord(found[0]):02X}, which must be percent-encoded")
        raise _bad(f"The {where} contains {kind}.")
    _refuse_broken_escapes(raw, where)


def _refuse_broken_escapes(raw: bytes, where: str) -> None:
    if _BROKEN_ESCAPE.search(raw):
        raise _bad(f"The {where} contains a '%' that is not followed by two hex digits. Send '%25' for a percent sign.")


def _refuse_not_utf8(raw: bytes, where: str) -> None:
    try:
        unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(f"The {where} contains escapes that are not UTF-8.") from None


def _bad(message: str) -> Refusal:
    return Refusal(400, message)
