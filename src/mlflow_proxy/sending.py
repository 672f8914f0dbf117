"""Steps 6 and 7 of a request's way: sign and send, until there is an answer to relay.

Again where `retries` says that it is safe; and once more when the service found the signature's time or credentials
wrong and that could be put right.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mlflow_proxy import retries
from mlflow_proxy.aws import errors as aws
from mlflow_proxy.aws.credentials import Credentials, CredentialStore, CredentialsUnavailable
from mlflow_proxy.aws.role_sessions import RoleSession
from mlflow_proxy.deadlines import Deadlines, Timeout
from mlflow_proxy.errors import NEEDS_OPERATOR, NEEDS_OPERATOR_CODE, Refusal
from mlflow_proxy.http1 import AnswerTimeout, Connection, UpstreamError
from mlflow_proxy.limits.pace import Pace
from mlflow_proxy.relay import Headers, upstream_request_id
from mlflow_proxy.requests import Request
from mlflow_proxy.settings import Upstream
from mlflow_proxy.signing import Payload, Signer
from mlflow_proxy.targets import Target
from mlflow_proxy.telemetry.record import Record
from mlflow_proxy.upstream import Busy, NotConnected, Pool

logger = logging.getLogger(__name__)

# How long a request waits for renewed credentials after the service called its own ones expired, in seconds.
_RENEWAL_WAIT = 10.0
# A repetition gets at least this long for its answer, in seconds.
_LEAST_WAIT = 1.0


class Answer(NamedTuple):
    """An answer whose head has arrived. `body` is what was read of it; more is on `connection`, unless that is None."""

    status: int
    headers: Headers
    connection: Connection | None
    credentials: Credentials
    clock_offset: float
    body: bytes = b""
    error: aws.AwsError | None = None

    @property
    def date(self) -> str | None:
        """The Date header: the service's clock."""
        return next((value.decode("latin-1") for name, value in self.headers if name.lower() == b"date"), None)


class Line(NamedTuple):
    """What one worker needs to speak with one target."""

    target: Target
    pool: Pool
    signer: Signer
    pace: Pace


