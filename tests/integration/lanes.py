"""Two callers of one MLflow that do the same things, each to resources of its own, and what they are told.

A lane is one way to MLflow: through the proxy, or straight. Both make every call of a story in step, so that lists of
everything look the same to both; names and ids differ, and are replaced before answers are compared.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from tests.integration.routes import Call

# What the gate adds before MLflow, so that MLflow judges both lanes alike: an address that is not its own host's.
AS_THE_GATE = {"x-forwarded-for": "203.0.113.10"}

# Headers of an answer that differ on purpose.
HEADERS_APART = {
    "connection": "each hop has its own",
    "content-length": "the gate streams every answer, in chunks, as a service in front may",
    "date": "the gate's clock speaks for the service",
    "server": "the service does not tell what runs behind it",
    "transfer-encoding": "each hop has its own",
    "x-request-id": "the proxy's, for finding the request in its log",
}
# Headers whose values are the moment's.
_VOLATILE_HEADERS = {"expires", "x-mlflow-gateway-duration-ms"}

# Seconds; MLflow's server closes a connection that was idle for five.
_IDLE = 3.0
_NOBODY = "unknown-$lane"
_WITH_BODY = {"POST", "PUT", "PATCH", "DELETE"}
# Before ids are named: an hour or a minute may be the number of an experiment.
_TIME = re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?")
_MOMENTS = [
    (re.compile(r"\b(viaproxy|straight)"), "LANE"),
    (re.compile(r'(?<="experiment_id": )"?\d+"?'), "EXPERIMENT"),
    (re.compile(r"(?<=s3://local-sagemaker-mlflow/)(tracking|app/workspaces/default)/\d+"), "EXPERIMENT"),
    (re.compile(r"\b[0-9a-f]{64}\b|\b\d{8}T\d{6}Z\b"), "SIGNED"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "UUID"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "HEX"),
    (re.compile(r"(?<=[a-z]-)[0-9a-f]{32}\b"), "HEX"),
    (re.compile(r"\b[12]\d{12}(\d{6})?\b"), "MOMENT"),
    (re.compile(r"\b[a-z]+-[a-z]+-\d{1,3}\b"), "RUN NAME"),
    (re.compile(r'(?<="digest": ")[0-9a-f]{8}(?=")'), "DIGEST"),
    (re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{22}=="), "BASE64"),
    (re.compile(r"\b0x[0-9a-f]{8,}\b"), "ADDRESS"),
]


class Answer(NamedTuple):
    status: int
    content_type: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Lane:
    """One way to one MLflow. `prefixes` are used in turn, from call to call."""

    word: str
    url: str
    prefixes: tuple[str, ...] = ("",)
    headers: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    used: set[tuple[str, str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        self._sent = 0
        self._last = 0.0

    def begin(self, story: str) -> None:
        """Forget the last story; names of the next one hold the word `story`."""
        self.values = {"lane": self.word + story, "hex": secrets.token_hex(16), "hex2": secrets.token_hex(16)}

    def send(self, call: Call, raw_body: bytes | None = None, turn: int | None = None) -> Answer:
        """Make a call with this lane's values."""
        prefix = self.prefixes[(self._sent if turn is None else turn) % len(self.prefixes)]
        self._sent += 1
        self.used.add((prefix, call.method, call.rule))
        path, body, headers = self._message(call, raw_body)
        if time.monotonic() - self._last > _IDLE:
            self._connection.close()
        self._connection.request(call.method, prefix + path, body, headers)
        answer = self._connection.getresponse()
        data = answer.read()
        self._last = time.monotonic()
        named = {name.lower(): value for name, value in answer.getheaders()}
        if answer.will_close:
            self._connection.close()
        return Answer(answer.status, named.get("content-type", ""), named, data)

    def keep(self, call: Call, answer: Answer) -> None:
        """Remember what later calls need."""
        for name, where in call.keep.items():
            value = json.loads(answer.body)
            for step in where.split("."):
                value = value[step]
            self.values[name] = str(value)

    def filled(self, value: Any) -> Any:
        """A value with this lane's own in place of `$names`."""
        if isinstance(value, str):
            return re.sub(r"\$([a-z_]+\d?)", lambda match: str(self.values[match[1]]), value)
        if isinstance(value, Mapping):
            return {name: self.filled(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.filled(each) for each in value]
        return value

    def _message(self, call: Call, raw_body: bytes | None) -> tuple[str, bytes | None, dict[str, str]]:
        def parameter(match: re.Match[str]) -> str:
            value = self.filled(call.path[match[1]]) if match[1] in call.path else self.values[match[1]]
            return quote(value, safe="/" if match[1] in ("artifact_path", "path") else "")

        path = re.sub(r"\{([^}]+)\}", parameter, call.rule)
        data = self.filled(call.data)
        headers = {**self.headers, "accept": "*/*", **self.filled(call.headers)}
        body = raw_body
        if body is None and call.body is not None:
            body = call.body(self.values)
        if call.method in _WITH_BODY and call.body is None:
            headers.setdefault("content-type", "application/json")
            body = json.dumps({} if data is None else data).encode() if body is None else body
        elif data:
            path += "?" + urlencode(data, doseq=True)
        if body is not None:
            headers.setdefault("content-type", "application/json")
        return path, body, headers


class Pair(NamedTuple):
    """The two lanes of one MLflow."""

    proxied: Lane
    straight: Lane

    def compare(self, call: Call, label: str, raw_body: bytes | None = None, turn: int | None = None) -> Iterator[str]:
        """Make a call in both lanes; yields what is not the same."""
        answers: list[Answer] = []
        for lane in self:
            if call.before is not None:
                lane.send(call.before)
            answers.append(lane.send(call, raw_body, turn))
            if label == "valid" and answers[-1].status < 400:
                lane.keep(call, answers[-1])
        where = f"{label}: {call.method} {call.rule}"
        if answers[0].body == answers[1].body:
            proxied, straight = ((answer.status, answer.content_type, "") for answer in answers)
        else:
            proxied, straight = (self.plain(answer) for answer in answers)
        if label == "valid" and answers[1].status != call.expect:
            yield f"{where}: MLflow itself answers {straight[0]}, not {call.expect}: {answers[1].body[:300]!r}"
        if proxied != straight:
            yield f"{where}\n  proxied  {shown(proxied, straight)}\n  straight {shown(straight, proxied)}"
        headers = [_headers(answer, call.volatile) for answer in answers]
        if headers[0] != headers[1]:
            yield f"{where}: headers\n  proxied  {headers[0]}\n  straight {headers[1]}"

    def plain(self, answer: Answer) -> tuple[int, str, str]:
        """An answer without what differs between lanes and moments."""
        text = _TIME.sub("MOMENT", answer.body.decode("utf-8", "surrogateescape"))
        for lane in self:
            for name in sorted(set(lane.values) - {"lane"}, key=lambda name: -len(lane.values[name])):
                value = lane.values[name]
                if value.isdigit():  # an experiment's number, in texts; never a JSON number
                    text = re.sub(rf"(?<![\w.:-])(?<!\": ){value}(?![\w.])", f"<{name}>", text)
                else:
                    text = text.replace(value, f"<{name}>")
        for pattern, word in _MOMENTS:
            text = pattern.sub(word, text)
        return answer.status, answer.content_type, text


def shown(answer: tuple[int, str, str], other: tuple[int, str, str]) -> str:
    """An answer, its body from shortly before where it begins to differ."""
    at = next((n for n, (a, b) in enumerate(zip(answer[2], other[2], strict=False)) if a != b), 0)
    return f"{answer[0]} {answer[1]} …{answer[2][max(0, at - 60) : at + 160]!r}"


def _headers(answer: Answer, volatile: Collection[str]) -> dict[str, str]:
    kept = {name: value for name, value in answer.headers.items() if name not in HEADERS_APART}
    return {name: "(any)" if name in volatile or name in _VOLATILE_HEADERS else kept[name] for name in kept}


def spoiled(call: Call) -> Iterator[tuple[str, Call, bytes | None]]:
    """The same call made badly: what is wrong, the call, and its body if that is no JSON of the call's data."""
    yield "nothing given", replace(call, data=None), b"{}" if call.body else None
    if call.data:
        yield "wrong types", replace(call, data={name: _wrong(value) for name, value in call.data.items()}), None
    unknown = replace(call, path=dict.fromkeys(_parameters(call.rule), _NOBODY), data=_unknown(call.data))
    yield "unknown ids", unknown, None
    if call.method in _WITH_BODY:
        yield "no JSON", call, b'{"a": '


def _parameters(rule: str) -> list[str]:
    return re.findall(r"\{([^}]+)\}", rule)


def _wrong(value: Any) -> Any:
    return {"wrong": ["type"]} if isinstance(value, str | list) else "many"


def _unknown(value: Any) -> Any:
    if isinstance(value, str) and "$" in value:
        return _NOBODY
    if isinstance(value, Mapping):
        return {name: _unknown(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_unknown(each) for each in value]
    return value


def twin_of(call: Call, twin: str) -> Call:
    """The call under `/api/` or under `/ajax-api/`."""
    if twin == "ajax" and call.rule.startswith("/api/"):
        return replace(call, rule="/ajax-api/" + call.rule.removeprefix("/api/"))
    return call
