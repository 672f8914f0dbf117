"""What AWS recites of a refused request holds the session token, and must reach neither callers nor the log."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.conftest import Stage
from tests.faults.proxies import running, target
from tests.faults.upstreams import Upstream, answers

TOKEN = "IQoJb3JpZ2luX2VjEXAMPLETOKEN"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A proxy whose credentials have a session token."""
    upstream = Upstream()
    folder: Path = tmp_path_factory.mktemp("token")
    environ = {"AWS_SESSION_TOKEN": TOKEN}
    with running(folder, [target("prod", f"http://127.0.0.1:{upstream.port}")], environ=environ) as proxy:
        yield Stage(proxy, upstream)
    upstream.close()


def recital(size: int) -> bytes:
    """AWS's words on a mismatch, for a request whose URL has about `size` bytes."""
    message = (
        "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access "
        f"Key and signing method.\n\nThe Canonical String for this request should have been\n'GET\n/{'a' * size}\n\n"
        f"host:x\nx-amz-security-token:{TOKEN}\n'"
    )
    return json.dumps({"message": message}).encode()


@pytest.mark.parametrize("size", [100, 30_000, 100_000, 500_000])
@pytest.mark.parametrize("how", ["plain", "gzip", "chunked", "without type header"])
def test_a_recital_is_cut(stage: Stage, size: int, how: str) -> None:
    if how == "without type header" and size > 100_000:
        pytest.skip("AWS recites no URL that the proxy would not have sent")
    body = recital(size)
    headers = [b"Content-Type: application/json"]
    if how == "without type header":
        body = json.dumps({"__type": "InvalidSignatureException", **json.loads(body)}).encode()
    else:
        headers.append(b"x-amzn-errortype: InvalidSignatureException")
    if how == "gzip":
        body = gzip.compress(body)
        headers.append(b"Content-Encoding: gzip")
    if how == "chunked":
        headers.append(b"Transfer-Encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        headers.append(b"Content-Length: %d" % len(body))
    stage.upstream.reset()
    stage.upstream.script = answers(b"HTTP/1.1 403 Forbidden\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body)
    got = stage.call("/api/2.0/mlflow/experiments/get?experiment_id=1", "GET", "Accept-Encoding: gzip")
    assert stage.upstream.arrived[0].value("x-amz-security-token") == TOKEN
    assert got.status == 403
    assert got.json["error_code"] == "PERMISSION_DENIED"
    assert "InvalidSignatureException" in got.json["message"]
    assert TOKEN.encode() not in got.body
    stage.proxy.log_line(got.value("x-request-id"))
    assert TOKEN not in stage.proxy.stdout.read_text() + stage.proxy.stderr.read_text()


def test_mlflows_own_large_error_passes_unchanged(stage: Stage) -> None:
    body = json.dumps({"error_code": "INTERNAL_ERROR", "message": "x" * 400_000}).encode()
    stage.upstream.reset()
    stage.upstream.script = answers(
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    got = stage.call("/x")
    assert (got.status, got.body) == (500, body)
    assert stage.call("/x").status == 500
