"""Whom an AWS Application Load Balancer has signed in, by its header `x-amzn-oidc-data`.

After "Authenticate users using an Application Load Balancer" in AWS's user guide. The header is a token signed with
ES256; its base64 is padded, and the padding is signed with it. What it says about itself stands in the token's header:
`signer` (the load balancer's ARN), `iss`, `client`, `exp` and `kid`, by which its public key is found at an address of
the region. Every load balancer of the region signs with such keys: only `signer` tells one's own from a stranger's.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.claims import ClaimRules, check_times
from mlflow_proxy.access.fetch import DOCUMENT_DEADLINE, FetchFailed, Source
from mlflow_proxy.access.tokens import Token, Verified, algorithm, digest, is_signed_by, parse, short_name, shown
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import LoadBalancer
from mlflow_proxy.threads import Threads

_ALGORITHMS = frozenset({"ES256"})
_TYPES = frozenset({"jwt"})
# It becomes a part of a URL's path: nothing but a UUID.
_KID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_MOST_KEYS = 32
_MOST_UNKNOWN = 256
# What a place without such a key answers: 404, or 403 from S3.
_NO_SUCH_KEY = (403, 404)

# In seconds: how long a key counts without being fetched again, and a missing one as missing.
_KEY_LIFETIME = 24 * 3600.0
_MISSING_LIFETIME = 30.0
# So many fetches in so many seconds, lest invented key ids make the proxy hammer AWS.
_MOST_FETCHES = 5
_WINDOW = 10.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _KnownKey(NamedTuple):
    key: ECKey
    fetched_at: float


class LoadBalancerIdentity:
    """Verifies the header of one load balancer. Made and used in one event loop.

    `clock` gives seconds since the epoch, `uptime` seconds that never jump; `proxy` is the HTTP proxy on the way out.
    """

    def __init__(
        self,
        options: LoadBalancer,
        *,
        proxy: str | None = None,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = time.monotonic,
    ) -> None:
        if not options.arn:
            raise ValueError("load_balancer.arn is required")
        self._arn = options.arn
        self._issuer = options.issuer
        self._client_id = options.client_id
        self._leeway = options.leeway
        self._rules = ClaimRules(options.user_claim, options.groups_claim)
        self._clock = clock
        self._verified = Verified()
        endpoint = options.key_endpoint or default_key_endpoint(options.arn)
        self._keys = _Keys(endpoint, Source(proxy=proxy), uptime)

    async def start(self) -> None:
        """Nothing to do: which keys are needed, the first requests tell."""

    async def close(self) -> None:
        """End fetches under way."""
        await self._keys.close()

    def identify(self, data: str) -> Caller | Coroutine[Any, Any, Caller]:
        """The caller whom the header's value names; to be awaited only if its key must be fetched.

        Raises Unauthenticated, and Refusal 503 if the key cannot be had.
        """
        mark = digest(data)
        known = self._verified.get(mark, self._clock())
        if known is not None:
            return known
        token = parse(data, padded=True)
        kid, until = self._check_header(token)
        key = self._keys.at_hand(kid)
        if key is not None:
            return self._accept(mark, token, key, until)
        return self._identify_later(mark, token, kid, until)

    def _check_header(self, token: Token) -> tuple[str, float]:
        """The id of the key, and until when the header holds. Before the key is known, so that it keeps fetches few."""
        algorithm(token, _ALGORITHMS, _TYPES)
        header = token.header
        kid = header.get("kid")
        if not isinstance(kid, str) or not _KID.fullmatch(kid):
            raise Unauthenticated(f"its key id (kid) {shown(kid)} is not a UUID")
        for name, wanted in (("signer", self._arn), ("iss", self._issuer), ("client", self._client_id)):
            if wanted is not None and header.get(name) != wanted:
                raise Unauthenticated(f"its {name} is {shown(header.get(name))}, not {wanted!r}")
        return kid.lower(), check_times(header, self._clock(), self._leeway, "the load balancer's header")

    async def _identify_later(self, mark: bytes, token: Token, kid: str, until: float) -> Caller:
        return self._accept(mark, token, await self._keys.fetch(kid), until)

    def _accept(self, mark: bytes, token: Token, key: ECKey, until: float) -> Caller:
        if not is_signed_by(token, key, "ES256"):
            raise Unauthenticated("its signature is not by the load balancer's key")
        claims = token.claims()
        if "exp" in claims:
            until = min(until, check_times(claims, self._clock(), self._leeway))
        caller = self._rules.caller(claims, way="load-balancer", credential=short_name(mark))
        self._verified.add(mark, until, caller)
        return caller


class _Keys:
    """Public keys by their id, fetched when first needed; a bounded number of each, and of fetches."""

    def __init__(self, endpoint: str, source: Source, uptime: Callable[[], float]) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._source = source
        self._uptime = uptime
        self._threads = Threads("load-balancer-keys", 2)
        self._known: OrderedDict[str, _KnownKey] = OrderedDict()
        self._missing: OrderedDict[str, float] = OrderedDict()
        self._fetches: dict[str, asyncio.Task[ECKey | FetchFailed | None]] = {}
        self._begun: deque[float] = deque(maxlen=_MOST_FETCHES)

    async def close(self) -> None:
        tasks = list(self._fetches.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def at_hand(self, kid: str) -> ECKey | None:
        """The key, if it need not be fetched. Raises Unauthenticated if there was none a moment ago."""
        known = self._known.get(kid)
        if known is not None and self._uptime() - known.fetched_at < _KEY_LIFETIME:
            self._known.move_to_end(kid)
            return known.key
        missing_since = self._missing.get(kid)
        if missing_since is not None and self._uptime() - missing_since < _MISSING_LIFETIME:
            raise _no_such_key(kid)
        return None

    async def fetch(self, kid: str) -> ECKey:
        """The key, from its address. Raises Unauthenticated if there is none, Refusal 503 if nobody can tell."""
        task = self._fetches.get(kid)
        if task is None:
            self._take_turn()
            task = self._fetches[kid] = asyncio.get_running_loop().create_task(self._run(kid))
            task.add_done_callback(lambda _: self._fetches.pop(kid, None))
        await asyncio.wait({task})  # and not the task itself: who gives up waiting must not end it for the others
        found = FetchFailed("the proxy is stopping") if task.cancelled() else task.result()
        if isinstance(found, FetchFailed):
            raise _unavailable(found.reason)
        if found is None:
            raise _no_such_key(kid)
        return found

    def _take_turn(self) -> None:
        """Count a fetch, or refuse: the key may be good, but there were too many lately."""
        now = self._uptime()
        if len(self._begun) == _MOST_FETCHES and now - self._begun[0] < _WINDOW:
            raise _unavailable(f"more than {_MOST_FETCHES} keys were asked for within {_WINDOW:g} s")
        self._begun.append(now)

    async def _run(self, kid: str) -> ECKey | FetchFailed | None:
        """The key; None if its address says that there is none."""
        url = f"{self._endpoint}/{kid}"
        try:
            pem = await self._threads.run(lambda: self._source.fetch(url, accept="*/*"), DOCUMENT_DEADLINE)
            key = _public_key(pem, url)
        except (FetchFailed, TimeoutError) as error:
            failure = error if isinstance(error, FetchFailed) else FetchFailed(f"{url} does not answer in time")
            logger.warning("load balancer's key: %s", failure.reason)
            if failure.status not in _NO_SUCH_KEY:
                return failure
            _keep(self._missing, kid, self._uptime(), _MOST_UNKNOWN)
            return None
        logger.info("load balancer's key %s fetched", kid)
        _keep(self._known, kid, _KnownKey(key, self._uptime()), _MOST_KEYS)
        return key


def default_key_endpoint(arn: str) -> str:
    """Where the public keys of a load balancer's region are. GovCloud has them in S3."""
    _, partition, _, region, _ = arn.split(":", 4)
    if partition == "aws-us-gov":
        return f"https://s3-{region}.amazonaws.com/aws-elb-public-keys-prod-{region}"
    return f"https://public-keys.auth.elb.{region}.amazonaws.com"


def _public_key(pem: bytes, url: str) -> ECKey:
    try:
        key = ECKey.import_key(pem)
        if key.curve_name == "P-256" and not key.is_private:
            return key
    except (JoseError, ValueError, TypeError):
        pass
    raise FetchFailed(f"{url} does not answer with the PEM of a P-256 public key")


def _keep(kept: OrderedDict[str, T], kid: str, value: T, most: int) -> None:
    kept[kid] = value
    kept.move_to_end(kid)
    if len(kept) > most:
        kept.popitem(last=False)


def _no_such_key(kid: str) -> Unauthenticated:
    return Unauthenticated(f"its key {kid} (kid) is not among the public keys (load_balancer.key_endpoint)")


def _unavailable(reason: str) -> Refusal:
    return Refusal(
        503,
        "The load balancer's public key cannot be fetched, so its sign-in cannot be checked at the moment. "
        "Try again later.",
        retry_after=int(_WINDOW),
        detail=reason,
    )
