"""`make destroy`: takes a mode's stacks away, the shared ones when no mode is left, then what AWS keeps of them.

Each step looks at what is there now, so a run that was interrupted is simply repeated. Nothing is deleted before a word
was typed for it (or named in CONFIRM), and `--dry-run` changes nothing. Exit codes: 0 all is as asked for, 1 something
that was to go is still there, 2 refused or not confirmed, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping

import click
from botocore.exceptions import BotoCoreError, ClientError

from infra.commands import buckets, erasing, looks, plan, retained, stacks
from infra.commands.aws import Account, AccountError, is_credentials, words
from infra.commands.cdk import ContextError
from infra.commands.console import Console
from infra.commands.erasing import Left
from infra.commands.kinds import KINDS, WAITING, Kind, Retained
from infra.commands.plan import Plan, Refused
from infra.commands.removal import remove
from infra.commands.stacks import StillDeleting
from infra.commands.studio import StudioBusy

_NEXT = "Then run the same command again: it goes on where it stopped."


@click.command()
@click.option(
    "--mlflow-type",
    envvar="MLFLOW_TYPE",
    type=click.Choice(stacks.MODES),
    required=True,
    help="The mode whose stacks go (variable MLFLOW_TYPE).",
)
@click.option("--dry-run", is_flag=True, help="Show everything, change nothing (variable DRY_RUN=1).")
def main(mlflow_type: str, dry_run: bool) -> None:
    """Delete the mode's stacks, the shared ones with the last mode, and what AWS keeps of them.

    Words that need not be typed stand in the variable CONFIRM, with commas between them. STACK_ENV, if set, must be
    what the stacks were deployed with.
    """
    environ = os.environ
    dry_run = dry_run or environ.get("DRY_RUN", "").lower() not in ("", "0", "no", "false")
    console = Console(environ, dry_run=dry_run)
    try:
        code = destroy(Account(environ), mlflow_type, environ, console)
    except KeyboardInterrupt:
        console.say(f"\nInterrupted. What CloudFormation has begun, it ends. {_NEXT}")
        code = 130
    except (AccountError, ContextError, Refused) as error:
        console.say(f"✗ {error}")
        code = 2
    except (StillDeleting, StudioBusy) as error:
        console.say(f"✗ {error}")
        code = 1
    except (ClientError, BotoCoreError) as error:
        console.say(f"✗ {_explain(error)}")
        code = 1
    sys.exit(code)


def _explain(error: ClientError | BotoCoreError) -> str:
    if is_credentials(error):
        return (
            f"The AWS credentials are missing or count no more ({words(error)}). Renew them, for example with "
            f"`aws sso login`. {_NEXT}"
        )
    return f"{words(error)}\n  Nothing after that was done. Mend it, or use credentials that may do it. {_NEXT}"


def destroy(account: Account, mode: str, environ: Mapping[str, str], console: Console) -> int:
    """All of it; the exit code."""
    now = plan.look(account, mode, environ.get("STACK_ENV") or None)
    plan.show(account, now, console.say)
    if not _delete_stacks(account, now, console):
        return 0 if console.dry_run and _show_retained(account, now, console) else 2
    left = remove(account, now, console)
    if left:
        _tell(left, console)
        return 1
    return _clean_up(account, plan.look(account, mode, None), console)


def _delete_stacks(account: Account, now: Plan, console: Console) -> bool:
    """Ask for the stacks, and once more for protected ones. Whether to go on."""
    if not now.leaving and not now.attached:
        console.say("No stacks are left to delete.")
        return not console.dry_run
    if not console.confirms(now.word, "Delete these stacks for good"):
        return False
    protected = [one for one in now.leaving if one.protected]
    if not protected:
        return True
    names = ", ".join(one.name for one in protected)
    console.say(f"Protected from deletion, as production is: {names}")
    if not console.confirms(f"unprotect-{now.environment or 'prod'}", "Take the protection away"):
        return False
    for stack in protected:
        stacks.unprotect(account.client("cloudformation"), stack)
    return True


def _found(account: Account, now: Plan, console: Console) -> list[Retained]:
    console.say("\nLooking for what AWS keeps of stacks that are gone …")
    return retained.find(account, now.gone, now.used, console.say)


def _show_retained(account: Account, now: Plan, console: Console) -> bool:
    found = _found(account, now, console)
    _list(found, console)
    for kind in KINDS:
        if kind.word not in WAITING and any(one.kind == kind.word and one.is_ours for one in found):
            console.confirms(kind.word, _question(kind, found))
    console.say("\nDry run: nothing was changed.")
    return True


def _question(kind: Kind, found: Iterable[Retained]) -> str:
    count = len([one for one in found if one.kind == kind.word and one.is_ours])
    return f"Delete {count} ({kind.title})" + (f": {kind.final}" if kind.final else "")


def _list(found: list[Retained], console: Console) -> None:
    for kind in KINDS:
        these = [one for one in found if one.kind == kind.word]
        if these:
            console.say(f"\n{kind.title}. Cost: {kind.cost}.")
        for one in these:
            console.say(f"  · {one.id}: {one.detail} ({one.stack})")
            if not one.is_ours:
                console.say(f"    left alone: only its {' and '.join(sorted(one.signs))} would say that it is ours")
    if not found:
        console.say("Nothing is kept.")
    console.say(
        "\nThe stack CDKToolkit of `cdk bootstrap` stays, for it serves all CDK applications of this account and "
        "region; its bucket holds the files of past deployments, at S3's price per GB and month."
    )


def _clean_up(account: Account, now: Plan, console: Console) -> int:
    found = _found(account, now, console)
    _list(found, console)
    left: list[Left] = []
    for kind in KINDS:
        these = [one for one in found if one.kind == kind.word and one.is_ours]
        if kind.word == "keys":
            these = _keys_without_bucket(account, found, these, console)
        if kind.word == "roles":
            these = _roles_without_mlflow(account, found, these, console)
        if not these or kind.word in WAITING:
            continue
        console.say("")
        if kind.word == "buckets":
            for name, identity in _mlflow_there(account, found).items():
                console.say(f"MLflow {identity} is still there, and has its artifacts in a bucket of {name}.")
        if console.confirms(kind.word, _question(kind, these)):
            left += erasing.erase(account, these, console.say)
    _tell(left, console)
    for stack, why in now.staying:
        console.say(f"Stays: {stack.name}: {why}")
    return 1 if left else 0


def _keys_without_bucket(
    account: Account, found: list[Retained], keys: list[Retained], console: Console
) -> list[Retained]:
    """Keys that no bucket needs any more: without its key, a bucket that was kept would be lost."""
    if not keys:
        return []
    still_there = [one for one in found if one.kind == "buckets" and buckets.contents(account, one.id) is not None]
    needed = erasing.needed_keys(account, still_there)
    for one in keys:
        if one.id in needed:
            console.say(f"\nKMS key {one.id} is kept: bucket {needed[one.id]} cannot be read without it.")
    return [one for one in keys if one.id not in needed]


def _roles_without_mlflow(
    account: Account, found: list[Retained], roles: list[Retained], console: Console
) -> list[Retained]:
    """Roles that no MLflow needs any more: without its role, one that was kept could not reach its artifacts."""
    there = _mlflow_there(account, found)
    for one in roles:
        if one.stack in there:
            console.say(f"\nIAM role {one.id} is kept: MLflow {there[one.stack]} reaches its artifacts with it.")
    return [one for one in roles if one.stack not in there]


def _mlflow_there(account: Account, found: list[Retained]) -> dict[str, str]:
    """What MLflow is still there, by stack."""
    return {one.stack: one.id for one in found if one.kind == "mlflow" and looks.mlflow(account, one.id) is not None}


def _tell(left: list[Left], console: Console) -> None:
    if left:
        console.say("\nLeft, though it was to go:")
        for one in left:
            console.say(f"  ✗ {one.what}: {one.why}")
        console.say(f"docs/cleanup.md says what to do about each. {_NEXT}")
    else:
        console.say("\nDone.")


if __name__ == "__main__":
    main()
