"""Tokens of an OpenID provider: who holds them, by RFC 7519 (JWT), RFC 8725 (how to check them) and RFC 9068.

Access tokens of callers, and the ID token of a sign-in. Not the sign-in itself, which is the portal's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from mlflow_proxy.access.caller import Caller, Unauthenticated, Way
from mlflow_proxy.access.claims import ClaimRules, check_times, is_name
from mlflow_proxy.access.provider_keys import ProviderKeys
from mlflow_proxy.access.tokens import Token, Verified, algorithm, digest, is_signed_by, parse, short_name, shown
from mlflow_proxy.settings import SIGNATURE_ALGORITHMS, Oidc

_ACCESS_TYPES = frozenset({"jwt", "at+jwt"})
_ID_TYPES = frozenset({"jwt"})


class TokenVerifier:
    """Verifies tokens of one provider. Made and used in one event loop.

    `clock` gives seconds since the epoch, `uptime` seconds that never jump; `proxy` is the HTTP proxy on the way out.
    """

    def __init__(
        self,
        oidc: Oidc,
        *,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = time.monotonic,
        proxy: str | None = None,
    ) -> None:
        if not oidc.issuer:
            raise ValueError("oidc.issuer is required")
        self._issuer = oidc.issuer
        self._audience = frozenset(oidc.audience)
        self._algorithms = SIGNATURE_ALGORITHMS.intersection(oidc.algorithms)
        self._leeway = oidc.leeway
        self._rules = ClaimRules(oidc.user_claim, oidc.groups_claim, oidc.required_claims)
        self._clock = clock
        self._verified = Verified()
        self._keys = ProviderKeys(oidc, proxy=proxy, on_change=self._verified.clear, uptime=uptime)

    async def start(self) -> None:
        """Begin to fetch the provider's keys, and keep them up to date. Failures are logged, never raised."""
        self._keys.start()

    async def close(self) -> None:
        """Stop."""
        await self._keys.close()

    def identify(self, token: str) -> Caller | Coroutine[Any, Any, Caller]:
        """The holder of an access token; to be awaited only if the provider must be asked for its keys.

        Raises Unauthenticated, and Refusal 503 if the provider's keys cannot be had at all.
        """
        mark = digest(token)
        known = self._verified.get(mark, self._clock())
        if known is not None:
            return known
        parsed = parse(token)
        name = algorithm(parsed, self._algorithms, _ACCESS_TYPES)
        if self._is_signed(parsed, name):
            return self._accept(mark, parsed)
        if not self._keys.may_renew():
            raise _unsigned(parsed)
        return self._identify_later(mark, parsed, name)

    async def claims(self, token: str, *, audience: str, nonce: str) -> dict[str, Any]:
        """The claims of an ID token that was issued to `audience` for the sign-in with this `nonce`.

        By OpenID Connect Core section 3.1.3.7. Required claims are not looked at: that is for `caller_of`. Raises
        Unauthenticated, and Refusal 503 if the provider's keys cannot be had at all.
        """
        digest(token)  # judges its length
        parsed = parse(token)
        name = algorithm(parsed, self._algorithms, _ID_TYPES)
        if not self._is_signed(parsed, name):
            await self._renewed(parsed, name)
        claims = parsed.claims()
        self._check(claims, {audience})
        # Several audiences trust one token, so it must say for which of them it was issued. An access token need not:
        # it is meant for whoever its audience names, by whichever client it was asked for (RFC 9068 section 2.2).
        several = isinstance(claims["aud"], list) and any(named != audience for named in claims["aud"])
        if claims.get("azp", None if several else audience) != audience:
            raise Unauthenticated(f"it was issued to {shown(claims.get('azp'))} (azp), not to this proxy")
        if not nonce or claims.get("nonce") != nonce:
            raise Unauthenticated("its nonce is not that of this sign-in")
        return claims

    def caller_of(self, claims: Mapping[str, Any], *, way: Way, credential: str) -> Caller:
        """The caller whom verified claims name, by the configured names of claims. Raises Unauthenticated."""
        return self._rules.caller(claims, way=way, credential=credential)

    async def ready(self) -> None:
        """Wait for the first fetch of the provider's keys. Raises Refusal 503, whose detail has the reason."""
        await self._keys.ready()

    async def metadata(self) -> Mapping[str, Any]:
        """The provider's discovery document. Raises Refusal 503 if it cannot be had."""
        return await self._keys.metadata()

    async def _identify_later(self, mark: bytes, parsed: Token, name: str) -> Caller:
        await self._renewed(parsed, name)
        return self._accept(mark, parsed)

    async def _renewed(self, parsed: Token, name: str) -> None:
        """Look again with the keys that the provider has now."""
        await self._keys.renew()
        if not self._is_signed(parsed, name):
            raise _unsigned(parsed)

    def _is_signed(self, parsed: Token, name: str) -> bool:
        """Whether one of the keys at hand signed it. Raises Unauthenticated if its own key is there, and did not."""
        kid = parsed.header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise Unauthenticated("its key id (kid) is not a text")
        keys = self._keys.matching(kid, name)
        if any(is_signed_by(parsed, key, name) for key in keys):
            return True
        if kid is not None and keys:
            raise Unauthenticated(f"its signature is not by the key {shown(kid)}")
        return False

    def _accept(self, mark: bytes, parsed: Token) -> Caller:
        claims = parsed.claims()
        until = self._check(claims, self._audience)
        own_name = claims.get("jti")
        credential = own_name if is_name(own_name) else short_name(mark)
        caller = self._rules.caller(claims, way="token", credential=credential)
        self._verified.add(mark, until, caller)
        return caller

    def _check(self, claims: Mapping[str, Any], audiences: Collection[str]) -> float:
        """The time until which the claims hold, in seconds since the epoch. Raises Unauthenticated."""
        if claims.get("iss") != self._issuer:
            raise Unauthenticated(f"its issuer is {shown(claims.get('iss'))}, not {self._issuer!r} (oidc.issuer)")
        named = claims.get("aud")
        listed = named if isinstance(named, list) else [named]
        if not any(isinstance(one, str) and one in audiences for one in listed):
            raise Unauthenticated(f"its audience is {shown(named)}, none of {sorted(audiences)}")
        return check_times(claims, self._clock(), self._leeway)


def _unsigned(parsed: Token) -> Unauthenticated:
    kid = parsed.header.get("kid")
    if kid is None:
        return Unauthenticated("its signature is by none of the provider's keys, and it names none (kid)")
    return Unauthenticated(f"its key {shown(kid)} (kid) is none of the provider's")
