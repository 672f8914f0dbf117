"""The header of an AWS load balancer: made as AWS makes it, with keys from a server, and forged in every part."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, Key, OctKey, RSAKey
from joserfc.jws import JWSRegistry
from tests.access.provider import Answer, Documents, pem, seal

from mlflow_proxy.access import load_balancer as module
from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.load_balancer import LoadBalancerIdentity, default_key_endpoint
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import LoadBalancer

ARN = "arn:aws:elasticloadbalancing:eu-central-1:111122223333:loadbalancer/app/mlflow/50dc6c495c0c9188"
OTHER_ARN = "arn:aws:elasticloadbalancing:eu-central-1:444455556666:loadbalancer/app/mlflow/60dc6c495c0c9188"
KID = "12345678-1234-1234-1234-123456789012"
ISSUER, CLIENT = "https://idp.example.com", "alb-client"


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Region(Documents):
    """The place of a region's public keys, and what its load balancers sign."""

    def __init__(self) -> None:
        super().__init__()
        self.key = ECKey.generate_key("P-256")
        self.publish(KID, self.key)

    def publish(self, kid: str, key: Key) -> None:
        self.answers[f"/{kid}"] = Answer(pem(key))

    def header(self, **more: Any) -> dict[str, Any]:
        """What AWS puts into the token's header; None takes something away."""
        header = {
            "typ": "JWT",
            "kid": KID,
            "alg": "ES256",
            "iss": ISSUER,
            "client": CLIENT,
            "signer": ARN,
            "exp": int(time.time()) + 120,
        } | more
        return {name: value for name, value in header.items() if value is not None}

    def claims(self, **more: Any) -> dict[str, Any]:
        claims = {
            "sub": "00u1",
            "email": "alice@example.com",
            "email_verified": "true",
            "username": "alice",
            "groups": ["ml"],
            "exp": int(time.time()) + 120,
            "iss": ISSUER,
        } | more
        return {name: value for name, value in claims.items() if value is not None}

    def data(self, header: Mapping[str, Any] | None = None, key: Key | None = None, **claims: Any) -> str:
        return seal(self.header(**(header or {})), self.claims(**claims), key or self.key, padded=True)


@pytest.fixture
def region() -> Iterator[Region]:
    with Region() as running:
        yield running


def options(region: Region, **more: Any) -> LoadBalancer:
    return LoadBalancer(**{"arn": ARN, "key_endpoint": region.url, **more})


async def settled(found: Caller | Awaitable[Caller]) -> Caller:
    return found if isinstance(found, Caller) else await found


def run(
    configured: LoadBalancer,
    test: Callable[[LoadBalancerIdentity], Coroutine[Any, Any, None]],
    *,
    clock: Callable[[], float] = time.time,
    uptime: Callable[[], float] = time.monotonic,
) -> None:
    async def main() -> None:
        identity = LoadBalancerIdentity(configured, clock=clock, uptime=uptime)
        await identity.start()
        try:
            await test(identity)
        finally:
            await identity.close()

    asyncio.run(main())


def outcome(configured: LoadBalancer, data: str, *, ahead: float = 0.0) -> Caller | str:
    """The caller whom a fresh object takes the header for, or why it does not."""
    clock = Clock()
    clock.ahead = ahead
    found: list[Caller | str] = []

    async def test(identity: LoadBalancerIdentity) -> None:
        try:
            found.append(await settled(identity.identify(data)))
        except Unauthenticated as failure:
            found.append(failure.reason)

    run(configured, test, clock=clock)
    return found[0]


def accepted(configured: LoadBalancer, data: str, *, ahead: float = 0.0) -> Caller:
    found = outcome(configured, data, ahead=ahead)
    assert isinstance(found, Caller), found
    return found


def refused(configured: LoadBalancer, data: str, *, ahead: float = 0.0) -> str:
    found = outcome(configured, data, ahead=ahead)
    assert isinstance(found, str), found
    return found


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.02)


