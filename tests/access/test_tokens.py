"""What is remembered of verified tokens, and what of a stranger's text may be shown. The rest: test_oidc."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.tokens import LONGEST_TOKEN, Verified, digest, short_name, shown

ALICE, BOB = Caller("user:alice", "token"), Caller("user:bob", "token")


def test_callers_are_remembered_until_their_time() -> None:
    verified = Verified()
    verified.add(b"a", 100.0, ALICE)
    assert verified.get(b"a", 99.9) is ALICE
    assert verified.get(b"b", 0) is None
    assert verified.get(b"a", 100.0) is None
    assert len(verified) == 0


def test_the_least_recently_used_go_first() -> None:
    verified = Verified(most=3)
    for name in (b"a", b"b", b"c"):
        verified.add(name, 100, ALICE)
    assert verified.get(b"a", 0) is ALICE
    verified.add(b"d", 100, BOB)
    assert [verified.get(name, 0) for name in (b"a", b"b", b"c", b"d")] == [ALICE, None, ALICE, BOB]
    assert len(verified) == 3


def test_all_are_forgotten_at_once() -> None:
    verified = Verified()
    verified.add(b"a", 100, ALICE)
    verified.clear()
    assert verified.get(b"a", 0) is None


def test_tokens_differ_by_every_character() -> None:
    assert digest("a.b.c") != digest("a.b.d")
    assert len(digest("x" * LONGEST_TOKEN)) == 32
    for sent in ("x" * (LONGEST_TOKEN + 1), "é", "\ud800", "\x80"):
        with pytest.raises(Unauthenticated):
            digest(sent)


def test_the_short_name_says_little() -> None:
    name = short_name(digest("a.b.c"))
    assert name == f"sha256:{digest('a.b.c').hex()[:16]}"


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.integers()))
def test_what_is_shown_is_short_plain_and_one_line(value: object) -> None:
    text = shown(value)
    assert len(text) <= 81
    assert text.isprintable()
