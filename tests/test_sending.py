"""Signing as a caller: requests of a role session through the sender, to the local SageMaker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from mlflow_proxy.aws.credentials import CredentialStore
from mlflow_proxy.aws.role_sessions import RoleSession, role_session
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.local import Fault, LocalSageMaker
from mlflow_proxy.readiness import PROBE, PROBE_BODY
from mlflow_proxy.sending import Answer, Sender
from mlflow_proxy.settings import Aws, RoleSettings, Upstream
from mlflow_proxy.signing import Payload
from mlflow_proxy.targets import Target, parse_arn, parse_endpoint
from mlflow_proxy.telemetry.record import Record


@pytest.fixture
def local(sagemaker: LocalSageMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalSageMaker]:
    for name, value in sagemaker.environment().items():
        monkeypatch.setenv(name, value)
    sagemaker.journal.clear()
    yield sagemaker
    sagemaker.faults.clear()


@pytest.fixture
def target(local: LocalSageMaker) -> Target:
    return Target("tracking", parse_arn(local.tracking_arn), parse_endpoint(local.endpoint))


def a_session(local: LocalSageMaker, iam: str, subject: str = "user:alice@example.com") -> RoleSession:
    settings = {"name": "people", "targets": ["*"], "assume_role_arn": local.roles[iam]}
    role = RoleSettings.model_validate({**settings, "session_tags": True, "source_identity": True})
    return role_session(role, subject, local.region)


Send = Callable[[RoleSession | None], Coroutine[Any, Any, Answer]]


def run(target: Target, test: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
    """Run `test` with what sends a search of experiments for a role session."""

    async def main() -> None:
        store = CredentialStore([target], Aws())
        await store.start()
        sender = Sender([target], Upstream(), store, Deadlines(asyncio.get_running_loop()))

        async def send(session: RoleSession | None) -> Answer:
            record = Record(PROBE.method, "test")
            answer = await sender.send(target, PROBE, PROBE.path, Payload.of([PROBE_BODY]), record, session)
            if answer.connection is not None:
                sender.done(target, answer.connection)
            return answer

        try:
            await test(send)
        finally:
            sender.close()
            await store.close()

    asyncio.run(main())


def arrived(local: LocalSageMaker) -> list[dict[str, Any]]:
    return [entry for entry in local.journal.last(100) if entry["plane"] == "mlflow"]


def test_signed_as_the_caller(local: LocalSageMaker, target: Target) -> None:
    alice, bob = a_session(local, "writer"), a_session(local, "writer", "user:bob")

    async def test(send: Send) -> None:
        for session in (alice, bob, None, alice):
            assert (await send(session)).status == 200

    run(target, test)
    of_writer = "arn:aws:sts::111122223333:assumed-role/writer/"
    seen = [(entry["principal"], entry["session_tags"], entry["source_identity"]) for entry in arrived(local)]
    as_alice = (of_writer + alice.session_name, dict(alice.tags), alice.session_name)
    assert seen == [
        as_alice,
        (of_writer + bob.session_name, {"caller": "user:bob", "role": "people"}, bob.session_name),
        ("arn:aws:iam::111122223333:user/developer", {}, None),
        as_alice,
    ]


def test_the_callers_rights_count(local: LocalSageMaker, target: Target) -> None:
    nothing = a_session(local, "nothing")

    async def test(send: Send) -> None:
        answer = await send(nothing)
        assert answer.status == 403
        assert answer.error is not None
        assert f"assumed-role/nothing/{nothing.session_name} is not authorized" in answer.error.message

    run(target, test)


def test_a_role_that_cannot_be_assumed(local: LocalSageMaker, target: Target) -> None:
    async def test(send: Send) -> None:
        with pytest.raises(Refusal) as caught:
            await send(a_session(local, "untagged"))
        assert (caught.value.status, caught.value.retry_after) == (501, None)
        assert caught.value.reason.startswith("No AWS credentials for tracking: role arn:aws:iam::111122223333:role/")
        assert "sts:TagSession" in caught.value.reason
        assert "arn:" not in caught.value.message
        assert (await send(None)).status == 200

    run(target, test)
    assert len(arrived(local)) == 1


def test_many_requests_of_a_new_caller(local: LocalSageMaker, target: Target) -> None:
    session = a_session(local, "reader")

    async def test(send: Send) -> None:
        answers = await asyncio.gather(*(send(session) for _ in range(20)))
        assert {answer.status for answer in answers} == {200}

    run(target, test)
    assumed = [entry for entry in local.journal.last(100) if entry["action"] == "sts:AssumeRole"]
    assert len(assumed) == 1


def test_credentials_that_end_early_are_renewed_unnoticed(local: LocalSageMaker, target: Target) -> None:
    session = a_session(local, "writer")

    async def test(send: Send) -> None:
        before = (await send(session)).credentials
        await asyncio.sleep(4)
        local._service.directory.credential_lifetime = 3.5  # what is older than this is void, whatever it says
        try:
            answer = await send(session)
        finally:
            local._service.directory.credential_lifetime = None
        assert answer.status == 200
        assert answer.credentials != before

    run(target, test)
    first, refused, repeated = arrived(local)
    assert (refused["verdict"], repeated["verdict"]) == ("ExpiredTokenException", "allowed")
    assert repeated["principal"] == first["principal"]
    assert repeated["access_key"] != first["access_key"]


def test_waiting_for_sts_has_an_end(local: LocalSageMaker, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_proxy.aws.credentials._OBTAIN_DEADLINE", 0.5)
    local.faults.add(Fault(plane="sts", latency=3))

    async def test(send: Send) -> None:
        with pytest.raises(Refusal) as caught:
            await send(a_session(local, "writer", f"user:late-{time.time()}"))
        assert (caught.value.status, caught.value.retry_after) == (503, 5)
        assert "no new credentials within 0.5 s" in caught.value.reason

    run(target, test)
