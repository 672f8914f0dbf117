"""What all parts of the stand-in share: its resources, its callers, its clock, and what is to go wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from .clock import ServiceClock
from .faults import Faults
from .identity import Directory
from .journal import Journal
from .sessions import Sessions
from .signature import Checker
from .targets import Targets


@dataclass
class Features:
    """What the MLflow of all targets offers; may be changed at any time.

    `presigned_artifacts`: MLflow's endpoints for presigned upload and download URLs. No public text says whether the
    service has them.
    """

    presigned_artifacts: bool = True


@dataclass(frozen=True)
class Service:
    """One region of the stand-in."""

    region: str
    directory: Directory
    features: Features = field(default_factory=Features)
    clock: ServiceClock = field(default_factory=ServiceClock)
    targets: Targets = field(default_factory=Targets)
    sessions: Sessions = field(default_factory=Sessions)
    faults: Faults = field(default_factory=Faults)
    journal: Journal = field(default_factory=Journal)

    @property
    def checker(self) -> Checker:
        """Checks signatures for this region."""
        return Checker(self.directory, self.clock, {self.region})
