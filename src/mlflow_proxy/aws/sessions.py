"""botocore, with deadlines and in words: sessions, the calls that fetch credentials, and what their failures mean.

Everything here blocks, for seconds at worst, so it runs in threads. Nothing is kept between calls but the service
models and the clients of STS. When to call, and what to do with the result, is decided in `credentials`.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.session
from botocore import exceptions as failures
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.httpsession import URLLib3Session
from botocore.loaders import Loader
from botocore.parsers import ResponseParserError

from mlflow_proxy.aws import codes
from mlflow_proxy.aws.role_sessions import RoleSession
from mlflow_proxy.errors import NEEDS_OPERATOR, NEEDS_OPERATOR_CODE, Refusal
from mlflow_proxy.settings import Aws

if TYPE_CHECKING:
    from mypy_boto3_sagemaker import SageMakerClient
    from mypy_boto3_sts import STSClient

# Seconds, and attempts, of one call to AWS. Two attempts, because whoever calls tries again later anyway.
_CONNECT_TIMEOUT = 3
_READ_TIMEOUT = 8
_ATTEMPTS = 2
# botocore waits for a credential_process without end; after these seconds it is ended.
_PROCESS_DEADLINE = 20
# Counted as the life of credentials that refresh themselves but don't tell when; the shortest that AWS gives.
_UNKNOWN_LIFETIME = 15 * 60
# What botocore raises for a configuration, or a person's login, that is not there or not right.
_CONFIGURATION_ERRORS = (
    failures.ProfileNotFound,
    failures.PartialCredentialsError,
    failures.ConfigParseError,
    failures.InvalidConfigError,
    failures.ParamValidationError,
    failures.RefreshWithMFAUnsupportedError,
    failures.SSOError,
    failures.TokenRetrievalError,
    failures.NoAuthTokenError,
    failures.LoginError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
_PASSING_STATUSES = frozenset({408, 429})
NOT_AWS = "the answer was not AWS's; check the endpoint, and what stands between this machine and AWS"
_IMDS = "http://169.254.169.254"
_CONTAINER = "http://169.254.170.2"

# One loader for all sessions: it keeps the parsed service models. Measured with botocore 1.44 over 16 clients, each in
# a session of its own: 55 MB resident and 7 ms of CPU per client, where a loader each takes 92 MB and 40 ms.
# `models` holds SageMaker's model cut down to the four calls made here: after STS's, that client costs 0.3 MB and 3 ms
# instead of 10 MB and 70 ms. A test compares it with botocore's own.
_LOADER = Loader(extra_search_paths=[str(Path(__file__).with_name("models"))])

# At debug level botocore logs the bodies that STS answers, secrets included, and urllib3 the paths of credentials.
for _name in ("botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a request is signed with.

    `expires_at` is in seconds since the epoch, None if they don't expire; `provider` is botocore's name of where they
    came from ("env", "iam-role", "assume-role", …). The representation never shows secret or token.
    """

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False)
    expires_at: float | None
    provider: str


class CredentialsUnavailable(Exception):
    """There are no usable credentials. `reason` tells the operator what failed and what to do, and holds no secret.

    `lasting`: it takes somebody's hand to change that, so repeating a request cannot help.
    """

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting

    def refusal(self, target: str) -> Refusal:
        """What a caller is told whose request to `target` cannot be signed."""
        detail = f"No AWS credentials for {target}: {self.reason}"
        if self.lasting:
            return Refusal(
                NEEDS_OPERATOR,
                f"The proxy cannot obtain AWS credentials for the target {target}, and trying again will not help.",
                error_code=NEEDS_OPERATOR_CODE,
                detail=detail,
                in_log=True,
            )
        return Refusal(
            503,
            f"The proxy has no valid AWS credentials for the target {target} at the moment. Try again later.",
            retry_after=5,
            detail=detail,
            in_log=True,
        )


def from_chain(aws: Aws, *, region: str, proxy: str | None = None) -> Credentials:
    """Walk botocore's whole chain of providers.

    `region` counts for providers that call STS if the environment and the profile name none. Raises
    CredentialsUnavailable if no provider has any, and botocore's exceptions if one fails.

    Each call resolves anew, in a new session: a file, token or profile that changed is seen, a provider that is gone is
    noticed, and every provider refreshes in the same way. A RefreshableCredentials that is kept would instead refresh
    itself in whichever thread reads it, from 15 minutes before expiry and with a lock from 10 minutes, and a static
    profile never at all.
    """
    session = new_session(aws, proxy)
    if session.get_config_variable("region") is None:
        session.set_config_variable("region", region)
    _bound_credential_processes(session)
    _call_instance_metadata_directly(session)
    found = session.get_credentials()
    if found is None:
        raise CredentialsUnavailable(_nothing_found(aws, os.environ), lasting=True)
    frozen = found.get_frozen_credentials()  # deferred providers (SSO, roles of a profile) fetch only now
    return Credentials(
        access_key=frozen.access_key,
        secret_key=frozen.secret_key,
        token=frozen.token,
        expires_at=_expiry(found),
        provider=found.method,
    )


