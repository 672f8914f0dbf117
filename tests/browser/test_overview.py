"""The overview page: what it says, where it leads, and that it looks right on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from tests.browser.chromium import Watched, context
from tests.browser.mlflow_ui import way_in
from tests.faults.proxies import running, target

from mlflow_proxy.local import LocalSageMaker

pytestmark = pytest.mark.browser

SIZES = {"desktop": (1280, 720), "phone": (360, 640)}
KINDS = {"tracking": "Managed tracking server", "app": "Serverless MLflow App"}

# Colours as the eye sees them: the least contrast (WCAG 2) of any text on the page with what is behind it.
_LEAST_CONTRAST = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = numbers(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = [...document.body.querySelectorAll('*')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim()));
  return Math.min(...texts.map(e => {
    const [low, high] = [luminance(getComputedStyle(e).color), luminance(behind(e))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }));
}"""
_BRIGHTNESS = """() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g)
  .slice(0, 3).reduce((sum, part) => sum + Number(part), 0)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_looks_right(scheme: str, size: str, origin: str, browser: Browser, tmp_path: Path) -> None:
    with context(browser, SIZES[size], color_scheme=scheme) as profile:
        watched = Watched(profile.new_page(), (f"{origin}/-/",))
        page = watched.page
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))  # a violated policy speaks up here
        answer = page.goto(f"{origin}/-/")
        assert answer is not None
        assert "default-src 'none'" in (answer.header_value("content-security-policy") or "")
        page.screenshot(path=tmp_path / "overview.png", full_page=True)
        expect(page.get_by_text("All targets are ready.")).to_be_visible()
        for name, kind in KINDS.items():
            card = _card(page, name)
            expect(card.get_by_text("ready")).to_be_visible()
            expect(card.get_by_text(kind)).to_be_visible()
            expect(card.get_by_text(f"{origin}/t/{name}", exact=True)).to_be_visible()
        expect(page.get_by_text("default", exact=True)).to_have_count(1)
        expect(_card(page, "tracking").get_by_text("default", exact=True)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert page.evaluate(_LEAST_CONTRAST) >= 4.5
        assert (page.evaluate(_BRIGHTNESS) > 3 * 128) == (scheme == "light")
        watched.check()
        assert said == []


@pytest.mark.parametrize("name", KINDS)
def test_leads_to_the_ui(name: str, origin: str, sagemaker: LocalSageMaker, watch: Callable[..., Watched]) -> None:
    aws = next(str(target.ui_origin) for target in sagemaker.targets if target.name == name)
    watched = watch(f"{origin}/", f"{aws}/")
    page = watched.page
    watched.open(f"{origin}/-/")
    _card(page, name).get_by_role("link", name="Open MLflow").click()
    expect(way_in(page, name)).to_be_visible()
    assert page.url == f"{origin}/t/{name}/"
    watched.open(f"{origin}/-/")
    _card(page, name).get_by_role("link", name="Open on AWS").click()
    expect(way_in(page, name)).to_be_visible()
    assert page.url == f"{aws}/"


def test_leads_to_the_readiness(origin: str, watch: Callable[..., Watched]) -> None:
    watched = watch(f"{origin}/-/")
    page = watched.page
    watched.open(f"{origin}/-/")
    page.get_by_role("link", name="readiness as JSON").click()
    expect(page.get_by_text('"ready": true').first).to_be_visible()
    assert page.url == f"{origin}/-/ready"


@pytest.mark.parametrize("size", SIZES)
def test_a_target_that_is_not_ready(size: str, browser: Browser, tmp_path: Path) -> None:
    """Its reason stands there, and a long name does not break the page."""
    name = "a-rather-long-name-of-a-target-that-lives-in-another-account"
    with (
        running(tmp_path / "proxy", [target(name, "http://127.0.0.1:9")]) as proxy,
        context(browser, SIZES[size]) as profile,
    ):
        page = profile.new_page()
        page.goto(f"http://127.0.0.1:{proxy.port}/-/")
        page.screenshot(path=tmp_path / "overview.png", full_page=True)
        expect(page.get_by_text("Not every target is ready.")).to_be_visible()
        expect(page.get_by_text("not ready", exact=False).first).to_be_visible()
        expect(page.get_by_text("cannot be reached")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert page.evaluate(_LEAST_CONTRAST) >= 4.5


_NO_CLIPBOARD = "delete Navigator.prototype.clipboard"  # as over plain HTTP elsewhere than on loopback


@pytest.mark.parametrize("script", ["", _NO_CLIPBOARD], ids=["clipboard", "no-clipboard"])
def test_copies_an_address_by_keyboard(script: str, origin: str, browser: Browser) -> None:
    with context(browser, permissions=["clipboard-read", "clipboard-write"]) as profile:
        page = profile.new_page()
        page.add_init_script(script)
        page.goto(f"{origin}/-/")
        expect(page.get_by_text("All targets are ready.")).to_be_visible()
        page.get_by_role("button", name="Copy the address of app").press("Enter")
        expect(_card(page, "app").get_by_role("status")).to_have_text("Copied")
        expect(_card(page, "tracking").get_by_role("status")).to_be_empty()
        reading = profile.new_page()
        reading.goto(f"{origin}/-/health")
        assert reading.evaluate("navigator.clipboard.readText()") == f"{origin}/t/app"


def test_without_scripts_there_is_no_button_that_does_nothing(origin: str, browser: Browser) -> None:
    with context(browser, java_script_enabled=False) as profile:
        page = profile.new_page()
        page.goto(f"{origin}/-/")
        expect(_card(page, "app").get_by_text(f"{origin}/t/app", exact=True)).to_be_visible()
        expect(page.get_by_role("button")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_notice(scheme: str, size: str, origin: str, browser: Browser, tmp_path: Path) -> None:
    with context(browser, SIZES[size], color_scheme=scheme) as profile:
        page = profile.new_page()
        page.goto(f"{origin}/t/a-name-that-no-target-has-and-that-is-longer-than-a-line-of-this-page/")
        page.screenshot(path=tmp_path / "notice.png", full_page=True)
        expect(page.get_by_role("heading", name="Page not found")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert page.evaluate(_LEAST_CONTRAST) >= 4.5
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url(f"{origin}/-/")


def _card(page: Page, name: str) -> Locator:
    return page.get_by_role("article").filter(has=page.get_by_role("heading", name=name, exact=True))
