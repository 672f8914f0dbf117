"""Sign-in and sign-out through the running proxy at a real provider: what works, and what an attacker tries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from tests.faults.certificates import Authority
from tests.faults.proxies import running, target
from tests.faults.test_outgoing_proxy import open_tunnel
from tests.faults.upstreams import Arrived, Peer, Upstream
from tests.portal.signing_in import PUBLIC_URL, SECRET, Answer, Person, Provider, Site, provider, site

from mlflow_proxy.access.session import Sessions
from mlflow_proxy.portal.signin import HINT_COOKIE, STATE_COOKIE, local_path

SESSION_COOKIE = Sessions.COOKIE


@pytest.fixture(scope="module")
def at() -> Iterator[Provider]:
    with provider() as running:
        running.user("ada", groups=["ml-writers", "canteen"])
        running.user("bob", groups=["ml-readers"])
        yield running


@pytest.fixture(scope="module")
def shared(at: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("signin") / "proxy", at, workers=2) as running:
        yield running


@pytest.fixture
def person(shared: Site) -> Person:
    shared.provider.token_answer = None
    shared.provider.tokens.clear()
    return Person(shared)


def set_cookies(answer: requests.Response) -> dict[str, SimpleCookie]:
    """The Set-Cookie headers of an answer by the cookie's name."""
    found: dict[str, SimpleCookie] = {}
    for header in answer.raw.headers.getlist("set-cookie"):
        cookie: SimpleCookie = SimpleCookie(header)
        for name in cookie:
            assert name not in found
            found[name] = cookie
    return found


def reason(of: Site, answer: requests.Response) -> str:
    """Why a sign-in failed, as the audit log has it."""
    (event,) = (event for event in of.events(answer.headers["x-request-id"]) if event["event"] == "sign-in-failed")
    assert event["client"] == "127.0.0.1"
    return str(event["reason"])


def is_page(answer: requests.Response, status: int, title: str) -> bool:
    return (
        answer.status_code == status
        and answer.headers["content-type"].startswith("text/html")
        and f"<h1>{title}</h1>" in answer.text
    )


# The whole way


def test_from_sign_in_to_sign_out(person: Person) -> None:
    of = person.site
    assert not person.known()
    signed_in = person.sign_in(next="/t/team/?x=1")
    assert (signed_in.status_code, signed_in.headers["location"]) == (303, "../t/team/?x=1")
    assert person.known()
    (event,) = of.events(signed_in.headers["x-request-id"])
    assert event["event"] == "sign-in"
    assert (event["caller"], event["way"], event["client"]) == ("user:ada", "session", "127.0.0.1")
    assert "you are signed in as ada" in person.get("/-/sign-out").text.lower()
    assert person.known()  # looking at the button signs nobody out
    signed_out = person.post("/-/sign-out")
    assert is_page(signed_out, 200, "You are signed out of this proxy")
    assert not person.known()
    (out,) = of.events(signed_out.headers["x-request-id"])
    assert (out["event"], out["caller"], out["credential"]) == ("sign-out", "user:ada", event["credential"])
    assert is_page(person.get("/-/sign-out"), 200, "You are signed out")


def test_what_the_provider_is_asked(person: Person) -> None:
    of = person.site
    url = person.ask(next="/t/team/")
    asked = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    assert url.startswith(f"{of.provider.issuer}/oauth2/authorize?")
    assert asked["response_type"] == "code"
    assert asked["scope"] == "openid email profile"
    assert asked["redirect_uri"] == f"{of.url}/-/signed-in"
    assert asked["code_challenge_method"] == "S256"
    assert min(len(asked[name]) for name in ("state", "nonce", "code_challenge")) == 43
    again = parse_qs(urlsplit(person.ask(next="/t/team/")).query)
    assert all(again[name] != [asked[name]] for name in ("state", "nonce", "code_challenge"))
    person.back(person.agree(person.ask(), "ada"))
    (request,) = of.provider.tokens
    assert request["authorization"].startswith("Basic ")
    assert request["redirect_uri"] == f"{of.url}/-/signed-in"
    assert len(request["code_verifier"]) == 43


def test_the_cookies_have_every_protection(person: Person) -> None:
    begun = person.get("/-/sign-in")
    state = set_cookies(begun)[STATE_COOKIE][STATE_COOKIE]
    assert (state["path"], state["secure"], state["httponly"], state["samesite"]) == ("/", True, True, "Lax")
    assert (state["max-age"], state["domain"]) == ("600", "")
    cookies = set_cookies(person.back(person.agree(begun.headers["location"], "ada")))
    session = cookies[SESSION_COOKIE][SESSION_COOKIE]
    assert (session["path"], session["secure"], session["httponly"], session["samesite"]) == ("/", True, True, "Lax")
    assert (session["max-age"], session["expires"], session["domain"]) == ("", "", "")
    hint = cookies[HINT_COOKIE][HINT_COOKIE]
    assert (hint["path"], hint["secure"], hint["httponly"], hint["samesite"]) == ("/-/sign-out", True, True, "Lax")
    assert cookies[STATE_COOKIE][STATE_COOKIE]["max-age"] == "0"


