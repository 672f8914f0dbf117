"""What the gate passes to MLflow and back: against a server that tells what it was sent."""

import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from mlflow_proxy.local.targets import Arn, Target

ZIPPED = gzip.compress(b"x" * 1000)


class Echo(BaseHTTPRequestHandler):
    """Answers each path with what a test of that name needs."""

    protocol_version = "HTTP/1.1"
    gone = threading.Event()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        name = self.path.partition("?")[0]
        if name == "/events":
            self.events()
        elif name == "/zipped":
            self.reply(200, ZIPPED, {"Content-Encoding": "gzip", "ETag": '"1"'})
        elif name.startswith("/status/"):
            self.reply(int(name[8:]), b"", {"Location": "/elsewhere", "X-Twice": "1"})
        else:
            told = {"line": self.requestline, "headers": list(self.headers.items()), "body": body.decode()}
            self.reply(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = answer

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.send_header("Keep-Alive", "timeout=5")
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(60):
                data = f"data: {number}\n\n".encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
                time.sleep(0.1)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.gone.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def echo_arn(sagemaker: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arn = Arn.parse("arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/echo")
    assert arn is not None
    sagemaker.targets.add(Target("echo", arn, f"http://127.0.0.1:{server.server_port}", "s3://none"))
    yield arn.text
    sagemaker.targets.remove(arn.text)
    server.shutdown()


@pytest.fixture
def caller(make_user: Any) -> Any:
    return make_user({"Effect": "Allow", "Action": "*", "Resource": "*"})


def test_what_reaches_mlflow(caller: Any, sagemaker: Any, echo_arn: str) -> None:
    wire = caller.sign(
        "POST", "/a%2Fb//c%20d", b"body", arn=echo_arn, signed_query="x=%2B&x=&y", headers={"accept": "a/b"}
    )
    for name, value in (
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-host", "evil"),
        ("forwarded", "for=127.0.0.1"),
        ("connection", "x-hop, close"),
        ("x-hop", "1"),
        ("cookie", "c=1"),
        ("te", "trailers"),
        ("x-mlflow-experiment-id", "3"),
        ("x-name", "ünï"),
    ):
        encoded = value.encode().decode("latin-1")
        wire = wire.with_header(name, encoded)
    told = wire.send(sagemaker.endpoint).json()
    assert told["line"] == "POST /a%2Fb//c%20d?x=%2B&x=&y HTTP/1.1"
    assert told["body"] == "body"
    headers = {name.lower(): value for name, value in told["headers"]}
    assert headers.pop("host").startswith("127.0.0.1:")
    assert headers.pop("x-name").encode("latin-1").decode() == "ünï"
    assert headers == {
        "accept": "a/b",
        "content-type": "application/json",
        "content-length": "4",
        "x-forwarded-for": "203.0.113.10",
        "x-mlflow-experiment-id": "3",
    }


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_methods(caller: Any, echo_arn: str, method: str) -> None:
    assert caller.call(method, "/m", arn=echo_arn).json()["line"] == f"{method} /m HTTP/1.1"


def test_head(caller: Any, echo_arn: str) -> None:
    answer = caller.call("HEAD", "/zipped", arn=echo_arn)
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", str(len(ZIPPED)))


def test_gzip_stays_gzip(caller: Any, echo_arn: str) -> None:
    answer = caller.call("GET", "/zipped", arn=echo_arn)
    assert answer.body == ZIPPED
    assert (answer.headers["content-encoding"], answer.headers["etag"]) == ("gzip", '"1"')
    assert answer.headers.get_all("set-cookie") == ["a=1", "b=2"]
    assert answer.headers["keep-alive"] is None
    assert len(answer.headers.get_all("date")) == 1


@pytest.mark.parametrize("status", [204, 304, 302, 404, 500])
def test_status(caller: Any, echo_arn: str, status: int) -> None:
    answer = caller.call("GET", f"/status/{status}", arn=echo_arn)
    assert (answer.status, answer.body) == (status, b"")
    assert answer.headers["location"] == "/elsewhere"
    assert answer.headers["transfer-encoding"] is None


def open_raw(sagemaker: Any) -> socket.socket:
    parts = urlsplit(sagemaker.endpoint)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def head_of(wire: Any, *more: str) -> bytes:
    lines = [f"{wire.method} {wire.target} HTTP/1.1", *(f"{name}: {value}" for name, value in wire.headers), *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_events_arrive_one_by_one_and_leaving_ends_them(caller: Any, sagemaker: Any, echo_arn: str, admin: Any) -> None:
    Echo.gone.clear()
    with open_raw(sagemaker) as raw:
        raw.sendall(head_of(caller.sign("GET", "/events", arn=echo_arn)))
        seen = b""
        while b"data: 1\n" not in seen:
            seen += raw.recv(4096)
        assert b"text/event-stream" in seen
        assert b"data: 30" not in seen
    assert Echo.gone.wait(10)
    assert admin.last()["verdict"] == "abandoned"


def test_expect_100_continue(caller: Any, sagemaker: Any, echo_arn: str) -> None:
    wire = caller.sign("POST", "/m", b"body", arn=echo_arn)
    with open_raw(sagemaker) as raw:
        raw.sendall(head_of(wire, "Expect: 100-continue", "Content-Length: 4"))
        assert raw.recv(4096).startswith(b"HTTP/1.1 100")
        raw.sendall(b"body")
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")


def test_chunked_request(caller: Any, sagemaker: Any, echo_arn: str) -> None:
    wire = caller.sign("POST", "/m", b"body", arn=echo_arn)
    with open_raw(sagemaker) as raw:
        raw.sendall(head_of(wire, "Transfer-Encoding: chunked") + b"1\r\nb\r\n3\r\nody\r\n0\r\n\r\n")
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        told = json.loads(answer.read())
    assert told["body"] == "body"
    assert "Transfer-Encoding" not in dict(told["headers"])


def test_mlflow_that_is_gone(caller: Any, sagemaker: Any) -> None:
    arn = Arn.parse("arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/gone")
    assert arn is not None
    sagemaker.targets.add(Target("gone", arn, "http://127.0.0.1:9", "s3://none"))
    answer = caller.call("GET", "/m", arn=arn.text)
    sagemaker.targets.remove(arn.text)
    assert (answer.status, answer.error) == (503, "ServiceUnavailableException")


def test_assistant_stays_closed(developer: Any, sagemaker: Any) -> None:
    """MLflow opens it to local callers, and everyone who comes through the gate is local to MLflow's eyes."""
    directly = http.client.HTTPConnection(urlsplit(sagemaker.mlflow_urls["tracking"]).netloc)
    config = "/ajax-api/3.0/mlflow/assistant/config"
    directly.request("PUT", config, "[]", {"Content-Type": "application/json"})
    assert directly.getresponse().status == 422
    directly.close()
    assert developer.call("PUT", config, []).status == 403


def test_big_artifact(developer: Any, sagemaker: Any) -> None:
    run = developer.call("POST", "/api/2.0/mlflow/runs/create", {"experiment_id": "0"}).json()["run"]["info"]
    content = bytes(range(256)) * (16 << 12)
    key = run["artifact_uri"].removeprefix(f"s3://{sagemaker.bucket}/") + "/big.bin"
    developer.client("s3").put_object(Bucket=sagemaker.bucket, Key=key, Body=content)
    query = f"path=big.bin&run_uuid={run['run_id']}"
    answer = developer.call("GET", "/get-artifact", signed_query=query)
    assert answer.body == content
    listed = developer.call("GET", "/api/2.0/mlflow/artifacts/list", signed_query=f"run_id={run['run_id']}")
    assert listed.json()["files"] == [{"path": "big.bin", "is_dir": False, "file_size": len(content)}]
