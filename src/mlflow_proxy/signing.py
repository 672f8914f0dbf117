"""Step 6 of a request's way: the head of the request that goes to SageMaker, signed for its target.

Only what `requests` let pass goes in, plus what this step makes: Host, the target's ARN, and the signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mlflow_proxy.aws.clock import ServiceClock
from mlflow_proxy.aws.sigv4 import amz_date_of, payload_hash, sign
from mlflow_proxy.requests import Request
from mlflow_proxy.targets import Target

_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


class Payload(NamedTuple):
    """A request body with its hash, which is made once however often the request is signed."""

    pieces: Sequence[bytes | memoryview]
    size: int
    sha256: str

    @classmethod
    def of(cls, pieces: Sequence[bytes | memoryview]) -> Payload:
        """Hash `pieces`, which are not copied."""
        return cls(pieces, sum(map(len, pieces)), payload_hash(pieces)) if pieces else NO_PAYLOAD


NO_PAYLOAD = Payload((), 0, payload_hash(()))


class SigningCredentials(Protocol):
    """The part of AWS credentials that signing needs."""

    @property
    def access_key(self) -> str: ...  # noqa: D102
    @property
    def secret_key(self) -> str: ...  # noqa: D102
    @property
    def token(self) -> str | None: ...  # noqa: D102


class Signer:
    """Signs requests for one target, on that target's clock."""

    def __init__(self, target: Target) -> None:
        self._authority = target.endpoint.authority
        self._region = target.arn.region
        self._service = target.arn.mode.service
        self._arn = (target.arn.mode.arn_header, target.arn.text)
        self.clock = ServiceClock()

    def head(
        self, request: Request, path: str, body: Payload, credentials: SigningCredentials, *, request_id: str
    ) -> bytes:
        """Request line and headers, ready to be written. `path` is the target's, without the proxy's own prefix."""
        body_hash, body_size = body.sha256, body.size
        amz_date = amz_date_of(int(self.clock.now()))
        # In the order of their names, as a canonical request has them.
        signed = [("host", self._authority), ("x-amz-content-sha256", body_hash), ("x-amz-date", amz_date), self._arn]
        if credentials.token:
            signed.insert(3, ("x-amz-security-token", credentials.token))
        if body_size and request.content_type:
            signed.insert(0, ("content-type", request.content_type))
        authorization = sign(
            access_key=credentials.access_key,
            secret_key=credentials.secret_key,
            region=self._region,
            service=self._service,
            method=request.method,
            path=path,
            query=request.query,
            headers=signed,
            hashed_payload=body_hash,
            amz_date=amz_date,
        )
        url = f"{path}?{request.query}" if request.query else path
        token = f"x-amz-security-token: {credentials.token}\r\n" if credentials.token else ""
        length = f"content-length: {body_size}\r\n" if body_size or request.method in _BODY_METHODS else ""
        own = (
            f"{request.method} {url} HTTP/1.1\r\nhost: {self._authority}\r\n{length}"
            f"x-amz-date: {amz_date}\r\nx-amz-content-sha256: {body_hash}\r\n{token}"
            f"{self._arn[0]}: {self._arn[1]}\r\nauthorization: {authorization}\r\n"
            f"x-request-id: {request_id}\r\n"
        )
        return b"".join([own.encode("ascii"), *[b"%b: %b\r\n" % pair for pair in request.headers], b"\r\n"])
