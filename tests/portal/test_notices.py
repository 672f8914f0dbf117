"""Refusals: browsers get a page that says what to do, programs get JSON; both name the request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import unescape
from typing import Any, NamedTuple

import pytest
from tests.faults.callers import Answer, call, call_raw
from tests.faults.proxies import Proxy, free_port, running, target
from tests.faults.upstreams import Upstream, answer, answers
from tests.portal.signing_in import Person, Site, provider, site

from mlflow_proxy.access.key_record import make_key

_NAVIGATES = ("Sec-Fetch-Mode: navigate", "Sec-Fetch-Site: none", "Accept: text/html,*/*;q=0.8")
_OLD_BROWSER = ("Accept: text/html,application/xhtml+xml,*/*;q=0.8",)
_ROLES: list[Mapping[str, Any]] = [
    {
        "name": "reader",
        "targets": ["prod", "down"],
        "allow": ["AccessUI", "Get*", "proxy:GetMetrics"],
        "rate": "1000/second",
    },
    {"name": "slow", "targets": ["prod"], "allow": ["AccessUI"], "rate": "1/hour"},
    {"name": "logger", "targets": ["prod", "down"], "allow": ["Log*"]},
]


class Stage(NamedTuple):
    proxy: Proxy
    upstream: Upstream
    keys: dict[str, str]

    def ask(self, key: str, path: str, *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
        shown = [f"X-API-Key: {self.keys.get(key, key)}"] if key else []
        return call(self.proxy.port, path, method, *shown, *headers, body=body)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("notices")
    names = ("reader", "slow", "logger")
    keys = {name: make_key(name, name, created=datetime.now(UTC), expires=None) for name in names}
    (folder / "keys.jsonl").write_text("".join(f"{json.dumps(kept.fields())}\n" for _, kept in keys.values()))
    upstream = Upstream()
    targets = [
        target("prod", f"http://127.0.0.1:{upstream.port}", default=True),
        target("down", f"http://127.0.0.1:{free_port()}"),
    ]
    sections = {"access": {"keys_file": str(folder / "keys.jsonl")}, "limits": {"auth_failure_rate": "none"}}
    with running(
        folder, targets, roles=_ROLES, sections=sections, upstream={"retries": 0, "first_byte_timeout": 0.3}
    ) as proxy:
        yield Stage(proxy, upstream, {name: key for name, (key, _) in keys.items()})
    upstream.close()


def text_of(page: Answer) -> str:
    """What a person reads on a page."""
    body = page.body.decode().partition("<body>")[2]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def assert_notice(page: Answer, status: int, title: str, *words: str) -> None:
    assert (page.status, page.value("content-type")) == (status, "text/html; charset=utf-8")
    assert page.value("cache-control") == "no-store"
    assert "default-src 'none'" in page.value("content-security-policy")
    assert (page.value("x-content-type-options"), page.value("x-frame-options")) == ("nosniff", "DENY")
    text = text_of(page)
    for expected in (title, f"Request id {page.value('x-request-id')}", *words):
        assert expected in text, text


# Each way in which a refusal arises: before the request is read, on the way to MLflow, in the proxy's own pages.
class Refused(NamedTuple):
    key: str
    path: str
    status: int
    title: str
    words: str


_REFUSALS = [
    Refused("", "/", 401, "Authentication required", "MLFLOW_TRACKING_TOKEN"),
    Refused("wrong", "/t/prod/", 401, "Authentication required", "is not valid"),
    Refused("logger", "/", 403, "You are not allowed to do this", "'logger' does not allow AccessUI"),
    Refused("logger", "/-/metrics", 403, "You are not allowed to do this", "You are key:logger ."),
    Refused("reader", "/t/nope/", 404, "Page not found", "Use /t/prod/"),
    Refused("reader", "/-/nope", 404, "Page not found", "Show all targets"),
    Refused("reader", "/?a=%zz", 400, "This request is not valid", ""),
    Refused("reader", "/t/down/", 502, "MLflow cannot be reached", "Try again"),
]


@pytest.mark.parametrize("browser", [_NAVIGATES, _OLD_BROWSER], ids=["fetch-metadata", "accept"])
@pytest.mark.parametrize("refused", _REFUSALS, ids=lambda refused: f"{refused.key} {refused.path}")
def test_a_browser_gets_a_page(browser: tuple[str, ...], refused: Refused, stage: Stage) -> None:
    page = stage.ask(refused.key, refused.path, *browser)
    assert_notice(page, refused.status, refused.title, refused.words)


@pytest.mark.parametrize("headers", [(), ("Accept: */*",), ("Sec-Fetch-Mode: cors", "Accept: text/html")])
@pytest.mark.parametrize("refused", _REFUSALS, ids=lambda refused: f"{refused.key} {refused.path}")
def test_a_program_gets_json(headers: tuple[str, ...], refused: Refused, stage: Stage) -> None:
    got = stage.ask(refused.key, refused.path, *headers)
    assert (got.status, got.value("content-type")) == (refused.status, "application/json")
    assert got.json["request_id"] == got.value("x-request-id")


def test_other_hosts(stage: Stage) -> None:
    page = call_raw(stage.proxy.port, b"GET / HTTP/1.1\r\nHost: evil.example\r\nSec-Fetch-Mode: navigate\r\n\r\n")
    assert_notice(page, 421, "This is not the proxy's address")


def test_too_many_requests(stage: Stage) -> None:
    stage.ask("slow", "/")
    page = stage.ask("slow", "/", *_NAVIGATES)
    assert_notice(page, 429, "Too many requests", "Try again")
    assert int(page.value("retry-after")) > 0


def test_what_mlflows_service_refuses(stage: Stage) -> None:
    stage.upstream.script = answers(answer(b"{}", "403 No", "x-amzn-ErrorType: AccessDeniedException"))
    assert_notice(stage.ask("reader", "/", *_NAVIGATES), 403, "You are not allowed to do this", "AccessDeniedException")
    stage.upstream.script = lambda *_: None
    assert_notice(stage.ask("reader", "/", *_NAVIGATES), 504, "No answer in time", "Try again")
    stage.upstream.reset()


def test_a_form_that_is_refused(stage: Stage) -> None:
    """Posts are navigations, too, but nobody should send one again by a link."""
    page = stage.ask("reader", "/-/version", *_NAVIGATES, method="POST", body=b"x" * 20_000)
    assert_notice(page, 413, "This request is too large")
    foreign = ("Sec-Fetch-Mode: navigate", "Sec-Fetch-Site: cross-site", "Origin: https://evil.example")
    page = stage.ask("logger", "/t/prod/", *foreign, method="POST", body=b"a=b")
    assert_notice(page, 403, "You are not allowed to do this", "A page of another site")
    assert "Try again" not in text_of(page)


def test_what_a_caller_sent_is_escaped(stage: Stage) -> None:
    page = stage.ask("reader", "/t/%3Cscript%3Ealert(1)%3C%2Fscript%3E/", *_NAVIGATES)
    assert page.status in (400, 404)
    assert b"<script" not in page.body
    page = stage.ask("reader", "/-/%3Cimg%20src=x%20onerror=alert(1)%3E%22", *_NAVIGATES)
    assert page.status == 404
    assert b"<img" not in page.body


@pytest.mark.parametrize(
    ("path", "link"),
    [("/-/nope", "../-/"), ("/-/nope/deeper", "../../-/"), ("/t/nope/", "../../-/"), ("//-/nope", "../-/")],
)
def test_links_are_relative_to_what_the_browser_asked_for(path: str, link: str, stage: Stage) -> None:
    page = stage.ask("reader", path, *_NAVIGATES)
    assert page.status == 404
    assert re.findall(r'href="([^"]*)"', page.body.decode()) == [link]


def test_challenges_say_whether_a_token_was_wrong(stage: Stage) -> None:
    """RFC 6750 section 3.1: no error code where nothing was shown."""
    assert stage.ask("", "/").values("www-authenticate")[0] == 'Bearer realm="mlflow-proxy"'
    for shown in ("Bearer mlp_wrong", "Bearer a.b.c", "Bearer"):
        got = stage.ask("", "/", f"Authorization: {shown}")
        assert got.status == 401
        assert got.values("www-authenticate")[0] == 'Bearer realm="mlflow-proxy", error="invalid_token"'
        assert "is not valid" in got.json["message"]


def test_the_dash_alone_leads_to_the_overview(stage: Stage) -> None:
    got = stage.ask("", "/-")
    assert (got.status, got.value("location")) == (308, "-/")


# People who signed in


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with provider() as at, site(tmp_path_factory.mktemp("signing-in") / "proxy", at) as guarded:
        at.user("eve", groups=["canteen"])
        at.user("zoë", groups=["ml-writers"])
        yield guarded


@pytest.fixture
def person(guarded: Site) -> Iterator[Person]:
    visitor = Person(guarded)
    yield visitor
    visitor.http.close()


@pytest.mark.parametrize(("path", "to_root"), [("/", "./"), ("/-/", "../"), ("/t/team/", "../../")])
def test_somebody_without_a_role_can_sign_out(path: str, to_root: str, person: Person) -> None:
    assert person.sign_in("eve").status_code == 303
    page = person.get(path, headers={"sec-fetch-mode": "navigate", "accept": "text/html"})
    assert page.status_code == 403
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<strong>user:eve</strong>" in page.text
    assert "Ask the proxy&#39;s operator for a role" in page.text
    assert f'action="{to_root}-/sign-out"' in page.text
    assert person.get(path).json()["error_code"] == "PERMISSION_DENIED"


def test_json_has_letters_as_they_are(person: Person) -> None:
    assert person.sign_in("zoë").status_code == 303
    assert b'"user:zo\xc3\xab"' in person.get("/-/whoami").content