class TestWhatCounts:
    def test_a_header_as_aws_makes_it(self, region: Region) -> None:
        data = region.data()
        header, payload, signature = data.split(".")
        assert signature.endswith("==")
        assert len(header) % 4 == len(payload) % 4 == 0
        with pytest.raises(JoseError):  # why the library's own reader is of no use here
            jwt.decode(data, region.key, algorithms=["ES256"])
        caller = accepted(options(region), data)
        assert (caller.subject, caller.way, caller.groups) == ("user:00u1", "load-balancer", frozenset())
        assert caller.credential.startswith("sha256:")

    def test_the_signature_is_over_the_padding_too(self, region: Region) -> None:
        """Checked with cryptography alone: what the padding is taken away from verifies no longer."""
        data = region.data(x="a")
        signed, _, encoded = data.rpartition(".")
        raw = base64.urlsafe_b64decode(encoded)
        signature = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
        region.key.public_key.verify(signature, signed.encode(), ec.ECDSA(hashes.SHA256()))
        accepted(options(region), data)
        if "=" in signed:
            assert "signature" in refused(options(region), f"{signed.replace('=', '')}.{encoded}")

    @pytest.mark.parametrize("length", range(3))
    def test_any_padding_and_none(self, region: Region, length: int) -> None:
        padded = region.data({"x": "x" * length}, name="x" * length)
        bare = seal(region.header(x="x" * length), region.claims(), region.key)
        assert "=" not in bare
        for data in (padded, bare):
            assert accepted(options(region), data).subject == "user:00u1"

    def test_user_and_groups_by_the_configured_claims(self, region: Region) -> None:
        caller = accepted(options(region, user_claim="email", groups_claim="groups"), region.data())
        assert (caller.subject, caller.groups) == ("user:alice@example.com", frozenset({"ml"}))

    def test_an_email_that_is_not_verified(self, region: Region) -> None:
        data = region.data(email_verified="false")
        assert "not verified" in refused(options(region, user_claim="email"), data)

    def test_issuer_and_client(self, region: Region) -> None:
        configured = options(region, issuer=ISSUER, client_id=CLIENT)
        assert accepted(configured, region.data()).subject == "user:00u1"
        for name, value in (("iss", "https://evil.example"), ("client", "other"), ("iss", None), ("client", None)):
            data = region.data({name: value})
            assert f"its {name} is" in refused(configured, data)
            assert accepted(options(region), data).subject == "user:00u1"

    def test_what_was_verified_is_remembered_until_it_expires(self, region: Region) -> None:
        clock = Clock()

        async def test(identity: LoadBalancerIdentity) -> None:
            data = region.data()
            first = await settled(identity.identify(data))
            assert identity.identify(data) is first
            assert isinstance(identity.identify(region.data(sub="00u2")), Caller)  # its key is at hand
            assert region.asked == {f"/{KID}": 1}
            clock.ahead = 151
            with pytest.raises(Unauthenticated, match="expired"):
                identity.identify(data)

        run(options(region), test, clock=clock)

    def test_without_an_arn_nobody(self) -> None:
        with pytest.raises(ValueError, match=r"load_balancer\.arn"):
            LoadBalancerIdentity(LoadBalancer())

    def test_where_keys_are(self) -> None:
        assert default_key_endpoint(ARN) == "https://public-keys.auth.elb.eu-central-1.amazonaws.com"
        for place in ("us-gov-west-1", "us-gov-east-1"):
            arn = f"arn:aws-us-gov:elasticloadbalancing:{place}:111122223333:loadbalancer/app/mlflow/50dc6c495c0c9188"
            expected = f"https://s3-{place}.amazonaws.com/aws-elb-public-keys-prod-{place}"
            assert default_key_endpoint(arn) == expected


