"""`make destroy` against moto's server, with stacks that the real `cdk` deployed: both modes and orders, interruptions.

What moto cannot do, and so is not proved here: it lets nobody wait for AWS's own services to take their interfaces
away; its tag index has no elastic IP addresses; its functions and clusters write no logs (the test makes the groups
that Lambda and ECS would make); its domain makes neither file system nor groups (the test makes them as SageMaker
does); CloudFormation's keys go at once, where AWS lets them wait. moto_deletion.py lists what had to be added to it.
"""

from __future__ import annotations

import functools
import json
import os
import pty
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from infra.app import stack_ids
from infra.certificate import handler
from infra.commands import destroy, erasing, kinds, looks, removal, retained, stacks, studio
from infra.commands.aws import Account
from infra.commands.kinds import KINDS, RECORD, TAGS, WAITING, Retained
from tests.infra import gate
from tests.infra.gate import Answer, Asked, Gate
from tests.infra.test_rehearsal import (
    Cloud,
    _existing_vpc,
    _server,
    cdk_command,  # noqa: F401  (a fixture)
)
from tests.infra.variants import ACCOUNT, PROD, REGION, ROOT, settings, synthesize

SHARED = stack_ids("tracking")[:2]
FLASKAPP = {mode: stack_ids(mode)[3] for mode in ("tracking", "serverless")}
EVERYTHING = ",".join(kind.word for kind in KINDS if kind.word not in WAITING)
PAGE = (ROOT / "docs" / "cleanup.md").read_text("utf-8")


class Ran(NamedTuple):
    code: int
    output: str


class Site:
    """moto, a gate before it, and the command that goes through the gate."""

    def __init__(self, cloud: Cloud, before: Gate) -> None:
        self.cloud = cloud
        # Each client takes as long to make as dozens of calls.
        cloud.client = functools.cache(cloud.client)  # type: ignore[method-assign]
        self.gate = before
        self.environ = cloud.environ | {"AWS_ENDPOINT_URL": f"http://localhost:{before.port}"}

    def run(self, mode: str, *arguments: str, confirm: str = "", **more: str) -> Ran:
        """The command in this process."""
        environ = self.environ | {"MLFLOW_TYPE": mode, "CONFIRM": confirm} | more
        done = CliRunner().invoke(destroy.main, arguments, env=environ)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return Ran(done.exit_code, done.output)

    def start(self, mode: str, confirm: str) -> subprocess.Popen[str]:
        """The command as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "infra.commands.destroy"],
            cwd=ROOT,
            env=self.environ | {"MLFLOW_TYPE": mode, "CONFIRM": confirm},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @contextmanager
    def as_caller(self) -> Iterator[Account]:
        """For calls of functions: this process has the command's environment."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environ.items():
                patch.setenv(name, value)
            yield Account(self.environ)

    def deploy(self, *modes: str, **more: str) -> None:
        for mode in modes:
            self.cloud.deploy(synthesize(mode, "ec2" if mode == "tracking" else "fargate", **more))

    def physical(self, stack: str, type_: str) -> list[str]:
        pages = self.cloud.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=stack)
        found = (one for page in pages for one in page["StackResourceSummaries"])
        return [one["PhysicalResourceId"] for one in found if one["ResourceType"] == type_]

    def state(self) -> dict[str, Any]:
        """What there is, as far as somebody could lose it."""
        kms, ec2, efs = (self.cloud.client(name) for name in ("kms", "ec2", "efs"))
        formation = self.cloud.client("cloudformation")
        s3 = self.cloud.client("s3")
        left = self.cloud.left()
        return left | {
            "stacks": [(one["StackName"], one["StackStatus"]) for one in formation.describe_stacks()["Stacks"]],
            "protected": [one.get("EnableTerminationProtection") for one in formation.describe_stacks()["Stacks"]],
            "versions": {name: s3.list_object_versions(Bucket=name).get("Versions") for name in left["buckets"]},
            "keys": [(one["KeyId"], one["KeyState"]) for one in _keys(kms)],
            "groups of VPCs": [one["GroupId"] for one in ec2.describe_security_groups()["SecurityGroups"]],
            "interfaces": [one["NetworkInterfaceId"] for one in ec2.describe_network_interfaces()["NetworkInterfaces"]],
            "file systems": [one["FileSystemId"] for one in efs.describe_file_systems()["FileSystems"]],
        }


