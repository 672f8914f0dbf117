"""The proxy before the local SageMaker, a Chromium, and something to look at."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext
from tests.browser.chromium import Watched, chromium, context
from tests.browser.seed import Seeded, seed
from tests.faults.proxies import Proxy, running

from mlflow_proxy.local import LocalSageMaker

# Where MLflow's UI is on the proxy: the default target's place, and each mode's own.
PREFIXES = {"default": "", "tracking": "/t/tracking", "app": "/t/app"}


@pytest.fixture(scope="session")
def proxy(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    targets = tomllib.loads(sagemaker.proxy_toml())["targets"]
    folder = tmp_path_factory.mktemp("browser") / "proxy"
    with running(folder, targets, server={"workers": 2}, environ=sagemaker.environment()) as serving:
        yield serving


@pytest.fixture(scope="session")
def origin(proxy: Proxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


@pytest.fixture(scope="session")
def seeds(origin: str) -> Callable[[str], Seeded]:
    """What was logged through a place on the proxy; logged when first asked for."""
    made: dict[str, Seeded] = {}

    def seeded(place: str) -> Seeded:
        if place not in made:
            made[place] = seed(origin + PREFIXES[place], f"customer churn, {place}")
        return made[place]

    return seeded


# Not for the whole session: while Playwright runs, its event loop counts as running in this thread.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running_browser:
        yield running_browser


@pytest.fixture
def profile(browser: Browser) -> Iterator[BrowserContext]:
    with context(browser) as made:
        yield made


@pytest.fixture
def watch(profile: BrowserContext, tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """Opens watched pages; the test fails if anything went wrong in one of them."""
    with ExitStack() as checks:

        def opened(*within: str) -> Watched:
            watched = Watched(profile.new_page(), within)
            checks.callback(watched.check)
            return watched

        yield opened