def test_no_answer_may_be_kept_or_framed(person: Person) -> None:
    answers = [person.get("/-/sign-in"), person.get("/-/signed-in"), person.sign_in(), person.get("/-/sign-out")]
    for answer in answers:
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_session_holds_the_groups_that_roles_name(person: Person) -> None:
    person.sign_in()
    found = person.site.sessions.identify([f"{SESSION_COOKIE}={person.cookie()}".encode()])
    assert found is not None
    assert found[0].groups == {"ml-writers"}


def test_somebody_without_a_role_is_known_and_may_do_nothing(person: Person) -> None:
    person.site.provider.user("eve", groups=["canteen"])
    assert person.sign_in("eve").status_code == 303
    assert person.get("/-/version").status_code == 403


def test_sign_out_at_the_provider(person: Person) -> None:
    """With the ID token, which Okta demands, and the address to come back to."""
    of = person.site
    person.sign_in()
    signed_out = person.post("/-/sign-out")
    wait, _, url = signed_out.headers["refresh"].partition("; url=")
    asked = dict(parse_qsl(urlsplit(url).query))
    assert wait == "0"
    assert url.startswith(f"{of.provider.issuer}/oauth2/end_session?")
    assert asked["client_id"] == of.provider.client_id
    assert asked["post_logout_redirect_uri"] == f"{of.url}/-/sign-out"
    assert asked["id_token_hint"].count(".") == 2
    assert url.replace("&", "&amp;") in signed_out.text
    cookies = set_cookies(signed_out)
    assert [cookies[name][name]["max-age"] for name in (SESSION_COOKIE, HINT_COOKIE)] == ["0", "0"]
    assert cookies[HINT_COOKIE][HINT_COOKIE]["path"] == "/-/sign-out"


def test_the_id_token_of_another_session_is_no_hint(person: Person) -> None:
    person.sign_in()
    hint = person.cookie(HINT_COOKIE)
    other = Person(person.site)
    other.sign_in("bob")
    sent = f"{SESSION_COOKIE}={other.cookie()}; {HINT_COOKIE}={hint}"
    url = requests.post(
        f"{person.site.url}/-/sign-out", headers={"cookie": sent}, verify=str(person.site.bundle), timeout=60
    ).headers["refresh"]
    assert "id_token_hint" not in url
    assert "client_id=" in url


def test_signing_out_without_a_session_leads_nowhere(person: Person) -> None:
    answer = person.post("/-/sign-out")
    assert is_page(answer, 200, "You are signed out")
    assert "refresh" not in answer.headers


# Attacks on the way back from the provider


def test_an_answer_without_the_cookie_of_its_beginning(person: Person) -> None:
    """Login CSRF: an attacker hands over an answer of his own, so that his victim works in his name."""
    attacker = Person(person.site)
    planted = attacker.agree(attacker.ask(), "bob")
    answer = person.back(planted)
    assert is_page(answer, 400, "This sign-in is no longer valid")
    assert "does not belong to a sign-in that this browser began" in reason(person.site, answer)
    assert not person.cookie()
    assert person.site.provider.tokens == []


def test_an_answer_to_another_sign_in_of_this_browser(person: Person) -> None:
    """The same with a victim who is just signing in, too; whose own sign-in still works afterwards."""
    attacker = Person(person.site)
    planted = attacker.agree(attacker.ask(), "bob")
    url = person.ask()
    answer = person.back(planted)
    assert is_page(answer, 400, "This sign-in is no longer valid")
    assert not person.cookie()
    assert person.back(person.agree(url, "ada")).status_code == 303
    assert person.known()


@pytest.mark.parametrize("state", [None, "", "x", "é", "a" * 43], ids=repr)
def test_a_wrong_state(state: str | None, person: Person) -> None:
    parts = urlsplit(person.agree(person.ask(), "ada"))
    query = dict(parse_qsl(parts.query))
    del query["state"]
    if state is not None:
        query["state"] = state
    assert person.get(f"{parts.path}?{urlencode(query)}").status_code == 400
    assert not person.cookie()


