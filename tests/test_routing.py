"""Which target a path is for."""

from __future__ import annotations

import pytest

from mlflow_proxy.errors import Refusal
from mlflow_proxy.routing import Routes
from mlflow_proxy.targets import Target, default_endpoint, parse_arn


def target(name: str, *, default: bool = False) -> Target:
    arn = parse_arn(f"arn:aws:sagemaker:us-east-1:123456789012:mlflow-app/{name}")
    return Target(name, arn, default_endpoint(arn), default=default)


DEV, PROD = target("dev", default=True), target("prod")
ROUTES = Routes([DEV, PROD])
NO_DEFAULT = Routes([target("dev"), PROD])


def everything() -> set[str]:
    return {"dev", "prod"}


@pytest.mark.parametrize(
    ("path", "name", "prefix", "rest"),
    [
        ("/", "dev", "", "/"),
        ("/api/2.0/mlflow/runs/get", "dev", "", "/api/2.0/mlflow/runs/get"),
        ("/t/prod/", "prod", "/t/prod", "/"),
        ("/t/prod/api/2.0/x", "prod", "/t/prod", "/api/2.0/x"),
        ("/t/dev/api", "dev", "/t/dev", "/api"),
        ("/t/dev/t/prod/x", "dev", "/t/dev", "/t/prod/x"),
        ("/t/prod/-/health", "prod", "/t/prod", "/-/health"),
        ("/t/prod/a%2Fb", "prod", "/t/prod", "/a%2Fb"),
        ("/tx/prod", "dev", "", "/tx/prod"),
        ("/api/t/prod/", "dev", "", "/api/t/prod/"),
        ("/T/prod/", "dev", "", "/T/prod/"),
    ],
)
def test_route(path: str, name: str, prefix: str, rest: str) -> None:
    route = ROUTES.find(path, "a=1", everything)
    assert (route.target.name, route.prefix, route.path) == (name, prefix, rest)


@pytest.mark.parametrize(
    "path", ["/t", "/t/", "/t/other", "/t/other/api", "/t/PROD/", "/t/prod.", "/t/prod%20/", "/t/t/prod/", "/t/pro/"]
)
def test_unknown_target(path: str) -> None:
    with pytest.raises(Refusal) as caught:
        ROUTES.find(path, "", everything)
    assert caught.value.status == 404
    assert "/t/dev/ or /t/prod/" in caught.value.message


def test_no_default() -> None:
    with pytest.raises(Refusal) as caught:
        NO_DEFAULT.find("/api/2.0/x", "", everything)
    assert caught.value.status == 404
    assert "/t/dev/ or /t/prod/" in caught.value.message
    assert NO_DEFAULT.find("/t/prod/x", "", everything).target is PROD


@pytest.mark.parametrize(
    ("visible", "told"), [({"prod"}, "There is no target 'x'. Use /t/prod/."), (set(), "There is no target 'x'.")]
)
def test_only_targets_that_the_caller_may_know_of_are_told(visible: set[str], told: str) -> None:
    with pytest.raises(Refusal) as caught:
        ROUTES.find("/t/x/", "", lambda: visible)
    assert caught.value.message == told
    with pytest.raises(Refusal) as caught:
        NO_DEFAULT.find("/", "", lambda: visible)
    assert caught.value.message == told.replace("target 'x'", "default target")


def test_the_default_is_known() -> None:
    assert ROUTES.is_default("dev")
    assert not ROUTES.is_default("prod")
    assert not NO_DEFAULT.is_default("dev")


@pytest.mark.parametrize(("query", "location"), [("", "prod/"), ("a=1&b=%20", "prod/?a=1&b=%20")])
def test_target_without_slash_is_redirected(query: str, location: str) -> None:
    with pytest.raises(Refusal) as caught:
        ROUTES.find("/t/prod", query, everything)
    status, headers, _ = caught.value.answer("a" * 16)
    assert status == 308
    assert (b"location", location.encode()) in headers


def test_by_name() -> None:
    assert ROUTES.by_name("prod", everything) is PROD
    with pytest.raises(Refusal) as caught:
        ROUTES.by_name("nope", everything)
    assert caught.value.status == 404
