"""What `make destroy` is going to do: which stacks go, which stay and why, and what people see before they agree.

Only looks. What must not be destroyed now, because it is not ours or somebody deploys it, is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from infra.commands import buckets, stacks, studio
from infra.commands.aws import Account
from infra.commands.stacks import SHARED, Resource, Say, Stack
from infra.commands.studio import Member


class Refused(Exception):
    """It must not be destroyed now. The message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """Stacks that go, in this order; stacks that stay, with reasons; and what else is known of them.

    `gone`: names in question of which no stack is there. `used`: ids of all resources that stacks still have.
    `attached`: domains that are gone, but whose mount targets or groups are not.
    """

    mode: str
    environment: str | None
    leaving: list[Stack]
    staying: list[tuple[Stack, str]]
    gone: frozenset[str]
    used: frozenset[str]
    resources: dict[str, list[Resource]]
    keeps: dict[str, dict[str, str]]
    members: list[Member]
    attached: list[str]

    @property
    def word(self) -> str:
        """What a person types to have the stacks deleted."""
        return stacks.of_mode(self.mode)[0]


def look(account: Account, mode: str, environment: str | None) -> Plan:
    """The plan for a mode. `environment`: what the stacks must have been deployed with, if known. Raises Refused."""
    client = account.client("cloudformation")
    own = stacks.of_mode(mode)
    others = stacks.of_mode(next(one for one in stacks.MODES if one != mode))
    there = {name: found for name in (*own, *others, *SHARED) if (found := stacks.find(client, name)) is not None}
    leaving, staying = _decide(account, there, own, others)
    _refuse(leaving)
    declared = {one.name: stacks.declared(client, one) for one in leaving}
    environments = {one.environment for one in declared.values() if one.environment}
    if environment is not None and environments - {environment}:
        raise Refused(
            f"These stacks were deployed with STACK_ENV={', '.join(sorted(environments))}, but STACK_ENV is "
            f"{environment}; say the right one, or leave it out"
        )
    resources = {name: stacks.resources(client, one) for name, one in there.items()}
    members = [
        member
        for one in leaving
        for domain in studio.domains(resources[one.name])
        for member in studio.members(account, domain, resources[one.name])
    ]
    gone = frozenset({*own, *SHARED} - there.keys())
    return Plan(
        mode=mode,
        environment=next(iter(environments), None),
        leaving=leaving,
        staying=staying,
        gone=gone,
        used=frozenset(one.physical for found in resources.values() for one in found if one.physical),
        resources=resources,
        keeps={name: one.keeps for name, one in declared.items()},
        members=members,
        attached=[one for one in domains_gone(account, gone) if studio.is_attached(account, one)],
    )


def domains_gone(account: Account, gone: frozenset[str]) -> Iterator[str]:
    """The domains of stacks that are gone."""
    client = account.client("cloudformation")
    if SHARED[0] in gone:
        for stack in stacks.deleted(client, SHARED[:1]):
            yield from studio.domains(stacks.resources(client, stack))


def _decide(
    account: Account, there: dict[str, Stack], own: tuple[str, ...], others: tuple[str, ...]
) -> tuple[list[Stack], list[tuple[Stack, str]]]:
    leaving = [there[name] for name in own if name in there]
    staying: list[tuple[Stack, str]] = []
    other = [name for name in others if name in there]
    for stack in (there[name] for name in SHARED if name in there):
        if other:
            staying.append((stack, f"the other mode uses it ({', '.join(other)})"))
            continue
        users = stacks.importers(account.client("cloudformation"), stack, [one.name for one in leaving])
        if users:
            staying.append((stack, f"other stacks use what it exports ({', '.join(sorted(users))})"))
        else:
            leaving.append(stack)
    return leaving, staying


def _refuse(leaving: list[Stack]) -> None:
    for stack in leaving:
        if not stack.is_ours:
            raise Refused(
                f"{stack.name} is not of this project: its description is {stack.description!r}. AWS's published "
                "sample uses the same names; delete such stacks in the CloudFormation console"
            )
    busy = [f"{stack.name} ({stack.status})" for stack in leaving if stack.is_busy]
    if busy:
        raise Refused(
            f"A deployment is under way: {', '.join(busy)}. Wait until it has ended, or cancel it in the "
            "CloudFormation console; then run this again"
        )


def show(account: Account, plan: Plan, say: Say) -> None:
    """Tell everything that somebody should know before agreeing."""
    environment = plan.environment or "unknown"
    say(f"Account {account.id}, region {account.region}, environment {environment}, mode {plan.mode}\n")
    for stack in plan.leaving:
        count = len([one for one in plan.resources[stack.name] if one.status != "DELETE_COMPLETE"])
        protected = ", protected" if stack.protected else ""
        say(f"  ✗ {stack.name}: {stack.status}, {stack.age}, {count} resources{protected}: will be deleted")
        _show_contents(account, plan, stack, say)
    for stack, why in plan.staying:
        say(f"  · {stack.name}: {stack.status}, {stack.age}: stays, because {why}")
    for name in sorted(plan.gone):
        say(f"    {name}: not there")
    for member in plan.members:
        say(f"  ✗ Studio: {member}: was made by hand and must go first; asked for by itself")
    if plan.attached or any(SHARED[0] == one.name for one in plan.leaving):
        say("  ✗ mount targets and NFS security groups of the SageMaker domain: will be deleted; the files stay")
    say("")


def _show_contents(account: Account, plan: Plan, stack: Stack, say: Say) -> None:
    for one in plan.resources[stack.name]:
        kept = one.logical in plan.keeps[stack.name]
        if one.type == "AWS::S3::Bucket" and one.physical:
            end = "kept, asked for afterwards" if kept else "deleted with it"
            found = buckets.contents(account, one.physical)
            say(f"      bucket {one.physical}: {found or 'not there'}: {end}")
        elif kept:
            say(f"      {one.type} {one.physical}: kept, asked for afterwards")
