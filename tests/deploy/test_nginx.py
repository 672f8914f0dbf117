"""deploy/nginx in a real nginx: before scripted instances for what is on the wire, else before two real proxies."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from http.client import HTTPException, HTTPResponse, IncompleteRead
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from cryptography.x509.oid import NameOID
from tests.access.test_certificates import ClientAuthority
from tests.compat.client_runs import FOUND, LIFECYCLE, bare_environment
from tests.compat.environments import NEWEST, python_of
from tests.deploy.nginx_site import (
    CONF,
    FOLDER,
    OPERATOR,
    SNIPPETS,
    Answer,
    Instance,
    Site,
    answer,
    body_of,
    running,
)
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, Table, free_port
from tests.faults.proxies import running as proxy_running
from tests.integration.conftest import targets_of

from mlflow_proxy.access.actions import routes
from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import Fault, LocalSageMaker
from mlflow_proxy.options import options
from mlflow_proxy.requests import IDENTITY_HEADERS
from mlflow_proxy.settings import Server

API = "/api/2.0/mlflow"
UPLOAD = "/api/2.0/mlflow-artifacts/artifacts/1/model.bin"
WAIT = 30.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "site")


# The files


def test_the_values_to_put_in_are_in_one_file_and_few() -> None:
    """Nothing of an installation's own in the snippets, so that an upgrade can replace them."""
    own = re.compile(r"example|10\.20|/etc/|/var/|listen|server_name")
    for snippet in SNIPPETS.glob("*.conf"):
        code = re.sub(r"#.*", "", snippet.read_text("utf-8"))
        assert own.search(code) is None, snippet.name
    assert re.findall(r"^\s*# (\d)  ", CONF.read_text("utf-8"), re.MULTILINE) == ["1", "2", "3", "4", "5"]


def location_of_reads() -> re.Pattern[str]:
    text = (SNIPPETS / "server.conf").read_text("utf-8")
    (block,) = re.findall(r'location ~ "([^"]*)" \{\n    proxy_next_upstream error timeout non_idempotent;', text)
    return re.compile(block)


def test_of_the_posts_just_those_that_only_read_may_be_repeated() -> None:
    """What else may be in a GraphQL query, only its body tells."""
    pattern = location_of_reads()
    posts = {path: action for method, path, action in routes() if method == "POST"}
    reads = {path for path, action in posts.items() if not action.writes and not action.by_body}
    assert len(reads) > 30
    assert {path for path in posts if pattern.fullmatch(path)} == reads
    assert all(pattern.fullmatch(f"/t/team{path}") for path in reads)
    other = {path for method, path, _ in routes() if method != "POST" and pattern.fullmatch(path)}
    assert other <= reads  # a GET of the same name, which may be repeated anyway


def test_every_header_with_an_identity_is_replaced() -> None:
    text = (SNIPPETS / "server.conf").read_text("utf-8")
    replaced = {name.lower().encode() for name in re.findall(r"^proxy_set_header (\S+) ", text, re.MULTILINE)}
    assert replaced >= IDENTITY_HEADERS
    for location in re.findall(r"^location .*?^\}", text, re.MULTILINE | re.DOTALL):
        assert "proxy_set_header" not in location  # it would inherit none of the others


# On the wire: nginx before scripted instances


class Wire:
    """The site before two instances that do what a test says."""

    def __init__(self, site: Site, instances: list[Instance]) -> None:
        self.site = site
        self.instances = instances

    @property
    def arrived(self) -> list[Any]:
        return [each for instance in self.instances for each in instance.arrived]

    def script(self, script: Callable[[BaseHTTPRequestHandler], None]) -> None:
        for instance in self.instances:
            instance.script = script

    def get(self, path: str, **options: Any) -> Any:
        """What arrived of a request that was answered."""
        self.reset()
        assert self.site.call(path, **options).status == 200
        (arrived,) = self.arrived
        return arrived

    def reset(self) -> None:
        for instance in self.instances:
            instance.reset()


@contextmanager
def two_instances() -> Iterator[list[Instance]]:
    instances = [Instance(), Instance()]
    try:
        yield instances
    finally:
        for instance in instances:
            instance.close()


@pytest.fixture(scope="module")
def _wire(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with two_instances() as instances:
        site = Site(tmp_path_factory.mktemp("wire") / "nginx", [each.port for each in instances], authority)
        with running(site):
            yield Wire(site, instances)


@pytest.fixture
def wire(_wire: Wire) -> Wire:
    _wire.reset()
    return _wire


def test_nginx_finds_nothing_wrong_with_it(wire: Wire) -> None:
    said = wire.site.check()
    assert "test is successful" in said
    assert "[warn]" not in said
    assert "[emerg]" not in said


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/runs/get?run_id=1f3a",
        "/api/2.0/mlflow-artifacts/artifacts/a%2Fb%2fc",
        "//api//2.0///mlflow/runs/get",
        "/api/3.0/mlflow/mcp-servers/io.github.me%2Fweather",
        "/caf%c3%a9/%F0%9F%9A%80",
        "/a+b;c:d@e!$&'()*,=~",
        "/x?filter=name%3D'a'+and+b%20c&&flag&plus=1%2B1",
        "/x?path=a%2Fb/../c",
        "/a/%2e%2e/b",
        "/a/../b",
        "/a%00%zz".replace("%00%zz", "%25zz"),
        "/t/team/?",
        "/",
    ],
)
def test_path_and_query_go_on_byte_by_byte(wire: Wire, path: str) -> None:
    assert wire.get(path).target == path


