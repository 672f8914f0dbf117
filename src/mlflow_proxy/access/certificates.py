"""Whose client certificate a load balancer or nginx has verified, by the headers in which they say so.

Nobody signs these headers. They count because only trusted proxies may send them (the request reader drops them from
all others), and because those proxies take away what callers send under the same names.
"""

from __future__ import annotations

import re

from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.requests import Presented
from mlflow_proxy.settings import Certificates, LoadBalancer

_LONGEST_SUBJECT = 1024
# "HTTP headers and mutual TLS" in AWS's user guide of Application Load Balancers: what a listener in verify mode adds.
_AWS_PREFIX = "x-amzn-mtls-clientcert-"
_AWS_HEADERS = tuple(
    f"{_AWS_PREFIX}{name}".encode() for name in ("subject", "issuer", "serial-number", "validity", "leaf")
)
_SERIAL_HEADER = b"x-amzn-mtls-clientcert-serial-number"
_SERIAL = re.compile(rb"[0-9A-Fa-f:]{1,64}")
# "Authenticate users" in the same guide: a load balancer that signs people in adds all three; only the first is signed.
_SIGN_IN_HEADERS = (b"x-amzn-oidc-data", b"x-amzn-oidc-identity", b"x-amzn-oidc-accesstoken")


class CertificateIdentity:
    """Reads the certificate headers of one configuration."""

    def __init__(self, options: Certificates) -> None:
        if not options.subject_header:
            raise ValueError("certificates.subject_header is required")
        self._subject_header = options.subject_header.encode()
        self._verify_header = options.verify_header.encode() if options.verify_header else None
        self._verify_value = options.verify_value.encode()
        self._issuer_header = options.issuer_header.encode() if options.issuer_header else b""
        self._issuers = frozenset(options.issuers)

    def identify(self, presented: Presented) -> Caller | None:
        """The caller whose certificate was verified; None if none was shown. Raises Unauthenticated.

        nginx sends no subject, or an empty one, where the caller has no certificate.
        """
        values = presented.get(self._subject_header)
        if values is None or values == [b""]:
            return None
        subject = _text(values, "subject")
        if self._verify_header is not None and presented.get(self._verify_header) != [self._verify_value]:
            raise Unauthenticated("its certificate was not verified: certificates.verify_header does not say so")
        if self._issuers:
            issuer = _text(presented.get(self._issuer_header, []), "issuer")
            if issuer not in self._issuers:
                raise Unauthenticated("its certificate's issuer is not one of certificates.issuers")
        return Caller(f"cert:{subject}", "certificate", credential=_serial(presented))


def header_names(options: Certificates, load_balancer: LoadBalancer) -> frozenset[bytes]:
    """The headers by which trusted proxies may say whom they identified, in lower case, under this configuration.

    With them go those that AWS's load balancers always add beside them: they identify nobody, and are no sign of an
    attack either.
    """
    names: set[bytes] = set()
    if load_balancer.arn:
        names.update(_SIGN_IN_HEADERS)
    if options.subject_header:
        named = (options.subject_header, options.issuer_header, options.verify_header)
        names.update(name.encode() for name in named if name)
        names.add(_SERIAL_HEADER)
        if options.subject_header.startswith(_AWS_PREFIX):
            names.update(_AWS_HEADERS)
    return frozenset(names)


def _text(values: list[bytes], what: str) -> str:
    """The single value of a header. One text for one name: other encodings than UTF-8 are not guessed."""
    if len(values) != 1:
        raise Unauthenticated(f"its certificate's {what} was sent {len(values)} times, not once")
    try:
        text = values[0].decode("utf-8")
    except UnicodeDecodeError:
        raise Unauthenticated(f"its certificate's {what} is not UTF-8") from None
    if not text.strip() or len(text) > _LONGEST_SUBJECT or not text.isprintable():
        raise Unauthenticated(f"its certificate's {what} is not a text of 1 to {_LONGEST_SUBJECT} printable characters")
    return text


def _serial(presented: Presented) -> str:
    """The certificate's serial number for the audit log, where it was sent under AWS's name."""
    values = presented.get(_SERIAL_HEADER, [])
    return values[0].decode("ascii") if len(values) == 1 and _SERIAL.fullmatch(values[0]) else ""
