"""When a request may be sent once more: only where that is surely safe. Pure decisions; `sending` carries them out.

Safe means: no connection was made, so nothing was sent; or the service throttled and said so with a 4xx, so nothing
was done; or the method is idempotent (RFC 9110 section 9.2.2) and no answer but a throttled one had begun.
"""

from __future__ import annotations

import random

from mlflow_proxy.aws.errors import AwsError
from mlflow_proxy.http1 import Disconnected, NotSent, UpstreamError

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 2.0


def may_repeat(error: UpstreamError, method: str) -> bool:
    """Whether a failed exchange may be tried again."""
    if isinstance(error, NotSent):
        return True
    return isinstance(error, Disconnected) and not error.begun and method in _IDEMPOTENT


def may_repeat_throttled(error: AwsError, method: str) -> bool:
    """Whether a throttled request may be tried again. Only a 4xx says for certain that nothing was carried out."""
    return error.not_done or method in _IDEMPOTENT


def delay(attempt: int, *, throttled: bool = False) -> float:
    """Seconds before attempt number `attempt` (the first repetition is 1): exponential with full jitter.

    A lost connection is repeated at once the first time, since most often an unused one was just closed.
    """
    if attempt == 1 and not throttled:
        return 0.0
    ceiling = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (attempt + (1 if throttled else 0)))
    return random.uniform(ceiling / 2 if throttled else 0.0, ceiling)  # noqa: S311  # not a secret
