"""The keys of an OpenID provider: found by discovery, renewed in the background, and kept while it is down.

One worker has at most one fetch under way. A token with an unknown key asks for one out of turn, so that a rotation is
noticed at once, but not more often than every ten seconds: anybody can invent key ids.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from joserfc.jwk import ECKey, JWKRegistry, Key, OKPKey, RSAKey

from mlflow_proxy.access.fetch import DOCUMENT_DEADLINE, FetchFailed, Source
from mlflow_proxy.access.tokens import shown
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import Oidc
from mlflow_proxy.threads import Threads

# All in seconds.
_LEAST_INTERVAL = 10.0
_LONGEST_BACKOFF = 60.0
_LONGEST_OUTAGE = 24 * 3600.0
# Two documents, one after the other.
_FETCH_DEADLINE = 2 * DOCUMENT_DEADLINE

_MOST_KEYS = 64
_SHORTEST_RSA = 2048
# Of tokens without a key id: how many keys each may cost.
_MOST_TRIED = 4
_KEY_TYPES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}

logger = logging.getLogger(__name__)


class _Provider(NamedTuple):
    """What one fetch gave. `metadata` is empty where discovery is not needed."""

    metadata: Mapping[str, Any]
    keys: tuple[Key, ...]


class ProviderKeys:
    """The keys that a provider signs with. Made and used in one event loop.

    `on_change` is called when a key appears or goes. `uptime` is a clock that never jumps, in seconds.
    """

    def __init__(
        self,
        oidc: Oidc,
        *,
        proxy: str | None = None,
        on_change: Callable[[], None],
        uptime: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = oidc.issuer or ""
        self._jwks_url = oidc.jwks_url
        self._discovers = oidc.jwks_url is None or oidc.client_id is not None
        self._lifetime = oidc.keys_lifetime
        self._source = Source(str(oidc.ca_bundle) if oidc.ca_bundle else None, proxy)
        self._on_change = on_change
        self._uptime = uptime
        self._threads = Threads("oidc-keys", 2)
        self._current: _Provider | None = None
        self._fetched_at = 0.0
        self._asked_at = float("-inf")
        self._failed = 0
        self._error = "not fetched yet"
        self._fetch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to fetch; requests that come before the keys wait for them."""
        self._begin()

    async def close(self) -> None:
        """Stop renewing."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait({self._fetch})

    def matching(self, kid: str | None, algorithm: str) -> list[Key]:
        """The keys at hand that may have signed a token with this key id and algorithm; mostly one or none."""
        keys = self._current.keys if self._current else ()
        kind = _KEY_TYPES[algorithm[:2]]
        return [
            key
            for key in keys
            if key.key_type == kind
            and (kid is None or key.get("kid") == kid)
            and key.get("alg", algorithm) == algorithm
        ][:_MOST_TRIED]

    def may_renew(self) -> bool:
        """Whether `renew` would learn anything now. Raises Refusal 503 if the keys cannot be had at the moment."""
        if self._fetch is not None or self._uptime() - self._asked_at >= _LEAST_INTERVAL:
            return True
        if self._current is None or self._failed:  # what they do not know may have been signed with a new one
            raise self._unavailable()
        return False

    async def renew(self) -> None:
        """Fetch the keys out of turn, or wait for the fetch under way. Raises Refusal 503 if that comes to nothing."""
        fetch = self._fetch
        if fetch is None and self.may_renew():
            self._asked_at = self._uptime()
            fetch = self._begin()
        if fetch is not None:
            await asyncio.wait({fetch})  # and not the task itself: who gives up waiting must not end it for the others
        if self._current is None or self._failed:
            raise self._unavailable()

    async def ready(self) -> None:
        """Wait until there are keys. Raises Refusal 503 if the first fetch fails."""
        if self._current is None:
            await self.renew()

    async def metadata(self) -> Mapping[str, Any]:
        """The discovery document. Raises Refusal 503 if it was never to be had."""
        await self.ready()
        if self._current is None or not self._current.metadata:
            raise self._unavailable()
        return self._current.metadata

    def _begin(self) -> asyncio.Task[None]:
        if self._timer is not None:
            self._timer.cancel()
        self._fetch = asyncio.get_running_loop().create_task(self._run(), name="oidc-keys")
        return self._fetch

    async def _run(self) -> None:
        try:
            delay = self._accept(await self._threads.run(self._load, _FETCH_DEADLINE))
        except FetchFailed as failure:
            delay = self._reject(failure.reason)
        except TimeoutError:
            delay = self._reject(f"no answer within {_FETCH_DEADLINE:g} s")
        except Exception:
            logger.exception("keys of %s: failed in an unexpected way", self._issuer)
            delay = self._reject("failed in an unexpected way; see the log")
        finally:
            self._fetch = None
        if not self._closed:
            self._timer = asyncio.get_running_loop().call_later(delay, self._begin)

    def _load(self) -> _Provider:
        """In a thread: the two documents. Raises FetchFailed."""
        metadata: Mapping[str, Any] = {}
        if self._discovers:
            metadata = self._source.fetch_object(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
            if metadata.get("issuer") != self._issuer:
                raise FetchFailed(
                    f"discovery says that the issuer is {shown(metadata.get('issuer'))}, and oidc.issuer "
                    f"{self._issuer!r}; they must be the same, to the last slash"
                )
        url = self._jwks_url or metadata.get("jwks_uri")
        if not isinstance(url, str):
            raise FetchFailed("discovery names no jwks_uri; set oidc.jwks_url")
        return _Provider(metadata, usable_keys(self._source.fetch_object(url), url))

    def _accept(self, fetched: _Provider) -> float:
        """Take over what was fetched; how many seconds until the next time, ahead of the end of its life."""
        before = self._current.keys if self._current else ()
        self._current = fetched
        self._fetched_at = self._uptime()
        changed = _marks(before) != _marks(fetched.keys)
        if changed:
            self._on_change()
        if changed or self._failed:
            kids = ", ".join(shown(key.get("kid")) for key in fetched.keys)
            logger.info("keys of %s: %d usable (%s)", self._issuer, len(fetched.keys), kids)
        self._failed = 0
        return self._lifetime * random.uniform(0.75, 0.95)  # noqa: S311

    def _reject(self, reason: str) -> float:
        """Note a failure; how many seconds until the next attempt. Old keys count on, but not for ever."""
        self._error = reason
        self._failed += 1
        delay = min(_LONGEST_BACKOFF, 2.0 ** min(self._failed - 1, 10)) * random.uniform(0.75, 1.25)  # noqa: S311
        age = self._uptime() - self._fetched_at
        if self._current is None:
            consequence = "no token can be checked"
        elif age > _LONGEST_OUTAGE:
            consequence = f"those from {age / 3600:.0f} h ago no longer count: no token can be checked"
            self._current = None
            self._on_change()
        else:
            consequence = f"those from {age:.0f} s ago count on"
        logger.warning("keys of %s: %s (%s; next attempt in %.0f s)", self._issuer, reason, consequence, delay)
        return delay

    def _unavailable(self) -> Refusal:
        wait = max(1, round(self._timer.when() - asyncio.get_running_loop().time())) if self._timer else 1
        return Refusal(
            503,
            "The identity provider does not answer, so tokens cannot be checked at the moment. Try again later.",
            retry_after=wait,
            detail=f"keys of {self._issuer}: {self._error}",
        )


def usable_keys(document: Mapping[str, Any], url: str) -> tuple[Key, ...]:
    """The public keys of a JWK Set (RFC 7517 section 5) that can have signed a token; others are left out.

    Raises FetchFailed if there is none.
    """
    listed = document.get("keys")
    if not isinstance(listed, list) or len(listed) > _MOST_KEYS:
        raise FetchFailed(f"{url} is not a JWK set of at most {_MOST_KEYS} keys")
    keys = tuple(key for key in map(_usable_key, listed) if key is not None)
    if not keys:
        raise FetchFailed(f"{url} has no key that can sign tokens")
    return keys


def _usable_key(entry: Any) -> Key | None:
    """A key that verifies; secret ones (`oct`) never, for they would let everybody sign who can read them."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    try:
        key = JWKRegistry.import_key(entry)
        if not isinstance(key, RSAKey | ECKey | OKPKey):
            return None
        key.check_key_op("verify")
    except Exception:  # whatever is wrong with one key, the others count
        return None
    if isinstance(key, RSAKey) and key.public_key.key_size < _SHORTEST_RSA:
        logger.warning("key %s has less than %d bits and counts for nothing", shown(entry.get("kid")), _SHORTEST_RSA)
        return None
    return key


def _marks(keys: tuple[Key, ...]) -> set[tuple[Any, str]]:
    return {(key.get("kid"), key.thumbprint()) for key in keys}
