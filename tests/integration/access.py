"""A proxy with all ways of identifying at once, before the local SageMaker, and callers who show each of them.

The proxy trusts one peer, 127.0.0.1, as its load balancer; every other loopback address is a stranger's. So the same
bytes can be sent from both. Three targets: `tracking` and `app` are the local SageMaker's, `echo` is an upstream that
keeps what arrives.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import requests
from joserfc.jwk import ECKey, Key
from tests.access.provider import CLIENT, Documents, MockProvider, mock_provider, pem, seal
from tests.access.provider import Answer as Document
from tests.faults.callers import Answer
from tests.faults.proxies import Proxy, Table, running, target
from tests.faults.upstreams import Upstream
from tests.integration.conftest import targets_of

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.access.session import Sessions
from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.settings import Oidc

Pairs = tuple[tuple[str, str], ...]

TRUSTED = "127.0.0.1"
STRANGER = "127.0.0.2"
SECRET = bytes(range(32, 64))
LOAD_BALANCER = "arn:aws:elasticloadbalancing:us-east-1:111122223333:loadbalancer/app/mlflow/50dc6c495c0c9188"
OTHER_LOAD_BALANCER = "arn:aws:elasticloadbalancing:us-east-1:444455556666:loadbalancer/app/mlflow/60dc6c495c0c9188"
SUBJECT_HEADER, VERIFY_HEADER = "SSL-Client-Subject-DN", "SSL-Client-Verify"

READING = ["Get*", "Search*", "List*", "AccessUI"]
CALLER_RATE, FAILURE_RATE, ROLE_RATE = 300, 10, 5

# Whom a role is for is said three times: keys name it, people are in a group of its name, certificates name it, too.
ROLES = ("reader", "writer", "admin", "careful", "guest")
# How a caller may be identified, as the tests call it.
WAYS = ("key as bearer", "key as password", "key in its own header", "token", "load balancer", "certificate", "session")


def roles(sagemaker: LocalSageMaker) -> list[Table]:
    """The `[[roles]]` tables. For the App, whose IAM is all or nothing, a reader is one by the proxy alone."""

    def role(name: str, targets: list[str], allow: list[str], *, of: str = "", iam: str = "", **more: Any) -> Table:
        who = of or name
        subjects = [f"cert:CN={who},O=Example", *([f"key:{of}"] if of else [])]
        signs = {"assume_role_arn": sagemaker.roles[iam], "session_tags": True} if iam else {}
        return {
            "name": name,
            "subjects": subjects,
            "groups": [who],
            "targets": targets,
            "allow": allow,
            **signs,
            **more,
        }

    both = ["tracking", "app"]
    writing = [*READING, "Create*", "Update*", "Log*", "Set*", "Delete*"]
    return [
        role("reader", ["tracking"], [*READING, "proxy:GetReadiness"], iam="reader"),
        role("app-reader", ["app"], READING, of="reader", iam="writer"),
        role("writer", both, writing, iam="writer"),
        role("admin", ["*"], ["*", "CreatePresigned*"], iam="writer"),
        role("careful", both, ["*"], deny=["Delete*", "SearchModelVersions"], iam="writer"),
        role("guest", ["app"], ["Get*"]),
        role("optimist", ["tracking"], ["*"], iam="reader"),
        role("rated", both, READING, rate=f"{ROLE_RATE}/minute"),
        role("echo", ["echo"], ["*"]),
    ]


class Shown(NamedTuple):
    """What a caller sends along to be identified, and who that is."""

    subject: str
    headers: Pairs


class _InOnePiece(http.client.HTTPConnection):
    """Holds a request back until it is complete: head and body leave together."""

    _held = b""

    def send(self, data: Any) -> None:
        self._held += data

    def flush(self) -> None:
        held, self._held = self._held, b""
        super().send(held)


class Peer:
    """One kept connection to the proxy, from an address of this machine; sends paths and headers as they are given."""

    def __init__(self, port: int, address: str, note: Callable[[Pairs], None]) -> None:
        self._connection = _InOnePiece("127.0.0.1", port, timeout=60, source_address=(address, 0))
        self._note = note

    def call(self, method: str, path: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b"") -> Answer:
        """One request; `Host` is added, and `Content-Length` where there is a body or usually one."""
        pairs = tuple(headers)
        self._note(pairs)
        connection = self._connection
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in pairs:
                connection.putheader(name, value.encode("utf-8"))
            if body or method in ("POST", "PUT", "PATCH"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            connection.flush()
            response = connection.getresponse()
            return Answer(response.status, response.getheaders(), response.read())
        except BaseException:
            connection.close()  # the next call begins anew
            raise

    def post(self, path: str, headers: Iterable[tuple[str, str]] = (), data: Any = None) -> Answer:
        """A POST of JSON."""
        return self.call("POST", path, (*headers, ("Content-Type", "application/json")), json.dumps(data).encode())

    def close(self) -> None:
        self._connection.close()


class KeyPlace(Documents):
    """The place of a region's public keys, and what its load balancers sign."""

    def __init__(self, issuer: str) -> None:
        super().__init__()
        self.issuer = issuer  # where its load balancers sign people in
        self.kid, self.key = self.publish(ECKey.generate_key("P-256"))

    def publish(self, key: Key) -> tuple[str, Key]:
        kid = str(uuid.uuid4())
        self.answers[f"/{kid}"] = Document(pem(key))
        return kid, key

    def data(self, subject: str, groups: list[str], key: Key | None = None, **header: Any) -> str:
        """The header's value, by the load balancer's key unless another is given."""
        until = int(time.time()) + 3600
        whole: dict[str, Any] = {
            "typ": "JWT",
            "kid": self.kid,
            "alg": "ES256",
            "iss": self.issuer,
            "client": "alb",
        }
        whole |= {"signer": LOAD_BALANCER, "exp": until} | header
        return seal(whole, {"sub": subject, "groups": groups, "exp": until}, key or self.key, padded=True)


