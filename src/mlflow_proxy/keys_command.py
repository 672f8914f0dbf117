"""The command `mlflow-proxy keys`: make, list, revoke and rotate API keys in a keys file.

A new key is the only thing on standard output, so that `KEY=$(mlflow-proxy keys new …)` works; it is shown once and
kept nowhere. How they are kept is in `access/key_file`.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import click

from mlflow_proxy.access.key_file import change_keys, read_keys
from mlflow_proxy.access.key_record import Key, KeysError, make_key, show_time

_Lifetime = timedelta | Literal["never"]
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def _duration(ctx: click.Context, param: click.Parameter, value: str) -> timedelta:  # noqa: ARG001  (click's)
    """`90d`, `12h` or `30m`."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a duration; write one like 90d, 12h or 30m")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _lifetime(ctx: click.Context, param: click.Parameter, value: str | None) -> _Lifetime | None:
    """A duration, or `never`; None if it is not given."""
    if value == "never":
        return "never"
    return None if value is None else _duration(ctx, param, value)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where keys are, where changes are recorded, and the roles there are, None if no configuration tells."""

    path: Path
    audit: str
    roles: tuple[str, ...] | None

    def check_role(self, role: str) -> None:
        """Raise ClickException for a role that does not exist."""
        if self.roles is not None and role not in self.roles:
            known = f"there are {', '.join(self.roles)}" if self.roles else "there is none; add a [[roles]] table"
            raise click.ClickException(f"there is no role {role!r} in the configuration; {known}")


@click.group()
def keys() -> None:
    """Make, list, revoke and rotate API keys. A running proxy takes changes up by itself."""


def _where(command: Callable[..., None]) -> Callable[..., None]:
    """The two options that say where the keys are."""
    config = click.option(
        "--config",
        "-c",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="MLFLOW_PROXY_CONFIG",
        help="TOML file with the configuration: names the keys file (access.keys_file) and the roles.",
    )
    file = click.option(
        "--file",
        "-f",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The keys file, instead of the configuration's.",
    )
    return config(file(command))


@keys.command()
@click.option("--name", required=True, help="Who the key is for: callers become `key:<name>`.")
@click.option("--role", required=True, help="The role that the key gives.")
@click.option(
    "--expires",
    metavar="DURATION",
    callback=_lifetime,
    default="90d",
    show_default=True,
    help="Time until it expires, like 90d, 12h or 30m, or never.",
)
@_where
def new(name: str, role: str, expires: _Lifetime, config: Path | None, file: Path | None) -> None:
    """Make a key and print it, this once."""
    place = _place(config, file)
    place.check_role(role)
    is_new = not place.path.exists()
    now = _now()
    with _changing(place, create=True) as (held, trail):
        valid = [key for key in held if key.name == name and now.timestamp() < key.valid_until]
        if valid:
            raise KeysError(
                f"there is a key named {name!r} already, {valid[-1].id}; `mlflow-proxy keys rotate {name}` replaces it"
            )
        text, key = make_key(name, role, created=now, expires=_end(now, expires), taken=_taken(held))
        held.append(key)
        trail.add("key-created", key)
    click.echo(f"Key {key.id} for {name}, role {role}, {_lasts(key)}. It is shown only this once:", err=True)
    click.echo(text)
    if is_new:
        click.echo(f"Made {place.path}, for this user only ({_user()}); the service's user must read it.", err=True)
    trail.check()


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
@_where
def list_keys(as_json: bool, config: Path | None, file: Path | None) -> None:
    """List all keys with their state."""
    try:
        held = read_keys(_place(config, file).path)
    except KeysError as error:
        raise click.ClickException(str(error)) from None
    now = time.time()
    if as_json:
        shown = [{**_public(key), "state": key.state(now)} for key in held]
        click.echo(json.dumps(shown, indent=2))
        return
    rows = [("ID", "NAME", "ROLE", "CREATED", "EXPIRES", "STATE"), *(_row(key, now) for key in held)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@keys.command()
@click.argument("which", metavar="ID-OR-NAME")
@_where
def revoke(which: str, config: Path | None, file: Path | None) -> None:
    """Make a key void at once, or all keys of a name."""
    place = _place(config, file)
    now = _now()
    with _changing(place) as (held, trail):
        meant = [key for key in held if key.id == which] or [key for key in held if key.name == which]
        if not meant:
            raise KeysError(f"there is no key {which!r} in {place.path}; `mlflow-proxy keys list` shows all")
        revoked = [key for key in meant if key.revoked is None]
        held[:] = [replace(key, revoked=now) if key in revoked else key for key in held]
        for key in revoked:
            trail.add("key-revoked", key)
    for key in revoked:
        click.echo(f"Revoked key {key.id} of {key.name}, role {key.role}.", err=True)
    if not revoked:
        click.echo(f"{which} is revoked already; nothing changed.", err=True)
    trail.check()


@keys.command()
@click.argument("name")
@click.option(
    "--overlap",
    metavar="DURATION",
    callback=_duration,
    default="24h",
    show_default=True,
    help="Time for which the old key still counts, like 90d, 12h or 30m.",
)
@click.option(
    "--expires",
    metavar="DURATION",
    callback=_lifetime,
    help="Time until the new key expires, or never. Default: as long as the old one was made for.",
)
@_where
def rotate(
    name: str,
    overlap: timedelta,
    expires: _Lifetime | None,
    config: Path | None,
    file: Path | None,
) -> None:
    """Replace a name's key, and print the new one.

    It is printed this once. The old one counts until the overlap ends.
    """
    place = _place(config, file)
    now = _now()
    with _changing(place) as (held, trail):
        old = [key for key in held if key.name == name and now.timestamp() < key.valid_until]
        if not old:
            raise KeysError(
                f"there is no valid key named {name!r} in {place.path}; `mlflow-proxy keys list` shows all, "
                f"`mlflow-proxy keys new --name {name} --role …` makes one"
            )
        newest = sorted(old, key=lambda key: (key.ends is None, key.created))[-1]
        place.check_role(newest.role)
        if expires is None:
            expires = newest.expires - newest.created if newest.expires is not None else "never"
        text, key = make_key(name, newest.role, created=now, expires=_end(now, expires), taken=_taken(held))
        ended = {each.id: replace(each, ends=_first(each.ends, each.expires, now + overlap)) for each in old}
        held[:] = [*(ended.get(each.id, each) for each in held), key]
        trail.add("key-rotated", key, replaces=list(ended))
    click.echo(f"Key {key.id} for {name}, role {key.role}, {_lasts(key)}. It is shown only this once:", err=True)
    click.echo(text)
    for each in ended.values():
        click.echo(
            f"The old key {each.id} counts until {show_time(_first(each.ends, now + overlap))}; to end it now: "
            f"mlflow-proxy keys revoke {each.id}",
            err=True,
        )
    trail.check()


def _place(config: Path | None, file: Path | None) -> _Place:
    """What the options and the configuration say. Raises ClickException."""
    from mlflow_proxy import configuration  # slow to import, and `--help` needs none of it
    from mlflow_proxy.settings import ENV_PREFIX, KEY_VARIABLE, Audit

    configured = any(name.startswith(ENV_PREFIX) and name != KEY_VARIABLE for name in os.environ)
    if config is None and (file is not None or not configured):
        if file is None:
            raise click.UsageError("name the configuration with --config, or a keys file with --file")
        return _Place(file, _stream(Audit().to), None)
    try:
        settings = configuration.load(config)
    except configuration.SettingsError as error:
        listed = "".join(f"\n  ✗ {problem}" for problem in error.problems)
        raise click.ClickException(f"the configuration has mistakes:{listed}") from None
    path = file or settings.access.keys_file
    if path is None:
        raise click.ClickException(_no_file(settings.access.keys_secret, config))
    return _Place(path, _stream(settings.audit.to), tuple(role.name for role in settings.roles))


def _no_file(secret: str | None, config: Path | None) -> str:
    if secret is None:
        return "the configuration names no keys file; set access.keys_file, or give --file"
    with_config = f"--config {config} " if config else ""
    return (
        "the configuration has access.keys_secret, which the proxy only reads, and no access.keys_file. Change a copy "
        "of the secret and put it back:\n"
        f"  aws secretsmanager get-secret-value --secret-id {secret} --query SecretString --output text > keys.jsonl\n"
        f"  mlflow-proxy keys {click.get_current_context().info_name} {with_config}--file keys.jsonl …\n"
        f"  aws secretsmanager put-secret-value --secret-id {secret} --secret-string file://keys.jsonl"
    )


def _stream(audit: str) -> str:
    """Where this command's audit lines go: never to standard output, which holds the key alone."""
    return "stderr" if audit == "stdout" else audit


