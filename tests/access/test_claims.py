"""From claims to a caller: names, groups in the shapes of known providers, required claims, times."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.claims import ClaimRules, check_times, look_up

URL_CLAIM = "https://example.com/groups"


def reason(rules: ClaimRules, claims: dict[str, Any]) -> str:
    with pytest.raises(Unauthenticated) as caught:
        rules.caller(claims, way="token", credential="")
    return caught.value.reason


def groups(claims: dict[str, Any], name: str = "groups") -> frozenset[str]:
    return ClaimRules("sub", name).caller({"sub": "alice", **claims}, way="token", credential="").groups


def test_a_caller_is_what_the_claims_name() -> None:
    caller = ClaimRules("email", "groups").caller(
        {"sub": "00u1", "email": "alice@example.com", "groups": ["ml", "ops"]}, way="session", credential="s-1"
    )
    assert caller == Caller("user:alice@example.com", "session", frozenset({"ml", "ops"}), None, "s-1")


@pytest.mark.parametrize(
    ("name", "claims", "expected"),
    [
        ("sub", {"sub": "a"}, "a"),
        ("profile.name", {"profile": {"name": "a"}}, "a"),
        ("profile.name", {"profile.name": "literal", "profile": {"name": "inner"}}, "literal"),
        (URL_CLAIM, {URL_CLAIM: "a"}, "a"),
        ("resource_access.my.client.roles", {"resource_access": {"my.client": {"roles": "a"}}}, None),
        ("resource_access.my-client.roles", {"resource_access": {"my-client": {"roles": "a"}}}, "a"),
        ("a.b.c", {"a": {"b.c": "deep"}}, "deep"),
        ("a.b", {"a": "text"}, None),
        ("a.b", {"a": ["b"]}, None),
        ("a", {}, None),
        ("a.", {"a": {"": "empty"}}, "empty"),
    ],
)
def test_names_of_claims(name: str, claims: dict[str, Any], expected: Any) -> None:
    assert look_up(claims, name) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        " a",
        "a ",
        "a\nb",
        "a\x00b",
        "a\u202eb",
        "a\u2028b",
        "\ud800",
        "x" * 257,
        None,
        7,
        True,
        [],
        ["a"],
        {"a": "b"},
    ],
    ids=ascii,
)
def test_what_names_no_user(value: Any) -> None:
    assert "names no user" in reason(ClaimRules("sub"), {"sub": value})


@pytest.mark.parametrize("value", ["a", "Zoë Ångström", "auth0|5f7", "x" * 256, "a*b", "DOMAIN\\alice"])
def test_what_names_a_user(value: str) -> None:
    assert ClaimRules("sub").caller({"sub": value}, way="token", credential="").subject == f"user:{value}"


def test_no_claim_of_that_name_is_no_user() -> None:
    assert "'upn' (user_claim) is None" in reason(ClaimRules("upn"), {"sub": "alice"})


@pytest.mark.parametrize("value", [False, "false", None, "yes", 0])
def test_an_email_that_is_not_verified_names_nobody(value: Any) -> None:
    """Whoever may register at the provider could else enter another person's."""
    claims = {"sub": "00u1", "email": "alice@example.com", "email_verified": value}
    assert "not verified" in reason(ClaimRules("email"), claims)
    assert ClaimRules("sub").caller(claims, way="token", credential="").subject == "user:00u1"


@pytest.mark.parametrize("verified", [{"email_verified": True}, {"email_verified": "true"}, {}])
def test_an_email_that_is_not_said_to_be_unverified_counts(verified: dict[str, Any]) -> None:
    claims = {"email": "alice@example.com", **verified}
    assert ClaimRules("email").caller(claims, way="token", credential="").subject == "user:alice@example.com"


class TestGroups:
    def test_okta(self) -> None:
        assert groups({"groups": ["Everyone", "ml-writers"]}) == {"Everyone", "ml-writers"}

    def test_entra_id_roles_and_group_ids(self) -> None:
        assert groups({"roles": ["MLflow.Write"]}, "roles") == {"MLflow.Write"}
        ids = ["0d1f9d3c-5b6a-4c0e-8f53-8f7a6d0e2b11", "7d2f9d3c-5b6a-4c0e-8f53-8f7a6d0e2b12"]
        assert groups({"groups": ids}) == set(ids)

    def test_keycloak_realm_roles_client_roles_and_group_paths(self) -> None:
        claims = {
            "realm_access": {"roles": ["offline_access", "ml-admin"]},
            "resource_access": {"mlflow": {"roles": ["write"]}},
            "groups": ["/ml/writers"],
        }
        assert groups(claims, "realm_access.roles") == {"offline_access", "ml-admin"}
        assert groups(claims, "resource_access.mlflow.roles") == {"write"}
        assert groups(claims) == {"/ml/writers"}

    def test_auth0_name_with_a_url(self) -> None:
        assert groups({URL_CLAIM: ["ml"]}, URL_CLAIM) == {"ml"}

    def test_a_text_is_split_at_spaces_and_a_list_is_not(self) -> None:
        assert groups({"groups": "ml  ops"}) == {"ml", "ops"}
        assert groups({"groups": ["Data Science"]}) == {"Data Science"}

    @pytest.mark.parametrize("claims", [{}, {"groups": None}, {"groups": []}, {"groups": ""}])
    def test_none_is_no_mistake(self, claims: dict[str, Any]) -> None:
        assert groups(claims) == frozenset()

    def test_without_groups_claim_groups_do_not_count(self) -> None:
        claims = {"sub": "alice", "groups": ["admins"]}
        assert ClaimRules("sub").caller(claims, way="token", credential="").groups == frozenset()

    @pytest.mark.parametrize(
        "value",
        [7, True, {"ml": True}, ["ml", 7], ["ml", None], [["ml"]], ["ml", ""], ["a\nb"], ["x" * 257]],
        ids=ascii,
    )
    def test_what_is_no_list_of_names_refuses(self, value: Any) -> None:
        """To take the rest could lose the one group that a role denies."""
        assert "not a list of names" in reason(ClaimRules("sub", "groups"), {"sub": "alice", "groups": value})

    def test_so_many_and_no_more(self) -> None:
        many = [f"group-{number}" for number in range(200)]
        assert groups({"groups": many}) == set(many)
        claims = {"sub": "alice", "groups": [*many, "contractors"]}
        assert "201 groups" in reason(ClaimRules("sub", "groups"), claims)

    @pytest.mark.parametrize(
        "overage",
        [
            {"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": {"endpoint": "https://graph.example"}}},
            {"hasgroups": True},
            {"hasgroups": "true"},
        ],
    )
    def test_entra_ids_overage_refuses(self, overage: dict[str, Any]) -> None:
        assert "too many groups" in reason(ClaimRules("sub", "groups"), {"sub": "alice", **overage})
        assert groups({**overage, "roles": ["a"]}, "roles") == {"a"}