@dataclass
class Site:
    """The proxy, what stands around it, and everybody's credentials. `secrets` is all that was ever shown to it."""

    proxy: Proxy
    sagemaker: LocalSageMaker
    provider: MockProvider
    places: KeyPlace
    echo: Upstream
    keys: Mapping[str, str]
    audit: Path
    secrets: set[str] = field(default_factory=set)
    _shown: dict[tuple[str, str], Shown] = field(default_factory=dict)
    _peers: list[Peer] = field(default_factory=list)
    _clients: int = 0

    def peer(self, address: str = TRUSTED) -> Peer:
        """A connection from this address; closed with the site."""
        peer = Peer(self.proxy.port, address, self._note)
        self._peers.append(peer)
        return peer

    @cached_property
    def trusted(self) -> Peer:
        """A connection from the load balancer that the proxy trusts."""
        return self.peer(TRUSTED)

    def client(self) -> tuple[str, str]:
        """The header by which the load balancer names its client, each time another one, who never failed before."""
        self._clients += 1
        return "X-Forwarded-For", str(ip_address("10.0.0.0") + self._clients)

    def close(self) -> None:
        for peer in self._peers:
            peer.close()

    @property
    def sessions(self) -> Sessions:
        """What seals cookies as the proxy does."""
        return Sessions(self.oidc, SECRET)

    def shows(self, way: str, role: str) -> Shown:
        """The credentials of one who has this role and is identified this way. Made once."""
        if (way, role) not in self._shown:
            self._shown[way, role] = self._make(way, role)
        return self._shown[way, role]

    def key(self, role: str) -> Pairs:
        """The usual way to be somebody with this role."""
        return self.shows("key in its own header", role).headers

    def cookie(self, role: str) -> str:
        """A session's cookie, `name=value`, each time another one."""
        caller = Caller(f"user:{role}-by-session", "session", frozenset({role}), credential=Sessions.new_id())
        return self.sessions.begin(caller).partition(";")[0]

    def log(self, answers: Iterable[Answer], seconds: float = 20.0) -> list[dict[str, Any]]:
        """The log lines of these answers, in their order."""
        return _found(self.proxy.stdout, [answer.value("x-request-id") for answer in answers], seconds)

    def audited(self, answers: Iterable[Answer], seconds: float = 20.0) -> list[dict[str, Any]]:
        """The audit lines of these answers, of which each has one."""
        return _found(self.audit, [answer.value("x-request-id") for answer in answers], seconds)

    def audit_events(self) -> dict[str, str]:
        """All events of the audit log by request id."""
        lines = map(json.loads, self.audit.read_text().splitlines())
        return {line["request_id"]: line["event"] for line in lines}

    def _make(self, way: str, role: str) -> Shown:
        groups = [] if role == "nobody" else [role]
        if way.startswith("key"):
            return Shown(f"key:{role}", key_headers(way, self.keys[role]))
        name = f"{role}-by-{way.replace(' ', '-')}"
        if way == "token":
            token = self.provider.token(name, {"groups": groups})
            return Shown(f"user:{name}", (("Authorization", f"Bearer {token}"),))
        if way == "load balancer":
            return Shown(f"user:{name}", (("X-Amzn-Oidc-Data", self.places.data(name, groups)),))
        if way == "session":
            return Shown(f"user:{name}", (("Cookie", self.cookie(role)),))
        subject = f"CN={role},O=Example"
        return Shown(f"cert:{subject}", ((SUBJECT_HEADER, subject), (VERIFY_HEADER, "SUCCESS")))

    @property
    def oidc(self) -> Oidc:
        """The options of the proxy that say whose session a cookie is."""
        return Oidc(**oidc_options(self.provider))

    def _note(self, pairs: Pairs) -> None:
        for name, value in pairs:
            if name.lower() in ("authorization", "x-api-key", "cookie", "x-amzn-oidc-data"):
                self.secrets.add(value)


