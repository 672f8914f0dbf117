"""Every route of the installed MLflow, called through the proxy and straight at MLflow: the answers are the same.

The routes are listed from MLflow itself, so a new MLflow that has more of them fails the first test until they are
called too (tests/integration/routes.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.integration.lanes import AS_THE_GATE, Lane, Pair, spoiled, twin_of
from tests.integration.routes import FAMILIES, Call

from mlflow_proxy.local import LocalSageMaker

# Rules that are not called, each with its reason. None so far: the local gate lets its default principal do everything.
NOT_CALLED: dict[tuple[str, str], str] = {}

# Calls whose bad forms are not tried: they would not be bad.
NOT_SPOILED = {
    "/ajax-api/3.0/mlflow/demo/generate": "makes all demos, for half a minute",
    "/ajax-api/3.0/mlflow/demo/delete": "takes no input",
}

_LIST_RULES = """
import json, re
from mlflow.server import app
from mlflow.server.fastapi_app import app as fastapi_app

def walk(routes, prefix=""):
    for route in routes:
        if hasattr(route, "original_router"):
            yield from walk(route.original_router.routes, prefix + route.include_context.prefix)
        elif getattr(route, "methods", None):
            yield from ((method, prefix + route.path) for method in route.methods)
        elif getattr(route, "routes", None):
            yield from walk(route.routes, prefix + route.path)

rules = [(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods]
rules += walk(fastapi_app.routes)
plain = {(method, re.sub(r"<(?:\\w+:)?(\\w+)>|\\{(\\w+):path\\}", r"{\\1\\2}", rule)) for method, rule in rules}
print(json.dumps(sorted(pair for pair in plain if pair[0] not in ("HEAD", "OPTIONS"))))
"""

TWINS = ("api", "ajax")


def calls_of(family: str, twin: str) -> list[Call]:
    """A family's calls in one of the two namespaces; what has no twin is called once, with `api`'s."""
    calls = [twin_of(call, twin) for call in FAMILIES[family]]
    if twin == "ajax" and all(call.rule == old.rule for call, old in zip(calls, FAMILIES[family], strict=True)):
        return []
    return calls


def own_calls(family: str, twin: str) -> Iterator[Call]:
    """A family's calls, one of each rule, without those that only set the scene, which belong to an earlier family."""
    names = list(FAMILIES)
    earlier = (call for name in names[: names.index(family)] for call in calls_of(name, twin))
    seen = {(call.method, call.rule) for call in earlier}
    for call in calls_of(family, twin):
        if (call.method, call.rule) not in seen and call.rule not in NOT_SPOILED:
            seen.add((call.method, call.rule))
            yield call


@pytest.fixture(scope="session")
def pairs(sagemaker: LocalSageMaker, proxy_url: str) -> dict[str, Pair]:
    """The lanes of each mode. The default target is called as such and by its name, in turn."""
    prefixes = {"tracking": ("", "/t/tracking"), "app": ("/t/app",)}
    return {
        mode: Pair(
            Lane("viaproxy", proxy_url, prefixes[mode]),
            Lane("straight", sagemaker.mlflow_urls[mode], headers=AS_THE_GATE),
        )
        for mode in prefixes
    }


def test_every_rule_is_called() -> None:
    environment = {**os.environ, "_MLFLOW_SERVER_FILE_STORE": "sqlite://", "_MLFLOW_SERVER_ARTIFACT_ROOT": "s3://a/b"}
    done = subprocess.run(
        [sys.executable, "-c", _LIST_RULES], env=environment, capture_output=True, text=True, check=True
    )
    rules = {tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])}
    called = {(call.method, call.rule) for twin in TWINS for family in FAMILIES for call in calls_of(family, twin)}
    assert len(rules) > 450
    assert called - rules == set()
    assert rules - called == set(NOT_CALLED)


@pytest.mark.parametrize("mode", ["tracking", "app"])
@pytest.mark.parametrize(
    ("family", "twin"), [(family, twin) for family in FAMILIES for twin in TWINS if calls_of(family, twin)]
)
def test_answers_are_the_same(pairs: dict[str, Pair], mode: str, family: str, twin: str) -> None:
    pair = pairs[mode]
    for lane in pair:
        lane.begin(f"{twin}{list(FAMILIES).index(family)}")
    calls = calls_of(family, twin)
    problems: list[str] = []
    for call in (replace(call, expect=call.expected_of(mode)) for call in calls):
        problems += pair.compare(call, "valid")
    for call in own_calls(family, twin):
        for label, bad, body in spoiled(call):
            problems += pair.compare(bad, label, body)
    for call in own_calls(family, twin):
        ways = {prefix for prefix, method, rule in pair.proxied.used if (method, rule) == (call.method, call.rule)}
        assert ways == set(pair.proxied.prefixes), f"{call.rule} was not called in every way"
    assert not problems, f"{len(problems)} differences\n" + "\n".join(problems[:20])


@pytest.mark.parametrize("mode", ["tracking", "app"])
def test_the_files_of_the_ui(pairs: dict[str, Pair], mode: str) -> None:
    """The page, the files that it names, and of those that its scripts load later the first of each kind."""
    pair = pairs[mode]
    page = pair.straight.send(Call("GET", "/"), turn=0).body.decode()
    named = re.findall(r"""(?:src|href)="\.?/?(static-files/[^"]+)""", page)
    assert len(named) >= 3
    manifest = pair.straight.send(Call("GET", "/static-files/asset-manifest.json"), turn=0)
    kinds: dict[str, str] = {}
    for path in json.loads(manifest.body)["files"].values():
        kinds.setdefault(path.rsplit(".", 1)[-1], path.lstrip("./"))
    later = [path if path.startswith("static-files/") else f"static-files/{path}" for path in kinds.values()]
    assert {"js", "css", "svg"} <= set(kinds)
    problems: list[str] = []
    for path in ["", *named, *later]:
        for turn in range(len(pair.proxied.prefixes)):
            problems += pair.compare(Call("GET", f"/{path}"), "valid", turn=turn)
    for call in (Call("HEAD", "/"), Call("HEAD", f"/{named[0]}"), Call("OPTIONS", "/version")):
        problems += pair.compare(call, "valid")
    assert problems == []


@pytest.mark.parametrize("mode", ["tracking", "app"])
def test_a_file_that_the_browser_has(pairs: dict[str, Pair], mode: str) -> None:
    """304 for what has not changed, and a range of what has."""
    pair = pairs[mode]
    call = Call("GET", "/static-files/asset-manifest.json")
    etag = pair.straight.send(call).headers["etag"]
    problems = [*pair.compare(replace(call, headers={"if-none-match": etag}, expect=304), "valid")]
    problems += pair.compare(replace(call, headers={"range": "bytes=5-20"}, expect=206), "valid")
    assert problems == []
