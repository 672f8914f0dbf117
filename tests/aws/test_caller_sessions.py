"""Role sessions of callers: obtained when they are needed, kept while they are used, and never too many of them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError
from tests.aws.stores import STATIC, a_target, run, setenv, until

from mlflow_proxy.aws import credentials as module
from mlflow_proxy.aws import sessions, sources
from mlflow_proxy.aws.credentials import Credentials, CredentialStore, CredentialsUnavailable
from mlflow_proxy.aws.role_sessions import RoleSession, role_session
from mlflow_proxy.settings import Aws, RoleSettings
from mlflow_proxy.targets import Target

if TYPE_CHECKING:
    from tests.aws.conftest import CredentialSource

    from mlflow_proxy.local import LocalSageMaker

pytestmark = pytest.mark.usefixtures("no_credentials")

ARN = "arn:aws:iam::444455556666:role/people"
TARGET = a_target()
REGION = TARGET.arn.region


def a_role(**more: object) -> RoleSettings:
    return RoleSettings.model_validate({"name": "writer", "targets": ["*"], "assume_role_arn": ARN} | more)


def session(caller: str = "alice", /, **more: object) -> RoleSession:
    return role_session(a_role(**more), f"user:{caller}", REGION)


async def obtained(store: CredentialStore, wanted: RoleSession, target: Target = TARGET) -> Credentials:
    """What a request does before it is signed."""
    pending = store.obtain(target, wanted)
    if pending is not None:
        await pending
    return store.get(target, wanted)


async def refusal(store: CredentialStore, wanted: RoleSession) -> str:
    with pytest.raises(CredentialsUnavailable) as caught:
        await obtained(store, wanted)
    return caught.value.reason


@pytest.fixture
def aws(source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """Static keys as the base, and the STS of `source`."""
    setenv(monkeypatch, **STATIC)
    return Aws(sts_endpoint=source.url)


class TestWhatIsAsked:
    def test_all(self, source: CredentialSource, aws: Aws) -> None:
        wanted = session(session_tags=True, source_identity=True, external_id="customer-7")
        source.external_id = "customer-7"

        async def test(store: CredentialStore) -> None:
            found = await obtained(store, wanted)
            assert (found.access_key[:7], found.provider) == ("ASIASTS", "assume-role")

        run(test, aws=aws)
        (asked,) = source.roles_asked
        assert asked == {
            "Action": "AssumeRole",
            "Version": "2011-06-15",
            "RoleArn": ARN,
            "RoleSessionName": wanted.session_name,
            "ExternalId": "customer-7",
            "SourceIdentity": wanted.session_name,
            "Tags.member.1.Key": "caller",
            "Tags.member.1.Value": "user:alice",
            "Tags.member.2.Key": "role",
            "Tags.member.2.Value": "writer",
        }

    def test_nothing_that_is_not_configured(self, source: CredentialSource, aws: Aws) -> None:
        async def test(store: CredentialStore) -> None:
            await obtained(store, session())

        run(test, aws=aws)
        assert sorted(source.roles_asked[0]) == ["Action", "RoleArn", "RoleSessionName", "Version"]

    def test_the_callers_role_takes_the_place_of_the_targets(self, source: CredentialSource, aws: Aws) -> None:
        target = a_target(role="arn:aws:iam::444455556666:role/mlflow")

        async def test(store: CredentialStore) -> None:
            assert await obtained(store, session(), target) != store.get(target)

        run(test, target, aws=aws)
        assert [asked["RoleArn"] for asked in source.roles_asked] == [target.assume_role_arn, ARN]
        assert set(source.signed_by) == {"AKIASTATIC"}

    def test_moto_knows_the_session_by_its_name(self, moto_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        aws = Aws(sts_endpoint=moto_url)
        wanted = session("Jörg, alice", session_tags=True, source_identity=True)

        async def test(store: CredentialStore) -> None:
            found = await obtained(store, wanted)
            arn = await asyncio.to_thread(sessions.caller_identity, found, aws, region=REGION)
            assert arn == f"arn:aws:sts::444455556666:assumed-role/people/{wanted.session_name}"

        run(test, aws=aws)

    def test_one_client_while_the_base_is_the_same(self, aws: Aws) -> None:
        sts = sessions.Sts(aws)
        one, other = (Credentials(key, "secret", None, None, "env") for key in ("AKIAONE", "AKIAOTHER"))
        client = sts._client(REGION, one)
        assert sts._client(REGION, one) is client
        assert sts._client("us-east-1", one) is not client
        assert sts._client(REGION, other) is not client
        assert sts._client(REGION, one) is not client


class TestWhoShares:
    def test_nothing_to_do_without_a_session(self, source: CredentialSource, aws: Aws) -> None:
        async def test(store: CredentialStore) -> None:
            assert store.obtain(TARGET, None) is None
            assert store.get(TARGET, None).access_key == "AKIASTATIC"

        run(test, aws=aws)
        assert source.roles_asked == []

    def test_get_never_fetches(self, source: CredentialSource, aws: Aws) -> None:
        async def test(store: CredentialStore) -> None:
            with pytest.raises(CredentialsUnavailable, match="not fetched yet"):
                store.get(TARGET, session())

        run(test, aws=aws)
        assert source.roles_asked == []

    def test_a_caller_keeps_theirs(self, source: CredentialSource, aws: Aws) -> None:
        async def test(store: CredentialStore) -> None:
            first = await obtained(store, session())
            assert store.obtain(TARGET, session()) is None
            assert store.get(TARGET, session()) == first
            other_target = a_target("other")
            assert store.get(other_target, session()) == first

        run(test, TARGET, a_target("other"), aws=aws)
        assert source.asked == {"sts": 1}

    def test_callers_and_roles_do_not(self, source: CredentialSource, aws: Aws) -> None:
        wanted = [
            session("alice"),
            session("bob"),
            session("a,b"),
            session("a;b"),
            session(session_tags=True),
            session(session_tags=True, name="reader"),
            session(source_identity=True),
            session(external_id="customer-7"),
            role_session(a_role(), "key:alice", REGION),
            role_session(a_role(), "user:alice", "us-east-1"),
        ]

        async def test(store: CredentialStore) -> None:
            found = await asyncio.gather(*(obtained(store, each) for each in wanted))
            assert len({each.access_key for each in found}) == len(wanted)

        run(test, aws=aws)

    def test_the_role_is_assumed_once_for_many_requests(self, source: CredentialSource, aws: Aws) -> None:
        source.delay = 0.5

        async def test(store: CredentialStore) -> None:
            found = await asyncio.gather(*(obtained(store, session()) for _ in range(100)))
            assert len(set(found)) == 1

        run(test, aws=aws)
        assert source.asked == {"sts": 1}

    def test_a_request_that_is_given_up_leaves_the_others_waiting(self, source: CredentialSource, aws: Aws) -> None:
        source.delay = 0.5

        async def test(store: CredentialStore) -> None:
            first = asyncio.create_task(obtained(store, session()))
            second = asyncio.create_task(obtained(store, session()))
            await asyncio.sleep(0.1)
            first.cancel()
            assert (await second).access_key.startswith("ASIASTS")

        run(test, aws=aws)
        assert source.asked == {"sts": 1}


class TestRenewal:
    def test_renewed_ahead_while_used(self, source: CredentialSource, aws: Aws) -> None:
        source.lifetime = 8
        wanted = session()

        async def test(store: CredentialStore) -> None:
            seen = {(await obtained(store, wanted)).access_key}

            def three_generations() -> bool:
                assert store.obtain(TARGET, wanted) is None  # no request ever waits again
                seen.add(store.get(TARGET, wanted).access_key)
                return len(seen) == 3

            await until(three_generations)

        run(test, aws=aws)

    @pytest.mark.parametrize(("used", "asked"), [(True, 2), (False, 1)])
    def test_dropped_when_unused_for_a_life(self, source: CredentialSource, aws: Aws, used: bool, asked: int) -> None:
        source.lifetime = 4

        async def test(store: CredentialStore) -> None:
            pending = store.obtain(TARGET, session())
            assert pending is not None
            await pending
            if used:
                store.get(TARGET, session())
            await until(lambda: not store._callers)
            assert source.asked == {"sts": asked}
            assert await obtained(store, session())

        run(test, aws=aws)

    def test_the_targets_role_is_renewed_unused(self, source: CredentialSource, aws: Aws) -> None:
        source.lifetime = 4
        target = a_target(role=ARN)

        async def test(_: CredentialStore) -> None:
            await until(lambda: source.asked["sts"] == 4)

        run(test, target, aws=aws)

    def test_refused_ones_are_renewed_at_once(self, source: CredentialSource, aws: Aws) -> None:
        async def test(store: CredentialStore) -> None:
            old = await obtained(store, session())
            await asyncio.sleep(sources._LEAST_INTERVAL)
            new = await store.wait_refreshed(TARGET, 60, session())
            assert new != old
            assert store.get(TARGET, session()) == new
            assert await store.wait_refreshed(TARGET, 60, session()) == new  # moments ago: its result stands

        run(test, aws=aws)

    def test_refused_ones_that_were_dropped(self, source: CredentialSource, aws: Aws) -> None:
        async def test(store: CredentialStore) -> None:
            assert (await store.wait_refreshed(TARGET, 60, session())).access_key.startswith("ASIASTS")

        run(test, aws=aws)

    def test_a_failing_renewal_leaves_the_old_ones(self, source: CredentialSource, aws: Aws) -> None:
        source.lifetime = 12
        wanted = session()

        async def test(store: CredentialStore) -> None:
            old = await obtained(store, wanted)
            source.failing = True

            def failed() -> bool:
                assert store.get(TARGET, wanted) == old
                return store._callers[wanted].error is not None

            await until(failed)
            source.failing = False
            await until(lambda: store.get(TARGET, wanted) != old)

        run(test, aws=aws)

    def test_one_base_for_all(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the base has expired early, it is fetched once, however many callers notice."""
        setenv(
            monkeypatch,
            AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{source.url}/container",
            AWS_CONTAINER_AUTHORIZATION_TOKEN="container-token",
        )

        async def test(store: CredentialStore) -> None:
            await asyncio.sleep(sources._LEAST_INTERVAL)
            source.refused_keys["ASIAECS00000001"] = "ExpiredToken"
            await asyncio.gather(*(obtained(store, session(f"caller-{number}")) for number in range(20)))
            assert source.asked == {"ecs": 2, "sts": 20}

        run(test, aws=Aws(sts_endpoint=source.url))


