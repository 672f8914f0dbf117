"""MLflow's UI as a person uses it: where to click, and how to tell that it is there."""

from __future__ import annotations

import re
from dataclasses import replace

from playwright.sync_api import Locator, Page, expect
from tests.browser.chromium import Watched
from tests.browser.seed import RUNS, Seeded

# The line that Plotly drew, in pixels; nothing if it drew none.
_LINES = """plot => [...plot.querySelectorAll('path.js-line')].map(line => {
  const box = line.getBBox();
  return [box.width, box.height, line.getTotalLength()];
})"""


def way_in(page: Page, mode: str) -> Locator:
    """Where the front page leads: an App's to a workspace, a tracking server's to the experiments."""
    return page.get_by_role("link", name="default" if mode == "app" else "Experiments", exact=True)


def list_experiments(watched: Watched, base: str, seeded: Seeded) -> Locator:
    """From the front page to the list of experiments, filtered by name. Returns the experiment's link."""
    page = watched.page
    watched.open(replace(seeded, base=base).page("/"))
    expect(page).to_have_title(re.compile("MLflow$"))
    watched.click(page.get_by_role("link", name="Experiments", exact=True))
    page.get_by_placeholder("Search experiments").fill(seeded.experiment)
    watched.settle()
    page.get_by_placeholder("Search experiments").press("Enter")
    link = page.get_by_role("link", name=seeded.experiment, exact=True)
    expect(link).to_be_visible()
    return link


def open_run(watched: Watched, base: str, seeded: Seeded, run: str) -> None:
    """From the front page, by clicks only, to a run's page."""
    page = watched.page
    link = list_experiments(watched, base, seeded)
    watched.click(page.get_by_text("Model training", exact=True))  # so that the experiment opens with its runs
    watched.click(link)
    for name in RUNS:
        expect(page.get_by_role("link", name=name)).to_be_visible()
    watched.click(page.get_by_role("link", name=run))
    expect(page.get_by_role("heading", name=run)).to_be_visible()
    expect(page.get_by_text(seeded.runs[run], exact=True)).to_be_visible()


def show_charts(watched: Watched) -> None:
    """From a run's page to its metrics' charts; fails unless lines are really drawn there."""
    page = watched.page
    watched.click(page.get_by_role("tab", name="Model metrics"))
    plots = page.locator(".js-plotly-plot")
    expect(plots).to_have_count(2)  # accuracy and loss
    for plot in plots.all():
        expect(plot.locator("path.js-line").first).to_be_visible()
        lines = plot.evaluate(_LINES)
        width, height, length = lines[0]
        assert width > 100, lines
        assert height > 80, lines
        assert length > (width**2 + height**2) ** 0.5, lines  # a curve, longer than the straight way
        expect(plot.get_by_text("Step", exact=True)).to_be_visible()
