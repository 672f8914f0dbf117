"""Which runs, experiments, models … a request names: what the audit log says of a write besides its action.

Identifiers only, by their known names; never a body, a value, a parameter or a metric. All that MLflow may go by is
taken, so that nobody can write one thing and have another recorded: a body counts whatever its Content-Type says, in
each encoding and both spellings that MLflow's parser takes, and a thing that is named twice is recorded twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

import msgspec
from pydantic_core import from_json

# A list where a request names several.
Resources = dict[str, str | list[str]]

# Fields of MLflow's requests that name something. In a body, protobuf takes them in camel case, too.
_IDENTIFIERS = (
    *("alias", "artifact_path", "assessment_id", "budget_policy_id", "dataset_id", "dataset_record_ids"),
    *("endpoint_id", "endpoint_name", "experiment_id", "experiment_ids", "experiment_name", "guardrail_id", "issue_id"),
    *("item_id", "item_ids", "job_id", "job_name", "model_definition_id", "model_id", "model_ids", "name", "new_name"),
    *("path", "provider", "queue_id", "request_id", "request_ids", "resource_id", "resource_type", "run_id", "run_ids"),
    *("run_name", "run_uuid", "schema_id", "schema_ids", "scorer_id", "secret_id", "secret_name", "session_id"),
    *("source_run_id", "stage", "trace_id", "trace_ids", "version", "webhook_id", "workspace_name"),
)
# The name of a tag on routes of tags, elsewhere that of a parameter or metric.
_TAG_KEYS = ("key", "tag_key")
# MLflow's other names of one thing.
_RENAMED = {"run_uuid": "run_id", "request_id": "trace_id", "request_ids": "trace_ids", "tag_key": "key"}
# Objects in which an identifier may stand further inside: those of traces, assessments and linked models.
_CONTAINERS = frozenset(
    {"assessment", "mlflow_experiment", "mlflowExperiment", "models", "prompt_versions", "promptVersions", "trace"}
    | {"trace_info", "traceInfo", "trace_location", "traceLocation"}
)
_DEEPEST = 4
# Bodies that are files or messages, not requests.
_OPAQUE = re.compile(
    r"/(?:ajax-)?api/[^/]+/(?:mlflow/upload-artifact|mlflow-artifacts/artifacts/)|/gateway/|/v1/traces"
)
_LONGEST = 256
_MOST = 100
# Parameters with slashes are looked for in paths up to this length only: that may take its square in time.
_LONGEST_PATH = 2048
_TAGS = re.compile(r"\btags?\b")
_PARAMETER = re.compile(r"\{(\w+)\}")


def resources_of(template: str, path: str, query: str, body: bytes) -> Resources:
    """The identifiers in a request's path, query and body. Never raises, whatever the body.

    `template` is the route's (`/api/3.0/mlflow/traces/{trace_id}`), `path` the canonical path that it stands for.
    Values are cut after 256 characters, lists after 100 items with `+N` for the rest.
    """
    route = _route(template)
    found: dict[str, _Values] = {}
    if route.parameters is not None:
        _take(_path_parameters(route.parameters, path), route.names, found)
    if body and not route.opaque:
        _take(_parsed(body, route.names), route.names, found)
    if query:
        for name, value in parse_qsl(query):
            if name in route.names:
                found.setdefault(route.names[name], _Values()).add(value)
    return {name: shown for name, values in found.items() if (shown := values.shown())}


class _Values:
    """What one identifier is said to be: different values in the order in which they were found."""

    __slots__ = ("_more", "_values")

    def __init__(self) -> None:
        self._values: list[str] = []
        self._more = 0

    def add(self, value: Any) -> None:
        """Take a text, a whole number, or a list of those."""
        if isinstance(value, list):
            for item in value[:_MOST]:
                self._add(item)
            self._more += max(0, len(value) - _MOST)
        else:
            self._add(value)

    def count(self, more: int) -> None:
        """Take note of values that were not looked at."""
        self._more += more

    def shown(self) -> str | list[str]:
        """The only value, or all of them; empty if there is none."""
        shown = self._values[:_MOST]
        more = self._more + len(self._values) - len(shown)
        if more:
            shown.append(f"+{more}")
        return shown[0] if len(shown) == 1 else shown

    def _add(self, value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value:
            return
        text = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
        if text not in self._values:
            self._values.append(text)


class _Route(NamedTuple):
    """What a template tells: how its fields are recorded, whether its body is a file, and where its parameters are."""

    names: Mapping[str, str]
    opaque: bool
    parameters: tuple[re.Pattern[str], re.Pattern[str]] | None


def _names(identifiers: tuple[str, ...]) -> Mapping[str, str]:
    """How a field may be written, and what it is recorded as."""
    names = {}
    for name in identifiers:
        camel = re.sub(r"_([a-z])", lambda match: match[1].upper(), name)
        names[name] = names[camel] = _RENAMED.get(name, name)
    return names


_NAMES = _names(_IDENTIFIERS)
_TAG_NAMES = _names((*_IDENTIFIERS, *_TAG_KEYS))
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


@lru_cache(maxsize=512)
def _route(template: str) -> _Route:
    names = _TAG_NAMES if _TAGS.search(template) else _NAMES
    parts = _PARAMETER.split(template)
    if len(parts) == 1:
        return _Route(names, _OPAQUE.match(template) is not None, None)
    plain, slashes = (
        re.compile("".join(f"(?P<{part}>{value})" if at % 2 else re.escape(part) for at, part in enumerate(parts)))
        for value in ("[^/]+", ".+")
    )
    return _Route(names, _OPAQUE.match(template) is not None, (plain, slashes))


def _path_parameters(patterns: tuple[re.Pattern[str], re.Pattern[str]], path: str) -> dict[str, str]:
    """The path's parameters, decoded. Some may have slashes; then the first takes as much as it can, as for MLflow."""
    plain, slashes = patterns
    match = plain.fullmatch(path)
    if match is None and len(path) <= _LONGEST_PATH:
        match = slashes.fullmatch(path.replace("%2F", "/").replace("%3A", ":"))
    return {name: unquote(value) for name, value in match.groupdict().items()} if match else {}


def _take(content: Any, names: Mapping[str, str], found: dict[str, _Values], depth: int = 0) -> None:
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        name = names.get(key)
        if name is not None:
            found.setdefault(name, _Values()).add(value)
        elif key in _CONTAINERS and depth < _DEEPEST:
            items = value if isinstance(value, list) else [value]
            for item in items[:_MOST]:
                _take(item, names, found, depth + 1)
            if len(items) > _MOST:
                found.setdefault(key, _Values()).count(len(items) - _MOST)


def _parsed(body: bytes, names: Mapping[str, str]) -> Any:
    """What MLflow's JSON parser makes of a body, as far as it matters; None if it takes it for none.

    That is Python's own, which also takes UTF-16 and UTF-32, deeper nesting and lone surrogates. The fast ones agree
    with it on all that they take themselves: the last of two equal keys counts. A text is parsed again, as MLflow does
    for old clients.
    """
    try:
        values = _OBJECT.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):  # a key that is not UTF-8 is a ValueError
        content = _loaded(body)
        return _loaded(content) if isinstance(content, str) else content
    # Of a batch of metrics, nearly all is skipped: 20 KB take a fifth of the time that it takes to read all of them.
    return {key: _loaded(bytes(value)) for key, value in values.items() if key in names or key in _CONTAINERS}


def _loaded(text: bytes | str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
