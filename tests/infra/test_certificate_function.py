"""The function that makes self-signed certificates: against moto's ACM, answering as CloudFormation wants it."""

from __future__ import annotations

import http.server
import json
import threading
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
    left = {one["CertificateArn"] for one in acm.list_certificates()["CertificateSummaryList"]}
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


class Busy:
    """ACM that still takes a certificate for used, which moto's never does."""

    class exceptions:
        class ResourceInUseException(Exception): ...

        class ResourceNotFoundException(Exception): ...

    def __init__(self, times: int) -> None:
        self.times = times
        self.deleted = False

    def delete_certificate(self, **_: str) -> None:
        self.times -= 1
        if self.times >= 0:
            raise self.exceptions.ResourceInUseException
        self.deleted = True


def test_certificate_of_a_listener_that_was_just_deleted_is_tried_again() -> None:
    busy = Busy(3)
    handler.delete_certificate(busy, "arn:x", pause=0)
    assert busy.deleted
    with pytest.raises(Busy.exceptions.ResourceInUseException):
        handler.delete_certificate(Busy(1000), "arn:x", pause=0)


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
