"""Does a request carry a valid Signature Version 4, as SageMaker's endpoints judge it?

The signature is computed anew with botocore and compared; nothing of the proxy's signer is used, or the
stand-in would prove nothing. Like the service, and unlike botocore left to itself, the check takes the
headers that the request lists as signed, hashes the body itself, and canonicalises the raw query.
Source: "Signature Version 4 for API requests" in the AWS IAM User Guide.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote_to_bytes

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials

from .asgi import Request
from .clock import ServiceClock
from .errors import AwsError
from .identity import Directory, Principal

_WINDOW = timedelta(minutes=5)
_FORMAT = "%Y%m%dT%H%M%SZ"
_PARTS = ("Credential", "SignedHeaders", "Signature")
MISMATCH = (
    "The request signature we calculated does not match the signature you provided. Check your AWS Secret "
    "Access Key and signing method. Consult the service documentation for details."
)


@dataclass(frozen=True)
class Authorization:
    """The parts of an `Authorization` header."""

    access_key: str
    date: str
    region: str
    service: str
    terminator: str
    signed_headers: tuple[str, ...]
    signature: str

    @classmethod
    def parse(cls, value: str) -> Authorization:
        """Raises IncompleteSignatureException as AWS does, naming each part that is missing."""
        scheme, _, rest = value.partition(" ")
        if scheme != "AWS4-HMAC-SHA256":
            raise _incomplete(f"Unsupported authorization scheme, expected AWS4-HMAC-SHA256: {scheme!r}.")
        pairs = (part.strip().partition("=") for part in rest.split(","))
        found = {name: text for name, _, text in pairs}
        lacking = [name for name in _PARTS if not found.get(name)]
        if lacking:
            raise _incomplete(" ".join(f"Authorization header requires '{name}' parameter." for name in lacking))
        scope = found["Credential"].split("/")
        if len(scope) != 5:
            raise _incomplete("Credential must have exactly 5 slash-delimited elements.")
        access_key, date, region, service, terminator = scope
        signed = tuple(found["SignedHeaders"].split(";"))
        return cls(access_key, date, region, service, terminator, signed, found["Signature"])


class Checker:
    """Checks signatures for one region against the keys of a directory and the service's clock."""

    def __init__(self, directory: Directory, clock: ServiceClock, regions: Collection[str]) -> None:
        self._directory = directory
        self._clock = clock
        self._regions = frozenset(regions)

    def check(self, request: Request, service: str, required: Collection[str]) -> Principal:
        """The principal that signed `request` for `service`; raises AwsError as the service would answer.

        `required` are the headers, beyond those that SigV4 itself asks for, that must be present and signed.
        """
        authorization = _authorization(request)
        principal = self._principal(request, authorization)
        self._check_scope(authorization, service)
        _check_signed_headers(request, authorization, required)
        stamp = self._check_date(request, authorization)
        _check_payload(request)
        expected = _signature(request, authorization, principal, stamp)
        if not hmac.compare_digest(expected.encode(), authorization.signature.encode()):
            raise _invalid(MISMATCH, reason="signature differs")
        return principal

    def _principal(self, request: Request, authorization: Authorization) -> Principal:
        principal = self._directory.find(authorization.access_key)
        if principal is None:
            raise _unrecognized("unknown access key")
        tokens = request.values("x-amz-security-token")
        if principal.token is None and tokens:
            raise _unrecognized("a session token with a long-term key")
        if principal.token is not None and tokens != [principal.token]:
            raise _unrecognized("session token missing, repeated or another's")
        if self._directory.expired(principal):
            raise AwsError("ExpiredTokenException", "The security token included in the request is expired")
        return principal

    def _check_scope(self, authorization: Authorization, service: str) -> None:
        if authorization.region not in self._regions:
            raise _invalid(
                f"Credential should be scoped to a valid region, not '{authorization.region}'. ",
                reason="wrong region",
            )
        if authorization.service != service:
            raise _invalid(f"Credential should be scoped to correct service: '{service}'. ", reason="wrong service")
        if authorization.terminator != "aws4_request":
            raise _invalid(
                "Credential should be scoped with a valid terminator: 'aws4_request', not "
                f"'{authorization.terminator}'. "
            )

    def _check_date(self, request: Request, authorization: Authorization) -> str:
        stamp = request.value("x-amz-date") or ""
        try:
            moment = datetime.strptime(stamp, _FORMAT).replace(tzinfo=UTC)
        except ValueError:
            raise _incomplete(f"Date must be in ISO-8601 'basic format'. Got '{stamp}'.") from None
        if authorization.date != stamp[:8]:
            raise _invalid(
                "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: "
                f"'{authorization.date}' != '{stamp[:8]}', from '{stamp}'."
            )
        now = self._clock.now()
        at, early, late = (each.strftime(_FORMAT) for each in (now, now - _WINDOW, now + _WINDOW))
        if moment < now - _WINDOW:
            raise _invalid(f"Signature expired: {stamp} is now earlier than {early} ({at} - 5 min.)")
        if moment > now + _WINDOW:
            raise _invalid(f"Signature not yet current: {stamp} is still later than {late} ({at} + 5 min.)")
        return stamp


