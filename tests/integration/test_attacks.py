"""Attacks on identity, roles and records, through the running proxy.

Each has its control: the same request with the one thing changed that the defence looks at, which is served. So none
of them passes because something else is wrong with it.
"""

from __future__ import annotations

import base64
import hmac
import itertools
import json
import re
import time
from collections.abc import Iterator
from string import Template
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from joserfc.jwk import ECKey, OctKey, RSAKey
from tests.access.provider import pem, seal
from tests.faults import callers
from tests.faults.callers import Answer, call_raw, request
from tests.faults.proxies import ACCESS_KEY, SERVER_ARN
from tests.integration.access import (
    CALLER_RATE,
    FAILURE_RATE,
    OTHER_LOAD_BALANCER,
    SECRET,
    STRANGER,
    SUBJECT_HEADER,
    VERIFY_HEADER,
    WAYS,
    Pairs,
    Site,
    key_headers,
    make_run,
    site,
    straight,
)
from tests.integration.conftest import Control

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.seal import Seal
from mlflow_proxy.access.session import Sessions
from mlflow_proxy.local import LocalSageMaker

V2 = "/api/2.0/mlflow"
READ = f"{V2}/experiments/get?experiment_id=0"
VERSION = "/-/version"
JSON = (("Content-Type", "application/json"),)

# Addresses of strangers on loopback, each used by one test.
_strangers = (f"127.0.1.{n}" for n in itertools.count(1))


@pytest.fixture(scope="module")
def at(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(sagemaker, tmp_path_factory.mktemp("attacks")) as made:
        yield made


def try_it(at: Site, *headers: tuple[str, str], path: str = VERSION, method: str = "GET") -> int:
    """The status of a request through the load balancer, by a client who has not failed before."""
    return at.trusted.call(method, path, (*headers, at.client())).status


def arrived(control: Control) -> list[tuple[str, str, str]]:
    """What came to MLflow: target, method, path."""
    entries = control("GET", "requests?last=2000")["requests"]
    return [(entry["target"], entry["method"], entry["path"]) for entry in entries if entry["plane"] == "mlflow"]


def dropped_headers(at: Site) -> float:
    text = at.trusted.call("GET", "/-/metrics", at.key("admin")).body.decode()
    (line,) = (line for line in text.splitlines() if line.startswith("mlflow_proxy_dropped_identity_headers_total "))
    return float(line.split()[-1])


# Identity by headers


@pytest.mark.parametrize("way", ["load balancer", "certificate"])
def test_only_the_load_balancer_says_who_somebody_is(at: Site, way: str) -> None:
    headers = at.shows(way, "admin").headers
    stranger = at.peer(next(_strangers))
    before = dropped_headers(at)
    assert stranger.call("GET", VERSION, headers).status == 401
    assert stranger.call("GET", VERSION, (*headers, ("X-Forwarded-For", "127.0.0.1"))).status == 401
    end = time.monotonic() + 10  # workers write their numbers once a second
    while dropped_headers(at) < before + 2 * len(headers):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert stranger.call("GET", VERSION, at.key("admin")).status == 200
    assert try_it(at, *headers) == 200


@pytest.mark.parametrize(
    "name",
    [
        *("X-Forwarded-User", "X-Forwarded-Email", "X-Forwarded-Groups", "X-Forwarded-Preferred-Username"),
        *("X-Auth-Request-User", "X-Remote-User", "Remote-User", "X-User", "Client-Cert", "X-Client-Cert"),
        *("X-Forwarded-Client-Cert", "X-Goog-Iap-Jwt-Assertion", "X-Amzn-Mtls-Clientcert-Subject"),
        *("X-Amzn-Oidc-Identity", "X-Amzn-Oidc-Accesstoken"),
        *("SSL_Client_Subject_DN", "SSL-Client_Subject-DN", "X_Amzn_Oidc_Data", "X-Amzn-Oidc_Data", "HTTP_X_API_KEY"),
        *("X_API_Key", "X.API.Key", "Xapikey", "Proxy-Authorization", "X-Authorization", "Authorization_"),
    ],
)
@pytest.mark.parametrize("value", ["subject", "data", "key"])
def test_names_that_nobody_configured(at: Site, name: str, value: str) -> None:
    """Not even from the load balancer, which has no reason to send them."""
    values = {
        "subject": at.shows("certificate", "admin").headers[0][1],
        "data": at.shows("load balancer", "admin").headers[0][1],
        "key": f"Bearer {at.keys['admin']}" if "uthorization" in name else at.keys["admin"],
    }
    assert try_it(at, (name, values[value]), (VERIFY_HEADER, "SUCCESS")) == 401
    good = {"subject": SUBJECT_HEADER, "data": "X-Amzn-Oidc-Data", "key": "X-API-Key"}
    if value != "key" or "uthorization" not in name:
        assert try_it(at, (good[value], values[value]), (VERIFY_HEADER, "SUCCESS")) == 200


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [str.upper, str.lower, str.swapcase])
def test_a_name_in_another_case_is_the_same_header(at: Site, way: str, change: Any) -> None:
    """So what is dropped in one spelling is dropped in all."""
    headers = [(change(name), value) for name, value in at.shows(way, "admin").headers]
    assert try_it(at, *headers) == 200
    if way in ("load balancer", "certificate"):
        assert at.peer(STRANGER).call("GET", VERSION, headers).status == 401


@pytest.mark.parametrize("way", WAYS)
def test_what_is_shown_twice_is_not_known(at: Site, way: str) -> None:
    """Whichever of two would be taken, somebody in front might take the other."""
    (name, value), *rest = at.shows(way, "admin").headers
    other = at.shows(way, "reader").headers[0][1]
    assert try_it(at, (name, value), *rest) == 200
    for doubled in ([(name, value), (name, value)], [(name, value), (name, other)], [(name, other), (name, value)]):
        assert try_it(at, *doubled, *rest) == 401
    if name != "Cookie":
        assert try_it(at, (name, f"{value}, {value}"), *rest) in (401, 403)  # a certificate's subject of no role
        assert try_it(at, (name, f"{value},{other}"), *rest) in (401, 403)


def test_the_first_that_is_shown_decides_alone(at: Site) -> None:
    """A good identity of somebody else beside it makes nobody more than he is."""
    order = ["key in its own header", "key as bearer", "load balancer", "certificate", "session"]
    for first, then in itertools.pairwise(order):
        mine, others = at.shows(first, "reader"), at.shows(then, "admin").headers
        answer = at.trusted.call("GET", READ, (*others, *mine.headers))
        assert (answer.status, at.log([answer])[0]["caller"]) == (200, mine.subject)
        assert try_it(at, *others, *mine.headers, path="/-/metrics") == 403
        assert try_it(at, *others, path="/-/metrics") == 200
    wrong = [
        ("X-API-Key", "mlp_aaaaaaaa_" + "a" * 43),
        ("Authorization", "Bearer x.y.z"),
        ("X-Amzn-Oidc-Data", "x.y.z"),
        (SUBJECT_HEADER, "CN=admin,O=Example"),  # of whose certificate nobody says that it is good
    ]
    for one in wrong:
        assert try_it(at, one, *at.shows("session", "admin").headers) == 401
    assert try_it(at, *at.shows("session", "admin").headers) == 200


