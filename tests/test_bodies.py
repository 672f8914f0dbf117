"""Bodies: whole, bounded one by one and together, and never waited for without end."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_proxy import bodies as module
from mlflow_proxy.bodies import Body
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.inbound.connection import CallerGone
from mlflow_proxy.requests import Request
from mlflow_proxy.settings import Server

Result = TypeVar("Result")


class Bodies:
    """The bodies of one worker, whose event loop runs only while a test waits."""

    def __init__(self, server: Server) -> None:
        self.loop = asyncio.new_event_loop()
        self.kept = module.Bodies(server, Deadlines(self.loop))

    @property
    def held(self) -> int:
        return self.kept.held

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(work)


LIMIT, BUDGET = 4096, 8192
SERVER = Server(body_limit=LIMIT, body_budget=BUDGET, body_timeout=5)


def request_of(length: int | None = None) -> Request:
    return Request("POST", "/", "", [], "", length, True, "127.0.0.1", "http", "localhost")


class Caller:
    """Sends these chunks; then goes away, or stops. Counts what was asked of it."""

    def __init__(self, chunks: Iterable[bytes], *, then: str = "end", pause: float = 0.0) -> None:
        self._chunks = list(chunks)
        self._then = then
        self._pause = pause
        self.asked = 0

    async def __call__(self) -> bytes:
        self.asked += 1
        await asyncio.sleep(self._pause)
        if self._chunks:
            return self._chunks.pop(0)
        if self._then == "end":
            return b""
        if self._then == "stall":
            await asyncio.sleep(60)
        raise CallerGone


def collect(bodies: Bodies, caller: Caller, length: int | None = None) -> Body:
    return bodies.run(bodies.kept.collect(request_of(length), caller))


def refused(bodies: Bodies, caller: Caller, length: int | None = None) -> Refusal:
    held = bodies.held
    with pytest.raises(Refusal) as caught:
        collect(bodies, caller, length)
    assert bodies.held == held
    return caught.value


@settings(max_examples=50, deadline=None)
@given(
    chunks=st.lists(
        st.binary(min_size=1, max_size=40)
        | st.integers(60_000, 300_000).map(lambda size: b"0123456789" * (size // 10)),
        max_size=12,
    ),
    declared=st.booleans(),
    most=st.integers(0, 300_000),
)
def test_body_is_what_was_sent(chunks: list[bytes], declared: bool, most: int) -> None:
    bodies = Bodies(Server(body_limit=4 << 20, body_budget=4 << 20))
    whole = b"".join(chunks)
    got = collect(bodies, Caller(chunks), len(whole) if declared else None)
    assert b"".join(got.pieces) == got.start(len(whole)) == whole
    assert got.start(most) == whole[:most]
    assert bodies.held == len(got) == len(whole)
    got.release()
    assert (bodies.held, len(got), got.pieces) == (0, 0, [])


@pytest.mark.parametrize("length", [None, LIMIT])
def test_body_of_the_very_limit(length: int | None) -> None:
    bodies = Bodies(SERVER)
    assert len(collect(bodies, Caller([b"a" * LIMIT]), length)) == LIMIT


def test_declared_too_large_is_refused_unread() -> None:
    caller = Caller([b"a"])
    refusal = refused(Bodies(SERVER), caller, LIMIT + 1)
    assert (refusal.status, refusal.close, caller.asked) == (413, True, 0)
    assert "server.body_limit" in refusal.message


def test_undeclared_too_large_is_refused_as_soon_as_the_limit_is_crossed() -> None:
    caller = Caller([b"a" * 1000] * 100)
    refusal = refused(Bodies(SERVER), caller)
    assert (refusal.status, refusal.close, caller.asked) == (413, True, 5)


def test_lying_content_length_does_not_pass_the_limit() -> None:
    assert refused(Bodies(SERVER), Caller([b"a" * 3000] * 2), 10).status == 413


def test_what_was_declared_and_not_sent_is_given_back() -> None:
    bodies = Bodies(SERVER)
    assert collect(bodies, Caller([b"a" * 10]), 1000).start(1000) == b"a" * 10
    assert bodies.held == 10


def test_budget_is_for_all_bodies_together() -> None:
    bodies = Bodies(SERVER)
    first, _ = (collect(bodies, Caller([b"a" * LIMIT])) for _ in range(2))
    for length in (None, 1):
        refusal = refused(bodies, Caller([b"b"]), length)
        assert (refusal.status, refusal.retry_after, refusal.close) == (503, 1, True)
        assert "server.body_budget" in refusal.message
    first.release()
    assert collect(bodies, Caller([b"b"])).start(1) == b"b"


def test_declared_body_reserves_only_what_has_arrived() -> None:
    bodies = Bodies(SERVER)

    async def scenario() -> int:
        slow = [
            asyncio.create_task(bodies.kept.collect(request_of(LIMIT), Caller([b"a"], then="stall"))) for _ in range(2)
        ]
        await asyncio.sleep(0.01)
        held = bodies.held
        await bodies.kept.collect(request_of(1), Caller([b"b"]))
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return held

    assert bodies.run(scenario()) == 2
    assert bodies.held == 1  # a cancelled request holds nothing


@pytest.mark.parametrize("chunks", [[], [b"a"], [b"a" * 10, b"b" * 10]])
@pytest.mark.parametrize("length", [None, 100])
def test_caller_that_goes_away(chunks: list[bytes], length: int | None) -> None:
    bodies = Bodies(SERVER)
    with pytest.raises(CallerGone):
        collect(bodies, Caller(chunks, then="gone"), length)
    assert bodies.held == 0


@pytest.mark.parametrize("chunks", [[], [b"a"]])
def test_caller_that_stalls(chunks: list[bytes]) -> None:
    server = Server(body_limit=LIMIT, body_budget=BUDGET, body_timeout=0.1)
    refusal = refused(Bodies(server), Caller(chunks, then="stall"), 100)
    assert (refusal.status, refusal.close) == (408, True)
    assert "server.body_timeout" in refusal.message


def test_caller_that_drips_is_stalling_too() -> None:
    """A byte now and then is no reason to wait on: the deadline is for the whole, stretched by what arrived."""
    server = Server(body_limit=LIMIT, body_budget=BUDGET, body_timeout=0.2)
    caller = Caller([b"a"] * 1000, pause=0.02)
    assert refused(Bodies(server), caller).status == 408
    assert caller.asked < 40


def test_caller_that_is_slow_but_steady_is_served() -> None:
    server = Server(body_limit=1 << 20, body_budget=1 << 20, body_timeout=0.1)
    caller = Caller([b"a" * 8192] * 10, pause=0.02)
    assert len(collect(Bodies(server), caller)) == 81920


def test_tiny_chunks_cost_no_more_memory_than_the_budget_counts() -> None:
    """Each of them kept singly would take 43 bytes for two."""
    whole = bytes(range(256)) * 512
    place = 0

    async def receive() -> bytes:
        nonlocal place
        await asyncio.sleep(0)
        chunk, place = whole[place : place + 2], place + 2
        return chunk

    bodies = Bodies(SERVER.model_copy(update={"body_limit": 1 << 20, "body_budget": 1 << 20}))
    tracemalloc.start()
    try:
        body = bodies.run(bodies.kept.collect(request_of(), receive))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body.start(len(whole)) == whole
    assert peak < 6 * len(whole)
