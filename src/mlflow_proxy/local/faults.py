"""Faults on demand: which of the coming requests go wrong, and how.

A fault takes only requests that would otherwise have been served, so a tampered request is still refused for
what it is. Shared by the event loop, moto's threads and the caller's thread.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import AwsError

PLANES = ("mlflow", "sagemaker", "sts")
_RESETS = ("before", "after", "body")
_THROTTLES = {429: "TooManyRequestsException", 400: "ThrottlingException"}


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and for which requests. The first fault that matches a request is the only one it meets.

    Effects
    - latency: seconds before anything else is done
    - status, error: an answer with this status and error type instead of the service's
    - throttle: 429 (TooManyRequestsException) or 400 (ThrottlingException)
    - retry_after: seconds, as a header of such an answer
    - reset: "before" MLflow sees the request, "after" MLflow did it, or in the middle of the "body"
    - truncate: bytes of the body after which the connection is closed
    - chunk_delay, chunk_bytes: seconds before each piece of the body, bytes of a piece

    Selection
    - requests: how many, None for all; fraction: of those that match; method; path: a regular expression that
      is searched for; target: a target's short name; plane: "mlflow", "sagemaker" or "sts"
    """

    latency: float = 0.0
    status: int | None = None
    error: str | None = None
    throttle: int | None = None
    retry_after: float | None = None
    reset: str | None = None
    truncate: int | None = None
    chunk_delay: float = 0.0
    chunk_bytes: int = 1024
    requests: int | None = None
    fraction: float = 1.0
    method: str | None = None
    path: str | None = None
    target: str | None = None
    plane: str = "mlflow"

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Fault:
        """A fault from JSON; raises ValueError naming what is wrong."""
        known = {each.name for each in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        fault = cls(**values)
        fault.validate()
        return fault

    def validate(self) -> None:
        """Raise ValueError for a value out of range."""
        if self.plane not in PLANES:
            raise ValueError(f"plane must be one of {', '.join(PLANES)}")
        if self.reset is not None and (self.reset not in _RESETS or self.plane != "mlflow"):
            raise ValueError(f"reset must be one of {', '.join(_RESETS)}, and is for the plane mlflow alone")
        if self.throttle not in (None, *_THROTTLES):
            raise ValueError("throttle must be 429 or 400")
        if self.status is not None and not 400 <= self.status <= 599:
            raise ValueError("status must be from 400 to 599")
        if not 0 <= self.fraction <= 1 or self.latency < 0 or self.chunk_delay < 0 or self.chunk_bytes < 1:
            raise ValueError("fraction must be from 0 to 1, times not negative, chunk_bytes at least 1")
        if self.path is not None:
            re.compile(self.path)

    def refusal(self) -> AwsError | None:
        """The error answer that this fault wants, if any."""
        if self.throttle is not None:
            error = AwsError(_THROTTLES[self.throttle], "Rate exceeded", status=self.throttle)
        elif self.status is not None:
            kind = self.error or ("InternalServerException" if self.status >= 500 else "ValidationException")
            error = AwsError(kind, "A fault that was asked for.", status=self.status)
        else:
            return None
        error.retry_after = self.retry_after
        return error

    def selects(self, plane: str, method: str, path: str, target: str | None) -> bool:
        """Whether a request is of the kind meant; counting and chance come on top."""
        return (
            self.plane == plane
            and self.method in (None, method)
            and self.target in (None, target)
            and (self.path is None or re.search(self.path, path) is not None)
        )

    def __str__(self) -> str:
        plain = Fault()
        return ", ".join(f"{k}={v}" for k, v in asdict(self).items() if v != getattr(plain, k))


@dataclass
class _Rule:
    number: int
    fault: Fault
    hits: int = 0

    @property
    def left(self) -> int | None:
        return None if self.fault.requests is None else self.fault.requests - self.hits


@dataclass
class Faults:
    """The faults in force, in the order in which they were asked for."""

    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(default_factory=random.Random)
    _next: int = 1

    def add(self, fault: Fault) -> int:
        """Put a fault in force; the number that removes it."""
        fault.validate()
        with self._lock:
            rule = _Rule(self._next, fault)
            self._next += 1
            self._rules.append(rule)
            return rule.number

    def remove(self, number: int) -> bool:
        """End one fault; False if there is none of this number."""
        with self._lock:
            before = len(self._rules)
            self._rules = [rule for rule in self._rules if rule.number != number]
            return len(self._rules) < before

    def clear(self) -> None:
        """End all faults."""
        with self._lock:
            self._rules.clear()

    def take(self, plane: str, method: str, path: str, target: str | None = None) -> Fault | None:
        """The fault that this request meets, counted."""
        with self._lock:
            for rule in self._rules:
                if rule.left == 0 or not rule.fault.selects(plane, method, path, target):
                    continue
                if self._random.random() < rule.fault.fraction:
                    rule.hits += 1
                    return rule.fault
            return None

    def state(self) -> list[dict[str, Any]]:
        """All faults with how often each has struck."""
        with self._lock:
            return [{"id": r.number, **asdict(r.fault), "hits": r.hits, "left": r.left} for r in self._rules]
