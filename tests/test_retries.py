"""When a request may be sent once more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy import retries
from mlflow_proxy.http1 import AnswerTimeout, BrokenAnswer, Disconnected, NotSent, UpstreamError
from mlflow_proxy.upstream import Busy, NotConnected

IDEMPOTENT = ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"]
OTHERS = ["POST", "PATCH", "PROPFIND", "LOCK", "get"]


@pytest.mark.parametrize("method", [*IDEMPOTENT, *OTHERS])
def test_any_method_repeats_when_nothing_was_sent(method: str) -> None:
    assert retries.may_repeat(NotConnected("refused"), method)
    assert retries.may_repeat(NotSent("closed before the request was sent"), method)


@pytest.mark.parametrize("method", IDEMPOTENT)
def test_idempotent_method_repeats_when_no_answer_began(method: str) -> None:
    assert retries.may_repeat(Disconnected("reset"), method)
    assert not retries.may_repeat(Disconnected("reset", begun=True), method)


@pytest.mark.parametrize("method", OTHERS)
def test_other_method_never_repeats_once_sent(method: str) -> None:
    assert not retries.may_repeat(Disconnected("reset"), method)


@pytest.mark.parametrize("method", [*IDEMPOTENT, *OTHERS])
@pytest.mark.parametrize(
    "error",
    [AnswerTimeout("slow"), BrokenAnswer("bad"), Busy("full"), UpstreamError("x"), BrokenAnswer("x", begun=True)],
)
def test_other_failures_never_repeat(error: UpstreamError, method: str) -> None:
    assert not retries.may_repeat(error, method)


def test_first_repetition_of_a_lost_connection_is_at_once() -> None:
    assert {retries.delay(1) for _ in range(50)} == {0.0}


@given(attempt=st.integers(2, 20))
def test_delay_has_full_jitter_below_a_growing_ceiling(attempt: int) -> None:
    ceiling = min(2.0, 0.1 * 2**attempt)
    delays = [retries.delay(attempt) for _ in range(200)]
    assert 0 <= min(delays) < ceiling * 0.2
    assert ceiling * 0.8 < max(delays) <= ceiling


@given(attempt=st.integers(1, 20))
def test_throttled_delay_is_never_short(attempt: int) -> None:
    """The service asked for less: the pause is at least half the ceiling, which is twice that of a lost connection."""
    ceiling = min(2.0, 0.1 * 2 ** (attempt + 1))
    delays = [retries.delay(attempt, throttled=True) for _ in range(200)]
    assert ceiling / 2 <= min(delays) < ceiling * 0.7
    assert ceiling * 0.8 < max(delays) <= ceiling