class TestForgeries:
    @pytest.mark.parametrize("signer", [OTHER_ARN, ARN.upper(), f"{ARN}x", "", None, 7, [ARN]])
    def test_another_load_balancer(self, region: Region, signer: Any) -> None:
        """Anybody can have a load balancer in the region, whose keys are published in the same place."""
        data = region.data({"signer": signer})
        assert "its signer is" in refused(options(region), data)
        assert region.asked == {}
        if signer == OTHER_ARN:
            assert accepted(options(region, arn=OTHER_ARN), data).subject == "user:00u1"

    def test_a_signer_that_was_changed_afterwards(self, region: Region) -> None:
        theirs = region.data({"signer": OTHER_ARN})
        header = base64.urlsafe_b64encode(json.dumps(region.header()).encode()).decode()
        forged = ".".join([header, *theirs.split(".")[1:]])
        assert "signature" in refused(options(region), forged)

    @pytest.mark.parametrize("name", ["none", "None", "HS256", "RS256", "ES384", "", None])
    def test_another_algorithm(self, region: Region, name: str | None) -> None:
        text = pem(region.key)
        secret = OctKey(text, text)
        header = region.header() | {"alg": name}
        forged = seal(header, region.claims(), secret if name == "HS256" else None, padded=True)
        if name == "HS256":
            bare = seal(header, region.claims(), secret)
            lax = JWSRegistry(algorithms=["HS256"], strict_check_header=False)
            assert jwt.decode(bare, secret, registry=lax).claims["sub"] == "00u1"
        assert "its algorithm" in refused(options(region), forged)
        assert region.asked == {}

    @pytest.mark.parametrize(
        "kid",
        [
            "../../latest/meta-data/",
            f"../{KID}",
            f"{KID}/..",
            f"{KID}?x",
            f"{KID}#",
            f"{KID}\n",
            f"x@127.0.0.1/{KID}",
            "%2e%2e%2f" + KID,
            KID[:-1],
            KID + "0",
            KID.replace("-", ""),
            "\uff112345678-1234-1234-1234-123456789012",
            "",
            None,
            7,
            [KID],
        ],
        ids=ascii,
    )
    def test_a_key_id_that_leads_elsewhere(self, region: Region, kid: Any) -> None:
        """It becomes part of a URL: the key would come from where the forger wants."""
        theirs = ECKey.generate_key("P-256")
        region.answers.update({f"/{kid}": Answer(pem(theirs)), "/latest/meta-data/": Answer(pem(theirs))})
        forged = region.data({"kid": kid}, theirs)
        assert "not a UUID" in refused(options(region), forged)
        assert region.asked == {}
        good = str(uuid.uuid4())
        region.publish(good, theirs)  # the same, with an id that is one
        assert accepted(options(region), region.data({"kid": good}, theirs)).subject == "user:00u1"

    def test_an_expired_header(self, region: Region) -> None:
        now = int(time.time())
        data = region.data({"exp": now - 60}, exp=now + 3600)
        assert "the load balancer's header expired" in refused(options(region), data)
        assert region.asked == {}
        assert accepted(options(region, leeway=90), data).subject == "user:00u1"

    def test_an_expired_payload(self, region: Region) -> None:
        now = int(time.time())
        data = region.data({"exp": now + 3600}, exp=now - 60)
        assert "the token expired" in refused(options(region), data)
        assert accepted(options(region, leeway=90), data).subject == "user:00u1"

    def test_the_earlier_of_both_ends_it(self, region: Region) -> None:
        now = int(time.time())
        for data in (region.data({"exp": now + 600}), region.data(exp=now + 600), region.data(exp=None)):
            assert accepted(options(region), data, ahead=100).subject == "user:00u1"
            assert "expired" in refused(options(region), data, ahead=160)

    def test_the_earlier_of_both_ends_what_is_remembered(self, region: Region) -> None:
        clock = Clock()
        now = int(time.time())

        async def test(identity: LoadBalancerIdentity) -> None:
            data = region.data({"exp": now + 3600}, exp=now + 100)
            await settled(identity.identify(data))
            clock.ahead = 140
            with pytest.raises(Unauthenticated, match="expired"):
                identity.identify(data)

        run(options(region), test, clock=clock)

    @pytest.mark.parametrize("expires", [None, "expiration", True, 0])
    def test_a_header_without_a_real_expiry(self, region: Region, expires: Any) -> None:
        assert "exp" in refused(options(region), region.data({"exp": expires}))

    def test_changed_claims(self, region: Region) -> None:
        header, payload, signature = region.data().split(".")
        body = base64.urlsafe_b64encode(json.dumps(region.claims(sub="admin")).encode()).decode()
        assert "signature" in refused(options(region), f"{header}.{body}.{signature}")
        assert accepted(options(region), f"{header}.{payload}.{signature}").subject == "user:00u1"

    def test_a_key_of_somebody_else(self, region: Region) -> None:
        assert "signature" in refused(options(region), region.data(None, ECKey.generate_key("P-256")))

    @pytest.mark.parametrize("size", [0, 32, 63, 64, 65, 128])
    def test_signatures_of_zeros(self, region: Region, size: int) -> None:
        signed = region.data().rpartition(".")[0]
        forged = f"{signed}.{base64.urlsafe_b64encode(bytes(size)).decode()}"
        assert "signature" in refused(options(region), forged)

    @pytest.mark.parametrize("extension", [{"crit": ["exp"]}, {"b64": False}, {"typ": "at+jwt"}])
    def test_headers_that_aws_does_not_write(self, region: Region, extension: dict[str, Any]) -> None:
        refused(options(region), region.data(extension))
        assert region.asked == {}

    def test_a_claim_twice(self, region: Region) -> None:
        claims = json.dumps(region.claims())
        doubled = (claims[:-1] + ', "sub": "admin"}').encode()
        assert "not plain JSON" in refused(options(region), seal(region.header(), doubled, region.key, padded=True))
        once = seal(region.header(), claims.encode(), region.key, padded=True)
        assert accepted(options(region), once).subject == "user:00u1"

    @pytest.mark.parametrize(
        "sent", ["", ".", "..", "a.b.c", "====.====.====", "e30=.e30=.", "é.é.é", "x" * 20000, "e30.e30.e30.e30.e30"]
    )
    def test_what_is_no_token(self, region: Region, sent: str) -> None:
        refused(options(region), sent)

    @pytest.mark.parametrize("odd", ["e30==", "e3=0", "e30=e30=", "=e30", "e30\n", "e+/0"])
    def test_padding_in_wrong_places(self, region: Region, odd: str) -> None:
        header, payload, signature = region.data().split(".")
        for sent in (f"{odd}.{payload}.{signature}", f"{header}.{odd}.{signature}", f"{header}.{payload}.{odd}"):
            assert "base64url" in refused(options(region), sent)