@pytest.mark.parametrize("name", ["state", "code", "iss", "error"])
def test_a_parameter_that_is_there_twice(name: str, person: Person) -> None:
    back = person.agree(person.ask(), "ada")
    value = dict(parse_qsl(urlsplit(back).query)).get(name, "access_denied")
    answer = person.back(f"{back}&{urlencode([(name, value), (name, value)])}")
    assert answer.status_code == 400
    assert not person.cookie()


def test_an_answer_is_good_once(person: Person) -> None:
    back = person.agree(person.ask(), "ada")
    copied = person.cookie(STATE_COOKIE)
    assert person.back(back).status_code == 303
    thief = Person(person.site)
    thief.http.cookies.set(STATE_COOKIE, copied)
    answer = thief.back(back)
    assert is_page(answer, 400, "This sign-in is no longer valid")
    assert not thief.cookie()
    assert "invalid_grant" in reason(person.site, answer)


def test_a_used_state_with_a_fresh_code(person: Person) -> None:
    """Whoever has a victim's state cookie cannot use it once more, not even with a code of his own for it."""
    url = person.ask()
    copied = person.cookie(STATE_COOKIE)
    assert person.back(person.agree(url, "ada")).status_code == 303
    for _ in range(8):  # whichever worker it meets
        thief = Person(person.site)
        thief.http.cookies.set(STATE_COOKIE, copied)
        answer = thief.back(thief.agree(url, "bob"))
        assert is_page(answer, 400, "This sign-in was used before")
        assert not thief.cookie()


def test_a_page_that_is_loaded_again_changes_nothing(person: Person) -> None:
    """Whoever has a session and comes with an old answer, by the back button, stays who he is."""
    back = person.agree(person.ask(), "ada")
    person.back(back)
    before = person.cookie()
    answer = person.back(back)
    assert (answer.status_code, answer.headers["location"]) == (303, "../")
    assert SESSION_COOKIE not in set_cookies(answer)
    assert person.cookie() == before
    attacker = Person(person.site)
    answer = person.back(attacker.agree(attacker.ask(), "bob"))
    assert (answer.status_code, answer.headers["location"]) == (303, "../")
    assert "this browser began" in reason(person.site, answer)
    assert person.cookie() == before


def test_a_session_that_was_planted_before(person: Person) -> None:
    """Session fixation: after sign-in, what the attacker knew is worth nothing, and the id is a new one."""
    of = person.site
    attacker = Person(of)
    attacker.sign_in("bob")
    planted = attacker.cookie()
    person.http.cookies.set(SESSION_COOKIE, planted, domain="127.0.0.1", path="/", secure=True)
    person.sign_in("ada")
    assert person.cookie() != planted
    mine, its = (of.sessions.identify([f"{SESSION_COOKIE}={text}".encode()]) for text in (person.cookie(), planted))
    assert mine is not None
    assert its is not None
    assert (mine[0].subject, its[0].subject) == ("user:ada", "user:bob")
    assert mine[0].credential != its[0].credential
    assert not any(attacker.known() for _ in range(8))  # the old one was ended, in all workers


def test_two_sign_ins_have_two_ids(person: Person) -> None:
    ids = {person.site.events(person.sign_in().headers["x-request-id"])[0]["credential"] for _ in range(2)}
    assert len(ids) == 2


def test_a_code_without_its_verifier(person: Person) -> None:
    """PKCE: a code that leaked is worth nothing in another sign-in."""
    attacker = Person(person.site)
    stolen = dict(parse_qsl(urlsplit(person.agree(person.ask(), "ada")).query))["code"]
    state = dict(parse_qsl(urlsplit(attacker.ask()).query))["state"]
    answer = attacker.get(f"/-/signed-in?{urlencode({'code': stolen, 'state': state})}")
    assert is_page(answer, 400, "This sign-in is no longer valid")
    assert not attacker.cookie()


def test_an_id_token_of_another_sign_in(person: Person) -> None:
    """The nonce ties the token to this browser's sign-in, also if the provider could be made to send another."""
    of = person.site
    url = person.ask()
    asked = dict(parse_qsl(urlsplit(url).query))
    forged = url.replace(quote(asked["nonce"]), "A" * 43)
    answer = person.back(person.agree(forged, "ada"))
    assert is_page(answer, 502, "The provider&#39;s answer is not valid")
    assert "nonce" in reason(of, answer)
    assert not person.cookie()


def test_an_answer_of_another_provider(person: Person) -> None:
    """RFC 9207."""
    answer = person.back(person.agree(person.ask(), "ada") + "&iss=https%3A%2F%2Fevil.example")
    assert is_page(answer, 400, "The answer is another provider&#39;s")
    assert person.site.provider.tokens == []
    own = quote(person.site.provider.issuer, safe="")
    assert person.back(person.agree(person.ask(), "ada") + f"&iss={own}").status_code == 303