class Sender:
    """Speaks with all targets for one worker. Made in the event loop that uses it.

    `paces` are the limits' by target; what they have none for has one of its own.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        upstream: Upstream,
        credentials: CredentialStore,
        deadlines: Deadlines,
        paces: Mapping[str, Pace] | None = None,
    ) -> None:
        self._upstream = upstream
        self._deadlines = deadlines
        self._credentials = credentials
        paces = paces or {}
        self._lines = {
            t.name: Line(t, Pool(t, upstream, deadlines), Signer(t), paces.get(t.name) or Pace(deadlines.loop.time))
            for t in targets
        }
        # By target, on the monotonic clock: when it last answered as it should; gone after a failure.
        self.last_success: dict[str, float] = {}

    async def send(  # noqa: PLR0917  (in the order of the steps)
        self,
        target: Target,
        request: Request,
        path: str,
        body: Payload,
        record: Record,
        session: RoleSession | None = None,
    ) -> Answer:
        """The answer to one request; `done` takes back what it holds. Raises Refusal when there is none to be had.

        It is signed with the caller's role `session`, or as the target says.
        """
        line = self._lines[target.name]
        record.step("sign")
        if session is not None:
            await self.prepare(target, session)
        attempt, corrected, fresh = 0, False, False
        give_up = time.perf_counter() + self._upstream.first_byte_timeout
        while True:
            throttled = False
            try:
                answer = await self._attempt(
                    line, request, path, body, record, session=session, give_up=give_up, fresh=fresh
                )
            except UpstreamError as error:
                fresh = True  # other unused connections may be closed as well
                pause = retries.delay(attempt + 1)
                may_repeat = retries.may_repeat(error, request.method)
                if not may_repeat or attempt >= self._upstream.retries or time.perf_counter() + pause > give_up:
                    self.last_success.pop(target.name, None)
                    record.upstream_error = _kind(error)
                    raise _refusal(target, error) from error
            else:
                fresh = False
                if answer.error is None:
                    self._note(target, answer, session)
                    return answer
                throttled = answer.error.throttled
                record.throttled = record.throttled or throttled
                pause = 0.0
                if throttled:
                    line.pace.throttled()
                    pause = max(retries.delay(attempt + 1, throttled=True), line.pace.wait())
                if throttled and (
                    attempt >= self._upstream.retries
                    or not retries.may_repeat_throttled(answer.error, request.method)
                    or time.perf_counter() + pause > give_up
                ):
                    record.upstream_error = "throttled"
                    return answer
                if not throttled and (corrected or not await self._corrected(line, answer, session)):
                    self._note(target, answer, session)
                    record.upstream_error = "aws"
                    return answer
                corrected = corrected or not throttled
            attempt += 1
            record.retries += 1
            await asyncio.sleep(max(pause, line.pace.reserve()) if throttled else pause)
            line.pace.count()

    async def prepare(self, target: Target, session: RoleSession) -> None:
        """Wait until there are credentials of a caller's role session. Raises Refusal: 501 or 503."""
        pending = self._credentials.obtain(target, session)
        if pending is not None:
            try:
                await pending
            except CredentialsUnavailable as unavailable:
                raise unavailable.refusal(target.name) from None

    def _note(self, target: Target, answer: Answer, session: RoleSession | None) -> None:
        if session is not None and answer.status == 403:
            return  # this caller's IAM role may not; that says nothing of the target
        if answer.status < 400:
            self.last_success[target.name] = time.monotonic()
        elif answer.error is not None or answer.status >= 500:
            self.last_success.pop(target.name, None)

    def done(self, target: Target, connection: Connection) -> None:
        """Take back an answer's connection, which may serve again if the answer was read whole."""
        self._lines[target.name].pool.release(connection)

    async def ask(self, target: Target, request: Request, body: Payload) -> Answer:
        """Send a request of the proxy's own and read the answer. Raises Refusal and UpstreamError."""
        answer = await self.send(target, request, request.path, body, Record(request.method, "mlflow-proxy"))
        if answer.connection is None:
            return answer
        data = answer.body
        try:
            while not answer.connection.drained and len(data) < aws.SIZE_LIMIT:
                data += await answer.connection.read(self._upstream.idle_timeout) or b""
        finally:
            self.done(target, answer.connection)
        return answer._replace(connection=None, body=data)

    def clock_offset(self, target: Target) -> float:
        """Seconds that the target's clock is ahead of this machine's, as far as its answers told."""
        return self._lines[target.name].signer.clock.offset

    def date_difference(self, target: Target, answer: Answer) -> float | None:
        """Seconds that an answer's Date is ahead of this machine's clock; None if it has none."""
        return self._lines[target.name].signer.clock.difference(answer.date)

    @property
    def connections(self) -> int:
        """How many are open to all targets."""
        return sum(line.pool.connections for line in self._lines.values())

    def close(self) -> None:
        """Close the connections to all targets."""
        for line in self._lines.values():
            line.pool.close()

    async def _attempt(
        self,
        line: Line,
        request: Request,
        path: str,
        body: Payload,
        record: Record,
        *,
        session: RoleSession | None,
        give_up: float,
        fresh: bool,
    ) -> Answer:
        """One request on one connection, which is given back here unless the answer still needs it."""
        try:
            credentials = self._credentials.get(line.target, session)
        except CredentialsUnavailable as unavailable:
            raise unavailable.refusal(line.target.name) from None
        if record.trace is not None:
            endpoint = line.target.endpoint
            request = request._replace(headers=record.trace.upstream(request.headers, endpoint.host, endpoint.port))
        offset = line.signer.clock.offset
        head = line.signer.head(request, path, body, credentials, request_id=record.request_id)
        started = time.perf_counter()
        connection = (None if fresh else line.pool.take_idle()) or await line.pool.acquire(fresh=fresh)
        try:
            await connection.exchange(
                head,
                body.pieces,
                head_request=request.method == "HEAD",
                first_byte=max(_LEAST_WAIT, give_up - time.perf_counter()),
                between=self._upstream.idle_timeout,
            )
            record.upstream_seconds += time.perf_counter() - started
            record.upstream_request_id = upstream_request_id(connection.headers)
            if record.trace is not None:
                record.trace.answered(connection.status)
            if connection.complete and connection.status < 400:  # nearly always: all of it came at once
                body_read = connection.take()
                line.pool.release(connection)
                return Answer(connection.status, connection.headers, None, credentials, offset, body_read)
            answer = Answer(connection.status, connection.headers, connection, credentials, offset)
            if connection.status in aws.STATUSES:
                answer = await self._judged(answer, connection)
        except BaseException:
            connection.abort()
            line.pool.release(connection)
            raise
        if answer.connection is None:
            line.pool.release(connection)
        return answer

    async def _judged(self, answer: Answer, connection: Connection) -> Answer:
        """Read a short error answer whole, to tell AWS's own errors, which may hold secrets, from MLflow's."""
        body = b""
        try:
            with Timeout(self._deadlines, self._upstream.idle_timeout):
                while not connection.drained and len(body) <= aws.SIZE_LIMIT:
                    body += await connection.read(self._upstream.idle_timeout) or b""
        except TimeoutError:
            raise AnswerTimeout(f"no whole error within {self._upstream.idle_timeout:g} s", begun=True) from None
        if not connection.drained:
            error = aws.aws_error(answer.status, answer.headers, b"")  # by its header alone
            return answer._replace(body=body) if error is None else answer._replace(connection=None, error=error)
        return answer._replace(connection=None, body=body, error=aws.aws_error(answer.status, answer.headers, body))

    async def _corrected(self, line: Line, answer: Answer, session: RoleSession | None) -> bool:
        """Put right what the service found wrong with the signature, if it can be: the clock, or the credentials."""
        error = answer.error
        assert error is not None  # noqa: S101  # the caller's condition, for the type checker
        if not error.not_done:
            return False
        if line.signer.clock.correct(error.type, error.message, answer.date, signed_at=answer.clock_offset):
            return True
        if not error.expired:
            return False
        try:
            # Another request may have brought new ones already, after this one was signed.
            if self._credentials.get(line.target, session) != answer.credentials:
                return True
            return await self._credentials.wait_refreshed(line.target, _RENEWAL_WAIT, session) != answer.credentials
        except CredentialsUnavailable as unavailable:
            logger.warning("credentials for %s could not be renewed: %s", line.target.name, unavailable)
            return False


