"""Roles: who has which, what they allow and deny, and as whom a request is signed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.faults.proxies import APP_ARN, SERVER_ARN

from mlflow_proxy.access.caller import ANONYMOUS, Caller
from mlflow_proxy.access.policy import Patterns, Policy, link_action
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import RoleSettings, TargetSettings

TARGETS = [
    TargetSettings(name="prod", arn=SERVER_ARN).build(default=True),
    TargetSettings(name="lab", arn=APP_ARN).build(default=False),
]
ALICE = Caller("user:alice@example.com", "token", frozenset({"ml", "staff"}))
ROBOT = Caller("key:ci", "key", role="writer")


def policy(*roles: dict[str, Any]) -> Policy:
    return Policy([RoleSettings(**{"targets": ["*"], **role}) for role in roles], TARGETS)


READER = {"name": "reader", "groups": ["staff"], "allow": ["Get*", "Search*", "List*", "AccessUI"]}
WRITER = {"name": "writer", "subjects": ["user:a*@example.com"], "allow": ["*"], "targets": ["lab"]}


def outcome(policy: Policy, caller: Caller, target: str, action: str) -> str:
    """The role that allows it, or the refusal's words."""
    try:
        return policy.decide(caller, target, action).role
    except Refusal as refusal:
        return f"{refusal.status} {refusal.message}"


@pytest.mark.parametrize(
    ("caller", "target", "action", "role"),
    [
        (ALICE, "prod", "GetRun", "reader"),
        (ALICE, "prod", "SearchRuns", "reader"),
        (ALICE, "lab", "GetRun", "reader"),  # both match: the first in file order
        (ALICE, "lab", "DeleteRun", "writer"),  # the first that allows it
        (ROBOT, "lab", "DeleteRun", "writer"),  # by the key's role, without any pattern
    ],
)
def test_allowed(caller: Caller, target: str, action: str, role: str) -> None:
    assert outcome(policy(READER, WRITER), caller, target, action) == role


@pytest.mark.parametrize(
    ("caller", "target", "action", "words"),
    [
        (ALICE, "prod", "DeleteRun", "403 The role 'reader' does not allow DeleteRun on the target 'prod'."),
        (ROBOT, "prod", "GetRun", "403 No role of this caller allows GetRun on the target 'prod'."),
        (Caller("user:bob@example.com", "token"), "lab", "GetRun", "No role of this caller allows GetRun"),
        (ANONYMOUS, "prod", "GetRun", "No role of this caller"),
        (Caller("key:ci", "key", role="gone"), "lab", "GetRun", "No role of this caller"),
    ],
)
def test_refused_with_action_role_and_target(caller: Caller, target: str, action: str, words: str) -> None:
    assert words in outcome(policy(READER, WRITER), caller, target, action)


def test_a_deny_wins_over_every_allow_whatever_the_order() -> None:
    guard = {"name": "guard", "groups": ["ml"], "deny": ["Delete*"]}
    for roles in ([READER, WRITER, guard], [guard, READER, WRITER]):
        words = outcome(policy(*roles), ALICE, "lab", "DeleteRun")
        assert words.startswith("403 The role 'guard' denies DeleteRun on the target 'lab'.")
        assert outcome(policy(*roles), ALICE, "lab", "CreateRun") == "writer"
    assert outcome(policy(READER, WRITER, {**guard, "targets": ["prod"]}), ALICE, "lab", "DeleteRun") == "writer"


def test_several_actions_at_once_need_one_role_that_allows_them_all() -> None:
    some = policy({**READER, "allow": ["GetRun"]}, {**WRITER, "allow": ["GetRun", "SearchRuns"]})
    assert some.decide(ALICE, "lab", "GetRun", "SearchRuns").role == "writer"
    with pytest.raises(Refusal, match="None of the roles 'reader', 'writer' allows DeleteRun on"):
        some.decide(ALICE, "lab", "GetRun", "DeleteRun")
    split = policy({**READER, "allow": ["GetRun"]}, {**WRITER, "allow": ["SearchRuns"]})
    with pytest.raises(Refusal, match="None of the roles 'reader', 'writer' allows GetRun and SearchRuns on"):
        split.decide(ALICE, "lab", "GetRun", "SearchRuns")
    guarded = policy(READER, {"name": "guard", "groups": ["ml"], "deny": ["SearchRuns"]})
    with pytest.raises(Refusal, match="The role 'guard' denies SearchRuns on"):
        guarded.decide(ALICE, "lab", "GetRun", "SearchRuns")