# The cookies of the way, forged


def sealed_state(of: Site, begun: float, *, by: Sessions | None = None, name: str = STATE_COOKIE) -> str:
    content = json.dumps(["s" * 43, "n" * 43, "v" * 43, "/", begun]).encode()
    return (by or of.sessions).seal_for(name).seal(content)


def outcome(of: Site, cookie: str, value: str) -> int:
    """What the provider's answer to a sign-in with state s… gets with this cookie."""
    answer = requests.get(
        f"{of.url}/-/signed-in?state={'s' * 43}&error=access_denied",
        headers={"cookie": f"{cookie}={value}"},
        verify=str(of.bundle),
        timeout=60,
    )
    return answer.status_code


def test_a_state_cookie_has_ten_minutes(shared: Site) -> None:
    assert outcome(shared, STATE_COOKIE, sealed_state(shared, time.time())) == 403  # taken: the provider said no
    assert outcome(shared, STATE_COOKIE, sealed_state(shared, time.time() - 590)) == 403
    assert outcome(shared, STATE_COOKIE, sealed_state(shared, time.time() - 600)) == 400
    assert outcome(shared, STATE_COOKIE, sealed_state(shared, time.time() + 3600)) == 400  # of a clock gone wrong


def test_a_state_cookie_of_another_secret_or_purpose(shared: Site) -> None:
    now = time.time()
    assert outcome(shared, STATE_COOKIE, sealed_state(shared, now, by=Sessions(shared.oidc, bytes(32)))) == 400
    for name in (SESSION_COOKIE, HINT_COOKIE):
        assert outcome(shared, STATE_COOKIE, sealed_state(shared, now, name=name)) == 400
    good = sealed_state(shared, now)
    assert outcome(shared, STATE_COOKIE, good[:-1]) == 400
    assert outcome(shared, STATE_COOKIE, f"{good}; {STATE_COOKIE}={good}") == 400
    assert outcome(shared, STATE_COOKIE, good) == 403


def test_cookies_of_other_purposes_are_no_session(person: Person) -> None:
    """Each of the proxy's own sealed cookies, under each of its names."""
    person.ask()
    state = person.cookie(STATE_COOKIE)
    person.sign_in()
    session, hint = person.cookie(), person.cookie(HINT_COOKIE)
    assert state
    assert session
    assert hint

    def status(value: str) -> int:
        return requests.get(
            f"{person.site.url}/-/version",
            headers={"cookie": f"{SESSION_COOKIE}={value}"},
            verify=str(person.site.bundle),
            timeout=60,
        ).status_code

    assert [status(value) for value in (state, hint, session)] == [401, 401, 200]
    assert [outcome(person.site, STATE_COOKIE, value) for value in (session, hint)] == [400, 400]


def test_two_session_cookies_are_none(person: Person) -> None:
    person.sign_in()
    other = Person(person.site)
    other.sign_in("bob")
    mine, its = person.cookie(), other.cookie()

    def status(cookie: str) -> int:
        return requests.get(
            f"{person.site.url}/-/version", headers={"cookie": cookie}, verify=str(person.site.bundle), timeout=60
        ).status_code

    assert status(f"{SESSION_COOKIE}={mine}; {SESSION_COOKIE}={its}") == 401
    assert status(f"{SESSION_COOKIE}={its}; {SESSION_COOKIE}={mine}") == 401
    assert status(f"a=1; {SESSION_COOKIE}={mine}; b=2") == 200


def test_a_session_ends_when_it_is_idle_and_in_any_case(shared: Site) -> None:
    def status(begun: float, seen: float) -> int:
        content = json.dumps(["0" * 32, "user:ada", ["ml-writers"], int(begun), int(seen)]).encode()
        value = shared.sessions.seal_for(SESSION_COOKIE).seal(content)
        return requests.get(
            f"{shared.url}/-/version",
            headers={"cookie": f"{SESSION_COOKIE}={value}"},
            verify=str(shared.bundle),
            timeout=60,
        ).status_code

    now = time.time()
    idle, lifetime = shared.oidc.session_idle, shared.oidc.session_lifetime
    assert status(now, now) == 200
    assert status(now - idle, now - idle + 60) == 200
    assert status(now - idle, now - idle) == 401
    assert status(now - lifetime + 60, now) == 200
    assert status(now - lifetime, now) == 401
    assert status(now + 3600, now + 3600) == 401


