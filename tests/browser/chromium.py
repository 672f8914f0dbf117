"""A real Chromium, and pages of it that note down everything that goes wrong."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Response,
    expect,
    sync_playwright,
)

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Milliseconds; the machine may be busy.
PATIENCE = 30_000
expect.set_options(timeout=PATIENCE)
DESKTOP = (1360, 850)


@dataclass(frozen=True)
class Known:
    """Something that MLflow's UI does on its own server too, so it is not the proxy's."""

    name: str
    url_part: str
    what: str
    reason: str


KNOWN = (
    Known(
        "current user",
        "/ajax-api/2.0/mlflow/users/current",
        "404",
        "the UI asks every server who is signed in; MLflow answers 404 unless its basic-auth application runs",
    ),
    Known(
        "resize observer",
        "/static-files/static/js/main.",
        "ResizeObserver loop completed with undelivered notifications",
        "Chromium's word for a layout that took a second round, when the UI's panels open; no request is involved",
    ),
    Known(
        "telemetry worker",
        "/static-files/TelemetryLogger.telemetry-worker.",
        "net::ERR_ABORTED",
        "Chromium never tells that a shared worker's script has loaded, and calls it aborted when the page is left",
    ),
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    path = shutil.which("chromium") or "/usr/bin/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page whose every request, answer and console message is looked at.

    `within` is what all its addresses must begin with.
    """

    page: Page
    within: tuple[str, ...]
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _under_way: set[Request] = field(default_factory=set)
    _changed: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        page = self.page
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("request", self._on_request)
        page.on("requestfinished", self._on_end)
        page.on("requestfailed", self._on_failed)
        page.on("response", self._on_response)
        for button in ("Got it", "Try it now"):  # MLflow's one-time hints lie over what is to be clicked
            page.add_locator_handler(page.get_by_role("button", name=button), lambda found: found.click())

    def open(self, url: str) -> None:
        """Load a page anew; a change of the fragment alone would keep the old one's dialogs."""
        if self.page.url != "about:blank":
            self.settle()
            self.page.goto("about:blank")
        self.page.goto(url)

    def click(self, what: Locator) -> None:
        """Click when all is at rest: MLflow's UI cancels what is under way when it is led elsewhere."""
        expect(what).to_be_visible()
        self.settle()
        what.click()

    def settle(self) -> None:
        """Wait until no request is under way, so that leaving cancels none."""
        end = time.monotonic() + PATIENCE / 1000
        while self._under_way or time.monotonic() - self._changed < 0.25:
            assert time.monotonic() < end, f"still under way: {[request.url for request in self._under_way]}"
            self.page.wait_for_timeout(25)  # runs Playwright's events meanwhile

    def check(self) -> None:
        """Nothing went wrong, now that all is at rest."""
        self.settle()
        assert self.requests, "the page asked for nothing, so nothing was tested"
        assert not self.problems, "\n".join(self.problems)

    def _on_console(self, message: ConsoleMessage) -> None:
        url = str(message.location.get("url", ""))
        if message.type == "error" and not _known(url, message.text):
            self.problems.append(f"console: {message.text} ({url})")

    def _on_request(self, request: Request) -> None:
        self._changed = time.monotonic()
        if request.url.startswith(("data:", "blob:")):
            return
        self.requests.append(request.url)
        if not request.url.startswith(self.within):
            self.problems.append(f"outside {' '.join(self.within)}: {request.method} {request.url}")
        if not any(known.url_part in request.url for known in KNOWN if known.what.startswith("net::")):
            self._under_way.add(request)

    def _on_end(self, request: Request) -> None:
        self._changed = time.monotonic()
        self._under_way.discard(request)

    def _on_failed(self, request: Request) -> None:
        self._on_end(request)
        if not _known(request.url, request.failure or ""):
            self.problems.append(f"failed: {request.method} {request.url}: {request.failure}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and not _known(response.url, str(response.status)):
            self.problems.append(f"{response.status}: {response.request.method} {response.url}")


def _known(url: str, what: str) -> bool:
    return any(known.url_part in url and known.what in what for known in KNOWN)


@contextmanager
def context(browser: Browser, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[BrowserContext]:
    """A browser profile of its own: no cookies, no cache."""
    width, height = size
    made = browser.new_context(viewport={"width": width, "height": height}, **options)
    made.set_default_timeout(PATIENCE)
    try:
        yield made
    finally:
        made.close()