def test_connection_does_not_take_a_credential_away(at: Site) -> None:
    """What Connection names is for this hop only: it must not turn one caller into another, or lift a check."""
    wrong = ("X-API-Key", "mlp_aaaaaaaa_" + "a" * 43)
    session = at.shows("session", "admin").headers
    assert try_it(at, ("Connection", "x-api-key"), wrong, *session) == 401
    assert try_it(at, ("Connection", "x-api-key"), *at.key("reader"), *session, path="/-/metrics") == 403
    assert try_it(at, ("Connection", "x-unknown"), *session, path="/-/metrics") == 200
    failed = ((SUBJECT_HEADER, "CN=admin,O=Example"), (VERIFY_HEADER, "FAILED:revoked"))
    assert try_it(at, ("Connection", VERIFY_HEADER.lower()), *failed) == 401
    assert try_it(at, ("Connection", "x-unknown"), failed[0], (VERIFY_HEADER, "SUCCESS")) == 200


# What reaches the upstream


AWS_LIKE = {
    "X-Amz-Date": "20200101T000000Z",
    "X-Amz-Security-Token": "a-callers-token",
    "X-Amz-Content-Sha256": "UNSIGNED-PAYLOAD",
    "X-Amz-Target": "SageMaker.DeleteMlflowApp",
    "X-Amz-Meta-A": "b",
    "X-Amzn-Trace-Id": "Root=1",
    "X-MLflow-SM-Tracking-Server-ARN": SERVER_ARN.replace("team", "other"),
    "X-SM-MLflow-App-ARN": "arn:aws:sagemaker:us-east-1:111122223333:mlflow-app/app-OTHER",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-User": "admin",
    "X-Original-URL": "/-/metrics",
    "X-Rewrite-URL": "/-/metrics",
    "X-HTTP-Method-Override": "DELETE",
    "X-HTTP-Method": "DELETE",
    "X-Method-Override": "DELETE",
}
# What the proxy itself adds, each of them once.
ADDED = [
    *("host", "authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token"),
    *("x-mlflow-sm-tracking-server-arn", "x-request-id"),
]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_caller_but_the_request_arrives(at: Site, way: str) -> None:
    at.echo.reset()
    shown = at.shows(way, "admin").headers
    passes = ("User-Agent", "a control")
    answer = at.trusted.call("GET", "/t/echo/x", (*shown, *AWS_LIKE.items(), passes))
    assert answer.status == 200
    (there,) = at.echo.arrived
    assert there.request_line == b"GET /x HTTP/1.1"
    assert sorted(name for name, _ in there.headers) == sorted([*ADDED, "user-agent"])
    assert there.value("user-agent") == "a control"
    assert there.value("authorization").startswith("AWS4-HMAC-SHA256 Credential=ASIA")
    assert there.value("x-mlflow-sm-tracking-server-arn") == SERVER_ARN
    assert not any(value.encode() in there.head for _, value in (*shown, *AWS_LIKE.items()) if value != "b")


def test_a_signature_of_aws_is_no_identity(at: Site) -> None:
    signed = f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20261124/us-east-1/sagemaker-mlflow/aws4_request, Signature=0"
    assert try_it(at, ("Authorization", signed)) == 401
    assert try_it(at, ("Authorization", f"Bearer {at.keys['admin']}")) == 200


@pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "_method"])
def test_a_method_is_the_one_that_was_sent(at: Site, name: str) -> None:
    at.echo.reset()
    for method in ("GET", "POST"):
        answer = at.trusted.call(
            method, f"/t/echo{V2}/runs/search?_method=DELETE", (*at.key("admin"), (name, "DELETE"))
        )
        assert answer.status == 200
    assert [there.method for there in at.echo.arrived] == ["GET", "POST"]
    assert not any(b"ethod-" in there.head or b"-method" in there.head.lower() for there in at.echo.arrived)
    reader = (*at.key("reader"), (name, "GET"))
    assert at.trusted.call("GET", READ, reader).status == 200
    refused = at.trusted.post(f"{V2}/experiments/create?_method=GET", reader, {"name": "no"})
    assert (refused.status, at.log([refused])[0]["method"]) == (403, "POST")


def test_methods_that_mlflow_does_not_have(at: Site, control: Control) -> None:
    read = READ.partition("?")[0]
    for method in ("PROPFIND", "LINK", "PURGE", "OPTIONS", "DELETE", "PUT", "PATCH"):
        answer = at.trusted.call(method, read, at.key("reader"))
        assert (answer.status, answer.json["error_code"]) == (403, "PERMISSION_DENIED"), method
    for method in ("get", "Get", "TRACE", "TRACK", "BREW"):
        assert at.trusted.call(method, READ, at.key("admin")).status == 501, method
    for method in ("DELETE.", "G-T", "A'|`~"):
        assert at.trusted.call(method, READ, at.key("admin")).status == 400, method
    assert arrived(control) == []
    at.trusted.call("HEAD", READ, at.key("reader"))  # which is as good as a GET, and MLflow's to answer
    assert arrived(control) == [("tracking", "HEAD", read)]
    assert at.trusted.call("HEAD", "/-/metrics", at.key("reader")).status == 403
    assert at.trusted.call("HEAD", "/-/metrics", at.key("admin")).status == 200
    at.echo.reset()
    assert at.trusted.call("PROPFIND", "/t/echo/x", at.key("admin")).status == 200
    assert at.echo.arrived[0].method == "PROPFIND"


# Forged tokens


def sealed_with(secret: bytes, header: dict[str, Any], claims: dict[str, Any], *, padded: bool) -> str:
    """A token by HMAC with a secret that joserfc is too careful to take: somebody's public key."""
    signed, *_ = seal(header, claims, OctKey.generate_key(), name="HS256", padded=padded).rpartition(".")
    mac = base64.urlsafe_b64encode(hmac.digest(secret, signed.encode(), "sha256")).decode()
    return f"{signed}.{mac if padded else mac.rstrip('=')}"


def forged_load_balancer(at: Site) -> dict[str, str]:
    places, mine = at.places, ECKey.generate_key("P-256")
    other_kid, other_key = places.publish(ECKey.generate_key("P-256"))
    public = pem(places.key)
    name, groups = "admin-by-load-balancer", ["admin"]
    good = at.shows("load balancer", "admin").headers[0][1]
    head, claims, _ = good.split(".")
    until = int(time.time()) + 3600
    header = {"typ": "JWT", "kid": places.kid, "signer": OTHER_LOAD_BALANCER, "exp": until}
    content = {"sub": name, "groups": groups, "exp": until}
    own = {**header, "signer": json.loads(base64.urlsafe_b64decode(head))["signer"]}
    return {
        "another load balancer of the region": places.data(
            name, groups, key=other_key, kid=other_kid, signer=OTHER_LOAD_BALANCER
        ),
        "no signer": places.data(name, groups, signer=""),
        "a list of signers": places.data(name, groups, signer=[own["signer"], OTHER_LOAD_BALANCER]),
        "a key of one's own": places.data(name, groups, mine),
        "a key of one's own within": places.data(name, groups, mine, jwk=mine.as_dict(private=False)),
        "a key elsewhere": places.data(name, groups, kid=f"../{places.kid}"),
        "another place of keys": places.data(name, groups, mine, jku=f"{places.url}/{other_kid}"),
        "no algorithm": seal({**own, "alg": "none"}, content, None, padded=True),
        "NONE": seal({**own, "alg": "NoNe"}, content, None, padded=True),
        "no signature": f"{head}.{claims}.",
        "a shared secret": sealed_with(public, {**own, "alg": "HS256"}, content, padded=True),
        "said to be ES256": sealed_with(public, {**own, "alg": "ES256"}, content, padded=True),
        "of RSA": seal({**own, "alg": "RS256"}, content, RSAKey.generate_key(2048), padded=True),
        "changed claims": f"{head}.{base64.urlsafe_b64encode(json.dumps(content | {'sub': 'root'}).encode()).decode()}."
        + good.split(".")[2],
        "over": places.data(name, groups, exp=int(time.time()) - 120),
        "without an end": places.data(name, groups, exp=None),
        "zeros": f"{head}.{claims}.{base64.urlsafe_b64encode(bytes(64)).decode()}",
    }