def test_callers_cannot_forge_what_the_proxy_is_told(wire: Wire) -> None:
    told = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port", "x-real-ip", "forwarded"]
    names = [*told, *(name.decode() for name in sorted(IDENTITY_HEADERS)), "x-ssl-client-i-dn"]
    for some in (names[: len(names) // 2], names[len(names) // 2 :]):
        arrived = wire.get("/", headers=dict.fromkeys(some, "forged"), source="127.0.9.9")
        assert [pair for pair in arrived.headers if "forged" in pair[1]] == []
        assert arrived.values("x-forwarded-for") == ["127.0.9.9"]
        assert arrived.values("x-forwarded-proto") == ["https"]
        assert arrived.values("x-forwarded-host") == ["localhost"]
        assert {name for name in names if arrived.values(name)} == set(told[:3])  # nor empty ones that would be counted


def test_what_callers_show_goes_on(wire: Wire) -> None:
    shown = {
        "Authorization": "Bearer mlp_x",
        "X-API-Key": "mlp_y",
        "Cookie": "a=b",
        "Range": "bytes=0-1",
        "Via": "1.1 a",
    }
    arrived = wire.get("/", headers=shown)
    assert {name: arrived.values(name) for name in shown} == {name: [value] for name, value in shown.items()}


def test_the_request_id_goes_on_if_it_is_a_sane_one(wire: Wire) -> None:
    assert wire.get("/", headers={"X-Request-Id": "build-1234.5_6"}).values("x-request-id") == ["build-1234.5_6"]
    for bad in ("short", "a b c d e f g h", "x" * 129, 'quo"te-1234'):
        (made,) = wire.get("/", headers={"X-Request-Id": bad}).values("x-request-id")
        assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_client_certificates(authority: Authority, tmp_path: Path) -> None:
    """With the two commented lines, as docs/access-certificates.md has it on the proxy's side."""
    ours, others = ClientAuthority(tmp_path, "ours"), ClientAuthority(tmp_path, "others")
    subject = ((NameOID.ORGANIZATION_NAME, "Example"), (NameOID.COMMON_NAME, "trainer"))
    certificate, serial = ours.issue(*subject)
    foreign, _ = others.issue(*subject)
    names = ["x-ssl-client-verify", "x-ssl-client-s-dn", "x-ssl-client-i-dn", "x-amzn-mtls-clientcert-serial-number"]
    forged = dict.fromkeys(names, "forged")
    with two_instances() as instances:
        site = Site(tmp_path / "nginx", [each.port for each in instances], authority)
        site.render(
            {
                "# ssl_client_certificate /etc/nginx/tls/client-ca.pem": f"ssl_client_certificate {ours.bundle}",
                "# ssl_verify_client": "ssl_verify_client",
            }
        )
        with running(site):
            wire = Wire(site, instances)
            with_one = ssl.create_default_context(cafile=str(authority.bundle))
            with_one.load_cert_chain(certificate)
            arrived = wire.get("/", headers=forged, tls=with_one)
            assert [arrived.values(name) for name in names] == [
                ["SUCCESS"],
                ["CN=trainer,O=Example"],
                ["CN=ours"],
                [f"{serial:X}"],
            ]
            arrived = wire.get("/", headers=forged)
            assert [arrived.values(name) for name in names] == [[], [], [], []]

            with_other = ssl.create_default_context(cafile=str(authority.bundle))
            with_other.load_cert_chain(foreign)
            wire.reset()
            refused = site.call("/", headers=forged, tls=with_other)
            assert refused.status == 400
            assert refused.json["error_code"] == "BAD_REQUEST"
            assert wire.arrived == []


def streams(begun: threading.Event) -> Callable[[BaseHTTPRequestHandler], None]:
    """Says when the first bytes of a body are there, then takes the rest."""

    def script(handler: BaseHTTPRequestHandler) -> None:
        first = handler.rfile.read(1024)
        begun.set()
        rest = handler.rfile.read(int(handler.headers["Content-Length"]) - len(first))
        digest = sha256(first + rest).hexdigest().encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(digest)))
        handler.end_headers()
        handler.wfile.write(digest)

    return script


def request_head(method: str, path: str, length: int) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.fixture
def no_disk(wire: Wire) -> Iterator[None]:
    """nginx has nowhere to put a file: whatever it wants to hold on its disk fails with 500."""
    shutil.rmtree(wire.site.folder / "temporary")
    yield
    for name in ("body", "proxy"):
        (wire.site.folder / "temporary" / name).mkdir(parents=True)


@pytest.mark.usefixtures("no_disk")
@pytest.mark.parametrize("path", [UPLOAD, f"/t/team/ajax-{UPLOAD[1:]}", "/ajax-api/2.0/mlflow/upload-artifact?path=a"])
def test_an_upload_goes_on_while_it_is_sent_and_takes_no_disk(wire: Wire, path: str) -> None:
    begun = threading.Event()
    wire.script(streams(begun))
    data = os.urandom(1 << 20) * 5
    connection = wire.site.connect()
    try:
        connection.connect()
        connection.sock.sendall(request_head("POST" if "upload-artifact" in path else "PUT", path, len(data)))
        connection.sock.sendall(data[: 128 << 10])
        assert begun.wait(WAIT)  # with the other bytes still here
        connection.sock.sendall(data[128 << 10 :])
        reply = HTTPResponse(connection.sock)
        reply.begin()
        assert (reply.status, reply.read()) == (200, sha256(data).hexdigest().encode())
    finally:
        connection.close()