class TestRequiredClaims:
    @pytest.mark.parametrize(
        ("claims", "required"),
        [
            ({"tid": "t-1"}, {"tid": "t-1"}),
            ({"hd": "example.com", "tid": "t-1"}, {"hd": "example.com", "tid": "t-1"}),
            ({"realm_access": {"roles": ["x", "mlflow"]}}, {"realm_access.roles": "mlflow"}),
            ({"email_verified": True}, {"email_verified": "true"}),
            ({"level": 2}, {"level": "2"}),
            ({"scp": "User.Read MLflow.Access"}, {"scp": "MLflow.Access"}),
            ({"scope": "openid mlflow"}, {"scope": "mlflow"}),
            ({"scp": ["mlflow"]}, {"scp": "mlflow"}),
        ],
    )
    def test_there(self, claims: dict[str, Any], required: dict[str, str]) -> None:
        rules = ClaimRules("sub", None, required)
        assert rules.caller({"sub": "alice", **claims}, way="token", credential="").subject == "user:alice"

    @pytest.mark.parametrize(
        ("claims", "required"),
        [
            ({}, {"tid": "t-1"}),
            ({"tid": None}, {"tid": "None"}),
            ({"tid": "T-1"}, {"tid": "t-1"}),
            ({"tid": "t-1 t-2"}, {"tid": "t-1"}),
            ({"tid": "t-1", "hd": "evil.example"}, {"tid": "t-1", "hd": "example.com"}),
            ({"tid": ["t-2"]}, {"tid": "t-1"}),
            ({"tid": {"t-1": 1}}, {"tid": "t-1"}),
            ({"tid": 1.0}, {"tid": "1.0"}),
            ({"email_verified": True}, {"email_verified": "1"}),
            ({"scope": "mlflow-admin"}, {"scope": "mlflow"}),
        ],
    )
    def test_not_there(self, claims: dict[str, Any], required: dict[str, str]) -> None:
        assert "(required_claims)" in reason(ClaimRules("sub", None, required), {"sub": "alice", **claims})


class TestTimes:
    @pytest.mark.parametrize(
        ("claims", "expected"),
        [
            ({"exp": 1001}, 1011.0),
            ({"exp": 991}, 1001.0),
            ({"exp": 1000.5, "nbf": 1010, "iat": 1010}, 1010.5),
            ({"exp": 4_000_000_000, "iat": 0}, 4_000_000_010.0),
        ],
    )
    def test_within(self, claims: dict[str, Any], expected: float) -> None:
        assert check_times(claims, 1000, 10) == expected

    @pytest.mark.parametrize(
        ("claims", "why"),
        [
            ({}, "no exp"),
            ({"exp": 990}, "expired 10 s ago"),
            ({"exp": 1}, "expired"),
            ({"exp": 2000, "nbf": 1011}, "not yet valid"),
            ({"exp": 2000, "iat": 1011}, "issued in the future"),
            *(
                ({"exp": 2000, name: value}, f"its {name} is")
                for name in ("exp", "nbf", "iat")
                for value in (None, "2000", True, [2000], -1, math.nan, math.inf, 1e12, 10**400)
            ),
        ],
    )
    def test_outside(self, claims: dict[str, Any], why: str) -> None:
        with pytest.raises(Unauthenticated, match=why):
            check_times(claims, 1000, 10)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "groups"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    claims=st.dictionaries(st.sampled_from(["sub", "groups", "a", "hasgroups", "_claim_names", "exp"]), JSON_VALUES),
    name=st.sampled_from(["sub", "a", "a.b", "groups"]),
)
def test_any_claims_end_in_a_sound_caller_or_a_refusal(claims: dict[str, Any], name: str) -> None:
    try:
        caller = ClaimRules(name, "groups", {"a": "b"} if "b" in name else {}).caller(
            claims, way="token", credential=""
        )
        check_times(claims, 1000, 10)
    except Unauthenticated as failure:
        sound = failure.reason
    else:
        sound = "".join([caller.subject, *caller.groups])
    assert sound.isprintable()
