"""A request as the proxy understands it: read once, checked, and reduced to what may pass.

All from outside but its framing is judged here: size and number of headers, Host, and the allow-list of headers. What
is not on the list never reaches SageMaker: the caller's Authorization and cookies, X-Amz-…, both ARN headers,
X-Forwarded-…, Origin and Referer (MLflow refuses foreign ones), hop-by-hop headers, and MLflow's own switches.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterable
from ipaddress import ip_address
from typing import NamedTuple

from mlflow_proxy.errors import Refusal
from mlflow_proxy.inbound.connection import Call
from mlflow_proxy.settings import LOOPBACK_HOSTS, Network, Server
from mlflow_proxy.transform import canonical_path, canonical_query

# Name by name, never by pattern: MLflow has switches among the x-mlflow-… headers, such as X-MLflow-Guardrail-Bypass.
PASSED_HEADERS = frozenset(
    {
        b"accept",
        b"accept-charset",
        b"accept-encoding",
        b"accept-language",
        b"cache-control",
        b"content-encoding",
        b"content-language",
        b"content-type",
        b"if-match",
        b"if-modified-since",
        b"if-none-match",
        b"if-range",
        b"if-unmodified-since",
        b"pragma",
        b"range",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-mlflow-client-version",
        b"x-mlflow-experiment-id",
        b"x-mlflow-workspace",
    }
)
# Two of these would mean two things, and servers differ in which one they take.
SINGLE_HEADERS = frozenset(
    {
        b"content-encoding",
        b"content-type",
        b"if-range",
        b"range",
        b"traceparent",
        b"user-agent",
        b"x-mlflow-client-version",
        b"x-mlflow-experiment-id",
        b"x-mlflow-workspace",
    }
)
_NOTED_HEADERS = frozenset(
    {
        b"host",
        b"connection",
        b"origin",
        b"sec-fetch-site",
        b"sec-fetch-mode",
    }
)
# What callers identify themselves with. None of it is ever passed on.
_CREDENTIAL_HEADERS = frozenset({b"authorization", b"x-api-key", b"cookie"})
# Headers by which other servers hand on whom they have identified. None counts unless it is configured and comes from
# a trusted proxy; seen otherwise, it is dropped and counted, because somebody may be trying.
IDENTITY_HEADERS = frozenset(
    {
        b"client-cert",
        b"client-cert-chain",
        b"remote-user",
        b"ssl-client-cert",
        b"ssl-client-subject-dn",
        b"ssl-client-verify",
        b"x-amzn-mtls-clientcert",
        b"x-amzn-mtls-clientcert-issuer",
        b"x-amzn-mtls-clientcert-leaf",
        b"x-amzn-mtls-clientcert-serial-number",
        b"x-amzn-mtls-clientcert-subject",
        b"x-amzn-mtls-clientcert-validity",
        b"x-amzn-oidc-accesstoken",
        b"x-amzn-oidc-data",
        b"x-amzn-oidc-identity",
        b"x-auth-request-email",
        b"x-auth-request-groups",
        b"x-auth-request-preferred-username",
        b"x-auth-request-user",
        b"x-client-cert",
        b"x-forwarded-client-cert",
        b"x-forwarded-email",
        b"x-forwarded-groups",
        b"x-forwarded-preferred-username",
        b"x-forwarded-user",
        b"x-goog-iap-jwt-assertion",
        b"x-remote-user",
        b"x-ssl-client-cert",
        b"x-ssl-client-s-dn",
        b"x-ssl-client-verify",
        b"x-user",
    }
)
_MODE = b"sec-fetch-mode"
# nginx sends its own name for the upstream as Host, if it is not told otherwise, and then each page is a foreign one.
_NAME_PASSED_ON = "lets the server in front pass the Host header on (nginx: proxy_set_header Host $http_host;)"
_OPEN = f"Open {{}} instead (server.public_url). If you did, the operator corrects that option, or {_NAME_PASSED_ON}."
_NO_ADDRESS = (
    "Open the proxy's own address instead. If you did, a server in front of it changes the Host header: the operator "
    f"sets server.public_url to the address that browsers show, or {_NAME_PASSED_ON}."
)
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_COMMON_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_METHOD = re.compile(r"[A-Z]{1,32}")
_REFUSED_METHODS = frozenset({"CONNECT", "TRACE", "TRACK"})
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,128}")
_RUNS_OF_SLASHES = re.compile("/+")


def refuse_foreign(request: Request, *, writes: bool) -> None:
    """Raises Refusal 403 for what a page of another site may not do: change anything.

    Browsers send cookies, Basic credentials and certificates unasked, so how a caller was identified does not matter.
    """
    if request.foreign and (writes or request.method not in _SAFE_METHODS):
        raise Refusal(403, f"A page of another site sent this request. {request.own_address}", close=True)


class Presented(dict[bytes, list[bytes]]):
    """The headers by which a caller may be identified, by name. Only names are shown, never a value."""

    def __repr__(self) -> str:
        return f"Presented({', '.join(name.decode('latin-1') for name in self)})"


class Request(NamedTuple):
    """What the steps of a request's way know of it.

    `presented` is what may identify the caller; of headers that only a trusted proxy may set, it has none from
    elsewhere, and `dropped_identity` counts those left out. `navigates`: a browser wants to show the answer as a page.
    `foreign`: a page of another site sent it. `behind_proxy`: `client` is a trusted proxy, which did not say for whom
    it asks, so that all its callers have this address. `own_address` says to people what to open instead of a page of
    another site.
    """

    method: str
    path: str
    query: str
    headers: list[tuple[bytes, bytes]]
    content_type: str
    content_length: int | None
    has_body: bool
    client: str
    scheme: str
    host: str
    presented: Presented = Presented()
    dropped_identity: int = 0
    navigates: bool = False
    foreign: bool = False
    behind_proxy: bool = False
    own_address: str = ""


class RequestIds:
    """Ids of requests: unique, not secret. Made in each worker, whose ids begin at random and are then counted."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._counter = itertools.count(secrets.randbelow(1 << 24))

    def of(self, headers: list[tuple[bytes, bytes]]) -> str:
        """The caller's X-Request-Id if it is a sane one, else a new one; it is in the answer and in the log."""
        for name, value in headers:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                return str(value, "ascii")
        return f"{self._prefix}{next(self._counter):08x}"