def _kind(error: UpstreamError) -> str:
    """The failure's name in metrics and traces."""
    if isinstance(error, Busy):
        return "busy"
    if isinstance(error, AnswerTimeout):
        return "timeout"
    return "connect" if isinstance(error, NotConnected) else "broken"


def _refusal(target: Target, error: UpstreamError) -> Refusal:
    """What a caller is told about an upstream failure, and where and how it happened for the log."""
    where, place = f"SageMaker MLflow ({target.name})", target.endpoint.authority
    match error:
        case Busy():
            return Refusal(503, f"Too many requests to {target.name} at once: {error.words}.", retry_after=1)
        case AnswerTimeout():
            return Refusal(504, f"{where} gave {error.words}.", detail=f"{place} gave {error}")
        case NotConnected(lasting=True):
            return Refusal(
                NEEDS_OPERATOR,
                f"{where} cannot be reached, and trying again will not help: {error.words}.",
                error_code=NEEDS_OPERATOR_CODE,
                detail=f"{place} cannot be reached: {error}",
                in_log=True,
            )
        case NotConnected():
            words, detail = f"{where} cannot be reached: {error.words}.", f"{place} cannot be reached: {error}"
            return Refusal(502, words, retry_after=1, detail=detail, in_log=True)
    return Refusal(502, f"{where} broke off: {error.words}.", detail=f"{place} broke off: {error}", in_log=True)
