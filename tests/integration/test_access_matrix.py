"""Who may do what: every way of identifying, with every role, on both modes, for every kind of action.

What is expected stands in the tables here and nowhere else. The local SageMaker is behind the proxy: its journal says
as which role session each request arrived, and its permissions count, too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from tests.faults.callers import Answer
from tests.integration.access import (
    CALLER_RATE,
    OTHER_LOAD_BALANCER,
    ROLE_RATE,
    ROLES,
    STRANGER,
    SUBJECT_HEADER,
    VERIFY_HEADER,
    WAYS,
    Pairs,
    Peer,
    Site,
    key_headers,
    make_run,
    site,
)
from tests.integration.conftest import Control

from mlflow_proxy.local import LocalSageMaker

Runs = dict[str, dict[str, str]]
Tags = tuple[tuple[str, str], ...]


class Ask(NamedTuple):
    """A request of some kind. `status` is MLflow's answer to it, once it gets there; `event` what the audit log has."""

    method: str
    path: str
    action: str
    data: Any = None
    status: int = 200
    event: str = ""


_V2, _AJAX = "/api/2.0/mlflow", "/ajax-api/2.0/mlflow"
_TAG = {"experiment_id": "0", "key": "matrix", "value": "yes"}
_EXPERIMENT = {"query": '{ mlflowGetExperiment(input: {experimentId: "0"}) { experiment { name } } }'}
_VERSIONS = {"query": "{ mlflowSearchModelVersions(input: {filter: \"name='x'\"}) { modelVersions { name } } }"}

# Below a target; $run and $other are runs of it.
ASKS = {
    "read": Ask("GET", f"{_V2}/experiments/get?experiment_id=0", "GetExperiment"),
    "list": Ask("GET", f"{_V2}/artifacts/list?run_id=$run", "ListArtifacts"),
    "search": Ask("POST", f"{_V2}/experiments/search", "SearchExperiments", {"max_results": 1}),
    "write": Ask("POST", f"{_V2}/experiments/set-experiment-tag", "SetExperimentTag", _TAG, event="write"),
    "delete": Ask("POST", f"{_V2}/runs/delete", "DeleteRun", {"run_id": "$other"}, event="write"),
    "page": Ask("GET", "/", "AccessUI"),
    "unknown": Ask("GET", f"{_V2}/matrix", f"Unknown:GET {_V2}/matrix", status=404, event="write"),
    "unknown write": Ask("POST", f"{_V2}/matrix", f"Unknown:POST {_V2}/matrix", {}, status=404, event="write"),
    "graphql": Ask("POST", "/graphql", "GetExperiment", _EXPERIMENT),
    "graphql versions": Ask("POST", "/graphql", "SearchModelVersions", _VERSIONS),
    "graphql unknown": Ask("POST", "/graphql", "Unknown:POST /graphql x", {"query": "{ x }"}, event="write"),
    "ajax read": Ask("GET", f"{_AJAX}/experiments/get?experiment_id=0", "GetExperiment"),
    "ajax search": Ask("POST", f"{_AJAX}/experiments/search", "SearchExperiments", {"max_results": 1}),
    "ajax write": Ask("POST", f"{_AJAX}/experiments/set-experiment-tag", "SetExperimentTag", _TAG, event="write"),
}
LINKS = {
    "tracking": Ask("POST", "/-/ui/tracking", "CreatePresignedMlflowTrackingServerUrl", event="link"),
    "app": Ask("POST", "/-/ui/app", "CreatePresignedMlflowAppUrl", event="link"),
}
# The proxy's own, of no target.
OWN = {
    "ready": Ask("GET", "/-/ready", "proxy:GetReadiness"),
    "metrics": Ask("GET", "/-/metrics", "proxy:GetMetrics"),
    "version": Ask("GET", "/-/version", ""),
    "whoami": Ask("GET", "/-/whoami", ""),
}

_READING = {"read", "list", "search", "page", "graphql", "graphql versions", "ajax read", "ajax search"}
_WRITING = {"write", "delete", "ajax write"}
_UNKNOWN = {"unknown", "unknown write", "graphql unknown"}
_SOME: dict[str, set[str]] = {"tracking": set(), "app": set(), "own": {"version", "whoami"}}

