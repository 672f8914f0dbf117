"""Errors that AWS's front answers before a request reaches MLflow: what they are, and how a caller is told.

They are JSON with the type in `x-amzn-errortype` or in `__type` (AWS restJson1 and awsJson1 protocols). MLflow's own
errors have `error_code` and are nobody's business here. AWS's texts name the proxy's principals, accounts and ARNs, so
callers get the type and words of our own, and the log gets the text.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import NamedTuple

from mlflow_proxy.aws.codes import STALE as _EXPIRED
from mlflow_proxy.aws.codes import THROTTLED as _THROTTLED
from mlflow_proxy.errors import Refusal

# Statuses whose answers may be AWS's own, and how large such an answer is at the most.
STATUSES = frozenset({400, 401, 403, 404, 429, 500, 502, 503, 504})
# On a mismatch AWS recites the URL, encoded again: three bytes for one.
SIZE_LIMIT = 192 * 1024

_TOO_MANY = 429
_RECITAL = re.compile(r"\n|The Canonical String|The String-to-Sign|x-amz-security-token", re.IGNORECASE)
_ADVICE = {
    "AccessDeniedException": "Grant the action to the IAM identity that this proxy signs with.",
    "InvalidSignatureException": "Check this proxy's clock, its credentials, and the target's ARN and region.",
    "MissingAuthenticationTokenException": "Check the target's endpoint.",
    "ExpiredTokenException": "Renew the credentials of this proxy.",
    "UnrecognizedClientException": "Renew the credentials of this proxy, or set those of the right account.",
    "ResourceNotFoundException": "Check the target's ARN, and whether it still exists.",
    "ThrottlingException": "Send requests more slowly, and try again later.",
}
_SIGNATURE = "It does not accept the signature or the AWS credentials of this proxy."
# The same for callers.
_TOLD = {
    "AccessDeniedException": "The AWS identity that this proxy signs with for you may not do this.",
    "InvalidSignatureException": _SIGNATURE,
    "MissingAuthenticationTokenException": _SIGNATURE,
    "ExpiredTokenException": _SIGNATURE,
    "UnrecognizedClientException": _SIGNATURE,
    "ResourceNotFoundException": "It does not know this target.",
}
_UNSURE = "If this was a write, check whether it was carried out before you repeat it."
_NOT_SERVED = "The target may be stopped, or in trouble that passes."
# What AWS names a type; anything else is somebody's text, and not repeated.
_NAME = re.compile(r"\w{1,100}", re.ASCII)
_CODES = {400: "BAD_REQUEST", 403: "PERMISSION_DENIED", 404: "RESOURCE_DOES_NOT_EXIST"}


class AwsError(NamedTuple):
    """One such answer."""

    status: int
    type: str
    message: str

    @property
    def throttled(self) -> bool:
        """There were too many requests."""
        return self.type in _THROTTLED

    @property
    def not_done(self) -> bool:
        """Nothing was carried out, so even a write may be repeated. A 5xx may come after the work was done."""
        return self.status < 500

    @property
    def expired(self) -> bool:
        """The request was refused for its credentials, which may have been renewed meanwhile."""
        return self.type in _EXPIRED

    @property
    def advice(self) -> str:
        """What its operator can do; empty if nothing particular is known."""
        return _ADVICE.get(self.type, "")

    def refusal(self) -> Refusal:
        """The same in MLflow's shape, for a caller that knows nothing of AWS; its detail is AWS's text with advice."""
        words = f"SageMaker MLflow answered {self.type if _NAME.fullmatch(self.type) else 'with an error'}."
        detail = f"SageMaker MLflow answered {self.type}: {self.message.rstrip('.') or 'no message'}."
        if self.throttled:
            unsure = "" if self.not_done else f"{_UNSURE} "
            return Refusal(429, f"{words} {unsure}{_ADVICE['ThrottlingException']}", retry_after=1, detail=detail)
        if self.advice:
            detail = f"{detail} {self.advice} On its host, `mlflow-proxy check` tells more."
        told = _TOLD.get(self.type) or (_NOT_SERVED if self.status >= 500 else "")
        message = f"{words} {told}" if told else words
        return Refusal(self.status, message, error_code=_CODES.get(self.status), detail=detail, in_log=True)


def aws_error(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> AwsError | None:
    """The AWS error that an answer is; None for anything else, above all for MLflow's own errors."""
    error_type = ""
    for name, value in headers:
        if name.lower() == b"x-amzn-errortype":
            error_type = value.decode("latin-1")
    try:
        content = json.loads(_plain(headers, body))
    except (ValueError, RecursionError, zlib.error):
        content = None
    if not isinstance(content, dict):
        content = {}
    error_type = error_type or str(content.get("__type") or "")
    if "error_code" in content or not (error_type or status == _TOO_MANY):
        return None
    error_type = error_type or "TooManyRequestsException"  # whatever its shape, a 429 means: not done, try later
    message = str(content.get("message") or content.get("Message") or "")
    return AwsError(status, error_type.split(":", 1)[0].rsplit("#", 1)[-1], _harmless(message))


def _plain(headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    """The body without gzip, as far as it is worth judging; other codings stay."""
    coding = next((value.strip().lower() for name, value in headers if name.lower() == b"content-encoding"), b"")
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        return body
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, SIZE_LIMIT)


def _harmless(message: str) -> str:
    """What callers and logs may see of an AWS message.

    On a refused signature AWS recites the canonical request, session token included: everything from there on is cut.
    """
    return _RECITAL.split(message, maxsplit=1)[0].strip()[:1000]
