"""STS, S3 and IAM: moto's server in a thread of this process, with the STS guard before it."""

from __future__ import annotations

import threading

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from .service import Service
from .sts import StsGuard


class _QuietHandler(MotoRequestHandler):  # type: ignore[misc]
    """moto's own handler without a line per request on the terminal."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: object) -> None:
        """Say nothing."""


class AwsServices:
    """A moto server that can be started and stopped."""

    def __init__(self, host: str, service: Service) -> None:
        app = StsGuard(DomainDispatcherApplication(create_backend_app), service)
        self._server = make_server(host, 0, app, threaded=True, request_handler=_QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="local-moto", daemon=True)

    @property
    def endpoint(self) -> str:
        """Where AWS clients find STS, S3 and IAM."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and close the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
