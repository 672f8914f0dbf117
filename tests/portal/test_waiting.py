"""Pages that wait for a service which says nothing: some wait, and all other pages are answered meanwhile."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.faults.proxies import Proxy, running, target
from tests.faults.upstreams import Arrived, Peer, Upstream, answer

from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.portal.places import DEADLINE, MOST_WAITING

_PAGES = 8
_ROLE = {"name": "all", "groups": ["*"], "targets": ["*"], "allow": ["*"]}


class Silent(Upstream):
    """Answers nobody before `released`; then, whatever was asked, with `body`."""

    def __init__(self, body: bytes = b"{}") -> None:
        super().__init__()
        self.released = threading.Event()

        def script(peer: Peer, _: Arrived) -> None:
            self.released.wait(60)
            peer.send(answer(body, "200 OK", "Content-Type: application/json"))

        self.script = script


@pytest.fixture
def well() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


def call(proxy: Proxy, path: str, method: str = "GET", **headers: str) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        url = f"http://127.0.0.1:{proxy.port}{path}"
        return session.request(method, url, headers=headers, timeout=2 * DEADLINE, allow_redirects=False)


def crowd(
    one: Callable[[], requests.Response], others: Callable[[], None], release: Callable[[], None]
) -> tuple[list[requests.Response], list[requests.Response]]:
    """Ask for a page so often at once that some must be turned away; who were, and who waited until `release`.

    `others` is called in between, while the latter wait.
    """
    with ThreadPoolExecutor(_PAGES) as threads:
        try:
            waiting: set[Future[requests.Response]] = {threads.submit(one) for _ in range(_PAGES)}
            turned_away = []
            while len(waiting) > MOST_WAITING:
                done, waiting = wait(waiting, DEADLINE / 3, FIRST_COMPLETED)
                assert done, "nobody was turned away"
                turned_away += [each.result() for each in done]
            others()
            assert not any(each.done() for each in waiting)
        finally:
            release()
        return turned_away, [each.result() for each in waiting]


def answered(proxy: Proxy, **headers: str) -> None:
    for path in ("/-/metrics", "/-/ready", "/-/", "/-/version"):
        assert call(proxy, path, **headers).status_code == 200, path


def test_links_while_sagemaker_says_nothing(tmp_path: Path, well: Upstream) -> None:
    sagemaker = Silent(b'{"AuthorizedUrl": "https://ui.example.com/?authToken=x"}')
    sections = {"aws": {"sagemaker_endpoint": f"http://127.0.0.1:{sagemaker.port}"}}
    targets = [target("team", f"http://127.0.0.1:{well.port}")]
    try:
        with running(tmp_path / "proxy", targets, sections=sections) as proxy:
            turned_away, waited = crowd(
                lambda: call(proxy, "/-/ui/team", "POST"), lambda: answered(proxy), sagemaker.released.set
            )
            assert [each.status_code for each in turned_away] == [503] * (_PAGES - MOST_WAITING)
            assert all(int(each.headers["retry-after"]) > 0 for each in turned_away)
            assert "Try again" in turned_away[0].json()["message"]
            assert [each.status_code for each in waited] == [200] * MOST_WAITING
            assert call(proxy, "/-/ui/team", "POST").status_code == 200  # all places are free again
    finally:
        sagemaker.released.set()
        sagemaker.close()


def test_sign_in_while_the_provider_says_nothing(tmp_path: Path, well: Upstream) -> None:
    provider = Silent()
    key, record = make_key("ops", "all", created=datetime.now(UTC), expires=None)
    keys = tmp_path / "keys.jsonl"
    keys.write_text(json.dumps(record.fields()) + "\n")
    keys.chmod(0o600)
    sections: dict[str, dict[str, Any]] = {
        "access": {"keys_file": str(keys)},
        "oidc": {"issuer": f"http://127.0.0.1:{provider.port}", "audience": ["mlflow"], "client_id": "mlflow"},
    }
    targets = [target("team", f"http://127.0.0.1:{well.port}")]
    try:
        with running(tmp_path / "proxy", targets, sections=sections, roles=[_ROLE]) as proxy:
            turned_away, waited = crowd(
                lambda: call(proxy, "/-/sign-in"),
                lambda: answered(proxy, **{"X-API-Key": key}),
                provider.released.set,
            )
            assert [each.status_code for each in turned_away] == [503] * (_PAGES - MOST_WAITING)
            for page in turned_away:
                assert int(page.headers["retry-after"]) > 0
                assert page.headers["content-type"].startswith("text/html")
                assert "<h1>Too many are waiting</h1>" in page.text
            assert all("<h1>The provider cannot be reached</h1>" in page.text for page in waited)
    finally:
        provider.released.set()
        provider.close()


def test_the_overview_waits_for_no_target(tmp_path: Path, well: Upstream) -> None:
    """It shows what was measured last, and is being measured; and however many look, each target is asked once."""
    silent = Silent()
    targets = [target("silent", f"http://127.0.0.1:{silent.port}"), target("well", f"http://127.0.0.1:{well.port}")]
    try:
        with running(tmp_path / "proxy", targets, server={"ready_max_age": 0.2}) as proxy:
            with ThreadPoolExecutor(4 * _PAGES) as threads:
                pages = list(threads.map(lambda _: call(proxy, "/-/"), range(4 * _PAGES)))
                assert call(proxy, "/-/version").status_code == 200
            assert {page.status_code for page in pages} == {200}
            assert all("… being checked" in page.text and "t/silent/" not in page.text for page in pages)
            assert 'http-equiv="refresh"' in pages[0].text  # nothing to show yet
            well.wait_for(1)
            silent.wait_for(1)
            assert len(silent.arrived) == 1
            silent.released.set()
            reloaded(proxy, lambda text: text.count("● ready") == len(targets))
            assert 'http-equiv="refresh"' not in call(proxy, "/-/").text
            well.close()
            page = reloaded(proxy, lambda text: "▲ not ready" in text)
            assert "measured" in page
            assert re.findall(r'href="(\.\./t/[^"]+)"', page) == ["../t/silent/"]  # the one that is up
    finally:
        silent.released.set()
        silent.close()


def reloaded(proxy: Proxy, done: Callable[[str], bool]) -> str:
    """The overview, as soon as it shows what is wanted."""
    for _ in range(200):
        text = call(proxy, "/-/").text
        if done(text):
            return text
    raise AssertionError(text)