class RequestReader:
    """Reads requests under one configuration.

    `forwarded_identity` names, in lower case, the headers by which trusted proxies say whom they have identified.
    """

    def __init__(self, server: Server, forwarded_identity: frozenset[bytes] = frozenset()) -> None:
        self._forwarded_identity = forwarded_identity
        self._kept_headers = _CREDENTIAL_HEADERS | forwarded_identity | IDENTITY_HEADERS
        self._header_limit = int(server.header_limit)
        self._header_count_limit = server.header_count_limit
        self._url_limit = int(server.url_limit)
        self._hosts = AllowedHosts(server)
        self._trusted = server.trusted_proxies
        self._hops = server.trusted_hops
        address = server.address
        self._prefix = server.prefix.encode("ascii")
        self._own_address = own_address(server)
        self._public_origin = address.endpoint.url.lower().encode() if address else b""

    def below_prefix(self, path: bytes) -> bytes:
        """A path as received, without the prefix of `server.public_url`, where the server in front has left that in."""
        prefix = self._prefix
        return path[len(prefix) :] if prefix and path.startswith(prefix + b"/") else path

    def read(self, call: Call) -> Request:
        """Check and reduce one request. Raises Refusal for all that is not plainly a good one."""
        if call.problem is not None:
            raise call.problem
        raw_path, raw_query = call.path, call.query
        if len(raw_path) + len(raw_query) > self._url_limit:
            raise Refusal(414, f"The URL is longer than {self._url_limit} bytes (server.url_limit).", close=True)
        method = call.method
        if method not in _COMMON_METHODS and (method in _REFUSED_METHODS or not _METHOD.fullmatch(method)):
            raise Refusal(501, f"The method {method[:32]!r} is not one that MLflow has.", close=True)
        passed, noted, presented = self._sort_headers(call.headers)
        host = self._host(noted)
        foreign = (b"origin" in noted or b"sec-fetch-site" in noted) and self._is_foreign(noted)
        query = canonical_query(raw_query) if raw_query else ""
        if self._prefix and raw_path == self._prefix:  # relative links need the slash
            location = f"{self._prefix.rpartition(b'/')[2].decode()}/" + (f"?{query}" if query else "")
            raise Refusal(308, "Use the address with a slash.", error_code="REDIRECT", headers=[("location", location)])
        content_type = _content_type(passed) if passed else ""
        client, scheme = self.client(call)
        dropped = self._drop_claims(call.peer, presented) if presented else 0
        return Request(
            method,
            canonical_path(raw_path),
            query,
            passed,
            content_type,
            call.content_length,
            call.has_body,
            client,
            scheme,
            host,
            presented,
            dropped,
            _navigates(method, noted, passed),
            foreign,
            client == call.peer and is_trusted(client, self._trusted),
            self._own_address if foreign else "",
        )

    def _drop_claims(self, peer: str, presented: Presented) -> int:
        """Take out what claims an identity and may not, and count it."""
        claims = [name for name in presented if name not in _CREDENTIAL_HEADERS]
        if not claims:
            return 0
        if is_trusted(peer, self._trusted):
            claims = [name for name in claims if name not in self._forwarded_identity]
        for name in claims:
            del presented[name]
        return len(claims)

    def _sort_headers(
        self, headers: list[tuple[bytes, bytes]]
    ) -> tuple[list[tuple[bytes, bytes]], dict[bytes, list[bytes]], Presented]:
        if len(headers) > self._header_count_limit:
            raise Refusal(431, f"More than {self._header_count_limit} headers (server.header_count_limit).", close=True)
        passed: list[tuple[bytes, bytes]] = []
        noted: dict[bytes, list[bytes]] = {}
        presented = Presented()
        size = 0
        for pair in headers:
            name, value = pair
            size += len(name) + len(value)
            if name in PASSED_HEADERS:
                passed.append(pair)
            elif name in _NOTED_HEADERS:
                noted.setdefault(name, []).append(value)
            elif name in self._kept_headers:
                presented.setdefault(name, []).append(value)
        if size > self._header_limit:
            raise Refusal(
                431, f"The headers are larger than {self._header_limit} bytes (server.header_limit).", close=True
            )
        if len(passed) > 1:
            _refuse_doubles(passed)
        if b"connection" in noted:
            passed = _without_hop_by_hop(passed, noted[b"connection"])
        return passed, noted, presented

    def _host(self, noted: dict[bytes, list[bytes]]) -> str:
        values = noted.get(b"host", ())
        if len(values) != 1 or not values[0]:
            raise Refusal(400, "A request has exactly one Host header.", close=True)
        return self._hosts.check(values[0])

    def _is_foreign(self, noted: dict[bytes, list[bytes]]) -> bool:
        """Whether a page of another site sent this: by fetch metadata or by Origin, whichever says so.

        Callers that are no browsers send neither (OWASP's cross-site request forgery cheat sheet).
        """
        sites, origins = noted.get(b"sec-fetch-site"), noted.get(b"origin")
        if sites is not None and any(site not in (b"same-origin", b"none") for site in sites):
            return True
        if origins is None:
            return False
        own = self._own_origins(noted[b"host"][0])
        if sites is not None:  # an own page without referrers, as the sign-out is, has a form with the origin "null"
            own = (*own, b"null")
        return any(origin.lower() not in own for origin in origins)

    def _own_origins(self, host: bytes) -> tuple[bytes, ...]:
        lowered = host.lower()
        own = (b"http://" + lowered, b"https://" + lowered)
        return (*own, self._public_origin) if self._public_origin else own

    def client(self, call: Call) -> tuple[str, str]:
        """The caller's address and scheme, through trusted proxies."""
        if not self._trusted:
            return call.peer, call.scheme
        return forwarded_client(call.peer, call.scheme, call.headers, self._trusted, self._hops)


