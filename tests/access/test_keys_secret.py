"""API keys from AWS Secrets Manager: loading, rotation, outages and refusals, against moto's server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen
from uuid import uuid4

import botocore.session
import pytest
from moto.server import ThreadedMotoServer

from mlflow_proxy.access import key_secret
from mlflow_proxy.access import keys as module
from mlflow_proxy.access.caller import Unauthenticated
from mlflow_proxy.access.key_record import Key, KeysError, make_key
from mlflow_proxy.access.key_secret import SecretMissing, fetch_secret
from mlflow_proxy.access.keys import KeyRing
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import Access, Aws

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager import SecretsManagerClient

REGION = "eu-central-1"
CREDENTIALS = {"aws_access_key_id": "AKIATEST", "aws_secret_access_key": "very-secret-key"}
ENDPOINT = "AWS_ENDPOINT_URL_SECRETS_MANAGER"
NOWHERE = f"arn:aws:secretsmanager:{REGION}:123456789012:secret:nowhere-AbCdEf"
NOW = datetime.now(UTC).replace(microsecond=0)


class Server:
    """moto's server, which keeps its data while it is away."""

    def __init__(self) -> None:
        self._running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._running.start()
        self.port = self._running.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._running.stop()

    def start_again(self) -> None:
        self._running = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._running.start()

    def client(self, service: str) -> Any:
        session: Any = botocore.session.Session()
        return session.create_client(service, region_name=REGION, endpoint_url=self.url, **CREDENTIALS)

    def check_permissions(self, on: bool) -> None:
        body = b"0" if on else b"inf"
        request = Request(f"{self.url}/moto-api/reset-auth", body, {"Content-Type": "text/plain"})
        urlopen(request, timeout=10).close()


class Secret:
    """One secret in Secrets Manager, and how an operator changes it."""

    def __init__(self, client: SecretsManagerClient, name: str, *keys: Key) -> None:
        self._client = client
        self.arn = client.create_secret(Name=name, SecretString=text_of(*keys))["ARN"]

    def put(self, *keys: Key) -> None:
        self.put_text(text_of(*keys))

    def put_text(self, text: str) -> None:
        self._client.put_secret_value(SecretId=self.arn, SecretString=text)

    def put_binary(self, data: bytes) -> None:
        self._client.put_secret_value(SecretId=self.arn, SecretBinary=data)

    def delete(self, *, at_once: bool) -> None:
        how: Any = {"ForceDeleteWithoutRecovery": True} if at_once else {"RecoveryWindowInDays": 7}
        self._client.delete_secret(SecretId=self.arn, **how)

    def restore(self) -> None:
        self._client.restore_secret(SecretId=self.arn)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    running = Server()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name.upper(), value)
    monkeypatch.setenv(ENDPOINT, running.url)
    monkeypatch.setattr(module, "_FIRST_RETRY", 0.2)
    yield running
    running.stop()


@pytest.fixture
def make_secret(server: Server) -> Callable[..., Secret]:
    client = server.client("secretsmanager")
    return lambda *keys: Secret(client, f"mlflow-proxy/keys-{uuid4().hex}", *keys)


@contextmanager
def ring_on(access: Access, proxy: str | None = None) -> Iterator[KeyRing]:
    ring = KeyRing(access, Aws(), proxy=proxy)
    asyncio.run(ring.start())
    try:
        yield ring
    finally:
        asyncio.run(ring.close())


def watching(secret: Secret, file: Path | None = None, refresh: float = 0.2) -> Access:
    return Access(keys_secret=secret.arn, keys_file=file, keys_refresh=refresh)


def a_key(name: str = "ci-pipeline", role: str = "writer", **more: Any) -> tuple[str, Key]:
    text, key = make_key(name, role, created=NOW, expires=NOW + timedelta(days=90))
    return text, replace(key, **more)


def text_of(*keys: Key) -> str:
    return "".join(json.dumps(key.fields()) + "\n" for key in keys)


def knows(ring: KeyRing, key: str) -> bool:
    try:
        ring.identify(key)
    except (Unauthenticated, Refusal):  # wrong, or nobody can tell, as the keys were never read
        return False
    return True


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


def logged(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("mlflow_proxy.")]
    return [record.getMessage() for record in ours if record.levelno == level]


def test_keys_of_a_secret_count(make_secret: Callable[..., Secret]) -> None:
    text, key = a_key()
    secret = make_secret(key, a_key("other")[1])
    with ring_on(watching(secret)) as ring:
        caller = ring.identify(text)
        assert (caller.subject, caller.role, caller.credential) == ("key:ci-pipeline", "writer", key.id)
        assert not knows(ring, a_key()[0])


