"""MLflow's own UI through the proxy, in both modes and at every place it can have there."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote, urlsplit

import pytest
import requests
from playwright.sync_api import BrowserContext, expect
from tests.browser.chromium import Watched
from tests.browser.conftest import PREFIXES
from tests.browser.mlflow_ui import open_run, show_charts, way_in
from tests.browser.seed import QUESTION, Seeded

pytestmark = pytest.mark.browser

Seeds = Callable[[str], Seeded]
Watch = Callable[..., Watched]


# The default target's place differs from the named ones in its prefix only, so the two tests below are enough there.
MODES = pytest.mark.parametrize("place", ["tracking", "app"])
PLACES = pytest.mark.parametrize("place", PREFIXES)


@pytest.fixture
def seeded(place: str, seeds: Seeds) -> Seeded:
    return seeds(place)


@PLACES
def test_from_the_front_page_to_a_chart(seeded: Seeded, watch: Watch) -> None:
    watched = watch(f"{seeded.base}/")
    open_run(watched, seeded.base, seeded, "quick-otter")
    page = watched.page
    expect(page.get_by_text("Finished", exact=True)).to_be_visible()
    expect(page.get_by_role("status", name="team")).to_contain_text("retention")
    expect(page.get_by_role("row", name="learning_rate 0.2")).to_be_visible()
    expect(page.get_by_role("row", name="accuracy 0.9")).to_be_visible()
    show_charts(watched)
    if not urlsplit(seeded.base).path:  # the default target's UI knows nothing of the other places
        assert not [url for url in watched.requests if urlsplit(url).path.startswith(("/t/", "/-/"))]


@PLACES
def test_rename_a_run(seeded: Seeded, watch: Watch) -> None:
    run_id = seeded.runs["bold-falcon"]
    name = "bold-falcon — überarbeitet 🦅"
    watched = watch(f"{seeded.base}/")
    page = watched.page
    watched.open(seeded.page(f"/experiments/{seeded.experiment_id}/runs/{run_id}"))
    expect(page.get_by_role("heading", name="bold-falcon")).to_be_visible()
    watched.click(page.get_by_role("button", name="Open header dropdown menu"))
    page.get_by_role("menuitem", name="Rename").click()
    dialog = page.get_by_role("dialog", name="Rename Run")
    dialog.get_by_label("New run name").fill(name)
    dialog.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    assert seeded.run(run_id)["info"]["run_name"] == name
    rename = {"run_id": run_id, "run_name": "bold-falcon"}
    assert requests.post(f"{seeded.base}/api/2.0/mlflow/runs/update", json=rename, timeout=30).status_code == 200


@MODES
def test_traces(seeded: Seeded, watch: Watch) -> None:
    watched = watch(f"{seeded.base}/")
    page = watched.page
    watched.open(seeded.page(f"/experiments/{seeded.experiment_id}"))
    expect(page.get_by_text("Latency").first).to_be_visible()
    watched.click(page.get_by_role("link", name="Traces"))
    watched.click(page.get_by_text(QUESTION).first)
    for span in ("answer", "retrieve", "complete"):
        expect(page.get_by_role("dialog").get_by_text(span, exact=True).first).to_be_visible()
    expect(page.get_by_text("Those who called support twice.").first).to_be_visible()
    assert seeded.trace_id in page.url


@MODES
def test_models(seeded: Seeded, watch: Watch) -> None:
    watched = watch(f"{seeded.base}/")
    page = watched.page
    watched.open(seeded.page(f"/models?searchQuery={quote(seeded.model)}"))
    watched.click(page.get_by_role("link", name=seeded.model))
    expect(page.get_by_text("Logged through the proxy")).to_be_visible()
    expect(page.get_by_text("champion")).to_be_visible()
    watched.click(page.get_by_role("link", name="Version 1"))
    expect(page.get_by_role("link", name="quiet-marten")).to_be_visible()
    expect(page.get_by_role("row", name="Outputs (1)")).to_be_visible()  # from the model's own file on S3


@MODES
def test_without_the_slash(place: str, origin: str, watch: Watch) -> None:
    """MLflow's UI refers to its files relatively, so the address without the slash has to lead to the one with it."""
    watched = watch(f"{origin}/t/{place}")
    watched.open(f"{origin}/t/{place}")
    expect(watched.page).to_have_title(re.compile("MLflow$"))
    expect(way_in(watched.page, place)).to_be_visible()
    assert urlsplit(watched.page.url).path == f"/t/{place}/"


def test_a_target_that_does_not_exist(origin: str, profile: BrowserContext) -> None:
    watched = Watched(profile.new_page(), (origin,))
    watched.open(f"{origin}/t/nope/")
    expect(watched.page.get_by_text("There is no target 'nope'. Use /t/tracking/ or /t/app/")).to_be_visible()
    watched.settle()
    # Which also shows that what goes wrong in the other tests would be seen.
    assert f"404: GET {origin}/t/nope/" in watched.problems
    assert [problem for problem in watched.problems if problem.startswith("console: Failed to load resource")]