@pytest.mark.usefixtures("no_disk")
def test_other_large_bodies_do_take_disk(wire: Wire) -> None:
    """So the test above can fail; and a full disk is told in JSON."""
    failed = wire.site.call(f"{API}/runs/log-batch", "POST", bytes(5 << 20))
    assert failed.status == 500
    assert failed.json["error_code"] == "INTERNAL_ERROR"
    assert wire.arrived == []


def test_other_bodies_go_on_when_they_are_whole(wire: Wire) -> None:
    """So a caller that stalls or goes away holds up no instance, and what was not sent on can be sent elsewhere."""
    path, body = f"{API}/runs/create", b'{"experiment_id": "1"}'
    connection = wire.site.connect()
    try:
        connection.connect()
        connection.sock.sendall(request_head("POST", path, len(body)) + body[:-1])
        for _ in range(3):
            assert wire.site.call("/other").status == 200
        assert [each.target for each in wire.arrived] == ["/other"] * 3
        connection.sock.sendall(body[-1:])
        assert connection.sock.recv(65536).startswith(b"HTTP/1.1 200")
        assert path in [each.target for each in wire.arrived]
    finally:
        connection.close()


@pytest.mark.usefixtures("no_disk")
def test_a_download_goes_on_as_the_caller_reads_it(wire: Wire) -> None:
    piece = os.urandom(1 << 20)
    sent: list[int] = []

    def script(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(64 * len(piece)))
        handler.end_headers()
        for number in range(64):
            handler.wfile.write(piece)
            sent.append(number)

    def stalls() -> bool:
        before = len(sent)
        time.sleep(0.3)
        return 0 < before == len(sent)

    wire.script(script)
    connection = wire.site.connect()
    try:
        connection.request("GET", "/get-artifact?path=model.bin")
        response = connection.getresponse()
        wait_until(stalls, "the instance is never held up")
        assert len(sent) < 64  # nginx took no more than its buffers hold
        digest, size = sha256(), 0
        while data := response.read(1 << 20):
            digest.update(data)
            size += len(data)
    finally:
        connection.close()
    assert size == 64 * len(piece)
    assert digest.hexdigest() == sha256(piece * 64).hexdigest()


def test_an_event_goes_on_at_once(wire: Wire) -> None:
    seen = threading.Event()

    def script(handler: BaseHTTPRequestHandler) -> None:
        body_of(handler)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"9\r\ndata: 1\n\n\r\n")
        handler.wfile.flush()
        if seen.wait(WAIT):  # only when the caller has the first
            handler.wfile.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    wire.script(script)
    connection = wire.site.connect()
    try:
        connection.request("POST", "/gateway/openai/v1/chat/completions", b"{}")
        response = connection.getresponse()
        assert response.read1(100) == b"data: 1\n\n"
        seen.set()
        assert response.read() == b"data: 2\n\n"
    finally:
        connection.close()


def test_no_answer_steers_nginx(wire: Wire) -> None:
    headers = {"X-Accel-Redirect": "/-/nginx-error", "Strict-Transport-Security": "max-age=0"}
    wire.script(lambda handler: answer(handler, 200, b"mine", headers))
    got = wire.site.call("/")
    assert got.body == b"mine"
    assert got.headers.get_all("strict-transport-security") == ["max-age=63072000"]


@pytest.mark.parametrize("status", [400, 403, 404, 413, 429, 500, 502, 503, 504])
def test_errors_of_the_proxy_pass_as_they_are(wire: Wire, status: int) -> None:
    body = b'{"error_code": "X", "message": "of the proxy", "request_id": "1"}'
    wire.script(lambda handler: answer(handler, status, body, {"Content-Type": "application/json", "Retry-After": "7"}))
    got = wire.site.call(f"{API}/runs/search", "POST", b"{}")
    assert (got.status, got.body, got.headers.get_all("retry-after")) == (status, body, ["7"])
    assert len(wire.arrived) == 1  # an answer is an answer: nothing is repeated


def assert_own_error(got: Answer, status: int, error_code: str, says: str) -> None:
    assert got.status == status
    assert got.headers.get_all("content-type") == ["application/json"]
    assert got.headers.get_all("strict-transport-security") == ["max-age=63072000"]
    assert got.json.keys() == {"error_code", "message", "request_id"}
    assert got.json["error_code"] == error_code
    assert got.headers.get_all("x-request-id") == [got.json["request_id"]]
    assert says in got.json["message"]


def test_errors_of_nginx_have_the_shape_of_mlflows(wire: Wire) -> None:
    large = wire.site.call(
        f"{API}/runs/log-batch", "POST", bytes((64 << 20) + 1), headers={"X-Request-Id": "too-large"}
    )
    assert_own_error(large, 413, "BAD_REQUEST", "server.body_limit")
    assert large.json["request_id"] == "too-large"
    assert_own_error(wire.site.call(f"/{'x' * 41_000}"), 414, "BAD_REQUEST", "large_client_header_buffers")
    assert_own_error(wire.site.call("/", headers={"Cookie": "x" * 41_000}), 431, "BAD_REQUEST", "cookies")
    assert_own_error(wire.site.call("/-/nginx-error"), 404, "NOT_FOUND", "no such page")
    assert wire.arrived == []
    with socket.create_connection(("127.0.0.1", wire.site.https), timeout=WAIT) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head, _, body = plain.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert "https://" in json.loads(body)["message"]
    line = wire.site.log_line("too-large")
    assert (line["method"], line["path"], line["status"]) == ("POST", f"{API}/runs/log-batch", "413")