def key_headers(way: str, key: str) -> Pairs:
    """An API key in one of the three places for it."""
    if way == "key as bearer":
        return (("Authorization", f"Bearer {key}"),)
    if way == "key as password":
        return (("Authorization", f"Basic {base64.b64encode(f'anybody:{key}'.encode()).decode()}"),)
    return (("X-API-Key", key),)


def oidc_options(provider: MockProvider) -> dict[str, Any]:
    return {"issuer": provider.issuer, "audience": [CLIENT], "client_id": CLIENT, "groups_claim": "groups"}


def write_keys(path: Path) -> dict[str, str]:
    """A keys file with a key for each role; the keys by role, and two that no longer count."""
    created = datetime.now(UTC) - timedelta(days=2)
    keys, lines = {}, []
    for name in (*ROLES, "nobody", "optimist", "rated", "echo", "quick"):
        role = "reader" if name == "quick" else name
        keys[name], kept = make_key(name, role, created=created, expires=None)
        lines.append(kept.fields())
    for name, ends in (
        ("expired", {"expires": "2024-02-29T12:00:00Z"}),
        ("revoked", {"revoked": "2024-02-29T12:00:00Z"}),
    ):
        keys[name], kept = make_key(name, "admin", created=created, expires=None)
        lines.append({**kept.fields(), **ends})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return keys


@contextmanager
def site(sagemaker: LocalSageMaker, folder: Path) -> Iterator[Site]:
    """All of it, running."""
    keys = write_keys(folder / "keys")
    (folder / "session-secret").write_bytes(SECRET)
    (folder / "client-secret").write_text("any\n")
    audit = folder / "audit.jsonl"
    echo = Upstream()
    try:
        with mock_provider() as provider, KeyPlace(provider.issuer) as places:
            sections: dict[str, Table] = {
                "access": {"keys_file": str(folder / "keys")},
                "oidc": {
                    **oidc_options(provider),
                    "client_secret_file": str(folder / "client-secret"),
                    "session_secret_file": str(folder / "session-secret"),
                },
                "load_balancer": {
                    "arn": LOAD_BALANCER,
                    "key_endpoint": places.url,
                    "issuer": provider.issuer,
                    "groups_claim": "groups",
                },
                "certificates": {"subject_header": SUBJECT_HEADER, "verify_header": VERIFY_HEADER},
                "limits": {"caller_rate": f"{CALLER_RATE}/minute", "auth_failure_rate": f"{FAILURE_RATE}/minute"},
                "audit": {"to": str(audit)},
            }
            targets = [each for each in targets_of(sagemaker) if each["name"] != "cross-account"]
            targets.append(target("echo", f"http://127.0.0.1:{echo.port}"))
            with running(
                folder,
                targets,
                server={"trusted_proxies": [f"{TRUSTED}/32"]},
                sections=sections,
                roles=roles(sagemaker),
                environ=sagemaker.environment(),
            ) as proxy:
                made = Site(proxy, sagemaker, provider, places, echo, keys, audit)
                yield made
                made.close()
    finally:
        echo.close()


def make_run(sagemaker: LocalSageMaker, target_name: str) -> str:
    """A new run in MLflow itself, behind the gate; its id."""
    return str(straight(sagemaker, target_name, "runs/create", {"experiment_id": "0"})["run"]["info"]["run_id"])


def straight(sagemaker: LocalSageMaker, target_name: str, route: str, data: Mapping[str, Any]) -> Any:
    """A call of MLflow itself, behind the gate."""
    url = f"{sagemaker.mlflow_urls[target_name]}/api/2.0/mlflow/{route}"
    with requests.Session() as session:
        session.trust_env = False
        method = "GET" if route.endswith("/get") else "POST"
        values = {"params": data} if method == "GET" else {"json": data}
        answer = session.request(method, url, timeout=60, **values)  # type: ignore[arg-type]
    assert answer.ok, answer.text
    return answer.json()


def _found(path: Path, ids: list[str], seconds: float) -> list[dict[str, Any]]:
    """The JSON lines with these request ids, one for each."""
    end = time.monotonic() + seconds
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        whole = path.exists() and (not lines or path.read_text().endswith("\n"))
        by_id = {line["request_id"]: line for line in map(json.loads, lines if whole else lines[:-1])}
        if by_id.keys() >= set(ids):
            return [by_id[each] for each in ids]
        assert time.monotonic() < end, f"nothing about {sorted(set(ids) - by_id.keys())} in {path.name}"
        time.sleep(0.05)
