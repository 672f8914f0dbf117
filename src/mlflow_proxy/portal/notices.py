"""The page that browsers show for a refusal, and the policy that all pages of the proxy's own have."""

from __future__ import annotations

import base64
import hashlib
from typing import NamedTuple

from jinja2 import Environment

from mlflow_proxy.errors import Headers, Refusal
from mlflow_proxy.requests import up
from mlflow_proxy.telemetry.record import Record

# Copies what stands before the button, and says so to those who see and to those who hear.
COPIES = """for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}"""
_HASH = base64.b64encode(hashlib.sha256(COPIES.encode()).digest()).decode()
CONTENT_POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
# Headers of a refusal that a page has of its own.
PAGE_HEADERS = frozenset({b"content-type", b"content-length", b"cache-control"})
_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", CONTENT_POLICY.encode("ascii")),
]
_TITLES = {
    400: "This request cannot be understood",
    401: "This proxy does not know you",
    403: "You may not do this",
    404: "There is no such page",
    421: "This is not the proxy's address",
    429: "Too many requests",
    500: "Something went wrong",
    501: "The proxy's operator has to look at this",
    502: "SageMaker MLflow cannot be reached",
    503: "Not possible at the moment",
    504: "SageMaker MLflow does not answer",
}


class Page(NamedTuple):
    """A page's headers and body."""

    headers: Headers
    body: bytes


def refusal_page(templates: Environment, refusal: Refusal, record: Record, path: str, *, sign_in: bool) -> Page:
    """The page for a refusal: what is wrong, who is signed in, and what can be done.

    `path` is the one that was asked for; links are relative to it. `sign_in`: there is a sign-in.
    """
    unknown = refusal.status == 401
    html = templates.get_template("notice.html").render(
        title=_TITLES.get(refusal.status, "This is not possible"),
        text=refusal.said(record.request_id),
        caller=record.caller if record.way != "anonymous" else "",
        sign_out=f"{up(path)}-/sign-out" if record.way == "session" else None,
        link=(f"{up(path)}-/sign-in", "Sign in") if unknown and sign_in else None,
        request_id=record.request_id,
    )
    body = html.encode("utf-8", "replace")
    return Page([*_HEADERS, (b"content-length", b"%d" % len(body))], body)