def _keys(kms: Any) -> list[dict[str, Any]]:
    keys = [one["KeyId"] for page in kms.get_paginator("list_keys").paginate() for one in page["Keys"]]
    described = [kms.describe_key(KeyId=one)["KeyMetadata"] for one in keys]
    # moto makes the one that AWS has for volumes when it is first needed.
    return [one for one in described if "Default master key" not in one["Description"]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, cdk_command: list[str]) -> Iterator[Site]:  # noqa: F811
    with (
        _server(tmp_path_factory.mktemp("moto"), cdk_command) as cloud,
        gate.running(int(cloud.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as before,
    ):
        yield Site(cloud, before)


@pytest.fixture
def site(running: Site) -> Site:
    """An account with nothing in it but what `cdk bootstrap` makes."""
    endpoint = running.cloud.environ["AWS_ENDPOINT_URL"]
    with urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"", timeout=30):
        pass
    running.cloud.cdk("bootstrap", f"aws://{ACCOUNT}/{REGION}")
    running.gate.asked.clear()
    return running


@pytest.fixture
def empty(running: Site) -> Site:
    """An account with nothing in it."""
    endpoint = running.cloud.environ["AWS_ENDPOINT_URL"]
    with urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"", timeout=30):
        pass
    running.gate.asked.clear()
    return running


def _given_certificate(site: Site) -> dict[str, str]:
    certificate, key = handler.make_certificate("mlflow.example.com")
    made = site.cloud.client("acm").import_certificate(Certificate=certificate, PrivateKey=key)
    return PROD | {"certificate_arn": str(made["CertificateArn"])}