class TestFailure:
    @pytest.mark.parametrize(
        ("trusted", "options", "words"),
        [
            (set(), {}, ["sts:AssumeRole on resource", "allows sts:AssumeRole,", "the role's external_id"]),
            ({"sts:AssumeRole"}, {"session_tags": True}, ["sts:TagSession (for session_tags)"]),
            ({"sts:AssumeRole"}, {"source_identity": True}, ["sts:SetSourceIdentity (for source_identity)"]),
            (
                set(),
                {"session_tags": True, "source_identity": True},
                ["sts:TagSession (for session_tags) and sts:SetSourceIdentity (for source_identity)"],
            ),
        ],
    )
    def test_what_the_trust_policy_lacks(
        self, source: CredentialSource, aws: Aws, trusted: set[str], options: dict[str, object], words: list[str]
    ) -> None:
        source.trusted = trusted
        wanted = session(**options)

        async def test(store: CredentialStore) -> None:
            told = await refusal(store, wanted)
            assert told.startswith(f"role {ARN} as {wanted.session_name}: sts:AssumeRole for role {ARN} was denied")
            for each in ["trust policy", *words]:
                assert each in told

        run(test, aws=aws)

    @pytest.mark.parametrize(
        ("action", "words"),
        [
            ("sts:TagSession", "sts:TagSession (for the tags that the proxy's own session passes on)"),
            ("sts:SetSourceIdentity", "sts:SetSourceIdentity (for the source identity of the proxy's own session)"),
        ],
    )
    def test_what_the_base_brings_along(self, action: str, words: str) -> None:
        """A session's transitive tags and source identity go on into every role that it assumes."""
        answer: Any = {"Error": {"Code": "AccessDenied", "Message": f"not authorized to perform: {action}"}}
        assert words in sessions.explain(ClientError(answer, "AssumeRole"), Aws(), session())

    def test_not_again_for_a_while(self, source: CredentialSource, aws: Aws) -> None:
        source.trusted = set()

        async def test(store: CredentialStore) -> None:
            told = [await refusal(store, session()) for _ in range(50)]
            assert len(set(told)) == 1
            assert source.asked == {"denied": 1}
            source.trusted = {"sts:AssumeRole"}
            await asyncio.sleep(sources._LEAST_INTERVAL)
            assert await obtained(store, session())

        run(test, aws=aws)

    def test_nor_when_the_failure_was_forgotten(
        self, source: CredentialSource, aws: Aws, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sources, "_LEAST_INTERVAL", 4.0)
        source.trusted = set()

        async def test(store: CredentialStore) -> None:
            first = await refusal(store, session())
            await asyncio.sleep(2)  # longer than what would be waited for the second attempt for a target
            assert await refusal(store, session()) == first
            assert source.asked == {"denied": 1}

        run(test, aws=aws)

    def test_nor_through_waiting_requests(self, source: CredentialSource, aws: Aws) -> None:
        source.trusted = set()
        source.delay = 0.3

        async def test(store: CredentialStore) -> None:
            await asyncio.gather(*(refusal(store, session()) for _ in range(50)))
            assert source.asked == {"denied": 1}

        run(test, aws=aws)

    def test_not_retried_for_nobody_and_forgotten(self, source: CredentialSource, aws: Aws) -> None:
        source.trusted = set()

        async def test(store: CredentialStore) -> None:
            await asyncio.gather(*(refusal(store, session(f"caller-{number}")) for number in range(30)))
            assert len(store._callers) == 30
            await until(lambda: not store._callers)
            assert source.asked == {"denied": 30}

        run(test, aws=aws)

    def test_expired_ones_that_cannot_be_renewed(self, source: CredentialSource, aws: Aws) -> None:
        source.lifetime = 4

        async def test(store: CredentialStore) -> None:
            await obtained(store, session())
            source.failing = True

            def expired() -> bool:
                with suppress(CredentialsUnavailable):
                    store.get(TARGET, session())
                    return False
                return True

            await until(expired)
            assert "the answer was not AWS's" in await refusal(store, session())
            source.failing = False
            await asyncio.sleep(2 * sources._LEAST_INTERVAL)
            assert await obtained(store, session())

        run(test, aws=aws)

    def test_without_a_base(self, source: CredentialSource) -> None:
        async def test(store: CredentialStore) -> None:
            assert "no AWS credentials were found" in await refusal(store, session())

        run(test, aws=Aws(sts_endpoint=source.url))
        assert source.roles_asked == []

    def test_waiting_has_an_end(self, source: CredentialSource, aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_OBTAIN_DEADLINE", 0.2)
        source.delay = 1.0

        async def test(store: CredentialStore) -> None:
            assert "no new credentials within 0.2 s" in await refusal(store, session())
            # The call goes on, and helps the next request.
            await until(store._callers[session()].is_usable)
            assert store.obtain(TARGET, session()) is None
            assert source.asked == {"sts": 1}

        run(test, aws=aws)

    def test_slow_callers_do_not_hold_up_a_target(self, source: CredentialSource, aws: Aws) -> None:
        source.delays["slow"] = 3.0
        target = a_target(role=ARN)

        async def test(store: CredentialStore) -> None:
            old = store.get(target)
            await asyncio.sleep(sources._LEAST_INTERVAL)
            slow = [asyncio.create_task(obtained(store, session(f"slow-{number}"))) for number in range(8)]
            await until(lambda: len(source.roles_asked) > module._CALLER_THREADS)
            assert await store.wait_refreshed(target, 60) != old
            assert not any(each.done() for each in slow)
            await asyncio.gather(*slow)

        run(test, target, aws=aws)


class TestBounds:
    def test_three_thousand_callers(self, source: CredentialSource, aws: Aws) -> None:
        callers = [session(f"caller-{number}") for number in range(3000)]

        async def test(store: CredentialStore) -> None:
            most = 0
            for start in range(0, 3000, 50):
                some = callers[start : start + 50]
                found = await asyncio.gather(*(obtained(store, each) for each in some))
                assert len({each.access_key for each in found}) == 50
                store.get(TARGET, callers[0])  # the first of all stays in use, and so stays
                most = max(most, len(store._callers))
            assert most == module._CALLER_SESSIONS == 1000
            assert source.asked == {"sts": 3000}
            kept = [number for number, caller in enumerate(callers) if caller in store._callers]
            assert len(kept) == 1000
            assert {0, *range(2050, 3000)} <= set(kept) <= {0, *range(2000, 3000)}  # in a batch, the order is open
            assert len(asyncio.all_tasks()) == 1

        run(test, aws=aws)

    def test_those_under_way_are_never_given_up(
        self, source: CredentialSource, aws: Aws, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_CALLER_SESSIONS", 3)
        source.delays["slow"] = 1.0

        async def test(store: CredentialStore) -> None:
            slow = [asyncio.create_task(obtained(store, session(f"slow-{number}"))) for number in range(3)]
            await until(lambda: len(source.roles_asked) == 3)
            told = await refusal(store, session("one-too-many"))
            assert told == "roles are being assumed for 3 callers already; try again in a moment"
            assert len(set(await asyncio.gather(*slow))) == 3
            assert await obtained(store, session("one-too-many"))
            assert len(store._callers) == 3

        run(test, aws=aws)

    def test_end(self, source: CredentialSource, aws: Aws) -> None:
        async def main() -> None:
            store = CredentialStore([TARGET], aws)
            await store.start()
            await obtained(store, session("early"))
            source.delays["late"] = 2.0
            late = asyncio.create_task(refusal(store, session("late")))
            await until(lambda: len(source.roles_asked) == 2)
            await store.close()
            assert "not fetched yet" in await late
            assert "the proxy is ending" in await refusal(store, session("too-late"))
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

    def test_log(self, aws: Aws, caplog: pytest.LogCaptureFixture) -> None:
        caller = 'mallory\n{"level": "error"}'

        async def test(store: CredentialStore) -> None:
            await obtained(store, session(caller))

        with caplog.at_level(logging.DEBUG):
            run(test, aws=aws)
        (told,) = [record for record in caplog.records if "mallory" in record.message]
        assert session(caller).session_name in told.message
        assert told.levelno == logging.DEBUG  # not a line for each of thousands
        assert caller not in caplog.text
        assert "secret" not in caplog.text


class TestLocalSageMaker:
    """Against the stand-in's STS, which checks signatures, names, tags and trust policies."""

    @pytest.fixture
    def local(self, sagemaker: LocalSageMaker, monkeypatch: pytest.MonkeyPatch) -> LocalSageMaker:
        setenv(monkeypatch, **sagemaker.environment())
        return sagemaker

    @pytest.mark.parametrize("name", ["writer", "reader", "nothing", "cross-account"])
    @pytest.mark.parametrize(
        "subject", ["user:Jörg, \n七", "key:ci", "cert:CN=x,O=y", "anonymous", "user:" + "é" * 300]
    )
    def test_every_caller_gets_in(self, local: LocalSageMaker, name: str, subject: str) -> None:
        role = a_role(
            assume_role_arn=local.roles[name],
            external_id=local.external_id if name == "cross-account" else None,
            session_tags=True,
            source_identity=True,
        )
        wanted = role_session(role, subject, local.region)

        async def test(store: CredentialStore) -> None:
            found = await obtained(store, wanted)
            arn = await asyncio.to_thread(sessions.caller_identity, found, Aws(), region=local.region)
            assert arn.endswith(f":assumed-role/{name}/{wanted.session_name}")

        run(test)

    def test_without_the_permission_to_tag(self, local: LocalSageMaker) -> None:
        wanted = role_session(
            a_role(assume_role_arn=local.roles["untagged"], session_tags=True), "key:ci", local.region
        )
        plain = role_session(a_role(assume_role_arn=local.roles["untagged"]), "key:ci", local.region)

        async def test(store: CredentialStore) -> None:
            told = await refusal(store, wanted)
            assert "is not authorized to perform: sts:TagSession" in told
            assert "allows sts:AssumeRole and sts:TagSession (for session_tags)" in told
            assert await obtained(store, plain)

        run(test)
