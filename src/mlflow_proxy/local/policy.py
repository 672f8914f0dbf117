"""IAM policy evaluation: may these documents' owner do this action on this resource?

Only what the stand-in's policies need: Effect, Action/NotAction, Resource/NotResource, Principal and string
conditions. A condition operator it does not know never widens what is allowed: an Allow with it does not
apply, a Deny with it does. moto's own evaluator is not used because its patterns are unescaped regular
expressions without `?`, and a failed condition of an Allow becomes a Deny there.
Source: "Policy evaluation logic" in the AWS IAM User Guide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

Document = Mapping[str, Any]
Context = Mapping[str, str]


class Decision(Enum):
    """The outcome of an evaluation; IMPLICIT means that nothing allowed it."""

    ALLOW = "allow"
    DENY = "explicit deny"
    IMPLICIT = "implicit deny"


def evaluate(documents: Iterable[Document], action: str, resource: str, context: Context) -> Decision:
    """What identity policies say; an explicit deny wins over every allow."""
    allowed = False
    for statement in _statements(documents):
        if not (_names_action(statement, action) and _names_resource(statement, resource)):
            continue
        if not _conditions_hold(statement, context):
            continue
        if statement.get("Effect") == "Deny":
            return Decision.DENY
        allowed = allowed or statement.get("Effect") == "Allow"
    return Decision.ALLOW if allowed else Decision.IMPLICIT


def trusts(document: Document, action: str, principals: Iterable[str], context: Context) -> bool:
    """Whether a role's trust policy lets one of `principals` (ARNs and account ids of one caller) assume it."""
    names = set(principals)
    allowed = False
    for statement in _statements([document]):
        if not (_names_action(statement, action) and _names_principal(statement, names)):
            continue
        if not _conditions_hold(statement, context):
            continue
        if statement.get("Effect") == "Deny":
            return False
        allowed = True
    return allowed


def _statements(documents: Iterable[Document]) -> Iterable[Document]:
    for document in documents:
        yield from _listed(document.get("Statement", []))


def _names_action(statement: Document, action: str) -> bool:
    if "NotAction" in statement:
        return not _any_match(statement["NotAction"], action, ignore_case=True)
    return _any_match(statement.get("Action", []), action, ignore_case=True)


def _names_resource(statement: Document, resource: str) -> bool:
    if "NotResource" in statement:
        return not _any_match(statement["NotResource"], resource)
    return _any_match(statement.get("Resource", []), resource)


def _names_principal(statement: Document, names: set[str]) -> bool:
    principal = statement.get("Principal")
    if principal == "*":
        return True
    listed = _listed(principal.get("AWS", [])) if isinstance(principal, Mapping) else []
    return "*" in listed or bool(names.intersection(listed))


def _conditions_hold(statement: Document, context: Context) -> bool:
    known = {name.lower(): value for name, value in context.items()}
    for operator, tests in statement.get("Condition", {}).items():
        holds = _OPERATORS.get(operator)
        if holds is None:
            return statement.get("Effect") == "Deny"
        for key, expected in tests.items():
            actual = known.get(key.lower())
            if actual is None and operator != "StringNotEquals":
                return False
            if actual is not None and not holds(expected, actual):
                return False
    return True


def _any_match(patterns: Any, text: str, *, ignore_case: bool = False) -> bool:
    return any(_pattern(str(each), ignore_case).fullmatch(text) for each in _listed(patterns))


@lru_cache(maxsize=1024)
def _pattern(text: str, ignore_case: bool) -> re.Pattern[str]:
    translated = re.escape(text).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(translated, re.DOTALL | (re.IGNORECASE if ignore_case else 0))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_OPERATORS: dict[str, Callable[[Any, str], bool]] = {
    "StringEquals": lambda expected, actual: actual in _listed(expected),
    "StringNotEquals": lambda expected, actual: actual not in _listed(expected),
    "StringLike": _any_match,
    "ArnEquals": _any_match,
    "ArnLike": _any_match,
}
