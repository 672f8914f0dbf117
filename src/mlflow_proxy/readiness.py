"""Whether requests can be served now: for each target, a signed request that succeeded lately, and valid credentials.

Traffic counts; only where there was none lately, readiness sends a request of its own, one at a time per target.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from mlflow_proxy.aws.credentials import CredentialStore
from mlflow_proxy.errors import Refusal
from mlflow_proxy.http1 import UpstreamError
from mlflow_proxy.requests import Request
from mlflow_proxy.sending import Sender
from mlflow_proxy.signing import Payload
from mlflow_proxy.targets import Target

logger = logging.getLogger(__name__)

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


class Measured(NamedTuple):
    """How a target was when it last answered or failed to: ready, if there is no `failure`.

    `at` is on the monotonic clock; `counts_for` is how many seconds later it has to be measured anew.
    """

    at: float
    failure: NotReady | None
    counts_for: float


class Readiness:
    """Judges the targets of one worker."""

    def __init__(self, targets: Iterable[Target], sender: Sender, credentials: CredentialStore, max_age: float) -> None:
        self._targets = tuple(targets)
        self._sender = sender
        self._credentials = credentials
        self._max_age = max_age
        self._failures: dict[str, Measured] = {}
        self._locks = {target.name: asyncio.Lock() for target in self._targets}
        self._measuring: dict[str, asyncio.Task[NotReady | None]] = {}

    async def report(self) -> dict[str, Any]:
        """Whether all targets are ready, and why not, as JSON-able values; targets are asked, if need be."""
        failures = await asyncio.gather(*(self._failure(target) for target in self._targets))
        states = {
            target.name: self._state(target, failure, for_operator=True)
            for target, failure in zip(self._targets, failures, strict=True)
        }
        return {"ready": not any(failures), "targets": states}

    async def known(self, names: Iterable[str], *, for_operator: bool) -> dict[str, dict[str, Any]]:
        """The same of these targets at once, as they were when last measured; what is too old is measured meanwhile.

        `ready` is None where nothing was measured yet; `age` is in seconds; `checking` says that it is being measured.
        Only operators get the whole reasons. To be called in the event loop; it waits for nobody.
        """
        wanted = frozenset(names)
        now = time.monotonic()
        states = {}
        for target in self._targets:
            if target.name in wanted:
                last = self._last(target)
                checking = not self._counts(last)
                if checking:
                    self._measure(target)
                state = self._state(target, last and last.failure, for_operator=for_operator)
                if last is None:
                    state["ready"] = None
                states[target.name] = {**state, "age": last and round(now - last.at), "checking": checking}
        return states

    def _measure(self, target: Target) -> None:
        """Measure a target in the background, unless that is under way."""
        if target.name not in self._measuring:
            task = asyncio.get_running_loop().create_task(self._failure(target))
            self._measuring[target.name] = task
            task.add_done_callback(partial(self._measured, target))

    def _measured(self, target: Target, task: asyncio.Task[NotReady | None]) -> None:
        del self._measuring[target.name]
        if not task.cancelled() and task.exception() is not None:
            logger.error("the target %s could not be measured", target.name, exc_info=task.exception())

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
            last = self._last(target)
            if last is not None and self._counts(last):
                return last.failure
            failure = await self._probe(target)
            if failure is not None:
                self._failures[target.name] = Measured(time.monotonic(), failure, _FAILURE_AGE)
            return failure

    def _last(self, target: Target) -> Measured | None:
        """The newest of what traffic and probes told of a target; None if there is nothing."""
        failed = self._failures.get(target.name)
        succeeded_at = self._sender.last_success.get(target.name)
        if succeeded_at is None or (failed is not None and failed.at > succeeded_at):
            return failed
        status = self._credentials.status(target)
        words = "no valid AWS credentials"
        failure = None if status.usable else NotReady(words, f"{words}: {status.error}")
        return Measured(succeeded_at, failure, self._max_age)

    def _counts(self, last: Measured | None) -> bool:
        return last is not None and time.monotonic() - last.at < last.counts_for

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
