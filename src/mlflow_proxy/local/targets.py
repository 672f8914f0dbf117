"""The MLflow resources that the stand-in offers: managed tracking servers and serverless MLflow Apps.

Which header names a target and which SigV4 service it is signed for depends on its kind alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

TRACKING_HEADER = "x-mlflow-sm-tracking-server-arn"
APP_HEADER = "x-sm-mlflow-app-arn"

_ARN = re.compile(r"arn:aws:sagemaker:([a-z0-9-]+):(\d{12}):(mlflow-tracking-server|mlflow-app)/(\S+)")


class Kind(Enum):
    """The two modes of SageMaker MLflow; the value is the resource type in the ARN."""

    TRACKING = "mlflow-tracking-server"
    APP = "mlflow-app"

    @property
    def header(self) -> str:
        """The request header that carries the ARN."""
        return TRACKING_HEADER if self is Kind.TRACKING else APP_HEADER

    @property
    def service(self) -> str:
        """The SigV4 service name."""
        return "sagemaker-mlflow" if self is Kind.TRACKING else "sagemaker"


@dataclass(frozen=True)
class Arn:
    """A parsed ARN of an MLflow resource."""

    text: str
    region: str
    account: str
    kind: Kind
    resource: str

    @classmethod
    def parse(cls, text: str) -> Arn | None:
        """The parts of `text`, or None if it is no ARN of an MLflow resource."""
        match = _ARN.fullmatch(text)
        if match is None:
            return None
        region, account, kind, resource = match.groups()
        return cls(text, region, account, Kind(kind), resource)


@dataclass
class Target:
    """One MLflow resource; `name` is the stand-in's own short name, not the one in the ARN."""

    name: str
    arn: Arn
    upstream: str
    artifact_root: str
    status: str = "Created"
    ui_origin: str = ""
    mlflow_version: str = "0.0.0"
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    modified: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def running(self) -> bool:
        """Whether the data plane answers."""
        return self.status != "Stopped"

    def move(self, status: str) -> None:
        """Change the status, as Start and Stop do."""
        self.status = status
        self.modified = datetime.now(UTC)


class Targets:
    """All targets, by ARN and by short name."""

    def __init__(self) -> None:
        self._by_arn: dict[str, Target] = {}

    def add(self, target: Target) -> None:
        """Offer `target` from now on."""
        self._by_arn[target.arn.text] = target

    def remove(self, arn: str) -> None:
        """Offer the target of this ARN no more."""
        self._by_arn.pop(arn, None)

    def __iter__(self) -> Iterator[Target]:
        return iter(list(self._by_arn.values()))

    def by_arn(self, arn: str) -> Target | None:
        """The target with exactly this ARN."""
        return self._by_arn.get(arn)

    def by_name(self, name: str) -> Target | None:
        """The target with this short name."""
        return next((target for target in self if target.name == name), None)
