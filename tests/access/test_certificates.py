"""Client certificates, as a real nginx hands them on, and the headers of AWS's load balancers."""

from __future__ import annotations

import http.client
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from tests.access.provider import free_port

from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.certificates import CertificateIdentity, header_names
from mlflow_proxy.requests import Presented
from mlflow_proxy.settings import Certificates, LoadBalancer

# As docs/access.md shows it, but for the verification, which is the server's.
HANDED_ON = """
proxy_set_header X-SSL-Client-Verify $ssl_client_verify;
proxy_set_header X-SSL-Client-S-DN $ssl_client_s_dn;
proxy_set_header X-SSL-Client-I-DN $ssl_client_i_dn;
proxy_set_header X-Amzn-Mtls-Clientcert-Serial-Number $ssl_client_serial;
"""
NGINX = Certificates(
    subject_header="X-SSL-Client-S-DN", verify_header="X-SSL-Client-Verify", issuer_header="X-SSL-Client-I-DN"
)
UNVERIFIED = Certificates(subject_header="X-SSL-Client-S-DN")
ALB = Certificates(subject_header="x-amzn-mtls-clientcert-subject", issuer_header="x-amzn-mtls-clientcert-issuer")
DAY = timedelta(days=1)
# A load balancer in verify mode, after AWS's user guide.
FROM_ALB = {
    b"x-amzn-mtls-clientcert-subject": [b"CN=trainer,OU=ml,O=Example,C=DE"],
    b"x-amzn-mtls-clientcert-issuer": [b"CN=Example Root,O=Example,C=DE"],
    b"x-amzn-mtls-clientcert-serial-number": [b"03A5B1C2D3"],
    b"x-amzn-mtls-clientcert-validity": [b"NotBefore=2026-01-01T00:00:00Z;NotAfter=2027-01-01T00:00:00Z"],
    b"x-amzn-mtls-clientcert-leaf": [b"-----BEGIN%20CERTIFICATE-----%0AMIID"],
}


def reason(options: Certificates, presented: dict[bytes, list[bytes]]) -> str:
    with pytest.raises(Unauthenticated) as caught:
        CertificateIdentity(options).identify(Presented(presented))
    assert caught.value.reason.isprintable()
    return caught.value.reason


def identify(options: Certificates, presented: dict[bytes, list[bytes]]) -> Caller | None:
    return CertificateIdentity(options).identify(Presented(presented))


class ClientAuthority:
    """A CA for clients; `bundle` is its certificate."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.bundle = folder / f"{name}.pem"
        certificate = self._build(self._subject, self._key, DAY).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.bundle.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        self._issued = 0

    def issue(self, *attributes: tuple[x509.ObjectIdentifier, str], valid: timedelta = DAY) -> tuple[Path, int]:
        """A file with a certificate for this subject and its key, and the serial number."""
        self._issued += 1
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])
        builder = self._build(subject, key, valid)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = self._folder / f"{self._name}-{self._issued}.pem"
        file.write_bytes(pem)
        return file, certificate.serial_number

    def _build(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, valid: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return x509.CertificateBuilder(
            issuer_name=self._subject,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=int.from_bytes(b"\x5a" + os.urandom(19)),  # 20 bytes, as CAs make them
            not_valid_before=now - 2 * DAY,
            not_valid_after=now + valid,
        )


class Nginx(NamedTuple):
    """A running nginx: `strict` verifies and lets those without certificates pass, `lax` lets any certificate pass.

    `bare` hands on what callers send, as an nginx does that nobody has told about these headers. `seen` are the headers
    of the requests that came through.
    """

    strict: int
    lax: int
    bare: int
    ours: ClientAuthority
    others: ClientAuthority
    seen: list[Presented]

    def call(
        self, port: int, certificate: Path | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[int, Presented | None]:
        """Status, and the headers that arrived behind nginx, if the request did."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate is not None:
            context.load_cert_chain(certificate)
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
        self.seen.clear()
        try:
            connection.request("GET", "/", headers=headers)
            status = connection.getresponse().status
        finally:
            connection.close()
        return status, self.seen[0] if self.seen else None

    def arrived(
        self, port: int, certificate: Path | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> Presented:
        status, presented = self.call(port, certificate, headers)
        assert status == 200
        assert presented is not None
        return presented


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    folder = tmp_path_factory.mktemp("nginx")
    ours, others = ClientAuthority(folder, "ours"), ClientAuthority(folder, "others")
    server, _ = ours.issue((NameOID.COMMON_NAME, "server"))
    seen: list[Presented] = []
    upstream = _echo(seen)
    ports = [free_port() for _ in range(3)]
    blocks = "".join(
        f"""
        server {{
            listen 127.0.0.1:{port} ssl;
            ssl_certificate {server};
            ssl_certificate_key {server};
            ssl_client_certificate {ours.bundle};
            ssl_verify_client {verify};
            location / {{
                proxy_pass http://127.0.0.1:{upstream.server_address[1]};
                {lines}
            }}
        }}"""
        for port, verify, lines in zip(
            ports, ("optional", "optional_no_ca", "off"), (HANDED_ON, HANDED_ON, ""), strict=True
        )
    )
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"pid {folder}/nginx.pid;\nevents {{}}\nhttp {{ access_log off; {temporary} {blocks} }}\n", "utf-8"
    )
    command = ["/usr/sbin/nginx", "-p", str(folder), "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"]
    with subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL) as process:
        running = Nginx(ports[0], ports[1], ports[2], ours, others, seen)
        try:
            _wait(lambda: running.call(ports[0])[0] == 200, lambda: (folder / "error.log").read_text("utf-8"))
            yield running
        finally:
            process.terminate()
            upstream.shutdown()
            upstream.server_close()


