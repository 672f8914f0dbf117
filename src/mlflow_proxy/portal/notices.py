"""The page that browsers show for a refusal, and the policy that all pages of the proxy's own have.

Programs get the same refusal as JSON, from `errors`.
"""

from __future__ import annotations

import base64
import hashlib
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment

from mlflow_proxy.errors import NEEDS_OPERATOR, Headers, Refusal
from mlflow_proxy.requests import up
from mlflow_proxy.telemetry.record import Record

# Copies the text that a button names, and says so to those who see and to those who hear. Browsers have no clipboard
# for pages over plain HTTP, except on loopback; there the text is selected, so that a key stroke copies it.
COPY_SCRIPT = """for (const button of document.querySelectorAll("button[data-copy]")) {
  const text = document.getElementById(button.dataset.copy);
  const status = document.getElementById(button.dataset.status);
  button.hidden = false;
  button.addEventListener("click", async () => {
    let copied = false;
    try {
      await navigator.clipboard.writeText(text.textContent);
      copied = true;
    } catch {
      getSelection().selectAllChildren(text);
      copied = document.execCommand("copy");
    }
    status.textContent = copied ? "Copied" : "Selected: press Ctrl+C or ⌘C to copy";
    setTimeout(() => { status.textContent = ""; }, 5000);
  });
}"""
_HASH = base64.b64encode(hashlib.sha256(COPY_SCRIPT.encode()).digest()).decode()
CONTENT_POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_JSON_HEADERS = frozenset({b"content-type", b"content-length", b"cache-control"})
_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", CONTENT_POLICY.encode("ascii")),
]
_TITLES = {
    400: "This request is not valid",
    401: "Authentication required",
    403: "You are not allowed to do this",
    404: "Page not found",
    408: "The request took too long",
    413: "This request is too large",
    414: "This address is too long",
    421: "This is not the proxy's address",
    429: "Too many requests",
    500: "Something went wrong",
    NEEDS_OPERATOR: "The operator of this proxy has to fix this",
    502: "MLflow cannot be reached",
    503: "Not available at the moment",
    504: "No answer in time",
}
# Statuses that can pass by themselves.
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


class Answer(NamedTuple):
    """A refusal, ready to be sent."""

    status: int
    headers: Headers
    body: bytes


def refusal_page(templates: Environment, refusal: Refusal, record: Record, path: str, *, sign_in: bool) -> Answer:
    """A refusal as a page: what is wrong, who is signed in, and what can be done.

    `path` is the one that the browser asked for; links are relative to it. `sign_in`: there is a sign-in.
    """
    status, headers, _ = refusal.answer(record.request_id)
    html = templates.get_template("notice.html").render(
        title=_TITLES.get(status, "This is not possible"),
        text=refusal.said(record.request_id),
        caller="" if record.way == "anonymous" else record.caller,
        sign_out=f"{up(path)}-/sign-out" if record.way == "session" else None,
        link=_next_step(status, record, path, sign_in=sign_in),
        request_id=record.request_id,
    )
    body = html.encode("utf-8", "replace")
    kept = [pair for pair in headers if pair[0] not in _JSON_HEADERS]
    return Answer(status, [*kept, *_HEADERS, (b"content-length", b"%d" % len(body))], body)


def _next_step(status: int, record: Record, path: str, *, sign_in: bool) -> tuple[str, str] | None:
    """Where to go from here, if the message alone does not say it: address and label of a link."""
    if status == 401 and sign_in:
        return f"{up(path)}-/sign-in?next={quote(path, safe='')}", "Sign in"
    if status in _PASSING and record.method == "GET":
        return "", "Try again"  # the empty reference is this page
    if status == 404 and record.caller:
        return f"{up(path)}-/", "Show all targets"
    return None
