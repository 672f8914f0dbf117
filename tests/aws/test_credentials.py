"""Credentials from every provider, expiring, failing and recovering, against real servers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from botocore import exceptions as failures
from botocore.credentials import RefreshableCredentials
from tests.aws.stores import STATIC, a_target, run, setenv, until

from mlflow_proxy.aws import credentials as module
from mlflow_proxy.aws import sessions, sources
from mlflow_proxy.aws.credentials import Credentials, CredentialStore, CredentialsUnavailable
from mlflow_proxy.settings import Aws
from mlflow_proxy.targets import Target
from mlflow_proxy.threads import Threads

if TYPE_CHECKING:
    from tests.aws.conftest import CredentialSource

ROLE = "arn:aws:iam::444455556666:role/mlflow"
DEAD = "http://127.0.0.1:9"


pytestmark = pytest.mark.usefixtures("no_credentials")


def fetch(target: Target | None = None, aws: Aws | None = None, proxy: str | None = None) -> Credentials:
    """The credentials that a store has after its start."""
    found: list[Credentials] = []
    wanted = target or a_target()

    async def test(store: CredentialStore) -> None:
        found.append(store.get(wanted))

    run(test, wanted, aws=aws, proxy=proxy)
    return found[0]


def reason(target: Target | None = None, aws: Aws | None = None) -> str:
    """Why a store has no credentials after its start."""
    with pytest.raises(CredentialsUnavailable) as caught:
        fetch(target, aws)
    return caught.value.reason


class TestProviders:
    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC, AWS_SESSION_TOKEN="session-token")
        assert fetch() == Credentials("AKIASTATIC", "static-secret", "session-token", None, "env")

    def test_profile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        _write_profile(tmp_path, "AKIAPROFILE")
        found = fetch(aws=Aws(profile="dev"))
        assert (found.access_key, found.provider) == ("AKIAPROFILE", "shared-credentials-file")

    def test_credential_process(self, tmp_path: Path) -> None:
        expires_at = int(time.time()) + 3600
        _write_process(tmp_path, f"print({_process_answer('AKIAPROCESS', expires_at)!r})")
        found = fetch()
        assert (found.access_key, found.provider) == ("AKIAPROCESS", "custom-process")
        assert found.expires_at == expires_at

    def test_container(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        _use_container(source, monkeypatch)
        found = fetch()
        assert (found.access_key[:7], found.provider) == ("ASIAECS", "container-role")
        assert found.expires_at == pytest.approx(time.time() + 3600, abs=60)

    def test_instance_metadata_v2_never_through_a_proxy(
        self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _use_imds(source, monkeypatch)
        setenv(monkeypatch, HTTP_PROXY=DEAD, http_proxy=DEAD)
        found = fetch()
        assert (found.access_key[:8], found.provider) == ("ASIAIMDS", "iam-role")
        assert found.expires_at == pytest.approx(time.time() + 3600, abs=60)
        assert source.asked == {"imds": 1}

    def test_web_identity(self, moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        token = tmp_path / "token"
        token.write_text("header.payload.signature")
        setenv(
            monkeypatch,
            AWS_WEB_IDENTITY_TOKEN_FILE=str(token),
            AWS_ROLE_ARN=ROLE,
            AWS_ENDPOINT_URL_STS=moto_url,
        )
        found = fetch()
        assert found.provider == "assume-role-with-web-identity"
        assert found.expires_at is not None
        assert found.expires_at > time.time()

    def test_role_of_a_profile(self, source: CredentialSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "config").write_text(
            f"[profile work]\nrole_arn = {ROLE}\nsource_profile = dev\n[profile dev]\nregion = eu-west-1\n"
        )
        _write_profile(tmp_path, "AKIAPROFILE")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", source.url)
        found = fetch(aws=Aws(profile="work"))
        assert (found.access_key[:7], found.provider) == ("ASIASTS", "assume-role")
        assert found.expires_at == pytest.approx(time.time() + 3600, abs=60)

    @pytest.mark.parametrize("signed_in", [True, False])
    def test_sso(self, source: CredentialSource, tmp_path: Path, signed_in: bool) -> None:
        # In a process of its own: botocore decides at import where the tokens of SSO lie.
        start_url = "https://example.awsapps.com/start"
        (tmp_path / "config").write_text(
            f"[default]\nsso_start_url = {start_url}\nsso_region = eu-west-1\n"
            "sso_account_id = 111122223333\nsso_role_name = Developer\n"
        )
        cache = tmp_path / ".aws" / "sso" / "cache"
        cache.mkdir(parents=True)
        expires = datetime.fromtimestamp(time.time() + (3600 if signed_in else -3600), UTC)
        token = {"startUrl": start_url, "accessToken": "sso-token", "expiresAt": expires.strftime("%Y-%m-%dT%H:%M:%SZ")}
        (cache / f"{sha1(start_url.encode()).hexdigest()}.json").write_text(json.dumps(token))
        script = (
            "from mlflow_proxy.aws import sessions; from mlflow_proxy.settings import Aws\n"
            "try:\n    found = sessions.from_chain(Aws(), region='eu-west-1')\n"
            "    print(found.provider, found.access_key[:7], found.expires_at is not None)\n"
            "except Exception as error:\n    print(sessions.explain(error, Aws()))\n"
        )
        environment = {**os.environ, "HOME": str(tmp_path), "AWS_ENDPOINT_URL_SSO": source.url}
        printed = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert printed == "sso ASIASSO True" if signed_in else "`aws sso login`" in printed


class TestRoles:
    def test_in_another_account(self, moto_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        first = a_target("first", ROLE)
        second = a_target("second", "arn:aws:iam::777788889999:role/mlflow", session_name="me")
        plain = a_target("plain")

        async def test(store: CredentialStore) -> None:
            assert await store.identity(first) == (
                "arn:aws:sts::444455556666:assumed-role/mlflow/sagemaker-mlflow-proxy"
            )
            assert await store.identity(second) == "arn:aws:sts::777788889999:assumed-role/mlflow/me"
            assert (store.status(first).provider, store.status(plain).provider) == ("assume-role", "env")
            assert store.status(first).usable

        run(test, first, second, plain, aws=Aws(sts_endpoint=moto_url))

    def test_what_is_asked(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC, AWS_ENDPOINT_URL_STS=source.url)
        source.external_id = "customer-7"
        fetch(a_target(role=ROLE, external_id="customer-7", session_name="me"))
        (asked,) = source.roles_asked
        assert asked["Action"] == "AssumeRole"
        assert (asked["RoleArn"], asked["ExternalId"], asked["RoleSessionName"]) == (ROLE, "customer-7", "me")

    @pytest.mark.parametrize(
        ("external_id", "advice"),
        [("wrong", "the target's external_id"), (None, "(else set the target's external_id)")],
    )
    def test_wrong_external_id(
        self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch, external_id: str | None, advice: str
    ) -> None:
        setenv(monkeypatch, **STATIC)
        source.external_id = "customer-7"
        told = reason(a_target(role=ROLE, external_id=external_id), Aws(sts_endpoint=source.url))
        assert f"role {ROLE}" in told
        assert "is not authorized to perform: sts:AssumeRole" in told
        assert "trust policy" in told
        assert advice in told
        assert source.asked == {"denied": 1}

    def test_equal_sources_are_fetched_once(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        targets = [a_target(name, ROLE) for name in ("a", "b", "c")]
        other = a_target("d", ROLE, external_id="another")

        async def test(store: CredentialStore) -> None:
            assert len({store.get(target).access_key for target in targets}) == 1
            assert store.get(other) != store.get(targets[0])
            assert source.asked == {"sts": 2}

        run(test, *targets, other, aws=Aws(sts_endpoint=source.url))

    def test_expired_base_is_renewed_first(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        _use_imds(source, monkeypatch)
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            await asyncio.sleep(sources._LEAST_INTERVAL)
            source.refused_keys["ASIAIMDS00000001"] = "ExpiredToken"
            found = await store.wait_refreshed(target, 60)
            assert found.access_key.startswith("ASIASTS")
            assert source.asked["imds"] == 2

        run(test, target, aws=Aws(sts_endpoint=source.url))

    def test_rotated_base_is_renewed_first(
        self, checking_moto: tuple[str, Callable[[], tuple[str, str]]], tmp_path: Path
    ) -> None:
        url, rotate = checking_moto
        _write_profile(tmp_path, *rotate())
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            old = store.get(target)
            _write_profile(tmp_path, *rotate())
            await asyncio.sleep(sources._LEAST_INTERVAL)
            new = await store.wait_refreshed(target, 60)
            assert new.access_key != old.access_key
            assert store.status(target).error is None

        run(test, target, aws=Aws(profile="dev", sts_endpoint=url))

    @pytest.mark.parametrize("code", sorted(module._BASE_IS_BAD))
    def test_a_refused_base_is_renewed(
        self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch, code: str
    ) -> None:
        _use_imds(source, monkeypatch)
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            await asyncio.sleep(sources._LEAST_INTERVAL)
            source.refused_keys["ASIAIMDS00000001"] = code
            await store.wait_refreshed(target, 60)
            assert source.asked["imds"] == 2

        run(test, target, aws=Aws(sts_endpoint=source.url))

    def test_expired_base_without_another(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        source.refused_keys["AKIASTATIC"] = "ExpiredToken"
        told = reason(a_target(role=ROLE), Aws(sts_endpoint=source.url))
        assert "has expired" in told
        assert "aws sso login" in told

    def test_without_base(self, source: CredentialSource) -> None:
        told = reason(a_target(role=ROLE), Aws(sts_endpoint=source.url))
        assert "no AWS credentials were found" in told
        assert source.roles_asked == []

    def test_outgoing_proxy(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        fetch(a_target(role=ROLE), Aws(sts_endpoint="http://sts.invalid"), proxy=source.url)
        assert source.asked["proxied"] == 1

    def test_proxy_of_the_environment_is_ignored(
        self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        setenv(monkeypatch, **STATIC, HTTP_PROXY=DEAD, http_proxy=DEAD, ALL_PROXY=DEAD)
        fetch(a_target(role=ROLE), Aws(sts_endpoint=source.url))
        assert source.asked == {"sts": 1}


class TestRenewal:
    def test_expiry_in_use(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        source.lifetime = 10
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            seen: set[str] = set()

            def two_generations() -> bool:
                found = store.get(target)
                assert found.expires_at is not None
                assert found.expires_at > time.time()
                seen.add(found.access_key)
                return len(seen) == 2

            await until(two_generations)

        run(test, target, aws=Aws(sts_endpoint=source.url))

    def test_old_ones_during_a_slow_refresh(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            old = store.get(target)
            await asyncio.sleep(sources._LEAST_INTERVAL)
            source.delay = 1.0
            waiting = asyncio.create_task(store.wait_refreshed(target, 60))
            await until(lambda: len(source.roles_asked) == 1 and not waiting.done())
            assert store.get(target) == old
            new = await waiting
            assert new != old
            assert store.get(target) == new

        run(test, target, aws=Aws(sts_endpoint=source.url))

    def test_refresh_fails_then_recovers(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        source.lifetime = 5
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            source.failing = True
            await until(lambda: store.status(target).error is not None)
            await until(lambda: not store.status(target).usable)
            with pytest.raises(CredentialsUnavailable, match="the answer was not AWS's") as caught:
                store.get(target)
            assert ROLE in caught.value.reason
            source.failing = False
            await until(lambda: store.status(target).usable)
            assert store.status(target).error is None
            store.get(target)

        run(test, target, aws=Aws(sts_endpoint=source.url))

    def test_container_rotates(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        _use_container(source, monkeypatch)
        source.lifetime = 8
        target = a_target()

        async def test(store: CredentialStore) -> None:
            first = store.get(target)
            await until(lambda: store.get(target) != first)

        run(test, target)

    def test_rotated_profile(self, tmp_path: Path) -> None:
        _write_profile(tmp_path, "AKIAOLD")
        target = a_target()

        async def test(store: CredentialStore) -> None:
            assert store.get(target).access_key == "AKIAOLD"
            _write_profile(tmp_path, "AKIANEW")
            await asyncio.sleep(sources._LEAST_INTERVAL)
            assert (await store.wait_refreshed(target, 60)).access_key == "AKIANEW"
            assert store.get(target).access_key == "AKIANEW"

        run(test, target, aws=Aws(profile="dev"))

    def test_single_flight(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            old = store.get(target)
            await asyncio.sleep(sources._LEAST_INTERVAL)
            source.delay = 0.5
            found = await asyncio.gather(*(store.wait_refreshed(target, 60) for _ in range(100)))
            assert old not in found
            assert len(set(found)) == 1
            # Just renewed: the result stands, and nothing more is fetched.
            assert await store.wait_refreshed(target, 60) == found[0]
            assert source.asked == {"sts": 2}

        run(test, target, aws=Aws(sts_endpoint=source.url))

    def test_wait_has_an_end(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        target = a_target(role=ROLE)

        async def test(store: CredentialStore) -> None:
            await asyncio.sleep(sources._LEAST_INTERVAL)
            source.delay = 2.0
            with pytest.raises(CredentialsUnavailable, match="no new credentials within"):
                await store.wait_refreshed(target, 0.1)
            store.get(target)  # the old ones still count

        run(test, target, aws=Aws(sts_endpoint=source.url))

    def test_need_wakes_the_source_from_any_thread(self, tmp_path: Path) -> None:
        target = a_target()

        async def test(store: CredentialStore) -> None:
            with pytest.raises(CredentialsUnavailable):
                store.get(target)
            _write_profile(tmp_path, "AKIALATE", name="default")

            def ask() -> None:
                deadline = time.monotonic() + 60
                while not store.status(target).usable and time.monotonic() < deadline:
                    time.sleep(0.05)
                    try:
                        store.get(target)
                    except CredentialsUnavailable:
                        continue

            await asyncio.to_thread(ask)
            assert store.get(target).access_key == "AKIALATE"

        run(test, target)

    def test_a_failure_that_cannot_be_explained(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        target = a_target()

        def fail(*_: object) -> str:
            raise ValueError("very-secret")

        async def test(store: CredentialStore) -> None:
            with pytest.raises(CredentialsUnavailable, match="failed in an unexpected way"):
                store.get(target)
            _write_profile(tmp_path, "AKIALATE", name="default")
            await until(lambda: store.status(target).usable)

        monkeypatch.setattr(sessions, "explain", fail)
        with caplog.at_level(logging.DEBUG):
            run(test, target)
        assert "very-secret" not in caplog.text

    def test_already_expired_ones_are_refused(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        source.lifetime = -60
        assert "check this machine's clock" in reason(a_target(role=ROLE), Aws(sts_endpoint=source.url))

    def test_close_ends_all(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)

        async def main() -> None:
            store = CredentialStore([a_target(role=ROLE)], Aws(sts_endpoint=source.url))
            await store.start()
            source.delay = 3.0
            await asyncio.sleep(sources._LEAST_INTERVAL)
            waiting = asyncio.create_task(store.wait_refreshed(a_target(role=ROLE), 60))
            await until(lambda: len(source.roles_asked) == 2)
            await store.close()
            await waiting
            assert asyncio.all_tasks() == {asyncio.current_task()}
            await asyncio.sleep(sources._LEAST_INTERVAL)
            await store.wait_refreshed(a_target(role=ROLE), 60)
            assert len(source.roles_asked) == 2

        asyncio.run(main())


class TestThreads:
    def test_deadline_and_limit(self) -> None:
        release = threading.Event()

        async def main() -> None:
            threads = Threads("test", 1)
            with pytest.raises(TimeoutError):
                await threads.run(release.wait, 0.05)
            # The thread of the first call still runs, so the only place is taken.
            with pytest.raises(TimeoutError):
                await threads.run(lambda: True, 0.05)
            release.set()
            assert await threads.run(lambda: 7, 60) == 7

        asyncio.run(main())

    def test_errors_pass(self) -> None:
        async def main() -> None:
            with pytest.raises(KeyError):
                await Threads("test", 1).run({}.popitem, 60)

        asyncio.run(main())


class TestReasons:
    def test_nothing_found(self) -> None:
        told = reason()
        for place in ("AWS_ACCESS_KEY_ID", "profile 'default'", "web identity", "container", "instance metadata"):
            assert place in told
        assert "switched off" in told
        assert "attach a role" in told

    def test_unknown_profile(self) -> None:
        assert "'missing' is in neither ~/.aws/config" in reason(aws=Aws(profile="missing"))

    def test_half_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, AWS_ACCESS_KEY_ID="AKIAHALF")
        assert "lack AWS_SECRET_ACCESS_KEY" in reason()

    def test_unreachable_sts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        setenv(monkeypatch, **STATIC)
        assert f"{DEAD} cannot be reached" in reason(a_target(role=ROLE), Aws(sts_endpoint=DEAD))

    def test_container_out_of_order(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        _use_container(source, monkeypatch)
        source.failing = True
        told = reason()
        assert source.url in told
        assert "/container" not in told

    def test_process_that_prints_a_secret(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        _write_process(tmp_path, "import sys; print('very-secret', file=sys.stderr); sys.exit(1)")
        with caplog.at_level(logging.DEBUG):
            told = reason()
        assert "credential_process failed" in told
        assert "very-secret" not in told + caplog.text

    def test_process_that_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sessions, "_PROCESS_DEADLINE", 1)
        _write_process(tmp_path, "import time; time.sleep(3600)")
        assert "took more than 1 s" in reason()

    def test_process_that_hangs_behind_a_role(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sessions, "_PROCESS_DEADLINE", 1)
        _write_process(tmp_path, "import time; time.sleep(3600)", "base")
        with (tmp_path / "config").open("a") as config:
            config.write(f"[profile work]\nrole_arn = {ROLE}\nsource_profile = base\n")
        assert "took more than 1 s" in reason(aws=Aws(profile="work"))

    def test_missing_token_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = tmp_path / "missing"
        setenv(monkeypatch, AWS_WEB_IDENTITY_TOKEN_FILE=str(missing), AWS_ROLE_ARN=ROLE)
        assert f"{missing} cannot be read" in reason()

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (failures.UnauthorizedSSOTokenError(), "aws sso login --profile dev"),
            (failures.SSOTokenLoadError(error_msg="secret"), "aws sso login --profile dev"),
            (failures.TokenRetrievalError(provider="sso", error_msg="secret"), "aws sso login --profile dev"),
            (failures.LoginRefreshRequired(), "aws login --profile dev"),
            (
                failures.ReadTimeoutError(endpoint_url="https://sts.aws/?secret"),
                "https://sts.aws did not answer in time",
            ),
            (failures.SSLError(endpoint_url="https://sts.aws", error=ValueError("secret")), "AWS_CA_BUNDLE"),
            (failures.ProxyConnectionError(proxy_url="http://u:secret@p"), "upstream.proxy"),
            (failures.RefreshWithMFAUnsupportedError(), "mfa_serial"),
            (failures.ConfigParseError(path="/x/config"), "/x/config"),
            (RuntimeError("the refreshed credentials are still expired."), "clock"),
            (TimeoutError(), "did not answer in time"),
            (ValueError("secret"), "ValueError"),
            (failures.ClientError({"Error": {"Code": "InvalidClientTokenId"}}, "AssumeRole"), "access key"),
            (failures.ClientError({"Error": {"Code": "RegionDisabledException"}}, "AssumeRole"), "aws.sts_endpoint"),
            (
                failures.ClientError(
                    {"Error": {"Code": "SignatureDoesNotMatch", "Message": "x-amz-security-token:secret"}}, "AssumeRole"
                ),
                "clock",
            ),
            (failures.ClientError({}, "AssumeRole"), "unreadable answer"),
        ],
    )
    def test_words(self, error: Exception, words: str) -> None:
        told = sessions.explain(error, Aws(profile="dev"))
        assert words in told
        assert "secret" not in told.replace("the secret key", "")


class TestAnotherBotocore:
    """One without the private attributes that are used where it has them."""

    def test_without_the_expiry(self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
        _use_container(source, monkeypatch)
        monkeypatch.setattr(
            RefreshableCredentials, "_expiry_time", property(lambda _: None, lambda *_: None), raising=False
        )
        monkeypatch.setattr(RefreshableCredentials, "refresh_needed", lambda *_: False)
        found = fetch()
        assert found.expires_at == pytest.approx(time.time() + sessions._UNKNOWN_LIFETIME, abs=60)

    @pytest.mark.parametrize("provider", [SimpleNamespace(), SimpleNamespace(_role_fetcher=SimpleNamespace())])
    def test_without_the_fetcher(self, provider: SimpleNamespace) -> None:
        before = repr(provider)
        components = SimpleNamespace(get_provider=lambda _: provider)
        sessions._call_instance_metadata_directly(SimpleNamespace(get_component=lambda _: components))
        assert repr(provider) == before


class TestSecrets:
    def test_repr(self) -> None:
        shown = repr(Credentials("AKIA", "very-secret", "very-secret-token", 1.0, "env"))
        assert "very-secret" not in shown
        assert "AKIA" in shown

    def test_log_at_debug_level(
        self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        setenv(monkeypatch, **STATIC)
        with caplog.at_level(logging.DEBUG):
            fetch(a_target(role=ROLE), Aws(sts_endpoint=source.url))
        assert ROLE in caplog.text
        assert "secret" not in caplog.text

    def test_no_paths_in_the_log_at_debug_level(
        self, source: CredentialSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        _use_container(source, monkeypatch)
        with caplog.at_level(logging.DEBUG):
            fetch()
        assert "container-role" in caplog.text
        assert "/container" not in caplog.text
        assert not [r.name for r in caplog.records if r.name.startswith(("urllib3", "botocore"))]


def _use_imds(source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(
        monkeypatch,
        AWS_EC2_METADATA_DISABLED="false",
        AWS_EC2_METADATA_V1_DISABLED="true",
        AWS_EC2_METADATA_SERVICE_ENDPOINT=source.url,
    )


def _use_container(source: CredentialSource, monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(
        monkeypatch,
        AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{source.url}/container",
        AWS_CONTAINER_AUTHORIZATION_TOKEN="container-token",
    )


def _write_profile(folder: Path, key: str, secret: str = "very-secret", name: str = "dev") -> None:
    (folder / "credentials").write_text(f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")


def _write_process(folder: Path, code: str, profile: str = "default") -> None:
    script = folder / "process.py"
    script.write_text(code)
    section = "default" if profile == "default" else f"profile {profile}"
    (folder / "config").write_text(f"[{section}]\ncredential_process = {sys.executable} {script}\n")


def _process_answer(key: str, expires_at: int) -> str:
    return json.dumps(
        {
            "Version": 1,
            "AccessKeyId": key,
            "SecretAccessKey": "very-secret",
            "SessionToken": "very-secret-token",
            "Expiration": datetime.fromtimestamp(expires_at, UTC).isoformat(),
        }
    )