class AllowedHosts:
    """Which names callers may use for this proxy, so that a browser tricked by DNS rebinding reaches nothing."""

    def __init__(self, server: Server) -> None:
        names = {*server.allowed_hosts, *LOOPBACK_HOSTS, server.host}
        if server.address:
            names.add(server.address.endpoint.host)
        self._own_address = own_address(server)
        lowered = {name.lower().strip("[]") for name in names}
        self._exact = {name for name in lowered if name and not name.startswith("*.")}
        self._suffixes = tuple(name[1:] for name in lowered if name.startswith("*."))
        self._known: dict[bytes, str] = {}

    def check(self, value: bytes) -> str:
        """The host name of a Host header, in lower case, without its port. Raises Refusal 400 or 421."""
        known = self._known.get(value)
        if known is not None:
            return known
        match = _HOST.fullmatch(value)
        if match is None:
            raise Refusal(400, "The Host header is not a host name with an optional port.", close=True)
        name = match[1].decode("ascii").lower().strip("[]").rstrip(".")
        if name not in self._exact and not (self._suffixes and name.endswith(self._suffixes)):
            raise Refusal(
                421,
                f"This proxy does not answer for the host {name!r}. {self._own_address} The operator can add further "
                "names to server.allowed_hosts.",
                detail="the host is not one of server.allowed_hosts",
            )
        if len(self._known) < 256:
            self._known[value] = name
        return name