# What each role may, per target. Everything else is 403.
MAY: dict[str, dict[str, set[str]]] = {
    "reader": {"tracking": _READING, "app": _READING, "own": {"version", "whoami", "ready"}},
    "writer": {"tracking": _READING | _WRITING, "app": _READING | _WRITING, "own": {"version", "whoami"}},
    "admin": {
        "tracking": _READING | _WRITING | _UNKNOWN | {"link"},
        "app": _READING | _WRITING | _UNKNOWN | {"link"},
        "own": set(OWN),
    },
    "careful": {
        "tracking": (_READING | _WRITING | _UNKNOWN) - {"delete", "graphql versions"},
        "app": (_READING | _WRITING | _UNKNOWN) - {"delete", "graphql versions"},
        "own": {"version", "whoami"},  # the others take a role for all targets
    },
    "guest": _SOME | {"app": {"read", "graphql", "ajax read"}},
    "nobody": _SOME | {"own": set()},
}

# As which IAM role a role of the proxy signs; None: as the proxy itself.
SIGNS: dict[str, dict[str, tuple[str, str] | None]] = {
    "reader": {"tracking": ("reader", "reader"), "app": ("writer", "app-reader")},
    "writer": {"tracking": ("writer", "writer"), "app": ("writer", "writer")},
    "admin": {"tracking": ("writer", "admin"), "app": ("writer", "admin")},
    "careful": {"tracking": ("writer", "careful"), "app": ("writer", "careful")},
    "guest": {"app": None},
}
# With which the proxy itself finds out, for /-/ready, whether the targets answer.
PROBE = "/api/2.0/mlflow/experiments/search"
_ITSELF = "arn:aws:iam::111122223333:user/developer"


