"""The clock of the stand-in: real time, or real time shifted by a skew asked for through the faults."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime


class ServiceClock:
    """What time the service believes it is; its `Date` header tells it too."""

    def __init__(self) -> None:
        self.skew = 0.0

    def now(self) -> datetime:
        """The service's time, in UTC."""
        return datetime.now(UTC) + timedelta(seconds=self.skew)

    def http_date(self) -> str:
        """The value of a `Date` header (RFC 9110, section 5.6.7)."""
        return format_datetime(self.now(), usegmt=True)
