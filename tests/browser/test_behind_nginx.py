"""The UI and the proxy's own pages in Chromium, below a path of a real nginx, and behind one with a Host of its own."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect
from tests.browser.chromium import Watched
from tests.browser.mlflow_ui import open_run, show_charts, way_in
from tests.browser.seed import Seeded
from tests.browser.test_signin import _MOCKS_STYLE, names, sign_in
from tests.faults.nginx import nginx
from tests.faults.proxies import Proxy, free_port
from tests.integration.test_behind_nginx import documented, server
from tests.portal.signing_in import Provider, provider, site

from mlflow_proxy.access.session import Sessions
from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.portal.signin import HINT_COOKIE

pytestmark = pytest.mark.browser

Watch = Callable[..., Watched]


@pytest.fixture(scope="module")
def front(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An nginx's address: below /mlflow as documented, at its root without a word on Host. The proxy knows neither."""
    port = free_port()
    locations = (documented("/mlflow", proxy.port), f"location / {{ proxy_pass http://127.0.0.1:{proxy.port}; }}")
    with nginx(tmp_path_factory.mktemp("front"), port, server(port, *locations)):
        yield f"http://127.0.0.1:{port}"


def test_from_the_overview_to_a_chart(front: str, seeds: Callable[[str], Seeded], watch: Watch) -> None:
    """No request leaves the path."""
    place = "app"
    below = f"{front}/mlflow"
    watched = watch(f"{below}/")
    page = watched.page
    watched.open(f"{below}/-")
    page.get_by_role("navigation", name=place).get_by_role("link", name="Open MLflow").click()
    expect(way_in(page, place)).to_be_visible()
    assert page.url == f"{below}/t/{place}/"
    seeded = replace(seeds(place), base=f"{below}/t/{place}")
    open_run(watched, seeded.base, seeded, "quick-otter")
    show_charts(watched)


def test_the_default_host(front: str, profile: BrowserContext) -> None:
    """The UI is there, and says what to set where it would change something."""
    page = profile.new_page()
    page.goto(f"{front}/t/tracking/")
    expect(way_in(page, "tracking")).to_be_visible()
    ask = """async () => {
      const headers = {'Content-Type': 'application/json'}, body = '{"max_results": 1}';
      const answer = await fetch('ajax-api/2.0/mlflow/experiments/search', {method: 'POST', headers, body});
      return [answer.status, (await answer.json()).message];
    }"""
    status, message = page.evaluate(ask)
    assert status == 403
    assert "sets server.public_url to the address that browsers show" in message
    assert "proxy_set_header Host $http_host;" in message
    page.goto(f"{front}/mlflow/t/tracking/")
    assert page.evaluate(ask)[0] == 200


@pytest.fixture(scope="module")
def at() -> Iterator[Provider]:
    with provider() as running:
        running.user("ada", groups=["ml-writers"])
        yield running


def test_sign_in_and_out(at: Provider, sagemaker: LocalSageMaker, watch: Watch, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://localhost:{port}/mlflow"
    targets = tomllib.loads(sagemaker.proxy_toml())["targets"]
    options = {"targets": targets, "environ": sagemaker.environment(), "server": {"public_url": url}}
    with (
        site(tmp_path / "proxy", at, tls=False, **options) as of,
        nginx(tmp_path / "nginx", port, server(port, documented("/mlflow", of.proxy.port, strips=False))),
    ):
        watched = watch(f"{url}/", f"{at.issuer}/", _MOCKS_STYLE)
        page = watched.page
        for missing in (f"{_MOCKS_STYLE}**", f"{at.issuer}/favicon.ico"):
            page.route(missing, lambda route: route.fulfill(body=""))
        page.goto(f"{url}/t/tracking/")
        sign_in(page)
        expect(way_in(page, "tracking")).to_be_visible()
        assert page.url == f"{url}/t/tracking/"
        assert names(page.context) == {f"{Sessions.COOKIE}.mlflow", HINT_COOKIE}
        watched.open(f"{url}/-/")
        page.get_by_role("link", name="Sign out").click()
        page.get_by_role("button", name="Sign out").click()
        page.get_by_role("button", name="End session").click()  # the provider's page
        expect(page.get_by_role("heading", name="You are signed out")).to_be_visible()
        assert page.url.partition("?")[0] == f"{url}/-/sign-out"
        assert names(page.context) == set()
        page.get_by_role("link", name="Sign in").click()
        expect(page.get_by_placeholder("sub")).to_be_visible()
        watched.check()
