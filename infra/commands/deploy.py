"""`make deploy`: looks at what must be there, deploys the mode's four stacks in order, and tries the result.

Safe to repeat: what is up to date takes seconds, and what was interrupted or failed is gone on with. Exit codes: 0
deployed (and validated, or plainly said not to be), 1 a stack or the validation failed, 2 something is missing before,
130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from botocore.exceptions import BotoCoreError, ClientError

from infra.commands import cdk, prerequisites, validation
from infra.commands.prerequisites import BOOTSTRAP_OLDEST, Account, Ready, Report, client
from infra.settings import Settings
from mlflow_proxy.access.key_record import KeysError

_ROOT = cdk.INFRA.parent
_ASSEMBLY = _ROOT / "build" / "cdk.out"
# A public load balancer's name takes minutes until all know it; an internal one is there, or there is no way to it.
_REACH_PUBLIC, _REACH_INTERNAL = 300.0, 10.0
# What CloudFormation writes for resources that it gave up because another one failed.
_CONSEQUENCE = "cancelled"


class Failed(Exception):
    """The deployment cannot go on. The message says why and what to do."""


def main() -> None:
    """Deploy, as environment variables say."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(_deploy(os.environ))
    except Failed as error:
        _say(f"\n✗ {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("\nInterrupted. What CloudFormation has begun, it ends; run the same command again to go on from there.")
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  (signal's)
    """Let SIGTERM clean up as Ctrl-C does."""
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _deploy(environ: Mapping[str, str]) -> int:
    started = time.monotonic()
    _say("Looking at what must be there:")
    ready = prerequisites.check(environ, report := Report())
    if ready is None:
        many = f"{len(report.problems)} {'thing' if len(report.problems) == 1 else 'things'}"
        _say(f"\nNothing was deployed: {many} to mend first, marked ✗. Then run the same command again.")
        return 2
    environ = {**environ, "AWS_REGION": ready.account.region, "AWS_DEFAULT_REGION": ready.account.region}
    if not ready.bootstrapped and not _bootstrap(ready, environ):
        return 2
    _synthesize(environ)
    _deploy_stacks(ready, environ)
    outputs = _outputs(ready)
    code = _validate(ready.settings, ready.account, outputs)
    _say(f"\nDeployed in {_elapsed(started)}." if code == 0 else "\nDeployed, but the validation failed; see above.")
    _say(_summary(ready.settings, ready.account, outputs))
    return code


def _bootstrap(ready: Ready, environ: Mapping[str, str]) -> bool:
    """Make or update CDK's own stack, if that is wanted."""
    where = f"aws://{ready.account.id}/{ready.account.region}"
    if environ.get("BOOTSTRAP") != "yes" and not _agrees(f"Bootstrap CDK in {where} (a bucket, a registry, roles)?"):
        _say(
            f"\nNothing was deployed: CDK is not bootstrapped in {where}, or in a version before {BOOTSTRAP_OLDEST}. "
            "It needs a bucket and roles there; let this command make them:\n"
            f"  make deploy MLFLOW_TYPE={ready.settings.mlflow_type} BOOTSTRAP=yes"
        )
        return False
    with _stage("bootstrap"):
        # It would synthesize before, though it needs nothing of the application: an empty one will do.
        # Where there is no cdk.json, it asks for no application.
        cdk.run(["bootstrap", where], environ=environ, folder=_ROOT)
    return True


def _agrees(question: str) -> bool:
    """Ask, where there is somebody to ask."""
    return sys.stdin.isatty() and input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


@contextmanager
def _stage(title: str) -> Iterator[None]:
    """One line before and one after, with the time that it took. Raises Failed for what CDK could not do."""
    started = time.monotonic()
    _say(f"\n── {title}")
    try:
        yield
    except cdk.CdkFailed as error:
        raise Failed(f"{title} failed after {_elapsed(started)}: {error}") from None
    except KeyboardInterrupt:
        _say(f"\n── {title}: interrupted after {_elapsed(started)}")
        raise
    _say(f"── {title}: done in {_elapsed(started)}")


def _elapsed(started: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _synthesize(environ: Mapping[str, str]) -> None:
    """Templates and what is sent with them, once for all stacks. The first time, packages are fetched: a minute."""
    with _stage("build and synthesize"):
        cdk.run(["synth", "--quiet", "--output", str(_ASSEMBLY)], environ=environ)


def _deploy_stacks(ready: Ready, environ: Mapping[str, str]) -> None:
    from infra.app import stack_ids  # noqa: PLC0415  (starts Node.js)

    asks = ready.settings.is_prod and environ.get("YES") != "1"
    approval = "broadening" if asks else "never"
    names = stack_ids(ready.settings.mlflow_type)
    formation = client("cloudformation", ready.account.region)
    for number, name in enumerate(names, 1):
        title = f"{number}/{len(names)} {name}"
        arguments = ["deploy", "--app", str(_ASSEMBLY), "--exclusively", name, "--require-approval", approval]
        try:
            with _stage(title):
                cdk.run(arguments, environ=environ)
        except Failed as error:
            raise Failed(f"{error}\n{_explain(formation, name)}") from None


def _explain(formation: Any, name: str) -> str:
    """What CloudFormation says about a stack's failure, and what to do."""
    lines = []
    try:
        (stack,) = formation.describe_stacks(StackName=name)["Stacks"]
        pages = formation.get_paginator("describe_stack_events").paginate(StackName=name)
        failure = first_failure(event for page in pages for event in page["StackEvents"])
    except (BotoCoreError, ClientError):
        lines.append("  CloudFormation has no events of it: see what CDK printed above.")
    else:
        if failure is not None:
            lines.append(
                f"  First failure: {failure['ResourceType']} {failure['LogicalResourceId']} "
                f"({failure['ResourceStatus']}): {failure.get('ResourceStatusReason', 'no reason given')}"
            )
        else:
            lines.append("  No resource has failed, so see what CDK printed above.")
        lines.append(f"  The stack is in {stack['StackStatus']}.")
    lines.append("  Mend that, then run the same command again: it goes on from there.")
    return "\n".join(lines)


def first_failure(events: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The failure that began the newest operation's end. `events` as DescribeStackEvents gives them, newest first."""
    found = None
    for event in events:
        is_stack = event["PhysicalResourceId"] == event["StackId"]
        status, reason = event["ResourceStatus"], event.get("ResourceStatusReason", "")
        if is_stack and status in ("CREATE_IN_PROGRESS", "UPDATE_IN_PROGRESS", "REVIEW_IN_PROGRESS"):
            break
        if status.endswith("_FAILED") and not is_stack and _CONSEQUENCE not in reason:
            found = event
    return found


def _outputs(ready: Ready) -> dict[str, str]:
    """The outputs of stack 4."""
    from infra.app import stack_ids  # noqa: PLC0415  (starts Node.js)

    name = stack_ids(ready.settings.mlflow_type)[3]
    (stack,) = client("cloudformation", ready.account.region).describe_stacks(StackName=name)["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}


def _validate(settings: Settings, account: Account, outputs: Mapping[str, str]) -> int:
    """Try the deployment; 0 also where that cannot be done from here, which is then said."""
    _say("\n── validation")
    role = validation.role_for_validation(settings)
    if settings.mtls_ca_bundle is not None:
        _say("Deployed, not validated: every caller needs a client certificate, and this command has none.")
        return 0
    if role is None:
        _say("Deployed, not validated: no role may do everything, so none can make and delete what is tried.")
        return 0
    try:
        ca = _certificate(settings, account, outputs)
        return _try(settings, account, outputs, role, ca)
    except (BotoCoreError, ClientError, KeysError) as error:
        _say(f"✗ The validation could not be done: {error}")
        return 1


def _certificate(settings: Settings, account: Account, outputs: Mapping[str, str]) -> Path | None:
    if "CertificateCommand" not in outputs:
        return None
    path = _ROOT / "build" / f"mlflow-proxy-{settings.mlflow_type}.pem"
    validation.save_certificate(client("acm", account.region), outputs["CertificateCommand"], path)
    _say(f"  Saved the self-signed certificate as {path.relative_to(_ROOT)}, for callers to trust.")
    return path


def _try(settings: Settings, account: Account, outputs: Mapping[str, str], role: str, ca: Path | None) -> int:
    url = outputs["Url"]
    public = settings.internet_facing
    reason = validation.unreachable(url, ca, _REACH_PUBLIC if public else _REACH_INTERNAL)
    if reason is not None and public:
        _say(
            f"✗ {url} cannot be reached from here ({reason}). Is this machine's address in allowed_cidrs "
            f"({', '.join(settings.allowed_cidrs)}), and does the name lead to {outputs['LoadBalancerHost']}?"
        )
        return 1
    if reason is not None:
        _say(
            f"Deployed, not validated: the load balancer is internal, and {url} cannot be reached from here "
            f"({reason}).\n{validation.by_hand(settings, outputs, account.region, ca)}"
        )
        return 0
    with validation.short_lived_key(client("secretsmanager", account.region), outputs["KeysSecret"], role) as key:
        if not validation.wait_until_accepted(url, ca, key, validation.REFRESH):
            _say("✗ The proxy does not accept the key. Its log says whether it can read the secret with the keys.")
            return 1
        return 1 if validation.run_validate(url, ca, key) else 0


def _summary(settings: Settings, account: Account, outputs: Mapping[str, str]) -> str:
    """What to do with it now."""
    region, secret = account.region, outputs["KeysSecret"]
    role = settings.roles[-1].name
    console = "console.amazonaws-us-gov.com" if region.startswith("us-gov-") else "console.aws.amazon.com"
    dashboard = f"mlflow-proxy-{settings.mlflow_type}"
    return "\n".join(
        [
            "",
            f"URL         {outputs['Url']}",
            "New key     aws secretsmanager get-secret-value "
            f"--region {region} --secret-id {secret} --query SecretString --output text > keys.jsonl",
            f"            .venv/bin/mlflow-proxy keys new --file keys.jsonl --name me --role {role}",
            "            aws secretsmanager put-secret-value "
            f"--region {region} --secret-id {secret} --secret-string file://keys.jsonl",
            f"Shell       {outputs['ShellCommand']}",
            f"Dashboard   https://{region}.{console}/cloudwatch/home?region={region}#dashboards/dashboard/{dashboard}",
            f"Remove      make destroy MLFLOW_TYPE={settings.mlflow_type}",
        ]
    )


if __name__ == "__main__":
    main()