def _expiry(found: object) -> float | None:
    """When credentials of the chain expire, in seconds since the epoch; None if they don't."""
    # No public attribute tells it; tests hold this one for each provider that has any.
    expiry = getattr(found, "_expiry_time", None)
    if expiry is not None:
        return float(expiry.timestamp())
    return time.time() + _UNKNOWN_LIFETIME if isinstance(found, RefreshableCredentials) else None


class Sts:
    """Assumes roles. Used by many threads at once, as botocore's clients may be.

    The last client of each region is kept while the credentials that it signs with stay the same: measured, a new one
    costs 8 ms of CPU and a TLS handshake, a call with it 1.5 ms, and each caller's role session needs a call.
    """

    def __init__(self, aws: Aws, proxy: str | None = None) -> None:
        self._aws = aws
        self._proxy = proxy
        self._clients: dict[str, tuple[Credentials, STSClient]] = {}

    def assume_role(self, session: RoleSession, base: Credentials) -> Credentials:
        """Ask the STS of the session's region for its role, with the `base` credentials. Raises botocore's exceptions.

        The session lasts an hour, STS's default, and the most that it gives if `base` is a role's session itself.
        """
        wanted: dict[str, Any] = {"RoleArn": session.role_arn, "RoleSessionName": session.session_name}
        if session.external_id is not None:
            wanted["ExternalId"] = session.external_id
        if session.tags:
            wanted["Tags"] = [{"Key": key, "Value": value} for key, value in session.tags]
        if session.source_identity is not None:
            wanted["SourceIdentity"] = session.source_identity
        answer = self._client(session.region, base).assume_role(**wanted)["Credentials"]
        return Credentials(
            access_key=answer["AccessKeyId"],
            secret_key=answer["SecretAccessKey"],
            token=answer["SessionToken"],
            expires_at=answer["Expiration"].timestamp(),
            provider="assume-role",
        )

    def _client(self, region: str, base: Credentials) -> STSClient:
        signs_with, client = self._clients.get(region, (None, None))
        if client is None or signs_with != base:
            client = _sts(base, self._aws, region=region, proxy=self._proxy)
            self._clients[region] = (base, client)
        return client


def caller_identity(credentials: Credentials, aws: Aws, *, region: str, proxy: str | None = None) -> str:
    """The ARN that STS knows the credentials by. Raises botocore's exceptions."""
    return _sts(credentials, aws, region=region, proxy=proxy).get_caller_identity()["Arn"]


def sagemaker(credentials: Credentials, aws: Aws, *, region: str, proxy: str | None = None) -> SageMakerClient:
    """A client for SageMaker's MLflow calls in `region`, with two attempts and a deadline on each."""
    client: SageMakerClient = new_session(aws, proxy).create_client(
        "sagemaker", region_name=region, endpoint_url=aws.sagemaker_endpoint, **_keys(credentials)
    )
    return client


def _sts(credentials: Credentials, aws: Aws, *, region: str, proxy: str | None) -> STSClient:
    client: STSClient = new_session(aws, proxy).create_client(
        "sts", region_name=region, endpoint_url=aws.sts_endpoint, **_keys(credentials)
    )
    return client


def _keys(credentials: Credentials) -> dict[str, str | None]:
    return {
        "aws_access_key_id": credentials.access_key,
        "aws_secret_access_key": credentials.secret_key,
        "aws_session_token": credentials.token,
    }


def new_session(aws: Aws, proxy: str | None) -> Any:
    """A botocore session whose clients have deadlines and use `proxy`, never the environment's.

    (`Any`, because the stubs give create_client a type per service only in boto3's session.)
    """
    session = botocore.session.Session(profile=aws.profile)
    session.register_component("data_loader", _LOADER)
    session.set_config_variable("sts_regional_endpoints", "regional")
    session.set_default_client_config(
        Config(
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_READ_TIMEOUT,
            retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
            proxies={"http": proxy, "https": proxy} if proxy else {},  # None would mean the environment's
            user_agent_extra="sagemaker-mlflow-proxy",
        )
    )
    return session


def _bound_credential_processes(session: Any) -> None:
    """Put `timeout` before each profile's credential_process; botocore offers no deadline for it.

    The configuration is the one place that reaches every such process, also that of a role's source_profile.
    """
    timeout = shutil.which("timeout")
    if timeout is None:
        return
    for profile in session.full_config.get("profiles", {}).values():
        command = profile.get("credential_process")
        if command:
            profile["credential_process"] = f"{shlex.quote(timeout)} {_PROCESS_DEADLINE} {command}"