@pytest.fixture(scope="module")
def at(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(sagemaker, tmp_path_factory.mktemp("matrix")) as made:
        yield made


@pytest.fixture(scope="module")
def runs(sagemaker: LocalSageMaker) -> Runs:
    return {each: {name: make_run(sagemaker, each) for name in ("$run", "$other")} for each in ("tracking", "app")}


def asks(runs: Runs) -> Iterator[tuple[str, str, Ask]]:
    """Every combination of target and kind: target, kind, and the request to send."""
    for name, values in runs.items():
        prefix = "" if name == "tracking" else f"/t/{name}"
        for kind, ask in ASKS.items():
            text = json.dumps([ask.path, ask.data])
            for placeholder, value in values.items():
                text = text.replace(placeholder, value)
            path, data = json.loads(text)
            yield name, kind, ask._replace(path=prefix + path, data=data)
        yield name, "link", LINKS[name]
    for kind, ask in OWN.items():
        yield "own", kind, ask


def send(peer: Peer, headers: Pairs, ask: Ask) -> Answer:
    if ask.data is None:
        return peer.call(ask.method, ask.path, headers)
    return peer.post(ask.path, headers, ask.data)


def session_name(subject: str) -> str:
    """How a caller's role session is called: readable, and never another's."""
    kind, _, name = subject.partition(":")
    readable = name if kind == "user" else f"{kind}={name}"
    return f"{readable}-{hashlib.sha256(subject.encode()).hexdigest()[:16]}"


def tag(subject: str) -> str:
    """A caller's name as STS takes it for a tag: without commas, and then with a hash."""
    changed = subject.replace(",", "-")
    return subject if changed == subject else f"{changed}-{hashlib.sha256(subject.encode()).hexdigest()[:16]}"


def principal(signs: tuple[str, str] | None, subject: str) -> tuple[str, Tags]:
    """Whom SageMaker sees, and with which session tags."""
    if signs is None:
        return _ITSELF, ()
    iam, role = signs
    arn = f"arn:aws:sts::111122223333:assumed-role/{iam}/{session_name(subject)}"
    return arn, (("caller", tag(subject)), ("role", role))


class Sent(NamedTuple):
    """A request of the matrix, and what was answered. `where` is its target, or `own`."""

    where: str
    kind: str
    ask: Ask
    answer: Answer
    allowed: bool


@pytest.mark.parametrize("role", [*ROLES, "nobody"])
@pytest.mark.parametrize("way", WAYS)
def test_who_may_do_what(at: Site, runs: Runs, control: Control, way: str, role: str) -> None:
    subject, headers = at.shows(way, role)
    may = MAY[role]
    sent = [
        Sent(where, kind, ask, send(at.trusted, headers, ask), kind in may[where]) for where, kind, ask in asks(runs)
    ]
    check_answers(sent)
    check_arrived(control, sent, role, subject)
    check_records(at, sent, role, subject)


def check_answers(sent: list[Sent]) -> None:
    """The status of each, and in a refusal the action and the target."""
    expected = {(each.where, each.kind): each.ask.status if each.allowed else 403 for each in sent}
    assert {(each.where, each.kind): each.answer.status for each in sent} == expected
    for where, _, ask, answer, allowed in sent:
        if not allowed:
            assert answer.json["error_code"] == "PERMISSION_DENIED"
            assert ask.action in answer.json["message"]
            assert where == "own" or repr(where) in answer.json["message"]


def check_arrived(control: Control, sent: list[Sent], role: str, subject: str) -> None:
    """What SageMaker saw: the allowed ones, each as the session of just this caller, and none other."""
    entries = control("GET", "requests?last=2000")["requests"]
    arrived = [
        entry
        for entry in entries
        if entry["plane"] != "sts" and (entry["path"], entry["principal"]) != (PROBE, _ITSELF)
    ]
    wanted: Counter[tuple[str, str, Tags]] = Counter()
    for where, kind, _, _, allowed in sent:
        if allowed and where != "own":
            wanted["sagemaker" if kind == "link" else where, *principal(SIGNS[role][where], subject)] += 1
    seen = Counter(
        (entry["target"] or entry["plane"], entry["principal"], tuple(sorted(entry["session_tags"].items())))
        for entry in arrived
    )
    assert seen == wanted
    assert {entry["verdict"] for entry in arrived} <= {"allowed"}


def check_records(at: Site, sent: list[Sent], role: str, subject: str) -> None:
    """One name for the caller, the action and the target; the role where one allowed it; and what the audit log has."""
    lines = at.log(each.answer for each in sent)
    assert {line["caller"] for line in lines} == {subject}
    for (where, _, ask, _, allowed), line in zip(sent, lines, strict=True):
        assert line["action"] == ask.action
        assert line["target"] == ("-" if where == "own" else where)
        signs = SIGNS[role].get(where) if role in SIGNS else None
        assert line["role"] == ((signs[1] if signs else role) if allowed and ask.action else "")
    audited = [each for each in sent if each.ask.event or not each.allowed]
    events = [line["event"] for line in at.audited(each.answer for each in audited)]
    assert events == [each.ask.event if each.allowed else "denied" for each in audited]


# Everything that identifies nobody. Each says it is the admin, and would be, but for one thing.


def _cookie(at: Site) -> str:
    name, _, value = at.cookie("admin").partition("=")
    return f"{name}={value[:40]}{'A' if value[40] != 'A' else 'B'}{value[41:]}"


def _token(at: Site) -> str:
    head, claims, signature = at.shows("token", "admin").headers[0][1].removeprefix("Bearer ").split(".")
    return f"{head}.{claims}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"


def _wrong(at: Site) -> str:
    key = at.keys["admin"]
    return key[:-1] + ("a" if key[-1] != "a" else "b")


def _subject(verified: str) -> Pairs:
    return ((SUBJECT_HEADER, "CN=admin,O=Example"), *([(VERIFY_HEADER, verified)] if verified else []))


def _load_balancer(at: Site, **more: Any) -> Pairs:
    return (("X-Amzn-Oidc-Data", at.places.data("admin-by-load-balancer", ["admin"], **more)),)


NOT_KNOWN: dict[str, Callable[[Site], Pairs]] = {
    "nothing": lambda _: (),
    "a wrong key as bearer": lambda at: key_headers("key as bearer", _wrong(at)),
    "a wrong key as password": lambda at: key_headers("key as password", _wrong(at)),
    "a wrong key in its own header": lambda at: key_headers("key in its own header", _wrong(at)),
    "an expired key": lambda at: key_headers("key as bearer", at.keys["expired"]),
    "a revoked key": lambda at: key_headers("key as bearer", at.keys["revoked"]),
    "a token for another service": lambda at: (
        ("Authorization", f"Bearer {at.provider.token('admin-by-token', {'groups': ['admin']}, client='other')}"),
    ),
    "a token with another signature": lambda at: (("Authorization", f"Bearer {_token(at)}"),),
    "another load balancer": lambda at: _load_balancer(at, signer=OTHER_LOAD_BALANCER),
    "a load balancer's sign-in that is over": lambda at: _load_balancer(at, exp=1700000000),
    "a certificate that failed": lambda _: _subject("FAILED:expired"),
    "a certificate that nobody looked at": lambda _: _subject(""),
    "a cookie that was changed": lambda at: (("Cookie", _cookie(at)),),
    "two cookies": lambda at: (("Cookie", f"{at.cookie('admin')}; {at.cookie('admin')}"),),
    "a key twice": lambda at: at.key("admin") * 2,
}
# These do count, but for where they come from.
NOT_FROM_THERE = ("load balancer", "certificate")


def check_strangers(at: Site, peer: Peer, headers: Pairs, runs: Runs, control: Control) -> None:
    """Everything is 401 for them, with the same words, and nothing of it arrives at SageMaker."""
    sent = [(where, kind, send(peer, (*headers, at.client()), ask)) for where, kind, ask in asks(runs)]
    assert {(where, kind): answer.status for where, kind, answer in sent if answer.status != 401} == {}
    assert len({answer.json["message"] for *_, answer in sent}) == 1
    shown = any(name.lower() in ("authorization", "x-api-key") for name, _ in headers)
    challenge = 'Bearer realm="mlflow-proxy"' + (', error="invalid_token"' if shown else "")  # RFC 6750 section 3.1
    assert all(answer.values("www-authenticate") == [challenge] for *_, answer in sent)
    assert control("GET", "requests?last=2000")["requests"] == []
    lines = at.log(answer for *_, answer in sent)
    assert {(line["caller"], line["role"]) for line in lines} == {("", "")}
    assert {line["event"] for line in at.audited(answer for *_, answer in sent)} == {"denied"}


@pytest.mark.parametrize("what", NOT_KNOWN)
def test_nobody_known(at: Site, runs: Runs, control: Control, what: str) -> None:
    check_strangers(at, at.trusted, NOT_KNOWN[what](at), runs, control)


@pytest.mark.parametrize("way", NOT_FROM_THERE)
def test_not_from_a_stranger(at: Site, runs: Runs, control: Control, way: str) -> None:
    check_strangers(at, at.peer(STRANGER), at.shows(way, "admin").headers, runs, control)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in NOT_FROM_THERE])
