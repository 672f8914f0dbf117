"""`mlflow-proxy check` and `mlflow-proxy ui`: the configuration tried against the live targets, from the command line.

A target is gone through step by step, in the order in which a request needs each; every failure comes with its likely
cause and what to do. Nothing is changed at the target.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable

import click

from mlflow_proxy.aws.credentials import CredentialStore, CredentialsUnavailable
from mlflow_proxy.aws.presign import PresignError, describe, presigned_url
from mlflow_proxy.check_access import access_steps
from mlflow_proxy.check_table import Step, print_step
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.exposure import exposures
from mlflow_proxy.http1 import UpstreamError
from mlflow_proxy.readiness import PROBE, PROBE_BODY, mlflow_message
from mlflow_proxy.sending import Answer, Sender
from mlflow_proxy.settings import Settings
from mlflow_proxy.signing import Payload
from mlflow_proxy.targets import Mode, Target
from mlflow_proxy.upstream import tls_context

# Seconds; the service takes signatures of five minutes around its clock.
_NOTABLE_SKEW = 30.0
_FATAL_SKEW = 300.0

# What says that the signature itself was refused; after any other error it was accepted.
SIGNATURE_ERRORS = frozenset(
    {
        "ExpiredTokenException",
        "IncompleteSignatureException",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationTokenException",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)


def run(settings: Settings, name: str | None, *, verbose: bool = False) -> bool:
    """Check all targets, or the named one; prints as it goes. Returns whether nothing failed."""
    targets = [target for target in settings.build_targets() if name in (None, target.name)]
    if not targets:
        raise click.ClickException(f"there is no target {name!r} in the configuration")
    return asyncio.run(_run(settings, targets, verbose=verbose))


async def _run(settings: Settings, targets: list[Target], *, verbose: bool) -> bool:
    credentials = CredentialStore(targets, settings.aws, proxy=settings.upstream.proxy)
    await credentials.start()
    sender = Sender(targets, settings.upstream, credentials, Deadlines(asyncio.get_running_loop()))
    failed = False
    exposed = [Step("exposure", None, exposure) for exposure in exposures(settings)]
    try:
        if settings.identifies or exposed:
            click.secho("\ncallers", bold=True)
            for step in exposed:
                print_step(step)
            async for step in access_steps(settings, targets, credentials):
                failed |= step.good is False
                print_step(step, verbose=verbose)
        for target in targets:
            click.secho(f"\n{target.name}  {target.arn.text}", bold=True)
            async for step in Check(settings, target, credentials, sender).steps():
                failed |= step.good is False
                print_step(step, verbose=verbose)
    finally:
        sender.close()
        await credentials.close()
    click.echo("\n" + ("Some steps failed; see the advice above." if failed else "All well."))
    return not failed


class Check:
    """The steps for one target."""

    def __init__(self, settings: Settings, target: Target, credentials: CredentialStore, sender: Sender) -> None:
        self._settings = settings
        self._target = target
        self._credentials = credentials
        self._sender = sender

    async def steps(self) -> AsyncIterator[Step]:
        """All rows; steps that need an earlier one are left out when that failed."""
        yield Step("configuration", True, f"{self._target.arn.mode.resource_type} at {self._target.endpoint.url}")
        usable = False
        async for step in self._credential_steps():
            usable = usable or (step.name == "credentials" and step.good is True)
            yield step
        reachable = True
        for find in (self._dns, self._tls):
            step = await find()
            reachable = reachable and step.good is not False
            yield step
            if not reachable:
                break
        if usable and reachable:
            for step in await self._request_steps():
                yield step
        if usable:
            for step in await self._server_steps():
                yield step

    async def _credential_steps(self) -> AsyncIterator[Step]:
        status = self._credentials.status(self._target)
        if not status.usable:
            yield Step.failed("credentials", "none that can be used", status.error or "")
            return
        remaining = "without end"
        if status.expires_at is not None:
            remaining = f"for another {max(0.0, status.expires_at - time.time()) / 60:.0f} min"
        yield Step("credentials", True, f"{status.access_key} from {status.provider}, valid {remaining}")
        try:
            yield Step("identity", True, await self._credentials.identity(self._target))
        except CredentialsUnavailable as error:
            yield Step.failed("identity", "STS does not tell", error.reason, good=None)

    async def _dns(self) -> Step:
        endpoint = self._target.endpoint
        if self._settings.upstream.proxy:
            return Step("DNS", None, f"{endpoint.host} is looked up by the outgoing proxy")
        try:
            async with asyncio.timeout(self._settings.upstream.connect_timeout):
                found = await asyncio.get_running_loop().getaddrinfo(
                    endpoint.host, endpoint.port, type=socket.SOCK_STREAM
                )
        except TimeoutError:
            return Step("DNS", False, f"no answer for {endpoint.host}", "Check this machine's resolver.")
        except OSError as error:
            advice = "Check the region in the ARN, and this network's DNS; in a VPC, the interface endpoint's name."
            return Step("DNS", False, f"{endpoint.host} is not found ({error.strerror})", advice)
        addresses = sorted({str(entry[4][0]) for entry in found})
        return Step("DNS", True, f"{endpoint.host} is {', '.join(addresses[:3])}")

    async def _tls(self) -> Step:
        endpoint = self._target.endpoint
        if endpoint.scheme == "http":
            return Step("TLS", None, "plain HTTP, as the endpoint's URL says")
        if self._settings.upstream.proxy:
            return Step("TLS", None, "inside the outgoing proxy's tunnel; see the next step")
        try:
            async with asyncio.timeout(self._settings.upstream.connect_timeout):
                _, writer = await asyncio.open_connection(
                    endpoint.host, endpoint.port, ssl=tls_context(self._target.ca_bundle)
                )
        except TimeoutError:
            advice = "Check security groups, routes, and whether this network needs upstream.proxy."
            return Step("TLS", False, f"no connection to {endpoint.authority}", advice)
        except ssl.SSLCertVerificationError as error:
            advice = "If a corporate proxy re-encrypts traffic, name its CA in the target's ca_bundle."
            return Step("TLS", False, f"the certificate is not trusted: {error.verify_message}", advice)
        except OSError as error:
            advice = "Check security groups, routes, and whether this network needs upstream.proxy."
            return Step("TLS", False, f"{endpoint.authority}: {error}", advice)
        version = writer.get_extra_info("ssl_object").version()
        writer.close()
        return Step("TLS", True, f"{version}, certificate trusted")

    async def _request_steps(self) -> list[Step]:
        try:
            answer = await self._sender.ask(self._target, PROBE, Payload.of([PROBE_BODY]))
        except (Refusal, UpstreamError) as failure:
            reason = failure.reason if isinstance(failure, Refusal) else str(failure)
            return [Step("signature", False, "no answer", reason)]
        error = answer.error
        if error is not None and error.type in SIGNATURE_ERRORS:
            return [
                Step("signature", False, f"refused: {error.type} {error.message}", error.advice),
                self._clock(answer),
            ]
        return [Step("signature", True, "accepted"), self._permission(answer), self._clock(answer)]

    def _permission(self, answer: Answer) -> Step:
        if answer.error is not None and answer.error.type != "AccessDeniedException":
            return Step("permission", None, f"{answer.error.type}: {answer.error.message}", answer.error.advice)
        if answer.error is not None:
            action = "CallMlflowAppApi" if self._target.arn.mode is Mode.APP else "SearchExperiments"
            service = "sagemaker" if self._target.arn.mode is Mode.APP else "sagemaker-mlflow"
            advice = f"Allow {service}:{action} on {self._target.arn.text} for the identity above."
            return Step("permission", False, answer.error.message or answer.error.type, advice)
        if answer.status >= 400:
            return Step("permission", False, f"MLflow answered {answer.status}: {mlflow_message(answer.body)}")
        return Step("permission", True, "may list experiments")

    def _clock(self, answer: Answer) -> Step:
        offset = self._sender.date_difference(self._target, answer)
        if offset is None:
            return Step("clock", None, "the answer has no Date")
        advice = "Set this machine's clock (chrony, systemd-timesyncd); signatures are valid for five minutes."
        if abs(offset) >= _NOTABLE_SKEW:
            good = None if abs(offset) < _FATAL_SKEW else False
            return Step("clock", good, f"the service is {offset:+.0f} s ahead of this machine", advice)
        return Step("clock", True, f"within {abs(offset):.0f} s of the service's")

    async def _server_steps(self) -> list[Step]:
        try:
            told = await asyncio.to_thread(
                describe,
                self._target,
                self._credentials.get(self._target),
                self._settings.aws,
                self._settings.upstream.proxy,
            )
        except (PresignError, CredentialsUnavailable) as error:
            return [Step.failed("server", "SageMaker does not tell its state", error.reason, good=None)]
        advice = "" if told.running else _start_advice(self._target)
        return [
            Step("server", told.running, f"{told.name} is {told.status}", advice),
            _version(told.version, _installed_client()),
        ]


def _start_advice(target: Target) -> str:
    if target.arn.mode is Mode.APP:
        return "See its state in the SageMaker console."
    return f"aws sagemaker start-mlflow-tracking-server --tracking-server-name {target.arn.resource}"


def _installed_client() -> str | None:
    for distribution in ("mlflow", "mlflow-skinny"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _version(server: str | None, client: str | None) -> Step:
    """Clients older than the server are fine; newer ones may call what the server does not have yet."""
    if server is None:
        return Step("version", None, "SageMaker does not tell the MLflow version")
    if client is None:
        return Step("version", True, f"MLflow {server}; no MLflow client is installed here to compare with")
    major: Callable[[str], list[int]] = lambda text: [int(p) for p in text.split(".")[:2] if p.isdigit()]  # noqa: E731
    if major(client) > major(server):
        advice = f"Calls that came after {server} answer 404 there; mlflow=={server} on the client is sure to fit."
        return Step("version", None, f"MLflow {server} at the server, {client} at the client here", advice)
    return Step("version", True, f"MLflow {server} at the server, {client} at the client here")


def presign(settings: Settings, name: str, *, link_expires: int, session_expires: int) -> str:
    """A fresh link to a target's UI, for the command line. Raises click.ClickException."""
    target = next((target for target in settings.build_targets() if target.name == name), None)
    if target is None:
        names = ", ".join(target.name for target in settings.targets)
        raise click.ClickException(f"there is no target {name!r}; there are: {names}")

    async def link() -> str:
        credentials = CredentialStore([target], settings.aws, proxy=settings.upstream.proxy)
        await credentials.start()
        try:
            return await asyncio.to_thread(
                presigned_url,
                target,
                credentials.get(target),
                settings.aws,
                link_expires=link_expires,
                session_expires=session_expires,
                proxy=settings.upstream.proxy,
            )
        finally:
            await credentials.close()

    try:
        return asyncio.run(link())
    except (PresignError, CredentialsUnavailable) as error:
        raise click.ClickException(error.reason) from None
