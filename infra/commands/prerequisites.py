"""What must be there before a deployment: all of it looked at, each missing thing told with what mends it.

It changes nothing. What the caller may not read is said to be unseen; only what would surely stop a deployment is a
problem.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOTokenLoadError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from infra.commands import cdk
from infra.settings import Settings, SettingsError, load
from mlflow_proxy.targets import TargetError, parse_arn

# The stacks' synthesizer asks for 6, and for 8 where CDK looks an existing VPC up; a test compares.
BOOTSTRAP_OLDEST = 8
BOOTSTRAP_PARAMETER = "/cdk-bootstrap/hnb659fds/version"
_PATIENCE = Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 3})
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN_KEY = {"InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "AuthFailure"}
# Stands in where there is none, so that mistakes in other settings are found all the same.
_NO_ACCOUNT, _NO_REGION = "000000000000", "us-east-1"


class Account(NamedTuple):
    """Whose credentials these are, and where they work."""

    id: str
    arn: str
    region: str


class Ready(NamedTuple):
    """What a deployment goes on with. `bootstrapped` False: that is still to be done."""

    account: Account
    settings: Settings
    bootstrapped: bool


class Report:
    """Prints each finding as it is made, and counts the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def good(self, text: str) -> None:
        """Something that is as it must be."""
        print(f"  ✓ {text}", flush=True)  # noqa: T201

    def unseen(self, text: str) -> None:
        """Something that could not be looked at, or that need not stop anybody."""
        print(f"  - {text}", flush=True)  # noqa: T201

    def problem(self, text: str) -> None:
        """Something that stops the deployment, with what mends it."""
        self.problems.append(text)
        print(f"  ✗ {text}", flush=True)  # noqa: T201


def client(service: str, region: str) -> Any:
    """An AWS client with the caller's credentials that gives up after a while."""
    return boto3.client(service, region_name=region, config=_PATIENCE)


def check(environ: Mapping[str, str], report: Report) -> Ready | None:
    """Look at everything. None if there are problems, which `report` has then printed."""
    _check_tools(report)
    account = _check_account(environ, report)
    settings = _check_settings(environ, account, report)
    if settings is not None:
        _check_builds(settings, report)
    bootstrapped = True
    if account is not None:
        bootstrapped = _check_bootstrap(account, report)
    # CDK's library, and with it the stacks' names, takes Node.js.
    if account is not None and settings is not None and not cdk.missing():
        standing = _check_stacks(settings, account, report)
        _check_quotas(settings, account, standing, report)
    if report.problems or account is None or settings is None:
        return None
    return Ready(account, settings, bootstrapped)


def _check_tools(report: Report) -> None:
    missing = cdk.missing()
    for problem in missing:
        report.problem(problem)
    if not missing:
        report.good("Node.js and CDK's command line")


def region_of(environ: Mapping[str, str]) -> str | None:
    """Where to deploy: the setting `region`, else AWS_REGION, AWS_DEFAULT_REGION, else the profile's.

    Raises ContextError, ProfileNotFound.
    """
    named = context(environ).get("region") or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    return named or boto3.Session().region_name


def _check_account(environ: Mapping[str, str], report: Report) -> Account | None:
    try:
        region = region_of(environ)
        identity = client("sts", region or _NO_REGION).get_caller_identity()
    except cdk.ContextError as error:
        report.problem(str(error))
        return None
    except (BotoCoreError, ClientError) as error:
        report.problem(_explain_credentials(error, environ))
        return None
    report.good(f"credentials: {identity['Arn']}, account {identity['Account']}")
    if region is None:
        report.problem("no region is set; name one: export AWS_REGION=eu-central-1")
        return None
    partition = identity["Arn"].split(":")[1]
    try:
        parse_arn(f"arn:{partition}:sagemaker:{region}:{identity['Account']}:mlflow-tracking-server/mlflow")
    except TargetError as error:
        report.problem(f"region {region}: a target there {error}; set AWS_REGION to another")
        return None
    report.good(f"region: {region}")
    return Account(identity["Account"], identity["Arn"], region)


def _explain_credentials(error: Exception, environ: Mapping[str, str]) -> str:  # noqa: PLR0911  (one per cause)
    if isinstance(error, ProfileNotFound):
        name = environ.get("AWS_PROFILE", "default")
        return (
            f"there is no AWS profile {name}; `aws configure list-profiles` lists those that are: export AWS_PROFILE=…"
        )
    if isinstance(error, NoCredentialsError):
        return "there are no AWS credentials; run `aws configure` or `aws sso login`, or set AWS_PROFILE"
    if isinstance(error, PartialCredentialsError):
        return f"the AWS credentials are incomplete ({error}); run `aws configure`"
    if isinstance(error, (UnauthorizedSSOTokenError, SSOTokenLoadError, TokenRetrievalError)):
        return "the AWS sign-in has expired; run `aws sso login`"
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError)):
        return f"AWS cannot be reached ({error}); is there a way to the internet, or a proxy to set in HTTPS_PROXY?"
    if isinstance(error, ClientError):
        code = error.response["Error"]["Code"]
        if code in _EXPIRED:
            return "the AWS credentials have expired; get new ones: `aws sso login`, or as you got these"
        if code in _UNKNOWN_KEY:
            return f"AWS does not accept the credentials ({code}); is this the right profile? export AWS_PROFILE=…"
    if isinstance(error, NoRegionError):
        return "no region is set; name one: export AWS_REGION=eu-central-1"
    return f"the AWS credentials do not work: {error}"


