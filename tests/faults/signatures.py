"""Checks what arrived at an upstream as SageMaker would: with botocore, never with the proxy's own signer."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote, unquote

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from tests.faults.proxies import ACCESS_KEY, SECRET_KEY
from tests.faults.upstreams import Arrived

_AUTHORIZATION = re.compile(
    rf"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/(?P<day>\d{{8}})/us-east-1/(?P<service>[a-z-]+)/aws4_request, "
    r"SignedHeaders=(?P<names>[a-z0-9;-]+), Signature=(?P<signature>[0-9a-f]{64})"
)


def assert_signed(arrived: Arrived, service: str = "sagemaker-mlflow") -> None:
    """Fails unless the signature is right for the very bytes that arrived."""
    match = _AUTHORIZATION.fullmatch(arrived.value("authorization"))
    assert match is not None
    assert match["service"] == service
    assert arrived.value("x-amz-content-sha256") == hashlib.sha256(arrived.body).hexdigest()
    date = arrived.value("x-amz-date")
    assert date[:8] == match["day"]
    names = match["names"].split(";")
    assert {"host", "x-amz-content-sha256", "x-amz-date"} <= set(names)
    assert any(name.endswith("-arn") for name in names)
    _assert_strict(arrived.target.partition("?")[2])
    url = f"http://{arrived.value('host')}{arrived.target}"
    request = AWSRequest(arrived.method, url, {name: arrived.value(name) for name in names}, arrived.body)
    request.context["timestamp"] = date
    signer = SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), service, "us-east-1")
    text = signer.string_to_sign(request, signer.canonical_request(request))
    assert signer.signature(text, request) == match["signature"]


def _assert_strict(query: str) -> None:
    """The service decodes and encodes strictly before it compares; this must change nothing."""
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        assert pair == f"{_strictly(name)}={_strictly(value)}"


def _strictly(text: str) -> str:
    return quote(unquote(text, errors="strict"), safe="-._~")
