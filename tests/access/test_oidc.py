"""Tokens: those of a real provider, forged ones, and a provider whose keys change or that goes away.

Each attack is shown to work where its defence is missing: against the library with lax settings, or as the same token
but for the one property. So a refusal is for that property, and not for another reason.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from joserfc import jwe, jwt
from joserfc.jwk import ECKey, JWKRegistry, Key, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry
from tests.access.provider import (
    CLIENT,
    Answer,
    Issuer,
    MockProvider,
    algorithm_of,
    free_port,
    json_answer,
    mock_provider,
    pem,
    seal,
)

from mlflow_proxy.access import provider_keys
from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.oidc import TokenVerifier
from mlflow_proxy.access.tokens import LONGEST_TOKEN
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import SIGNATURE_ALGORITHMS, Oidc

HOUR = 3600.0


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


async def settled(found: Caller | Awaitable[Caller]) -> Caller:
    return found if isinstance(found, Caller) else await found


def run(
    oidc: Oidc,
    test: Callable[[TokenVerifier], Coroutine[Any, Any, None]],
    *,
    clock: Callable[[], float] = time.time,
    uptime: Callable[[], float] = time.monotonic,
) -> None:
    """Start a verifier, run `test` with it, close it."""

    async def main() -> None:
        verifier = TokenVerifier(oidc, clock=clock, uptime=uptime)
        await verifier.start()
        try:
            await test(verifier)
        finally:
            await verifier.close()

    asyncio.run(main())


def outcome(oidc: Oidc, token: str, *, ahead: float = 0.0) -> Caller | str:
    """The caller whom a fresh verifier takes the token's holder for, or why it does not."""
    clock = Clock()
    clock.ahead = ahead
    found: list[Caller | str] = []

    async def test(verifier: TokenVerifier) -> None:
        try:
            found.append(await settled(verifier.identify(token)))
        except Unauthenticated as failure:
            found.append(failure.reason)

    run(oidc, test, clock=clock)
    return found[0]


def accepted(oidc: Oidc, token: str, *, ahead: float = 0.0) -> Caller:
    found = outcome(oidc, token, ahead=ahead)
    assert isinstance(found, Caller), found
    return found


def refused(oidc: Oidc, token: str, *, ahead: float = 0.0) -> str:
    found = outcome(oidc, token, ahead=ahead)
    assert isinstance(found, str), found
    return found


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def mock() -> Iterator[MockProvider]:
    with mock_provider() as running:
        yield running


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


def options(provider: MockProvider | Issuer, **more: Any) -> Oidc:
    url = provider.issuer if isinstance(provider, MockProvider) else provider.url
    return Oidc(**{"issuer": url, "audience": [CLIENT], **more})


def parts(token: str) -> list[bytes]:
    return [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split(".")]


