"""A real nginx in front of the proxy, with the few lines that an operator writes."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NGINX = "/usr/sbin/nginx"
_KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextmanager
def nginx(folder: Path, port: int, blocks: str) -> Iterator[None]:
    """An nginx that listens on `port` of loopback when this begins; `blocks` stand in its block `http`."""
    folder.mkdir(exist_ok=True)
    files = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in _KINDS)
    text = f"pid {folder}/nginx.pid; events {{}} http {{ access_log off; {files} {blocks} }}"
    (folder / "nginx.conf").write_text(text)
    run = [NGINX, "-p", str(folder), "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log", "-g", "daemon off;"]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 30
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                    break
                assert process.poll() is None, (folder / "error.log").read_text()
                assert time.monotonic() < end, (folder / "error.log").read_text()
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
