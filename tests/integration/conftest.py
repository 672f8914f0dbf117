"""The proxy, as an operator runs it, before the session's local SageMaker."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.faults.proxies import Proxy, Table, running

from mlflow_proxy.local import LocalSageMaker


def targets_of(sagemaker: LocalSageMaker) -> list[Table]:
    """The `[[targets]]` tables for all its targets; the tracking server is the default."""
    targets: list[Table] = tomllib.loads(sagemaker.proxy_toml())["targets"]
    return targets


@pytest.fixture(scope="session")
def proxy(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy with all targets, which signs as the default principal."""
    folder = tmp_path_factory.mktemp("proxy")
    with running(folder, targets_of(sagemaker), environ=sagemaker.environment()) as running_proxy:
        yield running_proxy


@pytest.fixture(scope="session")
def proxy_url(proxy: Proxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


@pytest.fixture(params=["tracking", "app"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mode_url(proxy_url: str, mode: str) -> str:
    """What MLFLOW_TRACKING_URI is for a mode: the tracking server is the default target."""
    return proxy_url if mode == "tracking" else f"{proxy_url}/t/{mode}"


class Control:
    """The stand-in's admin endpoint."""

    def __init__(self, endpoint: str) -> None:
        self._root = f"{endpoint}/_local/"

    def __call__(self, method: str, path: str, values: Mapping[str, Any] | None = None) -> Any:
        answer = requests.request(method, self._root + path, json=values, timeout=30)
        assert answer.ok, answer.text
        return answer.json()

    def reset(self) -> None:
        """No faults, the right time, credentials that live as long as they say, all servers running, no journal."""
        self("DELETE", "faults")
        self("DELETE", "requests")
        self("POST", "servers/tracking/start")


@pytest.fixture
def control(sagemaker: LocalSageMaker) -> Iterator[Control]:
    control = Control(sagemaker.admin_endpoint)
    control.reset()
    yield control
    control.reset()


Start = Callable[..., Proxy]


@pytest.fixture
def start(sagemaker: LocalSageMaker, tmp_path: Path) -> Iterator[Start]:
    """Starts a proxy of the test's own: `start(environ, {"tracking": {…options}})`, by default with all targets."""
    with ExitStack() as stack:

        def begin(environ: Mapping[str, str] | None = None, wanted: Mapping[str, Table] | None = None) -> Proxy:
            options = wanted or {name: {} for name in ("tracking", "app", "cross-account")}
            targets: list[Table] = [
                {**each, **options[each["name"]]} for each in targets_of(sagemaker) if each["name"] in options
            ]
            folder = tmp_path / f"proxy {len(list(tmp_path.iterdir()))}"
            environ = sagemaker.environment() if environ is None else environ
            return stack.enter_context(running(folder, targets, environ=environ))

        yield begin


@pytest.fixture
def container(sagemaker: LocalSageMaker) -> Callable[[str, int], dict[str, str]]:
    """The environment of a container whose role's credentials live so many seconds."""

    def environment(role: str, lifetime: int) -> dict[str, str]:
        kept = {name: value for name, value in sagemaker.environment().items() if "KEY" not in name}
        link = f"{sagemaker.admin_endpoint}/_local/container-credentials/{role}?lifetime={lifetime}"
        # An empty key is no key: tests.faults.proxies gives one unless it is told.
        return {**kept, **NO_KEYS, "AWS_CONTAINER_CREDENTIALS_FULL_URI": link}

    return environment


NO_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
