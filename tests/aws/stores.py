"""Credential stores for tests: targets, an environment of the test's own, and a store that lives as long as a test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mlflow_proxy.aws.credentials import CredentialStore
from mlflow_proxy.settings import Aws
from mlflow_proxy.targets import Target, default_endpoint, parse_arn

STATIC = {"AWS_ACCESS_KEY_ID": "AKIASTATIC", "AWS_SECRET_ACCESS_KEY": "static-secret"}


def setenv(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def a_target(name: str = "dev", role: str | None = None, **more: Any) -> Target:
    arn = parse_arn(f"arn:aws:sagemaker:eu-west-1:111122223333:mlflow-tracking-server/{name}")
    return Target(name, arn, default_endpoint(arn), assume_role_arn=role, **more)


def run(
    test: Callable[[CredentialStore], Coroutine[Any, Any, None]],
    *targets: Target,
    aws: Aws | None = None,
    proxy: str | None = None,
) -> None:
    """Start a store, run `test` on it, close it."""

    async def main() -> None:
        store = CredentialStore(targets or (a_target(),), aws or Aws(), proxy=proxy)
        await store.start()
        try:
            await test(store)
        finally:
            await store.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.05)
