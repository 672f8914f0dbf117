"""Takes the pictures of the documentation: python -m scripts.screenshots

Starts a local SageMaker, the proxy before it and Chromium, and writes docs/images/overview.png and docs/images/ui.png.
"""

from __future__ import annotations

import tempfile
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from playwright.sync_api import Browser, expect
from tests.browser.chromium import Watched, chromium, context
from tests.browser.mlflow_ui import open_run, show_charts
from tests.browser.seed import seed
from tests.faults.proxies import running

from mlflow_proxy.access.key_file import change_keys
from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PUBLIC_URL = "https://mlflow.example.com"


def main() -> None:
    """Take all pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="screenshots-") as folder, LocalSageMaker(Path(folder)) as sagemaker:
        targets = tomllib.loads(sagemaker.proxy_toml())["targets"]
        now = datetime.now(UTC)
        key, line = make_key("alice", "scientist", created=now, expires=now + timedelta(days=1))
        with change_keys(Path(folder) / "keys.jsonl", create=True) as kept:
            kept.append(line)
        guarded = running(
            Path(folder) / "guarded",
            targets,
            server={"public_url": PUBLIC_URL},
            sections={"access": {"keys_file": str(Path(folder) / "keys.jsonl")}},
            roles=[{"name": "scientist", "targets": ["*"], "allow": ["*", "CreatePresigned*"]}],
            environ=sagemaker.environment(),
        )
        with guarded as serving, chromium() as browser:
            overview(browser, f"http://127.0.0.1:{serving.port}", key)
        with running(Path(folder) / "open", targets, environ=sagemaker.environment()) as serving, chromium() as browser:
            ui(browser, f"http://127.0.0.1:{serving.port}")
    for image in sorted(IMAGES.glob("*.png")):
        print(f"{image.relative_to(Path.cwd())}: {image.stat().st_size >> 10} KB")


def overview(browser: Browser, origin: str, key: str) -> None:
    """The overview page with both targets ready, for somebody with a key."""
    with context(browser, (1120, 540), http_credentials={"username": "any", "password": key}) as profile:
        page = profile.new_page()
        page.goto(f"{origin}/-/")
        expect(page.get_by_text("All targets are ready.")).to_be_visible()
        page.screenshot(path=IMAGES / "overview.png")


def ui(browser: Browser, origin: str) -> None:
    """MLflow's UI through the proxy: the metrics of a run."""
    base = f"{origin}/t/app"
    with context(browser, (1120, 660)) as profile:
        watched = Watched(profile.new_page(), (base,))
        open_run(watched, base, seed(base), "quick-otter")
        watched.page.get_by_role("button", name="Close", exact=True).click()  # MLflow's assistant
        show_charts(watched)
        watched.check()
        watched.page.screenshot(path=IMAGES / "ui.png")


if __name__ == "__main__":
    main()
