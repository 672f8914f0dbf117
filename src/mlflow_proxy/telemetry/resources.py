"""Which runs, experiments, models … a request names: what the audit log says of a write besides its action.

Identifiers only, by their known names; never a body, a value, a parameter or a metric. All that MLflow may go by is
taken, so that nobody can write one thing and have another recorded: a body counts whatever its Content-Type says, in
each encoding and both spellings that MLflow's parser takes, and a thing that is named twice is recorded twice.

What a request can make this cost is bounded: a parser holds the interpreter, in a thread too. What lies beyond a bound
is not read, and the line says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote

import msgspec
from pydantic_core import from_json

from mlflow_proxy.json_bounds import LARGEST_ON_LOOP, MOST_ELEMENTS, elements, excess

# Why a body, or a part of it, was not read: its size, the number of values in it, their nesting, its Content-Encoding,
# that it is no JSON, or that it is a file or message to MLflow itself.
NotLookedInto = Literal["", "too-large", "too-many-elements", "too-deep", "encoded", "not-json", "opaque"]


class Resources(dict[str, str | list[str]]):
    """What a request names, by name; a list where it names several. `not_looked_into`: why that may not be all."""

    not_looked_into: NotLookedInto = ""


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
# Bodies that are files, messages or queries.
_OPAQUE = re.compile(
    r"/(?:ajax-)?api/[^/]+/(?:mlflow/upload-artifact|mlflow-artifacts/artifacts/)|/gateway/|/v1/traces|/graphql"
)
# MLflow's server takes the experiment of OpenTelemetry's traces from a header, and the workspace of any request.
_CODING = b"content-encoding"
_HEADERS = {b"x-mlflow-experiment-id": "experiment_id", b"x-mlflow-workspace": "workspace", _CODING: ""}
_LONGEST = 256
_MOST = 100
# Characters of one part of a request, so that no line is long. The first value of each name is taken in any case.
_ROOM = 16 * 1024
# Bytes of a body that is read.
LARGEST_BODY = 1 << 20
_TAGS = re.compile(r"\btags?\b")
_PARAMETER = re.compile(r"\{(\w+)\}")


def resources_of(
    template: str, path: str, query: str, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> Resources:
    """The identifiers in a request's path, body, query and headers. Never raises, whatever the body.

    `template` is the route's (`/api/3.0/mlflow/traces/{trace_id}`), `path` the canonical path that it stands for.
    Values are cut after 256 characters, and of each place 100 are taken, in 16,384 characters, with `+N` for the rest.
    """
    route = _route(template)
    parts: list[_Identifiers] = []

    def part() -> _Identifiers:
        parts.append(_Identifiers(route.names))
        return parts[-1]

    if route.parameters is not None:
        part().take(_path_parameters(route.parameters, path))
    named = [pair for pair in headers if pair[0] in _HEADERS]
    if body:
        _take_body(body, route, named, part())
    if query:
        in_query = part()
        for name, value in parse_qsl(query):
            if name in route.names:
                in_query.add(route.names[name], value)
    if named:
        in_headers = part()
        for header, content in named:
            if header != _CODING:
                in_headers.add(_HEADERS[header], content.decode("latin-1"))
    return _together(parts)


class _Identifiers:
    """What one part of a request names: by name, the different values in the order in which they stand there."""

    __slots__ = ("_names", "_room", "more", "not_looked_into", "values")

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._room = _ROOM
        self.values: dict[str, dict[str, None]] = {}
        self.more: dict[str, int] = {}
        self.not_looked_into: NotLookedInto = ""

    def take(self, content: Any, depth: int = 0) -> None:
        """Take what an object names, also in the objects in which identifiers may stand further inside."""
        if not isinstance(content, dict):
            return
        for key, value in content.items():
            name = self._names.get(key)
            if name is not None:
                self.add(name, value)
            elif key in _CONTAINERS:
                self._take_container(key, value, depth)

    def add(self, name: str, value: Any) -> None:
        """Take a text, a whole number, or a list of those."""
        if isinstance(value, list):
            for item in value[:_MOST]:
                self._add(name, item)
            self._count(name, len(value) - _MOST)
        else:
            self._add(name, value)

    def _take_container(self, key: str, value: Any, depth: int) -> None:
        items = value if isinstance(value, list) else [value]
        if depth == _DEEPEST:
            if any(isinstance(item, dict) for item in items):
                self.not_looked_into = "too-deep"
            return
        for item in items[:_MOST]:
            self.take(item, depth + 1)
        self._count(key, len(items) - _MOST)

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value:
            return
        values = self.values.setdefault(name, {})
        text = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
        if text in values:
            return
        if not values or (len(values) < _MOST and len(text) <= self._room):
            values[text] = None
            self._room -= len(text)
        else:
            self._count(name, 1)

    def _count(self, name: str, more: int) -> None:
        if more > 0:
            self.more[name] = self.more.get(name, 0) + more


def _together(parts: list[_Identifiers]) -> Resources:
    """All that the parts of a request name. Each has room of its own, so that none can crowd out another."""
    texts: dict[str, dict[str, None]] = {}
    more: dict[str, int] = {}
    resources = Resources()
    for part in parts:
        resources.not_looked_into = resources.not_looked_into or part.not_looked_into
        for name, values in part.values.items():
            texts.setdefault(name, {}).update(values)
        for name, number in part.more.items():
            more[name] = more.get(name, 0) + number
    for name, number in more.items():
        texts.setdefault(name, {})[f"+{number}"] = None
    for name, values in texts.items():
        resources[name] = next(iter(values)) if len(values) == 1 else list(values)
    return resources


class _Route(NamedTuple):
    """What a template tells: how its fields are recorded, whether its body is a file, and where its parameters are."""

    names: Mapping[str, str]
    fields: _Fields
    opaque: bool
    parameters: _Parameters | None


class _Fields:
    """Finds fields in JSON by their names, and skips all others: of a batch of metrics, that is nearly everything."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        fields = [(name, msgspec.Raw, msgspec.field(default=_ABSENT)) for name in self._names]
        self._struct = msgspec.json.Decoder(msgspec.defstruct("Fields", fields))
        self._known = frozenset(self._names)
        self._values = attrgetter(*self._names)

    def of(self, body: bytes) -> dict[str, bytes]:
        """The fields' values, as they are written. Raises ValueError or RecursionError for what is no JSON object.

        The last of two equal keys counts, as for Python's own parser.
        """
        if len(body) <= LARGEST_ON_LOOP:  # less time, but an object for each name
            return {name: bytes(value) for name, value in _OBJECT.decode(body).items() if name in self._known}
        # In memory of no more than the body's size, however many names it has.
        if not body.isascii():
            body.decode("utf-8")  # for names that are skipped are not looked at
        values = self._values(self._struct.decode(body))
        return {name: bytes(value) for name, value in zip(self._names, values, strict=True) if value is not _ABSENT}