class TestARealProvider:
    def test_a_token_of_a_sign_in(self, mock: MockProvider) -> None:
        caller = accepted(options(mock), mock.token("alice"))
        assert (caller.subject, caller.way, caller.groups) == ("user:alice", "token", frozenset())
        assert caller.credential.startswith("sha256:")
        assert len(caller.credential) == len("sha256:") + 16

    def test_user_and_groups_by_the_configured_claims(self, mock: MockProvider) -> None:
        token = mock.token("00u1", {"email": "alice@example.com", "realm_access": {"roles": ["ml", "ops"]}})
        caller = accepted(options(mock, user_claim="email", groups_claim="realm_access.roles"), token)
        assert caller.subject == "user:alice@example.com"
        assert caller.groups == {"ml", "ops"}

    def test_required_claims(self, mock: MockProvider) -> None:
        token = mock.token("alice", {"tid": "tenant-1"})
        assert accepted(options(mock, required_claims={"tid": "tenant-1"}), token).subject == "user:alice"
        assert "required_claims" in refused(options(mock, required_claims={"tid": "tenant-2"}), token)

    def test_another_audience(self, mock: MockProvider) -> None:
        token = mock.token("alice", client="another-app")
        assert "its audience is ['another-app']" in refused(options(mock), token)
        assert accepted(options(mock, audience=[CLIENT, "another-app"]), token).subject == "user:alice"

    def test_without_an_audience_nobody(self, mock: MockProvider) -> None:
        assert "audience" in refused(options(mock, audience=[]), mock.token())

    def test_another_issuer(self, mock: MockProvider) -> None:
        """Under its other name the provider is another issuer, with the same key."""
        other = f"http://127.0.0.1:{mock.port}"
        token = mock.token("alice", host="127.0.0.1")
        assert f"its issuer is '{other}'" in refused(options(mock), token)
        assert accepted(options(mock, issuer=other), token).subject == "user:alice"

    def test_expired(self, mock: MockProvider) -> None:
        token = mock.token()
        assert accepted(options(mock), token, ahead=HOUR - 60).subject == "user:alice"
        assert "expired" in refused(options(mock), token, ahead=HOUR + 60)

    def test_expired_when_issued(self) -> None:
        with mock_provider(token_age=timedelta(seconds=-60)) as old:
            token = old.token()
            assert "expired" in refused(options(old), token)
            assert accepted(options(old, leeway=120), token).subject == "user:alice"

    def test_issued_in_the_future(self, mock: MockProvider) -> None:
        token = mock.token()
        assert "issued in the future" in refused(options(mock), token, ahead=-120)
        assert accepted(options(mock, leeway=150), token, ahead=-120).subject == "user:alice"

    def test_none_as_algorithm(self, mock: MockProvider) -> None:
        _, payload, _ = parts(mock.token())
        forged = seal({"alg": "none"}, payload, None)
        assert jwt.decode(forged, mock.public_key(), algorithms=["none"]).claims["sub"] == "alice"
        for configured in (["RS256"], ["none"], ["none", "RS256"]):
            assert "its algorithm 'none'" in refused(options(mock, algorithms=configured), forged)

    @pytest.mark.parametrize("spelling", ["None", "NONE", "nOnE", "", None, 0, ["RS256"], {"RS256": 1}])
    def test_other_spellings_of_no_algorithm(self, mock: MockProvider, spelling: Any) -> None:
        _, payload, _ = parts(mock.token())
        assert "its algorithm" in refused(options(mock), seal({"alg": spelling}, payload, None))

    @pytest.mark.parametrize("name", ["HS256", "HS384", "HS512"])
    def test_a_shared_secret_that_is_the_public_key(self, mock: MockProvider, name: str) -> None:
        _, payload, _ = parts(mock.token())
        text = pem(mock.public_key())
        secret = OctKey(text, text)  # past the library's own check
        forged = seal({"alg": name}, payload, secret)
        assert jwt.decode(forged, secret, algorithms=[name]).claims["sub"] == "alice"
        for configured in (["RS256"], [name], [name, "RS256"]):
            assert f"its algorithm '{name}'" in refused(options(mock, algorithms=configured), forged)

    def test_an_algorithm_that_is_not_configured(self, mock: MockProvider) -> None:
        token = mock.token()
        assert "its algorithm 'RS256'" in refused(options(mock, algorithms=["ES256", "PS256"]), token)

    def test_changed_claims(self, mock: MockProvider) -> None:
        token = mock.token()
        header, payload, signature = token.split(".")
        changed = json.loads(parts(token)[1]) | {"sub": "admin"}
        body = base64.urlsafe_b64encode(json.dumps(changed).encode()).rstrip(b"=").decode()
        assert "signature" in refused(options(mock), f"{header}.{body}.{signature}")
        assert accepted(options(mock), f"{header}.{payload}.{signature}").subject == "user:alice"

    def test_a_key_of_somebody_else(self, mock: MockProvider) -> None:
        header, payload, _ = parts(mock.token())
        assert "signature" in refused(options(mock), seal(header, payload, RSAKey.generate_key(2048), name="RS256"))

    def test_the_key_rotates_while_running(self) -> None:
        """The provider starts anew with another key; its tokens name none, so the signature alone tells."""
        port = free_port()
        with ExitStack() as first_run:
            first = first_run.enter_context(mock_provider(port))
            old = first.token("alice")

            async def test(verifier: TokenVerifier) -> None:
                assert (await settled(verifier.identify(old))).subject == "user:alice"
                await asyncio.to_thread(first_run.close)
                with mock_provider(port) as second:
                    new = await asyncio.to_thread(second.token, "bob")
                    assert (await settled(verifier.identify(new))).subject == "user:bob"
                    with pytest.raises(Unauthenticated, match="signature"):
                        await settled(verifier.identify(old))

            run(options(first), test)

    def test_the_provider_is_down_at_the_start_and_comes(self) -> None:
        port = free_port()

        async def test(verifier: TokenVerifier) -> None:
            with pytest.raises(Refusal) as caught:
                await settled(verifier.identify(token))
            assert caught.value.status == 503
            assert caught.value.retry_after is not None
            assert caught.value.retry_after >= 1
            assert "Connection refused" in (caught.value.detail or "")
            with pytest.raises(Refusal):
                await verifier.metadata()
            with mock_provider(port) as provider:
                late = await asyncio.to_thread(provider.token, "alice")
                while True:  # by itself, within a few seconds
                    try:
                        found = await settled(verifier.identify(late))
                    except Refusal:
                        await asyncio.sleep(0.1)
                    else:
                        break
                assert found.subject == "user:alice"
                assert (await verifier.metadata())["token_endpoint"] == f"{provider.issuer}/oauth2/token"

        with mock_provider(port) as earlier:
            token = earlier.token()
        run(options(earlier), test)

    def test_the_provider_goes_away_later(self, caplog: pytest.LogCaptureFixture) -> None:
        with ExitStack() as first_run:
            provider = first_run.enter_context(mock_provider())
            tokens = [provider.token(user) for user in ("alice", "bob")]

            async def test(verifier: TokenVerifier) -> None:
                assert (await settled(verifier.identify(tokens[0]))).subject == "user:alice"
                await asyncio.to_thread(first_run.close)
                await until(lambda: "count on" in caplog.text)
                for token, user in zip(tokens, ("alice", "bob"), strict=True):
                    assert (await settled(verifier.identify(token))).subject == f"user:{user}"

            run(options(provider, keys_lifetime=0.2), test)
        assert "Connection refused" in caplog.text

    def test_the_id_token_of_a_sign_in(self, mock: MockProvider) -> None:
        async def test(verifier: TokenVerifier) -> None:
            token = await asyncio.to_thread(mock.token, "alice", {"groups": ["ml"]}, nonce="n-1")
            claims = await verifier.claims(token, audience=CLIENT, nonce="n-1")
            assert claims["sub"] == "alice"
            caller = verifier.caller_of(claims, way="session", credential="s-1")
            assert caller == Caller("user:alice", "session", frozenset({"ml"}), credential="s-1")
            for audience, nonce, why in ((CLIENT, "n-2", "nonce"), (CLIENT, "", "nonce"), ("other", "n-1", "audience")):
                with pytest.raises(Unauthenticated, match=why):
                    await verifier.claims(token, audience=audience, nonce=nonce)
            without = await asyncio.to_thread(mock.token)
            for nonce in ("n-1", ""):
                with pytest.raises(Unauthenticated, match="nonce"):
                    await verifier.claims(without, audience=CLIENT, nonce=nonce)

        run(options(mock, audience=["api://mlflow"], groups_claim="groups"), test)


