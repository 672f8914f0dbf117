"""Which actions a GraphQL request needs: MLflow's UI reads runs that way, several things with one request.

All of a document counts, whichever of its operations the request names: every root field, and the fields below that
MLflow answers by another call. What cannot be read for certain, or could be read in two ways, is refused. Whether the
query is valid is MLflow's business, and so are its own limits (ten root fields, depth ten).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from typing import Any
from urllib.parse import parse_qsl

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionNode,
    SelectionSetNode,
    parse,
)

from mlflow_proxy.errors import Refusal

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
_DOCUMENT_LIMIT = 16 * 1024  # characters; the largest query of MLflow 3.17's UI has about 1,500
_TOKEN_LIMIT = 400  # that query has 120
_MOST_ACTIONS = 20  # MLflow itself answers ten root fields at the most
_NAME_LENGTH = 200

# Where GraphQL servers other than MLflow's look, too.
_URL_PARAMETERS = frozenset({"query", "operationName", "variables", "extensions"})


def actions_of(method: str, content_type: str, query: str, body: bytes) -> tuple[str, ...]:
    """The names of all actions that a request to `/graphql` needs, each once, in the order of the document.

    `query` is the URL's. A root field that MLflow 3.17 does not have is `Unknown:<METHOD> /graphql <field>`. Raises
    Refusal 400 for what is not one readable GraphQL document in a JSON object.
    """
    if query and not _URL_PARAMETERS.isdisjoint(name for name, _ in parse_qsl(query, keep_blank_values=True)):
        raise _bad("MLflow reads GraphQL queries from the body only. Leave them out of the URL.")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise _bad("A GraphQL request is JSON: send Content-Type: application/json.")
    if len(body) > BODY_LIMIT:
        raise _bad(f"The GraphQL request is larger than {BODY_LIMIT} bytes. Use the REST API.")
    return _actions_in(method, _document(body))


def _document(body: bytes) -> str:
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


@lru_cache(maxsize=128)  # the UI sends the same few documents all the time, and parsing one takes milliseconds
def _actions_in(method: str, document: str) -> tuple[str, ...]:
    operations, fragments = _definitions(_parsed(document))
    actions: dict[str, None] = {}
    used: set[tuple[str, bool]] = set()
    waiting: list[tuple[SelectionNode, bool]] = []  # a stack: the next node is the last

    def enter(selection_set: SelectionSetNode, is_root: bool) -> None:
        waiting.extend((node, is_root) for node in reversed(selection_set.selections))

    for operation in reversed(operations):
        enter(operation.selection_set, is_root=True)
    while waiting:
        node, is_root = waiting.pop()
        if isinstance(node, FieldNode):
            name = node.name.value
            if is_root:
                actions[ROOT_FIELDS.get(name) or f"Unknown:{method} /graphql {name[:_NAME_LENGTH]}"] = None
            elif name in NESTED_FIELDS:
                actions[NESTED_FIELDS[name]] = None
            if len(actions) > _MOST_ACTIONS:
                raise _bad(f"The GraphQL document needs more than {_MOST_ACTIONS} different actions. Send several.")
            if node.selection_set:
                enter(node.selection_set, is_root=False)
        elif isinstance(node, InlineFragmentNode):
            enter(node.selection_set, is_root)
        elif isinstance(node, FragmentSpreadNode):
            use = (node.name.value, is_root)
            if use not in used:
                used.add(use)
                enter(fragments[node.name.value].selection_set, is_root)
    if fragments.keys() != {name for name, _ in used}:
        raise _bad("The GraphQL document defines a fragment that it does not use.")
    return tuple(actions)


def _parsed(document: str) -> DocumentNode:
    try:
        return parse(document, no_location=True, max_tokens=_TOKEN_LIMIT)
    except GraphQLError as error:
        raise _bad(f"The GraphQL document cannot be read: {error.message[:_NAME_LENGTH]}") from None
    except RecursionError:
        raise _bad("The GraphQL document is nested too deeply.") from None


def _definitions(
    document: DocumentNode,
) -> tuple[list[OperationDefinitionNode], dict[str, FragmentDefinitionNode]]:
    """A document's operations, and its fragments by name, which refer to each other without a circle."""
    operations = [node for node in document.definitions if isinstance(node, OperationDefinitionNode)]
    fragments = {node.name.value: node for node in document.definitions if isinstance(node, FragmentDefinitionNode)}
    if not operations or len(operations) + len(fragments) != len(document.definitions):
        raise _bad("A GraphQL document has operations, and fragments of different names. Nothing else belongs there.")
    spreads = {name: set(_spreads(node.selection_set)) for name, node in fragments.items()}
    for names in (*spreads.values(), *(set(_spreads(operation.selection_set)) for operation in operations)):
        if not names <= fragments.keys():
            raise _bad("The GraphQL document uses a fragment that it does not define.")
    try:
        TopologicalSorter(spreads).prepare()
    except CycleError:
        raise _bad("The fragments of the GraphQL document use each other in a circle.") from None
    return operations, fragments


def _spreads(selection_set: SelectionSetNode) -> Iterator[str]:
    """The names of all fragments that are used anywhere below."""
    waiting = [selection_set]
    while waiting:
        for node in waiting.pop().selections:
            if isinstance(node, FragmentSpreadNode):
                yield node.name.value
            elif isinstance(node, FieldNode | InlineFragmentNode) and node.selection_set:
                waiting.append(node.selection_set)


def _bad(message: str) -> Refusal:
    return Refusal(400, message)
