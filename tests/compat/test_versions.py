"""Clients and servers of different versions, with the proxy between them: everything that both have works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.compat.client_runs import FOUND, run_lifecycle
from tests.compat.environments import NEWEST, OLDEST, python_of

# Parts that a client or server does not have yet, by its version; all others must be found.
WITHOUT: dict[str, set[str]] = {
    OLDEST: {"logged models", "traces", "assessments", "spans"},
    "3.0.1": {"traces", "assessments", "spans"},
    "3.10.1": set(),
    NEWEST: set(),
}
# What MLflow itself finds differently between two versions, without any proxy too.
DIFFERENT: dict[tuple[str, str], dict[str, Any]] = {
    # The client adds "and it is no prompt" to the filter, which the old server finds true of no model without tags.
    (NEWEST, OLDEST): {"registry: pages": [0]},
}
MODES = {"tracking": "", "app": "/t/app"}


def check(answer: dict[str, Any], client: str, server: str) -> None:
    assert answer["client"] == client
    assert set(answer["skipped"]) == WITHOUT[client] | WITHOUT[server]
    assert set(answer["found"]) == set(FOUND) - set(answer["skipped"])
    different = {
        f"{name}: {key}": value
        for name, found in answer["found"].items()
        for key, value in found.items()
        if value != FOUND[name].get(key)
    }
    assert different == DIFFERENT.get((client, server), {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "server_url",
    [OLDEST, pytest.param("3.0.1", marks=pytest.mark.compat), pytest.param("3.10.1", marks=pytest.mark.compat)],
    indirect=True,
)
def test_the_newest_client_with_an_older_server(server_url: tuple[str, str], mode: str, tmp_path: Path) -> None:
    url, server = server_url
    check(run_lifecycle(python_of(NEWEST), url + MODES[mode], server, tmp_path), NEWEST, server)


@pytest.mark.parametrize("server_url", [OLDEST, pytest.param("3.0.1", marks=pytest.mark.compat)], indirect=True)
def test_a_client_as_old_as_the_server(server_url: tuple[str, str], tmp_path: Path) -> None:
    url, server = server_url
    check(run_lifecycle(python_of(server), url, server, tmp_path), server, server)
