"""The sealed session: what counts, what does not, when it ends, and who learns of its end."""

from __future__ import annotations

import base64
import multiprocessing
import threading
from collections.abc import Callable
from http.cookies import SimpleCookie
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.revocations import Revocations
from mlflow_proxy.access.seal import LARGEST_COOKIE, Seal, cookie_value
from mlflow_proxy.access.session import Sessions, SessionTooLarge
from mlflow_proxy.settings import Oidc

SECRET = bytes(range(32))
NAME = Sessions.COOKIE
IDLE, LIFETIME = 600.0, 3600.0
START = 1_800_000_000.0


class Clock:
    """Tells the time that a test sets."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def options(**changes: object) -> Oidc:
    given = {"issuer": "https://id.example.com", "client_id": "proxy", "audience": ["proxy"]}
    return Oidc.model_validate({**given, "session_idle": IDLE, "session_lifetime": LIFETIME, **changes})


def person(*groups: str, subject: str = "user:ada") -> Caller:
    return Caller(subject, "session", frozenset(groups), credential=Sessions.new_id())


def sent(set_cookie: str | bytes) -> list[bytes]:
    """What a browser sends back after a Set-Cookie."""
    text = set_cookie if isinstance(set_cookie, str) else set_cookie.decode()
    return [text.partition(";")[0].encode()]


def value(set_cookie: str) -> bytes:
    return sent(set_cookie)[0].partition(b"=")[2]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(options(), SECRET, clock=clock)


def who(sessions: Sessions, cookies: list[bytes]) -> Caller | None:
    found = sessions.identify(cookies)
    return found[0] if found else None


# What a session is


def test_it_holds_who_signed_in(sessions: Sessions) -> None:
    ada = person("ml", "größte Gruppe", subject="user:ada@example.com")
    assert who(sessions, sent(sessions.begin(ada))) == ada


def test_the_cookie_has_every_protection(sessions: Sessions) -> None:
    """__Host- holds only with Secure, Path=/ and no Domain; without Max-Age it goes with the browser."""
    name, _, attributes = sessions.begin(person()).partition("=")
    assert name == "__Host-mlflow-proxy"
    assert set(attributes.split("; ")[1:]) == {"Path=/", "Secure", "HttpOnly", "SameSite=Lax"}


def test_the_cookie_shows_nothing(sessions: Sessions) -> None:
    cookie = sessions.begin(person("engineering", subject="user:ada"))
    opened = base64.urlsafe_b64decode(value(cookie) + b"==")
    assert b"ada" not in opened
    assert b"engineering" not in opened
    assert sessions.begin(person("engineering")) != cookie


def test_another_instance_with_the_same_secret_knows_it(sessions: Sessions, clock: Clock) -> None:
    other = Sessions(options(), SECRET, clock=clock)
    assert who(other, sent(sessions.begin(person()))) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "https://other.example.com"},
        {"client_id": "other"},
        {"user_claim": "email"},
        {"groups_claim": "roles"},
        {"required_claims": {"tid": "1"}},
    ],
    ids=str,
)
def test_it_ends_when_other_callers_are_meant(changes: dict[str, object], sessions: Sessions, clock: Clock) -> None:
    other = Sessions(options(**changes), SECRET, clock=clock)
    assert who(other, sent(sessions.begin(person()))) is None


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes; use 32 or more"):
        Sessions(options(), SECRET[:31])


# Groups and size


def test_only_groups_that_matter_are_kept(clock: Clock) -> None:
    sessions = Sessions(options(), SECRET, relevant=lambda group: group.startswith("ml-"), clock=clock)
    caller = who(sessions, sent(sessions.begin(person("ml-writers", "ml-readers", "canteen"))))
    assert caller is not None
    assert caller.groups == {"ml-writers", "ml-readers"}


def test_what_does_not_fit_is_refused_not_cut(sessions: Sessions) -> None:
    """A group left out could be the one that a role denies something to."""
    with pytest.raises(SessionTooLarge, match="200 groups"):
        sessions.begin(person(*(f"00000000-0000-4000-8000-{number:012}" for number in range(200))))


@given(count=st.integers(0, 120), length=st.integers(1, 60))
def test_no_cookie_is_larger_than_browsers_keep(count: int, length: int) -> None:
    sessions = Sessions(options(), SECRET, clock=Clock())
    ada = person(*(f"{number:0{length}}" for number in range(count)))
    try:
        cookie = sessions.begin(ada)
    except SessionTooLarge:
        assert len(ada.groups) * length > 2000
    else:
        assert len(cookie) <= LARGEST_COOKIE
        assert who(sessions, sent(cookie)) == ada


# What does not count


@pytest.mark.parametrize("cookies", [[], [b""], [b"other=1"], [NAME.encode()], [f"{NAME}=".encode()]], ids=repr)
def test_no_cookie(cookies: list[bytes], sessions: Sessions) -> None:
    assert sessions.identify(cookies) is None


def test_every_bit_counts(sessions: Sessions) -> None:
    good = value(sessions.begin(person("ml")))
    sealed = base64.urlsafe_b64decode(good + b"=" * (-len(good) % 4))
    for index in range(len(sealed)):
        forged = bytearray(sealed)
        forged[index] ^= 1
        cookie = base64.urlsafe_b64encode(bytes(forged)).rstrip(b"=")
        assert sessions.identify([NAME.encode() + b"=" + cookie]) is None, f"byte {index}"
    assert sessions.identify([NAME.encode() + b"=" + good]) is not None


def test_every_truncation_is_refused(sessions: Sessions) -> None:
    good = value(sessions.begin(person()))
    for length in range(len(good)):
        assert sessions.identify([NAME.encode() + b"=" + good[:length]]) is None, length
    for more in (b"A", b"AAAA", b"=", b"!", good):
        assert sessions.identify([NAME.encode() + b"=" + good + more]) is None, more


@given(st.binary(max_size=200))
def test_rubbish_is_refused(rubbish: bytes) -> None:
    sessions = Sessions(options(), SECRET)
    assert sessions.identify([NAME.encode() + b"=" + rubbish]) is None
    encoded = base64.urlsafe_b64encode(b"\x01" + rubbish)
    assert sessions.identify([NAME.encode() + b"=" + encoded.rstrip(b"=")]) is None


def test_a_cookie_larger_than_cookies_are_is_not_even_decoded(sessions: Sessions) -> None:
    assert Seal(SECRET, NAME, "").open(b"A" * (LARGEST_COOKIE + 1)) is None


def test_another_secret_opens_nothing(sessions: Sessions, clock: Clock) -> None:
    other = Sessions(options(), bytes(32), clock=clock)
    assert sessions.identify(sent(other.begin(person()))) is None


def test_another_cookie_under_the_same_secret_is_no_session(sessions: Sessions) -> None:
    """Sealed with the very content of a session, but for another purpose; and the other way round."""
    content = sessions.seal_for(NAME).open(value(sessions.begin(person())))
    assert content is not None
    other = sessions.seal_for(f"{NAME}-signin")
    assert sessions.identify([f"{NAME}={other.seal(content)}".encode()]) is None
    assert sessions.identify([f"{NAME}={sessions.seal_for(NAME).seal(content)}".encode()]) is not None
    assert other.open(value(sessions.begin(person()))) is None


# Two of a name


def two(sessions: Sessions) -> tuple[bytes, bytes]:
    return sent(sessions.begin(person()))[0], sent(sessions.begin(person(subject="user:mallory")))[0]


@pytest.mark.parametrize(
    "tossed",
    [
        lambda own, planted: [own + b"; " + planted],
        lambda own, planted: [planted + b";" + own],
        lambda own, planted: [own, planted],
        lambda own, planted: [b"a=1; " + own, b"b=2; " + planted + b"; c=3"],
        lambda own, planted: [own + b"; " + own],
        lambda own, planted: [own + b"; " + NAME.encode()],
    ],
)
def test_of_two_none_counts(tossed: Callable[[bytes, bytes], list[bytes]], sessions: Sessions) -> None:
    own, planted = two(sessions)
    assert sessions.identify(tossed(own, planted)) is None
    assert who(sessions, [own]) is not None


@pytest.mark.parametrize("name", [f"x{NAME}", f"{NAME}x", NAME.lower(), NAME.upper(), f"{NAME}-signin", f" x {NAME}"])
def test_a_cookie_of_a_similar_name_is_another(name: str, sessions: Sessions) -> None:
    own, planted = two(sessions)
    similar = name.encode() + b"=" + planted.partition(b"=")[2]
    assert sessions.identify([similar]) is None
    caller = who(sessions, [similar + b"; " + own])
    assert caller is not None
    assert caller.subject == "user:ada"


def test_it_is_found_among_others(sessions: Sessions) -> None:
    own, _ = two(sessions)
    assert who(sessions, [b"a=1;" + own + b" ;b=2", b"c=3"]) is not None


@given(st.dictionaries(st.sampled_from(["a", "b-c", NAME, "__Host-x"]), st.text("abcXYZ019_-=", max_size=8)))
def test_cookies_are_read_as_the_standard_library_reads_them(cookies: dict[str, str]) -> None:
    header = "; ".join(f"{name}={text}" for name, text in cookies.items())
    parsed: SimpleCookie = SimpleCookie(header)
    expected = parsed[NAME].value.encode() if NAME in parsed else None
    assert cookie_value([header.encode()], NAME.encode()) == expected


# Time


def test_it_ends_when_it_is_idle(sessions: Sessions, clock: Clock) -> None:
    cookies = sent(sessions.begin(person()))
    clock.now = START + IDLE - 1
    assert sessions.identify(cookies) is not None
    clock.now = START + IDLE
    assert sessions.identify(cookies) is None


def test_a_request_keeps_it_alive_but_not_for_ever(sessions: Sessions, clock: Clock) -> None:
    cookies = sent(sessions.begin(person()))
    while clock.now < START + LIFETIME - IDLE / 2:
        clock.now += IDLE / 2
        found = sessions.identify(cookies)
        assert found is not None, clock.now - START
        cookies = sent(found[1]) if found[1] else cookies
    clock.now = START + LIFETIME - 1
    assert sessions.identify(cookies) is not None
    clock.now = START + LIFETIME
    assert sessions.identify(cookies) is None


def test_it_is_renewed_when_a_tenth_of_the_idle_time_has_passed(sessions: Sessions, clock: Clock) -> None:
    ada = person("ml")
    cookies = sent(sessions.begin(ada))
    clock.now = START + IDLE / 10 - 1
    assert sessions.identify(cookies) == (ada, None)
    clock.now = START + IDLE / 10
    caller, renewed = sessions.identify(cookies) or (None, None)
    assert caller == ada
    assert renewed is not None
    assert renewed.decode().partition("; ")[2] == sessions.begin(ada).partition("; ")[2]
    assert sessions.identify(sent(renewed)) == (ada, None)
    clock.now += IDLE - 1
    assert who(sessions, sent(renewed)) == ada
    assert who(sessions, cookies) is None


def test_many_requests_at_once_renew_it_once(sessions: Sessions, clock: Clock) -> None:
    cookies = sent(sessions.begin(person()))
    clock.now = START + IDLE / 2
    found = [sessions.identify(cookies) for _ in range(20)]
    assert [each is not None and each[1] is not None for each in found] == [True] + 19 * [False]


def test_it_is_not_renewed_where_that_gains_nothing(sessions: Sessions, clock: Clock) -> None:
    clock.now = START
    short = Sessions(options(session_idle=LIFETIME), SECRET, clock=clock)
    cookies = sent(short.begin(person()))
    clock.now = START + LIFETIME - 1
    found = short.identify(cookies)
    assert found is not None
    assert found[1] is None


def test_a_shorter_limit_counts_for_sessions_that_are_there(sessions: Sessions, clock: Clock) -> None:
    cookies = sent(sessions.begin(person()))
    clock.now = START + 120
    assert Sessions(options(session_idle=60), SECRET, clock=clock).identify(cookies) is None
    assert Sessions(options(session_lifetime=60), SECRET, clock=clock).identify(cookies) is None


def test_a_clock_that_goes_back_a_little_is_borne(sessions: Sessions, clock: Clock) -> None:
    cookies = sent(sessions.begin(person()))
    clock.now = START - 30
    assert sessions.identify(cookies) is not None


def test_a_session_from_the_future_is_not_believed(sessions: Sessions, clock: Clock) -> None:
    """A clock that was ahead for a while must not leave sessions that outlive their time."""
    cookies = sent(sessions.begin(person()))
    assert sessions.identify(cookies) is not None
    clock.now = START - 86400
    assert sessions.identify(cookies) is None  # although it is known already
    assert Sessions(options(), SECRET, clock=clock).identify(cookies) is None


def test_what_is_known_is_bounded(sessions: Sessions) -> None:
    first = sent(sessions.begin(person()))
    assert sessions.identify(first) is not None
    for _ in range(5000):
        sessions.identify(sent(sessions.begin(person())))
    assert len(sessions._known) <= 4096
    assert sessions.identify(first) is not None


# The end


def test_signing_out_ends_a_copied_cookie(sessions: Sessions, clock: Clock) -> None:
    cookies = sent(sessions.begin(person()))
    clock.now = START + IDLE / 2
    renewed = (sessions.identify(cookies) or (None, b""))[1]
    assert renewed
    removal = sessions.end(cookies)
    assert removal.startswith(f"{NAME}=; Max-Age=0; ")
    assert {"Path=/", "Secure"} <= set(removal.split("; "))
    assert sessions.identify(cookies) is None
    assert sessions.identify(sent(renewed)) is None


def test_signing_out_leaves_others_their_sessions(sessions: Sessions) -> None:
    one, other = (sent(sessions.begin(person())) for _ in range(2))
    sessions.end(one)
    assert sessions.identify(one) is None
    assert sessions.identify(other) is not None


def test_signing_out_ends_all_that_are_shown(sessions: Sessions) -> None:
    own, planted = two(sessions)
    sessions.end([own + b"; " + planted])
    assert sessions.identify([own]) is None
    assert sessions.identify([planted]) is None


@pytest.mark.parametrize("cookies", [[], [b"a=1"], [f"{NAME}=rubbish".encode()]], ids=repr)
def test_signing_out_without_a_session(cookies: list[bytes], sessions: Sessions) -> None:
    assert sessions.end(cookies).startswith(f"{NAME}=; ")


def test_all_workers_of_an_instance_learn_of_it_at_once(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "signed-out"
    workers = [Sessions(options(), SECRET, revocations=file, clock=clock) for _ in range(3)]
    cookies = sent(workers[0].begin(person()))
    assert all(worker.identify(cookies) for worker in workers)
    workers[1].end(cookies)
    assert [worker.identify(cookies) for worker in workers] == [None, None, None]
    started_later = Sessions(options(), SECRET, revocations=file, clock=clock)
    assert started_later.identify(cookies) is None


def test_another_instance_does_not_learn_of_it(tmp_path: Path, clock: Clock) -> None:
    """Which docs/access.md says; the copy ends when it is idle."""
    here, there = (Sessions(options(), SECRET, revocations=tmp_path / name, clock=clock) for name in ("here", "there"))
    cookies = sent(here.begin(person()))
    here.end(cookies)
    assert there.identify(cookies) is not None
    clock.now = START + IDLE
    assert there.identify(cookies) is None


def test_it_stays_ended_until_it_would_have_ended(tmp_path: Path, clock: Clock) -> None:
    """Also when the list has been written anew meanwhile, and by those who join then."""
    file = tmp_path / "signed-out"
    sessions = Sessions(options(session_idle=LIFETIME), SECRET, revocations=file, clock=clock)
    cookies = sent(sessions.begin(person()))
    sessions.end(cookies)
    clock.now = START + LIFETIME - 1
    for number in range(3000):
        sessions.use_once(f"other-{number}", clock.now + 600)
    assert sessions.identify(cookies) is None
    joined = Sessions(options(session_idle=LIFETIME), SECRET, revocations=file, clock=clock)
    assert joined.identify(cookies) is None


def test_once_means_once_for_all_workers(tmp_path: Path, clock: Clock) -> None:
    workers = [Sessions(options(), SECRET, revocations=tmp_path / "used", clock=clock) for _ in range(2)]
    assert workers[0].use_once("state", START + 600)
    assert not workers[0].use_once("state", START + 600)
    assert not workers[1].use_once("state", START + 600)


# The list of revoked ids


def test_the_list_is_written_anew_without_those_whose_time_is_over(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "list"
    one, other = (Revocations(file, clock=clock) for _ in range(2))
    sizes = []
    for number in range(5000):
        one.add(f"id-{number}", clock.now + 100)
        sizes.append(file.stat().st_size)
        clock.now += 1
        if number % 700 == 0:
            assert f"id-{number}" in other
    assert max(sizes) < 5000 * len("id-1000 1800000000\n") / 2
    assert "id-4999" in other
    assert "id-0" not in other
    assert len(other._until) < 2500
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_a_file_it_is_bounded_too(clock: Clock) -> None:
    own = Revocations(None, clock=clock)
    for number in range(5000):
        own.add(f"id-{number}", clock.now + 100)
        clock.now += 1
    assert "id-4999" in own
    assert len(own._until) <= 1001


def test_half_a_line_hides_none(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "list"
    one, other = (Revocations(file, clock=clock) for _ in range(2))
    one.add("first", START + 100)
    with file.open("ab") as broken:
        broken.write(b"\xff torn")
    assert "first" in other
    assert "torn" not in other
    with file.open("ab") as broken:
        broken.write(b"\n")
    one.add("second", START + 100)
    assert "second" in other


def test_a_list_that_cannot_be_kept_is_said_and_survived(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    revocations = Revocations(folder / "list", clock=clock)
    assert "none" not in revocations
    assert revocations.add("one", START + 100)
    assert "one" in revocations
    assert not revocations.add("one", START + 100)
    assert caplog.text.count("sign-outs do not reach the other workers") == 1
    folder.mkdir()
    assert revocations.add("two", START + 100)
    assert "two" in Revocations(folder / "list", clock=clock)


def test_a_list_that_was_deleted_is_made_again_and_forgets_nothing(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "list"
    one, other = (Revocations(file, clock=clock) for _ in range(2))
    one.add("before", START + 100)
    assert "before" in other
    file.unlink()
    one.add("after", START + 100)
    assert "after" in other
    assert "before" in one
    assert "before" in other


def _add_all(file: Path, name: str, results: multiprocessing.Queue[int]) -> None:
    own = Revocations(file, clock=Clock())
    own_first = [own.add(f"shared-{number}", START + 100) for number in range(400)]
    for number in range(1500):
        own.add(f"{name}-{number}", START + (100 if number % 5 == 0 else -1))
    results.put(sum(own_first))


def test_workers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """Real processes, with enough of them past their time that the list is written anew in between."""
    file = tmp_path / "list"
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    workers = [context.Process(target=_add_all, args=(file, name, results)) for name in ("a", "b", "c")]
    for worker in workers:
        worker.start()
    firsts = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert sum(firsts) == 400
    left = Revocations(file, clock=Clock())
    missing = [f"{name}-{n}" for name in ("a", "b", "c") for n in range(0, 1500, 5) if f"{name}-{n}" not in left]
    assert missing == []
    assert len(file.read_text().splitlines()) < 400 + 3 * 1500


def test_threads_at_the_same_time(tmp_path: Path, clock: Clock) -> None:
    sessions = Sessions(options(), SECRET, revocations=tmp_path / "list", clock=clock)
    failures: list[BaseException] = []

    def visit() -> None:
        try:
            for _ in range(300):
                cookies = sent(sessions.begin(person()))
                assert sessions.identify(cookies) is not None
                sessions.end(cookies)
                assert sessions.identify(cookies) is None
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=visit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