KEYS: dict[str, Callable[[], Key]] = {
    "RS256": lambda: RSAKey.generate_key(2048),
    "PS384": lambda: RSAKey.generate_key(2048),
    "ES256": lambda: ECKey.generate_key("P-256"),
    "ES384": lambda: ECKey.generate_key("P-384"),
    "ES512": lambda: ECKey.generate_key("P-521"),
    "EdDSA": lambda: OKPKey.generate_key("Ed25519"),
}


class TestReady:
    """Whether there are keys, without a token."""

    def test_keys_at_an_address_of_their_own(self, issuer: Issuer) -> None:
        """Discovery is not asked, and need not be there."""
        del issuer.answers["/.well-known/openid-configuration"]
        run(options(issuer, jwks_url=f"{issuer.url}/jwks"), TokenVerifier.ready)
        assert set(issuer.asked) == {"/jwks"}

    def test_no_keys(self, issuer: Issuer) -> None:
        async def test(verifier: TokenVerifier) -> None:
            with pytest.raises(Refusal) as caught:
                await verifier.ready()
            assert caught.value.status == 503
            assert "/jwks answers 404" in (caught.value.detail or "")

        del issuer.answers["/jwks"]
        run(options(issuer, jwks_url=f"{issuer.url}/jwks"), test)