def _echo(seen: list[Presented]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            presented = Presented()
            for name, value in self.headers.items():
                presented.setdefault(name.lower().encode(), []).append(value.encode("latin-1"))
            seen.append(presented)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def _wait(condition: Callable[[], bool], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


class TestBehindNginx:
    def test_a_verified_certificate(self, nginx: Nginx) -> None:
        certificate, serial = nginx.ours.issue(
            (NameOID.COUNTRY_NAME, "DE"), (NameOID.ORGANIZATION_NAME, "Example"), (NameOID.COMMON_NAME, "trainer")
        )
        presented = nginx.arrived(nginx.strict, certificate)
        caller = identify(NGINX, presented)
        assert caller == Caller("cert:CN=trainer,O=Example,C=DE", "certificate", credential=f"{serial:040X}")

    def test_no_certificate_identifies_nobody_and_is_no_failure(self, nginx: Nginx) -> None:
        presented = nginx.arrived(nginx.strict)
        assert presented[b"x-ssl-client-verify"] == [b"NONE"]
        assert identify(NGINX, presented) is None

    def test_what_callers_send_themselves(self, nginx: Nginx) -> None:
        """nginx takes it away; where nothing tells it to, a name is enough to be somebody."""
        forged = {"X-SSL-Client-S-DN": "CN=admin", "X-SSL-Client-Verify": "SUCCESS"}
        assert identify(NGINX, nginx.arrived(nginx.strict, headers=forged)) is None
        through = identify(NGINX, nginx.arrived(nginx.bare, headers=forged))
        assert through is not None
        assert through.subject == "cert:CN=admin"

    def test_what_callers_send_beside_their_certificate(self, nginx: Nginx) -> None:
        certificate, _ = nginx.ours.issue((NameOID.COMMON_NAME, "reader"))
        forged = {
            "X-SSL-Client-S-DN": "CN=admin",
            "x-ssl-client-s-dn": "CN=admin",
            "X_SSL_Client_S_DN": "CN=admin",
            "X-Amzn-Mtls-Clientcert-Serial-Number": "01",
        }
        caller = identify(NGINX, nginx.arrived(nginx.strict, certificate, forged))
        assert caller is not None
        assert caller.subject == "cert:CN=reader"
        assert caller.credential != "01"

    def test_a_certificate_of_another_authority(self, nginx: Nginx) -> None:
        """A strict nginx refuses it; a lax one hands it on, and only verify_header tells."""
        certificate, _ = nginx.others.issue((NameOID.COMMON_NAME, "admin"))
        assert nginx.call(nginx.strict, certificate) == (400, None)
        presented = nginx.arrived(nginx.lax, certificate)
        assert presented[b"x-ssl-client-verify"][0].startswith(b"FAILED:")
        assert "was not verified" in reason(NGINX, presented)
        assert identify(UNVERIFIED, presented) == Caller(
            "cert:CN=admin", "certificate", credential=presented[b"x-amzn-mtls-clientcert-serial-number"][0].decode()
        )

    def test_an_expired_certificate(self, nginx: Nginx) -> None:
        certificate, _ = nginx.ours.issue((NameOID.COMMON_NAME, "trainer"), valid=-DAY)
        assert nginx.call(nginx.strict, certificate) == (400, None)

    def test_issuers(self, nginx: Nginx) -> None:
        certificate, _ = nginx.ours.issue((NameOID.COMMON_NAME, "trainer"))
        presented = nginx.arrived(nginx.strict, certificate)
        named = NGINX.model_copy(update={"issuers": ["CN=ours"]})
        assert identify(named, presented) == identify(NGINX, presented)
        assert "issuer" in reason(NGINX.model_copy(update={"issuers": ["CN=others"]}), presented)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("a,O=Admins", r"CN=a\,O=Admins"),
            ("Zoë", r"CN=Zo\C3\AB"),
            ('say "hi"', r"CN=say \"hi\""),
            ("two\nlines", r"CN=two\0Alines"),
            ("+1=2;<3>#", r"CN=\+1=2\;\<3\>#"),
        ],
    )
    def test_names_with_special_characters(self, nginx: Nginx, name: str, expected: str) -> None:
        """RFC 2253 escapes what could end one attribute and begin another."""
        certificate, _ = nginx.ours.issue((NameOID.COMMON_NAME, name))
        caller = identify(NGINX, nginx.arrived(nginx.strict, certificate))
        assert caller is not None
        assert caller.subject == f"cert:{expected}"

    def test_a_certificate_without_a_subject(self, nginx: Nginx) -> None:
        certificate, _ = nginx.ours.issue()
        presented = nginx.arrived(nginx.strict, certificate)
        assert presented[b"x-ssl-client-verify"] == [b"SUCCESS"]
        assert identify(NGINX, presented) is None


