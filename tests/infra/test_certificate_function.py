"""The function that makes self-signed certificates: against moto's ACM, answering as CloudFormation wants it."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from infra.certificate import handler
from moto.server import ThreadedMotoServer

NAME = "Internal-Proxy-1234567890.eu-central-1.elb.amazonaws.com"


class Context:
    log_group_name = "group"
    log_stream_name = "stream"


@pytest.fixture
def acm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("acm", region_name="eu-central-1")
    yield client
    server.stop()


def ask(kind: str, arn: str | None = None, name: str = NAME, old: str = NAME) -> dict[str, str]:
    """CloudFormation's request, and what the function sent to its URL."""
    answers: list[tuple[dict[str, str], str]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answers.append((json.loads(body), self.headers["Content-Type"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    event = {
        "RequestType": kind,
        "ResponseURL": f"http://127.0.0.1:{server.server_port}/answer?signature=x",
        "StackId": "stack",
        "RequestId": "request",
        "LogicalResourceId": "Certificate",
        "ResourceProperties": {"Name": name, "Tags": {"of": "tests"}},
        **({"PhysicalResourceId": arn} if arn else {}),
        **({"OldResourceProperties": {"Name": old}} if kind == "Update" else {}),
    }
    handler.handle(event, Context())
    thread.join()
    server.server_close()
    ((answer, content_type),) = answers
    assert content_type == ""
    assert (answer["StackId"], answer["RequestId"], answer["LogicalResourceId"]) == ("stack", "request", "Certificate")
    return answer


def certificates(acm: Any) -> set[str]:
    """The ARNs of those that are there; moto keeps them from one test to the next."""
    return {one["CertificateArn"] for one in acm.list_certificates()["CertificateSummaryList"]}


def test_certificate_is_for_the_name_and_imported_with_its_tags(acm: Any) -> None:
    answer = ask("Create")
    assert answer["Status"] == "SUCCESS"
    arn = answer["PhysicalResourceId"]
    certificate = x509.load_pem_x509_certificate(acm.get_certificate(CertificateArn=arn)["Certificate"].encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME.lower()]
    days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    assert 820 <= days <= 825
    certificate.verify_directly_issued_by(certificate)
    assert acm.list_tags_for_certificate(CertificateArn=arn)["Tags"] == [{"Key": "of", "Value": "tests"}]


def test_another_name_makes_another_certificate_and_the_old_one_is_deleted(acm: Any) -> None:
    first = ask("Create")["PhysicalResourceId"]
    second = ask("Update", first, "other.example.com")["PhysicalResourceId"]
    assert first != second
    assert ask("Delete", first)["Status"] == "SUCCESS"
    left = certificates(acm)
    assert second in left
    assert first not in left


def test_deployment_keeps_a_certificate_that_lasts_and_renews_one_that_does_not(
    acm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask("Create")["PhysicalResourceId"]
    assert ask("Update", first)["PhysicalResourceId"] == first
    # One made as if 410 days ago, then one as if 400 days ago.
    for days, renewed in ((825 - 410, True), (825 - 400, False)):
        monkeypatch.setattr(handler, "_DAYS", days)
        old = ask("Create")["PhysicalResourceId"]
        monkeypatch.setattr(handler, "_DAYS", 825)
        answer = ask("Update", old)
        assert answer["Status"] == "SUCCESS"
        assert (answer["PhysicalResourceId"] != old) is renewed
    acm.delete_certificate(CertificateArn=first)
    again = ask("Update", first)["PhysicalResourceId"]
    assert again != first, "one that somebody deleted is made again"


def test_deleting_what_is_gone_succeeds(acm: Any) -> None:
    arn = ask("Create")["PhysicalResourceId"]
    acm.delete_certificate(CertificateArn=arn)
    assert ask("Delete", arn)["Status"] == "SUCCESS"


def test_after_a_failed_creation_there_is_nothing_to_delete(acm: Any) -> None:
    assert ask("Delete", "none") == {
        "Status": "SUCCESS",
        "StackId": "stack",
        "RequestId": "request",
        "LogicalResourceId": "Certificate",
        "PhysicalResourceId": "none",
    }


@contextlib.contextmanager
def acm_that_refuses(operation: str, code: str, times: int = 1000) -> Iterator[list[str]]:
    """An endpoint that passes everything on to moto, and answers the operation with an error instead, so many times.

    What moto never does: to deny access as IAM would, and to take a certificate for used. Gives the operations asked.
    """
    asked: list[str] = []
    behind = os.environ["AWS_ENDPOINT_URL"]

    class Front(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.headers["X-Amz-Target"].removeprefix("CertificateManager."))
            if asked[-1] == operation and asked.count(operation) <= times:
                self._answer(400, json.dumps({"__type": code, "Message": "the reason"}).encode())
                return
            request = urllib.request.Request(behind, body, dict(self.headers))
            with urllib.request.urlopen(request, timeout=30) as answer:
                self._answer(answer.status, answer.read())

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Front)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield asked
    server.shutdown()
    server.server_close()


def test_certificate_of_a_listener_that_was_just_deleted_is_tried_again(acm: Any) -> None:
    arn = ask("Create")["PhysicalResourceId"]
    with acm_that_refuses("DeleteCertificate", "ResourceInUseException"):
        client = boto3.client("acm", region_name="eu-central-1")
        with pytest.raises(client.exceptions.ResourceInUseException):
            handler.delete_certificate(client, arn, pause=0)
    assert arn in certificates(acm)
    with acm_that_refuses("DeleteCertificate", "ResourceInUseException", times=3) as asked:
        handler.delete_certificate(boto3.client("acm", region_name="eu-central-1"), arn, pause=0)
    assert asked == ["DeleteCertificate"] * 4
    assert arn not in certificates(acm)


def test_access_denied_to_a_certificate_means_that_it_is_gone(acm: Any, caplog: pytest.LogCaptureFixture) -> None:
    """So IAM answers, because the function may reach only certificates with the stack's tag."""
    gone = ask("Create")["PhysicalResourceId"]
    acm.delete_certificate(CertificateArn=gone)
    with acm_that_refuses("DescribeCertificate", "AccessDeniedException") as asked:
        answer = ask("Update", gone)
    assert answer["Status"] == "SUCCESS"
    assert asked == ["DescribeCertificate", "ImportCertificate"]
    assert answer["PhysicalResourceId"] != gone
    assert answer["PhysicalResourceId"] in certificates(acm)
    with acm_that_refuses("DeleteCertificate", "AccessDeniedException") as asked:
        assert ask("Delete", gone)["Status"] == "SUCCESS"
    assert asked == ["DeleteCertificate"], "another try would change nothing"
    first, second = (record.getMessage() for record in caplog.records if record.name == handler.__name__)
    assert "another one is made" in first
    assert gone in second
    assert "AccessDeniedException" in second


@pytest.mark.parametrize(("kind", "operation"), [("Update", "DescribeCertificate"), ("Delete", "DeleteCertificate")])
def test_another_error_is_told(acm: Any, kind: str, operation: str) -> None:
    arn = ask("Create")["PhysicalResourceId"]
    with acm_that_refuses(operation, "InvalidArnException"):
        answer = ask(kind, arn)
    assert (answer["Status"], answer["PhysicalResourceId"]) == ("FAILED", arn)
    assert "InvalidArnException" in answer["Reason"]


def test_failure_is_told_with_its_reason(acm: Any) -> None:
    answer = ask("Create", name="not a name ü")
    assert answer["Status"] == "FAILED"
    assert "see log group, stream stream" in answer["Reason"]
    assert "PRIVATE KEY" not in answer["Reason"]


def test_key_and_certificate_belong_together_and_keys_differ() -> None:
    certificate, key = handler.make_certificate("a.example.com")
    _, other = handler.make_certificate("a.example.com")
    made = x509.load_pem_x509_certificate(certificate)
    loaded = load_pem_private_key(key, None)
    assert made.public_key() == loaded.public_key()
    assert key != other
    assert b"BEGIN PRIVATE KEY" in key
