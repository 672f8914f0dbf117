"""Whether a deployment can be reached, and is one: name, certificate, health, and no plain HTTP beside."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime

from cryptography import x509

from mlflow_proxy.validate.calls import Calls, Reply, Unanswered, in_words, outgoing_proxies, within
from mlflow_proxy.validate.deployment import Deployment
from mlflow_proxy.validate.outcome import Outcome, failed, skipped

# A certificate that ends so soon is worth a look.
_SOON = 30
# Seconds between two looks while waiting, and between two words about it.
_PAUSE = 2.0
_NEWS = 20.0
# OpenSSL's X509_V_ERR_… (openssl-verification-options(1)).
_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64

_NO_CONNECTION = (
    "See whether the service runs, and whether the security group or firewall lets this machine's address in "
    "(allowed_cidrs of the stacks); an internal load balancer is reached from its own network only."
)
_SAVE_CERTIFICATE = (
    "If it is the stack's self-signed one, run the command in the stack's output CertificateCommand, then this "
    "again with --ca mlflow-proxy.pem. Otherwise name its CA's file with --ca."
)


def wait_until_healthy(deployment: Deployment, seconds: float, tell: Callable[[str], None]) -> None:
    """Look until health is answered or the time is over; what is wrong then, the steps say.

    `tell` gets a word about it when it changes, and now and then.
    """
    begin = time.monotonic()
    told, told_at = "", 0.0
    calls = Calls(deployment)
    while True:
        state = _state(calls)
        now = time.monotonic()
        if not state or now - begin >= seconds:
            return
        if state != told or now - told_at >= _NEWS:
            tell(f"waiting for {deployment.base}: {state} ({now - begin:.0f} of {seconds:.0f} s)")
            told, told_at = state, now
        time.sleep(min(_PAUSE, begin + seconds - now))


def _state(calls: Calls) -> str:
    """Why waiting may help; empty if it does not."""
    try:
        reply = calls.own("health")
    except Unanswered as failure:
        return "" if "certificate" in failure.reason else failure.reason
    return f"{reply.status} from what stands before it" if reply.status in (502, 503, 504) else ""


def name(deployment: Deployment) -> Outcome:
    """DNS."""
    if outgoing_proxies(deployment):
        return Outcome(None, f"{deployment.host} is looked up by the environment's HTTP proxy")
    try:
        found = within(
            deployment.timeout,
            lambda: socket.getaddrinfo(deployment.host, deployment.port, type=socket.SOCK_STREAM),
        )
    except TimeoutError:
        return Outcome(False, f"no answer for {deployment.host}", "Check this machine's resolver.", unreachable=True)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a name"
        advice = "Compare --url with the stack's output Url. A new load balancer's name takes minutes: --wait 300."
        return Outcome(False, f"{deployment.host} is not found ({why})", advice, unreachable=True)
    addresses = sorted({str(entry[4][0]) for entry in found})
    return Outcome(True, f"{deployment.host} is {', '.join(addresses[:3])}")


def tls(deployment: Deployment) -> Outcome:
    """The handshake, the certificate's names, and how long it is valid."""
    if deployment.scheme == "http":
        if deployment.is_loopback:
            return skipped("plain HTTP on this machine")
        return Outcome(False, "plain HTTP: whoever is on the way reads and changes everything", "Serve HTTPS.")
    if outgoing_proxies(deployment):
        return Outcome(None, "inside the tunnel of the environment's HTTP proxy; see the next step")
    try:
        version, certificate = within(deployment.timeout, lambda: _handshake(deployment, deployment.tls_context()))
    except OSError as error:  # TimeoutError is one, too
        return _no_handshake(deployment, error)
    days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    found = f"{version}, certificate for {_names(certificate)} from {_issuer(certificate)}, valid for {days} days"
    if days < _SOON:
        return Outcome(None, found, "Renew it.")
    return Outcome(True, found)