def test_the_largest_that_the_proxy_takes_passes(wire: Wire) -> None:
    """Sizes at the proxy's defaults: what is refused there is told by the proxy, not by nginx."""
    server = Server()
    query = f"/x?{'a' * (int(server.url_limit) - 3)}"
    assert wire.get(query).target == query
    arrived = wire.get("/", headers={"Cookie": "x" * (int(server.header_limit) - 100)})
    assert len(arrived.values("cookie")[0]) == int(server.header_limit) - 100
    assert wire.get(UPLOAD, method="PUT", body=bytes(int(server.body_limit))).values("content-length") == [
        str(int(server.body_limit))
    ]


def test_an_address_with_too_many_requests_gets_429(wire: Wire) -> None:
    refused: list[Answer] = []

    def hammer(source: str) -> None:
        connection = wire.site.connect(source)
        end = time.monotonic() + WAIT
        while not refused and time.monotonic() < end:
            connection.request("GET", "/")
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                refused.append(Answer(response.status, response.headers, body))
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, ["127.0.5.1"] * 8))
    assert_own_error(refused[0], 429, "REQUEST_LIMIT_EXCEEDED", "from this address")
    assert refused[0].headers.get_all("retry-after") == ["1"]
    assert wire.site.log_line(refused[0].json["request_id"])["limit_req"] == "REJECTED"
    assert wire.site.call("/", source="127.0.5.2").status == 200
    for _ in range(20):  # a load balancer's check is never refused
        assert wire.site.call("/-/health", source="127.0.5.1").status == 200


def test_an_address_with_too_many_requests_under_way_gets_429(wire: Wire) -> None:
    go_on = threading.Event()

    def script(handler: BaseHTTPRequestHandler) -> None:
        go_on.wait(WAIT * 2)
        answer(handler)

    wire.script(script)
    with ThreadPoolExecutor(200) as pool:
        try:
            held = [pool.submit(wire.site.call, "/", source="127.0.6.1") for _ in range(200)]
            wait_until(lambda: len(wire.arrived) == 200, "200 requests never were under way", 2 * WAIT)
            refused = wire.site.call("/", source="127.0.6.1")
        finally:
            go_on.set()
        assert {each.result().status for each in held} == {200}
    assert_own_error(refused, 429, "REQUEST_LIMIT_EXCEEDED", "limit_conn")


@contextmanager
def impatient(authority: Authority, folder: Path, instances: list[int]) -> Iterator[Site]:
    """The site with deadlines of a second towards the instances, none of which ever counts as away."""
    site = Site(folder, instances, authority)
    site.render({"proxy_read_timeout 150s": "proxy_read_timeout 1s", "max_fails=3": "max_fails=0"})
    with running(site):
        yield site


def test_a_write_that_was_sent_is_never_sent_again(authority: Authority, tmp_path: Path) -> None:
    """Neither when the answer is late, nor when the connection ends without one. What only reads is."""

    def hangs_up(handler: BaseHTTPRequestHandler) -> None:
        body_of(handler)
        handler.close_connection = True

    def is_late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(2)
        answer(handler)

    calls = {
        ("POST", f"{API}/runs/create"): 1,
        ("PATCH", f"{API}/registered-models/update"): 1,
        ("POST", "/graphql"): 1,
        ("POST", f"{API}/runs%2Fsearch"): 2,  # which the proxy refuses
        ("POST", f"{API}/runs/search"): 2,
        ("POST", f"/t/team{API}/runs/search"): 2,
        ("GET", f"{API}/runs/get?run_id=1"): 2,
        ("DELETE", f"{API}/registered-models/alias"): 2,
        ("PUT", UPLOAD): 1,  # its body is gone; one that was in memory when it was sent on would not be
    }
    with two_instances() as instances, impatient(authority, tmp_path / "nginx", [i.port for i in instances]) as site:
        wire = Wire(site, instances)
        for (method, path), times in calls.items():
            wire.reset()
            wire.script(hangs_up)
            body = None if method == "GET" else bytes(2 << 20) if method == "PUT" else b"{}"
            got = site.call(path, method, body)
            assert_own_error(got, 502, "TEMPORARILY_UNAVAILABLE", "before you repeat it")
            assert len(wire.arrived) == times, (method, path)
        wire.reset()
        wire.script(is_late)
        got = site.call(f"{API}/runs/create", "POST", b"{}")
        assert_own_error(got, 504, "DEADLINE_EXCEEDED", "proxy_read_timeout")
        assert len(wire.arrived) == 1


def test_what_was_not_sent_goes_to_the_other_instance(authority: Authority, tmp_path: Path) -> None:
    """Whatever it is; with both away, 502 says what to do."""
    dead = free_port()
    with two_instances() as instances:
        site = Site(tmp_path / "nginx", [dead, instances[0].port], authority)
        with running(site):
            for number in range(4):
                assert site.call(f"{API}/runs/create", "POST", b"%d" % number).status == 200
                assert site.call(UPLOAD, "PUT", bytes(100_000)).status == 200
            assert len(instances[0].arrived) == 8
            assert any(line["instance"].startswith(f"127.0.0.1:{dead}, ") for line in site.log)
    site = Site(tmp_path / "away", [dead, free_port()], authority)
    with running(site):
        for _ in range(4):  # also when nginx no longer tries
            got = site.call(f"{API}/runs/create", "POST", b"{}")
            assert_own_error(got, 502, "TEMPORARILY_UNAVAILABLE", "No instance of the proxy")
            assert got.headers.get_all("retry-after") == ["1"]


