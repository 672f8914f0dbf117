"""The proxy below a path of a real nginx, and behind one that sends a Host of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest
import requests
from tests.compat.client_runs import bare_environment
from tests.faults.certificates import Authority
from tests.faults.nginx import nginx
from tests.faults.proxies import Proxy, Table, free_port, running
from tests.integration.conftest import targets_of
from tests.portal.signing_in import Person, provider, site

from mlflow_proxy.access.session import Sessions
from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.portal.signin import HINT_COOKIE, STATE_COOKIE
from mlflow_proxy.settings import Server

PAGE = Path(__file__).parents[2] / "docs" / "deploy-nginx.md"
SEARCH = "api/2.0/mlflow/experiments/search"


def documented(prefix: str, onward: int, *, strips: bool = True) -> str:
    """The location that the documentation has, for another path and port."""
    location: str
    (location,) = re.findall(r"```nginx\n(location /mlflow/ .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    target = f"proxy_pass http://127.0.0.1:{onward}{'/' if strips else ''};"
    return location.replace("/mlflow/", f"{prefix}/").replace("proxy_pass http://127.0.0.1:8080/;", target)


def server(port: int, *locations: str, tls: tuple[Path, Path] | None = None) -> str:
    """`tls` are the files of a certificate and of its key."""
    certificate = f"ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]};" if tls else ""
    return f"server {{ listen 127.0.0.1:{port}{' ssl' if tls else ''}; {certificate} {' '.join(locations)} }}"


class Front(NamedTuple):
    """Addresses of one nginx, and the proxies behind it: below `known`, which the proxy has in its public_url, whether
    nginx takes it off (`known`) or leaves it (`left_in`, another port), and below paths that the proxy does not know.
    """

    known: str
    left_in: str
    unknown: str
    no_slashes: str
    proxy: Proxy


@pytest.fixture(scope="module")
def front(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    port, other = free_port(), free_port()
    common: dict[str, Any] = {"environ": sagemaker.environment()}
    known = {"public_url": f"http://127.0.0.1:{port}/tools/mlflow", "trusted_proxies": ["127.0.0.1"]}
    with ExitStack() as stack:
        knows = stack.enter_context(running(folder / "knows", targets_of(sagemaker), server=known, **common))
        not_told = stack.enter_context(running(folder / "not-told", targets_of(sagemaker), **common))
        bare = documented("/bare", not_told.port).replace("location /bare/", "location /bare")
        blocks = server(
            port, documented("/tools/mlflow", knows.port), documented("/unknown", not_told.port), bare
        ) + server(
            other,
            documented("/tools/mlflow", knows.port, strips=False),
            "location = /tools/mlflow "
            f"{{ proxy_pass http://127.0.0.1:{knows.port}; proxy_set_header Host $http_host; }}",
        )
        stack.enter_context(nginx(folder / "nginx", port, blocks))
        at = f"http://127.0.0.1:{port}"
        yield Front(
            f"{at}/tools/mlflow", f"http://127.0.0.1:{other}/tools/mlflow", f"{at}/unknown", f"{at}/bare", knows
        )


PLACES = pytest.mark.parametrize("place", ["known", "left_in", "unknown", "no_slashes"])


def get(url: str, **options: Any) -> requests.Response:
    return requests.get(url, timeout=30, allow_redirects=False, **options)


def as_page(url: str) -> requests.Response:
    return get(url, headers={"Accept": "text/html", "Sec-Fetch-Mode": "navigate"})


@PLACES
def test_redirects_stay_below_the_path(front: Front, place: str) -> None:
    base = getattr(front, place)
    for path, leads_to in (("/t/app", "/t/app/"), ("/t/app?a=b", "/t/app/?a=b"), ("/-", "/-/")):
        answer = get(base + path)
        assert answer.status_code == 308, answer.text
        assert urljoin(base + path, answer.headers["location"]) == base + leads_to


@PLACES
def test_every_link_of_a_page_leads_to_a_page(front: Front, place: str) -> None:
    base = getattr(front, place)
    assert get(f"{base}/-/ready").status_code == 200  # only what is ready has a link
    page = as_page(f"{base}/-/")
    links = [urljoin(page.url, link) for link in re.findall(r'href="([^"]+)"', page.text)]
    assert f"{base}/t/app/" in links
    for link in links:
        assert link.startswith(f"{base}/"), link
        if "/-/ui/" not in link:
            assert as_page(link).status_code == 200, link


@PLACES
@pytest.mark.parametrize("target", ["", "/t/tracking", "/t/app"])
def test_calls_and_the_ui(front: Front, place: str, target: str) -> None:
    base = getattr(front, place) + target
    answer = requests.post(f"{base}/{SEARCH}", json={"max_results": 1}, timeout=30)
    assert answer.status_code == 200, answer.text
    ui = as_page(f"{base}/")
    files = re.findall(r'(?:src|href)="\.?/?(static-files/[^"]+)"', ui.text)
    assert files
    assert get(urljoin(ui.url, files[0])).status_code == 200


@pytest.mark.parametrize("place", ["known", "left_in"])
def test_texts_name_the_whole_path(front: Front, place: str) -> None:
    base = getattr(front, place)
    assert "Use /tools/mlflow/t/tracking/ or" in get(f"{base}/t/nope/x").json()["message"]
    assert "See /tools/mlflow/-/ for" in get(f"{base}/-/nope").json()["message"]
    assert f">{front.known}/t/app<" in as_page(f"{base}/-/").text  # what callers have in MLFLOW_TRACKING_URI


def test_a_path_that_is_left_in(front: Front) -> None:
    """Taken off once, before anything is judged; without its slash it leads to the one with it."""
    assert get(f"{front.left_in}/-/health").json() == {"status": "ok"}
    answer = get(f"{front.left_in}?a=b")
    assert answer.status_code == 308
    assert urljoin(front.left_in, answer.headers["location"]) == f"{front.left_in}/?a=b"
    assert get(f"{front.left_in}/tools/mlflow/-/whoami").status_code == 404
    assert get(f"{front.left_in}/t/app/api/3.0/mlflow/mcp-servers/io.github.me%2Fweather").status_code != 400


_CLIENT = """
import sys
import mlflow
client = mlflow.MlflowClient()
experiment = client.create_experiment(sys.argv[1])
run = client.create_run(experiment).info.run_id
client.log_metric(run, "loss", 0.5)
client.log_batch(run, params=[mlflow.entities.Param("rate", "0.1")])
(found,) = client.search_runs([experiment], "metrics.loss < 1")
print(found.data.metrics, found.data.params)
"""


def test_the_mlflow_client_below_a_path(front: Front, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT, "below a path"],
        env=bare_environment(f"{front.known}/t/app", tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "{'loss': 0.5} {'rate': '0.1'}\n", done.stderr[-2000:]


def test_validate_below_a_path(front: Front, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("mlflow-proxy")), "validate", "--output", "json"]
    for url in (front.known, f"{front.left_in}/t/app/"):
        done = subprocess.run(
            [*command, "--url", url],
            env={"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        report = json.loads(done.stdout)
        results = {step["name"]: step["result"] for step in report["steps"]}
        assert {results[name] for name in ("health", "experiments/create", "runs/delete", "clean-up", "UI page")} == {
            "passed"
        }, report
        assert report["url"] == url.rstrip("/")


# Sign-in


@contextmanager
def signed_below(folder: Path, prefixes: tuple[str, ...]) -> Iterator[list[Person]]:
    """One person's browser, at proxies with sign-in below these paths of one host."""
    port, authority = free_port(), Authority(folder, "front")
    with ExitStack() as stack:
        at = stack.enter_context(provider())
        at.user("ada", groups=["ml-writers"])
        people, locations = [], []
        for prefix in prefixes:
            url = f"https://localhost:{port}{prefix}"
            of = stack.enter_context(site(folder / prefix[1:], at, tls=False, server={"public_url": url}))
            locations.append(documented(prefix, of.proxy.port))
            people.append(Person(replace(of, url=url, bundle=authority.bundle)))
        stack.enter_context(nginx(folder / "nginx", port, server(port, *locations, tls=authority.issue("localhost"))))
        for person in people:
            person.http = people[0].http
        yield people