def test_a_request_renews_a_session(shared: Site) -> None:
    now = int(time.time())
    content = json.dumps(["1" * 32, "user:ada", ["ml-writers"], now - 3000, now - 3000]).encode()
    value = shared.sessions.seal_for(SESSION_COOKIE).seal(content)
    answer = requests.get(
        f"{shared.url}/-/version",
        headers={"cookie": f"{SESSION_COOKIE}={value}"},
        verify=str(shared.bundle),
        timeout=60,
    )
    assert answer.status_code == 200
    renewed = set_cookies(answer)[SESSION_COOKIE][SESSION_COOKIE]
    opened = shared.sessions.seal_for(SESSION_COOKIE).open(renewed.value.encode())
    assert opened is not None
    session_id, subject, groups, begun, seen = json.loads(opened)
    assert [session_id, subject, groups, begun] == ["1" * 32, "user:ada", ["ml-writers"], now - 3000]
    assert now <= seen <= now + 60


# Signing out


def test_a_copied_cookie_ends_in_all_workers_at_once(person: Person) -> None:
    person.sign_in()
    thief = Person(person.site)
    thief.http.cookies.set(SESSION_COOKIE, person.cookie())
    assert thief.known()
    person.post("/-/sign-out")
    with ThreadPoolExecutor(8) as threads:  # many connections, so that each worker gets some
        assert not any(threads.map(lambda _: Person.known(_copy(thief)), range(24)))


def _copy(of: Person) -> Person:
    made = Person(of.site)
    made.http.cookies.set(SESSION_COOKIE, of.cookie())
    return made


