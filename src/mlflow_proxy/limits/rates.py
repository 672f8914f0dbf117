"""Rates: how many requests fit into a time, and what a caller is told when one does not.

Texts and counting are those of the library `limits`, by its sliding window counter: a window's requests and, for the
part of it that a moving window would still cover, those of the window before, taken as evenly spread. Two numbers per
rate and caller are kept, whatever the rate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from limits import RateLimitItem, RateLimitItemPerSecond, parse_many
from limits.strategies import SlidingWindowCounterRateLimiter

from mlflow_proxy.errors import Refusal

Scope = Literal["caller", "role", "target", "failures"]

# In seconds, about a thousand years: no window is longer, lest a storage refuse its end.
_LONGEST = 1e10


class Rate(RateLimitItemPerSecond):
    """`amount` requests in `length` seconds, of what `scope` says; `name` is the role's or target's.

    `text` is the rate as people wrote it, while amount and length may be one worker's share. An item of the library of
    which the length need not be whole seconds.
    """

    __slots__ = ("_key", "length", "name", "scope", "text")

    def __init__(self, scope: Scope, name: str, amount: int, length: float, text: str) -> None:
        super().__init__(amount)
        self.scope = scope
        self.name = name
        self.length = length
        self.text = text
        self._key = f"{scope}/{name}/{amount}/{length}/"

    def get_expiry(self) -> float:  # type: ignore[override]  # shares of a worker would have to be rounded
        """The length of the window, in seconds."""
        return self.length

    def key_for(self, subject: str = "") -> str:  # type: ignore[override]  # asked for twice in each request
        """The name of its count for a subject, which comes last: no two counts have one name."""
        return self._key + subject


def rates(scope: Scope, name: str, text: str | None, workers: int = 1) -> tuple[Rate, ...]:
    """The rates of an option such as `10/second; 1000/hour`, each as the share of one of several `workers`.

    All shares together are exactly the rate in the long run: where the amount cannot be divided, the share's length is
    adapted. 10 a minute among 4 workers are 2 in 48 seconds for each; 1 a second are 1 in 4 seconds. Who writes the
    same rate twice means it once.
    """
    shares = [_share(scope, name, item, workers) for item in (parse_many(text) if text else ())]
    return tuple({share.key_for(): share for share in shares}.values())


def _share(scope: Scope, name: str, item: RateLimitItem, workers: int) -> Rate:
    amount = max(1, item.amount // workers)
    seconds = min(item.get_expiry(), int(_LONGEST))
    length = min(seconds * workers * amount / item.amount, _LONGEST)
    unit = item.GRANULARITY.name
    text = f"{item.amount} per {unit}" if item.multiples == 1 else f"{item.amount} per {item.multiples} {unit}s"
    return Rate(scope, name, amount, length, text if workers == 1 else f"{text}, spread over {workers} workers")


class Counted(NamedTuple):
    """A rate that a request counts in: for whom, and with what this worker counts when it counts alone."""

    limiter: SlidingWindowCounterRateLimiter
    rate: Rate
    subject: str


class Full(NamedTuple):
    """A rate that has no room for one more request, and the seconds until it has."""

    rate: Rate
    wait: float


def fullest(of: Sequence[Counted]) -> Full | None:
    """The rate to wait longest for; None if a request fits into each."""
    full = None
    for limiter, rate, subject in of:
        reset_time, remaining = limiter.get_window_stats(rate, subject)
        if remaining == 0:
            wait = reset_time - time.time()
            if full is None or wait > full.wait:
                full = Full(rate, wait)
    return full


def take(of: Sequence[Counted]) -> Full | None:
    """Count a request in all rates if it fits into each, else in none."""
    if len(of) == 1:
        limiter, rate, subject = of[0]
        return None if limiter.hit(rate, subject) else fullest(of)
    for limiter, rate, subject in of:
        if not limiter.test(rate, subject):
            return fullest(of)
    for limiter, rate, subject in of:
        limiter.hit(rate, subject)
    return None


def refusal(full: Full) -> Refusal:
    """What a caller is told who has to wait.

    The RateLimit headers are those of draft-ietf-httpapi-ratelimit-headers-06, the last with one field for each.
    """
    rate, seconds = full.rate, seconds_to_wait(full.wait)
    whose = {
        "caller": f"Too many requests from you: the limit is {rate.text} (limits.caller_rate)",
        "role": f"Too many requests in the role {rate.name}: its callers together have {rate.text} (the role's rate)",
        "target": f"Too many requests to {rate.name}: all callers together have {rate.text} (the target's rate)",
        "failures": f"Too many failed authentications from your address: the limit is {rate.text}",
    }
    return Refusal(
        429,
        f"{whose[rate.scope]}. Try again in {seconds} s.",
        retry_after=seconds,
        headers=[
            ("ratelimit-limit", str(rate.amount)),
            ("ratelimit-remaining", "0"),
            ("ratelimit-reset", str(seconds)),
        ],
        limit=rate.scope if rate.scope == "failures" else f"{rate.scope} rate",
    )


def seconds_to_wait(wait: float) -> int:
    """Whole seconds, at least 1, after which a request surely fits."""
    return max(0, int(wait)) + 1