def _check_settings(environ: Mapping[str, str], account: Account | None, report: Report) -> Settings | None:
    defaults = {
        "CDK_DEFAULT_ACCOUNT": account.id if account else _NO_ACCOUNT,
        "CDK_DEFAULT_REGION": account.region if account else _NO_REGION,
    }
    try:
        settings = load(context(environ), {**environ, **defaults})
    except SettingsError as error:
        for problem in error.problems:
            report.problem(f"setting {problem}")
        return None
    except cdk.ContextError:
        return None  # told with the account
    if account is not None and settings.account != account.id:
        report.problem(
            f"setting account: is {settings.account}, but the credentials are of {account.id}; "
            "take others, or leave it out"
        )
    if settings.is_prod and environ.get("YES") != "1" and not sys.stdin.isatty():
        report.problem(
            "prod asks before it widens permissions, and there is no terminal to ask on; look at "
            "`npx cdk diff` and set YES=1"
        )
    report.good(f"settings: {settings.mlflow_type}, {settings.stack_env}, {settings.compute}")
    return settings


def context(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings of infra/cdk.json and of CONTEXT. Raises ContextError."""
    kept = json.loads((cdk.INFRA / "cdk.json").read_text("utf-8"))["context"]
    return {**kept, **cdk.context(environ)}


def _check_builds(settings: Settings, report: Report) -> None:
    """What is sent to AWS is built from this repository and the package index."""
    builds_application = settings.compute == "ec2" and settings.application is None
    if builds_application and not (cdk.INFRA.parent / "deploy" / "install.sh").is_file():
        report.problem("deploy/install.sh is missing, which hosts are set up with; restore it, or take compute=fargate")
    if not builds_application and not (settings.self_signed and settings.certificate_function is None):
        return
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "--timeout", "15"]
    done = subprocess.run([*command, "index", "versions", "pip"], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode == 0:
        report.good("package index: reachable")
    elif any((cdk.INFRA.parent / "build").glob("*.sha256")):
        report.unseen("package index: not reachable; what was built before can be used again if nothing has changed")
    else:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        report.problem(
            f"the package index cannot be reached, and hosts are sent packages from it ({reason}); "
            "`pip config list` shows which one it is"
        )


def _check_bootstrap(account: Account, report: Report) -> bool:
    """Whether CDK's own stack is there; one that is too old must be updated like a missing one be made."""
    where = f"aws://{account.id}/{account.region}"
    try:
        found = client("ssm", account.region).get_parameter(Name=BOOTSTRAP_PARAMETER)["Parameter"]["Value"]
    except ClientError as error:
        if error.response["Error"]["Code"] == "ParameterNotFound":
            report.unseen(f"bootstrap: not done in {where}")
            return False
        report.unseen(f"bootstrap: could not see ({error.response['Error']['Code']})")
        return True
    if int(found) < BOOTSTRAP_OLDEST:
        report.unseen(f"bootstrap: version {found} in {where} is too old, {BOOTSTRAP_OLDEST} or newer is needed")
        return False
    try:
        client("cloudformation", account.region).describe_stacks(StackName="CDKToolkit")
    except ClientError as error:
        report.unseen(f"bootstrap: version {found}, but its stack CDKToolkit could not be seen ({_code(error)})")
        return True
    report.good(f"bootstrap: version {found}")
    return True


def _check_stacks(settings: Settings, account: Account, report: Report) -> list[str]:
    """The stacks that are there and can be updated. Tells of those that cannot."""
    from infra.app import stack_ids  # noqa: PLC0415  (starts Node.js)

    formation = client("cloudformation", account.region)
    standing: dict[str, str] = {}
    for name in stack_ids(settings.mlflow_type):
        try:
            (stack,) = formation.describe_stacks(StackName=name)["Stacks"]
        except ClientError as error:
            # CloudFormation answers so for a stack that is not there.
            if _code(error) != "ValidationError":
                report.unseen(f"{name}: could not see ({_code(error)})")
            continue
        standing[name] = stack["StackStatus"]
        for problem in stack_problems(stack, settings):
            report.problem(problem)
        if (
            stack["StackStatus"] in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED")
            and not stack["EnableTerminationProtection"]
        ):
            report.unseen(
                f"{name}: is in {stack['StackStatus']}, its first deployment failed; it will be deleted and made anew"
            )
    fine = [name for name, status in standing.items() if re.fullmatch("(CREATE|UPDATE(_ROLLBACK)?)_COMPLETE", status)]
    report.good(f"stacks: {', '.join(fine) or 'none'} there already")
    return fine


def stack_problems(stack: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    """What keeps a stack, as DescribeStacks has it, from being updated."""
    name, status = stack["StackName"], stack["StackStatus"]
    if status == "UPDATE_ROLLBACK_FAILED":
        yield (
            f"{name} is in {status}: an update failed, and undoing it, too; "
            f"aws cloudformation continue-update-rollback --stack-name {name}"
        )
    elif status == "DELETE_FAILED":
        yield f"{name} is in {status}; end what was begun: make destroy MLFLOW_TYPE={settings.mlflow_type}"
    elif status.endswith("_IN_PROGRESS") and status != "REVIEW_IN_PROGRESS":
        yield f"{name} is in {status}, so somebody else is changing it; wait until that has ended"
    elif status in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED") and stack.get("EnableTerminationProtection"):
        yield (
            f"{name} is in {status}, its first deployment failed; it must be deleted, but is protected from that: "
            f"aws cloudformation update-termination-protection --no-enable-termination-protection --stack-name {name}"
        )


class _Quota(NamedTuple):
    """A limit of the account: how many more are needed, how many there are, and where its number stands."""

    what: str
    needed: int
    used: Callable[[], int]
    number: Callable[[], float]


def _check_quotas(settings: Settings, account: Account, standing: Sequence[str], report: Report) -> None:
    for quota in _quotas(settings, account, standing):
        try:
            used, number = quota.used(), quota.number()
        except (BotoCoreError, ClientError, LookupError) as error:
            why = _code(error) if isinstance(error, ClientError) else error
            report.unseen(f"{quota.what}: could not see ({why})")
            continue
        text = f"{quota.what}: {used} of {number:.0f} in use, {quota.needed} more needed"
        if used + quota.needed > number:
            report.problem(f"{text}; ask for more in the console of Service Quotas, or delete some")
        else:
            report.good(text)


def _quotas(settings: Settings, account: Account, standing: Sequence[str]) -> Iterator[_Quota]:
    """What the stacks that are not there yet will take."""
    ec2, sagemaker = client("ec2", account.region), client("sagemaker", account.region)
    quotas = client("service-quotas", account.region)

    def coded(service: str, code: str) -> Callable[[], float]:
        return lambda: _quota(quotas, service, code)

    def named(*words: str) -> Callable[[], float]:
        return lambda: _named_quota(quotas, *words)

    networking, domain, mlflow = (
        not any(part in name for name in standing) for part in ("networ", "domain", "mlflow-")
    )
    if networking and settings.vpc_id is None:
        nat = settings.nat_gateway_count
        yield _Quota("VPCs", 1, lambda: _count(ec2, "describe_vpcs", "Vpcs"), coded("vpc", "L-F678F1CE"))
        if nat:
            yield _Quota(
                "elastic IPs", nat, lambda: len(ec2.describe_addresses()["Addresses"]), coded("ec2", "L-0263D0A3")
            )
            yield _Quota("NAT gateways in one zone", 1, lambda: _most_gateways(ec2), coded("vpc", "L-FE5A380F"))
    if domain:
        yield _Quota("SageMaker domains", 1, lambda: _count(sagemaker, "list_domains", "Domains"), named("domains"))
    if mlflow and settings.mlflow_type == "tracking":
        yield _Quota(
            "MLflow tracking servers",
            1,
            lambda: _count(sagemaker, "list_mlflow_tracking_servers", "TrackingServerSummaries"),
            named("mlflow", "tracking server"),
        )
    elif mlflow:
        yield _Quota(
            "MLflow Apps", 1, lambda: _count(sagemaker, "list_mlflow_apps", "Summaries"), named("mlflow", "app")
        )


def _count(service: Any, operation: str, result: str) -> int:
    return sum(len(page[result]) for page in service.get_paginator(operation).paginate())


def _most_gateways(ec2: Any) -> int:
    """NAT gateways in the zone that has the most. Those that are being made or deleted count, too (VPC quotas)."""
    states = [{"Name": "state", "Values": ["pending", "available", "deleting"]}]
    pages = ec2.get_paginator("describe_nat_gateways").paginate(Filters=states)
    subnets = [gateway["SubnetId"] for page in pages for gateway in page["NatGateways"]]
    zones = {one["SubnetId"]: one["AvailabilityZone"] for one in ec2.describe_subnets()["Subnets"]}
    return max(Counter(zones[subnet] for subnet in subnets).values(), default=0)


def _quota(quotas: Any, service: str, code: str) -> float:
    """The account's own number, else AWS's default."""
    try:
        found = quotas.get_service_quota(ServiceCode=service, QuotaCode=code)
    except ClientError as error:
        if _code(error) != "NoSuchResourceException":
            raise
        found = quotas.get_aws_default_service_quota(ServiceCode=service, QuotaCode=code)
    return float(found["Quota"]["Value"])


def _named_quota(quotas: Any, *words: str) -> float:
    """SageMaker's quotas have no documented codes: the only one whose name has all the words. Raises LookupError."""
    pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    found = [
        quota["Value"]
        for page in pages
        for quota in page["Quotas"]
        if all(word in quota["QuotaName"].lower() for word in words)
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} quotas of SageMaker have such a name")
    return float(found[0])


def _code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])
