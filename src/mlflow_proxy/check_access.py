"""The part of `mlflow-proxy check` that is about callers: keys, the OIDC provider, IAM roles, and the limits' storage.

Whatever the configuration names for callers is tried as the service would; nothing is changed but a session that is
opened and thrown away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable

from mlflow_proxy.access.key_file import read_keys
from mlflow_proxy.access.key_record import Key, KeysError, parse_keys
from mlflow_proxy.access.key_secret import SecretMissing, fetch_secret
from mlflow_proxy.access.oidc import TokenVerifier
from mlflow_proxy.aws.credentials import CredentialStore, CredentialsUnavailable
from mlflow_proxy.aws.role_sessions import role_session
from mlflow_proxy.check_table import Step
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits import Limits
from mlflow_proxy.settings import RoleSettings, Settings
from mlflow_proxy.targets import Target

# Whom the session that is opened for trying is for.
_SUBJECT = "key:mlflow-proxy-check"


async def access_steps(
    settings: Settings, targets: Iterable[Target], credentials: CredentialStore
) -> AsyncIterator[Step]:
    """A row for each thing that the configuration names for callers."""
    access = settings.access
    if access.keys_file is not None:
        yield await asyncio.to_thread(_file_step, settings)
    if access.keys_secret is not None:
        yield await asyncio.to_thread(_secret_step, settings)
    if settings.oidc.issuer is not None:
        yield await _provider_step(settings)
    for role in settings.roles:
        if role.assume_role_arn is not None:
            yield await _role_step(role, tuple(targets), credentials)
    if settings.limits.storage is not None:
        yield await _storage_step(settings)


def _file_step(settings: Settings) -> Step:
    path = settings.access.keys_file
    assert path is not None  # noqa: S101  # the caller's condition, for the type checker
    try:
        return _keys_step("keys file", read_keys(path), settings)
    except KeysError as error:
        return Step("keys file", False, "cannot be used", str(error))


def _secret_step(settings: Settings) -> Step:
    arn = settings.access.keys_secret
    assert arn is not None  # noqa: S101
    try:
        text = fetch_secret(arn, settings.aws, proxy=settings.upstream.proxy)
        return _keys_step("keys secret", parse_keys(text).values(), settings)
    except (KeysError, SecretMissing) as error:
        return Step("keys secret", False, "cannot be used", str(error))


def _keys_step(name: str, keys: Iterable[Key], settings: Settings) -> Step:
    now = time.time()
    active = [key for key in keys if now < key.valid_until]
    found = f"{len(active)} active API key{'' if len(active) == 1 else 's'}"
    lost = sorted({key.role for key in active} - {role.name for role in settings.roles})
    if lost:
        return Step(name, False, found, f"some are for roles that [[roles]] does not have: {', '.join(lost)}")
    return Step(name, True if active else None, found, "" if active else "make one: mlflow-proxy keys new")


async def _provider_step(settings: Settings) -> Step:
    verifier = TokenVerifier(settings.oidc, proxy=settings.upstream.proxy)
    await verifier.start()
    try:
        await verifier.ready()
        if settings.oidc.client_id is not None:
            await verifier.metadata()
    except Refusal as refusal:
        return Step("OIDC provider", False, f"{settings.oidc.issuer}", refusal.detail or refusal.message)
    finally:
        await verifier.close()
    return Step("OIDC provider", True, f"{settings.oidc.issuer} publishes its keys")


async def _role_step(role: RoleSettings, targets: tuple[Target, ...], credentials: CredentialStore) -> Step:
    name = f"role {role.name}"
    session = role_session(role, _SUBJECT, targets[0].arn.region)
    try:
        pending = credentials.obtain(targets[0], session)
        if pending is not None:
            await pending
    except CredentialsUnavailable as unavailable:
        return Step.failed(name, f"{role.assume_role_arn} cannot be assumed", unavailable.reason)
    return Step(name, True, f"signs as {role.assume_role_arn}, in a session per caller")


async def _storage_step(settings: Settings) -> Step:
    limits = Limits(settings, Deadlines(asyncio.get_running_loop()))
    await limits.start()
    away = limits.storage_away
    await limits.close()
    advice = "check limits.storage, its password, TLS and security groups" if away else ""
    return Step("limits", not away, "the storage does not answer" if away else "the storage counts", advice)
