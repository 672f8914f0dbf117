"""Signing in and out with a real Chromium at a real provider, before the MLflow UI of the local SageMaker."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from tests.browser.chromium import Watched, context
from tests.browser.test_overview import _BRIGHTNESS, _LEAST_CONTRAST, SIZES
from tests.portal.signing_in import Provider, Site, provider, site

from mlflow_proxy.access.session import Sessions
from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.portal.signin import HINT_COOKIE, STATE_COOKIE

pytestmark = pytest.mark.browser

# The provider's pages take their style from here, which a test cannot reach.
_MOCKS_STYLE = "https://cdn.jsdelivr.net/"


@pytest.fixture(scope="module")
def at() -> Iterator[Provider]:
    with provider() as running:
        running.user("ada", groups=["ml-writers"])
        running.user("bob", groups=["ml-readers"])
        yield running


@pytest.fixture(scope="module")
def guarded(at: Provider, sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A proxy over TLS with two workers, behind which there is something to see."""
    targets = tomllib.loads(sagemaker.proxy_toml())["targets"]
    folder = tmp_path_factory.mktemp("signin") / "proxy"
    with site(folder, at, workers=2, targets=targets, environ=sagemaker.environment()) as running:
        yield running


@pytest.fixture
def profile(browser: Browser) -> Iterator[BrowserContext]:
    with context(browser, ignore_https_errors=True) as made:  # the test's own CA
        yield made


def sign_in(page: Page, subject: str = "ada") -> None:
    """Fill in the provider's form, which must be what the page shows."""
    page.get_by_placeholder("sub").fill(subject)
    page.get_by_role("button", name="Authorize").click()


def names(profile: BrowserContext) -> set[str]:
    return {cookie["name"] for cookie in profile.cookies()}


def test_from_the_mlflow_ui_to_signed_out_and_back(guarded: Site, watch: Callable[..., Watched]) -> None:
    """All within one browser: no console message, no failed request, no request anywhere else."""
    watched = watch(f"{guarded.url}/", f"{guarded.provider.issuer}/", _MOCKS_STYLE)
    page = watched.page
    for missing in (f"{_MOCKS_STYLE}**", f"{guarded.provider.issuer}/favicon.ico"):
        page.route(missing, lambda route: route.fulfill(body=""))
    page.goto(f"{guarded.url}/t/tracking/")
    assert page.url.startswith(f"{guarded.provider.issuer}/oauth2/authorize?")
    sign_in(page)
    expect(page.get_by_role("link", name="Experiments", exact=True)).to_be_visible()
    assert page.url == f"{guarded.url}/t/tracking/"
    watched.open(f"{guarded.url}/-/sign-out")
    expect(page.get_by_text("You are signed in as ada.")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="End Session")).to_be_visible()  # the provider's page
    page.get_by_role("button", name="End session").click()
    expect(page.get_by_role("heading", name="You are signed out")).to_be_visible()
    assert urlsplit(page.url).path == "/-/sign-out"
    assert names(page.context).isdisjoint({Sessions.COOKIE, STATE_COOKIE, HINT_COOKIE})
    page.get_by_role("link", name="Sign in").click()
    sign_in(page, "bob")
    expect(page).to_have_url(f"{guarded.url}/")
    watched.open(f"{guarded.url}/-/sign-out")
    expect(page.get_by_text("You are signed in as bob.")).to_be_visible()


def test_the_cookies_as_chromium_keeps_them(guarded: Site, profile: BrowserContext) -> None:
    page = profile.new_page()
    page.goto(f"{guarded.url}/-/version")
    state = {cookie["name"]: cookie for cookie in profile.cookies(guarded.url)}[STATE_COOKIE]
    assert state["expires"] > 0
    sign_in(page)
    expect(page.get_by_text('"version"')).to_be_visible()
    kept = {cookie["name"]: cookie for cookie in profile.cookies()}
    assert set(kept) == {Sessions.COOKIE, HINT_COOKIE}
    for name, path in ((Sessions.COOKIE, "/"), (HINT_COOKIE, "/-/sign-out")):
        cookie = kept[name]
        assert (cookie["domain"], cookie["path"], cookie["expires"]) == ("127.0.0.1", path, -1)
        assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Lax")
    assert page.evaluate("document.cookie") == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_without_tls_on_this_machine(host: str, at: Provider, profile: BrowserContext, tmp_path: Path) -> None:
    """Chromium takes secure cookies from loopback without TLS, too, so sign-in can be tried out there."""
    with site(tmp_path / "proxy", at, tls=False) as of:
        page = profile.new_page()
        url = of.url.replace("127.0.0.1", host)
        page.goto(f"{url}/-/version")
        sign_in(page)
        expect(page.get_by_text('"version"')).to_be_visible()
        assert page.url == f"{url}/-/version"