@pytest.mark.parametrize("headers", [{"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}], ids=str)
def test_another_site_cannot_sign_somebody_out(headers: dict[str, str], person: Person) -> None:
    person.sign_in()
    assert person.post("/-/sign-out", headers=headers).status_code == 403
    assert person.known()


def test_a_look_signs_nobody_out(person: Person) -> None:
    person.sign_in()
    for method in ("GET", "HEAD", "OPTIONS"):
        person.http.request(method, f"{person.site.url}/-/sign-out", timeout=60)
    assert person.known()


# Where to go afterwards

ELSEWHERE = [
    "https://evil.example/",
    "http:evil.example",
    "//evil.example",
    "///evil.example",
    "/\\evil.example",
    "\\/evil.example",
    "\\\\evil.example",
    "/t/x\\..\\..\\evil",
    "/\t/evil.example",
    "\t//evil.example",
    " //evil.example",
    "/\n/evil.example",
    "/a\r\nset-cookie: a=1",
    "/\x00/evil.example",
    "/\x7f",
    "/ö",
    "/a b",
    "javascript:alert(1)",
    "data:text/html,x",
    "evil.example",
    "@evil.example",
    "?next=//evil.example",
    "#",
    "",
    "/" + "a" * 1024,
    "/-/sign-in?next=/",
    "/-/signed-in",
    "/-/sign-out",
]


@pytest.mark.parametrize("text", ELSEWHERE, ids=repr)
def test_no_way_elsewhere(text: str) -> None:
    assert local_path(text) == "/"


@pytest.mark.parametrize(
    "text", ["/", "/t/team/", "/t/team/?a=b&c=%2F%2F", "/#/experiments/1", "/-/", "/a//b", "/%5Cevil"]
)
def test_own_paths_are_kept(text: str) -> None:
    assert local_path(text) == text


@given(st.text(alphabet=st.sampled_from("/\\.@:?#%ae \t\r\n\x00é"), max_size=12))
def test_a_browser_stays_here(text: str) -> None:
    """As the URL standard resolves it: tab, CR and LF vanish, a backslash is a slash, spaces around are cut."""
    kept = local_path(text)
    resolved = kept.strip(" \x00\t\r\n").translate({9: None, 10: None, 13: None}).replace("\\", "/")
    assert resolved == kept
    assert kept.startswith("/")
    assert not kept.startswith("//")


@pytest.mark.parametrize("text", ["//evil.example", "/\\evil.example", "https://evil.example/", "/\t/evil.example"])
def test_a_planted_next_leads_to_the_front_page(text: str, person: Person) -> None:
    answer = person.sign_in(next=text)
    assert (answer.status_code, answer.headers["location"]) == (303, "../")


# When it does not work


def test_somebody_refuses_at_the_provider(person: Person) -> None:
    answer = person.back(person.agree(person.ask(next="/t/team/"), "", action="deny") + state_of(person))
    assert is_page(answer, 403, "The provider did not sign you in")
    assert "It says access_denied." in answer.text
    assert 'href="sign-in?next=%2Ft%2Fteam%2F"' in answer.text
    assert answer.headers["x-request-id"] in answer.text
    assert set_cookies(answer)[STATE_COOKIE][STATE_COOKIE]["max-age"] == "0"


def state_of(person: Person) -> str:
    """The mock forgets the state when somebody refuses, which RFC 6749 section 4.1.2.1 demands."""
    opened = person.site.sessions.seal_for(STATE_COOKIE).open(person.cookie(STATE_COOKIE).encode())
    assert opened is not None
    return f"&state={json.loads(opened)[0]}"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("temporarily_unavailable", 503),
        ("invalid_scope", 502),
        ("<script>alert(1)</script>", 502),
        ("\u202e\r\nx: y", 502),
    ],
)
def test_what_the_provider_says_is_never_shown_as_it_came(error: str, status: int, person: Person) -> None:
    person.ask()
    description = "<img src=x>"
    query = urlencode({"error": error, "error_description": description, "error_uri": "javascript:1"})
    answer = person.get(f"/-/signed-in?{query}{state_of(person)}")
    assert answer.status_code == status
    assert error not in answer.text
    assert "<script" not in answer.text
    assert "<img" not in answer.text
    assert "javascript:" not in answer.text
    assert len(reason(person.site, answer)) < 200


def json_answer(status: str, content: object) -> Callable[[], Answer]:
    return lambda: (status, [("content-type", "application/json")], json.dumps(content).encode())


@pytest.mark.parametrize(
    ("answer", "status", "why"),
    [
        (json_answer("400 Bad Request", {"error": "invalid_client"}), 502, "invalid_client"),
        (json_answer("400 Bad Request", {"error": "invalid_grant"}), 400, "invalid_grant"),
        (json_answer("500 Internal Server Error", {"error": "server_error"}), 503, "the token endpoint: HTTPError"),
        (json_answer("200 OK", {"access_token": "a"}), 502, "no ID token"),
        (json_answer("200 OK", {"access_token": "a", "id_token": 7}), 502, "no ID token"),
        (json_answer("200 OK", {"access_token": "a", "id_token": "a.b.c"}), 502, "the ID token: "),
        (json_answer("200 OK", ["id_token"]), 502, "not a JSON object"),
        (lambda: ("200 OK", [("content-type", "text/html")], b"<html>"), 502, "not a JSON object"),
        (lambda: ("302 Found", [("location", "http://127.0.0.1:9/")], b""), 502, "not a JSON object"),
    ],
)
def test_what_the_token_endpoint_may_answer(
    answer: Callable[[], Answer], status: int, why: str, person: Person
) -> None:
    back = person.agree(person.ask(), "ada")
    person.site.provider.token_answer = answer
    failed = person.back(back)
    assert failed.status_code == status
    assert failed.headers["content-type"].startswith("text/html")
    assert why in reason(person.site, failed)
    assert not person.cookie()


def test_no_secret_in_any_log(person: Person) -> None:
    of = person.site
    signed_in = person.agree(person.ask(), "ada")
    code = dict(parse_qsl(urlsplit(signed_in).query))["code"]
    state = person.cookie(STATE_COOKIE)
    answer = person.back(signed_in)
    session, hint = person.cookie(), person.cookie(HINT_COOKIE)
    person.post("/-/sign-out")
    of.events(answer.headers["x-request-id"])
    of.proxy.log_line(answer.headers["x-request-id"])
    written = of.audit.read_text() + of.proxy.stdout.read_text() + of.proxy.stderr.read_text()
    for secret in (
        code,
        state,
        session,
        hint,
        of.provider.client_secret,
        SECRET.hex(),
        of.provider.tokens[0]["code_verifier"],
    ):
        assert len(secret) > 15
        assert secret not in written
    assert "Traceback" not in written


def test_too_many_groups(person: Person) -> None:
    person.site.provider.user("max", groups=[f"ml-{number:060}" for number in range(120)])
    answer = person.sign_in("max")
    assert is_page(answer, 403, "You are in too many groups")
    assert "120 groups" in reason(person.site, answer)
    assert not person.cookie()


def test_a_large_id_token_is_no_hint_but_signs_in(person: Person) -> None:
    person.site.provider.user("ann", groups=["ml-writers"], photo="x" * 3000)
    answer = person.sign_in("ann")
    assert answer.status_code == 303
    assert HINT_COOKIE not in set_cookies(answer)
    assert person.known()
    assert "id_token_hint" not in person.post("/-/sign-out").headers["refresh"]


# Other set-ups


def test_a_public_client(at: Provider, tmp_path: Path) -> None:
    with site(tmp_path / "proxy", at, method="none") as of:
        at.tokens.clear()
        person = Person(of)
        assert person.sign_in().status_code == 303
        assert person.known()
        assert at.tokens[0]["authorization"] == ""
        assert at.tokens[0]["client_id"] == at.client_id


def test_a_provider_that_takes_the_secret_by_post_only(tmp_path: Path) -> None:
    with provider() as at:
        at.documents["token_endpoint_auth_methods_supported"] = ["client_secret_post", "private_key_jwt"]
        at.user("ada", groups=["ml-writers"])
        with site(tmp_path / "proxy", at, method="client_secret_post") as of:
            assert Person(of).sign_in().status_code == 303
            assert at.tokens[0]["authorization"] == ""
            assert at.tokens[0]["client_secret"] == at.client_secret


def test_by_tls_and_through_the_proxy_on_the_way_out(tmp_path: Path) -> None:
    """The token endpoint is reached like the keys: by upstream.proxy, with the CAs of oidc.ca_bundle."""
    authority = Authority(tmp_path, "provider")
    out, imposter = Upstream(), Upstream(Authority(tmp_path, "other").server("id.example.com"))
    with provider(authority, "id.example.com") as at:
        at.user("ada", groups=["ml-writers"])
        out.script = leads_to(urlsplit(at.address).port or 0)
        variables = {
            "MLFLOW_PROXY_UPSTREAM__PROXY": f"http://user:pass@127.0.0.1:{out.port}",
            "MLFLOW_PROXY_OIDC__CA_BUNDLE": str(authority.bundle),
        }
        with site(tmp_path / "proxy", at, environ=variables) as of:
            before = len(out.arrived)
            person = Person(of)
            assert person.sign_in().status_code == 303
            assert {arrived.target for arrived in out.arrived[before:]} == {"id.example.com:443"}
            # Somebody gets between, who has no certificate for the provider's name: no code and no secret for him.
            back = person.agree(person.ask(), "ada")
            out.script = leads_to(imposter.port)
            answer = person.back(back)
            assert is_page(answer, 503, "The provider cannot be reached")
            assert "SSLError" in reason(of, answer)
            assert imposter.arrived == []
    out.close()
    imposter.close()


def leads_to(port: int) -> Callable[[Peer, Arrived], None]:
    """An HTTP proxy at which every way leads to one port of this machine."""
    return lambda peer, _: open_tunnel(peer, Arrived(f"CONNECT localhost:{port} HTTP/1.1".encode(), b""))


def test_a_provider_without_a_page_to_sign_out(tmp_path: Path) -> None:
    with provider() as at:
        at.documents["end_session_endpoint"] = None
        at.user("ada", groups=["ml-writers"])
        with site(tmp_path / "proxy", at) as of:
            person = Person(of)
            person.sign_in()
            answer = person.post("/-/sign-out")
            assert is_page(answer, 200, "You are signed out")
            assert "refresh" not in answer.headers
            assert not person.known()


@pytest.mark.parametrize("name", ["authorization_endpoint", "token_endpoint"])
@pytest.mark.parametrize("value", [None, "http://id.example.com/", "javascript:alert(1)", 7], ids=repr)
def test_a_provider_that_describes_itself_wrongly(name: str, value: object, tmp_path: Path) -> None:
    with provider() as at:
        at.documents[name] = value
        with site(tmp_path / "proxy", at) as of:
            person = Person(of)
            answer = person.get("/-/sign-in")
            if name == "token_endpoint":
                answer = person.back(person.agree(answer.headers["location"], "ada"))
            assert is_page(answer, 500, "Sign-in is not set up correctly")
            assert name in reason(of, answer)


def test_the_provider_is_away(tmp_path: Path) -> None:
    with provider() as at:
        at.user("ada", groups=["ml-writers"])
        with site(tmp_path / "proxy", at) as of:
            person, known = Person(of), Person(of)
            known.sign_in()
            back = person.agree(person.ask(), "ada")
            at.stop()
            answer = person.back(back)
            assert is_page(answer, 503, "The provider cannot be reached")
            assert "ConnectionError" in reason(of, answer)
            assert known.known()  # who is signed in stays so
            known.post("/-/sign-out")  # and can sign out
            assert not known.known()


def test_the_provider_was_never_there(tmp_path: Path) -> None:
    with provider() as at, site(tmp_path / "proxy", at, started=False) as of:
        answer = Person(of).get("/-/sign-in")
        assert is_page(answer, 503, "The provider cannot be reached")
        assert "http-equiv" not in answer.text


def test_the_provider_does_not_answer(person: Person) -> None:
    back = person.agree(person.ask(), "ada")
    person.site.provider.token_answer = _hang
    answer = person.back(back)
    assert is_page(answer, 503, "The provider cannot be reached")
    assert "ReadTimeout" in reason(person.site, answer)


def _hang() -> Answer:
    time.sleep(12)
    return "200 OK", [], b""


def test_without_tls_on_this_machine(at: Provider, tmp_path: Path) -> None:
    with site(tmp_path / "proxy", at, tls=False) as of:
        person = Person(of)
        url = person.ask()
        assert parse_qs(urlsplit(url).query)["redirect_uri"] == [f"{of.url}/-/signed-in"]


def test_without_tls_elsewhere(at: Provider, tmp_path: Path) -> None:
    """A browser would not keep the cookie, and everybody on the way could read it."""
    with site(tmp_path / "proxy", at, tls=False, server={"allowed_hosts": ["mlflow.example.com"]}) as of:
        answer = Person(of).get("/-/sign-in", headers={"host": "mlflow.example.com"})
        assert is_page(answer, 400, "Sign-in needs HTTPS")
        assert "plain HTTP" in reason(of, answer)


def test_behind_another_server(at: Provider, tmp_path: Path) -> None:
    """Its address and scheme count, by public_url or by what a trusted proxy says."""
    hosts = {"allowed_hosts": ["mlflow.example.com"], "trusted_proxies": ["127.0.0.0/8"]}
    forwarded = {"host": "mlflow.example.com", "x-forwarded-proto": "https", "x-forwarded-for": "192.0.2.7"}
    with site(tmp_path / "proxy", at, tls=False, server=hosts) as of:
        answer = Person(of).get("/-/sign-in", headers=forwarded)
        assert parse_qs(urlsplit(answer.headers["location"]).query)["redirect_uri"] == [f"{PUBLIC_URL}/-/signed-in"]
        failed = Person(of).get("/-/signed-in", headers=forwarded)
        assert of.events(failed.headers["x-request-id"])[0]["client"] == "192.0.2.7"
    with site(tmp_path / "public", at, tls=False, server={"public_url": PUBLIC_URL}) as of:
        answer = Person(of).get("/-/sign-in")
        assert parse_qs(urlsplit(answer.headers["location"]).query)["redirect_uri"] == [f"{PUBLIC_URL}/-/signed-in"]


def test_a_host_that_is_not_allowed_gets_no_redirect(person: Person) -> None:
    answer = person.get("/-/sign-in", headers={"host": "evil.example"})
    assert answer.status_code == 421
    assert "location" not in answer.headers


@pytest.mark.parametrize(("content", "why"), [("", "is empty"), (None, "No such file")])
def test_a_client_secret_that_went_missing(content: str | None, why: str, at: Provider, tmp_path: Path) -> None:
    with site(tmp_path / "proxy", at) as of:
        file = tmp_path / "proxy" / "client-secret"
        file.unlink() if content is None else file.write_text(content)
        answer = Person(of).get("/-/sign-in")
        assert is_page(answer, 500, "Sign-in is not set up correctly")
        assert why in reason(of, answer)
        file.write_text(at.client_secret)
        assert Person(of).sign_in().status_code == 303  # a new secret counts without a restart


def test_a_claim_that_is_required_and_missing(at: Provider, tmp_path: Path) -> None:
    required = {"MLFLOW_PROXY_OIDC__REQUIRED_CLAIMS": json.dumps({"tenant": "ours"})}
    with site(tmp_path / "proxy", at, environ=required) as of:
        person = Person(of)
        answer = person.sign_in()
        assert is_page(answer, 403, "Your account may not use this proxy")
        assert "tenant" in reason(of, answer)
        assert not person.cookie()
        at.user("tim", groups=["ml-writers"], tenant="ours")
        assert person.sign_in("tim").status_code == 303


def test_the_environment_has_no_say(at: Provider, tmp_path: Path) -> None:
    """A proxy or CA bundle meant for other programs must not see codes and secrets."""
    nowhere = {
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
    }
    with site(tmp_path / "proxy", at, environ={**nowhere, "REQUESTS_CA_BUNDLE": "/nonexistent"}) as of:
        assert Person(of).sign_in().status_code == 303


def test_without_a_client_there_is_no_sign_in(at: Provider, tmp_path: Path) -> None:
    tokens_only = {
        "MLFLOW_PROXY_OIDC__ISSUER": at.issuer,
        "MLFLOW_PROXY_OIDC__AUDIENCE": '["any"]',
        "MLFLOW_PROXY_ROLES": json.dumps([{"name": "all", "subjects": ["*"], "targets": ["*"], "allow": ["*"]}]),
    }
    with running(tmp_path / "proxy", [target("team", "http://127.0.0.1:9")], environ=tokens_only) as proxy:
        for path in ("sign-in", "signed-in", "sign-out"):
            answer = requests.get(f"http://127.0.0.1:{proxy.port}/-/{path}", allow_redirects=False, timeout=60)
            assert answer.status_code == 404
