"""Reads a configuration: a TOML file, then environment variables over it. All mistakes are reported together."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings.sources.utils import parse_env_vars

from mlflow_proxy.mistakes import broken_json, cross_checks, explain, reason, unknown_variables
from mlflow_proxy.settings import CONFIG_VARIABLE, ENV_PREFIX, Settings


class SettingsError(Exception):
    """A configuration that cannot be used. `problems` has one readable line per mistake, all of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the TOML file at `path` (None: environment only), then the environment's MLFLOW_PROXY_… variables.

    Raises SettingsError with every mistake found.
    """
    environ = os.environ if environ is None else environ
    problems = list(unknown_variables(environ))
    broken = dict(broken_json(environ))
    problems += broken.values()
    environ = {name: value for name, value in environ.items() if name not in broken}
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise SettingsError([f"{path}: cannot be read ({reason(error)})"]) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError([f"{path}: is not valid TOML: {error}"]) from None
    for name in [name for name in data if name.startswith("_")]:  # pydantic-settings takes these for its own
        problems.append(f"{name}: no such option; see docs/configuration.md for all of them")
        del data[name]
    settings: Settings | None = None
    merged = _merged(data, _environment(environ))
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        problems += [explain(detail) for detail in error.errors()]
    problems += cross_checks(merged if settings is None else settings.model_dump(mode="python"))
    if problems or settings is None:
        raise SettingsError(list(dict.fromkeys(problems)))
    return settings


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the variables set, in the shape of the file."""

    class Source(EnvSettingsSource):
        def _load_env_vars(self) -> Mapping[str, str | None]:
            ours = {
                name: value
                for name, value in environ.items()
                if name.startswith(ENV_PREFIX) and name != CONFIG_VARIABLE
            }
            return parse_env_vars(ours, parse_none_str=self.env_parse_none_str)

    return Source(Settings)()


def _merged(file: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """Environment over file, option by option."""
    merged = dict(file)
    for name, value in environment.items():
        below = merged.get(name)
        merged[name] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