def test_what_is_secret_counts_from_anywhere(at: Site, way: str) -> None:
    answer = send(at.peer(STRANGER), at.shows(way, "admin").headers, ASKS["read"])
    assert (answer.status, at.log([answer])[0]["client"]) == (200, STRANGER)


def test_iam_has_the_last_word(at: Site, control: Control) -> None:
    """A role of the proxy that allows everything, over an IAM role that may only read."""
    headers = at.key("optimist")
    assert send(at.trusted, headers, ASKS["read"]).status == 200
    refused = send(at.trusted, headers, ASKS["write"])
    assert (refused.status, refused.json["error_code"]) == (403, "PERMISSION_DENIED")
    assert "The AWS identity that this proxy signs with for you may not do this." in refused.json["message"]
    assert "sagemaker-mlflow:SetExperimentTag" in at.log([refused])[0]["error"]
    read, write = (each for each in control("GET", "requests?last=10")["requests"] if each["plane"] == "mlflow")
    assert read["principal"] == write["principal"] == principal(("reader", "optimist"), "key:optimist")[0]
    assert (read["verdict"], write["verdict"]) == ("allowed", "AccessDeniedException")
    line = at.log([refused])[0]
    assert (line["role"], line["action"], line["status"]) == ("optimist", "SetExperimentTag", 403)
    assert at.audited([refused])[0]["event"] == "denied"