def test_the_log_has_no_secrets(wire: Wire) -> None:
    headers = {"Authorization": "Bearer mlp_secret", "Cookie": "session=secret", "X-Request-Id": "log-line-1"}
    assert wire.site.call("/-/signin/callback?code=secret&state=secret", headers=headers).status == 200
    line = wire.site.log_line("log-line-1")
    assert "secret" not in json.dumps(line)
    assert {name: line[name] for name in ("method", "path", "status", "client", "tls", "protocol")} == {
        "method": "GET",
        "path": "/-/signin/callback",
        "status": "200",
        "client": "127.0.0.1",
        "tls": "TLSv1.3",
        "protocol": "HTTP/1.1",
    }
    assert line["instance"] in {f"127.0.0.1:{each.port}" for each in wire.instances}


def test_without_tls_there_is_only_the_way_to_it(wire: Wire) -> None:
    with socket.create_connection(("127.0.0.1", wire.site.http), timeout=WAIT) as plain:
        plain.sendall(b"POST /api/x?y=%2F HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}")
        head = plain.recv(65536).decode("latin-1")
    assert head.startswith("HTTP/1.1 308")
    assert re.search(r"^Location: https://localhost/api/x\?y=%2F\r$", head, re.MULTILINE)
    assert wire.arrived == []


def test_tls_is_modern(wire: Wire) -> None:
    for version, speaks in (
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ):
        context = ssl.create_default_context(cafile=str(wire.site.authority.bundle))
        context.set_ciphers("DEFAULT@SECLEVEL=0")  # so that it is the server who refuses
        context.minimum_version = context.maximum_version = version
        if speaks:
            assert wire.site.call("/", tls=context).status == 200
        else:
            with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
                wire.site.call("/", tls=context)
    weak = ssl.create_default_context(cafile=str(wire.site.authority.bundle))
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("ECDHE-ECDSA-AES128-SHA256:@SECLEVEL=0")  # CBC
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        wire.site.call("/", tls=weak)


# Two real proxies


ROLES: list[Table] = [{"name": "all", "targets": ["*"], "allow": ["*"]}]


class Pair:
    """The site before two real proxies, before the local SageMaker's tracking server."""

    def __init__(self, sagemaker: LocalSageMaker, folder: Path, authority: Authority, stack: ExitStack) -> None:
        self._sagemaker = sagemaker
        self._folder = folder
        self._stack = stack
        self._starts = 0
        self.ports = [free_port(), free_port()]
        self.site = Site(folder / "nginx", self.ports, authority)
        self.key, kept = make_key("writer", "all", created=datetime.now(UTC), expires=None)
        (folder / "keys.jsonl").write_text(f"{json.dumps(kept.fields())}\n", "utf-8")
        self.proxies = [self._start(port) for port in self.ports]
        stack.enter_context(running(self.site))

    def _start(self, port: int) -> Proxy:
        self._starts += 1
        return self._stack.enter_context(
            proxy_running(
                self._folder / f"proxy-{self._starts}",
                targets_of(self._sagemaker),
                server={"public_url": f"https://localhost:{self.site.https}", "trusted_proxies": ["127.0.0.1"]},
                sections={"access": {"keys_file": str(self._folder / "keys.jsonl")}},
                roles=ROLES,
                environ=self._sagemaker.environment(),
                port=port,
            )
        )

    def restart(self, number: int) -> None:
        self.proxies[number] = self._start(self.ports[number])

    def kill(self, number: int) -> None:
        """SIGKILL to all processes of an instance, as when its host is lost, but for the kernel's RST."""
        main = psutil.Process(self.proxies[number].process.pid)
        for process in [main, *main.children(recursive=True)]:
            process.kill()
        self.proxies[number].process.wait(WAIT)

    def instance(self, number: int) -> str:
        return f"127.0.0.1:{self.ports[number]}"

    def headers(self, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **more}

    def post(self, path: str, values: Any, source: str = "127.0.0.1") -> Answer:
        return self.site.call(path, "POST", json.dumps(values).encode(), headers=self.headers(), source=source)

    def get(self, path: str, source: str = "127.0.0.1", **more: str) -> Answer:
        return self.site.call(path, headers=self.headers(**more), source=source)

    def wait_for_traffic(self, number: int) -> None:
        """Call until an instance answers through nginx."""

        def served() -> bool:
            request_id = f"traffic-{time.monotonic_ns()}"
            assert self.get(f"{API}/experiments/get?experiment_id=0", **{"X-Request-Id": request_id}).status == 200
            return self.site.log_line(request_id)["instance"] == self.instance(number)

        wait_until(served, f"instance {number} gets no traffic")