def _names(identifiers: tuple[str, ...]) -> Mapping[str, str]:
    """How a field may be written, and what it is recorded as."""
    names = {}
    for name in identifiers:
        camel = re.sub(r"_([a-z])", lambda match: match[1].upper(), name)
        names[name] = names[camel] = _RENAMED.get(name, name)
    return names


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ABSENT = msgspec.Raw()
_NAMES = _names(_IDENTIFIERS)
_TAG_NAMES = _names((*_IDENTIFIERS, *_TAG_KEYS))
_FIELDS = _Fields((*_NAMES, *sorted(_CONTAINERS)))
_TAG_FIELDS = _Fields((*_TAG_NAMES, *sorted(_CONTAINERS)))


@lru_cache(maxsize=512)
def _route(template: str) -> _Route:
    names, fields = (_TAG_NAMES, _TAG_FIELDS) if _TAGS.search(template) else (_NAMES, _FIELDS)
    opaque = _OPAQUE.match(template) is not None
    parts = _PARAMETER.split(template)
    if len(parts) == 1:
        return _Route(names, fields, opaque, None)
    plain = "".join(f"(?P<{part}>[^/]+)" if at % 2 else re.escape(part) for at, part in enumerate(parts))
    return _Route(names, fields, opaque, _Parameters(re.compile(plain), tuple(parts)))


