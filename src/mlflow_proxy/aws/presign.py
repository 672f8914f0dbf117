"""SageMaker's control plane, as far as the proxy needs it: presigned links to the MLflow UI, and what a target is.

All of it blocks and belongs in a thread. A presigned URL is a key to the UI: it is returned, never kept, never logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
from botocore.parsers import ResponseParserError

from mlflow_proxy.aws import codes, sessions
from mlflow_proxy.aws.sessions import Credentials
from mlflow_proxy.errors import NEEDS_OPERATOR, NEEDS_OPERATOR_CODE, Refusal
from mlflow_proxy.settings import Aws
from mlflow_proxy.targets import Mode, Target

# AWS's bounds, in seconds (API reference of CreatePresignedMlflowTrackingServerUrl and …AppUrl).
LINK_EXPIRES = range(5, 300 + 1)
SESSION_EXPIRES = range(1800, 43200 + 1)

T = TypeVar("T")


class PresignError(Refusal):
    """SageMaker did not do what was asked. `status`, `error_code` (MLflow's) and `message` are the answer to give.

    `reason` is for the operator.
    """


@dataclass(frozen=True, slots=True)
class ServerDescription:
    """What SageMaker says of a target. `status` is AWS's word; `running` tells whether calls can be answered."""

    name: str
    status: str
    running: bool
    version: str | None


def presigned_url(
    target: Target,
    credentials: Credentials,
    aws: Aws,
    *,
    link_expires: int,
    session_expires: int,
    proxy: str | None = None,
) -> str:
    """A new link to the target's MLflow UI, good for one visit.

    `link_expires` is in seconds until the unused link is void, `session_expires` in seconds that the browser session
    lasts which it opens. Raises PresignError.
    """
    _check("link_expires", link_expires, LINK_EXPIRES)
    _check("session_expires", session_expires, SESSION_EXPIRES)
    client = partial(sessions.sagemaker, credentials, aws, region=target.arn.region, proxy=proxy)
    times = {"ExpiresInSeconds": link_expires, "SessionExpirationDurationInSeconds": session_expires}
    if target.arn.mode is Mode.TRACKING:
        return _call(
            "CreatePresignedMlflowTrackingServerUrl",
            target,
            aws,
            lambda: client().create_presigned_mlflow_tracking_server_url(
                TrackingServerName=target.arn.resource, **times
            )["AuthorizedUrl"],
        )
    return _call(
        "CreatePresignedMlflowAppUrl",
        target,
        aws,
        lambda: client().create_presigned_mlflow_app_url(Arn=target.arn.text, **times)["AuthorizedUrl"],
    )


def describe(target: Target, credentials: Credentials, aws: Aws, proxy: str | None = None) -> ServerDescription:
    """Name, status and MLflow version of the target. Raises PresignError."""
    client = partial(sessions.sagemaker, credentials, aws, region=target.arn.region, proxy=proxy)

    def server() -> ServerDescription:
        answer = client().describe_mlflow_tracking_server(TrackingServerName=target.arn.resource)
        status = answer["TrackingServerStatus"]
        running = answer.get("IsActive") != "Inactive" and status not in _NOT_RUNNING
        return ServerDescription(target.arn.resource, status, running, answer.get("MlflowVersion"))

    def app() -> ServerDescription:
        answer = client().describe_mlflow_app(Arn=target.arn.text)
        status = answer["Status"]
        name = answer.get("Name", target.arn.resource)
        return ServerDescription(name, status, status not in _NOT_RUNNING, answer.get("MlflowVersion"))

    if target.arn.mode is Mode.TRACKING:
        return _call("DescribeMlflowTrackingServer", target, aws, server)
    return _call("DescribeMlflowApp", target, aws, app)


# Of both kinds (SageMaker API reference: TrackingServerStatus, MlflowAppStatus).
_NOT_RUNNING = frozenset(
    ("Creating", "CreateFailed", "Stopping", "Stopped", "Starting", "StartFailed", "Deleting", "Deleted")
)


def _check(name: str, value: int, bounds: range) -> None:
    if value not in bounds:
        raise PresignError(
            400,
            f"{name} is {value}; AWS takes {bounds.start} to {bounds.stop - 1} seconds",
            error_code="INVALID_PARAMETER_VALUE",
        )


def _call(action: str, target: Target, aws: Aws, call: Callable[[], T]) -> T:
    # `from None`: AWS's text on a refused signature holds the session token, and a traceback in a log would show it.
    try:
        return call()
    except ClientError as error:
        raise _refusal(action, target, error) from None
    except (ReadTimeoutError, ConnectTimeoutError) as error:
        reason = sessions.explain_connection(error)
        raise _failed(504, "The SageMaker API did not answer in time.", f"SageMaker API: {reason}") from None
    except (BotoCoreError, ResponseParserError) as error:
        reason = sessions.explain(error, aws)
        if sessions.is_lasting(error):
            raise _needs_operator("The SageMaker API cannot be used.", f"SageMaker API: {reason}") from None
        raise _failed(502, "The SageMaker API cannot be reached.", f"SageMaker API: {reason}") from None
    except KeyError:  # botocore takes a page of HTML for an answer without fields
        words = "Something else than the SageMaker API answered."
        raise _failed(502, words, f"SageMaker API: {sessions.NOT_AWS}") from None


def _failed(status: int, message: str, reason: str, *, error_code: str | None = None) -> PresignError:
    return PresignError(status, message, error_code=error_code, detail=reason, in_log=True)


def _needs_operator(message: str, reason: str) -> PresignError:
    return _failed(NEEDS_OPERATOR, message, reason, error_code=NEEDS_OPERATOR_CODE)


def _refusal(action: str, target: Target, error: ClientError) -> PresignError:
    code = sessions.error_code(error)
    details: Mapping[str, Any] = error.response.get("Error", {})
    if code in codes.DENIED:
        denied = f"the proxy's AWS identity may not do sagemaker:{action}"
        said = details.get("Message", "")
        return _failed(403, f"{denied}.", f"{denied}; allow it on {target.arn.text}. AWS says: {said}")
    if code in ("ResourceNotFound", "ResourceNotFoundException"):
        return _failed(
            404,
            f"SageMaker does not know the target {target.name}.",
            f"SageMaker knows no {target.arn.text}; compare the target's ARN with the console",
            error_code="RESOURCE_DOES_NOT_EXIST",
        )
    if code in ("ValidationException", "ConflictException"):
        reason = f"SageMaker refused {action}: {details.get('Message', code)}"
        return _failed(400, f"SageMaker refused {action} ({code}).", reason, error_code="INVALID_PARAMETER_VALUE")
    if code in codes.THROTTLED:
        return PresignError(429, f"SageMaker throttles {action}; try again in a moment", retry_after=2)
    if code in codes.STALE | codes.BAD_SIGNATURE:
        return _credentials_refused(code)
    reason = f"SageMaker answered {action} with {code or 'an unreadable error'}; try again later"
    return _failed(502, f"SageMaker answered {action} with an error. Try again later.", reason)


def _credentials_refused(code: str) -> PresignError:
    reason = f"SageMaker refused the proxy's AWS credentials ({code}); `mlflow-proxy check` tells more"
    if code in codes.EXPIRED:
        return _failed(503, "SageMaker refused the proxy's AWS credentials as expired. Try again later.", reason)
    return _needs_operator("SageMaker does not accept the proxy's AWS credentials.", reason)
