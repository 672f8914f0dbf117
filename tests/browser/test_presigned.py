"""Presigned links in a browser: each opens MLflow's UI on AWS's side once, and nobody a second time."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect
from tests.browser.chromium import Watched, context
from tests.browser.mlflow_ui import list_experiments, open_run, show_charts
from tests.browser.seed import Seeded
from tests.faults.proxies import Proxy

from mlflow_proxy.local import LocalSageMaker

pytestmark = pytest.mark.browser

Watch = Callable[..., Watched]
Refused = Callable[[str], None]


@pytest.fixture(params=["tracking", "app"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def aws(mode: str, sagemaker: LocalSageMaker) -> str:
    """Where AWS serves the target's UI."""
    return next(str(target.ui_origin) for target in sagemaker.targets if target.name == mode)


@pytest.fixture
def seeded(mode: str, seeds: Callable[[str], Seeded]) -> Seeded:
    return seeds(mode)


@pytest.fixture
def entry(mode: str, origin: str) -> str:
    return f"{origin}/-/ui/{mode}"


@pytest.fixture
def printed_link(mode: str, proxy: Proxy, sagemaker: LocalSageMaker) -> str:
    """What `mlflow-proxy ui` prints."""
    command = [str(Path(sys.executable).with_name("mlflow-proxy")), "ui", mode, "-c", str(proxy.folder / "proxy.toml")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(proxy.folder), **sagemaker.environment()}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.fixture
def refused_twice(profile: BrowserContext, browser: Browser, aws: str) -> Refused:
    """Checks that a link that was followed opens nothing more, neither here nor in a stranger's browser."""

    def check(link: str) -> None:
        _refused(profile.new_page(), link, "This link was used before")
        with context(browser) as stranger:
            _refused(stranger.new_page(), link, "This link was used before")
            _refused(stranger.new_page(), f"{aws}/", "There is no open session")

    return check


def test_visit(entry: str, aws: str, seeded: Seeded, watch: Watch, refused_twice: Refused) -> None:
    watched = watch(entry, f"{aws}/")
    page = watched.page
    landed = page.goto(entry)
    assert landed is not None
    hops = _chain(landed.request.redirected_from)
    assert [_place(url) for url in hops] == [entry, f"{aws}/auth"]
    assert page.url == f"{aws}/"
    expect(page).to_have_title(re.compile("MLflow$"))
    open_run(watched, aws, seeded, "quiet-marten")
    show_charts(watched)
    watched.settle()
    refused_twice(hops[1])
    page.reload()  # whoever was let in stays in
    expect(page.get_by_role("tab", name="Model metrics")).to_be_visible()


def test_printed_link(printed_link: str, aws: str, seeded: Seeded, watch: Watch, refused_twice: Refused) -> None:
    assert _place(printed_link) == f"{aws}/auth"
    watched = watch(f"{aws}/")
    watched.open(printed_link)
    assert watched.page.url == f"{aws}/"
    list_experiments(watched, aws, seeded)
    watched.settle()
    refused_twice(printed_link)


def test_no_such_target(origin: str, profile: BrowserContext) -> None:
    page = profile.new_page()
    answer = page.goto(f"{origin}/-/ui/nope")
    assert answer is not None
    assert answer.status == 404
    expect(page.get_by_text("There is no target 'nope'.")).to_be_visible()


def _refused(page: Page, link: str, text: str) -> None:
    answer = page.goto(link)
    assert answer is not None
    assert answer.status == 403
    expect(page.get_by_text(text)).to_be_visible()
    page.close()


def _chain(request: Request | None) -> list[str]:
    """The addresses that led to a page, first one first."""
    urls: list[str] = []
    while request is not None:
        urls.insert(0, request.url)
        request = request.redirected_from
    return urls


def _place(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"
