"""Limits that several instances share through a real Redis: exact together, and bearable when it is away."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from limits.strategies import SlidingWindowCounterRateLimiter
from tests.limits.servers import RedisServer, free_port
from tests.limits.test_limits import ANA, BEN, configured

from mlflow_proxy.access.caller import Caller
from mlflow_proxy.deadlines import Deadlines
from mlflow_proxy.errors import Refusal
from mlflow_proxy.limits import Limits
from mlflow_proxy.limits.counters import Counters
from mlflow_proxy.limits.rates import Counted, rates, take
from mlflow_proxy.limits.storage import SharedStorage, StorageAway

# Nothing here takes long; whatever hangs is an error.
HANGS = 60.0


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In the kind of event loop that the service uses; an error that nobody saw fails, too."""
    unseen: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(str(context)))
        async with asyncio.timeout(HANGS):
            await scenario()

    uvloop.run(main())
    assert unseen == []


@asynccontextmanager
async def limits(
    server: RedisServer | str, options: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Limits]:
    url = server if isinstance(server, str) else server.url
    # The real default is shorter; a busy machine must not make a storage look away here.
    sections = configured({"storage": url, "storage_timeout": 5.0, **(options or {})}, **settings)
    made = Limits(sections, Deadlines(asyncio.get_running_loop()))
    await made.start()
    yield made
    await made.close()


@asynccontextmanager
async def storage(server: RedisServer) -> AsyncIterator[SharedStorage]:
    made = SharedStorage(server.url, timeout=5.0, meanwhile="as in a test")
    await made.start()
    assert not made.away
    yield made
    await made.close()


async def asked(of: Limits, caller: Caller = ANA, role: str | None = "reader", target: str = "team") -> Refusal | None:
    """None if a request passes, else its refusal."""
    try:
        pending = of.check(caller, role, target)
        if pending is not None:
            await pending
    except Refusal as refusal:
        return refusal
    return None


async def verdicts(of: Limits, times: int, **request: Any) -> list[str | None]:
    refusals = [await asked(of, **request) for _ in range(times)]
    return [None if refusal is None else refusal.limit for refusal in refusals]


async def until(state: Callable[[], bool]) -> None:
    while not state():  # noqa: ASYNC110  (nothing tells when it changes)
        await asyncio.sleep(0.02)


def counted(text: str, subject: str = "user:ana") -> Counted:
    (rate,) = rates("caller", "", text)
    return Counted(SlidingWindowCounterRateLimiter(Counters(100)), rate, subject)


REFUSED = "caller rate"


# Counting together


def test_two_instances_share_a_rate(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        options = {"caller_rate": "5/year"}
        async with limits(redis_server, options, workers=4) as one, limits(redis_server, options, workers=4) as other:
            seen = [await asked(of) for of in [one, other] * 4]
            assert [refusal is None for refusal in seen] == [True] * 5 + [False] * 3
            refusal = seen[-1]
            assert refusal is not None
            assert (refusal.status, refusal.limit) == (429, REFUSED)
            assert "5 per year" in refusal.message
            assert refusal.retry_after is not None
            assert refusal.retry_after > 1
            assert dict(refusal.headers)["ratelimit-limit"] == "5"
            assert await asked(other, BEN) is None

    run(scenario)


def test_exact_when_all_ask_at_once(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        options = {"caller_rate": "250/year"}
        async with limits(redis_server, options) as one, limits(redis_server, options) as other:
            seen = await asyncio.gather(*(asked(of) for of in [one, other] * 400))
            assert sum(refusal is None for refusal in seen) == 250

    run(scenario)


def test_never_more_than_any_of_several_rates_when_all_ask_at_once(redis_server: RedisServer) -> None:
    """Then a refused request may count where there was room for it, but none passes beyond a rate."""

    async def scenario() -> None:
        options = {"caller_rate": "200/year"}
        rates = {"reader": "150/year", "team": {"rate": "50/year"}}
        async with limits(redis_server, options, **rates) as one, limits(redis_server, options, **rates) as other:
            seen = await asyncio.gather(*(asked(of) for of in [one, other] * 100))
            assert sum(refusal is None for refusal in seen) == 50
            assert {refusal.limit for refusal in seen if refusal is not None} == {"target rate"}
            # What lost its race cost the others no more than the few that asked at that moment.
            assert sum([await asked(one, target="lab") is None for _ in range(150)]) >= 80

    run(scenario)


def test_few_connections_however_many_ask(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "10000/year"}, reader="10000/year") as of:
            seen = await asyncio.gather(*(asked(of, Caller(f"user:{number}", "token")) for number in range(500)))
            assert seen == [None] * 500
            assert redis_server.client().info("clients")["connected_clients"] <= 8 * 2 + 1

    run(scenario)


def test_a_request_counts_in_all_limits_or_in_none(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "4/year"}, reader="3/year", team={"rate": "2/year"}) as of:
            assert await verdicts(of, 10) == [None, None, *["target rate"] * 8]
            assert await verdicts(of, 2, target="lab") == [None, "role rate"]
            assert await verdicts(of, 2, role="writer", target="lab") == [None, REFUSED]

    run(scenario)