@pytest.fixture(scope="module")
def _pair(sagemaker: LocalSageMaker, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(sagemaker, tmp_path_factory.mktemp("pair"), authority, stack)


@pytest.fixture
def pair(_pair: Pair, sagemaker: LocalSageMaker) -> Iterator[Pair]:
    """Both instances up."""
    sagemaker.faults.clear()
    sagemaker.journal.clear()
    for number, proxy in enumerate(_pair.proxies):
        if proxy.process.poll() is not None:
            _pair.restart(number)
    yield _pair
    sagemaker.faults.clear()


@pytest.fixture
def experiment(pair: Pair) -> str:
    made = pair.post(f"{API}/experiments/create", {"name": f"nginx {time.time_ns()}"})
    assert made.status == 200, made.body
    return str(made.json["experiment_id"])


def test_curl_speaks_http2(pair: Pair) -> None:
    curl = ["curl", "-sS", "--http2", "--cacert", str(pair.site.authority.bundle)]
    shown = [option for name, value in pair.headers().items() for option in ("-H", f"{name}: {value}")]
    done = subprocess.run(
        [*curl, "-w", "%{http_version} %{http_code}", f"https://localhost:{pair.site.https}/-/health"],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert done.stdout == '{"status": "ok"}\n2 200'
    body = json.dumps({"name": f"by http2 {time.time_ns()}"})
    made = subprocess.run(
        [*curl, *shown, "-d", body, f"https://localhost:{pair.site.https}{API}/experiments/create"],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert json.loads(made.stdout).keys() == {"experiment_id"}


@pytest.mark.parametrize("name", ["größe 🚀 модель", "a+b & c=d", "50% / off //", "x%2Fy", "semi;colon?#"])
def test_odd_names_are_still_signed_right(pair: Pair, name: str) -> None:
    name = f"{name} {time.time_ns()}"
    made = pair.post(f"{API}/experiments/create", {"name": name})
    for escaped in (quote(name, safe=""), quote(name, safe="/"), quote(name, safe="").replace("%20", "+")):
        found = pair.get(f"{API}/experiments/get-by-name?experiment_name={escaped}")
        assert found.status == 200, found.body
        assert found.json["experiment"]["experiment_id"] == made.json["experiment_id"]


@pytest.mark.parametrize(
    "path",
    [
        f"/{API}/experiments/get?experiment_id=0",
        f"/t/tracking/{API}//experiments/get?experiment_id=0",
        "/api/2.0/mlflow-artifacts/artifacts/a%2Fb%20c/gr%C3%B6%C3%9Fe+1.bin",
        "/api/2.0/mlflow-artifacts/artifacts?path=a%2Fb+c",
    ],
)
def test_odd_paths_are_still_signed_right(pair: Pair, sagemaker: LocalSageMaker, path: str) -> None:
    pair.get(path)
    (entry,) = sagemaker.journal.last(10)
    assert entry["verdict"] == "allowed", entry


def test_the_proxy_knows_the_caller_through_nginx(pair: Pair) -> None:
    more = {"X-Request-Id": "through-nginx-1", "X-Forwarded-For": "192.0.2.1", "X-Amzn-Oidc-Data": "forged"}
    assert pair.get(f"{API}/experiments/get?experiment_id=0", source="127.0.7.7", **more).status == 200
    line = pair.site.log_line("through-nginx-1")
    (number,) = [number for number in (0, 1) if pair.instance(number) == line["instance"]]
    logged = pair.proxies[number].log_line("through-nginx-1")
    assert (logged["client"], logged["caller"], logged["status"]) == ("127.0.7.7", "key:writer", 200)
    for each in (0, 1):
        metrics = pair.site.call("/-/metrics", headers=pair.headers(), source=OPERATOR)
        assert "mlflow_proxy_dropped_identity_headers_total 0.0" in metrics.body.decode(), each


def test_metrics_and_readiness_are_for_the_operators_networks(pair: Pair) -> None:
    """A key that may see them does not help from elsewhere, however the path is written."""
    for page in ("metrics", "ready"):
        assert pair.get(f"/-/{page}", source=OPERATOR).status == 200
        for path in (
            "/-/{}",
            "//-/{}",
            "/-//{}",
            "/-/{}/",
            "/%2D/{}",
            "/-/{}?x=1",
            "/-/./{}",
            "/x/../-/{}",
            "/-/{}%2F",
        ):
            assert_own_error(pair.get(path.format(page)), 403, "PERMISSION_DENIED", "operators' networks")
        for path in ("/-/{}%20", "/-%2f{}"):
            assert pair.get(path.format(page)).status in (400, 403, 404)
    assert pair.get("/-/version").status == 200


def test_files_come_and_go_whole(pair: Pair, experiment: str) -> None:
    run = pair.post(f"{API}/runs/create", {"experiment_id": experiment}).json["run"]["info"]["run_id"]
    data = os.urandom(1 << 20) * 8
    query = f"run_uuid={run}&path={quote('größe+1 ü.bin', safe='')}"
    sent = pair.site.call(f"/ajax-api/2.0/mlflow/upload-artifact?{query}", "POST", data, headers=pair.headers())
    assert sent.status == 200, sent.body
    got = pair.get(f"/get-artifact?{query}")
    assert got.status == 200
    assert sha256(got.body).hexdigest() == sha256(data).hexdigest()


def test_mlflows_client_through_https(pair: Pair, tmp_path: Path) -> None:
    environment = bare_environment(f"https://localhost:{pair.site.https}", tmp_path)
    environment["MLFLOW_TRACKING_SERVER_CERT_PATH"] = str(pair.site.authority.bundle)
    environment["MLFLOW_TRACKING_TOKEN"] = pair.key
    done = subprocess.run(
        [str(python_of(NEWEST)), str(LIFECYCLE), NEWEST],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"client": NEWEST, "found": FOUND, "skipped": {}}


# An answer had begun and ended too early: the one thing that nobody but the caller can repeat.
CUT = "cut short"


class Load:
    """So many requests by eight callers, a third each: GET, a POST that only reads, a run that is created.

    `at` are actions that one thread does once so many requests are done.
    """

    def __init__(self, pair: Pair, experiment: str, count: int) -> None:
        self._pair = pair
        self._experiment = experiment
        self._count = count
        self._lock = threading.Lock()
        self._next = 0
        self.results: dict[str, int | str] = {}
        self.told: dict[str, bytes] = {}  # what was answered to those that failed
        self.word = f"{time.time_ns()}"

    def run(self, at: dict[int, Callable[[], None]]) -> None:
        threads = [threading.Thread(target=self._call, args=(f"127.0.8.{number}",)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for done, action in sorted(at.items()):
            self._wait(done)
            action()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert len(self.results) == self._count

    def _wait(self, done: int) -> None:
        wait_until(lambda: len(self.results) >= done, f"{done} requests never were done", 120)

    def _call(self, source: str) -> None:
        while True:
            with self._lock:
                number, self._next = self._next, self._next + 1
            if number >= self._count:
                return
            kind = ("get", "search", "create")[number % 3]
            name = f"{kind}-{self.word}-{number}"
            try:
                got = self._one(kind, name, source)
                self.results[name] = got.status
                if got.status != 200:
                    self.told[name] = got.body
            except IncompleteRead:
                self.results[name] = CUT
            except (OSError, HTTPException) as error:
                self.results[name] = repr(error)

    def _one(self, kind: str, name: str, source: str) -> Answer:
        """On a connection of its own: nginx closes kept ones when it is told a new configuration."""
        if kind == "get":
            return self._pair.get(
                f"{API}/experiments/get?experiment_id={self._experiment}", source, **{"X-Request-Id": name}
            )
        if kind == "search":
            return self._pair.post(
                f"{API}/runs/search", {"experiment_ids": [self._experiment], "max_results": 1}, source
            )
        return self._pair.post(f"{API}/runs/create", {"experiment_id": self._experiment, "run_name": name}, source)

    def of(self, *kinds: str) -> Counter[int | str]:
        return Counter(result for name, result in self.results.items() if name.split("-")[0] in kinds)

    def created(self) -> Counter[str]:
        """How often each run exists, by name."""
        found = self._pair.post(f"{API}/runs/search", {"experiment_ids": [self._experiment], "max_results": 1000})
        return Counter(run["info"]["run_name"] for run in found.json.get("runs", []))


def test_an_instance_is_killed_under_load(pair: Pair, experiment: str, sagemaker: LocalSageMaker) -> None:
    """What may be repeated succeeds, unless its answer had begun. A write succeeds or is told to have failed,
    and never happens twice.
    """
    # Of the eight callers most are waiting for a search at any time, so that the one who kills meets some.
    sagemaker.faults.add(Fault(latency=0.4, path="runs/search"))
    sagemaker.faults.add(Fault(latency=0.05))
    load = Load(pair, experiment, 360)
    before = len(pair.site.log)
    load.run({100: lambda: pair.kill(0), 240: lambda: pair.restart(0)})
    reads = load.of("get", "search")
    assert reads.keys() <= {200, CUT}, reads
    assert reads[CUT] <= 2, reads  # a moment of less than a millisecond, and eight callers
    writes = load.of("create")
    assert writes.keys() <= {200, 502, CUT}, writes
    assert writes[200] > 90
    sagemaker.faults.clear()
    created = load.created()
    assert set(created.values()) == {1}
    for name, result in load.results.items():
        if name.startswith("create") and result == 200:
            assert created[name] == 1
    passed_on = [line for line in pair.site.log[before:] if line["instance"].startswith(f"{pair.instance(0)}, ")]
    assert passed_on
    assert {line["status"] for line in passed_on} == {"200"}
    pair.wait_for_traffic(0)


def test_an_instance_that_is_told_to_stop_finishes_what_is_under_way(
    pair: Pair, experiment: str, sagemaker: LocalSageMaker
) -> None:
    """Writes, too; and what comes later goes to the other one."""
    for number in (0, 1):
        pair.wait_for_traffic(number)
    sagemaker.journal.clear()
    sagemaker.faults.add(Fault(latency=2.0, requests=16))
    names = [f"held-{number}" for number in range(16)]

    def create(name: str) -> int:
        return pair.post(f"{API}/runs/create", {"experiment_id": experiment, "run_name": name}).status

    before = len(pair.site.log)
    with ThreadPoolExecutor(16) as pool:
        under_way = [pool.submit(create, name) for name in names]
        wait_until(lambda: len(sagemaker.journal.last(100)) == 16, "16 writes never were under way")
        assert not any(each.done() for each in under_way)
        assert pair.proxies[0].stop(60) == 0
        assert [each.result() for each in under_way] == [200] * 16
    finished = Counter(line["instance"] for line in pair.site.log[before:] if line["path"] == f"{API}/runs/create")
    assert finished[pair.instance(0)] > 0
    assert finished[pair.instance(1)] > 0
    later = [f"later-{number}" for number in range(12)]
    assert [create(name) for name in later] == [200] * 12
    found = Load(pair, experiment, 0).created()
    assert found == dict.fromkeys([*names, *later], 1)


# The page


def part(heading: str) -> str:
    """What the page has under a heading."""
    text = (FOLDER.parents[1] / "docs" / "deploy-nginx.md").read_text("utf-8")
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def blocks(heading: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", part(heading), re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    lines = [line for line in part(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def shell(command: str, folder: Path) -> None:
    """Run the page's commands in the place of root: /etc/nginx is in `folder`, nginx is not reloaded from there."""
    text = command.replace("sudo ", "").replace("/etc/nginx", str(folder)).replace(" && systemctl reload nginx", "")
    done = subprocess.run(
        ["bash", "-eu", "-c", text], cwd=folder, capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stderr}"


def test_an_instance_is_taken_out_for_an_upgrade_under_load(pair: Pair, experiment: str) -> None:
    """By the page's commands. Nothing at all is lost, no write either, and nothing happens twice."""
    out, back = blocks("Upgrade one after the other", "bash")
    load = Load(pair, experiment, 360)

    def change(command: str) -> None:
        assert "10.20.0.11:8080" in command
        shell(
            re.sub(r"nginx -t\b", "true", command).replace("10.20.0.11:8080", pair.instance(0)),
            pair.site.folder,
        )
        pair.site.check()
        pair.site.reload()

    def take_out_and_stop() -> None:
        change(out)
        assert pair.proxies[0].stop(60) == 0

    def start_and_put_back() -> None:
        pair.restart(0)
        change(back)

    text = pair.site.conf.read_text("utf-8")
    load.run({90: take_out_and_stop, 220: start_and_put_back})
    assert pair.site.conf.read_text("utf-8") == text
    # MLflow on SQLite may itself answer 500 to one of many at once; what the proxy and nginx say has a request id.
    assert load.of("get", "search", "create").keys() <= {200, 500}
    assert [body for body in load.told.values() if b"request_id" in body or b"error_code" not in body] == []
    failed = sum(name.startswith("create") for name in load.told)
    assert len(load.told) <= 3
    assert set(load.created().values()) == {1}
    assert len(load.created()) in range(120 - failed, 121)
    pair.wait_for_traffic(0)


def test_it_is_installed_as_the_page_says(authority: Authority, tmp_path: Path) -> None:
    """Steps 2 and 3 as they stand; then nginx finds nothing wrong, and says what step 5 shows."""
    site = Site(tmp_path / "nginx", [free_port(), free_port()], authority)  # for its nginx.conf; all else is replaced
    shutil.rmtree(site.folder / "conf.d")
    shutil.rmtree(site.folder / "mlflow-proxy")
    (site.folder / "conf.d").mkdir()
    (site.folder / "deploy").symlink_to(FOLDER.parent)
    for name, file in zip(("chain.pem", "key.pem"), authority.issue("mlflow.your-company.net"), strict=True):
        shutil.copy(file, site.folder / name)
    _, copy, put_in, load, attempt = blocks("Install", "bash")
    shell(copy, site.folder)
    shell(put_in, site.folder)
    text = site.conf.read_text("utf-8")
    assert "10.20.0." not in text
    assert "example" not in text
    assert "# 3" in text
    # The rest only for this machine: ports that anybody may have, a log and files below the folder.
    text = text.replace("/etc/nginx/", f"{site.folder}/").replace("/var/log/nginx/", f"{site.folder}/")
    text = text.replace("listen 80;", f"listen 127.0.0.1:{site.http};").replace(
        "listen 443", f"listen 127.0.0.1:{site.https}"
    )
    site.conf.write_text(text, "utf-8")
    assert "nginx -t" in load
    shown = blocks("Install", "text")
    assert site.check().strip().replace(f"{site.folder}/", "/etc/nginx/") == shown[1].strip()
    assert attempt.count("https://mlflow.your-company.net/") == 2
    assert shown[2] == '{"status": "ok"}\n2 200\n'


UNITS = {"k": 1 << 10, "m": 1 << 20, "s": 1, "": 1}


def test_sizes_and_deadlines_are_in_step_as_the_page_says() -> None:
    text = CONF.read_text("utf-8") + (SNIPPETS / "server.conf").read_text("utf-8")
    defaults = {f"{option.section}.{option.name}": option for option in options()}
    rows = table("Sizes and deadlines in step")
    assert len(rows) >= 10
    for directive, value, named, default, relation, _ in rows:
        name = directive.strip("`")
        indent = "    " if name == "keepalive_timeout" else ""  # of the upstream block
        (line,) = re.findall(rf"^{indent}{name} ([^;]*);", text, re.MULTILINE)
        assert line.removeprefix("mlflow_proxy_connections ") == value, name
        number, unit = re.fullmatch(r"(\d+)([kms]?)", value.split()[-1]).groups()  # type: ignore[union-attr]
        ours = int(number) * UNITS[unit]
        theirs = sum(size_of(defaults[option].default) for option in re.findall(r"`([a-z_.]+)`", named))
        assert theirs == size_of(default), named
        holds = {"the same": ours == theirs, "larger": ours > theirs, "smaller": ours < theirs}
        assert holds[relation], (name, named)


def size_of(text: str) -> float:
    """A default, as options are listed: a number, or a size with its unit."""
    number, unit = re.fullmatch(r"([\d.]+)(KiB|MiB|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"KiB": 1 << 10, "MiB": 1 << 20, "": 1}[unit]


def test_limits_are_as_the_page_says() -> None:
    text = "".join(snippet.read_text("utf-8") for snippet in SNIPPETS.glob("*.conf"))
    (rate,), (burst,) = re.findall(r"rate=(\d+)r/s", text), re.findall(r"burst=(\d+) nodelay", text)
    (connections,) = re.findall(r"limit_conn mlflow_proxy_connections (\d+)", text)
    requests, under_way = (row[1] for row in table("Limits"))
    assert f"{rate} a second, {burst} more at once" in requests
    assert under_way.startswith(f"{connections} ")


def test_errors_are_as_the_page_says() -> None:
    text = (SNIPPETS / "http.conf").read_text("utf-8")
    codes = dict(re.findall(r"^    (\d{3})\s+([A-Z_]+);", text, re.MULTILINE))
    messages = dict(re.findall(r'^    (\d{3})\s+"(.{9,})";$', text, re.MULTILINE))
    for statuses, code, _ in table("Errors and the log"):
        for status in statuses.split(", "):
            assert codes.get(status, "BAD_REQUEST") == code.strip("`")
            assert status in messages
    example, line = (json.loads(block) for block in blocks("Errors and the log", "json"))
    assert example["message"] == messages["502"]
    assert list(line) == re.findall(r'"(\w+)": "\$', text.split("log_format", 1)[1])