def canonical_query(raw: str) -> str:
    """The raw query with each name and value decoded once and encoded strictly; a plus is a space."""

    def strict(text: str) -> str:
        return quote(unquote_to_bytes(text.replace("+", " ").encode("latin-1")), safe="-_.~")

    pairs = (pair.partition("=") for pair in raw.split("&")) if raw else ()
    return "&".join(f"{name}={value}" for name, value in sorted((strict(n), strict(v)) for n, _, v in pairs))


class _AsSigned(SigV4Auth):
    """botocore's SigV4 over exactly the headers that the request is given."""

    def headers_to_sign(self, request: AWSRequest) -> HTTPHeaders:
        headers = HTTPHeaders()
        for name, value in request.headers.items():
            headers[name.lower()] = value
        return headers


def _signature(request: Request, authorization: Authorization, principal: Principal, stamp: str) -> str:
    query = canonical_query(request.query)
    copy = AWSRequest(
        method=request.method,
        url=f"http://host{request.path}" + (f"?{query}" if query else ""),
        data=request.body,
    )
    for name in authorization.signed_headers:
        for value in request.values(name):
            copy.headers[name] = value
    copy.context["timestamp"] = stamp
    signer = _AsSigned(
        Credentials(principal.access_key, principal.secret_key), authorization.service, authorization.region
    )
    canonical = signer.canonical_request(copy)
    signed = ";".join(authorization.signed_headers)
    if signed != signer.signed_headers(signer.headers_to_sign(copy)):
        raise _invalid(MISMATCH, reason=f"SignedHeaders are unsorted, repeated or absent: {signed}")
    return signer.signature(signer.string_to_sign(copy, canonical), copy)


def _authorization(request: Request) -> Authorization:
    values = request.values("authorization")
    if not values:
        raise AwsError("MissingAuthenticationTokenException", "Missing Authentication Token")
    if len(values) > 1:
        raise _incomplete("Authorization header must appear once.")
    return Authorization.parse(values[0])


def _check_signed_headers(request: Request, authorization: Authorization, required: Collection[str]) -> None:
    signed = set(authorization.signed_headers)
    present = {name for name, _ in request.headers}
    if "host" not in signed:
        raise _invalid("'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.")
    if "x-amz-date" not in signed:
        raise _incomplete("Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header.")
    needed = {name for name in present if name.startswith("x-amz-")} | set(required)
    if request.body and "content-type" in present:
        needed.add("content-type")
    unsigned = sorted(needed - signed)
    if unsigned:
        names = ", ".join(unsigned)
        raise _invalid(MISMATCH, reason=f"headers that must be signed are not: {names}")
    absent = sorted(set(required) - present)
    if absent:
        raise _invalid(MISMATCH, reason=f"headers that must be present are not: {', '.join(absent)}")


def _check_payload(request: Request) -> None:
    """The hash that the caller states, if any, must be that of the body which arrived."""
    stated = request.values("x-amz-content-sha256")
    if stated and stated != [hashlib.sha256(request.body).hexdigest()]:
        unsigned = re.match(r"(STREAMING-)?UNSIGNED-PAYLOAD", stated[0])
        reason = "an unsigned payload" if unsigned else "x-amz-content-sha256 is not the body's hash"
        raise _invalid(MISMATCH, reason=reason)


def _invalid(message: str, reason: str = "") -> AwsError:
    return AwsError("InvalidSignatureException", message, reason=reason)


def _incomplete(message: str) -> AwsError:
    return AwsError("IncompleteSignatureException", message, status=400)


def _unrecognized(reason: str) -> AwsError:
    message = "The security token included in the request is invalid."
    return AwsError("UnrecognizedClientException", message, reason=reason)