def _call_instance_metadata_directly(session: Any) -> None:
    """Keep HTTP_PROXY from seeing instance credentials: botocore's fetcher for them alone obeys it."""
    provider = session.get_component("credential_provider").get_provider("iam-role")
    # Private, so a later botocore may lack them; then NO_PROXY has to name the metadata service, as for the AWS CLI.
    fetcher: Any = getattr(provider, "_role_fetcher", None)  # the fetcher that profiles with credential_source use, too
    if hasattr(fetcher, "_session"):
        fetcher._session = URLLib3Session(timeout=session.get_config_variable("metadata_service_timeout"))


def explain(error: BaseException, aws: Aws, role: RoleSession | None = None) -> str:
    """Say in words what failed and what to do next. Only texts known to hold no secret are taken over from `error`."""
    if isinstance(error, CredentialsUnavailable):
        return error.reason
    if isinstance(error, TimeoutError):
        return "AWS did not answer in time; check that this machine reaches STS and its credential source"
    if isinstance(error, failures.ClientError):
        return _explain_answer(error, aws, role)
    return explain_connection(error) or _explain_provider(error, aws)


def is_lasting(error: BaseException) -> bool:
    """Whether a failure to get credentials ends only by somebody's hand: denied, unknown to AWS, or not set up right.

    In doubt it passes: a program that repeats for nothing loses half a minute, one that gives up too early its run.
    """
    match error:
        case CredentialsUnavailable():
            return error.lasting
        case failures.ClientError():
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
            return 400 <= status < 500 and status not in _PASSING_STATUSES and error_code(error) not in codes.PASSING
        case failures.SSLError():
            return "CERTIFICATE_VERIFY_FAILED" in str(error)
        case _:
            return isinstance(error, _CONFIGURATION_ERRORS)


def explain_connection(error: BaseException) -> str | None:
    """Say which endpoint could not be reached and why; None if `error` is about something else."""
    if not isinstance(error, (failures.ConnectionError, failures.HTTPClientError)):
        return None
    if isinstance(error, failures.ProxyConnectionError):
        return "the outgoing HTTP proxy cannot be reached; check upstream.proxy"
    place = _origin(error.kwargs.get("endpoint_url"))
    if isinstance(error, failures.SSLError):
        return f"the TLS certificate of {place} is not trusted; name the CA in AWS_CA_BUNDLE"
    if isinstance(error, (failures.ReadTimeoutError, failures.ConnectTimeoutError)):
        return f"{place} did not answer in time; check routes, security groups and VPC endpoints"
    return f"{place} cannot be reached; check its name, DNS, routes and VPC endpoints"


