"""Rates: what a text means, how a worker counts alone, and what callers are told."""

from __future__ import annotations

import math
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from pydantic import ValidationError

from mlflow_proxy.limits.counters import Counters
from mlflow_proxy.limits.rates import Counted, Full, Rate, Scope, fullest, rates, refusal, take
from mlflow_proxy.settings import LimitSettings

# More than the settings take: all that looks like rates.
EXPR = (
    r"[0-9]{1,30} ?(/| per ) ?([0-9]{1,30})? ?(second|minute|hour|day|month|year|fortnight)s?([;,|][0-9]{1,3}/minute)?"
)


# Texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, []),
        ("100/second", [(100, 1.0, "100 per second")]),
        ("5000 per hour", [(5000, 3600.0, "5000 per hour")]),
        ("30/5 minutes", [(30, 300.0, "30 per 5 minutes")]),
        ("10/second;1000/hour", [(10, 1.0, "10 per second"), (1000, 3600.0, "1000 per hour")]),
    ],
)
def test_texts(text: str | None, expected: list[tuple[int, float, str]]) -> None:
    assert [(rate.amount, rate.length, rate.text) for rate in rates("caller", "", text)] == expected


@pytest.mark.parametrize(
    ("text", "workers", "amount", "length"),
    [
        ("100/second", 4, 25, 1.0),
        ("10/minute", 4, 2, 48.0),
        ("1/second", 4, 1, 4.0),
        ("3/minute", 4, 1, 80.0),
        ("30/minute", 1, 30, 60.0),
    ],
)
def test_shares(text: str, workers: int, amount: int, length: float) -> None:
    (rate,) = rates("caller", "", text, workers)
    assert (rate.amount, rate.length) == (amount, length)


@given(st.integers(1, 10**6), st.integers(1, 100), st.sampled_from(["second", "minute", "day"]), st.integers(1, 64))
def test_all_shares_together_are_the_rate(amount: int, multiple: int, unit: str, workers: int) -> None:
    (whole,) = rates("caller", "", f"{amount}/{multiple} {unit}")
    (share,) = rates("caller", "", f"{amount}/{multiple} {unit}", workers)
    assert share.amount * workers / share.length == pytest.approx(whole.amount / whole.length)
    assert share.amount * workers <= max(whole.amount, workers)
    assert ("workers" in share.text) == (workers > 1)


@given(st.from_regex(EXPR, fullmatch=True), st.integers(1, 64))
def test_no_text_that_the_settings_take_fails(text: str, workers: int) -> None:
    try:
        caller_rate = LimitSettings(caller_rate=text).caller_rate
    except ValidationError:
        return
    for rate in rates("caller", "", caller_rate, workers):
        assert rate.amount >= 1
        assert 0 < rate.length < math.inf


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "text", [f"{'9' * 4000}/second", f"1/{'9' * 4000} years", f"{'9' * 4000}/{'9' * 4000} years", "1/0 seconds"]
)
def test_huge_and_tiny_numbers(text: str, workers: int) -> None:
    (rate,) = rates("caller", "", LimitSettings(caller_rate=text).caller_rate, workers)
    own = counted(rate)
    assert take([own]) is None
    assert (take([own]) is None) == (rate.amount > 1)


def test_the_same_rate_twice_is_one() -> None:
    assert [str(rate.amount) for rate in rates("caller", "", "2/minute;2/60 seconds;5/hour;2/minute")] == ["2", "5"]


# Counting


def counted(rate: Rate, subject: str = "user:a") -> Counted:
    return Counted(SlidingWindowCounterRateLimiter(Counters(100)), rate, subject)


def window(amount: int, length: float) -> Counted:
    return counted(Rate("caller", "", amount, length, "test"))


