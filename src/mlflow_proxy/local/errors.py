"""Errors of the local SageMaker: those it answers in AWS's shape, and the one it raises to the person who starts it."""

from __future__ import annotations


class LocalError(Exception):
    """The local SageMaker could not start; the message says what failed and which log to read."""


class AwsError(Exception):
    """A refusal to be answered as AWS does.

    `type` is what AWS puts in `x-amzn-errortype`; `reason` is said only in the journal, because AWS itself
    does not tell a caller why a signature differs.
    """

    def __init__(self, type_: str, message: str, *, status: int = 403, reason: str = "") -> None:
        super().__init__(message)
        self.type = type_
        self.message = message
        self.status = status
        self.reason = reason or message
        self.retry_after: float | None = None


def validation_error(message: str) -> AwsError:
    """A request that is wrong whoever sends it."""
    return AwsError("ValidationException", message, status=400)