def forwarded_client(
    peer: str, scheme: str, headers: Iterable[tuple[bytes, bytes]], trusted: list[Network], most: int = 1
) -> tuple[str, str]:
    """The caller's address and scheme, by X-Forwarded-For and -Proto as far as trusted proxies wrote them.

    `most` is how many of them there are. Each adds the address that it was asked from on the right, so the last one
    counts, and the one before if the last is a trusted proxy, and so on. What stands left of these anybody may have
    written, callers in the same network as trusted proxies, too.
    """
    if not is_trusted(peer, trusted):
        return peer, scheme
    hops: list[str] = []
    for name, value in headers:
        if name == b"x-forwarded-for":
            hops += [_without_port(hop.strip()) for hop in value.decode("latin-1").split(",")]
        elif name == b"x-forwarded-proto":
            last = value.decode("latin-1").rsplit(",", 1)[-1].strip().lower()
            scheme = last if last in ("http", "https") else scheme
    client = peer
    for hop in reversed(hops[-most:]):
        if not _is_address(hop):
            break
        client = hop
        if not is_trusted(hop, trusted):
            break
    return client, scheme


def _without_port(hop: str) -> str:
    """Some load balancers write the port, too: `192.0.2.7:4711`, `[2001:db8::7]:4711`."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+", hop)
    return (match[1] or match[2]) if match else hop


def _is_address(text: str) -> bool:
    if "%" in text:  # a zone means something on its own machine only, and may be anything
        return False
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_trusted(text: str, trusted: list[Network]) -> bool:
    """Whether an address is one of trusted proxies."""
    if not _is_address(text):
        return False
    address = ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or address  # how a socket for both families names IPv4 peers
    return any(address in network for network in trusted)


def own_address(server: Server) -> str:
    """What somebody is told who came by an address that the proxy does not know for its own."""
    return _OPEN.format(server.address.url) if server.address else _NO_ADDRESS


def up(path: str) -> str:
    """The relative way from a page at `path` to the proxy's root, which need not be that of its host: `../../`.

    Runs of slashes count as one, as in canonical paths: nginx makes one of its own where a location without a slash at
    its end goes with a `proxy_pass` that has one.
    """
    return "../" * (len(_RUNS_OF_SLASHES.findall(path)) - 1) or "./"


def wants_page(call: Call) -> bool:
    """Whether a browser wants to show the answer to a request, which may not be a good one, or send a form."""
    return call.method in ("GET", "POST") and _wants_page(
        [value for name, value in call.headers if name == _MODE], call.headers
    )


def _navigates(method: str, noted: dict[bytes, list[bytes]], passed: list[tuple[bytes, bytes]]) -> bool:
    return method == "GET" and _wants_page(noted.get(_MODE, []), passed)


def _wants_page(mode: list[bytes], headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a browser wants the answer as a page: it says so, or, without fetch metadata, it asks for HTML."""
    if mode:
        return mode == [b"navigate"]
    return any(name == b"accept" and b"text/html" in value.lower() for name, value in headers)


def _content_type(passed: list[tuple[bytes, bytes]]) -> str:
    """The content type in the form in which it is signed and sent: no outer spaces, no runs of spaces."""
    for index, (name, value) in enumerate(passed):
        if name == b"content-type":
            try:
                text = " ".join(value.decode("ascii").split())
            except UnicodeDecodeError:
                raise Refusal(400, "The Content-Type header is not ASCII.") from None
            passed[index] = (name, text.encode("ascii"))
            return text
    return ""


def _refuse_doubles(passed: list[tuple[bytes, bytes]]) -> None:
    names = [name for name, _ in passed]
    if len(set(names)) == len(names):
        return
    for name in SINGLE_HEADERS:
        if names.count(name) > 1:
            raise Refusal(400, f"The header {name.decode()} was sent more than once.", close=True)


def _without_hop_by_hop(passed: list[tuple[bytes, bytes]], connection: list[bytes]) -> list[tuple[bytes, bytes]]:
    """RFC 9110 section 7.6.1: what Connection names is for this hop only."""
    named = {token.strip().lower() for value in connection for token in value.split(b",")}
    return passed if named.isdisjoint(PASSED_HEADERS) else [pair for pair in passed if pair[0] not in named]
