"""API keys: what they look like, which ones count, and how a running proxy takes up changes of the file."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.access import keys as module
from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.key_record import KEY, KEYS_MAX, LINE_MAX, Key, KeysError, make_key, parse_keys
from mlflow_proxy.access.keys import KeyRing
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import Access, Aws

NOW = datetime(2026, 11, 24, 6, 7, 48, tzinfo=UTC)
DAY = timedelta(days=1)
TIMES = st.datetimes(datetime(2000, 1, 1), timezones=st.just(UTC)).map(lambda time: time.replace(microsecond=0))
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


def a_key(name: str = "ci-pipeline", role: str = "writer", **more: Any) -> tuple[str, Key]:
    text, key = make_key(name, role, created=NOW, expires=NOW + 90 * DAY)
    return text, replace(key, **more)


def text_of(*keys: Key) -> str:
    return "".join(json.dumps(key.fields()) + "\n" for key in keys)


def put(path: Path, *keys: Key) -> None:
    """Replace the file as the command does: all at once."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text_of(*keys))
    fresh.replace(path)


@contextmanager
def ring_on(path: Path, clock: Clock | None = None) -> Iterator[KeyRing]:
    """A ring that watches a file."""
    ring = KeyRing(Access(keys_file=path), Aws(), clock=clock or Clock())
    asyncio.run(ring.start())
    try:
        yield ring
    finally:
        asyncio.run(ring.close())


def knows(ring: KeyRing, key: str) -> bool:
    try:
        ring.identify(key)
    except (Unauthenticated, Refusal):  # wrong, or nobody can tell, as the keys were never read
        return False
    return True


def reason(ring: KeyRing, key: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        ring.identify(key)
    return caught.value.reason


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("mlflow_proxy.")]
    return [record.getMessage() for record in ours if record.levelno >= logging.ERROR]


def watching() -> bool:
    return any(thread.name == "api-keys" for thread in threading.enumerate())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_INTERVAL", 0.05)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[KeyRing], None]:
    """After its start a ring looks only when it is told to."""
    monkeypatch.setattr(module, "_FILE_INTERVAL", 3600.0)
    monkeypatch.setattr(module, "_FIRST_RETRY", 3600.0)
    return lambda ring: ring._sources[0]._look()


class TestFormat:
    @given(st.text(ALPHABET + "._@+-", min_size=1, max_size=64), st.sampled_from(["reader", "a", "Writer_2"]))
    def test_keys_look_as_documented(self, name: str, role: str) -> None:
        text, key = make_key(name, role, created=NOW, expires=None)
        prefix, key_id, secret = text.split("_")
        assert (prefix, key_id) == ("mlp", key.id)
        assert len(key_id) == 8
        assert not set(key_id) & set("01ilo_")
        assert len(secret) == 43
        assert set(secret) <= set(ALPHABET)
        assert KEY.fullmatch(text)
        assert key.sha256 == sha256(text.encode()).hexdigest()
        assert secret not in text_of(key) + repr(key)

    def test_the_secret_has_256_bits(self) -> None:
        secrets = [a_key()[0].rpartition("_")[2] for _ in range(400)]
        assert len(secrets[0]) * math.log2(len(ALPHABET)) >= 256
        for place in zip(*secrets, strict=True):  # no place is fixed, or takes few letters only
            assert len(set(place)) > 40
        assert set("".join(secrets)) == set(ALPHABET)

    def test_ids_avoid_those_that_are_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn = iter("aaaaaaaabbbbbbbbcccccccc" + "x" * 43)
        monkeypatch.setattr("secrets.choice", lambda letters: next(drawn))
        assert make_key("bbbbbbbb", "writer", created=NOW, expires=None, taken={"aaaaaaaa"})[1].id == "cccccccc"

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "a\n", "a" * 65, "a,b", "mlp:1", "*"])
    def test_names_that_cannot_be(self, name: str) -> None:
        with pytest.raises(KeysError, match="cannot be a key's name"):
            make_key(name, "writer", created=NOW, expires=None)

    @given(
        st.builds(
            Key,
            id=st.text("23456789abcdefghjkmnpqrstuvwxyz", min_size=8, max_size=8),
            name=st.text(ALPHABET + "._@+-", min_size=1, max_size=64),
            sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
            role=st.from_regex(r"[a-z0-9]{1,63}", fullmatch=True),
            created=TIMES,
            expires=st.none() | TIMES,
            ends=st.none() | TIMES,
            revoked=st.none() | TIMES,
        )
    )
    def test_a_line_says_all(self, key: Key) -> None:
        assert parse_keys(text_of(key).encode()) == {key.id: key}

    def test_lines_stay_readable_by_later_versions(self) -> None:
        """The documented form, written out."""
        line = (
            '{"id": "7x3kq2mp", "name": "ci-pipeline", "sha256": "' + "0f" * 32 + '", "role": "writer", '
            '"created": "2026-11-24T06:07:48Z", "expires": "2027-02-22T06:07:48Z"}'
        )
        key = Key("7x3kq2mp", "ci-pipeline", "0f" * 32, "writer", NOW, NOW + 90 * DAY)
        assert parse_keys(line.encode()) == {"7x3kq2mp": key}
        assert text_of(key) == f"{line}\n"
        assert list(parse_keys(f"\n  \r\n{line}\r\n\n".encode())) == ["7x3kq2mp"]