class TestBehindALoadBalancer:
    def test_the_headers_of_verify_mode(self) -> None:
        caller = identify(ALB, FROM_ALB)
        assert caller == Caller("cert:CN=trainer,OU=ml,O=Example,C=DE", "certificate", credential="03A5B1C2D3")

    def test_issuers(self) -> None:
        issuer = "CN=Example Root,O=Example,C=DE"
        named = ALB.model_copy(update={"issuers": ["CN=Other", issuer]})
        assert identify(named, FROM_ALB) == identify(ALB, FROM_ALB)
        for values in ([], [b"CN=Evil"], [issuer.encode()] * 2, [b""], [issuer.encode() + b" "]):
            changed = {**FROM_ALB, b"x-amzn-mtls-clientcert-issuer": values}
            assert "issuer" in reason(named, changed)
            assert identify(ALB, changed) == identify(ALB, FROM_ALB)
        without = {name: values for name, values in FROM_ALB.items() if b"issuer" not in name}
        assert "issuer" in reason(named, without)

    def test_issuers_without_a_header_let_nobody_in(self) -> None:
        blind = Certificates(subject_header="x-amzn-mtls-clientcert-subject", issuers=["CN=Example Root"])
        assert "issuer" in reason(blind, {**FROM_ALB, b"": [b"CN=Example Root"][:0]})

    def test_nothing_shown(self) -> None:
        assert identify(ALB, {}) is None
        assert identify(ALB, {b"x-amzn-mtls-clientcert-subject": [b""]}) is None
        assert identify(ALB, {b"x-amzn-mtls-clientcert-issuer": [b"CN=x"]}) is None


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b"CN=a", b"CN=b"],
        [b"CN=a", b"CN=a"],
        [b"", b"CN=a"],
        [b" "],
        [b"CN=a\x00"],
        [b"CN=a\nCN=b"],
        [b"CN=a\x1b[31m"],
        [b"CN=Zo\xeb"],
        ["CN=a\u202eb".encode()],
        [b"CN=" + b"a" * 1022],
    ],
)
def test_what_is_no_subject(values: list[bytes]) -> None:
    reason(UNVERIFIED, {b"x-ssl-client-s-dn": values})


