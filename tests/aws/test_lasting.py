"""Which failures to get credentials pass by themselves, and which wait for somebody's hand."""

from __future__ import annotations

import errno
import os
import ssl
from typing import Any

import pytest
from botocore import exceptions as failures

from mlflow_proxy.aws.sessions import CredentialsUnavailable, is_lasting


def answered(code: str, status: int) -> failures.ClientError:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return failures.ClientError(response, "AssumeRole")


@pytest.mark.parametrize(
    "error",
    [
        *(answered(code, 403) for code in ("AccessDenied", "AccessDeniedException", "RegionDisabledException")),
        *(answered(code, 403) for code in ("InvalidClientTokenId", "SignatureDoesNotMatch", "OptInRequired")),
        *(answered(code, 400) for code in ("ValidationError", "InvalidIdentityToken", "MalformedPolicyDocument")),
        failures.ProfileNotFound(profile="x"),
        failures.PartialCredentialsError(provider="env", cred_var="aws_secret_access_key"),
        failures.ConfigParseError(path="x"),
        failures.InvalidConfigError(error_msg="x"),
        failures.UnauthorizedSSOTokenError(),
        failures.SSLError(endpoint_url="x", error=ssl.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] verify failed")),
        OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/var/run/token"),
        OSError(errno.EACCES, os.strerror(errno.EACCES), "/var/run/token"),
        CredentialsUnavailable("none", lasting=True),
    ],
    ids=str,
)
def test_lasting(error: Exception) -> None:
    assert is_lasting(error)


@pytest.mark.parametrize(
    "error",
    [
        *(answered(code, 400) for code in ("Throttling", "RequestLimitExceeded", "ExpiredToken", "RequestExpired")),
        *(answered("IDPCommunicationError", 400), answered("RequestTimeout", 408), answered("SomethingNew", 429)),
        *(answered("InternalFailure", 500), answered("ServiceUnavailable", 503), answered("AccessDenied", 502)),
        failures.EndpointConnectionError(endpoint_url="x"),
        failures.ConnectTimeoutError(endpoint_url="x"),
        failures.ReadTimeoutError(endpoint_url="x"),
        failures.ProxyConnectionError(proxy_url="x"),
        failures.SSLError(endpoint_url="x", error=ssl.SSLError("EOF occurred in violation of protocol")),
        failures.CredentialRetrievalError(provider="container-role", error_msg="x"),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/var/run/token"),
        TimeoutError(),
        RuntimeError("still expired"),
        CredentialsUnavailable("not yet"),
    ],
    ids=str,
)
def test_passing(error: Exception) -> None:
    assert not is_lasting(error)