def test_forged_headers_of_the_load_balancer(at: Site) -> None:
    """Also while the proxy knows the one that they are made of."""
    good = at.shows("load balancer", "admin").headers
    assert try_it(at, *good) == 200
    for what, data in forged_load_balancer(at).items():
        assert try_it(at, ("X-Amzn-Oidc-Data", data)) == 401, what
    assert try_it(at, *good) == 200


def forged_tokens(at: Site) -> dict[str, str]:
    good = at.shows("token", "admin").headers[0][1].removeprefix("Bearer ")
    head, claims, signature = good.split(".")
    header, content = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in (head, claims))
    public = at.provider.public_key()
    mine = RSAKey.generate_key(2048)
    shared, as_jwk = pem(public), json.dumps(public.as_dict(private=False)).encode()
    return {
        "no algorithm": seal({**header, "alg": "none"}, content, None),
        "None": seal({**header, "alg": "None"}, content, None),
        "no signature": f"{head}.{claims}.",
        "the public key as a secret": sealed_with(shared, {**header, "alg": "HS256"}, content, padded=False),
        "the public key's JWK as a secret": sealed_with(as_jwk, {**header, "alg": "HS256"}, content, padded=False),
        "said to be RS256": sealed_with(shared, {**header, "alg": "RS256"}, content, padded=False),
        "a key of one's own": seal({**header, "alg": "RS256"}, content, mine),
        "a key of one's own within": seal(
            {**header, "alg": "RS256", "jwk": mine.as_dict(private=False)}, content, mine
        ),
        "a place of one's own": seal({**header, "alg": "RS256", "jku": f"{at.places.url}/jwks"}, content, mine),
        "another user": f"{head}.{_encoded({**content, 'sub': 'root'})}.{signature}",
        "another group": f"{head}.{_encoded({**content, 'groups': ['admin', 'root']})}.{signature}",
        "another service": at.provider.token("admin-by-token", {"groups": ["admin"]}, client="other"),
        "another issuer": at.provider.token("admin-by-token", {"groups": ["admin"]}, host="127.0.0.1"),
        "like a key": f"mlp_{good}",
        "a key's middle": f"{head}.mlp_aaaaaaaa_{'a' * 43}.{signature}",
        "encrypted": f"{good}.{head}.{claims}",
        "the load balancer's": at.places.data("admin-by-load-balancer", ["admin"]),
    }