def _like_sagemaker(site: Site, domain: str, subnets: list[str], vpc: str) -> dict[str, Any]:
    """What SageMaker makes for a domain and CloudFormation leaves: file system, mount targets, groups, log streams."""
    ec2, efs, logs = (site.cloud.client(name) for name in ("ec2", "efs", "logs"))
    tag = {"Key": studio.TAG, "Value": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:domain/{domain}"}
    groups = []
    for name in studio.GROUPS:
        made = ec2.create_security_group(
            GroupName=name.format(domain),
            Description=f"[DO NOT DELETE] NFS traffic for SageMaker Notebooks Domain [{domain}]",
            VpcId=vpc,
            TagSpecifications=[{"ResourceType": "security-group", "Tags": [tag]}],
        )
        groups.append(made["GroupId"])
    inbound, outbound = groups

    def towards(group: str) -> list[dict[str, Any]]:
        return [{"IpProtocol": "tcp", "FromPort": 2049, "ToPort": 2049, "UserIdGroupPairs": [{"GroupId": group}]}]

    ec2.authorize_security_group_ingress(GroupId=inbound, IpPermissions=towards(outbound))
    ec2.authorize_security_group_egress(GroupId=outbound, IpPermissions=towards(inbound))
    system = efs.create_file_system(CreationToken=domain, Tags=[tag])["FileSystemId"]
    for subnet in subnets:
        efs.create_mount_target(FileSystemId=system, SubnetId=subnet, SecurityGroups=[inbound])
    if not logs.describe_log_groups(logGroupNamePrefix=looks.STUDIO_LOGS)["logGroups"]:
        logs.create_log_group(logGroupName=looks.STUDIO_LOGS)
    stream = f"{domain}/mlflow/JupyterServer/default"
    logs.create_log_stream(logGroupName=looks.STUDIO_LOGS, logStreamName=stream)
    return {"groups": groups, "system": system, "stream": stream}


def _studio_of(site: Site) -> dict[str, Any]:
    (vpc,) = site.physical(SHARED[0], "AWS::EC2::VPC")
    subnets = site.cloud.client("ec2").describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
    zones = {one["AvailabilityZone"]: one["SubnetId"] for one in subnets}
    return _like_sagemaker(site, site.cloud.outputs(SHARED[1])["DomainId"], list(zones.values()), vpc)


def _neighbours(site: Site) -> dict[str, Any]:
    """Things of others with names, tags or places like ours; each has one of our signs, or none."""
    ec2, s3, logs, kms, secrets = (site.cloud.client(one) for one in ("ec2", "s3", "logs", "kms", "secretsmanager"))
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.1.0/24")["Subnet"]["SubnetId"]
    home = _like_sagemaker(site, "d-neighbour", [subnet], vpc)
    mlflow = stack_ids("tracking")[2]
    ours = {"project": "sagemaker-mlflow-proxy", "stack": mlflow}
    buckets = {
        f"{mlflow}-artifacts-backup": {},
        f"{mlflow}-artifacts82dd59a1-0123456789ab": {},  # the form of CloudFormation's, and no more
        "team-data": ours,  # tags copied
        f"{mlflow}-artifacts82dd59a1-ba9876543210": ours | {"stack": "another"},
    }
    for name, tags in buckets.items():
        s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        s3.put_object(Bucket=name, Key="precious", Body=b"data")
        if tags:
            s3.put_bucket_tagging(
                Bucket=name, Tagging={"TagSet": [{"Key": one, "Value": tags[one]} for one in sorted(tags)]}
            )
    groups = [f"/aws/lambda/{FLASKAPP['tracking']}-mine", f"{FLASKAPP['tracking']}-ProxyLogs3C0DA2B0-abcdef123456"]
    # More than a page of them, before and after ours.
    groups += [f"sagemaker-infra-{letter}-{number:02}" for letter in "az" for number in range(28)]
    for name in groups:
        logs.create_log_group(logGroupName=name)
    key = kms.create_key(
        Description="Somebody's", Tags=[{"TagKey": name, "TagValue": value} for name, value in ours.items()]
    )["KeyMetadata"]["KeyId"]
    secret = secrets.create_secret(
        Name=f"{FLASKAPP['tracking']}-Keys4E30B592-abc", SecretString="x", Description="API keys of the MLflow proxy"
    )["ARN"]
    return {"vpc": vpc, "home": home, "buckets": list(buckets), "logs": groups, "key": key, "secret": secret}


def _check_neighbours(site: Site, there: dict[str, Any]) -> None:
    state = site.state()
    assert there["vpc"] in state["vpcs"]
    assert set(there["home"]["groups"]) <= set(state["groups of VPCs"])
    assert there["home"]["system"] in state["file systems"]
    assert len(site.cloud.client("efs").describe_mount_targets(FileSystemId=there["home"]["system"])["MountTargets"])
    assert all(state["versions"][name] for name in there["buckets"]), "with their objects"
    logs = site.cloud.client("logs")
    assert set(there["logs"]) <= _log_groups(site)
    streams = logs.describe_log_streams(logGroupName=looks.STUDIO_LOGS)["logStreams"]
    assert [one["logStreamName"] for one in streams] == [there["home"]["stream"]]
    assert (there["key"], "Enabled") in state["keys"]
    assert "DeletedDate" not in site.cloud.client("secretsmanager").describe_secret(SecretId=there["secret"])


def _log_groups(site: Site) -> set[str]:
    pages = site.cloud.client("logs").get_paginator("describe_log_groups").paginate()
    return {one["logGroupName"] for page in pages for one in page["logGroups"]}


def _fill(site: Site, mode: str) -> str:
    """Three versions and a delete marker in a mode's bucket; its name."""
    bucket = site.cloud.outputs(stack_ids(mode)[2])["ArtifactBucket"]
    s3 = site.cloud.client("s3")
    for number in range(3):
        s3.put_object(Bucket=bucket, Key=f"1/abc/artifacts/{number // 2}", Body=b"12345678")
    s3.delete_object(Bucket=bucket, Key="1/abc/artifacts/0")
    s3.create_multipart_upload(Bucket=bucket, Key="never ended")
    return bucket


def _protected(mode: str, *words: str) -> str:
    return ",".join((FLASKAPP[mode], "unprotect-prod", *words))


@pytest.mark.parametrize("first", ["tracking", "serverless"])
def test_prod_goes_with_all_that_is_kept_and_neighbours_stay(site: Site, first: str) -> None:
    second = "serverless" if first == "tracking" else "tracking"
    site.deploy("tracking", "serverless", **_given_certificate(site))
    home = _studio_of(site)
    others = _neighbours(site)
    # More than a page of versions, once.
    full = {mode: _fill(site, mode) for mode in (first, second)}
    # More than a page of versions and markers: each deletion adds a marker.
    keys = [{"Key": "1/abc/artifacts/1"}] * 1000
    site.cloud.client("s3").delete_objects(Bucket=full[first], Delete={"Objects": keys})
    (cluster,) = site.physical(FLASKAPP["serverless"], "AWS::ECS::Cluster")
    site.cloud.client("logs").create_log_group(logGroupName=f"/aws/ecs/containerinsights/{cluster}/performance")
    groups_of_stacks = [name for name in _log_groups(site) if name not in others["logs"] and name != looks.STUDIO_LOGS]
    assert len(groups_of_stacks) == 4

    before = site.state()
    site.gate.asked.clear()
    dry = site.run(first, DRY_RUN="1")
    assert (dry.code, site.gate.changes) == (0, []), dry.output
    assert site.state() == before
    for text in (
        f"Account {ACCOUNT}, region {REGION}, environment prod, mode {first}",
        f"{FLASKAPP[first]}: CREATE_COMPLETE, ",
        ", protected: will be deleted",
        f"{SHARED[0]}: CREATE_COMPLETE",
        f"stays, because the other mode uses it ({FLASKAPP[second]}",
        f"bucket {full[first]}: ",
        "kept, asked for afterwards",
        f"would ask: Delete these stacks for good; the word is {FLASKAPP[first]}",
    ):
        assert text in dry.output

    assert site.run(first, confirm=EVERYTHING).code == 2, "the stacks' word is not among these"
    refused = site.run(first, confirm=FLASKAPP[first])
    assert refused.code == 2
    assert "Take the protection away: not confirmed" in refused.output
    assert site.state() == before

    done = site.run(first, confirm=_protected(first, EVERYTHING))
    assert done.code == 0, done.output
    assert site.cloud.stacks() == set(stack_ids(second))
    assert f"Stays: {SHARED[0]}" in done.output
    assert full[first] not in site.cloud.left()["buckets"]
    assert f"{full[first]}: 1,004 versions and delete markers deleted" in done.output

    kept = site.run(second, confirm=_protected(second))
    assert kept.code == 0, kept.output
    assert site.cloud.stacks() == set()
    _check_listed(kept, full[second], home, mode=second)
    looked = (done if first == "tracking" else kept).output
    assert f"{stack_ids('tracking')[2]}-artifacts82dd59a1-0123456789ab: 1 object" in looked
    assert "left alone: only its name would say that it is ours" in looked
    assert "left alone: only its tags would say that it is ours" in looked
    assert home["system"] in site.state()["file systems"], "data is not what stands in the way"

    site.gate.asked.clear()
    # A tracking server of that name may be another by now, and is, when it has not our tags.
    with site.gate.rule(lambda asked, _: _NO_TAGS if asked.operation == "ListTags" else None):
        other = site.run(second, confirm="mlflow")
    assert other.code == 0
    assert "MLflow tracking servers and Apps. Cost: " in other.output
    assert site.gate.changes == []

    # Of what was only listed, CloudFormation's record is gone some day.
    with site.gate.rule(_forgotten):
        late = site.run(second, confirm=EVERYTHING)
    assert late.code == 0, late.output
    assert full[second] not in site.cloud.left()["buckets"], "tags and name are enough"
    assert home["system"] in site.state()["file systems"], "SageMaker's tag alone is not"

    last = site.run(second, confirm=EVERYTHING)
    assert last.code == 0, last.output
    deleted = "DeleteMlflowTrackingServer" if second == "tracking" else "DeleteMlflowApp"
    assert site.gate.changes.count(deleted) == 1
    _check_neighbours(site, others)
    _check_nothing_else(site, others)
    again = site.run(second, confirm=EVERYTHING)
    assert (again.code, "No stacks are left" in again.output) == (0, True)


_NO_TAGS: Answer = (200, "application/x-amz-json-1.1", b'{"Tags": []}')


def _forgotten(asked: Asked, ask: Callable[[], Answer]) -> Answer | None:
    """CloudFormation after 90 days."""
    if asked.operation != "ListStacks":
        return None
    return (
        200,
        "text/xml",
        b"<ListStacksResponse><ListStacksResult><StackSummaries/></ListStacksResult></ListStacksResponse>",
    )


def _check_listed(ran: Ran, bucket: str, home: dict[str, Any], mode: str) -> None:
    for text in (
        f"{bucket}: 2 objects in 3 versions, 1 delete marker, 24 B ({stack_ids(mode)[2]})",
        f"{FLASKAPP[mode]}-ProxyLogs",
        f"{SHARED[0]}-FlowLogs",
        "kept 365 days",
        f"{home['system']}: 0 B of home folders ({SHARED[1]})",
        f"1 streams in {looks.STUDIO_LOGS}",
        "cannot be read without it",
        "reaches its artifacts with it",
        "CDKToolkit",
        "deleting mount target",
        "deleting security group security-group-for-inbound-nfs-d-",
        f"{SHARED[0]} is gone after",
    ):
        assert text in ran.output, text
    for kind in ("mlflow", "buckets", "log-groups", "log-streams", "secrets", "home-folders"):
        assert f"add the word to CONFIRM: {kind}\n" in ran.output


def _check_nothing_else(site: Site, others: dict[str, Any]) -> None:
    """Of all that the stacks made, there is nothing but what waits for its date."""
    left = site.cloud.left()
    assert left["vpcs"] == [others["vpc"]]
    assert set(left["buckets"]) == set(others["buckets"])
    assert _log_groups(site) == {*others["logs"], looks.STUDIO_LOGS}
    assert left["addresses"] == left["load balancers"] == left["groups"] == left["clusters"] == []
    assert left["secrets"] == [others["secret"]]
    waiting = {state for key, state in site.state()["keys"] if key != others["key"]}
    assert waiting == {"PendingDeletion"}
    assert not [one for one in site.cloud.client("iam").list_roles()["Roles"] if "MlflowRole" in one["RoleName"]]
    assert site.state()["file systems"] == [others["home"]["system"]]


def test_dev_in_an_existing_vpc_goes_when_the_word_is_typed(site: Site) -> None:
    """Also what people made in Studio. Nothing in the VPC is touched but what is ours."""
    vpc = _existing_vpc(site.cloud)
    own = json.loads((ROOT / "infra" / "cdk.json").read_text())
    app = f"PYTHONPATH={ROOT} {sys.executable} -P -m infra.app"
    context = own["context"] | settings(vpc_id=vpc)
    (site.cloud.log.parent / "cdk.json").write_text(json.dumps({"app": app, "context": context}))
    site.cloud.cdk("deploy", "--require-approval", "never", "--all")
    ec2, sagemaker = site.cloud.client("ec2"), site.cloud.client("sagemaker")
    domain = site.cloud.outputs(SHARED[1])["DomainId"]
    subnet = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"][0]["SubnetId"]
    home = _like_sagemaker(site, domain, [subnet], vpc)
    theirs = _like_sagemaker(site, "d-theirs", [subnet], vpc)
    foreign = ec2.create_network_interface(SubnetId=subnet)["NetworkInterface"]["NetworkInterfaceId"]
    # More than a page of them.
    for number in range(12):
        sagemaker.create_space(DomainId=domain, SpaceName=f"space-{number}")
    sagemaker.create_user_profile(DomainId=domain, UserProfileName="anna")
    for owner in ({"UserProfileName": "mlflow"}, {"UserProfileName": "anna"}, {"SpaceName": "space-3"}):
        sagemaker.create_app(DomainId=domain, AppType="JupyterLab", AppName=next(iter(owner.values())), **owner)
    (function, *_) = site.physical(stack_ids("tracking")[2], "AWS::Lambda::Function")
    site.cloud.client("logs").create_log_group(logGroupName=f"/aws/lambda/{function}")

    output = _typed(site, "tracking", [FLASKAPP["tracking"], "no, thanks"])
    assert "there are still apps, spaces or users in the domain" in output
    assert site.cloud.stacks() == set(SHARED), "what came before is done, and nothing after"
    output = _typed(site, "tracking", [FLASKAPP["tracking"], removal.STUDIO_WORD, "log-groups", "yes", "home-folders"])
    assert "app JupyterLab/space-3 of space-3" in output
    assert "environment dev" in output
    assert "unprotect" not in output
    assert site.cloud.stacks() == set()
    state = site.state()
    assert state["vpcs"] == [vpc]
    assert foreign in state["interfaces"]
    assert not set(home["groups"]) & set(state["groups of VPCs"])
    assert set(theirs["groups"]) <= set(state["groups of VPCs"])
    assert state["file systems"] == [theirs["system"]]
    assert state["log groups"] == [looks.STUDIO_LOGS]
    streams = site.cloud.client("logs").describe_log_streams(logGroupName=looks.STUDIO_LOGS)["logStreams"]
    assert {one["logStreamName"] for one in streams} == {home["stream"], theirs["stream"]}, "'yes' is not the word"
    assert state["buckets"] == []
    assert state["keys"] == []


def _typed(site: Site, mode: str, lines: list[str]) -> str:
    """The command at a terminal, where somebody answers each question with the next line."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.commands.destroy"],
        cwd=ROOT,
        env=site.environ | {"MLFLOW_TYPE": mode},
        stdin=there,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.close(there)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    output, answered, until = "", 0, time.monotonic() + 120
    try:
        while time.monotonic() < until:
            ended = process.poll() is not None
            output += (process.stdout.read() or b"").decode()
            if ended:
                break
            if output.count("anything else to leave it: ") > answered and answered < len(lines):
                os.write(here, f"{lines[answered]}\n".encode())
                answered += 1
            time.sleep(0.02)
        else:
            raise AssertionError(f"did not end:\n{output}")
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()
        os.close(here)
    assert answered == len(lines), output
    return output


# Where the command is killed: after the next request for this was carried out.
KILLS = (
    "DeleteStack",
    "DeleteStack",
    "DELETE /2015-02-01/mount-targets/",
    "RevokeSecurityGroupIngress",
    "DeleteStack",
    "DeleteObjects",
    "DeleteLogGroup",
)


def test_killed_anywhere_it_goes_on_when_repeated(site: Site) -> None:
    site.deploy("tracking", **_given_certificate(site))
    home = _studio_of(site)
    bucket = _fill(site, "tracking")
    words = _protected("tracking", EVERYTHING)
    for operation in KILLS:
        output = _killed(site, operation, words)
        assert "Traceback" not in output
        assert (bucket in site.cloud.left()["buckets"]) is (operation != "DeleteLogGroup"), operation
    end = site.run("tracking", confirm=words)
    assert end.code == 0, end.output
    left = site.cloud.left()
    assert site.cloud.stacks() == set()
    assert left["vpcs"] == left["buckets"] == []
    assert left["log groups"] == [looks.STUDIO_LOGS], "all domains of the account share it"
    assert home["system"] not in site.state()["file systems"]
    assert {state for _, state in site.state()["keys"]} == {"PendingDeletion"}


def _killed(site: Site, operation: str, words: str) -> str:
    process: list[subprocess.Popen[str]] = []
    killed: list[str] = []

    def kill(asked: Asked, ask: Callable[[], Answer]) -> Answer | None:
        if killed or not asked.operation.startswith(operation):
            return None
        answer = ask()
        killed.append(asked.operation)
        process[0].send_signal(signal.SIGKILL)
        return answer

    with site.gate.rule(kill):
        process.append(site.start("tracking", words))
        output, _ = process[0].communicate(timeout=120)
    assert process[0].returncode == -signal.SIGKILL, f"{operation} was never asked for:\n{output}"
    return output


def _without_cdk(site: Site, *names: str, **more: str) -> None:
    """Some of the application's stacks, where it does not matter who deployed them."""
    made = synthesize("tracking", **more)
    ids = dict(zip(made.templates, stack_ids("tracking"), strict=True))
    for name in names:
        # What tells the version of the bootstrap.
        template = {key: value for key, value in made.templates[name].items() if key not in ("Parameters", "Rules")}
        body = json.dumps(template, separators=(",", ":"))
        site.cloud.client("cloudformation").create_stack(StackName=ids[name], TemplateBody=body)


def test_what_cannot_be_deleted_stops_nothing_else(empty: Site) -> None:
    """Expired credentials end a run with words; a locked object and a forbidden bucket are told at the end."""
    site = empty
    _without_cdk(site, "networking", "mlflow", **PROD)
    s3 = site.cloud.client("s3")
    locked = site.cloud.outputs(stack_ids("tracking")[2])["ArtifactBucket"]
    s3.put_object_lock_configuration(Bucket=locked, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled"})
    _fill(site, "tracking")
    s3.put_object(
        Bucket=locked,
        Key="locked",
        Body=b"x",
        ObjectLockMode="COMPLIANCE",
        ObjectLockRetainUntilDate=datetime.now(UTC) + timedelta(days=1),
    )
    (forbidden,) = (one for one in site.cloud.left()["buckets"] if one != locked)
    expired = _refusal(400, "ExpiredToken", "The security token included in the request is expired")

    with site.gate.rule(lambda asked, _: expired if asked.operation == "DeleteObjects" else None):
        ran = site.run("tracking", confirm=f"{FLASKAPP['tracking']},{EVERYTHING}")
    assert ran.code == 1
    assert "The AWS credentials are missing or count no more" in ran.output
    assert "run the same command again" in ran.output
    assert site.cloud.stacks() == set()
    assert len(site.cloud.left()["log groups"]) == 1, "nothing after that was tried"

    denied = _refusal(403, "AccessDenied", "Access Denied")
    with site.gate.rule(lambda asked, _: denied if asked.operation == f"DELETE /{forbidden}" else None):
        ran = site.run("tracking", confirm=EVERYTHING)
    assert ran.code == 1
    assert f"✗ {locked}: 1 versions cannot be deleted, such as 'locked' (AccessDenied: " in ran.output
    assert f"✗ {forbidden}: DeleteBucket: AccessDenied: Access Denied" in ran.output
    assert f"KMS key {_key_of(site, locked)} is kept: bucket {locked} cannot be read without it" in ran.output
    assert site.cloud.left()["log groups"] == []
    assert set(site.cloud.left()["buckets"]) == {locked, forbidden}
    versions = s3.list_object_versions(Bucket=locked)["Versions"]
    assert [one["Key"] for one in versions] == ["locked"]


def _key_of(site: Site, bucket: str) -> str:
    (rule,) = site.cloud.client("s3").get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    return str(rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"]).rpartition("/")[2]


def _refusal(status: int, code: str, message: str) -> Answer:
    return status, "text/xml", f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def test_strangers_in_the_vpc_are_named_and_left(empty: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an interface that a service left is deleted, and a deadline kept."""
    monkeypatch.setattr(removal, "PAUSE_SECONDS", 0.05)
    site = empty
    _without_cdk(site, "networking")
    ec2, formation = site.cloud.client("ec2"), site.cloud.client("cloudformation")
    (vpc,) = site.physical(SHARED[0], "AWS::EC2::VPC")
    subnet = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"][0]["SubnetId"]
    (group, *_) = site.physical(SHARED[0], "AWS::EC2::SecurityGroup")
    stray = ec2.create_network_interface(SubnetId=subnet, Groups=[group])["NetworkInterface"]["NetworkInterfaceId"]
    stranger = ec2.create_network_interface(SubnetId=subnet)["NetworkInterface"]["NetworkInterfaceId"]

    ran = site.run("tracking", confirm=FLASKAPP["tracking"])
    assert ran.code == 1, ran.output
    assert f"deleting network interface {stray}" in ran.output
    assert "once more (3 of 3)" in ran.output
    assert f"subnet '{subnet}' has dependencies" in ran.output
    assert "aws ec2 describe-network-interfaces" in ran.output
    assert site.cloud.stacks() == {SHARED[0]}
    interfaces = site.state()["interfaces"]
    assert stranger in interfaces
    assert stray not in interfaces

    ec2.delete_network_interface(NetworkInterfaceId=stranger)
    with site.as_caller() as account:
        found = stacks.find(account.client("cloudformation"), SHARED[0])
        assert found is not None
        assert found.status == "DELETE_FAILED"
        said: list[str] = []
        with site.gate.rule(_deleting), pytest.raises(stacks.StillDeleting, match="goes on where it is"):
            stacks.delete(account.client("cloudformation"), found, said.append, deadline_seconds=-1)
    assert formation.describe_stacks(StackName=found.id)["Stacks"][0]["StackStatus"].startswith("DELETE_")
    ran = site.run("tracking", confirm=FLASKAPP["tracking"])
    assert ran.code == 0, ran.output
    assert site.cloud.stacks() == set()
    assert {kind: left for kind, left in site.cloud.left().items() if left} == {}


def _make(site: Site, name: str, description: str, resource: dict[str, Any] | None = None) -> None:
    template = {
        "Description": description,
        "Resources": {"Topic": resource or {"Type": "AWS::SNS::Topic"}},
        "Outputs": {"Topic": {"Value": {"Ref": "Topic"}, "Export": {"Name": f"{name}:Topic"}}},
    }
    site.cloud.client("cloudformation").create_stack(StackName=name, TemplateBody=json.dumps(template))


def test_refuses_what_it_must_not_destroy(empty: Site) -> None:
    site = empty
    tagged = {"Type": "AWS::SNS::Topic", "Properties": {"Tags": [{"Key": "environment", "Value": "prod"}]}}
    _make(site, stack_ids("tracking")[2], "MLflow proxy: MLflow (tracking)", tagged)
    _make(site, SHARED[0], "Sample of somebody else")
    before = site.state()
    site.gate.asked.clear()
    word = FLASKAPP["tracking"]

    foreign = site.run("tracking", confirm=word)
    assert foreign.code == 2
    assert f"{SHARED[0]} is not of this project: its description is 'Sample of somebody else'" in foreign.output
    site.cloud.client("cloudformation").delete_stack(StackName=SHARED[0])
    _make(site, SHARED[0], "MLflow proxy: network")

    other = site.run("tracking", confirm=word, STACK_ENV="dev")
    assert (other.code, "deployed with STACK_ENV=prod, but STACK_ENV is dev" in other.output) == (2, True)
    account = site.run("tracking", confirm=word, CONTEXT="account=999999999999")
    assert (account.code, "but the settings say account=999999999999" in account.output) == (2, True)
    with site.gate.rule(_updating):
        busy = site.run("tracking", confirm=word)
    assert busy.code == 2
    assert f"A deployment is under way: {stack_ids('tracking')[2]} (UPDATE_IN_PROGRESS)" in busy.output
    missing = site.run("tracking", confirm=word, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="", HOME="/nonexistent")
    assert (missing.code, "credentials are missing" in missing.output) == (1, True)
    assert site.gate.changes == []
    assert {one["StackName"] for one in site.cloud.client("cloudformation").describe_stacks()["Stacks"]} == {
        name for name, _ in before["stacks"]
    }

    # What others import from us stays with us.
    user = {"Type": "AWS::SNS::Topic", "Properties": {"DisplayName": {"Fn::ImportValue": f"{SHARED[0]}:Topic"}}}
    _make(site, "somebody-elses", "Uses our network", user)
    ran = site.run("tracking", confirm=word)
    assert ran.code == 0, ran.output
    assert "stays, because other stacks use what it exports (somebody-elses)" in ran.output
    assert site.cloud.stacks() == {SHARED[0], "somebody-elses"}


def test_a_bucket_that_filled_again_is_emptied(empty: Site) -> None:
    """As log delivery does when the function of the stack has emptied it."""
    name = stack_ids("tracking")[2]
    _make(empty, name, "MLflow proxy: MLflow (tracking)", {"Type": "AWS::S3::Bucket"})
    (bucket,) = empty.physical(name, "AWS::S3::Bucket")
    empty.cloud.client("s3").put_object(Bucket=bucket, Key="late.log", Body=b"x")
    ran = empty.run("tracking", confirm=FLASKAPP["tracking"])
    assert ran.code == 0, ran.output
    assert f"✗ Topic (AWS::S3::Bucket, {bucket}): " in ran.output
    assert f"emptying {bucket}" in ran.output
    assert "once more (2 of 3)" in ran.output
    assert (empty.cloud.stacks(), empty.cloud.left()["buckets"]) == (set(), [])


def _updating(asked: Asked, ask: Callable[[], Answer]) -> Answer | None:
    """As if somebody deployed."""
    if asked.operation != "DescribeStacks" or stack_ids("tracking")[2] not in asked.body:
        return None
    status, kind, body = ask()
    return status, kind, body.replace(b"CREATE_COMPLETE", b"UPDATE_IN_PROGRESS")


def _deleting(asked: Asked, ask: Callable[[], Answer]) -> Answer | None:
    """As if it took long."""
    if asked.operation != "DescribeStacks":
        return None
    status, kind, body = ask()
    return status, kind, body.replace(b"DELETE_COMPLETE", b"DELETE_IN_PROGRESS")


def test_addresses_and_certificates_take_two_signs(empty: Site) -> None:
    """moto's tag index has no addresses, so these are looked at one by one."""
    site = empty
    ec2, acm = site.cloud.client("ec2"), site.cloud.client("acm")
    stack = SHARED[0]

    def address(name: str) -> str:
        tags = [{"Key": "Name", "Value": name}]
        made = ec2.allocate_address(Domain="vpc", TagSpecifications=[{"ResourceType": "elastic-ip", "Tags": tags}])
        return str(made["AllocationId"])

    ours, theirs = address(f"{stack}/Vpc/publicSubnet1"), address("their-gateway")
    certificate, key = handler.make_certificate("internal-proxy.elb.amazonaws.com")
    tag = {"Key": "sagemaker-mlflow-proxy:self-signed", "Value": FLASKAPP["tracking"]}
    arn = acm.import_certificate(Certificate=certificate, PrivateKey=key, Tags=[tag])["CertificateArn"]
    with site.as_caller() as account:
        mine, their = (
            looks.look(account, Retained("addresses", one, stack, frozenset({TAGS}))) for one in (ours, theirs)
        )
        assert mine is not None
        assert their is not None
        assert (mine.is_ours, their.is_ours) == (True, False)
        assert erasing.erase(account, [mine], print) == []
        with pytest.raises(ValueError, match="not known to be ours"):
            erasing.erase(account, [their], print)
        gone = looks.look(account, Retained("buckets", "no-such-bucket", stack, frozenset({RECORD})))
        assert gone is None
    assert [one["AllocationId"] for one in ec2.describe_addresses()["Addresses"]] == [theirs]
    ran = site.run("tracking", confirm="certificates")
    assert ran.code == 0, ran.output
    assert f"{arn} is gone" in ran.output
    assert acm.list_certificates()["CertificateSummaryList"] == []


def test_names_are_those_of_the_application() -> None:
    for mode in stacks.MODES:
        assert set(stack_ids(mode)) == {*stacks.of_mode(mode), *stacks.SHARED}


def test_the_application_says_what_stacks_are_known_by() -> None:
    """Descriptions and tags that the clean-up relies on are in the templates."""
    made = synthesize("tracking", **PROD)
    assert all(one["Description"].startswith(stacks.DESCRIPTION) for one in made.templates.values())
    kept = {
        one["Type"]
        for template in made.templates.values()
        for one in template["Resources"].values()
        if str(one.get("DeletionPolicy")).startswith("Retain")
    }
    # A role's policies go with it.
    assert kept - {"AWS::IAM::Policy"} <= set(retained._TYPES), "the clean-up must know what is kept"
    for template, name in zip(made.templates.values(), stack_ids("tracking"), strict=True):
        for one in template["Resources"].values():
            if one["Type"] in kept - {"AWS::IAM::Policy"}:
                tags = {tag["Key"]: tag["Value"] for tag in one["Properties"]["Tags"]}
                assert (tags["project"], tags["stack"]) == ("sagemaker-mlflow-proxy", name)


def test_each_kind_has_its_row_in_the_page() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in PAGE.splitlines() if line.startswith("| `")}
    for kind in KINDS:
        assert kind.word in rows, f"docs/cleanup.md has no row for {kind.word}"
        assert kind.cost in rows[kind.word]
        assert "`aws " in rows[kind.word], "by hand, too"
    for word in (removal.STUDIO_WORD, "unprotect-prod", "CONFIRM=", "DRY_RUN=1", *stack_ids("tracking")):
        assert word in PAGE
    assert kinds.WAITING == ("keys-in-deletion", "secrets-in-deletion")