class _Parameters(NamedTuple):
    """Where a path's parameters are: by an expression if none has a slash, else by the texts between their names."""

    plain: re.Pattern[str]
    parts: tuple[str, ...]


def _path_parameters(parameters: _Parameters, path: str) -> dict[str, str]:
    """The path's parameters, decoded. Some may have slashes; then the first takes as much as it can, as for MLflow."""
    match = parameters.plain.fullmatch(path)
    if match is not None:
        values = match.groupdict()
    else:
        values = _with_slashes(parameters.parts, path.replace("%2F", "/").replace("%3A", ":"))
    return {name: unquote(value) for name, value in values.items()}


def _with_slashes(parts: tuple[str, ...], path: str) -> dict[str, str]:
    """From the end, since each text in between stands as late as it can: each is looked for once."""
    *others, last = parts
    if not path.startswith(parts[0]) or not path.endswith(last):
        return {}
    values: dict[str, str] = {}
    begin, end = len(parts[0]), len(path) - len(last)
    while len(others) > 2:
        name, text = others.pop(), others.pop()
        place = path.rfind(text, begin + 1, end - 1)
        if place < 0:
            return {}
        values[name] = path[place + len(text) : end]
        end = place
    return {others[1]: path[begin:end], **dict(reversed(values.items()))} if begin < end else {}


def _take_body(body: bytes, route: _Route, headers: list[tuple[bytes, bytes]], found: _Identifiers) -> None:
    if route.opaque:
        found.not_looked_into = "opaque"
    elif any(name == _CODING and value.strip().lower() not in (b"", b"identity") for name, value in headers):
        found.not_looked_into = "encoded"
    elif len(body) > LARGEST_BODY:
        found.not_looked_into = "too-large"
    else:
        _take_json(body, route.fields, found)


def _take_json(body: bytes, fields: _Fields, found: _Identifiers) -> None:
    """Take what MLflow's JSON parser finds in a body, as far as it matters.

    That is Python's own, which also takes UTF-16 and UTF-32, deeper nesting and lone surrogates. The fast ones agree
    with it on all that they take themselves. A text is parsed again, as MLflow does for old clients.
    """
    try:
        values = fields.of(body)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        pass
    else:
        _take_fields(values, found)
        return
    try:
        content = _loaded(body)
        found.take(_loaded(content) if isinstance(content, str) else content)
    except _NotLookedIntoError as error:
        found.not_looked_into = error.why


def _take_fields(values: Mapping[str, bytes], found: _Identifiers) -> None:
    room = MOST_ELEMENTS
    for name, text in values.items():
        try:
            found.take({name: _loaded(text, room)})
        except _NotLookedIntoError as error:
            found.not_looked_into = error.why
        else:
            room -= elements(text)


class _NotLookedIntoError(Exception):
    def __init__(self, why: NotLookedInto) -> None:
        super().__init__(why)
        self.why = why


def _loaded(text: bytes | str, room: int = MOST_ELEMENTS) -> Any:
    """The value of JSON that has no more than `room` values. Raises _NotLookedIntoError."""
    too_much = excess(text, room)
    if too_much is not None:
        raise _NotLookedIntoError(too_much)
    try:
        return from_json(text)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        raise _NotLookedIntoError("not-json") from None
    except RecursionError:
        raise _NotLookedIntoError("too-deep") from None
