"""A server between a command and moto, on which things go wrong as they do on AWS. For tests only.

It passes everything on, remembers what was asked for, and lets a test answer itself or act when something is asked.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs

# Operations that change nothing.
_READS = re.compile(r"(Describe|List|Get|Head|Filter)[A-Za-z]*$")


@dataclass(frozen=True)
class Asked:
    """One request: `DeleteStack`, or for protocols without names `DELETE /bucket`."""

    operation: str
    path: str
    body: str

    @property
    def changes(self) -> bool:
        """Whether it is one that changes something."""
        return _READS.match(self.operation) is None and not self.operation.startswith(("GET ", "HEAD "))


Answer = tuple[int, str, bytes]
# Gets the request and what moto would answer (call it to ask moto); None: pass on.
Rule = Callable[[Asked, Callable[[], Answer]], Answer | None]


class Gate:
    """Rules count in their order; the first that answers decides."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.rules: list[Rule] = []
        self.port = 0

    @property
    def changes(self) -> list[str]:
        """What was asked for that changes something."""
        return [one.operation for one in self.asked if one.changes]

    @contextlib.contextmanager
    def rule(self, rule: Rule) -> Iterator[None]:
        self.rules.append(rule)
        try:
            yield
        finally:
            self.rules.remove(rule)


@contextlib.contextmanager
def running(behind: int) -> Iterator[Gate]:
    """A gate before moto's port."""
    gate = Gate()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = _asked(self.command, self.path, dict(self.headers), body)
            gate.asked.append(asked)
            answers: list[Answer] = []

            def ask() -> Answer:
                if not answers:
                    answers.append(self._ask(body))
                return answers[0]

            answer = next((found for rule in list(gate.rules) if (found := rule(asked, ask)) is not None), None)
            status, kind, text = answer or ask()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else text)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

        def _ask(self, body: bytes) -> Answer:
            moto = http.client.HTTPConnection("127.0.0.1", behind, timeout=60)
            with contextlib.closing(moto):
                # moto takes a bucket's name from hosts other than localhost.
                headers = dict(self.headers) | {"Host": f"localhost:{behind}"}
                moto.request(self.command, self.path, body, headers)
                answer = moto.getresponse()
                return answer.status, answer.headers.get("Content-Type", "text/xml"), answer.read()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    gate.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield gate
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _asked(method: str, path: str, headers: dict[str, str], body: bytes) -> Asked:
    text = body.decode("utf-8", "replace")
    target = next((value for name, value in headers.items() if name.lower() == "x-amz-target"), "")
    if target:
        return Asked(target.rpartition(".")[2], path, text)
    if "Action=" in text and method == "POST":
        return Asked(parse_qs(text)["Action"][0], path, text)
    if method == "POST" and path.endswith("?delete"):
        return Asked("DeleteObjects", path, text)
    return Asked(f"{method} {path.split('?', maxsplit=1)[0]}", path, text)
