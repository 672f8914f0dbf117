"""How many connections a worker may hold, by the number of files that a process may have open.

A worker that runs out of files can neither accept nor reach AWS. So it accepts fewer callers than that, and keeps the
rest for the way to the targets and for itself.
"""

from __future__ import annotations

import logging
import resource

from mlflow_proxy.settings import Settings

logger = logging.getLogger(__name__)

# Of a worker itself: its loop, logs, own pages, and connections to STS, identity providers and storages.
_OWN = 96
_FEWEST = 16


def raise_file_limit() -> float:
    """Raise this process's limit as far as it may be, for the usual 1024 is for programs that never do. Gives it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return float("inf") if hard == resource.RLIM_INFINITY else hard


def caller_connections(settings: Settings, files: float) -> int:
    """`server.connections`, or as many as `files` allow: those to targets come first, up to half of all."""
    free = files - _OWN
    wanted = settings.server.connections
    return int(max(_FEWEST, min(wanted, max(free - settings.upstream.connections * len(settings.targets), free / 2))))


def target_connections(settings: Settings, files: float, callers: int) -> int:
    """`upstream.connections`, or as many as `files` leave for each target beside those of `callers`."""
    return int(max(1, min(settings.upstream.connections, (files - _OWN - callers) / len(settings.targets))))


def warn_of_low_limit(settings: Settings, files: float, callers: int) -> None:
    """Say at start that there will be fewer connections than are configured."""
    targets = target_connections(settings, files, callers)
    if callers < settings.server.connections or targets < settings.upstream.connections:
        logger.warning(
            "the limit of open files is %d: each worker holds at most %d connections of callers (server.connections: "
            "%d) and %d to each target (upstream.connections: %d). Raise the hard limit: LimitNOFILE= of systemd, "
            "ulimit -Hn, --ulimit nofile= of containers",
            files,
            callers,
            settings.server.connections,
            targets,
            settings.upstream.connections,
        )
