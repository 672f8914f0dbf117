"""The limits of one worker, in memory: which rates count for a request, and how they are shared among workers."""

from __future__ import annotations

import asyncio
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_proxy import limits as module
from mlflow_proxy.access.caller import ANONYMOUS, Caller
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits import Limits
from mlflow_proxy.settings import Settings

ANA, BEN = Caller("user:ana", "token"), Caller("key:ben", "key", role="reader")


def configured(
    limits: dict[str, Any] | None = None,
    *,
    reader: str | None = None,
    writer: str | None = None,
    team: dict[str, Any] | None = None,
    workers: int = 1,
    **sections: Any,
) -> Settings:
    """Two roles and two targets; rates are per year, lest a window end while a test runs."""
    arn = "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-tracking-server/"
    data: dict[str, Any] = {
        "server": {"workers": workers},
        "limits": limits or {},
        "roles": [
            {"name": "reader", "targets": ["*"], "rate": reader},
            {"name": "writer", "targets": ["*"], "rate": writer},
        ],
        "targets": [{"name": "team", "arn": f"{arn}team", **(team or {})}, {"name": "lab", "arn": f"{arn}lab"}],
        **sections,
    }
    return Settings(**data)


@pytest.fixture
def loop() -> Any:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def limits(loop: asyncio.AbstractEventLoop, settings: Settings) -> Limits:
    return Limits(settings, Deadlines(loop))


def verdict(of: Limits, caller: Caller, role: str | None = "reader", target: str = "team") -> str | None:
    """None if a request passes, else which limit refused it."""
    refusal = refused_with(of, caller, role, target)
    return None if refusal is None else refusal.limit


def refused_with(of: Limits, caller: Caller, role: str | None = "reader", target: str = "team") -> Refusal | None:
    try:
        assert of.check(caller, role, target) is None
    except Refusal as refusal:
        told = refusal
    else:
        return None
    assert told.status == 429
    return told


def test_without_rates_everything_passes(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured())
    assert [verdict(of, ANA, role) for role in (None, "reader") for _ in range(1000)] == [None] * 2000


def test_each_caller_has_its_own_rate(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"caller_rate": "3/year"}))
    assert [verdict(of, ANA, target=target) for target in ("team", "lab", "team", "lab")] == [
        *[None] * 3,
        "caller rate",
    ]
    assert verdict(of, BEN) is None


def test_equal_callers_are_one(loop: asyncio.AbstractEventLoop) -> None:
    """Another key or session of the same caller gives it no second rate."""
    of = limits(loop, configured({"caller_rate": "2/year"}))
    seen = [verdict(of, Caller("user:ana", "token", credential=str(number))) for number in range(3)]
    assert seen == [None, None, "caller rate"]


def test_anonymous_callers_are_one(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"caller_rate": "2/year"}))
    assert [verdict(of, ANONYMOUS, None) for _ in range(3)] == [None, None, "caller rate"]


def test_callers_of_a_role_share_its_rate(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured(reader="3/year"))
    seen = [verdict(of, caller, target=target) for caller, target in [(ANA, "team"), (BEN, "lab"), (ANA, "lab")]]
    assert seen == [None] * 3
    assert verdict(of, BEN) == "role rate"
    assert verdict(of, BEN, "writer") is None
    assert verdict(of, BEN, None) is None


def test_all_callers_share_a_targets_rate(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured(team={"rate": "2/year"}))
    assert [verdict(of, ANA, "reader"), verdict(of, BEN, "writer")] == [None, None]
    assert verdict(of, ANA, "writer") == "target rate"
    assert verdict(of, ANA, "writer", "lab") is None


def test_refused_requests_count_nowhere(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"caller_rate": "4/year"}, reader="3/year", team={"rate": "2/year"}))
    assert [verdict(of, ANA) for _ in range(10)] == [None, None, *["target rate"] * 8]
    assert [verdict(of, ANA, target="lab") for _ in range(2)] == [None, "role rate"]
    assert [verdict(of, ANA, "writer", "lab") for _ in range(2)] == [None, "caller rate"]


def test_several_rates_of_one_caller(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"caller_rate": "100/second;3/year"}))
    assert [verdict(of, ANA) for _ in range(4)] == [None] * 3 + ["caller rate"]


def test_long_subjects_are_told_apart(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"caller_rate": "1/year"}))
    long = "cert:CN=" + "x" * 50_000
    first, second = Caller(f"{long}1", "certificate"), Caller(f"{long}2", "certificate")
    assert [verdict(of, first), verdict(of, second)] == [None, None]
    assert [verdict(of, first), verdict(of, second)] == ["caller rate"] * 2


