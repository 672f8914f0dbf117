"""What people with an API key see: the browser's prompt asks for it, and MLflow's UI works as far as the role goes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from playwright.sync_api import Browser, Page, expect
from tests.browser.chromium import Watched, context
from tests.browser.mlflow_ui import open_run, show_charts
from tests.browser.seed import Seeded
from tests.faults.proxies import running

from mlflow_proxy.access.key_file import change_keys
from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker

pytestmark = pytest.mark.browser

ROLES = {"reader": ["AccessUI", "Get*", "List*", "Search*"], "writer": ["*", "CreatePresigned*"], "stranger": []}
# MLflow's UI counts clicks for MLflow's makers, and asks for AI gateways by a route that could also call one. A reader
# may not, and the UI does not mind.
DENIED_TO_READERS = ("ui-telemetry", "gateway-proxy")


class Guarded(NamedTuple):
    """A proxy that asks for keys."""

    origin: str
    keys: dict[str, str]
    audit: Path


@pytest.fixture(scope="module")
def guarded(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("roles")
    now = datetime.now(UTC)
    made = {name: make_key(name, name, created=now, expires=now + timedelta(days=1)) for name in ROLES}
    with change_keys(folder / "keys.jsonl", create=True) as kept:
        kept += [key for _, key in made.values()]
    with running(
        folder / "proxy",
        tomllib.loads(sagemaker.proxy_toml())["targets"],
        sections={
            "access": {"keys_file": str(folder / "keys.jsonl")},
            "audit": {"to": str(folder / "audit.jsonl")},
        },
        roles=[{"name": name, "targets": ["*" if allow else "app"], "allow": allow} for name, allow in ROLES.items()],
        environ=sagemaker.environment(),
    ) as proxy:
        yield Guarded(
            f"http://127.0.0.1:{proxy.port}", {name: text for name, (text, _) in made.items()}, folder / "audit.jsonl"
        )


@pytest.fixture
def seeded(guarded: Guarded, seeds: Callable[[str], Seeded]) -> Callable[[str], Seeded]:
    """What was logged through the proxy that asks for nothing, as seen through this one."""
    return lambda place: replace(seeds(place), base=f"{guarded.origin}/t/{place}")


@contextmanager
def as_role(browser: Browser, guarded: Guarded, role: str) -> Iterator[Page]:
    """A page of a browser whose user typed the key into the prompt; it answers the 401, and nothing before."""
    credentials = {"username": "anybody", "password": guarded.keys[role], "send": "unauthorized"}
    with context(browser, http_credentials=credentials) as profile:
        yield profile.new_page()


def test_the_browser_asks_for_user_and_password(guarded: Guarded, browser: Browser) -> None:
    with context(browser) as profile:
        page = profile.new_page()
        answer = page.request.get(f"{guarded.origin}/", headers={"accept": "text/html"})
        assert answer.status == 401
        assert 'Basic realm="mlflow-proxy"' in answer.headers["www-authenticate"]
    with as_role(browser, guarded, "reader") as page:
        found = page.goto(f"{guarded.origin}/-/")
        assert found is not None
        assert found.status == 200


@pytest.mark.parametrize("place", ["tracking", "app"])
def test_a_reader_uses_mlflows_ui(
    place: str, guarded: Guarded, seeded: Callable[[str], Seeded], browser: Browser
) -> None:
    seeds = seeded(place)
    with as_role(browser, guarded, "reader") as page:
        watched = Watched(page, (f"{seeds.base}/",))
        open_run(watched, seeds.base, seeds, "quick-otter")
        expect(page.get_by_role("row", name="accuracy 0.9")).to_be_visible()
        show_charts(watched)
        watched.settle()
        problems = [problem for problem in watched.problems if not any(part in problem for part in DENIED_TO_READERS)]
        assert problems == []


def test_a_reader_renames_nothing(guarded: Guarded, seeded: Callable[[str], Seeded], browser: Browser) -> None:
    seeds = seeded("app")
    run_id = seeds.runs["bold-falcon"]
    with as_role(browser, guarded, "reader") as page:
        watched = Watched(page, (f"{seeds.base}/",))
        watched.open(seeds.page(f"/experiments/{seeds.experiment_id}/runs/{run_id}"))
        watched.click(page.get_by_role("button", name="Open header dropdown menu"))
        page.get_by_role("menuitem", name="Rename").click()
        dialog = page.get_by_role("dialog", name="Rename Run")
        dialog.get_by_label("New run name").fill("mine now")
        dialog.get_by_role("button", name="Save").click()
        expect(page.get_by_text("The role 'reader' does not allow UpdateRun on the target 'app'").first).to_be_visible()
    shown = requests.get(
        f"{seeds.base}/api/2.0/mlflow/runs/get?run_id={run_id}",
        headers={"x-api-key": guarded.keys["reader"]},
        timeout=30,
    )
    assert shown.json()["run"]["info"]["run_name"] == "bold-falcon"
    denied = [json.loads(line) for line in guarded.audit.read_text().splitlines() if '"UpdateRun"' in line]
    assert [(line["event"], line["caller"], line["target"]) for line in denied] == [("denied", "key:reader", "app")]


def test_the_overview_shows_who_one_is_and_what_one_may(guarded: Guarded, browser: Browser, tmp_path: Path) -> None:
    with as_role(browser, guarded, "writer") as page:
        page.goto(f"{guarded.origin}/-/")
        page.screenshot(path=tmp_path / "writer.png", full_page=True)
        expect(page.get_by_text("You are key:writer with the role writer.")).to_be_visible()
        expect(page.get_by_role("link", name="Open on AWS")).to_have_count(3)
        expect(page.get_by_role("link", name="metrics")).to_be_visible()
        expect(page.get_by_role("link", name="Sign out")).to_have_count(0)
    with as_role(browser, guarded, "reader") as page:
        page.goto(f"{guarded.origin}/-/")
        expect(page.get_by_text("You are key:reader with the role reader.")).to_be_visible()
        expect(page.get_by_role("link", name="Open MLflow")).to_have_count(3)
        for name in ("Open on AWS", "metrics", "readiness as JSON"):
            expect(page.get_by_role("link", name=name)).to_have_count(0)
    with as_role(browser, guarded, "stranger") as page:
        page.goto(f"{guarded.origin}/-/")
        expect(page.get_by_role("heading", name="app", exact=True)).to_be_visible()
        expect(page.get_by_role("heading", name="tracking", exact=True)).to_have_count(0)