def test_no_rate_no_question(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with limits(redis_server, team={"rate": "1/year"}) as of:
            assert of.check(ANA, "reader", "lab") is None
            assert of.check(ANA, "reader", "team") is not None  # (never awaited: it is not counted)

    with pytest.warns(RuntimeWarning, match="never awaited"):
        run(scenario)


def test_a_refused_request_fits_after_the_told_time(redis_server: RedisServer) -> None:
    """Through several windows, over real time."""

    async def scenario() -> None:
        async with storage(redis_server) as of:
            own = counted("3/second")
            refused = 0
            for _ in range(12):
                full = await of.take([own])
                if full is not None:
                    refused += 1
                    assert full.rate is own.rate
                    assert full.wait < 1
                    await asyncio.sleep(max(0.0, full.wait) + 0.005)
                    assert await of.take([own]) is None
            assert refused >= 3

    run(scenario)


def test_counts_as_a_worker_alone_would(redis_server: RedisServer) -> None:
    """Side by side with the count in memory, over real time: windows begin at other times, but as much passes."""

    async def scenario() -> None:
        async with storage(redis_server) as of:
            shared, alone = counted("8/second"), counted("8/second")
            passed = {"shared": 0, "alone": 0}
            for _ in range(150):
                passed["alone"] += take([alone]) is None
                passed["shared"] += await of.take([shared]) is None
                await asyncio.sleep(0.02)
            assert 16 <= passed["alone"] < 75
            assert abs(passed["shared"] - passed["alone"]) <= 12

    run(scenario)


def test_the_longest_wait_is_told(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with storage(redis_server) as of:
            wide, narrow = counted("2/day"), counted("2/year")
            assert await of.take([wide, narrow]) is None
            assert await of.fullest([wide, narrow]) is None
            assert await of.take([wide, narrow]) is None
            for full in (await of.fullest([wide, narrow]), await of.take([wide, narrow])):
                assert full is not None
                assert full.rate is narrow.rate
                assert 359 * 86400 < full.wait <= 360 * 86400
            assert await of.take([wide, counted("5/year")]) is not None

    run(scenario)


def test_the_wait_is_told_from_the_first_moment_of_a_window(redis_server: RedisServer) -> None:
    """Most of these ask in the same millisecond in which the window began."""

    async def scenario() -> None:
        async with storage(redis_server) as of:
            for number in range(50):
                own = [counted("1/day", f"user:{number}")]
                assert await of.take(own) is None
                full = await of.take(own)
                assert full is not None
                assert full.wait > 86000

    run(scenario)


def test_numbers_that_are_huge(redis_server: RedisServer) -> None:
    """What the settings take, the storage takes, too."""

    async def scenario() -> None:
        text = f"{'9' * 400}/second;2/{'9' * 400} years"
        async with limits(redis_server, {"caller_rate": text}) as of:
            assert await verdicts(of, 3) == [None, None, REFUSED]
            assert of.storage_failures == 0

    run(scenario)


def test_keys_say_nothing_and_end(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        hostile = ["user:a", "user:a\r\nFLUSHALL\r\n", "user:*", "user:{b}", "user:\udcff\0", "cert:" + "x" * 40_000]
        async with limits(redis_server, {"caller_rate": "1/minute"}) as of:
            for subject in hostile:
                assert await asked(of, Caller(subject, "token")) is None
            client = redis_server.client()
            keys = [str(key) for key in client.keys("*") if "probe" not in str(key)]
            assert len(keys) == len(hostile)
            assert all(re.fullmatch(r"mlflow-proxy:\{caller//1/60.0/[0-9a-f]{32}\}", key) for key in keys)
            assert all(0 < client.ttl(key) <= 120 for key in keys)

    run(scenario)


def test_failures_count_on_all_instances(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        options = {"auth_failure_rate": "4/year"}
        async with limits(redis_server, options) as one, limits(redis_server, options) as other:

            async def fail(of: Limits) -> None:
                pending = of.add_failure("192.0.2.7")
                assert pending is not None
                await pending

            for of in [one, one, one, other]:
                of.check_failures("192.0.2.7")
                await fail(of)
            with pytest.raises(Refusal) as caught:  # it saw the fourth
                other.check_failures("192.0.2.7")
            assert caught.value.limit == "failures"
            one.check_failures("192.0.2.7")  # hears of it with the next failure
            await fail(one)
            with pytest.raises(Refusal):
                one.check_failures("192.0.2.7")
            one.check_failures("192.0.2.8")

    run(scenario)


# Away


async def take_turns(of: Limits, server: RedisServer, *, away: bool) -> None:
    """Ask until the storage is known to be away, or back."""
    server.kill() if away else server.start()
    while of.storage_away != away:
        await asked(of, Caller("user:somebody", "token"))
        await asyncio.sleep(0.02)


def test_away_and_open(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Each worker counts alone then, with the whole rate: what the storage would let through is never refused."""

    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "5/year"}, workers=4) as of:
            assert await verdicts(of, 6) == [None] * 5 + [REFUSED]
            await take_turns(of, redis_server, away=True)
            assert of.check(BEN, "reader", "team") is None  # nothing to wait for
            assert await verdicts(of, 5, caller=BEN) == [None] * 4 + [REFUSED]
            failures = of.storage_failures
            assert failures >= 1
            await until(lambda: of.storage_failures > failures + 1)  # probes
            await take_turns(of, redis_server, away=False)
            assert await verdicts(of, 6) == [None] * 5 + [REFUSED]  # the new server remembers nothing
            lines = [record.message for record in caplog.records]
            assert sum("limits.storage is away" in line for line in lines) == 1
            assert "each worker counts alone" in lines[0]
            assert sum("answers again after" in line for line in lines) == 1

    with caplog.at_level(logging.WARNING, "mlflow_proxy"):
        run(scenario)


def test_away_and_closed(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "5/year", "storage_away": "closed"}) as of:
            assert await asked(of) is None
            await take_turns(of, redis_server, away=True)
            refusal = await asked(of)
            assert refusal is not None
            assert (refusal.status, refusal.retry_after, refusal.limit) == (503, 1, "storage away")
            with pytest.raises(Refusal):
                of.check(ANA, "reader", "team")
            await take_turns(of, redis_server, away=False)
            assert await asked(of) is None

    run(scenario)


@pytest.mark.parametrize(("how", "verdict"), [("open", None), ("closed", "storage away")])
def test_requests_under_way_when_it_dies(redis_server: RedisServer, how: str, verdict: str | None) -> None:
    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "10000/year", "storage_away": how}) as of:
            with redis_server.frozen():
                asking = asyncio.gather(*(asked(of) for _ in range(500)))
                await asyncio.sleep(0.05)
                redis_server.kill()
            seen = await asking
            assert {None if refusal is None else refusal.limit for refusal in seen} == {verdict}
            assert of.storage_away
            assert of.storage_failures <= 3  # one outage, whoever met it, and probes

    run(scenario)


def test_slow_storage_holds_up_for_its_timeout_and_no_longer(redis_server: RedisServer) -> None:
    """It never answers while it is stopped, so without the timeout nobody would get an answer."""

    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "3/year", "storage_timeout": 0.2}) as of:
            assert await verdicts(of, 2) == [None] * 2
            with redis_server.frozen():
                seen = await asyncio.gather(*(asked(of, BEN) for _ in range(300)))
                assert sum(refusal is None for refusal in seen) == 3  # counted alone
                assert of.storage_away
                assert of.check(Caller("user:cy", "token"), "reader", "team") is None
            await until(lambda: not of.storage_away)
            # Answers to the questions that were given up are not taken for answers to these.
            for number in range(20):
                assert await verdicts(of, 4, caller=Caller(f"user:{number}", "token")) == [None] * 3 + [REFUSED]

    run(scenario)


def test_not_there_at_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = RedisServer(tmp_path)
        try:
            async with limits(server, {"caller_rate": "2/year"}) as of:
                assert of.storage_away
                assert of.storage_failures == 1
                assert await verdicts(of, 3) == [None, None, REFUSED]
                server.start()
                await until(lambda: not of.storage_away)
                assert await verdicts(of, 3) == [None, None, REFUSED]
        finally:
            server.kill()

    run(scenario)


def test_answers_but_may_not_write(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Full, or a replica: it stays away until a probe can count."""

    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "2/year", "storage_away": "closed"}) as of:
            client = redis_server.client()
            client.config_set("maxmemory", "1")
            refusal = await asked(of)
            assert refusal is not None
            assert refusal.limit == "storage away"
            failures = of.storage_failures
            await until(lambda: of.storage_failures > failures)
            assert of.storage_away
            client.config_set("maxmemory", "0")
            await until(lambda: not of.storage_away)
            assert await asked(of) is None

    with caplog.at_level(logging.WARNING, "mlflow_proxy"):
        run(scenario)
    assert "maxmemory" in caplog.records[0].message


def test_failures_while_it_is_away(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with limits(redis_server, {"auth_failure_rate": "3/year", "storage_away": "closed"}) as of:
            redis_server.kill()
            for _ in range(3):
                of.check_failures("192.0.2.7")
                pending = of.add_failure("192.0.2.7")
                if pending is not None:
                    await pending
            with pytest.raises(Refusal) as caught:
                of.check_failures("192.0.2.7")
            assert caught.value.status == 429
            assert of.storage_away

    run(scenario)


@pytest.mark.parametrize("command", [["CLIENT", "KILL", "TYPE", "normal"], ["SCRIPT", "FLUSH"], ["FLUSHALL"]])
def test_trifles_are_no_outage(redis_server: RedisServer, command: list[str]) -> None:
    """A closed connection, a forgotten script: the next request does not even notice."""

    async def scenario() -> None:
        async with limits(redis_server, {"caller_rate": "1000/year"}) as of:
            for _ in range(3):
                assert await asked(of) is None
                redis_server.command(*command)
                await asyncio.sleep(0.1)
                assert await asked(of) is None
            assert of.storage_failures == 0

    run(scenario)


def test_what_may_have_been_counted_is_not_sent_again(redis_server: RedisServer) -> None:
    """The connection breaks after the script ran and before its answer came."""

    async def scenario() -> None:
        cut = False

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
            nonlocal cut
            while data := await reader.read(65536):
                if cut and answers:
                    cut = False
                    break
                writer.write(data)
            writer.close()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", redis_server.port)
            await asyncio.gather(
                relay(reader, server_writer, answers=False), relay(server_reader, writer, answers=True)
            )

        between = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = between.sockets[0].getsockname()[1]
        async with limits(f"redis://127.0.0.1:{port}", {"caller_rate": "9/year"}) as of:
            assert await asked(of) is None
            cut = True
            assert await asked(of) is None
            assert of.storage_away
        between.close()
        client = redis_server.client()
        (key,) = [key for key in client.keys("*") if client.ttl(key) > 3600]
        assert client.get(key) == "2"

    run(scenario)


def test_a_request_that_goes_away_disturbs_no_other(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with storage(redis_server) as of:
            own = [counted("3/year", f"user:{number}") for number in range(40)]
            with redis_server.frozen():
                tasks = [asyncio.ensure_future(of.take([each])) for each in own for _ in range(4)]
                await asyncio.sleep(0.05)
                for task in tasks[::3]:
                    task.cancel()
            seen = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(each, asyncio.CancelledError) for each in seen] == [n % 3 == 0 for n in range(160)]
            assert not any(isinstance(each, StorageAway) for each in seen)
            # Of each four, one or two went away; the others fit, unless one of them had been sent already.
            assert sum(each is None for each in seen) >= 106 - 8
            assert of.failures == 0
            assert [await of.take([each]) is None for each in own].count(True) < 40  # and they were counted

    run(scenario)


def test_closing_leaves_nobody_waiting(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with storage(redis_server) as of:
            with redis_server.frozen():
                tasks = [asyncio.ensure_future(of.take([counted("3/year")])) for _ in range(300)]
                await asyncio.sleep(0.05)
                started = time.monotonic()
                await of.close()
                seen = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(each) for each in seen} == {StorageAway}
                assert time.monotonic() - started < 5.0  # the timeout had no part in it
            with pytest.raises(StorageAway):
                await of.take([counted("3/year")])

    run(scenario)


# Servers of other kinds


def test_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with limits(f"redis://:wr0ng-password@127.0.0.1:{server.port}", {"caller_rate": "2/year"}) as wrong:
            assert wrong.storage_away
        async with limits(f"valkey://:r1ght-password@127.0.0.1:{server.port}/3", {"caller_rate": "2/year"}) as right:
            assert not right.storage_away
            assert await verdicts(right, 3) == [None, None, REFUSED]

    server = RedisServer(tmp_path, "--requirepass", "r1ght-password")
    server.start()
    try:
        with caplog.at_level(logging.DEBUG):
            run(scenario)
    finally:
        server.kill()
    assert "limits.storage is away" in caplog.text
    assert "password@" not in caplog.text
    assert "wr0ng" not in caplog.text
    assert "r1ght" not in caplog.text


def test_cluster_mode(tmp_path: Path) -> None:
    """There a script may touch keys of one slot only (as in ElastiCache Serverless)."""

    async def scenario() -> None:
        async with limits(server, {"caller_rate": "2/year"}, reader="9/year", team={"rate": "9/year"}) as of:
            callers = [ANA, BEN] * 3
            seen = await asyncio.gather(*(asked(of, caller) for caller in callers))
            allowed = Counter(caller for caller, refusal in zip(callers, seen, strict=True) if refusal is None)
            assert allowed == {ANA: 2, BEN: 2}
            assert of.storage_failures == 0

    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    server.start()
    try:
        client = server.client()
        server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        while client.cluster("info")["cluster_state"] != "ok":
            pass
        run(scenario)
    finally:
        server.kill()


def certificates(folder: Path, addresses: Iterable[str]) -> None:
    """ca.pem, and cert.pem with key.pem that it signed."""
    now = datetime.now(UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("test CA"))
        made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = builder("test CA", ca_key).add_extension(x509.BasicConstraints(True, None), critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address)) for address in addresses])
    leaf = builder("redis", key).add_extension(names, critical=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "cert.pem").write_bytes(leaf.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@pytest.mark.parametrize(
    ("address", "trusted", "away"),
    [("127.0.0.1", True, False), ("127.0.0.1", False, True), ("127.0.0.9", True, True)],
    ids=["right", "unknown CA", "other address"],
)
def test_tls_is_verified(tmp_path: Path, address: str, trusted: bool, away: bool) -> None:
    async def scenario() -> None:
        query = f"?ssl_ca_certs={tmp_path}/ca.pem" if trusted else ""
        async with limits(f"valkeys://127.0.0.1:{server.port}{query}", {"caller_rate": "2/year"}) as of:
            assert of.storage_away == away
            assert await verdicts(of, 3) == [None, None, REFUSED]

    certificates(tmp_path, [address])
    ssl.create_default_context(cafile=tmp_path / "ca.pem").load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    files = [f"--tls-{option}={tmp_path}/{file}.pem" for option, file in (("cert-file", "cert"), ("key-file", "key"))]
    options = [part for file in files for part in file.split("=")]
    server = RedisServer(
        tmp_path, *options, "--tls-ca-cert-file", f"{tmp_path}/ca.pem", "--tls-auth-clients", "no", tls=True
    )
    server.start()
    try:
        run(scenario)
    finally:
        server.kill()
