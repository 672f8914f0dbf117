"""Which actions a GraphQL request needs: MLflow's UI reads runs that way, several things with one request.

All of a document counts, whichever of its operations the request names: every root field, and the fields below that
MLflow answers by another call. What cannot be read for certain, or could be read in two ways, is refused, and so is
what MLflow refuses for its size. Whether the query is valid is MLflow's business.

The reader here takes a document apart in time linear in its length, many times faster than GraphQL's own parser does,
which can be kept busy for long. It knows where operations, fragments and fields are, and passes over arguments. It need
not be as strict: whatever GraphQL's parser takes, it reads alike, and what that refuses, MLflow does not carry out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from mlflow_proxy.errors import Refusal
from mlflow_proxy.json_bounds import excess

# The root fields of MLflow's schema (mlflow/server/graphql), of queries and mutations alike, since MLflow has some
# fields in both. None of them changes anything. The two tests only echo.
ROOT_FIELDS = {
    "mlflowGetExperiment": "GetExperiment",
    "mlflowGetMetricHistoryBulkInterval": "GetMetricHistory",
    "mlflowGetRun": "GetRun",
    "mlflowListArtifacts": "ListArtifacts",
    "mlflowSearchDatasets": "SearchExperimentDatasets",
    "mlflowSearchModelVersions": "SearchModelVersions",
    "mlflowSearchRuns": "SearchRuns",
    "test": "AccessUI",
    "testMutation": "AccessUI",
    "__schema": "AccessUI",
    "__type": "AccessUI",
    "__typename": "AccessUI",
}

# Fields of a run for which MLflow looks up something else. In other types, fields of these names are part of the answer
# to a root field that needs the same action anyway.
NESTED_FIELDS = {"experiment": "GetExperiment", "modelVersions": "SearchModelVersions"}

BODY_LIMIT = 256 * 1024
# Of values in the JSON, which has the document's commas and brackets, too.
_ELEMENT_LIMIT = 50_000
_DOCUMENT_LIMIT = 64 * 1024  # characters; the largest query of MLflow 3.17's UI has about 1,500
_TOKEN_LIMIT = 16_000  # that query has 120; a thousand fields with an alias and an argument each have 10,000
# Larger documents are not kept.
_REMEMBERED = 4096
# MLflow's own bounds (mlflow/server/graphql/graphql_no_batching.py, MLFLOW_SERVER_GRAPHQL_MAX_ROOT_FIELDS), counted as
# it counts: over all operations, and a fragment's fields wherever it is used.
_MOST_ROOT_FIELDS = 10
_MOST_FIELDS = 1000
_DEEPEST = 10
# Fields and uses of fragments: MLflow does not count the latter.
_MOST_STEPS = 10_000
_NAME_LENGTH = 200

# Where GraphQL servers other than MLflow's look, too.
_URL_PARAMETERS = frozenset({"query", "operationName", "variables", "extensions"})


def actions_of(method: str, content_type: str, query: str, body: bytes) -> tuple[str, ...]:
    """The names of all actions that a request to `/graphql` needs, each once, in the order of the document.

    `query` is the URL's. A root field that MLflow 3.17 does not have is `Unknown:<METHOD> /graphql <field>`. Raises
    Refusal 400 for what is not one readable GraphQL document in a JSON object. Takes some milliseconds at the most.
    """
    if query and not _URL_PARAMETERS.isdisjoint(name for name, _ in parse_qsl(query, keep_blank_values=True)):
        raise _bad("MLflow reads GraphQL queries from the body only. Leave them out of the URL.")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise _bad("A GraphQL request is JSON: send Content-Type: application/json.")
    if len(body) > BODY_LIMIT:
        raise _bad(f"The GraphQL request is larger than {BODY_LIMIT} bytes. Use the REST API.")
    document = _document(body)
    return _known_actions(method, document) if len(document) <= _REMEMBERED else _actions_in(method, document)


def _document(body: bytes) -> str:
    if excess(body, _ELEMENT_LIMIT):
        raise _bad(f"The body is not a JSON object of at most {_ELEMENT_LIMIT} values and without overlong numbers.")
    try:
        request = json.loads(body.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise _bad('The body is not a JSON object in UTF-8. Send {"query": "…", "variables": {…}}.') from None
    document = request.get("query") if isinstance(request, dict) else None
    if not isinstance(document, str):
        raise _bad('The body is not a JSON object with a GraphQL document. Send {"query": "…", "variables": {…}}.')
    if len(document) > _DOCUMENT_LIMIT:
        raise _bad(f"The GraphQL document is longer than {_DOCUMENT_LIMIT} characters. Pass values as variables.")
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _bad("The JSON body has the same key twice.")
    return found


class _Field(NamedTuple):
    """A field by its name, never its alias; `selections` are those below it, None for a leaf."""

    name: str
    selections: _Selections | None


class _Spread(NamedTuple):
    """A use of a fragment that is defined elsewhere in the document."""

    fragment: str


class _Inline(NamedTuple):
    """Selections that count as if they stood where this does."""

    selections: _Selections


_Selections = list["_Field | _Spread | _Inline"]


def _actions_in(method: str, document: str) -> tuple[str, ...]:
    operations, fragments = _Reader(document).definitions()
    _check_fragments(operations, fragments)
    actions: dict[str, None] = {}
    used: set[str] = set()
    root_fields = fields = steps = 0
    # A stack: the next node is the last. With each its depth, and the fragments that were used beside it.
    waiting: list[tuple[_Field | _Spread | _Inline, int, set[str]]] = []

    def enter(selections: _Selections, depth: int, beside: set[str]) -> None:
        waiting.extend((node, depth, beside) for node in reversed(selections))

    for selections in reversed(operations):
        enter(selections, 1, set())
    while waiting:
        node, depth, beside = waiting.pop()
        steps += 1
        if isinstance(node, _Field):
            fields += 1
            if depth == 1:
                root_fields += 1
                actions[ROOT_FIELDS.get(node.name) or f"Unknown:{method} /graphql {node.name[:_NAME_LENGTH]}"] = None
            elif node.name in NESTED_FIELDS:
                actions[NESTED_FIELDS[node.name]] = None
            if node.selections is not None:
                if depth == _DEEPEST:
                    raise _bad(f"The GraphQL document is nested too deeply: MLflow answers {_DEEPEST} levels.")
                enter(node.selections, depth + 1, set())
        elif isinstance(node, _Inline):
            enter(node.selections, depth, beside)
        elif node.fragment not in beside:
            beside.add(node.fragment)
            used.add(node.fragment)
            enter(fragments[node.fragment], depth, beside)
        if root_fields > _MOST_ROOT_FIELDS:
            raise _bad(f"The GraphQL document has more than {_MOST_ROOT_FIELDS} root fields. Send several.")
        if fields > _MOST_FIELDS or steps > _MOST_STEPS:
            raise _too_many_fields()
    if fragments.keys() != used:
        raise _bad("The GraphQL document defines a fragment that it does not use.")
    return tuple(actions)


# The UI sends the same few documents all the time.
_known_actions = lru_cache(maxsize=128)(_actions_in)


def _check_fragments(operations: list[_Selections], fragments: dict[str, _Selections]) -> None:
    """Raises Refusal 400 unless all fragments are defined, and refer to each other without a circle."""
    spreads = {name: set(_spreads(selections)) for name, selections in fragments.items()}
    for names in (*spreads.values(), *(set(_spreads(selections)) for selections in operations)):
        if not names <= fragments.keys():
            raise _bad("The GraphQL document uses a fragment that it does not define.")
    try:
        TopologicalSorter(spreads).prepare()
    except CycleError:
        raise _bad("The fragments of the GraphQL document use each other in a circle.") from None


def _spreads(selections: _Selections) -> Iterator[str]:
    """The names of all fragments that are used anywhere below."""
    waiting = [selections]
    while waiting:
        for node in waiting.pop():
            if isinstance(node, _Spread):
                yield node.fragment
            elif node.selections is not None:
                waiting.append(node.selections)


# Lexical tokens by the GraphQL specification of October 2021, section 2.1; in the group what is not ignored. Numbers
# are taken loosely, and what is no token at all as a token of one character, which no selection has. A text without an
# end takes all the rest, so that nothing is looked at twice.
_TOKEN = re.compile(
    r"""[\ufeff\t\n\r ,]++ | \#[^\n\r]*+ |
    ( [A-Za-z_][A-Za-z0-9_]*+
    | \.\.\.
    | \"{3} (?: [^"\\]++ | \\(?:"{3})?+ | "{1,2}(?!") )*+ "{3}
    | "(?!"") (?: [^"\\\n\r]++ | \\[^\n\r] )*+ "
    | -?[0-9][A-Za-z0-9_.]*+
    | "[\s\S]*+
    | [^\ufeff\t\n\r ,] )
    """,
    re.VERBOSE,
)
_NAME_STARTS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_")
_OPERATIONS = frozenset({"query", "mutation", "subscription"})
_END = ""


class _Reader:
    """Reads one document's tokens from the first to the last, without recursion."""

    def __init__(self, document: str) -> None:
        self._words: list[str] = [word for word in _TOKEN.findall(document) if word]
        if len(self._words) > _TOKEN_LIMIT:
            raise _bad(f"The GraphQL document has more than {_TOKEN_LIMIT} tokens. Pass values as variables.")
        self._words += (_END,) * 3  # as far as the reader looks ahead
        self._at = 0
        self._fields = 0

    def definitions(self) -> tuple[list[_Selections], dict[str, _Selections]]:
        """The selections of all operations, and of fragments by their names. Raises Refusal 400."""
        operations: list[_Selections] = []
        fragments: dict[str, _Selections] = {}
        while True:
            word = self._words[self._at]
            if word == "{":
                operations.append(self._selections())
            elif word in _OPERATIONS:
                self._at += 1
                if _is_name(self._words[self._at]):
                    self._at += 1
                self._pass_over_arguments()
                self._pass_over_directives()
                operations.append(self._selections())
            elif word == "fragment":
                self._at += 1
                name = self._name()
                if name == "on" or name in fragments:
                    raise _bad(_DEFINITIONS)
                self._pass_over("on")
                self._name()
                self._pass_over_directives()
                fragments[name] = self._selections()
            elif word != _END:
                raise _bad(_DEFINITIONS) if _is_name(word) else self._unreadable()
            else:
                break
        if not operations:
            raise _bad(_DEFINITIONS) if fragments else self._unreadable()
        return operations, fragments

    def _selections(self) -> _Selections:
        """The selections between two braces, with all that is nested in them."""
        self._pass_over("{")
        outer: list[_Selections] = []
        selections: _Selections = []
        while True:
            word = self._words[self._at]
            nested: _Selections = []
            if word == "}":
                self._at += 1
                if not selections:
                    raise self._unreadable()
                if not outer:
                    return selections
                selections = outer.pop()
                continue
            if word == "...":
                self._at += 1
                if self._words[self._at] == "on":
                    self._at += 1
                    self._name()
                elif _is_name(self._words[self._at]):
                    selections.append(_Spread(self._name()))
                    self._pass_over_directives()
                    continue
                self._pass_over_directives()
                selections.append(_Inline(nested))
            else:
                name = self._name()
                self._fields += 1
                if self._fields > _MOST_FIELDS:  # none is left out later: all fragments have to be used
                    raise _too_many_fields()
                if self._words[self._at] == ":":
                    self._at += 1
                    name = self._name()
                self._pass_over_arguments()
                self._pass_over_directives()
                if self._words[self._at] != "{":
                    selections.append(_Field(name, None))
                    continue
                selections.append(_Field(name, nested))
            self._pass_over("{")
            outer.append(selections)
            selections = nested

    def _name(self) -> str:
        word = self._words[self._at]
        if not _is_name(word):
            raise self._unreadable()
        self._at += 1
        return word

    def _pass_over(self, word: str) -> None:
        if self._words[self._at] != word:
            raise self._unreadable()
        self._at += 1

    def _pass_over_arguments(self) -> None:
        """Pass over what stands in parentheses, if anything does: values, or definitions of variables."""
        if self._words[self._at] != "(":
            return
        depth = 0
        while True:
            word = self._words[self._at]
            if word == "(":
                depth += 1
            elif word == ")":
                depth -= 1
            elif word == _END:
                raise self._unreadable()
            self._at += 1
            if not depth:
                return

    def _pass_over_directives(self) -> None:
        while self._words[self._at] == "@":
            self._at += 1
            self._name()
            self._pass_over_arguments()

    def _unreadable(self) -> Refusal:
        word = self._words[self._at]
        where = f"at {word[:_NAME_LENGTH]!a}" if word else "before its end"
        return _bad(f"The GraphQL document cannot be read: something else is expected {where}.")


_DEFINITIONS = "A GraphQL document has operations, and fragments of different names. Nothing else belongs there."


def _is_name(word: str) -> bool:
    return word[:1] in _NAME_STARTS


def _too_many_fields() -> Refusal:
    return _bad(
        f"The GraphQL document cannot be read: more than {_MOST_FIELDS} fields, fragments unfolded. Send several."
    )


def _bad(message: str) -> Refusal:
    return Refusal(400, message)