def test_two_tabs_that_sign_in_at_once(guarded: Site, profile: BrowserContext) -> None:
    """The tab that was asked first has lost its state to the other, and is let in by the session that this one got."""
    first, second = profile.new_page(), profile.new_page()
    first.goto(f"{guarded.url}/-/version")
    second.goto(f"{guarded.url}/-/version")
    sign_in(second)
    expect(second.get_by_text('"version"')).to_be_visible()
    sign_in(first)
    expect(first.get_by_role("link", name="Experiments", exact=True)).to_be_visible()
    assert first.url == f"{guarded.url}/"


def test_somebody_refuses_and_tries_again(guarded: Site, profile: BrowserContext) -> None:
    """The mock forgets the state when somebody refuses, so the proxy cannot tell whose answer it is."""
    page = profile.new_page()
    page.goto(f"{guarded.url}/-/version")
    page.get_by_role("button", name="Deny").click()
    expect(page.get_by_role("heading", name="This sign-in is no longer valid")).to_be_visible()
    assert Sessions.COOKIE not in names(profile)
    page.get_by_role("link", name="Sign in").click()
    sign_in(page)
    expect(page).to_have_url(f"{guarded.url}/")
    assert Sessions.COOKIE in names(profile)


def test_another_site_cannot_sign_somebody_out_or_in(guarded: Site, profile: BrowserContext) -> None:
    """A form of another site: Chromium sends no cookie with it, and says where it comes from."""
    page = profile.new_page()
    page.goto(f"{guarded.url}/-/version")
    sign_in(page)
    expect(page.get_by_text('"version"')).to_be_visible()
    before = [cookie["value"] for cookie in profile.cookies() if cookie["name"] == Sessions.COOKIE]
    page.route(
        "https://evil.example/",
        lambda route: route.fulfill(
            content_type="text/html",
            body=f'<form method="post" action="{guarded.url}/-/sign-out"><button>Win a prize</button></form>'
            f'<img src="{guarded.url}/-/sign-in"><img src="{guarded.url}/-/signed-in?code=x&state=y">',
        ),
    )
    page.goto("https://evil.example/")
    page.wait_for_load_state("networkidle")
    page.get_by_role("button", name="Win a prize").click()
    expect(page.get_by_text("A page of another site sent this request.")).to_be_visible()
    assert [cookie["value"] for cookie in profile.cookies() if cookie["name"] == Sessions.COOKIE] == before
    assert STATE_COOKIE not in names(profile)
    page.goto(f"{guarded.url}/-/version")
    expect(page.get_by_text('"version"')).to_be_visible()


def test_a_script_gets_no_redirect(guarded: Site, profile: BrowserContext) -> None:
    """What an open page's script asks for after the session's end gets 401, not the provider's page."""
    page = profile.new_page()
    page.goto(f"{guarded.url}/t/tracking/")
    sign_in(page)
    expect(page.get_by_role("link", name="Experiments", exact=True)).to_be_visible()
    ask = """async method => {
      const answer = await fetch('ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=Default', {method});
      return [answer.status, answer.redirected, (await answer.json()).error_code ?? ''];
    }"""
    assert page.evaluate(ask, "GET") == [200, False, ""]
    profile.clear_cookies()
    assert page.evaluate(ask, "GET") == [401, False, "UNAUTHENTICATED"]
    assert page.evaluate(ask, "POST") == [401, False, "UNAUTHENTICATED"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_looks_right(scheme: str, size: str, guarded: Site, browser: Browser, tmp_path: Path) -> None:
    with context(browser, SIZES[size], color_scheme=scheme, ignore_https_errors=True) as made:
        page = made.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))  # a violated policy speaks up here
        for path in ("/-/sign-out", "/-/signed-in"):
            page.goto(f"{guarded.url}{path}")
            page.screenshot(path=tmp_path / "notice.png", full_page=True)
            expect(page.get_by_role("link", name="Sign in")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
            assert page.evaluate(_LEAST_CONTRAST) >= 4.5
            assert (page.evaluate(_BRIGHTNESS) > 3 * 128) == (scheme == "light")
        assert not [text for text in said if "Security Policy" in text]