def test_changes_count_at_the_next_look(make_secret: Callable[..., Secret]) -> None:
    old, old_key = a_key()
    new, new_key = a_key()
    secret = make_secret(old_key)
    with ring_on(watching(secret)) as ring:
        caller = ring.identify(old)
        secret.put(old_key, new_key)
        until(lambda: knows(ring, new))
        assert ring.identify(old) is caller
        secret.put(replace(old_key, revoked=NOW), new_key)
        until(lambda: not knows(ring, old))
        assert knows(ring, new)


def test_an_outage_leaves_the_last_keys(
    server: Server, make_secret: Callable[..., Secret], caplog: pytest.LogCaptureFixture
) -> None:
    text, key = a_key()
    fresh, fresh_key = a_key("fresh")
    secret = make_secret(key)
    with ring_on(watching(secret)) as ring:
        server.stop()
        until(lambda: bool(logged(caplog)))
        time.sleep(1)
        assert logged(caplog) == [
            f"access.keys_secret {secret.arn}: {server.url} cannot be reached; check its name, DNS, routes and VPC "
            "endpoints; the keys read before still count"
        ]
        assert knows(ring, text)
        server.start_again()
        secret.put(fresh_key)
        until(lambda: knows(ring, fresh))
        assert not knows(ring, text)
    assert CREDENTIALS["aws_secret_access_key"] not in caplog.text
    assert key.sha256 not in caplog.text


def test_an_outage_at_the_start(
    server: Server, make_secret: Callable[..., Secret], caplog: pytest.LogCaptureFixture
) -> None:
    """The next look comes soon then, however seldom they are."""
    text, key = a_key()
    secret = make_secret(key)
    server.stop()
    with ring_on(watching(secret, refresh=3600)) as ring:
        assert not knows(ring, text)
        assert logged(caplog)[0].endswith("; it gives no keys")
        server.start_again()
        until(lambda: knows(ring, text))


def test_a_broken_text_leaves_the_last_keys(
    make_secret: Callable[..., Secret], caplog: pytest.LogCaptureFixture
) -> None:
    text, key = a_key()
    leaked, leaked_key = a_key("leaked")
    secret = make_secret(key, leaked_key)
    with ring_on(watching(secret)) as ring:
        secret.put_text(
            text_of(key, replace(leaked_key, revoked=NOW)) + '{"username": "hunter2"}'
        )  # the console's form
        until(lambda: bool(logged(caplog)))
        secret.put_binary(text_of(key).encode())
        until(lambda: len(logged(caplog)) == 2)
        time.sleep(1)
        assert [message.split(": ", 1)[1] for message in logged(caplog)] == [
            "line 3: has a field that does not exist; there are id, name, sha256, role, created, expires, ends, "
            "revoked; the keys read before still count",
            "the secret is binary; store the keys as text, with --secret-string file://keys.jsonl; the keys read "
            "before still count",
        ]
        assert knows(ring, text)
        assert not knows(ring, leaked)
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("at_once", [True, False])
def test_a_deleted_secret_leaves_the_last_keys(
    make_secret: Callable[..., Secret], caplog: pytest.LogCaptureFixture, at_once: bool
) -> None:
    text, key = a_key()
    secret = make_secret(key)
    with ring_on(watching(secret)) as ring:
        assert knows(ring, text)
        secret.delete(at_once=at_once)
        until(lambda: bool(logged(caplog)))
        said = logged(caplog)[0]
        assert ("there is no such secret" if at_once else "the secret is marked for deletion") in said
        assert said.endswith("the keys read before still count")
        assert knows(ring, text)
        if not at_once:
            secret.restore()
            secret.put_text("\n")  # what voids all keys
            until(lambda: not knows(ring, text))