def test_sign_in_and_out_below_a_path(tmp_path: Path) -> None:
    """At two proxies of one host, in one browser: a session at one leaves the other's alone."""
    with signed_below(tmp_path, ("/dev", "/prod")) as (dev, prod):
        for person, prefix in ((dev, "/dev"), (prod, "/prod")):
            base = person.site.url
            sent = person.get("/t/team/?x=1", headers={"Accept": "text/html"})
            assert sent.status_code == 303
            sign_in = urljoin(f"{base}/t/team/?x=1", sent.headers["location"])
            assert sign_in == f"{base}/-/sign-in?next=%2Ft%2Fteam%2F%3Fx%3D1"
            begun = person.ask(sign_in.removeprefix(base))
            assert parse_qs(urlsplit(begun).query)["redirect_uri"] == [f"{base}/-/signed-in"]
            assert person.cookie(f"{STATE_COOKIE}.{prefix[1:]}")
            back = person.agree(begun, "ada")
            done = person.back(back)
            assert urljoin(back, done.headers["location"]) == f"{base}/t/team/?x=1"
        assert {cookie.name: cookie.path for cookie in dev.http.cookies if "id-token" not in cookie.name} == {
            f"{Sessions.COOKIE}.dev": "/",
            f"{Sessions.COOKIE}.prod": "/",
        }
        assert {cookie.path for cookie in dev.http.cookies if cookie.name == HINT_COOKIE} == {
            "/dev/-/sign-out",
            "/prod/-/sign-out",
        }
        assert (dev.known(), prod.known()) == (True, True)
        asked = dev.get("/-/sign-out")
        (action,) = re.findall(r'<form method="post" action="([^"]+)"', asked.text)
        left = dev.http.post(urljoin(asked.url, action), timeout=30)
        (url,) = re.findall(r'href="([^"]+)"', left.text)
        query = parse_qs(urlsplit(url.replace("&amp;", "&")).query)
        assert query["post_logout_redirect_uri"] == [f"{dev.site.url}/-/sign-out"]
        assert query["id_token_hint"]
        assert (dev.known(), prod.known()) == (False, True)


