"""The container's health check: exit code 0 if the proxy in it answers on /-/health, else 1 and the reason.

It asks for the process, not for the targets behind it, as /-/health does. Not for Kubernetes and load balancers, which
ask over the network themselves.
"""

from __future__ import annotations

import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from mlflow_proxy.configuration import load
from mlflow_proxy.settings import CONFIG_VARIABLE, Server

_PATH = "/-/health"
_SECONDS = 4  # below HEALTHCHECK's own timeout, so that there is a reason to show


def status(server: Server) -> int:
    """The HTTP status of the proxy's answer. Raises OSError or HTTPException if there is none."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104
    connection = HTTPConnection(host, server.port, timeout=_SECONDS)
    if server.tls_certificate is not None:
        # Its certificate names what callers use, not this address; and it speaks with itself.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = HTTPSConnection(host, server.port, timeout=_SECONDS, context=context)
    try:
        connection.request("GET", _PATH)
        return connection.getresponse().status
    finally:
        connection.close()


def main() -> str | None:
    """None if healthy, else the reason."""
    server = load(Path(os.environ[CONFIG_VARIABLE])).server
    try:
        answer = status(server)
    except (OSError, HTTPException) as error:
        return f"no answer from {server.host}:{server.port}{_PATH}: {error}"
    return None if answer == 200 else f"{_PATH} answered {answer}"


if __name__ == "__main__":
    sys.exit(main())
