"""A real nginx with the site of deploy/nginx, rendered as an operator does it: what is marked as theirs changes."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.faults.certificates import Authority
from tests.faults.proxies import free_port

FOLDER = Path(__file__).parents[2] / "deploy" / "nginx"
CONF = FOLDER / "mlflow-proxy.conf"
SNIPPETS = FOLDER / "mlflow-proxy"
NGINX = "/usr/sbin/nginx"
# From here comes who may see metrics and readiness. All of 127.0.0.0/8 is this machine.
OPERATOR = "127.0.0.77"
WORKERS = 2
# The lines of Debian's and Ubuntu's nginx.conf that the site must cope with.
MAIN = """
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
worker_processes {workers};
{user}
events {{ worker_connections 1024; }}
http {{
    ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers on;
    access_log {folder}/access.log;
    gzip on;
    client_body_temp_path {folder}/temporary/body;
    proxy_temp_path {folder}/temporary/proxy;
    fastcgi_temp_path {folder}/temporary/fastcgi;
    uwsgi_temp_path {folder}/temporary/uwsgi;
    scgi_temp_path {folder}/temporary/scgi;
    include conf.d/*.conf;
}}
"""


class Answer(NamedTuple):
    """One whole answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        content = json.loads(self.body)
        assert isinstance(content, dict)
        return content


class Site:
    """The site before `instances` (ports). Files are in `folder`; `authority` signs its certificate."""

    def __init__(self, folder: Path, instances: Sequence[int], authority: Authority, https: int | None = None) -> None:
        self.folder = folder
        self.authority = authority
        self.http, self.https = free_port(), https or free_port()
        self.instances = list(instances)
        for name in ("conf.d", "mlflow-proxy", "temporary"):
            (folder / name).mkdir(parents=True)
        self.conf = folder / "conf.d" / "mlflow-proxy.conf"
        self._certificate, self._key = authority.issue("localhost", "127.0.0.1")
        user = "user root root;" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user, workers=WORKERS), "utf-8")
        self.render()
        self.tls = ssl.create_default_context(cafile=str(authority.bundle))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def replacements(self) -> Mapping[str, str]:
        """What an operator puts in, and the folder of the log."""
        return {
            "10.20.0.11:8080": f"127.0.0.1:{self.instances[0]}",
            "10.20.0.12:8080": f"127.0.0.1:{self.instances[1]}",
            "127.0.0.1/32": f"{OPERATOR}/32",
            "listen 80;": f"listen 127.0.0.1:{self.http};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{self.https} ssl http2;",
            "mlflow.example.com": "localhost",
            "/etc/nginx/tls/mlflow-proxy.pem": str(self._certificate),
            "/etc/nginx/tls/mlflow-proxy-key.pem": str(self._key),
            "/var/log/nginx/": f"{self.folder}/",
        }

    def render(self, edit: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write the site's files; `edit` is what an operator changes in any of them beside what is theirs anyway."""
        text = CONF.read_text("utf-8")
        for old, new in self.replacements.items():
            assert old in text, old
            text = text.replace(old, new)
        files = {self.conf: text}
        for snippet in SNIPPETS.glob("*.conf"):
            files[self.folder / "mlflow-proxy" / snippet.name] = snippet.read_text("utf-8")
        for old, new in edit.items():
            assert any(old in text for text in files.values()), old
            files = {file: text.replace(old, new) for file, text in files.items()}
        for file, text in files.items():
            file.write_text(text, "utf-8")

    @property
    def _command(self) -> list[str]:
        return [NGINX, "-p", str(self.folder), "-c", f"{self.folder}/nginx.conf", "-e", f"{self.folder}/error.log"]

    def check(self) -> str:
        """What `nginx -t` says."""
        done = subprocess.run([*self._command, "-t"], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._command, "-g", "daemon off;"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 30
        while True:
            assert self._process.poll() is None, self.errors
            try:
                with socket.create_connection(("127.0.0.1", self.https), timeout=5):
                    return
            except OSError:
                assert time.monotonic() < end, self.errors
                time.sleep(0.02)

    def reload(self) -> None:
        """`systemctl reload nginx`, and wait until its old workers have ended what they had begun."""
        assert self._process is not None
        left = len(re.findall(r"worker process \d+ exited with code 0", self.errors))
        self._process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 60
        while len(re.findall(r"worker process \d+ exited with code 0", self.errors)) < left + WORKERS:
            assert time.monotonic() < end, self.errors[-2000:]
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)

    @property
    def errors(self) -> str:
        file = self.folder / "error.log"
        return file.read_text("utf-8", "replace") if file.exists() else ""

    @property
    def log(self) -> list[dict[str, str]]:
        """The lines of the access log so far."""
        file = self.folder / "mlflow-proxy.log"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def log_line(self, request_id: str, seconds: float = 10.0) -> dict[str, str]:
        end = time.monotonic() + seconds
        while True:
            for line in self.log:
                if line["request_id"] == request_id:
                    return line
            assert time.monotonic() < end, f"no log line for {request_id}"
            time.sleep(0.02)

    def connect(self, source: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> http.client.HTTPSConnection:
        """A connection from an address of this machine."""
        return http.client.HTTPSConnection(
            "localhost", self.https, context=tls or self.tls, timeout=60, source_address=(source, 0)
        )

    def call(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
        source: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> Answer:
        """One request on a connection of its own. The path goes out as it stands."""
        connection = self.connect(source, tls)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()


@contextmanager
def running(site: Site) -> Iterator[Site]:
    """The site, served until the end."""
    try:
        site.start()
        yield site
    finally:
        site.stop()


class Arrived(NamedTuple):
    """A request as it reached an instance: the very line, and all headers with their values."""

    line: bytes
    headers: list[tuple[str, str]]

    @property
    def target(self) -> str:
        return self.line.split(b" ")[1].decode("latin-1")

    def values(self, name: str) -> list[str]:
        return [value for given, value in self.headers if given.lower() == name.lower()]


class Instance:
    """A server in the place of a proxy's instance, which answers as a test tells it and keeps what arrived."""

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []
        self.script: Script = answer
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60
            wbufsize = 64 << 10  # head and body in one segment

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):  # any method
                    return self._serve
                raise AttributeError(name)

            def _serve(self) -> None:
                outer.arrived.append(Arrived(self.raw_requestline, list(self.headers.items())))
                outer.script(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self) -> None:
        self.script = answer
        self.arrived.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True
    block_on_close = False


Script = Callable[[BaseHTTPRequestHandler], None]


def body_of(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request, whole."""
    if handler.headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(handler.rfile.readline(), 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("Content-Length", "0")))


def answer(
    handler: BaseHTTPRequestHandler,
    status: int = 200,
    body: bytes = b"{}",
    headers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Read the request and answer it."""
    body_of(handler)
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
