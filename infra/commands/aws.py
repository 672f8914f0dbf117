"""The AWS account that a command works in, and what its errors mean in words. Nothing here changes anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)

from infra.commands.cdk import INFRA, context

# What services answer when credentials ran out, or are none of theirs.
_EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "AuthFailure",
}
_NONE = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, SSOError, TokenRetrievalError)
# "no such …" as services say it.
_GONE = {
    "NoSuchBucket",
    "NoSuchEntity",
    "404",
    "NotFound",
    "ResourceNotFoundException",
    "NotFoundException",
    "FileSystemNotFound",
    "MountTargetNotFound",
    "InvalidGroup.NotFound",
    "InvalidNetworkInterfaceID.NotFound",
    "InvalidAllocationID.NotFound",
    "ResourceNotFound",
}


class AccountError(Exception):
    """The account or region cannot be worked in. The message says what to do."""


class Account:
    """Clients for one account and region, with the credentials of the environment."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        settings = _settings(environ)
        self._expected = settings.get("account")
        # CDK takes AWS_REGION first, boto3 does not know it.
        region = settings.get("region") or environ.get("AWS_REGION")
        self._session = boto3.Session(region_name=region)
        self._clients: dict[str, Any] = {}

    @property
    def region(self) -> str:
        """The region that the deployment is in. Raises AccountError."""
        if self._session.region_name is None:
            raise AccountError("No region is known; set AWS_REGION, or one in your AWS profile")
        return self._session.region_name

    @cached_property
    def id(self) -> str:
        """The account's number. Raises AccountError if the settings name another one."""
        found = str(self.client("sts").get_caller_identity()["Account"])
        if self._expected is not None and self._expected != found:
            raise AccountError(
                f"These credentials are for account {found}, but the settings say account={self._expected}; "
                "choose the right profile (AWS_PROFILE)"
            )
        return found

    @cached_property
    def partition(self) -> str:
        """`aws`, or that of other partitions."""
        return self._session.get_partition_for_region(self.region)

    def client(self, service: str) -> Any:
        """The client of a service; it repeats what was throttled."""
        if service not in self._clients:
            config = Config(retries={"mode": "standard", "max_attempts": 8})
            self._clients[service] = self._session.client(service, region_name=self.region, config=config)
        return self._clients[service]


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Settings that say where the deployment is. The others do not matter here, and may be invalid by now."""
    written = json.loads((INFRA / "cdk.json").read_text("utf-8")).get("context", {})
    return {name: str(value) for name, value in (written | context(environ)).items() if name in ("account", "region")}


def code(error: ClientError) -> str:
    """The error's code, as the service gave it."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_gone(error: ClientError) -> bool:
    """Whether the error says that there is no such thing."""
    return code(error) in _GONE or code(error).endswith((".NotFound", "NotFoundFault"))


def is_credentials(error: Exception) -> bool:
    """Whether the error says that there are no credentials, or none that count any more: going on is of no use."""
    return isinstance(error, _NONE) or (isinstance(error, ClientError) and code(error) in _EXPIRED)


def words(error: ClientError | BotoCoreError) -> str:
    """The error in one line."""
    if isinstance(error, ClientError):
        return f"{error.operation_name}: {code(error)}: {error.response.get('Error', {}).get('Message', '')}"
    return f"{type(error).__name__}: {error}"