def error_code(error: failures.ClientError) -> str:
    """AWS's name of the error; empty if the answer has none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _explain_answer(error: failures.ClientError, aws: Aws, role: RoleSession | None) -> str:
    code = error_code(error)
    call = f"sts:{error.operation_name}" if error.operation_name.startswith(("Assume", "GetCaller")) else "AWS"
    what = f"{call} for role {role.role_arn}" if role else call
    if code in codes.DENIED:
        return f"{what} was denied: {_denied(error, role)}"
    if code in codes.EXPIRED:
        return f"{what} failed: the session that credentials come from has expired; {_renew(aws)}"
    advice = {
        "InvalidClientTokenId": "AWS does not know the access key; it was deleted or turned off: configure another",
        "UnrecognizedClientException": "AWS does not know the access key; it was deleted or turned off: configure "
        "another",
        "SignatureDoesNotMatch": "the secret key does not belong to the access key, or this machine's clock is wrong",
        "RegionDisabledException": "STS is not active in the target's region; activate it in IAM's account settings, "
        "or set aws.sts_endpoint",
        "InvalidIdentityToken": "the web identity token is not accepted; compare its issuer and audience with IAM's "
        "identity provider",
        "IDPCommunicationError": "AWS cannot reach the identity provider; it is tried again",
    }.get(code, "it is tried again")
    return f"{what} failed with {code or 'an unreadable answer'}: {advice}"


def _denied(error: failures.ClientError, role: RoleSession | None) -> str:
    message = str(error.response.get("Error", {}).get("Message", "")).rstrip(".")
    said = f"{message}. " if message else ""
    if role is None:
        return f"{said}Add the permission to the identity, or its trust policy"
    table = "target" if role.caller is None else "role"  # of the configuration
    external = (
        f"that its external ID is the one in the {table}'s external_id"
        if role.external_id is not None
        else f"that it asks for no external ID (else set the {table}'s external_id)"
    )
    return (
        f"{said}Check that the role's trust policy names this identity and allows {_needed(role, message)}, "
        f"{external}, and that the identity has the same permissions on the role"
    )


def _needed(role: RoleSession, message: str) -> str:
    """The permissions that assuming the role takes, and which option asks for each."""
    needed = ["sts:AssumeRole"]
    if role.tags:
        needed.append("sts:TagSession (for session_tags)")
    elif "sts:TagSession" in message:
        needed.append("sts:TagSession (for the tags that the proxy's own session passes on)")
    if role.source_identity is not None:
        needed.append("sts:SetSourceIdentity (for source_identity)")
    elif "sts:SetSourceIdentity" in message:
        needed.append("sts:SetSourceIdentity (for the source identity of the proxy's own session)")
    return " and ".join(needed)


def _explain_provider(error: BaseException, aws: Aws) -> str:
    kwargs: Mapping[str, Any] = getattr(error, "kwargs", {})
    match error:
        case failures.ProfileNotFound():
            reason = (
                f"the profile {kwargs.get('profile')!r} is in neither ~/.aws/config nor ~/.aws/credentials; "
                "`aws configure list-profiles` names those that are"
            )
        case failures.PartialCredentialsError():
            reason = f"the credentials of {kwargs.get('provider')} lack {kwargs.get('cred_var')}; set both keys or none"
        case failures.SSOError() | failures.TokenRetrievalError() | failures.NoAuthTokenError():
            reason = f"there is no valid SSO session; {_renew(aws)}"
        case failures.LoginError():
            reason = f"there is no valid login session; run `aws login{_profile_option(aws)}`"
        case failures.ConfigParseError():
            reason = f"{kwargs.get('path')} is not a readable AWS configuration; correct it"
        case failures.RefreshWithMFAUnsupportedError():
            reason = "the profile's role needs an MFA code, which nobody can type here; use a role without mfa_serial"
        case failures.InvalidConfigError():
            reason = f"the AWS configuration is wrong: {kwargs.get('error_msg')}"
        case failures.CredentialRetrievalError():
            reason = _explain_retrieval(str(kwargs.get("provider")))
        case ResponseParserError():
            reason = NOT_AWS
        case OSError() if error.filename:
            reason = f"{error.filename} cannot be read ({error.strerror}); the AWS configuration names it"
        case RuntimeError() if "still expired" in str(error):
            reason = f"the credential source gave expired ones; check this machine's clock, or {_renew(aws)}"
        case _:
            reason = f"the source failed with {type(error).__name__}; see what `aws sts get-caller-identity` says here"
    return reason


def _explain_retrieval(provider: str) -> str:
    """Without the error's own text: of a credential_process that is what its command wrote, maybe a secret."""
    if provider == "custom-process":
        return (
            f"the profile's credential_process failed, or took more than {_PROCESS_DEADLINE} s; run its command by "
            "hand to see why"
        )
    if provider == "container-role":
        place = _origin(os.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI", _CONTAINER))
        return f"the container's credential endpoint {place} gave none; check the role of the task or pod"
    return f"the provider {provider} gave no credentials; see what `aws sts get-caller-identity` says here"


def _nothing_found(aws: Aws, environ: Mapping[str, str]) -> str:
    profile = aws.profile or environ.get("AWS_PROFILE") or "default"
    metadata = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _IMDS)
    off = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    looked_at = (
        "environment variables (skipped, because aws.profile is set)"
        if aws.profile
        else "environment variables (AWS_ACCESS_KEY_ID is not set)",
        f"profile {profile!r} in ~/.aws (no keys, SSO session, role or credential_process)",
        "web identity (AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN are not both set)",
        "container (AWS_CONTAINER_CREDENTIALS_RELATIVE_URI and …_FULL_URI are not set)",
        "instance metadata (switched off by AWS_EC2_METADATA_DISABLED)"
        if off
        else f"instance metadata (no role from {_origin(metadata)})",
    )
    return (
        f"no AWS credentials were found; looked at {', '.join(looked_at)}. On AWS, attach a role to the instance, task "
        "or pod; elsewhere run `aws configure` or `aws sso login`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


def _renew(aws: Aws) -> str:
    return f"run `aws sso login{_profile_option(aws)}`, or replace the keys if they don't come from SSO"


def _profile_option(aws: Aws) -> str:
    profile = aws.profile or os.environ.get("AWS_PROFILE")
    return f" --profile {shlex.quote(profile)}" if profile else ""


def _origin(url: object) -> str:
    """Scheme, host and port of a URL: a path or query may hold what is nobody's business."""
    parts = urlsplit(str(url)) if url else None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts and parts.netloc else "the AWS endpoint"