class _Trail:
    """The audit lines for what one command changes."""

    def __init__(self, to: str) -> None:
        self._to = to
        self._lines: list[tuple[str, dict[str, Any]]] = []
        self._lost = 0

    def add(self, event: str, key: Key, **more: Any) -> None:
        """Take a line; nothing is written yet."""
        expires = show_time(key.expires) if key.expires else None
        fields = {"key_id": key.id, "name": key.name, "role": key.role, "expires": expires, "by": _user()}
        self._lines.append((event, {**fields, **more}))

    def write(self) -> None:
        """Write all lines, for a few seconds at the most. `check` tells whether that succeeded."""
        from mlflow_proxy.telemetry.audit import AuditLog  # as above

        if self._to == "stderr" and sys.stderr.isatty():
            return  # a terminal keeps no record, and its user is told what was done in plain words

        log = AuditLog(self._to)
        for event, fields in self._lines:
            log.write(event, **fields)
        self._lost = log.close()

    def check(self) -> None:
        """Raise ClickException if a line could not be written. The last thing a command does: its key is shown."""
        if self._lost:
            raise click.ClickException(
                f"the change was made, but not recorded: audit.to {self._to} could not be written. Repair that, and "
                "note the change down where you keep your audit log"
            )


@contextmanager
def _changing(place: _Place, *, create: bool = False) -> Iterator[tuple[list[Key], _Trail]]:
    """The keys to change, and what takes the audit lines for it; they are written after the change, if that succeeds.

    A file that plainly cannot be written to is a mistake in the configuration, so that nothing is changed. A full disk
    shows only afterwards: therefore `check` the trail, when all has been said about the change.
    """
    trail = _Trail(place.audit)
    try:
        with change_keys(place.path, create=create) as held:
            yield held, trail
    except KeysError as error:
        raise click.ClickException(str(error)) from None
    trail.write()


def _user() -> str:
    """The operating system's user who runs the command; its number where it has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _end(now: datetime, after: _Lifetime) -> datetime | None:
    return None if after == "never" else now + after


def _first(*times: datetime | None) -> datetime:
    return min(each for each in times if each is not None)


def _taken(held: Iterable[Key]) -> set[str]:
    """What no new id may be, so that `revoke` never has to guess."""
    return {text for key in held for text in (key.id, key.name)}


def _lasts(key: Key) -> str:
    return f"valid until {show_time(key.expires)}" if key.expires else "valid without end"


def _public(key: Key) -> dict[str, str | None]:
    return {name: value for name, value in key.fields().items() if name != "sha256"}


def _row(key: Key, now: float) -> tuple[str, ...]:
    state = key.state(now)
    if key.ends is not None and state == "ends":
        state = f"ends {show_time(key.ends)}"
    expires = show_time(key.expires) if key.expires else "never"
    return key.id, key.name, key.role, show_time(key.created), expires, state
