"""What STS checks and moto does not: signatures, who may assume a role, and what a session is called and carries.

A WSGI layer over moto's server. Requests for STS are checked here and then answered by moto; all else (S3,
IAM) passes untouched, with moto's own leniency: it believes any signature.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from .accounts import trust_policy
from .asgi import Request
from .errors import AwsError
from .identity import Principal
from .journal import Entry
from .policy import Decision, trusts
from .role_request import RoleRequest
from .service import Service

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[Environ, StartResponse], Iterable[bytes]]

# These two bring their own proof, which moto does not look at, and no signature.
_UNSIGNED = {"AssumeRoleWithWebIdentity", "AssumeRoleWithSAML"}
# STS answers these errors under names without the suffix that JSON services use.
_XML_CODES = {
    "AccessDeniedException": "AccessDenied",
    "UnrecognizedClientException": "InvalidClientTokenId",
    "ExpiredTokenException": "ExpiredToken",
    "InvalidSignatureException": "SignatureDoesNotMatch",
    "IncompleteSignatureException": "IncompleteSignature",
    "MissingAuthenticationTokenException": "MissingAuthenticationToken",
    "ValidationException": "ValidationError",
    "ThrottlingException": "Throttling",
}
_ACCESS_KEY = re.compile(rb"<AccessKeyId>(\w+)</AccessKeyId>")


class StsGuard:
    """Guards the STS of a moto server."""

    def __init__(self, moto: WsgiApp, service: Service) -> None:
        self._moto = moto
        self._checker = service.checker
        self._directory = service.directory
        self._faults = service.faults
        self._journal = service.journal

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Judge a request for STS, or pass on another."""
        request = _form_request(environ)
        form = parse_qs(request.body.decode("latin-1"), keep_blank_values=True) if request is not None else {}
        action = form.get("Action", [""])[0]
        if request is None or not (_is_sts(request) or action in _UNSIGNED):
            return self._moto(environ, start_response)
        entry = self._journal.open("sts", request)
        entry.action = f"sts:{action}"
        try:
            granted = self._judge(request, action, {name: values[0] for name, values in form.items()}, entry)
        except AwsError as error:
            if entry.verdict != "allowed":
                entry.verdict = error.type
            entry.reason, entry.status = error.reason, error.status
            return _refuse(error, start_response)
        entry.status = 200
        answer = self._moto(environ, start_response)
        return answer if granted is None else self._grant(granted, answer)

    def _grant(self, granted: RoleRequest, answer: Iterable[bytes]) -> list[bytes]:
        """Pass on moto's answer, and note what the new session carries."""
        body = b"".join(answer)
        close = getattr(answer, "close", None)  # PEP 3333: whoever ends the iteration calls it, if there is one
        if close is not None:
            close()
        access_key = _ACCESS_KEY.search(body)
        if access_key is not None:
            self._directory.carry(access_key[1].decode(), granted.tags, granted.source_identity)
        return [body]

    def _judge(self, request: Request, action: str, form: Mapping[str, str], entry: Entry) -> RoleRequest | None:
        """Raises AwsError if STS would refuse; returns what is granted if a role is assumed."""
        granted = None
        if action not in _UNSIGNED:
            principal = self._checker.check(request, "sts", ())
            entry.identify(principal)
            if action == "AssumeRole":
                granted = RoleRequest.parse(form)
                self._may_assume(principal, granted)
        fault = self._faults.take("sts", request.method, request.path)
        entry.verdict = "allowed"
        if fault is not None:
            entry.fault = str(fault)
            time.sleep(fault.latency)
            refusal = fault.refusal()
            if refusal is not None:
                raise refusal
        return granted

    def _may_assume(self, principal: Principal, wanted: RoleRequest) -> None:
        """Both the caller's policies and the role's trust policy must allow each action that the request takes."""
        context = {
            "aws:PrincipalArn": principal.identity_arn,
            "aws:PrincipalAccount": principal.account,
            **principal.context(),
            **wanted.context,
        }
        trust = trust_policy(wanted.role)
        for action in wanted.actions:
            permitted = self._directory.decide(principal, action, wanted.role, context) is Decision.ALLOW
            if not permitted or trust is None or not trusts(trust, action, principal.names(), context):
                message = f"User: {principal.arn} is not authorized to perform: {action} on resource: {wanted.role}"
                raise AwsError("AccessDeniedException", message)


def _form_request(environ: Environ) -> Request | None:
    """The request if it can be one for STS: a POST of a form to the root."""
    kind = environ.get("CONTENT_TYPE", "")
    if environ["REQUEST_METHOD"] != "POST" or not kind.startswith("application/x-www-form-urlencoded"):
        return None
    if environ.get("PATH_INFO") != "/":
        return None
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = _Body(body)
    headers = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_") and isinstance(value, str)
    }
    headers["content-type"] = kind
    headers["content-length"] = str(len(body))
    return Request("POST", "/", environ.get("QUERY_STRING", ""), tuple(headers.items()), body)


class _Body:
    """A request body that was read ahead, for whoever reads it next."""

    def __init__(self, body: bytes) -> None:
        self._rest = body

    def read(self, size: int = -1) -> bytes:
        size = len(self._rest) if size is None or size < 0 else size
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def _is_sts(request: Request) -> bool:
    return "/sts/aws4_request" in (request.value("authorization") or "")


def _refuse(error: AwsError, start_response: StartResponse) -> list[bytes]:
    code = _XML_CODES.get(error.type, error.type)
    number = uuid.uuid4()
    body = (
        '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
        f"<Code>{code}</Code><Message>{escape(error.message)}</Message></Error>"
        f"<RequestId>{number}</RequestId></ErrorResponse>"
    ).encode()
    headers = [("Content-Type", "text/xml"), ("Content-Length", str(len(body))), ("x-amzn-RequestId", str(number))]
    start_response(f"{error.status} Error", headers)
    return [body]