# A Host of nginx's own


BROWSER = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}


@contextmanager
def default_host(folder: Path, targets: list[Table], environ: Table, **options: Any) -> Iterator[str]:
    """A proxy behind nginx without a word on Host, below the place where nginx sends the upstream's name, too."""
    port = free_port()
    at = f"http://localhost:{port}"
    if "public_url" in options:
        options["public_url"] = at
    with running(folder, targets, server=options, environ=environ) as proxy:
        onward = f"127.0.0.1:{proxy.port}"
        blocks = f"upstream backend {{ server {onward}; }}" + server(
            port, f"location / {{ proxy_pass http://{onward}; }}", "location /named/ { proxy_pass http://backend/; }"
        )
        with nginx(folder / "nginx", port, blocks):
            yield at


def test_the_default_host_says_what_to_set(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    with default_host(tmp_path / "proxy", targets_of(sagemaker), sagemaker.environment()) as at:
        assert as_page(f"{at}/").status_code == 200
        refused = requests.post(f"{at}/{SEARCH}", json={}, headers={**BROWSER, "Origin": at}, timeout=30)
        misdirected = get(f"{at}/named/")
    assert (refused.status_code, misdirected.status_code) == (403, 421)
    for answer in (refused, misdirected):
        assert "sets server.public_url to the address that browsers show" in answer.json()["message"]
        assert "proxy_set_header Host $http_host;" in answer.json()["message"]


def test_public_url_is_enough_for_the_default_host(sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    with default_host(tmp_path / "proxy", targets_of(sagemaker), sagemaker.environment(), public_url="") as at:
        own = requests.post(f"{at}/{SEARCH}", json={"max_results": 1}, headers={**BROWSER, "Origin": at}, timeout=30)
        assert own.status_code == 200, own.text
        other = at.replace("localhost", "127.0.0.1")
        refused = requests.post(f"{at}/{SEARCH}", json={}, headers={**BROWSER, "Origin": other}, timeout=30)
        misdirected = get(f"{at}/named/")
    assert (refused.status_code, misdirected.status_code) == (403, 421)
    for answer in (refused, misdirected):
        assert f"Open {at} instead (server.public_url)." in answer.json()["message"]
        assert "proxy_set_header Host $http_host;" in answer.json()["message"]


def test_the_prefix_is_not_of_the_origin() -> None:
    """What a browser sends as Origin has no path."""
    address = Server(public_url="https://Tools.example:8443/mlflow/").address
    assert address is not None
    assert (address.endpoint.url, address.prefix) == ("https://tools.example:8443", "/mlflow")