class TestKeys:
    def test_a_key_id_in_capitals_is_the_same(self, region: Region) -> None:
        kid = "abcdef01-2345-6789-abcd-ef0123456789"
        region.publish(kid, region.key)

        async def test(identity: LoadBalancerIdentity) -> None:
            for name in (kid, kid.upper()):
                data = region.data({"kid": name})
                assert (await settled(identity.identify(data))).subject == "user:00u1"
            assert region.asked == {f"/{kid}": 1}

        run(options(region), test)

    def test_a_key_that_does_not_exist(self, region: Region) -> None:
        for status in (403, 404):
            kid = str(uuid.uuid4())
            region.answers[f"/{kid}"] = Answer(b"", status)
            assert "is not among the public keys" in refused(options(region), region.data({"kid": kid}))

    def test_it_is_remembered_for_a_while(self, region: Region) -> None:
        uptime, kid = Clock(), str(uuid.uuid4())
        data = region.data({"kid": kid})

        async def test(identity: LoadBalancerIdentity) -> None:
            for _ in range(20):
                with pytest.raises(Unauthenticated, match="is not among the public keys"):
                    await settled(identity.identify(data))
            assert region.asked == {f"/{kid}": 1}
            region.publish(kid, region.key)
            uptime.ahead += 31
            assert (await settled(identity.identify(data))).subject == "user:00u1"

        run(options(region), test, uptime=uptime)

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(b"", 500),
            Answer(b"no PEM"),
            Answer(b"\xff" * 100),
            Answer(pem(RSAKey.generate_key(2048))),
            Answer(pem(ECKey.generate_key("P-384"))),
            Answer(ECKey.generate_key("P-256").as_pem(private=True)),
            Answer(b"", 302, {"Location": "https://evil.example/key"}),
        ],
        ids=["500", "text", "bytes", "RSA", "P-384", "private", "redirect"],
    )
    def test_an_answer_that_is_no_key(self, region: Region, answer: Answer) -> None:
        region.answers[f"/{KID}"] = answer
        with pytest.raises(Refusal) as caught:
            outcome(options(region), region.data())
        assert caught.value.status == 503
        assert caught.value.retry_after
        assert KID in (caught.value.detail or "")

    def test_the_place_of_the_keys_is_down_and_comes_back(self, region: Region) -> None:
        uptime = Clock()

        async def test(identity: LoadBalancerIdentity) -> None:
            region.answers[f"/{KID}"] = Answer(b"", 503)
            data = region.data()
            with pytest.raises(Refusal, match="cannot be fetched"):
                await settled(identity.identify(data))
            region.publish(KID, region.key)
            assert (await settled(identity.identify(data))).subject == "user:00u1"
            region.answers[f"/{KID}"] = Answer(b"", 503)  # whose keys are known goes on
            assert (await settled(identity.identify(region.data(sub="00u2")))).subject == "user:00u2"

        run(options(region), test, uptime=uptime)

    def test_nobody_there(self) -> None:
        with Region() as gone:
            configured, data = options(gone), gone.data()
        with pytest.raises(Refusal) as caught:
            outcome(configured, data)
        assert "Connection refused" in (caught.value.detail or "")

    def test_a_flood_of_invented_key_ids(self, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
        uptime = Clock()

        async def flood(identity: LoadBalancerIdentity) -> None:
            async def one() -> None:
                with pytest.raises((Unauthenticated, Refusal)):
                    await settled(identity.identify(region.data({"kid": str(uuid.uuid4())})))

            await asyncio.gather(*(one() for _ in range(50)))

        async def test(identity: LoadBalancerIdentity) -> None:
            await settled(identity.identify(region.data()))
            await flood(identity)
            assert region.asked.total() == 5
            assert isinstance(identity.identify(region.data(sub="00u2")), Caller)  # the true one goes on meanwhile
            uptime.ahead += 11
            await flood(identity)
            assert region.asked.total() == 10
            monkeypatch.setattr(module, "_WINDOW", 0.0)  # without the bound, a flood is a flood
            await flood(identity)
            assert region.asked.total() == 60

        run(options(region), test, uptime=uptime)

    def test_requests_that_wait_share_one_fetch_and_may_give_up(self, region: Region) -> None:
        region.held = threading.Event()

        async def test(identity: LoadBalancerIdentity) -> None:
            datas = [region.data(sub=f"user-{number}") for number in range(20)]
            waiting = [asyncio.ensure_future(settled(identity.identify(data))) for data in datas]
            await until(lambda: region.asked.total() == 1)
            waiting[0].cancel()
            await asyncio.sleep(0)
            assert region.held is not None
            region.held.set()
            callers = await asyncio.gather(*waiting[1:])
            assert len({caller.subject for caller in callers}) == 19
            assert region.asked == {f"/{KID}": 1}

        run(options(region), test)

    def test_those_who_wait_at_the_end_are_told(self, region: Region) -> None:
        region.held = threading.Event()

        async def test(identity: LoadBalancerIdentity) -> None:
            waiting = asyncio.ensure_future(settled(identity.identify(region.data())))
            await until(lambda: region.asked.total() == 1)
            await identity.close()
            with pytest.raises(Refusal):
                await waiting

        run(options(region), test)
        region.held.set()

    def test_the_least_used_key_goes_first(self, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MOST_KEYS", 3)
        monkeypatch.setattr(module, "_WINDOW", 0.0)
        kids = [str(uuid.uuid4()) for _ in range(4)]
        for kid in kids:
            region.publish(kid, region.key)

        async def test(identity: LoadBalancerIdentity) -> None:
            for number, kid in enumerate(kids):
                await settled(identity.identify(region.data()))
                await settled(identity.identify(region.data(sub=f"x{number}")))  # the true key is in use all along
                await settled(identity.identify(region.data({"kid": kid})))
            assert region.asked == {f"/{KID}": 1} | {f"/{kid}": 1 for kid in kids}
            await settled(identity.identify(region.data({"kid": kids[0]}, sub="again")))
            assert region.asked[f"/{kids[0]}"] == 2

        run(options(region), test)

    def test_a_key_is_fetched_again_after_a_day(self, region: Region) -> None:
        uptime = Clock()

        async def test(identity: LoadBalancerIdentity) -> None:
            await settled(identity.identify(region.data()))
            uptime.ahead = 25 * 3600
            del region.answers[f"/{KID}"]
            with pytest.raises(Unauthenticated, match="is not among the public keys"):
                await settled(identity.identify(region.data(sub="00u2")))

        run(options(region), test, uptime=uptime)


@pytest.fixture(scope="module")
def steady() -> Iterator[Region]:
    with Region() as running:
        yield running


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.text(max_size=3))


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text() | st.binary().map(lambda b: b.decode("latin-1")), max_size=4),
    header=st.dictionaries(st.sampled_from(["alg", "signer", "exp", "typ", "x"]), JSON, max_size=3),
    claims=st.dictionaries(st.sampled_from(["sub", "exp", "groups", "nbf"]), JSON, max_size=4),
)
def test_garbage_never_ends_in_anything_but_a_refusal(
    steady: Region, texts: list[str], header: dict[str, Any], claims: dict[str, Any]
) -> None:
    sealed = seal(steady.header() | header, steady.claims() | claims, steady.key, name="ES256", padded=True)
    for data in (*texts, ".".join(texts), sealed):
        found = outcome(options(steady, groups_claim="groups"), data)
        assert (found.subject if isinstance(found, Caller) else found).isprintable()