def check_limited(at: Site, answer: Answer, what: str) -> None:
    assert (answer.status, answer.json["error_code"]) == (429, "REQUEST_LIMIT_EXCEEDED")
    assert int(answer.value("retry-after")) >= 1
    assert answer.value("ratelimit-remaining") == "0"
    assert int(answer.value("ratelimit-limit")) > 0
    assert at.log([answer])[0]["limit"] == what


def test_the_rate_of_a_role(at: Site, control: Control) -> None:
    """All its callers together, however they are identified, on both targets."""
    in_turn = itertools.cycle([at.shows(way, "rated").headers for way in WAYS])
    paths = itertools.cycle(["", "/t/app"])
    read = ASKS["read"]
    answers = [
        send(at.trusted, next(in_turn), read._replace(path=next(paths) + read.path)) for _ in range(ROLE_RATE + 3)
    ]
    assert [answer.status for answer in answers] == [200] * ROLE_RATE + [429] * 3
    check_limited(at, answers[-1], "role rate")
    arrived = [entry for entry in control("GET", "requests?last=50")["requests"] if entry["plane"] == "mlflow"]
    assert len(arrived) == ROLE_RATE
    assert send(at.trusted, at.key("reader"), read).status == 200


def test_the_rate_of_a_caller(at: Site) -> None:
    """One caller, by whatever way the key is shown; others of the same role have a rate of their own."""
    ways = itertools.cycle(key_headers(way, at.keys["quick"]) for way in WAYS[:3])
    answers = [send(at.trusted, next(ways), OWN["version"]) for _ in range(CALLER_RATE + 3)]
    assert [answer.status for answer in answers] == [200] * CALLER_RATE + [429] * 3
    check_limited(at, answers[-1], "caller rate")
    check_limited(at, send(at.peer(STRANGER), next(ways), ASKS["read"]), "caller rate")
    assert send(at.trusted, at.key("reader"), ASKS["read"]).status == 200


def test_only_a_writer_changes_workspaces(at: Site) -> None:
    """An App has workspaces, and its IAM lets the reader do all: what is refused, the proxy refuses."""
    below, json_body = "/t/app/api/3.0/mlflow/workspaces", (("Content-Type", "application/json"),)
    name = "matrix-team"
    changes = [
        ("POST", below, "CreateWorkspace", {"name": name}, 201),
        ("PATCH", f"{below}/{name}", "UpdateWorkspace", {"description": "changed"}, 200),
        ("DELETE", f"{below}/{name}?mode=CASCADE", "DeleteWorkspace", {}, 204),
    ]
    for role, allowed in (("reader", False), ("writer", True)):
        headers = at.key(role)
        for method, path, action, data, status in changes:
            answer = at.trusted.call(method, path, (*headers, *json_body), json.dumps(data).encode())
            assert answer.status == (status if allowed else 403), answer.body
            assert allowed or action in answer.json["message"]
            assert at.log([answer])[0]["action"] == action
        assert {"name": "default"}.items() <= at.trusted.call("GET", f"{below}/default", headers).json[
            "workspace"
        ].items()


def test_a_call_reaches_the_workspace_that_its_header_names(at: Site) -> None:
    below, headers = "/t/app/api", at.key("writer")
    inside = (*headers, ("X-MLflow-Workspace", "header-team"))
    at.trusted.post(f"{below}/3.0/mlflow/workspaces", headers, {"name": "header-team"})
    try:
        created = at.trusted.post(f"{below}/2.0/mlflow/experiments/create", inside, {"name": "inside"})
        path = f"{below}/2.0/mlflow/experiments/get?experiment_id={created.json['experiment_id']}"
        assert at.trusted.call("GET", path, inside).json["experiment"]["workspace"] == "header-team"
        assert at.trusted.call("GET", path, headers).status == 404
    finally:
        at.trusted.call("DELETE", f"{below}/3.0/mlflow/workspaces/header-team?mode=CASCADE", headers)