class TestTokens:
    """Tokens made just so, by an issuer of the test's own."""

    def test_a_good_one(self, issuer: Issuer) -> None:
        caller = accepted(options(issuer), issuer.token(groups=["ml"]))
        assert caller == Caller("user:alice", "token", credential="token-7")

    @pytest.mark.parametrize("name", sorted(KEYS))
    def test_every_kind_of_key(self, issuer: Issuer, name: str) -> None:
        key = issuer.publish(KEYS[name]())
        token = issuer.token({"alg": name}, key)
        assert accepted(options(issuer, algorithms=[name]), token).subject == "user:alice"
        assert "its algorithm" in refused(options(issuer, algorithms=sorted(SIGNATURE_ALGORITHMS - {name})), token)

    @pytest.mark.parametrize("jti", ["", "a\nb", "x" * 257, 7, None])
    def test_a_name_of_its_own_must_be_one(self, issuer: Issuer, jti: Any) -> None:
        assert accepted(options(issuer), issuer.token(jti=jti)).credential.startswith("sha256:")

    @pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", None])
    def test_types_that_count(self, issuer: Issuer, kind: str | None) -> None:
        assert accepted(options(issuer), issuer.token({"typ": kind})).subject == "user:alice"

    @pytest.mark.parametrize("kind", ["logout+jwt", "dpop+jwt", "secevent+jwt", "JOSE", "", 7, ["JWT"], "application/"])
    def test_types_that_do_not(self, issuer: Issuer, kind: Any) -> None:
        assert "its type" in refused(options(issuer), issuer.token({"typ": kind}))

    def test_an_access_token_signs_nobody_in(self, issuer: Issuer) -> None:
        async def test(verifier: TokenVerifier) -> None:
            good, other = (issuer.token({"typ": kind}, nonce="n") for kind in ("JWT", "at+jwt"))
            assert (await verifier.claims(good, audience=CLIENT, nonce="n"))["sub"] == "alice"
            with pytest.raises(Unauthenticated, match="type"):
                await verifier.claims(other, audience=CLIENT, nonce="n")

        run(options(issuer), test)

    def test_an_id_token_for_another_client(self, issuer: Issuer) -> None:
        async def test(verifier: TokenVerifier) -> None:
            both = [CLIENT, "other"]
            good = issuer.token(aud=both, azp=CLIENT, nonce="n")
            assert (await verifier.claims(good, audience=CLIENT, nonce="n"))["sub"] == "alice"
            cases: list[tuple[Any, dict[str, Any]]] = [
                (both, {"azp": "other"}),
                (CLIENT, {"azp": "other"}),
                (both, {"azp": [CLIENT]}),
                (both, {}),
                ([CLIENT, 1], {}),
            ]
            for aud, more in cases:
                with pytest.raises(Unauthenticated, match="azp"):
                    await verifier.claims(issuer.token(aud=aud, nonce="n", **more), audience=CLIENT, nonce="n")
            for alone in ([CLIENT], [CLIENT, CLIENT]):
                await verifier.claims(issuer.token(aud=alone, nonce="n"), audience=CLIENT, nonce="n")
            caller = verifier.identify(issuer.token(aud=both))  # an access token, by any client
            assert isinstance(caller, Caller)

        run(options(issuer), test)

    def test_an_empty_nonce_is_none(self, issuer: Issuer) -> None:
        async def test(verifier: TokenVerifier) -> None:
            with pytest.raises(Unauthenticated, match="nonce"):
                await verifier.claims(issuer.token(nonce=""), audience=CLIENT, nonce="")

        run(options(issuer), test)

    @pytest.mark.parametrize("audience", [[CLIENT], ["x", CLIENT], CLIENT])
    def test_audiences_that_count(self, issuer: Issuer, audience: Any) -> None:
        assert accepted(options(issuer), issuer.token(aud=audience)).subject == "user:alice"

    @pytest.mark.parametrize(
        "audience", [None, "", [], [[CLIENT]], {CLIENT: 1}, f"{CLIENT} x", CLIENT.upper(), 7, [None]]
    )
    def test_audiences_that_do_not(self, issuer: Issuer, audience: Any) -> None:
        assert "audience" in refused(options(issuer), issuer.token(aud=audience))

    @pytest.mark.parametrize("more", ["/", ".evil.example", "?", ""])
    def test_the_issuer_to_the_last_character(self, issuer: Issuer, more: str) -> None:
        token = issuer.token(iss=issuer.url + more)
        assert (outcome(options(issuer), token) == accepted(options(issuer), issuer.token())) == (not more)

    @pytest.mark.parametrize("value", [None, 7, True])
    def test_no_issuer(self, issuer: Issuer, value: Any) -> None:
        assert "issuer" in refused(options(issuer), issuer.token(iss=value))
        with pytest.raises(ValueError, match=r"oidc\.issuer"):
            TokenVerifier(Oidc())

    def test_not_yet_valid(self, issuer: Issuer) -> None:
        token = issuer.token(nbf=int(time.time()) + 120)
        assert "not yet valid" in refused(options(issuer), token)
        assert accepted(options(issuer), token, ahead=120).subject == "user:alice"

    @pytest.mark.parametrize(
        "expires", [None, "later", True, pytest.param(int(time.time() + HOUR) * 1000, id="milliseconds")]
    )
    def test_without_a_real_expiry(self, issuer: Issuer, expires: Any) -> None:
        token = issuer.token(exp=expires)
        assert "exp" in refused(options(issuer), token)

    def test_not_a_number_never_expires(self, issuer: Issuer) -> None:
        """Python's JSON reader takes NaN, and nothing is before it."""
        forged = seal({"alg": "RS256", "kid": issuer.key.get("kid")}, issuer.claims(exp=float("nan")), issuer.key)
        assert not json.loads(parts(forged)[1])["exp"] <= time.time()
        assert "not plain JSON" in refused(options(issuer), forged)

    def test_a_claim_twice(self, issuer: Issuer) -> None:
        """One reader takes the first, another the last; whoever checks must not take another than who uses."""
        claims = json.dumps(issuer.claims())
        doubled = (claims[:-1] + ', "sub": "admin"}').encode()
        header = {"alg": "RS256", "kid": issuer.key.get("kid")}
        forged = seal(header, doubled, issuer.key)
        assert jwt.decode(forged, issuer.key, algorithms=["RS256"]).claims["sub"] == "admin"
        assert "not plain JSON" in refused(options(issuer), forged)
        assert accepted(options(issuer), seal(header, claims.encode(), issuer.key)).subject == "user:alice"

    def test_a_header_twice(self, issuer: Issuer) -> None:
        header = f'{{"alg": "none", "alg": "RS256", "kid": "{issuer.key.get("kid")}"}}'.encode()
        forged = seal(header, issuer.claims(), issuer.key, name="RS256")
        assert jwt.decode(forged, issuer.key, algorithms=["RS256"]).claims["sub"] == "alice"
        assert "not plain JSON" in refused(options(issuer), forged)

    @pytest.mark.parametrize("extension", [{"crit": ["exp"], "exp": 1}, {"crit": []}, {"b64": True}, {"zip": "DEF"}])
    def test_extensions_that_must_be_understood(self, issuer: Issuer, extension: dict[str, Any]) -> None:
        assert "its header has" in refused(options(issuer), issuer.token(extension))

    def test_a_payload_that_is_not_encoded(self, issuer: Issuer) -> None:
        """RFC 7797: the same bytes are signed, but mean another text."""
        token = issuer.token({"b64": False, "crit": ["b64"]})
        assert "its header has" in refused(options(issuer), token)

    @pytest.mark.parametrize("place", ["jwk", "jku", "x5u", "x5c"])
    def test_a_key_that_the_token_brings_along(self, issuer: Issuer, place: str) -> None:
        theirs = RSAKey.generate_key(2048)
        with Issuer() as thief:
            values: dict[str, Any] = {
                "jwk": theirs.as_dict(private=False),
                "jku": f"{thief.url}/jwks",
                "x5u": f"{thief.url}/cert.pem",
                "x5c": [base64.b64encode(b"certificate").decode()],
            }
            header = {"alg": "RS256", "kid": issuer.key.get("kid"), place: values[place]}
            forged = seal(header, issuer.claims(), theirs)
            brought = JWKRegistry.import_key(theirs.as_dict(private=False))
            lax = JWSRegistry(algorithms=["RS256"])
            lax.max_header_length = LONGEST_TOKEN
            assert jwt.decode(forged, brought, registry=lax).claims["sub"] == "alice"
            assert "signature" in refused(options(issuer), forged)
            assert thief.asked == {}
        assert accepted(options(issuer), seal(header, issuer.claims(), issuer.key)).subject == "user:alice"

    def test_an_encrypted_token(self, issuer: Issuer) -> None:
        """Anybody can encrypt to a public key: that proves nothing."""
        header = {"alg": "RSA-OAEP", "enc": "A128GCM", "kid": str(issuer.key.get("kid"))}
        forged = jwe.encrypt_compact(header, json.dumps(issuer.claims()), issuer.key)
        lax = jwt.decode(forged, issuer.key, registry=jwe.JWERegistry())
        assert lax.claims["sub"] == "alice"
        assert "JWE" in refused(options(issuer), forged)
        shortened = ".".join(forged.split(".")[i] for i in (0, 3, 4))
        assert "its algorithm" in refused(options(issuer), shortened)

    def test_longer_than_any(self, issuer: Issuer) -> None:
        room = LONGEST_TOKEN - len(issuer.token(filler=""))
        fits, bursts = issuer.token(filler="x" * (room * 3 // 4 - 8)), issuer.token(filler="x" * (room * 3 // 4 + 8))
        assert len(fits) <= LONGEST_TOKEN < len(bursts)
        assert accepted(options(issuer), fits).subject == "user:alice"
        assert "longer than" in refused(options(issuer), bursts)

    @pytest.mark.parametrize("kid", [7, [], {}, True])
    def test_key_ids_that_are_none(self, issuer: Issuer, kid: Any) -> None:
        assert "key id" in refused(options(issuer), issuer.token({"kid": kid}))

    @pytest.mark.parametrize(
        "sent", ["", ".", "..", "a.b", "a.b.c.d", "é.é.é", "a.b.c\n", " a.b.c", "=.=.=", "e30.e30."]
    )
    def test_what_is_no_token(self, issuer: Issuer, sent: str) -> None:
        refused(options(issuer), sent)

    def test_padding_and_other_base64(self, issuer: Issuer) -> None:
        token = issuer.token({"x": "?" * 40})
        assert accepted(options(issuer), token).subject == "user:alice"
        padded = seal({"alg": "RS256", "kid": issuer.key.get("kid")}, issuer.claims(), issuer.key, padded=True)
        assert "=" in padded
        assert "base64url" in refused(options(issuer), padded)
        assert "base64url" in refused(options(issuer), token.replace("_", "/"))

    @pytest.mark.parametrize("nested", [b'{"a":' * 1500 + b"1" + b"}" * 1500, b"[" * 10000])
    def test_deep_json(self, issuer: Issuer, nested: bytes) -> None:
        with pytest.raises((RecursionError, ValueError)):
            json.loads(nested)
        assert "JSON" in refused(options(issuer), seal(nested, b"{}", None))
        header = {"alg": "RS256", "kid": issuer.key.get("kid")}
        assert "JSON" in refused(options(issuer), seal(header, nested, issuer.key))

    def test_a_signature_of_zeros(self, issuer: Issuer) -> None:
        """What some verifiers of ECDSA took for good (CVE-2022-21449)."""
        key = issuer.publish(ECKey.generate_key("P-256"))
        good = issuer.token(None, key)
        zeros = base64.urlsafe_b64encode(bytes(64)).rstrip(b"=").decode()
        for signature in (zeros, "", zeros[:-2]):
            assert "signature" in refused(options(issuer), f"{good.rpartition('.')[0]}.{signature}")
        assert accepted(options(issuer), good).subject == "user:alice"


class TestPublishedKeys:
    """Not every key that a provider publishes may sign a token."""

    @pytest.mark.parametrize(
        "change",
        [{"use": "enc"}, {"key_ops": ["encrypt"]}, {"alg": "RS512"}, {"alg": "RSA-OAEP"}],
        ids=json.dumps,
    )
    def test_keys_for_something_else(self, issuer: Issuer, change: dict[str, Any]) -> None:
        key = issuer.publish(RSAKey.generate_key(2048), **change)
        assert "is none of the provider's" in refused(options(issuer), issuer.token(None, key))
        same = issuer.publish(RSAKey.import_key(key.as_dict(private=True)), "for-signing", use="sig", alg="RS256")
        assert accepted(options(issuer), issuer.token(None, same)).subject == "user:alice"

    def test_a_secret_that_is_published(self, issuer: Issuer) -> None:
        secret = OctKey.generate_key(256)
        issuer.published.append({**secret.as_dict(), "kid": "shared"})
        forged = seal({"alg": "HS256", "kid": "shared"}, issuer.claims(), secret)
        assert "its algorithm" in refused(options(issuer, algorithms=["HS256", "RS256"]), forged)
        confused = seal({"alg": "RS256", "kid": "shared"}, issuer.claims(), secret, name="HS256")
        assert "is none of the provider's" in refused(options(issuer), confused)

    @pytest.mark.filterwarnings("ignore:Key size")
    def test_a_short_key(self, issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
        key = issuer.publish(RSAKey.generate_key(1024))
        assert "is none of the provider's" in refused(options(issuer), issuer.token(None, key))
        assert "less than 2048 bits" in caplog.text

    def test_a_curve_for_another_algorithm(self, issuer: Issuer) -> None:
        key = issuer.publish(ECKey.generate_key("P-384"))
        algorithms = ["ES256", "ES384"]
        for name in algorithms:  # with the hash of the other, and with its own
            confused = seal({"alg": "ES256", "kid": key.get("kid")}, issuer.claims(), key, name=name)
            assert "signature" in refused(options(issuer, algorithms=algorithms), confused)
        assert accepted(options(issuer, algorithms=algorithms), issuer.token(None, key)).subject == "user:alice"

    @pytest.mark.parametrize(
        "odd",
        [
            7,
            None,
            {},
            {"kty": "AKP", "kid": "pq"},
            {"kty": ["RSA"]},
            {"kty": "RSA", "n": 7, "e": "AQAB"},
            {"kty": "EC"},
        ],
        ids=json.dumps,
    )
    def test_one_odd_key_costs_no_other(self, issuer: Issuer, odd: Any) -> None:
        issuer.published.insert(0, odd)
        assert accepted(options(issuer), issuer.token()).subject == "user:alice"

    def test_without_a_key_id(self, issuer: Issuer) -> None:
        issuer.publish(RSAKey.generate_key(2048))
        assert accepted(options(issuer), issuer.token({"kid": None})).subject == "user:alice"
        stranger = RSAKey.generate_key(2048)
        assert "signature" in refused(options(issuer), issuer.token({"kid": None}, stranger))

    def test_so_many_keys_each_token_may_cost(self, issuer: Issuer) -> None:
        """Without a key id all keys of its kind would be tried, and strangers could make that work."""
        for _ in range(4):
            last = issuer.publish(RSAKey.generate_key(2048))
        assert "it names none (kid)" in refused(options(issuer), issuer.token({"kid": None}, last))
        assert accepted(options(issuer), issuer.token(None, last)).subject == "user:alice"

    def test_a_set_of_secrets_alone(self, issuer: Issuer) -> None:
        issuer.published[:] = [{**OctKey.generate_key(256).as_dict(), "kid": "shared"}]
        with pytest.raises(Refusal) as caught:
            outcome(options(issuer), issuer.token())
        assert "no key that can sign" in (caught.value.detail or "")

    @pytest.mark.parametrize(
        ("document", "why"),
        [
            ({"issuer": "https://evil.example", "jwks_uri": "{url}/jwks"}, "they must be the same"),
            ({"issuer": "{url}/", "jwks_uri": "{url}/jwks"}, "they must be the same"),
            ({"jwks_uri": "{url}/jwks"}, "they must be the same"),
            ({"issuer": "{url}"}, "names no jwks_uri"),
            ({"issuer": "{url}", "jwks_uri": 7}, "names no jwks_uri"),
            ({"issuer": "{url}", "jwks_uri": "http://keys.example.com/jwks"}, "not an https URL"),
            ({"issuer": "{url}", "jwks_uri": "{url}/nothing"}, "answers 404"),
            ({"issuer": "{url}", "jwks_uri": "{url}/empty"}, "no key that can sign"),
            ({"issuer": "{url}", "jwks_uri": "{url}/many"}, "at most 64 keys"),
            ({"issuer": "{url}", "jwks_uri": "{url}/no-set"}, "not a JWK set"),
        ],
    )
    def test_discovery_that_does_not_fit(self, issuer: Issuer, document: dict[str, Any], why: str) -> None:
        filled = {n: v.replace("{url}", issuer.url) if isinstance(v, str) else v for n, v in document.items()}
        issuer.answers["/.well-known/openid-configuration"] = json_answer(filled)
        issuer.answers["/empty"] = json_answer({"keys": []})
        issuer.answers["/many"] = json_answer({"keys": [issuer.published[0]] * 65})
        issuer.answers["/no-set"] = json_answer({"keys": issuer.published[0]})
        with pytest.raises(Refusal) as caught:
            outcome(options(issuer), issuer.token())
        assert caught.value.status == 503
        assert why in (caught.value.detail or "")

    def test_keys_without_discovery(self, issuer: Issuer) -> None:
        del issuer.answers["/.well-known/openid-configuration"]
        configured = options(issuer, jwks_url=f"{issuer.url}/jwks")
        assert accepted(configured, issuer.token()).subject == "user:alice"
        assert issuer.asked == {"/jwks": 1}

    def test_an_issuer_with_a_slash_at_its_end(self, issuer: Issuer) -> None:
        name = f"{issuer.url}/"
        issuer.answers["/.well-known/openid-configuration"] = json_answer(
            {"issuer": name, "jwks_uri": f"{issuer.url}/jwks"}
        )
        assert accepted(options(issuer, issuer=name), issuer.token(iss=name)).subject == "user:alice"


class TestRotationAndOutage:
    def test_a_new_key_is_fetched_at_once_and_the_old_one_ends(self, issuer: Issuer) -> None:
        old = issuer.token()

        async def test(verifier: TokenVerifier) -> None:
            await settled(verifier.identify(old))
            assert isinstance(verifier.identify(old), Caller)  # remembered
            issuer.rotate()
            assert isinstance(verifier.identify(old), Caller)  # nobody knows yet
            assert (await settled(verifier.identify(issuer.token(sub="bob")))).subject == "user:bob"
            assert issuer.asked["/jwks"] == 2
            with pytest.raises(Unauthenticated, match="is none of the provider's"):
                verifier.identify(old)

        run(options(issuer), test)

    def test_a_withdrawn_key_ends_without_any_new_token(self, issuer: Issuer) -> None:
        old = issuer.token()

        async def test(verifier: TokenVerifier) -> None:
            await settled(verifier.identify(old))
            issuer.rotate()
            before = issuer.asked["/jwks"]
            await until(lambda: issuer.asked["/jwks"] > before + 1)
            with pytest.raises(Unauthenticated, match="is none of the provider's"):
                await settled(verifier.identify(old))

        run(options(issuer, keys_lifetime=0.2), test)

    def test_a_key_that_is_added_ends_no_other(self, issuer: Issuer) -> None:
        async def test(verifier: TokenVerifier) -> None:
            old = issuer.token()
            await settled(verifier.identify(old))
            new = issuer.publish(ECKey.generate_key("P-256"))
            assert (await settled(verifier.identify(issuer.token(None, new, sub="bob")))).subject == "user:bob"
            assert (await settled(verifier.identify(old))).subject == "user:alice"

        run(options(issuer), test)

    def test_a_flood_of_invented_key_ids_costs_one_fetch(self, issuer: Issuer) -> None:
        uptime = Clock()

        def invented() -> str:
            return issuer.token({"kid": str(uuid.uuid4())})

        async def flood(verifier: TokenVerifier) -> None:
            async def one() -> None:
                with pytest.raises(Unauthenticated, match="is none of the provider's"):
                    await settled(verifier.identify(invented()))

            await asyncio.gather(*(one() for _ in range(60)))

        async def test(verifier: TokenVerifier) -> None:
            await settled(verifier.identify(issuer.token()))
            assert issuer.asked["/jwks"] == 1
            for _ in range(3):
                await flood(verifier)
            assert issuer.asked["/jwks"] == 2
            assert not isinstance(verifier.identify(issuer.token(sub="carol")), Awaitable)  # others go on meanwhile
            uptime.ahead += 11
            await flood(verifier)
            assert issuer.asked["/jwks"] == 3

        run(options(issuer), test, uptime=uptime)

    def test_without_the_least_interval_a_flood_is_a_flood(
        self, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the test above would see if the interval were missing."""
        monkeypatch.setattr(provider_keys, "_LEAST_INTERVAL", 0.0)

        async def test(verifier: TokenVerifier) -> None:
            await settled(verifier.identify(issuer.token()))
            for _ in range(5):
                with pytest.raises(Unauthenticated):
                    await settled(verifier.identify(issuer.token({"kid": str(uuid.uuid4())})))
            assert issuer.asked["/jwks"] == 6

        run(options(issuer), test)

    def test_requests_that_wait_share_one_fetch_and_may_give_up(self, issuer: Issuer) -> None:
        issuer.held = threading.Event()

        async def test(verifier: TokenVerifier) -> None:
            waiting = [asyncio.ensure_future(settled(verifier.identify(issuer.token()))) for _ in range(20)]
            await until(lambda: sum(issuer.asked.values()) == 1)
            waiting[0].cancel()
            await asyncio.sleep(0)
            assert issuer.held is not None
            issuer.held.set()
            callers = await asyncio.gather(*waiting[1:])
            assert {caller.subject for caller in callers} == {"user:alice"}
            assert issuer.asked == {"/.well-known/openid-configuration": 1, "/jwks": 1}

        run(options(issuer), test)

    def test_old_keys_count_through_an_outage_but_not_for_ever(
        self, issuer: Issuer, caplog: pytest.LogCaptureFixture
    ) -> None:
        uptime = Clock()
        caplog.set_level(logging.INFO)

        async def test(verifier: TokenVerifier) -> None:
            remembered, other = issuer.token(), issuer.token(sub="bob")
            await settled(verifier.identify(remembered))
            issuer.answers["/jwks"] = Answer(b"", 503)
            await until(lambda: "answers 503" in caplog.text)
            uptime.ahead += 23 * HOUR
            assert (await settled(verifier.identify(other))).subject == "user:bob"
            issuer.rotate()
            for _ in range(2):  # asked in vain, so its key may be a new one: no mistake of the caller's
                with pytest.raises(Refusal) as caught:
                    await settled(verifier.identify(issuer.token()))
                assert caught.value.status == 503
            assert isinstance(verifier.identify(remembered), Caller)
            uptime.ahead += 2 * HOUR
            await until(lambda: "no longer count" in caplog.text)
            with pytest.raises(Refusal) as caught:
                await settled(verifier.identify(remembered))
            assert caught.value.status == 503
            del issuer.answers["/jwks"]

        run(options(issuer, keys_lifetime=0.2), test, uptime=uptime)

    def test_an_unknown_token_costs_no_wait_while_the_provider_is_known_to_be_away(self, issuer: Issuer) -> None:
        issuer.answers["/jwks"] = Answer(b"", 500)
        uptime = Clock()

        async def test(verifier: TokenVerifier) -> None:
            with pytest.raises(Refusal):
                await settled(verifier.identify(issuer.token()))
            with pytest.raises(Refusal):
                await settled(verifier.identify(issuer.token()))
            await asyncio.sleep(0)
            asked = issuer.asked["/jwks"]
            for _ in range(10):
                with pytest.raises(Refusal, match="does not answer"):
                    verifier.identify(issuer.token())
            assert issuer.asked["/jwks"] == asked

        run(options(issuer), test, uptime=uptime)

    def test_what_was_verified_is_remembered_until_it_expires(self, issuer: Issuer) -> None:
        clock = Clock()
        token = issuer.token()

        async def test(verifier: TokenVerifier) -> None:
            first = await settled(verifier.identify(token))
            assert verifier.identify(token) is first
            clock.ahead = HOUR + 31
            with pytest.raises(Unauthenticated, match="expired"):
                await settled(verifier.identify(token))

        run(options(issuer), test, clock=clock)

    def test_secrets_stay_out_of_log_and_reasons(self, issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        token = issuer.token({"kid": "k\n\x1b[31m"})
        why = refused(options(issuer), token)
        assert why.isprintable()
        for text in (caplog.text, why):
            assert not any(part in text for part in token.split("."))


HEADERS = st.dictionaries(
    st.sampled_from(["alg", "kid", "typ", "crit", "jwk", "x"]),
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=6)
    | st.sampled_from(["RS256", "none", "JWT", "at+jwt"]),
    max_size=5,
)
CLAIMS = st.dictionaries(
    st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "jti", "groups", "_claim_names"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.text(max_size=3)),
    max_size=6,
)


@pytest.fixture(scope="module")
def steady() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.text() | st.binary().map(lambda b: b.decode("latin-1")), max_size=4),
    headers=HEADERS,
    claims=CLAIMS,
)
def test_garbage_never_ends_in_anything_but_a_refusal(
    steady: Issuer, texts: list[str], headers: dict[str, Any], claims: dict[str, Any]
) -> None:
    """Both what cannot be read at all, and what a key has signed although it makes no sense."""
    known = {"alg": "RS256", "kid": steady.key.get("kid")}
    sent = [*texts, ".".join(texts), seal(known | headers, steady.claims() | claims, steady.key, name="RS256")]

    async def test(verifier: TokenVerifier) -> None:
        for token in sent:
            try:
                sound = (await settled(verifier.identify(token))).subject
            except Unauthenticated as failure:
                sound = failure.reason
            assert sound.isprintable()

    run(options(steady, groups_claim="groups"), test)


def test_algorithms_are_those_of_the_library_with_a_public_key() -> None:
    """So that a new one is looked at before it counts."""
    public = {name for name, model in JWSRegistry.algorithms.items() if model.key_type != "oct"}
    assert public - SIGNATURE_ALGORITHMS == {"ES256K", "Ed25519", "Ed448"}
    assert public >= SIGNATURE_ALGORITHMS
    assert {algorithm_of(make()) for make in KEYS.values()} < SIGNATURE_ALGORITHMS
