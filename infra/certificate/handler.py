"""Runs in AWS Lambda, for CloudFormation: a self-signed certificate for one DNS name, imported into ACM.

For a first try without a domain only: nobody vouches for it, so callers must be told to trust this one certificate.
The private key never leaves this function but to ACM.
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# The most that Apple's systems accept of a certificate that its user trusts.
_DAYS = 825
# With less left, a deployment renews it. Deployments ask once in a quarter, so that one a year is enough.
_RENEW_DAYS = 420
# To delete a certificate, ten seconds apart.
_ATTEMPTS = 20
# How a certificate that is gone is answered. The function's permission asks for the certificate's tag, which one that
# is gone does not have: so IAM denies access before ACM could say that it does not find it.
_GONE = frozenset({"ResourceNotFoundException", "AccessDeniedException"})
_LOG = logging.getLogger(__name__)


def handle(event: dict[str, Any], context: Any) -> None:
    """Answer one request of CloudFormation, also if it failed: else it would wait for an hour."""
    answer = {
        "Status": "SUCCESS",
        "StackId": event["StackId"],
        "RequestId": event["RequestId"],
        "LogicalResourceId": event["LogicalResourceId"],
        "PhysicalResourceId": event.get("PhysicalResourceId", "none"),
    }
    try:
        answer["PhysicalResourceId"] = _carry_out(event)
    except Exception as error:
        answer |= {"Status": "FAILED", "Reason": f"{type(error).__name__}: {error}; see log {_log(context)}"}
    body = json.dumps(answer).encode()
    # The URL is CloudFormation's own, and https; a Content-Type would break its signature.
    request = urllib.request.Request(event["ResponseURL"], body, {"Content-Type": ""}, method="PUT")  # noqa: S310
    with urllib.request.urlopen(request, timeout=30):  # noqa: S310
        pass


def _carry_out(event: dict[str, Any]) -> str:
    """The ARN of the certificate. If it is another one than before, CloudFormation then deletes the old."""
    acm = boto3.client("acm", region_name=os.environ["AWS_REGION"])
    if event["RequestType"] == "Update" and is_still_good(acm, event):
        return str(event["PhysicalResourceId"])
    if event["RequestType"] != "Delete":
        properties = event["ResourceProperties"]
        certificate, key = make_certificate(properties["Name"])
        tags = [{"Key": key, "Value": value} for key, value in sorted(properties["Tags"].items())]
        return str(acm.import_certificate(Certificate=certificate, PrivateKey=key, Tags=tags)["CertificateArn"])
    arn = str(event["PhysicalResourceId"])
    if arn.startswith("arn:"):
        delete_certificate(acm, arn)
    return arn


def is_still_good(acm: Any, event: dict[str, Any]) -> bool:
    """Whether the certificate is there, for the name that is asked for, and lasts for long enough."""
    if event["OldResourceProperties"]["Name"] != event["ResourceProperties"]["Name"]:
        return False
    try:
        found = acm.describe_certificate(CertificateArn=event["PhysicalResourceId"])["Certificate"]
    except ClientError as error:
        if _code(error) not in _GONE:
            raise
        _LOG.warning("Taken for gone, so another one is made: %s", error)
        return False
    return bool(found["NotAfter"] - datetime.now(UTC) > timedelta(days=_RENEW_DAYS))


def delete_certificate(acm: Any, arn: str, *, pause: float = 10.0) -> None:
    """Delete a certificate. ACM believes for a while that a listener that was just deleted still uses it.

    One that is gone is what was asked for. If its tag was only taken off, it is left in the account, and the log names
    it: better than a stack that cannot be deleted for it.
    """
    for attempt in range(_ATTEMPTS):
        try:
            acm.delete_certificate(CertificateArn=arn)
        except ClientError as error:
            if _code(error) in _GONE:
                _LOG.warning("Taken for gone, so not deleted: %s: %s", arn, error)
                return
            if _code(error) != "ResourceInUseException" or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(pause)
        else:
            return


def make_certificate(name: str) -> tuple[bytes, bytes]:
    """A certificate for one DNS name and its private key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    # A common name has 64 characters at the most; load balancers' names may be longer, and only the SAN counts.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mlflow-proxy (self-signed)")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name.lower())]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private


def _code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


def _log(context: Any) -> str:
    return f"{context.log_group_name}, stream {context.log_stream_name}"