def test_a_burst_may_have_the_whole_amount_but_a_second_one_not_at_once(clock: SimpleNamespace) -> None:
    own = [window(10, 60.0)]
    clock.now = 6059.0
    assert [take(own) is None for _ in range(12)] == [True] * 10 + [False] * 2
    clock.now = 6061.0  # the next window, of which the one before still covers 59 seconds
    assert [take(own) is None for _ in range(2)] == [True, False]
    clock.now = 6090.0
    assert sum(take(own) is None for _ in range(20)) == 4
    clock.now = 6300.0  # all forgotten
    assert sum(take(own) is None for _ in range(20)) == 10


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 20), st.sampled_from([4.0, 4 / 7, 48.0]), st.lists(st.integers(0, 200), min_size=30, max_size=200)
)
def test_never_much_more_than_the_amount(clock: SimpleNamespace, amount: int, length: float, gaps: list[int]) -> None:
    """In a window of its own never more; in any span as long never twice as much, and after the told time one fits."""
    own, accepted = [window(amount, length)], list[float]()
    clock.now = 6000.1234567
    for gap in gaps:
        clock.now += gap * length / 256.789
        full = take(own)
        if full is not None:
            assert 0 <= full.wait <= length
            if full.wait > 1e-6:
                clock.now += full.wait - 1e-6
                assert take(own) is not None
            clock.now += 2e-6
            assert take(own) is None
        accepted.append(clock.now)
    windows = Counter(at // length for at in accepted)
    assert max(windows.values()) <= amount
    for at in accepted:
        assert sum(at <= other < at + length for other in accepted) < 2 * amount + 1


def test_a_request_counts_in_all_rates_or_in_none() -> None:
    wide, narrow, third = window(10, 1e7), window(2, 1e7), window(9, 1e7)
    assert [take([wide, narrow, third]) is None for _ in range(5)] == [True, True, False, False, False]
    assert [take([third, narrow]) is None for _ in range(2)] == [False, False]
    assert [take([wide]) is None for _ in range(9)] == [True] * 8 + [False]
    assert [take([third]) is None for _ in range(8)] == [True] * 7 + [False]


def test_the_longest_wait_counts(clock: SimpleNamespace) -> None:
    short, long = window(1, 1.0), window(1, 3600.0)
    assert fullest([short, long]) is None
    assert take([short, long]) is None
    clock.now += 0.5
    full = take([long, short])
    assert full is not None
    assert full.rate is long.rate
    assert full == take([short, long]) == fullest([short, long])


def test_storage_says_what_it_does_not_do() -> None:
    counters = Counters(100)
    assert counters.check()
    with pytest.raises(NotImplementedError, match="sliding window counter"):
        FixedWindowRateLimiter(counters).hit(window(1, 1.0).rate, "user:a")


def test_no_thread_is_started() -> None:
    before = threading.active_count()
    own = window(1000, 1.0)
    for _ in range(100):
        assert take([own]) is None
        assert threading.active_count() == before


# Names of counts


def test_no_two_counts_have_one_name() -> None:
    subjects = [
        "user:a",
        "user:a\0",
        "user:A",
        "user:a/60.0",
        "",
        "user:ä",
        "user:a\n",
        "\udcff",
        "{x}",
        "10/1.0/",
        "/",
    ]
    scopes: tuple[Scope, ...] = ("caller", "role", "target", "failures")
    made = [
        rate.key_for(subject)
        for scope in scopes
        for name in ("", "team", "team-2")
        for text in ("10/second;10/minute", "1/second")
        for rate in rates(scope, name, text)
        for subject in subjects
    ]
    assert len(set(made)) == len(made) == 4 * 3 * 3 * len(subjects)


# What callers are told


@pytest.mark.parametrize(
    ("scope", "name", "words", "verdict"),
    [
        ("caller", "", "from you: the limit is 5 per minute (limits.caller_rate)", "caller rate"),
        ("role", "reader", "in the role reader: its callers together have 5 per minute", "role rate"),
        ("target", "team", "to team: all callers together have 5 per minute", "target rate"),
        ("failures", "", "failed authentications from your address", "failures"),
    ],
)
def test_refusals_say_whose_limit_it_is(scope: Scope, name: str, words: str, verdict: str) -> None:
    (rate,) = rates(scope, name, "5/minute")
    refused = refusal(Full(rate, 12.3))
    assert refused.status == 429
    assert words in refused.message
    assert "Try again in 13 s." in refused.message
    assert refused.limit == verdict
    _, headers, body = refused.answer("id-12345")
    sent = dict(headers)
    assert sent[b"retry-after"] == sent[b"ratelimit-reset"] == b"13"
    assert (sent[b"ratelimit-limit"], sent[b"ratelimit-remaining"]) == (b"5", b"0")
    assert b"REQUEST_LIMIT_EXCEEDED" in body


@given(st.floats(0, 10**7))
def test_retry_after_is_long_enough_and_at_least_a_second(seconds: float) -> None:
    told = refusal(Full(Rate("caller", "", 1, 1.0, ""), seconds)).retry_after
    assert told is not None
    assert told >= 1
    assert seconds < told <= math.ceil(seconds) + 1
