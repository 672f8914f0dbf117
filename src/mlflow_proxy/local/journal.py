"""What arrived at the stand-in and what became of it: a bounded list that tests and people can read."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from .asgi import Request
from .identity import Principal

_KEPT = 2000


@dataclass
class Entry:
    """One request. `verdict` is "pending", "allowed", an AWS error type, or "abandoned" when the caller left."""

    number: int
    plane: str
    method: str
    path: str
    query: str
    header_names: list[str]
    body_bytes: int
    amz_date: str | None
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    target: str | None = None
    principal: str | None = None
    access_key: str | None = None
    session_tags: dict[str, str] = field(default_factory=dict)
    source_identity: str | None = None
    action: str | None = None
    verdict: str = "pending"
    reason: str = ""
    fault: str | None = None
    status: int | None = None

    def identify(self, principal: Principal) -> None:
        """Note who sent it."""
        self.principal, self.access_key = principal.arn, principal.access_key
        self.session_tags, self.source_identity = dict(principal.session_tags), principal.source_identity


class Journal:
    """The last two thousand requests of all planes."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=_KEPT)
        self._numbers = itertools.count(1)

    def open(self, plane: str, request: Request, *, hide_query: bool = False) -> Entry:
        """Begin an entry; the planes complete it as they judge and answer."""
        entry = Entry(
            number=next(self._numbers),
            plane=plane,
            method=request.method,
            path=request.path,
            query="(hidden)" if hide_query else request.query,
            header_names=[name for name, _ in request.headers],
            body_bytes=len(request.body),
            amz_date=request.value("x-amz-date"),
        )
        self._entries.append(entry)
        return entry

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest `count` entries, oldest first."""
        return [asdict(entry) for entry in list(self._entries)[-count:]] if count > 0 else []

    def clear(self) -> None:
        """Forget all entries; numbers go on."""
        self._entries.clear()
