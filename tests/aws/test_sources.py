"""When credentials are fetched again."""

from __future__ import annotations

import pytest

from mlflow_proxy.aws import sources
from mlflow_proxy.aws.credentials import Credentials


@pytest.mark.parametrize(
    ("provider", "remaining", "rotated", "least", "most"),
    [
        ("assume-role", None, True, None, None),
        ("assume-role", 3600, True, 2400, 2700),
        ("assume-role", 43200, True, 42000, 42300),
        ("assume-role", 40, True, 27, 30),
        ("container-role", 3000, False, 45, 60),
        ("iam-role", 20000, True, 180, 240),
        ("iam-role", 1, False, 1, 1),
    ],
)
def test_when_to_renew(
    provider: str, remaining: float | None, rotated: bool, least: float | None, most: float | None
) -> None:
    expires_at = None if remaining is None else 1000.0 + remaining
    fetched = Credentials("AKIA", "secret", None, expires_at, provider)
    for _ in range(200):
        delay = sources._renewal_delay(fetched, 1000.0, rotated=rotated)
        if least is None or most is None:
            assert delay is None
        else:
            assert delay is not None
            assert least <= delay <= most


def test_backoff_is_capped() -> None:
    assert 0.75 <= sources._backoff(1) <= 1.25
    assert 3 <= sources._backoff(3) <= 5
    assert all(sources._backoff(failed) <= 75 for failed in range(1, 5000))
