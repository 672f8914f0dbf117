"""`/-/whoami`: whom the proxy takes a caller for, and what they may know of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from tests.faults.proxies import APP_ARN, Proxy, running, target
from tests.faults.upstreams import Upstream

from mlflow_proxy.access.key_record import make_key

_NOWHERE = "http://127.0.0.1:9"
_ROLES: list[Mapping[str, Any]] = [
    {"name": "reader", "targets": ["prod"], "allow": ["Get*"]},
    {"name": "linker", "targets": ["*"], "allow": ["CreatePresigned*"], "subjects": ["key:both"]},
    {"name": "both", "targets": ["app"], "allow": ["Get*"]},
]


class Site(NamedTuple):
    proxy: Proxy
    keys: dict[str, str]

    def ask(self, key: str | None, method: str = "GET") -> requests.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {self.keys[key]}"}
        url = f"http://127.0.0.1:{self.proxy.port}/-/whoami"
        return requests.request(method, url, headers=headers, timeout=30, allow_redirects=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("whoami")
    keys = folder / "keys.jsonl"
    made = {name: make_key(name, name, created=datetime.now(UTC), expires=None) for name in ("reader", "both", "none")}
    keys.write_text("".join(f"{json.dumps(kept.fields())}\n" for _, kept in made.values()))
    targets = [target("prod", _NOWHERE, default=True), {**target("app", _NOWHERE), "arn": APP_ARN}]
    with running(folder, targets, sections={"access": {"keys_file": str(keys)}}, roles=_ROLES) as proxy:
        yield Site(proxy, {name: key for name, (key, _) in made.items()})


def test_a_caller_learns_of_their_own_targets_only(site: Site) -> None:
    answer = site.ask("reader")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    prod = {"mode": "mlflow-tracking-server", "default": True, "ui_link": False}
    assert answer.json() == {"caller": "key:reader", "way": "key", "roles": ["reader"], "targets": {"prod": prod}}


def test_several_roles(site: Site) -> None:
    told = site.ask("both").json()
    assert told["roles"] == ["linker", "both"]
    assert told["targets"]["app"] == {"mode": "mlflow-app", "default": False, "ui_link": True}
    assert told["targets"].keys() == {"prod", "app"}


def test_others_learn_nothing(site: Site) -> None:
    assert site.ask(None).status_code == 401
    refused = site.ask("none")
    assert refused.status_code == 403
    assert "prod" not in refused.text
    assert site.ask("reader", "POST").status_code == 405


def test_where_nobody_is_identified(tmp_path: Path) -> None:
    upstream = Upstream()
    with running(tmp_path, [target("prod", f"http://127.0.0.1:{upstream.port}")]) as proxy:
        told = Site(proxy, {}).ask(None).json()
    upstream.close()
    assert (told["caller"], told["way"], told["roles"]) == ("anonymous", "anonymous", [])
    assert told["targets"]["prod"]["default"] is True
    assert told["targets"]["prod"]["ui_link"] is True
    assert not upstream.arrived


def test_it_is_in_the_log(site: Site) -> None:
    line = site.proxy.log_line(site.ask("reader").headers["x-request-id"])
    assert (line["route"], line["caller"], line["target"]) == ("/-/whoami", "key:reader", "-")


def test_the_key_is_not_told(site: Site) -> None:
    assert site.keys["reader"] not in site.ask("reader").text + Path(site.proxy.stdout).read_text()
