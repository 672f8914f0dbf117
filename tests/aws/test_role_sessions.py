"""What STS is told of a caller: always what it takes, and never the same for two callers."""

from __future__ import annotations

import re
import unicodedata
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.aws.role_sessions import RoleSession, role_session
from mlflow_proxy.settings import RoleSettings

ARN = "arn:aws:iam::444455556666:role/people"
REGION = "eu-west-1"
SUBJECTS = st.text(max_size=400)


def a_role(**more: object) -> RoleSettings:
    values = {"name": "writer", "targets": ["*"], "assume_role_arn": ARN, "session_tags": True, "source_identity": True}
    return RoleSettings.model_validate(values | more)


def session(subject: str, **more: object) -> RoleSession:
    return role_session(a_role(**more), subject, REGION)


def digest(subject: str) -> str:
    return sha256(subject.encode()).hexdigest()[:16]


def test_all_of_it() -> None:
    subject = "user:alice@example.com"
    name = f"alice@example.com-{digest(subject)}"
    assert session(subject, external_id="customer-7") == RoleSession(
        role_arn=ARN,
        external_id="customer-7",
        region=REGION,
        session_name=name,
        tags=(("caller", subject), ("role", "writer")),
        source_identity=name,
        caller=subject,
    )


def test_only_what_is_configured() -> None:
    plain = session("user:alice", session_tags=False, source_identity=False)
    assert (plain.tags, plain.source_identity, plain.external_id) == ((), None, None)
    assert plain.session_name == f"alice-{digest('user:alice')}"
    assert plain.label == f"role {ARN} as alice-{digest('user:alice')}"


def test_a_role_without_an_iam_role() -> None:
    with pytest.raises(ValueError, match="writer has no assume_role_arn"):
        session("user:alice", assume_role_arn=None)


@pytest.mark.parametrize(
    ("subject", "readable"),
    [
        ("user:alice@example.com", "alice@example.com"),
        ("user:Müller, Jörg", "M-ller,-J-rg"),
        ("user:a:b/c", "a-b-c"),
        ("user:key=ci", "key-ci"),
        ("user:user:x", "user-x"),
        ("key:ci", "key=ci"),
        ("cert:CN=trainer,O=Example", "cert=CN=trainer,O=Example"),
        ("anonymous", "anonymous"),
        ("user:", ""),
        ("user:" + "x" * 100, "x" * 47),
    ],
)
def test_session_name(subject: str, readable: str) -> None:
    assert session(subject).session_name == f"{readable}-{digest(subject)}"


@pytest.mark.parametrize(
    ("subject", "value"),
    [
        ("user:alice@example.com", None),
        ("user:Müller Jörg 七", None),
        ("cert:CN=trainer/O=x", None),
        ("cert:CN=trainer,O=x", "cert:CN=trainer-O=x"),
        ("user:a\nb", "user:a-b"),
        ("user:a\u2028b", "user:a-b"),
        ("user:" + "x" * 251, None),
        ("user:" + "x" * 252, "user:" + "x" * 234),
    ],
)
def test_caller_tag(subject: str, value: str | None) -> None:
    expected = subject if value is None else f"{value}-{digest(subject)}"
    assert dict(session(subject).tags)["caller"] == expected


def test_half_a_surrogate_pair() -> None:
    """A token's JSON can hold one."""
    first, second = session("user:a\ud800"), session("user:a\udfff")
    assert first.session_name.startswith("a--")
    assert first.session_name != second.session_name
    assert first.tags != second.tags


def test_nobody_can_be_called_what_another_is_changed_into() -> None:
    changed = dict(session("user:a,b").tags)["caller"]
    assert dict(session(changed).tags)["caller"] != changed


@given(SUBJECTS)
def test_sts_takes_it(subject: str) -> None:
    made = session(subject)
    assert re.fullmatch(r"[\w+=,.@-]{2,64}", made.session_name, re.ASCII)
    assert made.source_identity == made.session_name
    assert made.caller == subject
    value = dict(made.tags)["caller"]
    assert len(value) <= 256
    assert all(unicodedata.category(char)[0] in "LNZ" or char in "_.:/=+-@" for char in value)


@given(SUBJECTS, SUBJECTS)
def test_no_two_callers_share_a_session(one: str, other: str) -> None:
    first, second = session(one), session(other)
    assert (first == second) is (one == other)
    assert (first.session_name == second.session_name) is (one == other)
    assert (first.tags == second.tags) is (one == other)


@given(SUBJECTS)
def test_a_changed_name_stays_the_callers_own(subject: str) -> None:
    """Nor by asking for the very text that another's name was made into."""
    first = session(subject)
    for text in (first.session_name, dict(first.tags)["caller"], f"user:{first.session_name}"):
        if text != subject:
            second = session(text)
            assert second.session_name != first.session_name
            assert second.tags != first.tags