@pytest.mark.parametrize("text", ["CN=a", "CN=Zoë", "/C=DE/CN=a", "CN=" + "a" * 1021, "CN=*"])
def test_what_is_a_subject(text: str) -> None:
    caller = identify(UNVERIFIED, {b"x-ssl-client-s-dn": [text.encode()]})
    assert caller == Caller(f"cert:{text}", "certificate")


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        [b"NONE"],
        [b"FAILED:unable to verify"],
        [b""],
        [b"success"],
        [b"SUCCESS "],
        [b"SUCCESS"] * 2,
        [b"NONE", b"SUCCESS"],
    ],
)
def test_what_was_not_verified(said: list[bytes] | None) -> None:
    presented = {b"x-ssl-client-s-dn": [b"CN=a"]} | ({} if said is None else {b"x-ssl-client-verify": said})
    assert "was not verified" in reason(NGINX, presented)
    assert identify(NGINX, presented | {b"x-ssl-client-verify": [b"SUCCESS"]}) == Caller("cert:CN=a", "certificate")


@pytest.mark.parametrize("values", [[], [b""], [b"01", b"02"], [b"0x1"], [b"1" * 65], [b"1\n"], [b"\xff"]])
def test_serial_numbers_that_are_none(values: list[bytes]) -> None:
    caller = identify(ALB, {**FROM_ALB, b"x-amzn-mtls-clientcert-serial-number": values})
    assert caller is not None
    assert caller.credential == ""


def test_a_reason_holds_nothing_of_the_headers() -> None:
    secret = b"hunter2"
    good = {b"x-ssl-client-s-dn": [b"CN=a"], b"x-ssl-client-verify": [b"SUCCESS"], b"x-ssl-client-i-dn": [b"CN=ours"]}
    options = NGINX.model_copy(update={"issuers": ["CN=ours"]})
    assert identify(options, good) is not None
    for name in good:
        for value in (secret, secret + b"\n"):
            if (name, value) != (b"x-ssl-client-s-dn", secret):  # which is a good subject
                assert "hunter2" not in reason(options, good | {name: [value]})


def test_without_a_subject_header_there_is_no_such_way() -> None:
    with pytest.raises(ValueError, match=r"certificates\.subject_header"):
        CertificateIdentity(Certificates())


class TestHeaderNames:
    ARN = "arn:aws:elasticloadbalancing:eu-central-1:111122223333:loadbalancer/app/mlflow/50dc6c495c0c9188"

    def test_none_count_unless_configured(self) -> None:
        assert header_names(Certificates(), LoadBalancer()) == frozenset()
        lonely = Certificates(issuer_header="x-issuer", verify_header="x-verify")
        assert header_names(lonely, LoadBalancer()) == frozenset()

    def test_those_of_nginx(self) -> None:
        assert header_names(NGINX, LoadBalancer()) == {
            b"x-ssl-client-s-dn",
            b"x-ssl-client-verify",
            b"x-ssl-client-i-dn",
            b"x-amzn-mtls-clientcert-serial-number",
        }

    def test_those_of_a_load_balancer_with_what_it_adds(self) -> None:
        assert header_names(ALB, LoadBalancer()) == set(FROM_ALB)
        assert header_names(Certificates(), LoadBalancer(arn=self.ARN)) == {
            b"x-amzn-oidc-data",
            b"x-amzn-oidc-identity",
            b"x-amzn-oidc-accesstoken",
        }

    def test_what_only_goes_along_identifies_nobody(self) -> None:
        beside = {name: values for name, values in FROM_ALB.items() if name != b"x-amzn-mtls-clientcert-subject"}
        assert identify(ALB, beside | {b"x-amzn-oidc-identity": [b"admin"]}) is None


NAMES = [b"x-ssl-client-s-dn", b"x-ssl-client-verify", b"x-ssl-client-i-dn", b"x-amzn-mtls-clientcert-serial-number"]


@given(st.dictionaries(st.sampled_from(NAMES), st.lists(st.binary(max_size=12) | st.just(b"SUCCESS"), max_size=3)))
def test_any_headers_end_in_a_sound_caller_or_a_refusal(presented: dict[bytes, list[bytes]]) -> None:
    try:
        caller = identify(NGINX, presented)
    except Unauthenticated as failure:
        sound = failure.reason
    else:
        sound = "" if caller is None else caller.subject + caller.credential
    assert sound.isprintable()