def test_no_such_secret_at_the_start(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with ring_on(Access(keys_secret=NOWHERE)) as ring:
        assert not knows(ring, a_key()[0])
        assert logged(caplog) == [
            f"access.keys_secret {NOWHERE}: there is no such secret, or no value in it; compare the ARN with the "
            "console; it gives no keys"
        ]


def test_one_permission_is_enough(
    server: Server, make_secret: Callable[..., Secret], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = make_secret(a_key()[1])
    iam = server.client("iam")
    iam.create_user(UserName="proxy")
    made = iam.create_access_key(UserName="proxy")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made["SecretAccessKey"])
    server.check_permissions(True)
    try:
        with pytest.raises(KeysError):
            fetch_secret(secret.arn, Aws(), proxy=None)
        server.check_permissions(False)
        # moto looks at the action alone: of a resource other than "*" it says no.
        statement = {"Effect": "Allow", "Action": "secretsmanager:GetSecretValue", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName="proxy", PolicyName="keys", PolicyDocument=policy)
        server.check_permissions(True)
        assert fetch_secret(secret.arn, Aws(), proxy=None).startswith(b'{"id": ')
    finally:
        server.check_permissions(False)
        iam.delete_access_key(UserName="proxy", AccessKeyId=made["AccessKeyId"])
        for name in iam.list_user_policies(UserName="proxy")["PolicyNames"]:
            iam.delete_user_policy(UserName="proxy", PolicyName=name)
        iam.delete_user(UserName="proxy")


# moto refuses with XML where AWS uses JSON, so these are answered as the API reference of GetSecretValue has them.
REFUSALS = {
    "AccessDeniedException": (
        KeysError,
        "AWS denied it: User: somebody is not authorized. Allow secretsmanager:GetSecretValue on the secret, and "
        "kms:Decrypt on its key if that is a key of your own",
    ),
    "DecryptionFailure": (KeysError, "AWS cannot decrypt the secret; check that its KMS key is enabled"),
    "UnrecognizedClientException": (KeysError, "AWS failed with UnrecognizedClientException: AWS does not know the"),
    "ExpiredTokenException": (KeysError, "AWS failed: the session that credentials come from has expired"),
    "InternalServiceError": (KeysError, "AWS failed with InternalServiceError: it is tried again"),
    "ResourceNotFoundException": (SecretMissing, "there is no such secret, or no value in it"),
    "InvalidRequestException": (SecretMissing, "the secret is marked for deletion"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_refusals_in_words(server: Server, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    body = json.dumps({"__type": code, "Message": "User: somebody is not authorized."}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(500 if code == "InternalServiceError" else 400)
            self.send_header("content-type", "application/x-amz-json-1.1")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as refusing:
        threading.Thread(target=refusing.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{refusing.server_port}")
        kind, words = REFUSALS[code]
        with pytest.raises(kind) as caught:
            fetch_secret(NOWHERE, Aws(), proxy=None)
        refusing.shutdown()
    assert str(caught.value).startswith(words)


def test_no_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(KeysError, match="no AWS credentials were found; looked at environment variables"):
        fetch_secret(NOWHERE, Aws(), proxy=None)


def test_who_never_answers(server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(key_secret, "_DEADLINE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with ring_on(Access(keys_secret=NOWHERE)):
            assert "AWS did not answer within" in logged(caplog)[0]


def test_the_start_does_not_wait_for_ever(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """What the other source gave counts meanwhile."""
    text, key = a_key()
    path = tmp_path / "keys.jsonl"
    path.write_text(text_of(key))
    monkeypatch.setattr(module, "_START_DEADLINE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with ring_on(Access(keys_secret=NOWHERE, keys_file=path)) as ring:
            assert knows(ring, text)
            assert "a source has not answered" in logged(caplog)[0]


def test_only_the_configured_proxy_is_used(
    server: Server, make_secret: Callable[..., Secret], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = make_secret(a_key()[1])
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch_secret(secret.arn, Aws(), proxy=None)
    with pytest.raises(KeysError, match=r"the outgoing HTTP proxy cannot be reached; check upstream\.proxy"):
        fetch_secret(secret.arn, Aws(), proxy="http://127.0.0.1:9")


def test_both_sources(make_secret: Callable[..., Secret], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each gives its keys; of an id in both, the file's key counts, and the log says so once."""
    of_file, file_key = a_key("of-file")
    of_secret, secret_key = a_key("of-secret")
    clash, clash_key = a_key("clash")
    path = tmp_path / "keys.jsonl"
    path.write_text(text_of(file_key, replace(clash_key, role="reader")))
    secret = make_secret(secret_key, clash_key)
    with ring_on(watching(secret, path)) as ring:
        assert ring.identify(of_file).subject == "key:of-file"
        assert ring.identify(of_secret).subject == "key:of-secret"
        assert ring.identify(clash).role == "reader"
        secret.put(clash_key, secret_key)
        path.write_text(text_of(replace(clash_key, revoked=NOW), file_key))
        until(lambda: not knows(ring, clash))
        time.sleep(1)
        warnings = [message for message in logged(caplog, logging.WARNING) if "in both" in message]
        assert warnings == [
            f"ids of API keys in both access.keys_file and access.keys_secret: {clash_key.id}; the file's count"
        ]
        path.write_text("\n")
        until(lambda: not knows(ring, of_file))
        assert knows(ring, of_secret)
        assert ring.identify(clash).role == "writer"


def test_the_secret_is_looked_at_as_often_as_configured(server: Server, make_secret: Callable[..., Secret]) -> None:
    fresh, fresh_key = a_key("fresh")
    secret = make_secret(a_key()[1])
    with ring_on(watching(secret, refresh=3600)) as seldom, ring_on(watching(secret, refresh=0.2)) as often:
        secret.put(fresh_key)
        until(lambda: knows(often, fresh))
        time.sleep(0.5)
        assert not knows(seldom, fresh)