def test_many_callers_take_bounded_memory(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times as many as are remembered, then as many again: these cost nothing any more."""
    monkeypatch.setattr(module, "CALLERS", 1000)
    of = limits(loop, configured({"caller_rate": "1/year;2/year"}, team={"rate": "7001/year"}))

    def come(numbers: range) -> None:
        for number in numbers:
            assert verdict(of, Caller(f"user:{number}", "token")) is None

    tracemalloc.start()
    try:
        come(range(2000))
        grown, _ = tracemalloc.get_traced_memory()
        come(range(2000, 7000))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < grown * 1.5
    assert verdict(of, Caller("user:6999", "token")) == "caller rate"
    assert verdict(of, Caller("user:0", "token")) is None
    # The target's rate is not forgotten, however many callers come.
    assert verdict(of, Caller("user:1", "token")) == "target rate"


def test_long_subjects_are_not_kept(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"caller_rate": "1/year"}))
    tracemalloc.start()
    try:
        for number in range(300):
            assert verdict(of, Caller(f"cert:{'x' * 30_000}{number}", "certificate")) is None
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 300 * 2000


def test_roles_and_targets_are_never_forgotten(loop: asyncio.AbstractEventLoop) -> None:
    """Each of many has its own count, whichever was used last."""
    names = [f"role-{number}" for number in range(50)]
    settings = configured(roles=[{"name": name, "targets": ["*"], "rate": "1/year;3/year"} for name in names])
    of = limits(loop, settings)
    assert [verdict(of, ANA, name) for name in names] == [None] * 50
    assert [verdict(of, ANA, name) for name in names] == ["role rate"] * 50


def test_a_refused_request_fits_after_the_told_time(loop: asyncio.AbstractEventLoop, clock: SimpleNamespace) -> None:
    of = limits(loop, configured({"caller_rate": "7/minute"}, reader="3/10 seconds", team={"rate": "100/hour"}))
    refused = passed = 0
    for _ in range(300):
        refusal = refused_with(of, ANA)
        if refusal is not None:
            refused += 1
            assert refusal.retry_after is not None
            clock.now += max(0, refusal.retry_after - 2)
            if refusal.retry_after > 2:  # still too early
                assert verdict(of, ANA) == refusal.limit
            clock.now += min(2, refusal.retry_after)
            assert verdict(of, ANA) is None
        passed += 1
    assert refused >= 20
    assert passed <= 100 + 100 * (clock.now - 6000) / 3600  # the narrowest in the long run


def test_workers_take_their_shares(loop: asyncio.AbstractEventLoop) -> None:
    settings = configured({"caller_rate": "10/year", "auth_failure_rate": "4/year"}, workers=4)
    workers = [limits(loop, settings) for _ in range(4)]
    assert [sum(verdict(of, ANA) is None for _ in range(10)) for of in workers] == [2] * 4
    for _ in range(1):
        assert workers[0].add_failure("192.0.2.7") is None
    with pytest.raises(Refusal, match="spread over 4 workers"):
        workers[0].check_failures("192.0.2.7")


# Failed authentications


def test_failures_do_not_touch_other_limits(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"auth_failure_rate": "2/year", "caller_rate": "5/year"}))
    for _ in range(2):
        of.check_failures("192.0.2.7")
        assert of.add_failure("192.0.2.7") is None
    with pytest.raises(Refusal) as caught:
        of.check_failures("192.0.2.7")
    assert (caught.value.status, caught.value.limit) == (429, "failures")
    of.check_failures("192.0.2.8")
    assert verdict(of, ANA) is None


def test_failures_are_limited_unless_turned_off(loop: asyncio.AbstractEventLoop) -> None:
    by_default = limits(loop, configured())
    for _ in range(30):
        by_default.check_failures("192.0.2.7")
        assert by_default.add_failure("192.0.2.7") is None
    with pytest.raises(Refusal):
        by_default.check_failures("192.0.2.7")
    off = limits(loop, configured({"auth_failure_rate": None}))
    for _ in range(100):
        off.check_failures("192.0.2.7")
        assert off.add_failure("192.0.2.7") is None


# Places


@pytest.mark.parametrize(
    ("most", "workers", "connections", "expected"),
    [
        ((256, None), 1, 512, [256, 256]),
        ((256, None), 4, 512, [64, 64]),
        ((10, None), 4, 512, [2, 2]),
        ((2, None), 4, 512, [1, 1]),
        ((256, 40), 2, 512, [20, 128]),
        ((10, 40), 2, 512, [20, 5]),
        ((256, None), 1, 100, [100, 100]),
    ],
)
def test_places_of_a_worker(
    loop: asyncio.AbstractEventLoop, most: tuple[int, int | None], workers: int, connections: int, expected: list[int]
) -> None:
    """`most`: of all targets, and of the first one."""
    settings = configured(
        {"concurrency_max": most[0]},
        team={"concurrency_max": most[1]},
        workers=workers,
        upstream={"connections": connections},
    )
    states = limits(loop, settings).states()
    assert [state.target for state in states] == ["team", "lab"]
    assert [state.limit for state in states] == expected


def test_entering_and_leaving(loop: asyncio.AbstractEventLoop) -> None:
    async def scenario() -> None:
        of = Limits(configured({"concurrency_max": 1, "queue_timeout": 0.05}), Deadlines(asyncio.get_running_loop()))
        assert of.enter(ANA, "team") is None
        assert of.enter(ANA, "lab") is None  # each target has its own
        pending = of.enter(BEN, "team")
        assert pending is not None
        waiting = asyncio.ensure_future(pending)
        await asyncio.sleep(0)
        assert [tuple(state) for state in of.states()] == [("team", 1, 1, 1), ("lab", 1, 1, 0)]
        of.leave("team", throttled=False, answered=True)
        await waiting
        assert [tuple(state) for state in of.states()] == [("team", 1, 1, 0), ("lab", 1, 1, 0)]
        late = of.enter(ANA, "team")
        assert late is not None
        with pytest.raises(Refusal) as caught:
            await late
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        of.leave("team", throttled=False, answered=True)
        of.leave("lab", throttled=False, answered=True)
        assert [state.in_flight for state in of.states()] == [0, 0]

    loop.run_until_complete(scenario())


def test_throttling_is_felt_by_its_target_alone(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured({"concurrency_min": 1, "concurrency_max": 10}))
    for _ in range(10):
        assert of.enter(ANA, "team") is None
    of.leave("team", throttled=True, answered=False)
    assert [state.limit for state in of.states()] == [7, 10]


def test_without_storage_nothing_is_away(loop: asyncio.AbstractEventLoop) -> None:
    of = limits(loop, configured())
    loop.run_until_complete(of.start())
    assert (of.storage_away, of.storage_failures) == (False, 0)
    loop.run_until_complete(of.close())
