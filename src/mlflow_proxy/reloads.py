"""The configuration in force. The main process judges a new one at SIGHUP and hands it to each worker that starts then.

Workers never read it themselves: all of them have the last one that was accepted, with the certificates and secrets
that it named at that time. A configuration with a mistake, or with a file that cannot be used, changes nothing.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlflow_proxy import configuration, gateway
from mlflow_proxy.access.keys import read_all_keys
from mlflow_proxy.configuration import SettingsError
from mlflow_proxy.file_limit import caller_connections, target_connections
from mlflow_proxy.mistakes import cross_checks, reason
from mlflow_proxy.portal.provider import read_client_secret
from mlflow_proxy.runtime import Runtime
from mlflow_proxy.settings import Settings

logger = logging.getLogger(__name__)

# Options of [server] that only the main process uses, so that a change waits for a restart.
_UNTIL_RESTART = ("host", "port", "workers", "connections", "header_timeout", "header_limit", "drain_timeout")
_TLS = ("tls_certificate", "tls_key")


@dataclass(frozen=True)
class Accepted:
    """A configuration that was judged, and what a worker needs of it.

    `settings` are as the operator wrote them, but for options that wait for a restart; `handed` name copies of the
    certificates instead. `digests` are those of the files and secrets that the options name.
    """

    settings: Settings
    handed: Settings
    runtime: Runtime = field(repr=False)
    digests: Mapping[str, bytes] = field(repr=False)


class InForce:
    """The configuration that workers start with; only the main process changes it."""

    def __init__(self, settings: Settings, runtime: Runtime, path: Path | None, files: float) -> None:
        """`path` is the file that `settings` came from, `files` the number that a process may have open.

        Raises SettingsError if a file that the settings name cannot be used.
        """
        self._files = files
        # Of callers, which one worker holds at once.
        self.connections = caller_connections(settings, files)
        self._path = path
        self._own_runtime = runtime
        self._accepted = _accepted(settings, runtime, {})
        self._take_tls()

    @property
    def tls(self) -> Path | None:
        """One PEM file with TLS's certificates and key, always those accepted last; None without TLS."""
        return self._own_runtime.files / "tls.pem" if self._accepted.settings.server.tls_key else None

    def application(self) -> tuple[Settings, gateway.Gateway]:
        """The application of a worker, and the settings that it has. Called in its process."""
        settings = self._accepted.handed
        to_targets = target_connections(settings, self._files, self.connections)
        server = settings.server.model_copy(update={"connections": self.connections})
        upstream = settings.upstream.model_copy(update={"connections": to_targets})
        fitted = settings.model_copy(update={"server": server, "upstream": upstream})
        return fitted, gateway.create_app(fitted, self._accepted.runtime)

    def try_reload(self) -> bool:
        """`reload` with a line in the log for what came of it. Gives whether there is something new."""
        try:
            changes = self.reload()
        except SettingsError as error:
            mistakes = "; ".join(" ".join(problem.split()) for problem in error.problems)
            logger.error("reload: refused, so nothing has changed: %s", mistakes)
        except Exception:
            logger.exception("reload: failed, so nothing has changed")
        else:
            logger.info("reload: taken; %s", changes)
            return True
        return False

    def reload(self) -> str:
        """Read and judge the configuration anew, and take it. Gives what changed, in a line for the log.

        Raises SettingsError if it cannot be taken; then nothing has changed. May take half a minute for a secret.
        """
        before = self._accepted
        settings, waiting = _until_restart(configuration.load(self._path), before.settings)
        problems = list(cross_checks(settings.model_dump(mode="python"))) if waiting else []
        if problems:  # such as callers that are not identified any more at an address that stays a public one
            raise SettingsError([f"{problem} (until a restart changes {', '.join(waiting)})" for problem in problems])
        runtime = self._own_runtime
        digests, problems = read_all_keys(
            settings.access, settings.aws, proxy=settings.upstream.proxy, kept=runtime.keys
        )
        if problems:
            raise SettingsError(problems)
        self._accepted = _accepted(settings, runtime, digests)
        self._take_tls()
        changed = _changes(before, self._accepted)
        line = f"changed: {', '.join(changed)}" if changed else "nothing has changed"
        return f"{line}; only a restart changes {', '.join(waiting)}" if waiting else line

    def _take_tls(self) -> None:
        """Let workers that start find the accepted certificate and key, both or none of them, where the last were."""
        if self.tls is not None:
            server = self._accepted.handed.server
            assert server.tls_certificate is not None  # noqa: S101  # as of every configuration with a key
            server.tls_certificate.rename(self.tls)


def _until_restart(settings: Settings, running: Settings) -> tuple[Settings, list[str]]:
    """New settings with those options as they are until a restart, and the names of those that differ."""
    new, old = settings.server, running.server
    pinned = [name for name in _UNTIL_RESTART if getattr(new, name) != getattr(old, name)]
    if (new.tls_key is None) != (old.tls_key is None):
        pinned += _TLS
    server = new.model_copy(update={name: getattr(old, name) for name in pinned})
    return settings.model_copy(update={"server": server}), [f"server.{name}" for name in pinned]