def health(calls: Calls) -> Outcome:
    """`/-/health`, which tells the proxy from whatever else may answer there."""
    try:
        reply = calls.own("health")
    except Unanswered as failure:
        return Outcome(False, failure.reason, _NO_CONNECTION, unreachable=True)
    if reply.status == 200 and reply.json == {"status": "ok"}:
        return Outcome(True, "the proxy answers")
    return failed(reply, fatal=True)


def plain_http(deployment: Deployment, *, port: int = 80) -> Outcome:
    """Port 80 beside 443 must redirect to HTTPS, or be closed."""
    if deployment.scheme == "http" or not (deployment.has_default_port or port != 80):
        return skipped("only looked at beside port 443")
    url = f"http://{deployment.origin.removeprefix('https://').removesuffix(f':{deployment.port}')}:{port}"
    url += f"{deployment.prefix}/-/health"
    try:
        reply = Calls(deployment, as_stranger=True).at(url)
    except Unanswered:
        return Outcome(True, f"nothing is served on port {port}")
    return _redirect(reply, port)


def _redirect(reply: Reply, port: int) -> Outcome:
    if reply.leads_to is not None and reply.headers.get("location", "").startswith("https://"):
        return Outcome(True, f"{reply.status} to HTTPS")
    return Outcome(
        False,
        f"{reply.status} on port {port}, without TLS",
        "Who writes http:// sends the key in the clear. Let port 80 redirect to HTTPS, or close it.",
        request_id=reply.request_id,
    )


def _handshake(deployment: Deployment, context: ssl.SSLContext) -> tuple[str, x509.Certificate]:
    with (
        socket.create_connection((deployment.host, deployment.port), timeout=deployment.timeout) as connection,
        context.wrap_socket(connection, server_hostname=deployment.host) as wrapped,
    ):
        certificate = wrapped.getpeercert(binary_form=True)
        assert certificate is not None  # noqa: S101  (servers show one, or there is no handshake)
        return wrapped.version() or "TLS", x509.load_der_x509_certificate(certificate)


def _no_handshake(deployment: Deployment, error: OSError) -> Outcome:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _not_trusted(deployment, error)
    if isinstance(error, TimeoutError):
        reason = f"port {deployment.port}: no connection within {deployment.timeout:g} s"
        return Outcome(False, reason, _NO_CONNECTION, unreachable=True)
    if isinstance(error, ssl.SSLError):
        advice = "Does this port speak TLS? A listener with mTLS refuses without --client-cert, too."
        return Outcome(False, in_words(error), advice, unreachable=True)
    return Outcome(False, f"port {deployment.port}: {in_words(error)}", _NO_CONNECTION, unreachable=True)


def _not_trusted(deployment: Deployment, error: ssl.SSLCertVerificationError) -> Outcome:
    found = f"the certificate is not trusted: {error.verify_message}"
    shown = _shown(deployment)
    if shown is not None:
        found += f"; it is for {_names(shown)}, from {_issuer(shown)}, until {shown.not_valid_after_utc:%Y-%m-%d}"
    if error.verify_code in (_OTHER_NAME, _OTHER_ADDRESS):
        advice = "Write a name in --url that the certificate has, or have one made for this name."
    elif error.verify_code in (_EXPIRED, _NOT_YET):
        advice = "Renew it, or set this machine's clock. A stack's self-signed one is made anew with its stack 4."
    else:
        advice = _SAVE_CERTIFICATE
    return Outcome(False, found, advice, unreachable=True)


def _shown(deployment: Deployment) -> x509.Certificate | None:
    """What is there instead, only to be described; nothing is sent on that connection."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        return within(deployment.timeout, lambda: _handshake(deployment, context))[1]
    except (OSError, ValueError):
        return None


def _names(certificate: x509.Certificate) -> str:
    """The hosts and addresses that it is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return "no name"
    names = [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _issuer(certificate: x509.Certificate) -> str:
    if certificate.issuer == certificate.subject:
        return "itself (self-signed)"
    attributes = [
        *certificate.issuer.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME),
        *certificate.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME),
    ]
    return str(attributes[0].value) if attributes else "an unnamed CA"