def test_unknown_routes_need_a_plain_star() -> None:
    unknown = "Unknown:POST /api/9.9/mlflow/new"
    for allow in (["Unknown:*"], ["U*"], ["**"], ["Get*", "Unknown*"]):
        assert "does not allow" in outcome(policy({**READER, "allow": allow}), ALICE, "prod", unknown)
    assert outcome(policy({**READER, "allow": ["*"]}), ALICE, "prod", unknown) == "reader"
    assert "denies" in outcome(policy({**READER, "allow": ["*"], "deny": ["Unknown:*"]}), ALICE, "prod", unknown)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_presigned_links_must_be_named(target: Any) -> None:
    action = link_action(target)
    assert (
        action
        == {
            "prod": "CreatePresignedMlflowTrackingServerUrl",
            "lab": "CreatePresignedMlflowAppUrl",
        }[target.name]
    )
    for allow in (["*"], ["Create*"], ["C*Url"]):
        assert "does not allow" in outcome(policy({**READER, "allow": allow}), ALICE, target.name, action)
        assert not policy({**READER, "allow": allow}).allows_link(ALICE, target.name)
    for allow in ([action], ["CreatePresigned*"]):
        assert outcome(policy({**READER, "allow": allow}), ALICE, target.name, action) == "reader"
        assert policy({**READER, "allow": allow}).allows_link(ALICE, target.name)


def test_only_the_named_targets_are_visible() -> None:
    some = policy({**READER, "targets": ["prod"]}, WRITER)
    assert some.visible(ALICE) == {"prod", "lab"}
    assert some.visible(Caller("user:bob", "token", frozenset({"staff"}))) == {"prod"}
    assert some.visible(ROBOT) == {"lab"}
    assert some.visible(ANONYMOUS) == frozenset()


def test_own_pages_count_roles_whatever_their_targets() -> None:
    watch = policy({"name": "watch", "targets": ["lab"], "allow": ["proxy:GetMetrics"], "subjects": ["key:prom"]})
    prometheus = Caller("key:prom", "key")
    assert watch.decide_own(prometheus, "proxy:GetMetrics").role == "watch"
    assert watch.allows_own(prometheus, "proxy:GetMetrics")
    assert not watch.allows_own(prometheus, "proxy:GetReadiness")
    assert not policy(READER).allows_own(ALICE, "proxy:GetMetrics")  # Get* names MLflow's actions only
    watch.require_any_role(prometheus)
    with pytest.raises(Refusal, match="No role is this caller's") as refused:
        watch.require_any_role(ALICE)
    assert refused.value.status == 403


def test_without_roles_nothing_is_restricted() -> None:
    everything = policy()
    assert everything.decide(ANONYMOUS, "prod", "Unknown:POST /x") == ("", None)
    assert everything.visible(ANONYMOUS) == {"prod", "lab"}
    everything.require_any_role(ANONYMOUS)


def test_roles_can_restrict_anonymous_callers() -> None:
    read_only = policy({"name": "everybody", "subjects": ["anonymous"], "allow": ["Get*"]})
    assert outcome(read_only, ANONYMOUS, "prod", "GetRun") == "everybody"
    assert "does not allow DeleteRun" in outcome(read_only, ANONYMOUS, "prod", "DeleteRun")


ROLE_ARN = "arn:aws:iam::111122223333:role/mlflow-writer"


def test_the_allowing_role_signs_in_the_targets_region_for_this_caller() -> None:
    some = policy({**READER, "assume_role_arn": ROLE_ARN, "session_tags": True}, {**WRITER, "assume_role_arn": None})
    session = some.decide(ALICE, "prod", "GetRun").session
    assert session is not None
    assert (session.role_arn, session.region, session.caller) == (ROLE_ARN, "us-east-1", ALICE.subject)
    assert some.decide(ALICE, "prod", "SearchRuns").session is session
    assert some.decide(ALICE, "lab", "DeleteRun").session is None
    bob = Caller("user:bob", "token", frozenset({"staff"}))
    other = some.decide(bob, "prod", "GetRun").session
    assert other is not None
    assert other.session_name != session.session_name


def test_callers_of_one_name_but_other_groups_are_told_apart() -> None:
    some = policy(READER)
    assert outcome(some, ALICE, "prod", "GetRun") == "reader"
    assert "No role" in outcome(some, Caller(ALICE.subject, ALICE.way), "prod", "GetRun")


def test_what_is_remembered_is_bounded() -> None:
    some = policy(READER)
    for number in range(20_000):
        outcome(some, ALICE, "prod", f"Unknown:GET /{number}")
    assert len(some._decided) <= 8192


@given(st.lists(st.text(alphabet="ab*.[?\n", max_size=6), max_size=4), st.text(alphabet="ab.[?\n", max_size=8))
def test_only_the_star_is_special(patterns: list[str], text: str) -> None:
    def matches(pattern: str, text: str) -> bool:
        if not pattern:
            return not text
        if pattern[0] == "*":
            return matches(pattern[1:], text) or (bool(text) and matches(pattern, text[1:]))
        return bool(text) and text[0] == pattern[0] and matches(pattern[1:], text[1:])

    assert Patterns(patterns).match(text) == any(matches(pattern, text) for pattern in patterns)