def _encoded(claims: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()


def test_forged_tokens(at: Site) -> None:
    """Also while the proxy knows the one that they are made of."""
    good = at.shows("token", "admin").headers
    assert try_it(at, *good) == 200
    for what, token in forged_tokens(at).items():
        assert try_it(at, ("Authorization", f"Bearer {token}")) == 401, what
    assert try_it(at, *good) == 200
    assert try_it(at, ("X-API-Key", good[0][1].removeprefix("Bearer "))) == 401
    assert try_it(at, ("X-Amzn-Oidc-Data", good[0][1].removeprefix("Bearer "))) == 401
    assert try_it(at, ("Authorization", f"Basic {base64.b64encode(b'x:' + good[0][1][7:].encode()).decode()}")) == 401


def test_keys_that_are_almost_right(at: Site) -> None:
    """All of them get the very same answer, so that nobody learns which part was right."""
    good = at.keys["admin"]
    _, key_id, secret = good.split("_")
    almost = [
        *(good[:-1], good + "a", good.upper(), good.replace("mlp", "MLP"), f"mlp_{secret}", f"mlp__{secret}", ""),
        *(f"mlp_{key_id}_", f"mlp_zzzzzzzz_{secret}", at.keys["reader"][:13] + secret, f"{good}\t", "mlp_*", "null"),
        *(at.keys["expired"], at.keys["revoked"], f"mlp_{key_id}_{'a' * 43}", f"mlp_{key_id}_{secret[::-1]}"),
    ]
    seen = set()
    for key in almost:
        for way in WAYS[:3]:
            headers = key_headers(way, key)
            answer = at.trusted.call("GET", VERSION, (*headers, at.client()))
            if key == f"{good}\t" and way != "key as password":  # space around a header's value is no part of it
                assert answer.status == 200
                continue
            words = {name: value for name, value in answer.headers if name not in ("x-request-id", "date")}
            seen.add((answer.status, answer.json["message"], answer.json["error_code"], json.dumps(words)))
    assert [status for status, *_ in seen] == [401]
    assert len({message for _, message, *_ in seen}) == 1
    assert try_it(at, *key_headers(WAYS[0], good)) == 200


# Pages of other sites


BROWSERS_SEND = ["key as password", "load balancer", "certificate", "session"]


@pytest.mark.parametrize("way", BROWSERS_SEND)
@pytest.mark.parametrize("path", [f"/t/echo{V2}/runs/delete", "/-/ui/echo", "/t/echo/graphql"])
def test_a_page_of_another_site_changes_nothing(at: Site, way: str, path: str, control: Control) -> None:
    at.echo.reset()
    shown = at.shows(way, "admin").headers
    own = f"http://127.0.0.1:{at.proxy.port}"
    foreign: list[Pairs] = [
        (("Origin", "https://evil.example"),),
        (("Origin", "null"),),
        (("Origin", f"http://127.0.0.1:{at.proxy.port}.evil.example"),),
        (("Origin", "http://127.0.0.1"),),
        (("Origin", own), ("Origin", "https://evil.example")),
        (("Sec-Fetch-Site", "cross-site"),),
        (("Sec-Fetch-Site", "same-site"),),
        (("Sec-Fetch-Site", "cross-site"), ("Origin", own)),
        (("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")),
        (("Sec-Fetch-Site", ""),),
    ]
    for site_headers in foreign:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
            headers = (*shown, *site_headers, ("Content-Type", kind))
            answer = at.trusted.call("POST", path, headers, b'{"query": "{ __typename }", "run_id": "="}')
            assert answer.status == 403, site_headers
            assert "another site" in answer.json["message"]
    assert at.echo.arrived == []
    if path.startswith("/-/"):
        assert [each for each in control("GET", "requests")["requests"] if each["plane"] == "sagemaker"] == []
        path = "/-/ui/tracking"
    own_pages: list[Pairs] = [(), (("Origin", own),), (("Sec-Fetch-Site", "same-origin"),)]
    for site_headers in own_pages:
        answer = at.trusted.call("POST", path, (*shown, *site_headers, *JSON), b'{"query": "{ __typename }"}')
        assert answer.status == 200, answer.body


def test_a_link_is_not_made_by_the_way(at: Site, control: Control) -> None:
    """A page elsewhere may send people to a link, but not fetch one as its image, frame or script."""
    shown = at.shows("session", "admin").headers

    def links() -> int:
        return len([each for each in control("GET", "requests")["requests"] if each["plane"] == "sagemaker"])

    for site_name, purpose in itertools.product(
        ("cross-site", "same-site"), ("image", "iframe", "script", "empty", "")
    ):
        headers = (*shown, ("Sec-Fetch-Site", site_name), ("Sec-Fetch-Dest", purpose))
        assert at.trusted.call("GET", "/-/ui/tracking", headers).status == 403
    assert at.trusted.call("HEAD", "/-/ui/tracking", shown).status == 405
    assert links() == 0
    visit = (*shown, ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Dest", "document"), ("Sec-Fetch-Mode", "navigate"))
    answer = at.trusted.call("GET", "/-/ui/tracking", visit)
    assert (answer.status, links()) == (302, 1)
    at.secrets.add(urlsplit(answer.value("location")).query.partition("=")[2])


# Sessions


def test_a_session_from_before_the_sign_in(at: Site) -> None:
    """Fixation: who planted a cookie does not share the session that begins, and the planted one ends."""
    planted = at.cookie("reader")
    assert try_it(at, ("Cookie", planted)) == 200
    began = at.trusted.call("GET", "/-/sign-in", [("Cookie", planted)])
    state = began.value("set-cookie").partition(";")[0]
    assert (began.status, try_it(at, ("Cookie", planted))) == (302, 200)
    with requests.Session() as browser:
        browser.trust_env = False
        requests.put(f"{at.provider.issuer}/users/victim", json={"groups": ["reader"]}, timeout=30)
        form = browser.post(began.value("location"), data={"sub": "victim"}, allow_redirects=False, timeout=30)
    back = urlsplit(form.headers["location"])
    done = at.trusted.call("GET", f"{back.path}?{back.query}", [("Cookie", f"{planted}; {state}")])
    assert (done.status, done.value("location")) == (303, "../")
    (cookie,) = (c.partition(";")[0] for c in done.values("set-cookie") if c.startswith(f"{Sessions.COOKIE}="))
    at.secrets.update([cookie, state, back.query])
    assert cookie != planted
    assert try_it(at, ("Cookie", planted)) == 401
    mine = at.trusted.call("GET", READ, [("Cookie", cookie)])
    assert (mine.status, at.log([mine])[0]["caller"]) == (200, "user:victim")


def test_cookies_that_were_tossed(at: Site) -> None:
    mine, others = at.cookie("admin"), at.cookie("reader")
    name, _, value = mine.partition("=")
    assert try_it(at, ("Cookie", mine)) == 200
    assert try_it(at, ("Cookie", f"a=b; {mine}; c=d")) == 200
    tossed = [
        *(f"{mine}; {others}", f"{others}; {mine}", f"{mine}; {name}=", f"{name}=; {mine}"),
        *(f"{name.lower()}={value}", f"{name.removeprefix('__Host-')}={value}", f"__Secure-{name[7:]}={value}"),
        *(f'{name}="{value}"', f"{name}={value}=", f"{name}={value}.", f"{name}={value[:-1]}", f"{name}%3D{value}"),
    ]
    for cookies in tossed:
        assert try_it(at, ("Cookie", cookies)) == 401, cookies[:60]
    assert try_it(at, ("Cookie", mine), ("Cookie", others)) == 401


def test_cookies_that_somebody_else_sealed(at: Site) -> None:
    who = Caller("user:admin-by-session", "session", frozenset({"admin"}), credential=Sessions.new_id())
    options = at.oidc
    sealed = {
        "another secret": Sessions(options, SECRET[::-1]).begin(who),
        "another client": Sessions(options.model_copy(update={"client_id": "other"}), SECRET).begin(who),
        "another provider": Sessions(options.model_copy(update={"issuer": "https://evil.example"}), SECRET).begin(who),
        "other claims": Sessions(options.model_copy(update={"user_claim": "nickname"}), SECRET).begin(who),
        "tomorrow": Sessions(options, SECRET, clock=lambda: time.time() + 86400).begin(who),
        "yesterday": Sessions(options, SECRET, clock=lambda: time.time() - 86400).begin(who),
        "another cookie": f"{Sessions.COOKIE}="
        + at.sessions.seal_for("__Host-mlflow-proxy-signin").seal(json.dumps(["x", "user:a", [], 1, 1]).encode()),
        "no context": f"{Sessions.COOKIE}=" + Seal(SECRET, Sessions.COOKIE, "").seal(b'["x","user:a",["admin"],1,1]'),
    }
    for what, cookie in sealed.items():
        assert try_it(at, ("Cookie", cookie.partition(";")[0])) == 401, what
    assert try_it(at, ("Cookie", at.sessions.begin(who).partition(";")[0])) == 200


# Guessing


def guess(at: Site, address: str, client: str = "") -> Answer:
    forwarded = (("X-Forwarded-For", client),) if client else ()
    with_wrong = ("X-API-Key", f"mlp_aaaaaaaa_{'a' * 43}")
    peer = at.trusted if address == "127.0.0.1" else at.peer(address)
    return peer.call("GET", VERSION, (with_wrong, *forwarded))


def test_guessing_through_the_load_balancer(at: Site) -> None:
    """Counted for the client behind it, whatever that wrote into X-Forwarded-For itself; never for all the others.

    Who shows what is right is known there, too: it may be one of many at a NAT's address.
    """
    client, other = at.client()[1], at.client()[1]
    right = at.key("reader")

    def status(name: str) -> int:
        return at.trusted.call("GET", VERSION, (*right, ("X-Forwarded-For", name))).status

    assert status(client) == 200
    for n in range(FAILURE_RATE):
        assert guess(at, "127.0.0.1", f"192.0.2.{n}, {client}").status == 401
    refused = guess(at, "127.0.0.1", client)
    assert (refused.status, refused.json["error_code"]) == (429, "REQUEST_LIMIT_EXCEEDED")
    assert int(refused.value("retry-after")) >= 1
    for name in (f"192.0.2.99, {client}", f"{other}, {client}"):
        assert guess(at, "127.0.0.1", name).status == 429
    assert (status(client), status(other), status(f"{client}, {other}")) == (200, 200, 200)
    assert guess(at, "127.0.0.1", f"{client}, {other}").status == 401
    assert at.trusted.call("GET", VERSION, right).status == 200
    assert at.log([refused])[0]["client"] == client
    assert at.audited([refused])[0]["event"] == "denied"


def test_guessing_from_elsewhere(at: Site) -> None:
    """Who is no load balancer has one address, whatever X-Forwarded-For says."""
    mine, another = next(_strangers), next(_strangers)
    right = at.key("reader")
    for n in range(FAILURE_RATE):
        assert guess(at, mine, f"192.0.2.{n}").status == 401
    assert guess(at, mine, "192.0.2.200").status == 429
    assert at.peer(mine).call("GET", READ, right).status == 200
    assert guess(at, mine).status == 429
    assert at.peer(another).call("GET", VERSION, right).status == 200
    assert try_it(at, *right) == 200
    # The client that was named is not the one that failed.
    assert at.trusted.call("GET", VERSION, (*right, ("X-Forwarded-For", "192.0.2.200"))).status == 200


@pytest.mark.parametrize("way", WAYS)
def test_every_way_counts_as_guessing(at: Site, way: str) -> None:
    client = at.client()[1]
    wrong = {
        "token": ("Authorization", "Bearer x.y.z"),
        "load balancer": ("X-Amzn-Oidc-Data", "x.y.z"),
        "certificate": (SUBJECT_HEADER, "CN=admin,O=Example"),
        "session": ("Cookie", f"{Sessions.COOKIE}=x"),
    }
    headers = (wrong[way],) if way in wrong else key_headers(way, f"mlp_aaaaaaaa_{'a' * 43}")
    statuses = [
        at.trusted.call("GET", VERSION, (*headers, ("X-Forwarded-For", client))).status for _ in range(FAILURE_RATE + 2)
    ]
    last = at.trusted.call("GET", VERSION, (*at.key("reader"), ("X-Forwarded-For", client))).status
    assert last == 200
    if way == "session":  # one that is over is everyday's; and nobody guesses AES-GCM
        assert set(statuses) == {401}
    else:
        assert statuses == [401] * FAILURE_RATE + [429] * 2


def test_asking_without_anything_is_no_guess(at: Site) -> None:
    client = at.client()
    assert {at.trusted.call("GET", VERSION, [client]).status for _ in range(3 * FAILURE_RATE)} == {401}
    assert at.trusted.call("GET", VERSION, (*at.key("reader"), client)).status == 200


# Paths


def spelled(text: str, **names: str) -> list[str]:
    """The words of a text, with `$name` for what is given."""
    return [Template(word).substitute(names) for word in text.split()]


DELETE = f"{V2}/runs/delete"
# Ways to write the path that deletes a run, of which some mean it, some don't, and some are wrong.
SPELLINGS = """
    $v/runs//delete  $v//runs/delete  /$d  $v/runs/./delete  $v/./runs/delete  $v/runs/%2e/delete  $v/runs/%2E/delete
    $v/x/../runs/delete  $v/x/%2e%2e/runs/delete  $v/x/.%2e/runs/delete  $v/x/%2E./runs/delete  /..$d
    $v/runs/search/../delete  $v/runs%2Fdelete  $v/runs%2fdelete  ${v}%2Fruns/delete  /%2F$d  $v/runs%5Cdelete
    $v/runs\\delete  /API/2.0/mlflow/runs/delete  $v/Runs/Delete  $v/runs/DELETE  $d/  $d//  $d/.  $d/%2e  $d;  $d;x=y
    $v;/runs/delete  $v/runs;/delete  $d%3B  $v/runs/%64elete  $v/%72uns/delete  /%61pi/2.0/mlflow/runs/delete
    $d%20  $d%00  $d%0a  $d%09  $d%7f  $d%3F  $d%23  $d%3fx=y  $d.  $d.json  $d*  $d~
    $v/runs/%2564elete  $v/runs%252Fdelete  $v/x/%252e%252e/runs/delete  $v/runs/%u0064elete  $v/runs%C0%AFdelete
    $v/runs/%C1%A4elete  $v/x/%C0%AE%C0%AE/runs/delete  $v/runs%E0%80%AFdelete  $v/runs/%EF%BD%84elete
    $v/runs%EF%BC%8Fdelete  $v/runs/delet%C3%A9  $v/runs/%zz/delete
    $d?_method=GET  $d?  $d?/experiments/search  $d#  $d?;  /-/..$d  /-/../$d  /%2d/%2e%2e$d  /-$d  /index.html$d
    /ajax-api/2.0/mlflow/runs/delete  /api/2.0/preview/mlflow/runs/delete  /api/3.0/mlflow/runs/delete
    /ajax-api/2.0/preview/mlflow/runs/delete  /ajax-api/3.0/mlflow/runs/delete  /api/2.0//mlflow/runs/delete
    /static-files/..$d  /static-files/..%2f$d  /static-files/%2e%2e$d  /gateway/proxy/x/..%2F..%2F..%2F$d
    /api/2.0/mlflow-artifacts/artifacts/..%2F..%2F..%2Fmlflow%2Fruns%2Fdelete
    /api/2.0/mlflow-artifacts/artifacts/%2E%2E/%2E%2E/mlflow/runs/delete
    /api/3.0/mlflow/mcp-servers/..%2F..%2F..%2F2.0%2Fmlflow%2Fruns%2Fdelete
"""
# The same for what stands before it.
PREFIXES = """
    $t  /$t  /t//$n  /%74/$n  /t/%$x  /t/x/../$n  $t$t  /t/app/../$n  /T/$n  $t;  $t/.  $t%2F  $t%2F..  /t/echo/..%2F$n
    $t/../$n  $t/%2e%2e/$n  $t/t/echo/..  /t/./$n  /./t/$n  /t%2F$n
"""
# These say where they go themselves.
ABSOLUTE = [f"http://127.0.0.1{DELETE}", f"//127.0.0.1{DELETE}", f"http://127.0.0.1/x/..{DELETE}"]


@pytest.mark.parametrize("target", ["tracking", "app"])
@pytest.mark.parametrize("role", ["reader", "careful"])
def test_no_spelling_deletes_a_run(at: Site, role: str, target: str) -> None:
    """A reader may not; and one who may do everything but that gets no further by what the proxy does not know."""
    run = make_run(at.sagemaker, target)
    named = f"/t/{target}"
    hexed = f"{ord(target[0]):x}{target[1:]}"
    paths = [named + path for path in spelled(SPELLINGS, v=V2, d=DELETE)]
    paths += [prefix + DELETE for prefix in spelled(PREFIXES, t=named, n=target, x=hexed)]
    paths += [*spelled(SPELLINGS, v=V2, d=DELETE), *ABSOLUTE] if target == "tracking" else []
    served = []
    for path in paths:
        answer = at.trusted.post(path, at.key(role), {"run_id": run})
        if answer.status not in (400, 403, 404, 405):
            served.append((path, answer.status))
    assert served == []
    assert stage_of(at, target, run) == "active"
    assert at.trusted.post(named + DELETE, at.key("writer"), {"run_id": run}).status == 200
    assert stage_of(at, target, run) == "deleted"


def stage_of(at: Site, target: str, run: str) -> str:
    return str(straight(at.sagemaker, target, "runs/get", {"run_id": run})["run"]["info"]["lifecycle_stage"])


def test_no_spelling_leads_to_another_target(at: Site, control: Control) -> None:
    """A guest may read in the App alone."""
    guest = at.key("guest")
    tries = spelled(
        """
        $r  /t/tracking$r  //t/tracking$r  /t//tracking$r  /t/%74racking$r  /t/app/../tracking$r
        /t/app/%2e%2e/tracking$r
        /t/app/t/tracking$r  /t/app//t/tracking$r  /t/app/../..$r  /t/tracking/t/app$r  /t/app%2F..%2Ftracking$r
        /t/tracking/../app$r  /T/app$r  /t/APP$r  /t/app;$r  /t/app;/../tracking$r  /%2ft/app$r  /t/app%00$r
        /t/app%20$r
        /t/app.$r  /t$r  /t/$r  /t/-$r  /t/*$r  /t/echo$r  /t/app/..$r  /app$r  /t/app?/../tracking$r
        """,
        r=READ,
    )
    for path in tries:
        for name, value in (("X-MLflow-SM-Tracking-Server-ARN", at.sagemaker.tracking_arn), ("X-Target", "tracking")):
            assert at.trusted.call("GET", path, (*guest, (name, value))).status in (308, 400, 403, 404), path
    assert arrived(control) == []
    assert at.trusted.call("GET", f"/t/app{READ}", guest).status == 200
    assert at.trusted.call("GET", f"//t//%61pp{READ}", guest).status == 200
    assert at.trusted.call("GET", f"/t/tracking{READ}", at.key("reader")).status == 200
    assert [target for target, *_ in arrived(control)] == ["app", "app", "tracking"]


@pytest.mark.parametrize("page", ["metrics", "ready"])
def test_no_spelling_opens_an_own_page(at: Site, page: str, control: Control) -> None:
    tries = spelled(
        """
        /-/$p  //-/$p  /-//$p  /-///$p  /%2d/$p  /%2D/$p  /-/$p/  /./-/$p  /-/./$p  /-/x/../$p  /-/%2e/$p  /-%2F$p
        /t/app/../../-/$p  /-/%$x  /-/$u  /-/$p;x  /-/$p%20  /-/$p?x  /-/$p%00  /-/$p%3f  /-/health/../$p  /-/health/$p
        /-/sign-in/../$p  /-/sign-in/$p  /-/ui/../$p  /-/ui/%2e%2e/$p  /t/app/-/$p  /%252d/$p  /-/version/../$p  /-\\$p
        /~/$p  /-%20/$p  /-/sign-in;/$p  /-/sign-in%2F..%2F$p
        """,
        p=page,
        x=f"{ord(page[0]):x}{page[1:]}",
        u=page.upper(),
    )
    for path in tries:
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            for headers, expected in ((at.key("guest"), (400, 403, 404)), ((), (400, 401))):
                answer = at.trusted.call(method, path, (*headers, at.client()))
                assert answer.status in expected, (method, path)
                assert b"mlflow_proxy_" not in answer.body
                assert b'"targets"' not in answer.body
    assert arrived(control) == []
    for path in (f"/-/{page}", f"//-/{page}", f"/%2d/{page}"):
        assert at.trusted.call("GET", path, at.key("admin")).status == 200


def test_what_could_mean_two_paths_goes_nowhere(at: Site) -> None:
    """Not even for one who may do everything: what is in front of MLflow might read it differently."""
    at.echo.reset()
    artifacts = f"{V2.replace('/mlflow', '/mlflow-artifacts')}/artifacts"
    doubtful = spelled(
        """
        /a/../b  /a/./b  /..  /.  /a/..  /a/%2e%2e/b  /a/%2E%2E  /a/.%2e/b  /a/%2e./b  /a/%2e/b  /a%2Fb  /a%2f..%2fb
        /a%5Cb
        /a\\b  /a%00  /a%0d%0ab  /a%1f  /a%7f  /a%C0%AFb  /a%C0%AE%C0%AE/b  /a%E0%80%AFb  /a%FF  /a%zz  /a%  /a%2
        /a%u002e
        $x/..%2Fb  $x/%2e%2e%2Fb  $x/a%2F..%2F..%2Fb  $x/a%2F.%2Fb  $x/%2E%2E/b  $x/a%5C..%5Cb
        """,
        x=artifacts,
    )
    for path in doubtful:
        assert at.trusted.call("GET", f"/t/echo{path}", at.key("admin")).status == 400, path
    assert at.echo.arrived == []
    plain = {
        "//a///b": "/a/b",
        "/%61/b": "/a/b",
        "/a%2E": "/a.",
        "/a..b": "/a..b",
        "/a%252e": "/a%252e",
        "/...": "/...",
    }
    plain |= {f"{artifacts}/a%2fb": f"{artifacts}/a%2Fb", "/a%7Eb": "/a~b", "/a|b": "/a%7Cb", "/%C3%A9": "/%C3%A9"}
    for path in plain:
        assert at.trusted.call("GET", f"/t/echo{path}", at.key("admin")).status == 200, path
    assert at.echo.targets == list(plain.values())


# GraphQL


EXPERIMENT = '{ mlflowGetExperiment(input: {experimentId: "0"}) { experiment { name } } }'
VERSIONS = "mlflowSearchModelVersions(input: {filter: \"name='x'\"}) { modelVersions { name } }"


def graphql_tries() -> dict[str, tuple[int, bytes, Pairs]]:
    """For one to whom SearchModelVersions is denied: what to send, and what it is answered with."""

    def asks(document: str, **more: Any) -> tuple[int, bytes, Pairs]:
        return 403, json.dumps({"query": document, **more}).encode(), JSON

    plain = json.dumps({"query": f"{{ {VERSIONS} }}"})
    good = json.dumps(EXPERIMENT)
    return {
        "plainly": (403, plain.encode(), JSON),
        "beside another": asks(EXPERIMENT.removesuffix(" }") + f" {VERSIONS} }}"),
        "by an alias": asks(f"{{ mlflowGetExperiment: {VERSIONS} }}"),
        "in a fragment": asks(f"{{ ...F }} fragment F on Query {{ {VERSIONS} }}"),
        "in a fragment of a fragment": asks(
            f"{{ ...A }} fragment A on Query {{ ...B }} fragment B on Query {{ {VERSIONS} }}"
        ),
        "inline": asks(f"{{ ... on Query {{ {VERSIONS} }} }}"),
        "in the other operation": asks(f"query A {EXPERIMENT} query B {{ {VERSIONS} }}", operationName="B"),
        "in an operation not meant": asks(f"query A {EXPERIMENT} query B {{ {VERSIONS} }}", operationName="A"),
        "as a mutation": asks(f"mutation {{ {VERSIONS} }}"),
        "skipped for now": asks(f"query($s: Boolean!) {{ {VERSIONS.replace(') {', ') @skip(if: $s) {', 1)} }}"),
        "below a run": asks('{ mlflowGetRun(input: {runId: "x"}) { run { modelVersions { name } } } }'),
        "with an escaped key": (403, plain.replace("query", "quer\\u0079").encode(), JSON),
        "in a batch": (400, f"[{plain}]".encode(), JSON),
        "in a batch after another": (400, f'[{{"query": {good}}}, {plain}]'.encode(), JSON),
        "under a doubled key": (400, f'{{"query": {good}, {plain[1:]}'.encode(), JSON),
        "under the first of two": (400, f'{plain[:-1]}, "query": {good}}}'.encode(), JSON),
        "two documents": (400, f'{{"query": {good}}}{plain}'.encode(), JSON),
        "in UTF-16": (400, plain.encode("utf-16"), JSON),
        "in UTF-16 without saying so": (400, plain.encode("utf-16-le"), JSON),
        "with a BOM": (400, plain.encode("utf-8-sig"), JSON),
        "as text": (400, plain.encode(), (("Content-Type", "text/plain"),)),
        "as a form": (400, b"query=%7B" + VERSIONS.encode(), (("Content-Type", "application/x-www-form-urlencoded"),)),
        "as GraphQL": (400, f"{{ {VERSIONS} }}".encode(), (("Content-Type", "application/graphql"),)),
        "as nothing": (400, plain.encode(), ()),
        "as JSON with something behind": (403, plain.encode(), (("Content-Type", "application/JSON; charset=utf-16"),)),
        "not used": (400, json.dumps({"query": f"{EXPERIMENT} fragment F on Query {{ {VERSIONS} }}"}).encode(), JSON),
        "as an extension": (400, json.dumps({"extensions": {"persistedQuery": {"version": 1}}}).encode(), JSON),
        "nothing at all": (400, b"", JSON),
    }


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_graphql_by_the_back_door(at: Site, method: str, control: Control) -> None:
    careful = at.key("careful")
    for prefix, (what, (status, body, kind)) in itertools.product(("", "/t/app"), graphql_tries().items()):
        answer = at.trusted.call(method, f"{prefix}/graphql", (*careful, *kind), body)
        assert answer.status == status, (what, answer.body)
    good = json.dumps({"query": EXPERIMENT}).encode()
    query = "query=%7B+mlflowSearchModelVersions+%7D"
    assert at.trusted.call(method, f"/graphql?{query}", (*careful, *JSON), good).status == 400
    assert arrived(control) == []
    for path in ("/graphql/", "/GraphQL", "/graphql;x", "/graphql%20", "/ajax-api/2.0/mlflow/graphql", "/api/graphql"):
        answer = at.trusted.call(method, path, (*careful, *JSON), json.dumps({"query": f"{{ {VERSIONS} }}"}).encode())
        assert answer.status >= 400, path
    control("DELETE", "requests")
    assert at.trusted.post("/graphql", careful, {"query": EXPERIMENT}).json["data"]["mlflowGetExperiment"]
    assert at.trusted.post("/graphql", at.key("reader"), {"query": f"{{ {VERSIONS} }}"}).json["errors"] is None
    assert arrived(control) == [("tracking", "POST", "/graphql")] * 2


def test_graphql_within_mlflows_own_bounds(at: Site, sagemaker: LocalSageMaker) -> None:
    """Ten runs with a hundred fields each reach MLflow; what it would refuse for its size is refused here."""
    run = make_run(sagemaker, "tracking")

    def compare(number: int, fields: int) -> Answer:
        asked = f"run {{ info {{ runId {'status ' * (fields - 4)} }} }}"
        roots = " ".join(f'r{at}: mlflowGetRun(input: {{runId: "{run}"}}) {{ {asked} }}' for at in range(number))
        return at.trusted.post("/graphql", at.key("reader"), {"query": f"query Compare {{ {roots} }}"})

    answered = compare(10, 100)
    assert (answered.status, answered.json["errors"]) == (200, None)
    assert [root["run"]["info"]["runId"] for root in answered.json["data"].values()] == [run] * 10
    refused = compare(11, 10)
    assert refused.status == 400
    assert "10 root fields" in refused.json["message"]


# What strangers and guests learn


def test_own_pages_are_not_for_strangers(at: Site) -> None:
    for path in ("/-/", "/-/ready", "/-/metrics", "/-/version", "/-/ui/tracking", "/-/ui/none", "/-/none", "/-/ui/"):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
            assert try_it(at, path=path, method=method) == 401, (method, path)
    assert try_it(at, path="/-/health") == 200
    assert try_it(at, path="/-/sign-in") == 302
    assert try_it(at, path="/-/sign-out") == 200
    statuses = {path: try_it(at, *at.key("admin"), path=path) for path in ("/-/", "/-/ready", "/-/metrics", VERSION)}
    assert set(statuses.values()) == {200}


def test_only_what_one_may_see_is_named(at: Site) -> None:
    def named(role: str, path: str) -> tuple[int, set[str]]:
        answer = at.trusted.call("GET", path, at.key(role))
        return answer.status, set(re.findall(r"tracking|echo|\bapp\b", answer.body.decode()))

    assert named("guest", "/t/none/x") == (404, {"app"})
    assert named("guest", "/t") == (404, {"app"})
    assert named("guest", "/-/ui/none")[1] <= {"app"}
    assert named("nobody", "/t/none/x") == (404, set())
    assert named("admin", "/t/none/x") == (404, {"app", "echo", "tracking"})
    page = at.trusted.call("GET", "/-/", at.key("guest")).body.decode()
    assert "/t/app" in page
    assert "echo" not in page
    assert at.sagemaker.tracking_arn not in page
    strangers = {at.trusted.call("GET", path).json["message"] for path in ("/t/none/x", "/t/app/x", "/t/echo", "/x")}
    assert len(strangers) == 1


# Exhaustion


def test_denied_requests_count_in_the_callers_rate(at: Site) -> None:
    """Each is a line of the audit log, which must not be filled by one caller."""
    somebody = ((SUBJECT_HEADER, "CN=flood"), (VERIFY_HEADER, "SUCCESS"))
    statuses = [at.trusted.call("GET", READ, somebody).status for _ in range(CALLER_RATE + 3)]
    assert (statuses[0], statuses[-1]) == (403, 429)
    assert at.trusted.call("GET", READ, at.key("reader")).status == 200


def test_the_body_of_a_graphql_request_is_bounded_while_it_is_read(at: Site) -> None:
    """It is read before the caller is known to be allowed anything, unlike all other bodies."""
    document = json.dumps({"query": EXPERIMENT, "variables": {"x": "x" * (1 << 20)}}).encode()
    answers = [at.trusted.call("POST", "/graphql", (*at.key(role), *JSON), document) for role in ("nobody", "admin")]
    assert [answer.status // 100 for answer in answers] == [4, 4]
    assert {line["bytes_in"] for line in at.log(answers)} == {0}
    assert at.trusted.post("/graphql", at.key("admin"), {"query": EXPERIMENT}).status == 200


def test_who_is_refused_while_sending_hears_it(at: Site) -> None:
    """A body on its way must not cost the answer, nor the connection without a word."""
    body = b"x" * 100_000
    for key, status in ((at.keys["reader"], 403), (f"mlp_aaaaaaaa_{'a' * 43}", 401)):
        headers = [f"X-API-Key: {key}", f"X-Forwarded-For: {at.client()[1]}"]
        for _ in range(FAILURE_RATE):
            with callers.Caller(at.proxy.port) as caller:
                whole = request(DELETE, "POST", *headers, body=body)
                caller.send(whole[: -len(body)])
                time.sleep(0.005)
                caller.send(body)
                refused = caller.answer("POST")
                assert refused.status == status
                if "close" not in refused.values("connection"):
                    caller.send(request("/-/health"))
                    assert caller.answer().status == 200


# The record


def test_who_was_refused_at_once_is_the_client_too(at: Site) -> None:
    """Not the load balancer, which is in front of everybody."""
    client = ("X-Forwarded-For", "10.1.2.3")
    read = at.trusted.call("GET", READ, (*at.key("admin"), client))
    refused = at.trusted.call("GET", "/x/../y", (*at.key("admin"), client))
    assert (read.status, refused.status) == (200, 400)
    assert [line["client"] for line in at.log([read, refused])] == ["10.1.2.3"] * 2


NASTY = [
    'x", "role": "admin", "y": "',
    'x\\", "caller": "root',
    "x\\u001b[31m",
    "<script>alert(1)</script>",
    "key:admin",
    "cert:CN=admin,O=Example",
    "größe 🙂",
    "{time} {status} %s %(caller)s ${jndi:ldap://x}",
]
BROKEN = ["x\nforged", "x\r\nforged", "x\x1b[31mred", "x\u2028y", "x\u202eevil", "x\x00y", "\x9b31m", " x", ""]


def test_names_cannot_write_into_the_record(at: Site) -> None:
    """Each line is one JSON object, with the fields that the proxy knows to be true."""
    for name in NASTY:
        data = at.places.data(name, ["reader"])
        answers = [
            at.trusted.call("GET", READ, [("X-Amzn-Oidc-Data", data)]),
            at.trusted.post(DELETE, [("X-Amzn-Oidc-Data", data)], {"run_id": 'x", "event": "write'}),
        ]
        assert [answer.status for answer in answers] == [200, 403], name
        for line, answer in zip(at.log(answers), answers, strict=True):
            fields = (line["caller"], line["target"], line["status"], line["method"])
            assert fields == (f"user:{name}", "tracking", answer.status, "GET" if answer.status == 200 else "POST")
        audited = at.audited(answers[1:])[0]
        assert (audited["caller"], audited["event"], audited["role"]) == (f"user:{name}", "denied", "")
    for name in BROKEN:
        data = at.places.data(name, ["reader"])
        answer = at.trusted.call("GET", READ, [("X-Amzn-Oidc-Data", data), at.client()])
        assert answer.status == 401, name
        assert at.log([answer])[0]["caller"] == at.audited([answer])[0]["caller"] == ""


def test_requests_cannot_write_into_the_record(at: Site) -> None:
    """Nor can what a request is made of: its id, path, query, method, addresses, agent, and body."""
    quote = 'x", "caller": "forged", "z": "'
    admin = at.key("admin")
    texts = [quote, "\x1b[2J\x1b[31mforged", "forged\tx", "{forged}", "%0aforged", "\u009bforged", "x'--"]
    answers = []
    for text, name in itertools.product(
        texts, ("User-Agent", "X-Request-Id", "Referer", "X-Forwarded-For", "Traceparent")
    ):
        answers.append(at.trusted.call("GET", READ, (*admin, (name, text))))
    paths = [
        *("/-/forged%22", "/-/ui/%22forged"),
        *('/x",%22caller%22:%22forged', "/x%22%7D%5Cforged", "/x%C2%9Bforged", "/x%E2%80%A8forged", "/x%1bforged"),
        *(
            "/x%0Aforged",
            f"{READ}&x=%0A%22forged",
            "/t/%22forged/x",
            f"/{'forged/' * 60}",
            "/-/forged%22",
            "/-/ui/%22forged",
        ),
    ]
    for path in paths:
        answers += [
            at.trusted.call("GET", path, admin),
            at.trusted.post(path, admin, {"run_id": quote, quote: "forged"}),
        ]
    answers.append(at.trusted.call("FORGED", "/x", admin))
    answers.append(at.trusted.call("A'|`~", "/x", admin))
    whole = b"GET /-/version HTTP/1.1\r\nHost: localhost\r\nX-API-Key: " + at.keys["admin"].encode()
    for more in (b"X-Request-Id: forged-id\r\n forged", b"X-Request-Id: forged-id\rforged: x", b"X-A: \x00forged"):
        assert call_raw(at.proxy.port, whole + b"\r\n" + more + b"\r\n\r\n").status == 400
    lines = at.log(answers)
    assert {line["caller"] for line in lines if line["status"] != 400 and line["status"] != 501} == {"key:admin"}
    assert {line["role"] for line in lines if line["status"] in (200, 404)} <= {"admin", ""}
    for answer, line in zip(answers, lines, strict=True):
        assert (line["status"], line["client"]) == (answer.status, "127.0.0.1")
        assert set(line) - {"error"} == FIELDS
        assert "forged-id" not in line["request_id"]
    check_lines(at)
    assert '"forged"' not in at.proxy.stdout.read_text()


FIELDS = {
    *("time", "request_id", "client", "caller", "role", "target", "action", "method", "route", "status", "bytes_in"),
    *("bytes_out", "duration_ms", "upstream_ms", "upstream_request_id", "retries", "limit"),
}


def check_lines(at: Site) -> None:
    """Every line of both records is JSON in plain ASCII, with no name twice; the program's own log has no controls."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    for path in (at.proxy.stdout, at.audit):
        text = path.read_bytes()
        assert text.endswith(b"\n")
        assert not re.search(rb"[^\n\x20-\x7e]", text)
        for line in text.splitlines():
            assert isinstance(json.loads(line, object_pairs_hook=once), dict)
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", at.proxy.stderr.read_bytes())


def test_no_secret_in_any_record(at: Site) -> None:
    """Not one of all that was shown above, right or wrong; and not in an answer that refuses it."""
    refused = [
        *key_headers(WAYS[0], at.keys["revoked"]),
        *key_headers(WAYS[1], at.keys["expired"]),
        ("Authorization", f"Basic {base64.b64encode(b'alice:a-password-of-a-person').decode()}"),
        ("Authorization", "Basic not-base64-but-a-password"),
        ("Authorization", "Digest username=alice, response=a-digest-response"),
        ("Authorization", "a-password-without-a-scheme"),
        ("X-API-Key", "a-key-of-another-service"),
    ]
    for header in refused:
        answer = at.trusted.call("GET", f"{VERSION}?token=a-token-in-a-query", [header, at.client()])
        assert answer.status == 401
        assert header[1].split()[-1].encode() not in answer.body
    for way in WAYS:
        assert try_it(at, *at.shows(way, "admin").headers, path="/x?token=a-token-in-a-query") == 404
    at.log([at.trusted.call("GET", VERSION, at.key("admin"))])
    written = b"".join(path.read_bytes() for path in (at.proxy.stdout, at.proxy.stderr, at.audit)).decode()
    secrets = {text for shown in at.secrets for text in pieces_of(shown)} | {
        *("a-password-of-a-person", "a-digest-response", "a-token-in-a-query", SECRET.decode("latin-1")),
        *(key.rpartition("_")[2] for key in at.keys.values()),
        at.sagemaker.environment()["AWS_SECRET_ACCESS_KEY"],
    }
    assert len(secrets) > 100
    assert {secret for secret in secrets if secret in written} == set()
    assert (
        at.keys["admin"].split("_")[1] in written
    )  # a key's id is no secret, and tells that this looks at the right place


def pieces_of(shown: str) -> Iterator[str]:
    """What is secret in a header's value: all parts but scheme, names, and what is too short to be found by chance."""
    for part in re.split(r"[ ;,.=]+|mlp_[a-z0-9]{8}_", shown):
        if len(part) >= 20 and not part.startswith(("CN", "Credential", Sessions.COOKIE)):
            yield part
