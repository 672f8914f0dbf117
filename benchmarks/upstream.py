"""What stands behind every peer: an nginx that answers like MLflow, only faster.

Every answer is 300 bytes of JSON. The body of a POST is read whole before it is answered: nginx buffers it, then asks
itself for the answer without passing the body on. (`return` alone would answer first and discard the body later.) The
download is a sparse file sent with sendfile. One port is open to all; the other two, one of them with TLS, answer 403
to whatever carries no SigV4 signature, so that no peer can win by not signing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.certificates import write_certificates
from benchmarks.load import READY_PATH
from benchmarks.processes import Server, free_port, running

ANSWER = (
    '{"experiments":[{"experiment_id":"0","name":"Default","artifact_location":"s3://bucket/0","lifecycle_stage":'
    '"active","last_update_time":1700000000000,"creation_time":1700000000000},{"experiment_id":"1","name":'
    '"demo-experiment","artifact_location":"s3://bucket/1","lifecycle_stage":"active"}]}'
)

_MAIN = """\
{user}worker_processes {workers}; daemon off; pid {folder}/nginx.pid; error_log stderr warn;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;
  client_max_body_size 64m; client_body_buffer_size 64k;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{http}}}
"""

_ANSWERING = """\
  map $http_authorization $unsigned {{ default 1; "~^AWS4-HMAC-SHA256 Credential=" 0; }}
  upstream answer {{ server unix:{folder}/answer; keepalive 512; }}
  server {{ listen unix:{folder}/answer; default_type application/json; location / {{ return 200 '{answer}'; }} }}
  server {{ listen 127.0.0.1:{plain} backlog=4096; include {folder}/locations; }}
  server {{ listen 127.0.0.1:{signed} backlog=4096; if ($unsigned) {{ return 403; }} include {folder}/locations; }}
  server {{ listen 127.0.0.1:{tls} ssl backlog=4096; ssl_certificate {folder}/server.pem;
    ssl_certificate_key {folder}/server.key; if ($unsigned) {{ return 403; }} include {folder}/locations; }}
"""

_LOCATIONS = """\
default_type application/json;
location / {{ return 200 '{answer}'; }}
location = /get-artifact {{ default_type application/octet-stream; alias {folder}/model.bin; }}
location = /api/2.0/mlflow/runs/log-batch {{
  proxy_pass http://answer; proxy_http_version 1.1; proxy_pass_request_body off;
  proxy_set_header Content-Length ""; proxy_set_header Connection "";
}}
"""

_RELAY = """\
  upstream next {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{
    proxy_pass http://next; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_max_temp_file_size 0; }} }}
"""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The running upstream: its three ports, and the CA that signed for the one with TLS."""

    server: Server
    plain: int
    signed: int
    tls: int
    ca: Path


@contextmanager
def upstream(nginx: str, folder: Path, download_size: int) -> Iterator[Upstream]:
    """Start it in `folder`, which is made; the file to download has `download_size` bytes."""
    folder.mkdir()
    plain, signed, tls = free_port(), free_port(), free_port()
    with (folder / "model.bin").open("wb") as file:
        file.truncate(download_size)
    (folder / "locations").write_text(_LOCATIONS.format(folder=folder, answer=ANSWER))
    write_certificates(folder)
    http = _ANSWERING.format(folder=folder, answer=ANSWER, plain=plain, signed=signed, tls=tls)
    command = nginx_command(nginx, folder, http, workers=1)
    with running("the upstream", command, {"PATH": os.defpath}, folder / "upstream.log") as server:
        server.wait_for(plain, READY_PATH)
        yield Upstream(server, plain, signed, tls, folder / "ca.pem")


def relay_command(nginx: str, folder: Path, port: int, to: int) -> list[str]:
    """An nginx that passes requests on to the port `to`, over kept connections."""
    return nginx_command(nginx, folder, _RELAY.format(port=port, upstream=to), workers=2)


def nginx_command(nginx: str, folder: Path, http: str, *, workers: int) -> list[str]:
    """Write a configuration into `folder`; the command that runs it in the foreground."""
    user = "user root root; " if os.geteuid() == 0 else ""  # the folder is closed to nginx's usual user
    config = folder / "nginx.conf"
    config.write_text(_MAIN.format(user=user, workers=workers, folder=folder, http=http))
    return [nginx, "-c", str(config), "-p", str(folder), "-e", "stderr"]