def _accepted(settings: Settings, runtime: Runtime, digests: Mapping[str, bytes]) -> Accepted:
    """Read all files that are named. Raises SettingsError with all those that cannot be used."""
    files = _Files(runtime.files)
    server, oidc = settings.server, settings.oidc
    tls = files.copied_tls(server.tls_certificate, server.tls_key)
    targets = [
        target.model_copy(update={"ca_bundle": files.copied(f"targets[{target.name}].ca_bundle", target.ca_bundle)})
        for target in settings.targets
    ]
    session_secret = files.read("oidc.session_secret_file", oidc.session_secret_file)
    files.check_client_secret(oidc.client_secret_file)
    handed = settings.model_copy(
        update={
            "server": server.model_copy(update={"tls_certificate": tls, "tls_key": tls}),
            "oidc": oidc.model_copy(update={"ca_bundle": files.copied("oidc.ca_bundle", oidc.ca_bundle)}),
            "targets": targets,
        }
    )
    if files.problems:
        raise SettingsError(files.problems)
    handed_runtime = replace(runtime, session_secret=session_secret or runtime.session_secret)
    return Accepted(settings, handed, handed_runtime, {**digests, **files.digests})


class _Files:
    """Reads files, keeps copies of certificates, and collects what is wrong."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.digests: dict[str, bytes] = {}
        self.problems: list[str] = []

    def read(self, option: str, path: Path | None) -> bytes | None:
        """What the file of an option holds; None if there is none, or a problem."""
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError as error:
            self.problems.append(f"{option}: {str(path)!r} cannot be read ({reason(error)})")
            return None
        self.digests[option] = sha256(content).digest()
        return content

    def copied(self, option: str, path: Path | None) -> Path | None:
        """A copy of a file of CAs, which no later change of it touches."""
        content = self.read(option, path)
        if content is None:
            return None
        copy = self._write(f"{sha256(content).hexdigest()[:16]}.pem", content)
        try:
            ssl.create_default_context(cafile=str(copy))
        except (OSError, ssl.SSLError) as error:
            self.problems.append(f"{option}: {str(path)!r} cannot be used ({reason(error)})")
        return copy

    def copied_tls(self, certificate: Path | None, key: Path | None) -> Path | None:
        """One copy of both files, so that no worker ever takes an old one with a new one."""
        parts = [self.read("server.tls_certificate", certificate), self.read("server.tls_key", key)]
        contents = [part for part in parts if part is not None]
        if len(contents) < len(parts):
            return None
        copy = self._write("tls.new", b"\n".join(contents))
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(copy)
        except (OSError, ssl.SSLError) as error:
            self.problems.append(f"server.tls_certificate: does not go with tls_key ({reason(error)})")
        return copy

    def check_client_secret(self, path: Path | None) -> None:
        """Each sign-in reads it anew, so here only that this can be done."""
        if path is None or self.read("oidc.client_secret_file", path) is None:
            return
        try:
            read_client_secret(path)
        except ValueError as error:
            self.problems.append(f"oidc.client_secret_file: {str(path)!r} {error}")

    def _write(self, name: str, content: bytes) -> Path:
        copy = self._folder / name
        copy.unlink(missing_ok=True)
        with os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        return copy


def _changes(before: Accepted, after: Accepted) -> list[str]:
    """The options that differ, by name, and those whose files do. Never a value."""
    options = list(changed_options(before.settings, after.settings))
    contents = (
        option
        for option, digest in after.digests.items()
        if option not in options and before.digests.get(option, digest) != digest
    )
    return [*options, *(f"{option} (contents)" for option in contents)]


def changed_options(before: Settings, after: Settings) -> Iterator[str]:
    """The options that differ, by name: `server.body_limit`, `roles[writer].allow`, `targets[dev] (new)`."""
    for section in Settings.model_fields:
        old, new = getattr(before, section), getattr(after, section)
        if not isinstance(old, list):
            yield from _changed_fields(section, old, new)
            continue
        old_tables, new_tables = ({table.name: table for table in tables} for tables in (old, new))
        for name, table in new_tables.items():
            if name not in old_tables:
                yield f"{section}[{name}] (new)"
            else:
                yield from _changed_fields(f"{section}[{name}]", old_tables[name], table)
        yield from (f"{section}[{name}] (gone)" for name in old_tables if name not in new_tables)
        kept = [
            [name for name in names if name in old_tables and name in new_tables] for names in (old_tables, new_tables)
        ]
        if kept[0] != kept[1]:
            yield f"{section} (order)"


def _changed_fields(where: str, before: Any, after: Any) -> Iterator[str]:
    for name in type(before).model_fields:
        if getattr(before, name) != getattr(after, name):
            yield f"{where}.{name}"
