"""Whether requests can be served now: for each target, a signed request that succeeded lately, and valid credentials.

Traffic counts; only where there was none lately, readiness sends a request of its own, one at a time per target.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from mlflow_proxy.aws.credentials import CredentialStore
from mlflow_proxy.errors import Refusal
from mlflow_proxy.http1 import UpstreamError
from mlflow_proxy.requests import Request
from mlflow_proxy.sending import Sender
from mlflow_proxy.signing import Payload
from mlflow_proxy.targets import Target

# A body for a call that every MLflow version has and every role that may read is allowed.
PROBE_BODY = b'{"max_results": 1}'
# A target that just failed is not asked again at once, whoever polls, in seconds.
_FAILURE_AGE = 2.0
# Well below what pages wait, so that one silent target does not hide the others' states, in seconds.
_PROBE_DEADLINE = 8.0


class NotReady(NamedTuple):
    """Why a target is not ready: `words` for anybody who may know of it, and `reason` for the operator."""

    words: str
    reason: str


class Readiness:
    """Judges the targets of one worker."""

    def __init__(self, targets: Iterable[Target], sender: Sender, credentials: CredentialStore, max_age: float) -> None:
        self._targets = tuple(targets)
        self._sender = sender
        self._credentials = credentials
        self._max_age = max_age
        self._failures: dict[str, tuple[float, NotReady]] = {}
        self._locks = {target.name: asyncio.Lock() for target in self._targets}
        self._asking: dict[str, asyncio.Task[NotReady | None]] = {}

    async def report(self) -> dict[str, Any]:
        """Whether all targets are ready, and why not, as JSON-able values; targets are asked, if need be."""
        failures = await asyncio.gather(*(self._failure(target) for target in self._targets))
        states = [
            self._state(target, failure, for_operator=True)
            for target, failure in zip(self._targets, failures, strict=True)
        ]
        named = {target.name: state for target, state in zip(self._targets, states, strict=True)}
        return {"ready": all(state["ready"] for state in states), "targets": named}

    async def known(self, *, for_operator: bool) -> dict[str, dict[str, Any]]:
        """The same of each target at once, by what is known; `checking` says that it is being asked just now.

        Only operators get the whole reasons. To be called in the event loop; it waits for nobody.
        """
        states = {}
        for target in self._targets:
            failure = self._failures.get(target.name, (0.0, None))[1]
            asked_lately = self._known(target)
            if asked_lately is None:
                self._ask(target)
            else:
                failure = asked_lately[0]
            states[target.name] = {
                **self._state(target, failure, for_operator=for_operator),
                "checking": asked_lately is None,
            }
        return states

    def _ask(self, target: Target) -> None:
        if target.name not in self._asking:
            task = self._asking[target.name] = asyncio.get_running_loop().create_task(self._failure(target))
            task.add_done_callback(lambda _: self._asking.pop(target.name, None))

    def _state(self, target: Target, failure: NotReady | None, *, for_operator: bool) -> dict[str, Any]:
        status = self._credentials.status(target)
        remaining = None if status.expires_at is None else max(0, round(status.expires_at - time.time()))
        return {
            "ready": failure is None,
            "reason": failure and (failure.reason if for_operator else failure.words),
            "mode": target.arn.mode.resource_type,
            "credentials": {"usable": status.usable, "provider": status.provider, "expires_in_seconds": remaining},
            "clock_offset_seconds": round(self._sender.clock_offset(target)),
        }

    async def _failure(self, target: Target) -> NotReady | None:
        """Why a target is not ready; None if it is."""
        async with self._locks[target.name]:
            known = self._known(target)
            if known is not None:
                return known[0]
            failure = await self._probe(target)
            if failure is None:
                self._failures.pop(target.name, None)
            else:
                self._failures[target.name] = (time.monotonic(), failure)
            return failure

    def _known(self, target: Target) -> tuple[NotReady | None] | None:
        """What is known of late; None if the target has to be asked."""
        now = time.monotonic()
        if now - self._sender.last_success.get(target.name, -self._max_age) < self._max_age:
            status = self._credentials.status(target)
            words = "no valid AWS credentials"
            return (None if status.usable else NotReady(words, f"{words}: {status.error}"),)
        failed_at, failure = self._failures.get(target.name, (-_FAILURE_AGE, None))
        return (failure,) if now - failed_at < _FAILURE_AGE else None

    async def _probe(self, target: Target) -> NotReady | None:
        """Send a signed request; None if MLflow answered it."""
        try:
            async with asyncio.timeout(_PROBE_DEADLINE):
                answer = await self._sender.ask(target, PROBE, Payload.of([PROBE_BODY]))
        except TimeoutError:
            words = f"no answer within {_PROBE_DEADLINE:g} s"
            return NotReady(words, words)
        except UpstreamError as error:
            return NotReady(error.words, str(error))
        except Refusal as refusal:
            return NotReady(refusal.message, refusal.reason)
        if answer.error is not None:
            answered = answer.error.refusal()
            return NotReady(answered.message, answered.reason)
        if answer.status >= 400:
            words = f"MLflow answered {answer.status}"
            return NotReady(words, f"{words}: {mlflow_message(answer.body)}")
        return None


def mlflow_message(body: bytes) -> str:
    """The message of MLflow's error answer, or the beginning of whatever else it is."""
    try:
        return str(json.loads(body)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


PROBE = Request(
    method="POST",
    path="/api/2.0/mlflow/experiments/search",
    query="",
    headers=[(b"content-type", b"application/json"), (b"user-agent", b"mlflow-proxy")],
    content_type="application/json",
    content_length=len(PROBE_BODY),
    has_body=True,
    client="",
    scheme="",
    host="",
)