BAD_LINES = {
    "not JSON": (b"hunter2", "is not JSON"),
    "cut short": (b'{"id": "hunter2', "is not JSON"),
    "too deep": (b"[" * 4000, "is not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "is not JSON"),
    "a list": (b'["hunter2"]', "is not a JSON object"),
    "too long": (b'{"id": "' + b"x" * LINE_MAX + b'"}', f"is longer than {LINE_MAX} bytes"),
    "a typing error": ({"expire": "2026-11-24T06:07:48Z"}, "has a field that does not exist"),
    "expires forgotten": ({"expires": ...}, "expires is missing"),
    "expires without zone": ({"expires": "2026-11-24T06:07:48"}, "expires must be a time"),
    "expires on no day": ({"expires": "2026-02-30T06:07:48Z"}, "expires must be a time"),
    "expires as a number": ({"expires": 1795500000}, "expires must be a time"),
    "ends in words": ({"ends": "hunter2"}, "ends must be a time"),
    "revoked as yes": ({"revoked": True}, "revoked must be a time"),
    "id with other letters": ({"id": "hunter20"}, "id must be"),
    "no id": ({"id": ...}, "id must be"),
    "name with a space": ({"name": "hunter 2"}, "name must be"),
    "a key instead of its hash": ({"sha256": "mlp_7x3kq2mp_hunter2"}, "sha256 must be"),
    "hash in capitals": ({"sha256": "0F" * 32}, "sha256 must be"),
    "role as a list": ({"role": ["hunter2"]}, "role must be"),
    "no creation time": ({"created": None}, "created must be"),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_named_and_never_shown(line: bytes | dict[str, Any], expected: str) -> None:
    good = a_key()[1]
    if isinstance(line, dict):
        fields = {**a_key()[1].fields(), **line}
        line = json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()
    with pytest.raises(KeysError) as caught:
        parse_keys(text_of(good).encode() + line)
    assert str(caught.value).startswith(f"line 2: {expected}")
    assert "hunter" not in str(caught.value)


def test_ids_stand_once() -> None:
    key = a_key()[1]
    with pytest.raises(KeysError, match=rf"line 3: the id {key.id} is that of line 1"):
        parse_keys(text_of(key, a_key()[1], replace(key, name="other")).encode())


def test_the_number_of_keys_is_bounded() -> None:
    template = text_of(a_key()[1])
    key_id = json.loads(template)["id"]
    digits = "23456789"
    ids = ["a" + "".join(digits[number >> shift & 7] for shift in range(0, 21, 3)) for number in range(KEYS_MAX + 1)]
    lines = [template.replace(key_id, each) for each in ids]
    assert len(parse_keys("".join(lines[:-1]).encode())) == KEYS_MAX
    with pytest.raises(KeysError, match=rf"line {KEYS_MAX + 1}: more than {KEYS_MAX} keys"):
        parse_keys("".join(lines).encode())


class TestIdentify:
    def test_who_it_is(self, path: Path) -> None:
        (first, first_key), (second, second_key) = a_key(), a_key("dashboard", "reader")
        put(path, first_key, second_key)

        with ring_on(path) as ring:
            assert ring.identify(first) == Caller("key:ci-pipeline", "key", role="writer", credential=first_key.id)
            assert ring.identify(second) == Caller("key:dashboard", "key", role="reader", credential=second_key.id)
            assert ring.identify(first) is ring.identify(first)

    def test_nothing_but_the_key_itself(self, path: Path) -> None:
        text, key = a_key()
        other, other_key = a_key("other")
        put(path, key, other_key)
        secret = text.rpartition("_")[2]
        guesses = [
            "",
            "mlp_",
            f"mlp_{key.id}_",
            f"mlp_{key.id}",
            f"mlp__{secret}",
            text[:-1],
            text + "A",
            f" {text}",
            f"{text}\n",
            f"{text}\0",
            text.upper(),
            text.swapcase(),
            text.replace("mlp", "MLP"),
            f"mlp_{other_key.id}_{secret}",  # one's secret with another's id
            key.sha256,
            f"mlp_{key.id}_{key.sha256[:43]}",  # what a thief of the file has
            f"mlp_{key.id}_{'A' * 43}",
            f"mlp_{key.id}_{secret[:-1]}é",
            f"mlp_{key.id}_{secret[:-1]}\N{FULLWIDTH DIGIT ONE}",
            f"mlp_{key.id}_{secret[:-1]}\udcff",
            f"mlp_{key.id.translate({ord(letter): letter.upper() for letter in key.id})}_{secret}X",
            "mlp_" * 10_000,
            "null",
        ]

        with ring_on(path) as ring:
            for guess in guesses:
                said = reason(ring, guess)
                assert secret not in said
                assert len(said) < 80
            assert knows(ring, text)
            assert knows(ring, other)

    @given(st.data())
    def test_one_letter_off(self, data: st.DataObject) -> None:
        text, key = a_key()
        place = data.draw(st.integers(0, len(text) - 1))
        letter = data.draw(st.characters().filter(lambda letter: letter != text[place]))
        ring = KeyRing(Access(), Aws(), clock=Clock())
        ring._sources.append(source := module._Source("test", lambda: None, 1.0, changed=lambda: None))
        source._take(text_of(key).encode())
        assert knows(ring, text)
        assert not knows(ring, text[:place] + letter + text[place + 1 :])

    def test_reasons_are_for_the_log(self, path: Path) -> None:
        expired, expired_key = a_key("expired", expires=NOW)
        revoked, revoked_key = a_key("revoked", revoked=NOW)
        rotated, rotated_key = a_key("rotated", ends=NOW)
        unknown, unknown_key = a_key()
        put(path, expired_key, revoked_key, rotated_key)

        with ring_on(path) as ring:
            assert reason(ring, expired) == f"API key {expired_key.id} has expired"
            assert reason(ring, revoked) == f"API key {revoked_key.id} was revoked"
            assert reason(ring, rotated) == f"API key {rotated_key.id} has ended after its rotation"
            assert reason(ring, unknown) == f"there is no API key {unknown_key.id}"
            assert reason(ring, expired[:-1] + ("a" if expired[-1] != "a" else "b")) == (
                f"the secret of API key {expired_key.id} is wrong"
            )
            assert reason(ring, "Bearer hunter2") == "what was shown is not an API key"

    def test_expiry_is_looked_at_every_time(self, path: Path) -> None:
        clock = Clock()
        text, key = a_key()
        forever, forever_key = a_key("forever", expires=None)
        put(path, key, forever_key)

        with ring_on(path, clock) as ring:
            clock.now = (NOW + 90 * DAY).timestamp() - 0.001
            assert knows(ring, text)
            clock.now += 0.001
            assert not knows(ring, text)
            clock.now *= 10
            assert knows(ring, forever)
            clock.now = NOW.timestamp()  # set back, as NTP does
            assert knows(ring, text)

    def test_both_count_during_an_overlap(self, path: Path) -> None:
        clock = Clock()
        old, old_key = a_key(ends=NOW + DAY)
        new, new_key = a_key()
        put(path, old_key, new_key)

        with ring_on(path, clock) as ring:
            assert ring.identify(old).subject == ring.identify(new).subject == "key:ci-pipeline"
            assert ring.identify(old).credential != ring.identify(new).credential
            clock.now = (NOW + DAY).timestamp()
            assert not knows(ring, old)
            assert knows(ring, new)

    def test_a_revoked_key_never_counts(self, path: Path) -> None:
        """Not even before the time at which it was revoked: clocks differ."""
        clock = Clock()
        text, key = a_key(revoked=NOW + DAY, expires=None)
        put(path, key)

        with ring_on(path, clock) as ring:
            for clock.now in (0.0, NOW.timestamp(), (NOW + 2 * DAY).timestamp()):
                assert not knows(ring, text)

    def test_every_guess_costs_the_same_comparison(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An unknown id is hashed and compared just like a known one, in constant time."""
        text, key = a_key()
        _, expired_key = a_key("expired", expires=NOW)
        put(path, key, expired_key)
        compared: list[tuple[int, int]] = []
        compare = hmac.compare_digest

        def spy(left: bytes, right: bytes) -> bool:
            compared.append((len(left), len(right)))
            return compare(left, right)

        with ring_on(path) as ring:
            monkeypatch.setattr(hmac, "compare_digest", spy)
            for shown in (text, a_key()[0], f"mlp_{key.id}_{'A' * 43}", f"mlp_{expired_key.id}_{'A' * 43}"):
                assert knows(ring, shown) == (shown == text)
                assert compared == [(32, 32)]
                compared.clear()


@pytest.mark.usefixtures("quick")
class TestChanges:
    def test_they_count_without_a_restart(self, path: Path) -> None:
        first, first_key = a_key()
        second, second_key = a_key("second")
        put(path, first_key)

        with ring_on(path) as ring:
            caller = ring.identify(first)
            assert not knows(ring, second)
            put(path, first_key, second_key)
            until(lambda: knows(ring, second))
            assert ring.identify(first) is caller
            put(path, replace(first_key, revoked=NOW), second_key)
            until(lambda: not knows(ring, first))
            assert knows(ring, second)
            put(path, replace(second_key, role="reader"))
            until(lambda: ring.identify(second).role == "reader")

    def test_lines_that_are_appended(self, path: Path) -> None:
        text, key = a_key()
        put(path, a_key()[1])

        with ring_on(path) as ring:
            assert not knows(ring, text)
            with path.open("a") as file:
                file.write(text_of(key))
            until(lambda: knows(ring, text))

    def test_an_edit_that_keeps_size_and_time(self, path: Path) -> None:
        text, key = a_key()
        put(path, key)
        before = path.stat()

        with ring_on(path) as ring:
            assert ring.identify(text).role == "writer"
            path.write_text(text_of(replace(key, role="reader")))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            until(lambda: ring.identify(text).role == "reader")

    def test_a_link_that_is_turned(self, path: Path, tmp_path: Path) -> None:
        """As Kubernetes changes mounted secrets."""
        old, old_key = a_key()
        new, new_key = a_key()
        put(tmp_path / "old", old_key)
        put(tmp_path / "new", new_key)
        path.symlink_to(tmp_path / "old")

        with ring_on(path) as ring:
            assert knows(ring, old)
            (tmp_path / "link").symlink_to(tmp_path / "new")
            (tmp_path / "link").replace(path)
            until(lambda: knows(ring, new))
            assert not knows(ring, old)

    def test_a_broken_file_leaves_the_last_good_keys(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        text, key = a_key()
        second, second_key = a_key("second")
        put(path, key)

        with ring_on(path) as ring:
            path.write_text(text_of(second_key) + "hunter2\n")
            until(lambda: bool(errors(caplog)))
            time.sleep(0.5)  # ten more looks
            assert errors(caplog) == [
                f"access.keys_file {path}: line 2: is not JSON; each line is one object, as `mlflow-proxy keys new` "
                "writes it; the keys read before still count"
            ]
            assert knows(ring, text)
            assert not knows(ring, second)  # nothing of a broken file counts
            path.write_text(text_of(key, key))
            until(lambda: len(errors(caplog)) == 2)
            path.write_text(text_of(key, key, key))
            until(lambda: len(errors(caplog)) == 3)  # broken in the same way, by another change
            assert knows(ring, text)
            put(path, second_key)
            until(lambda: knows(ring, second))
            assert not knows(ring, text)
            assert len(errors(caplog)) == 3
        assert "hunter2" not in caplog.text

    def test_a_broken_file_still_revokes_and_ends(
        self, path: Path, by_hand: Callable[[KeyRing], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        """But it makes no key, changes no role, and gives no key more time."""
        clock = Clock()
        made = {name: a_key(name) for name in ("revoked", "ends", "expires", "longer", "role", "same", "absent")}
        other = a_key("other")[1]
        late, late_key = a_key("late")
        put(path, *(key for _, key in made.values()))
        changes: dict[str, dict[str, Any]] = {
            "revoked": {"revoked": NOW},
            "ends": {"ends": NOW + timedelta(hours=1)},
            "expires": {"expires": NOW + timedelta(hours=1)},
            "longer": {"expires": None},
            "role": {"role": "admin"},
            "same": {},
        }
        with ring_on(path, clock) as ring:
            lines = text_of(*(replace(made[name][1], **change) for name, change in changes.items()), late_key, other)
            path.write_text('{"id": "cut off\n' + lines)
            by_hand(ring)
            assert reason(ring, made["revoked"][0]).endswith("was revoked")
            clock.now += 3599
            for name in ("ends", "expires", "longer", "role", "same", "absent"):
                assert ring.identify(made[name][0]) == Caller(
                    f"key:{name}", "key", role="writer", credential=made[name][1].id
                )
            assert not knows(ring, late)
            clock.now += 1
            assert [name for name, (text, _) in made.items() if knows(ring, text)] == [
                "longer",
                "role",
                "same",
                "absent",
            ]
            clock.now += 90 * 86400
            assert not knows(ring, made["longer"][0])
            assert len(errors(caplog)) == 1
            assert "line 1: is not JSON" in errors(caplog)[0]
            ended = ", ".join(sorted(made[name][1].id for name in ("revoked", "ends", "expires")))
            assert f"revoke or end the API keys {ended}" in caplog.text
            clock.now = NOW.timestamp()
            path.write_text(text_of(made["revoked"][1], late_key))  # good again: all of it counts
            by_hand(ring)
            assert knows(ring, made["revoked"][0])
            assert knows(ring, late)
            assert not knows(ring, made["same"][0])

    def test_of_lines_with_one_id_the_strictest_counts(self, path: Path, by_hand: Callable[[KeyRing], None]) -> None:
        text, key = a_key()
        put(path, key)
        with ring_on(path) as ring:
            put(path, replace(key, revoked=NOW), key)
            by_hand(ring)
            assert not knows(ring, text)

    def test_keys_count_however_long_their_file_cannot_be_read(
        self,
        path: Path,
        by_hand: Callable[[KeyRing], None],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The log says so at once, and again from time to time."""
        clock = Clock()
        text, key = a_key()
        put(path, key)
        with ring_on(path, clock) as ring:
            path.rename(path.with_suffix(".kept"))
            path.mkdir()
            by_hand(ring)
            clock.now += 80 * 86400
            by_hand(ring)
            assert knows(ring, text)
            said = f"access.keys_file {path}: is not a file of up to 40960000 bytes; the keys read before still count"
            assert errors(caplog) == [said]
            monkeypatch.setattr(module, "_REMIND", 0.0)
            by_hand(ring)
            assert errors(caplog) == [said, said]
            clock.now += 10 * 86400
            assert "has expired" in reason(ring, text)

    def test_a_broken_file_is_told_of_again(
        self,
        path: Path,
        by_hand: Callable[[KeyRing], None],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        text, key = a_key()
        put(path, key)
        with ring_on(path) as ring:
            path.write_text(text_of(key) + "{")
            by_hand(ring)
            by_hand(ring)
            assert len(errors(caplog)) == 1
            monkeypatch.setattr(module, "_REMIND", 0.0)
            by_hand(ring)
            assert len(errors(caplog)) == 2
            put(path, key)
            by_hand(ring)
            by_hand(ring)
            assert len(errors(caplog)) == 2
            assert knows(ring, text)

    def test_a_look_that_hangs(self, path: Path, by_hand: Callable[[KeyRing], None]) -> None:
        """As on a network share whose server is gone."""
        clock = Clock()
        text, key = a_key()
        put(path, key)
        hangs, goes_on = threading.Event(), threading.Event()

        def read() -> bytes | None:
            hangs.set()
            goes_on.wait(60)
            return None

        with ring_on(path, clock) as ring:
            ring._sources[0]._read = read
            look = threading.Thread(target=by_hand, args=(ring,))
            look.start()
            assert hangs.wait(60)
            clock.now += 3600
            assert knows(ring, text)
            goes_on.set()
            look.join()
            assert knows(ring, text)

    def test_missing_at_the_start(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        text, key = a_key()

        with ring_on(path) as ring:
            assert not knows(ring, text)
            assert errors(caplog) == [
                f"access.keys_file {path}: does not exist; `mlflow-proxy keys new` makes it; it gives no keys"
            ]
            put(path, key)
            until(lambda: knows(ring, text))

    def test_broken_at_the_start(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        text, key = a_key()
        path.write_text(text_of(key) + "{}")

        with ring_on(path) as ring:
            with pytest.raises(Refusal) as caught:  # no mistake of the caller's: nobody knows which keys there are
                ring.identify(text)
            assert caught.value.status == 503
            assert "line 2: expires is missing" in errors(caplog)[0]
            assert errors(caplog)[0].endswith("it gives no keys")

    def test_a_file_that_is_gone_leaves_the_last_good_keys(
        self, path: Path, caplog: pytest.LogCaptureFixture, quick: None
    ) -> None:
        (text, key), (other, other_key) = a_key(), a_key("other")
        put(path, key)

        with ring_on(path) as ring:
            path.unlink()
            until(lambda: bool(errors(caplog)))
            assert errors(caplog) == [
                f"access.keys_file {path}: does not exist; `mlflow-proxy keys new` makes it; the keys read before "
                "still count"
            ]
            assert knows(ring, text)
            put(path, other_key)
            until(lambda: knows(ring, other))
            assert not knows(ring, text)

    def test_a_file_without_keys_voids_all(self, path: Path, quick: None) -> None:
        """It can be read, and says that there are none."""
        text, key = a_key()
        put(path, key)

        with ring_on(path) as ring:
            path.write_text("\n")
            until(lambda: not knows(ring, text))

    def test_what_cannot_be_read_leaves_the_last_good_keys(
        self, path: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        text, key = a_key()
        put(path, key)
        put(tmp_path / "good", replace(key, role="reader"))

        with ring_on(path) as ring:
            path.unlink()
            path.symlink_to(path)  # a link to itself
            until(lambda: bool(errors(caplog)) or not knows(ring, text))
            path.unlink()
            path.mkdir()
            until(lambda: len(errors(caplog)) > 1 or not knows(ring, text))
            time.sleep(0.3)
            assert [message.split(": ", 1)[1].split(";")[0] for message in errors(caplog)] == [
                "cannot be read (Too many levels of symbolic links)",
                "is not a file of up to 40960000 bytes",
            ]
            assert knows(ring, text)
            path.rmdir()
            (tmp_path / "good").replace(path)
            until(lambda: ring.identify(text).role == "reader")

    def test_a_file_that_anybody_can_change(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        put(path, a_key()[1])
        path.chmod(0o646)

        with ring_on(path):
            assert "can be changed by every user" in caplog.text
            path.chmod(0o640)
        caplog.clear()
        with ring_on(path):
            pass
        assert "every user" not in caplog.text

    def test_requests_go_on_during_changes(self, path: Path) -> None:
        text, key = a_key()
        others = [a_key(f"other-{number}")[1] for number in range(200)]
        put(path, key)

        with ring_on(path) as ring:
            stop = threading.Event()
            changes: list[int] = []

            def change() -> None:
                while not stop.is_set():
                    put(path, *others, key)
                    ring._sources[0]._look()
                    put(path, key)
                    ring._sources[0]._look()
                    changes.append(len(ring._sources[0].held))

            thread = threading.Thread(target=change)
            thread.start()
            try:
                while len(changes) < 20:
                    assert ring.identify(text).credential == key.id
            finally:
                stop.set()
                thread.join()

    def test_nothing_is_looked_at_after_the_end(self, path: Path) -> None:
        text, key = a_key()
        put(path, key)
        until(lambda: not watching())  # rings of tests before have ended
        with ring_on(path) as ring:
            assert watching()
        until(lambda: not watching())
        assert knows(ring, text)


class TestMissing:
    """One look that finds nothing is not worth a line: some programs write a file anew in place."""

    @pytest.mark.parametrize("how", ["missing", "empty"])
    def test_twice(
        self, path: Path, by_hand: Callable[[KeyRing], None], caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        text, key = a_key()
        put(path, key)

        def lose() -> None:
            path.unlink()
            if how == "empty":
                path.touch()

        with ring_on(path) as ring:
            lose()
            by_hand(ring)
            assert errors(caplog) == []
            put(path, key)
            by_hand(ring)
            lose()
            by_hand(ring)
            assert errors(caplog) == []  # missed once again, not twice in a row
            by_hand(ring)
            assert len(errors(caplog)) == 1
            assert knows(ring, text)


class TestKept:
    """What workers leave for those that start later."""

    def test_a_later_ring_has_them_while_the_file_is_away(
        self, path: Path, by_hand: Callable[[KeyRing], None], tmp_path: Path
    ) -> None:
        (text, key), (revoked, revoked_key), (other, _) = a_key(), a_key(), a_key()
        folder = tmp_path / "kept"
        folder.mkdir()
        put(path, key, revoked_key)
        access = Access(keys_file=path)
        first = KeyRing(access, Aws(), kept=folder, clock=Clock())
        asyncio.run(first.start())
        path.write_text(text_of(key, replace(revoked_key, revoked=NOW)) + "{")  # which still revokes
        by_hand(first)
        path.unlink()
        later = KeyRing(access, Aws(), kept=folder, clock=Clock())
        asyncio.run(later.start())
        assert [knows(later, each) for each in (text, revoked, other)] == [True, False, False]
        elsewhere = KeyRing(Access(keys_file=path.with_suffix(".other")), Aws(), kept=folder, clock=Clock())
        asyncio.run(elsewhere.start())
        assert not knows(elsewhere, text)
        for ring in (first, later, elsewhere):
            asyncio.run(ring.close())

    def test_a_folder_that_cannot_be_written_only_costs_a_line(
        self, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        text, key = a_key()
        put(path, key)
        ring = KeyRing(Access(keys_file=path), Aws(), kept=tmp_path / "none", clock=Clock())
        asyncio.run(ring.start())
        assert knows(ring, text)
        assert "cannot be kept" in caplog.text
        asyncio.run(ring.close())


def test_no_source_at_all() -> None:
    ring = KeyRing(Access(), Aws())
    asyncio.run(ring.start())
    assert not knows(ring, a_key()[0])
    asyncio.run(ring.close())
