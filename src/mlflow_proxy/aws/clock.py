"""The service's clock as far as it differs from this machine's: signatures are valid for five minutes around it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime

SKEW_ERRORS = ("RequestTimeTooSkewed", "InvalidSignatureException")
_SKEW_WORDS = ("Signature expired", "Signature not yet current")
# Below this, a difference is no reason for a refused signature (which is valid for five minutes).
_LEAST_SKEW = 60.0

logger = logging.getLogger(__name__)


class ServiceClock:
    """The time that a target's signatures carry: this machine's, corrected by what the service says."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self.offset = 0.0

    def now(self) -> float:
        """Seconds since the epoch on the service's clock."""
        return self._now() + self.offset

    def difference(self, date_header: str | None) -> float | None:
        """Seconds that the service's clock is ahead of ours, by an answer's Date; None if that says nothing."""
        if not date_header:
            return None
        try:
            date = parsedate_to_datetime(date_header)
            # RFC 9110 section 5.6.7: an HTTP date is in GMT, also where it does not say so (asctime's format).
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - self._now()
        except (TypeError, ValueError, OverflowError):
            return None

    def correct(
        self, error_type: str, message: str, date_header: str | None, *, signed_at: float | None = None
    ) -> bool:
        """Take over the service's clock if an error is one of skew; True if the request is worth signing again.

        `signed_at` is the offset that the refused request was signed with: another request may have corrected the
        clock since.
        InvalidSignatureException also means a plain mismatch: it is skew only if its message says that the signature
        expired or is not yet current, and Date is more than a minute away from the clock that signed.
        """
        if error_type not in SKEW_ERRORS:
            return False
        if error_type == "InvalidSignatureException" and not any(words in message for words in _SKEW_WORDS):
            return False
        ahead = self.difference(date_header)
        if ahead is None or abs(ahead - (self.offset if signed_at is None else signed_at)) < _LEAST_SKEW:
            return False
        if abs(ahead - self.offset) >= _LEAST_SKEW:
            logger.warning("the service's clock is %.0f s ahead, by its Date; check this machine's time", ahead + 0.0)
            self.offset = ahead
        return True
