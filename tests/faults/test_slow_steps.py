"""Steps that wait before a body is read, on a shared storage or an identity provider: the body is there afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.access.provider import CLIENT, Issuer
from tests.faults.callers import Answer, Caller, call, call_raw, chunked, request
from tests.faults.proxies import APP_ARN, Proxy, running, target
from tests.faults.upstreams import Arrived, Peer, Upstream, answer
from tests.limits.servers import RedisServer

# Longer than the proxy waits before it looks for callers that have left.
SLOW = 0.3
SMALL = b'{"name": "x"}'
LARGE = bytes(range(256)) * 4096


class SlowRelay:
    """A way to a server on loopback on which each piece of an answer takes `delay` seconds more."""

    def __init__(self, port: int, delay: float) -> None:
        self._server_port = port
        self._delay = delay
        self._loop = asyncio.new_event_loop()
        self._listener = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port: int = self._listener.sockets[0].getsockname()[1]
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._listener.close)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        await asyncio.gather(
            self._pass(reader, server_writer, 0.0),
            self._pass(server_reader, writer, self._delay),
        )

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(delay)
                writer.write(data)
        writer.close()


class Stage(NamedTuple):
    proxy: Proxy
    upstream: Upstream

    @property
    def port(self) -> int:
        return self.proxy.port


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("slow-steps")
    redis = RedisServer(folder)
    redis.start()
    relay = SlowRelay(redis.port, SLOW)
    upstream = Upstream()
    url = f"http://127.0.0.1:{upstream.port}"
    limits = {
        "storage": f"redis://127.0.0.1:{relay.port}",
        "storage_timeout": 5,
        "caller_rate": "1000000/hour",
        "queue_timeout": 2 * SLOW,
    }
    targets = [
        target("prod", url, default=True, rate="1000000/hour"),
        {**target("single", url, concurrency_max=1), "arn": APP_ARN},
    ]
    try:
        with running(folder / "proxy", targets, sections={"limits": limits}) as proxy:
            call(proxy.port, "/x")  # from now on its connections to the storage are there
            yield Stage(proxy, upstream)
    finally:
        upstream.close()
        relay.close()
        redis.kill()


@pytest.fixture
def shared(_shared: Stage) -> Stage:
    """The limits' storage takes its time for every answer."""
    _shared.upstream.reset()
    return _shared


def writes() -> dict[str, bytes]:
    """Requests with every kind of body, by their names."""
    head = ("POST", "Content-Type: application/json")
    return {
        "/small": request("/small", *head, body=SMALL),
        "/large": request("/large", *head, body=LARGE),
        "/chunked": request("/chunked", "PUT", "Transfer-Encoding: chunked") + chunked(SMALL, LARGE),
        "/no-body": request("/no-body", "PUT", "Transfer-Encoding: chunked") + chunked(),
    }


def all_at_once(port: int, requests: dict[str, bytes]) -> list[Answer]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda data: call_raw(port, data), requests.values()))


def test_all_writes_succeed_while_the_limits_storage_is_slow(shared: Stage) -> None:
    assert [got.status for got in all_at_once(shared.port, writes())] == [200] * 4
    bodies = {arrived.target: arrived.body for arrived in shared.upstream.arrived}
    assert bodies == {"/small": SMALL, "/large": LARGE, "/chunked": SMALL + LARGE, "/no-body": b""}


def test_pipelined_writes_keep_their_bodies(shared: Stage) -> None:
    with Caller(shared.port) as caller:
        caller.send(request("/1", "POST", body=SMALL) + request("/2", "POST", body=LARGE) + request("/3"))
        assert [caller.answer().status for _ in range(3)] == [200] * 3
    assert [arrived.body for arrived in shared.upstream.arrived] == [SMALL, LARGE, b""]


def test_a_body_is_asked_for_when_it_can_be_taken(shared: Stage) -> None:
    with Caller(shared.port) as caller:
        caller.send(request("/x", "PUT", f"Content-Length: {len(SMALL)}", "Expect: 100-continue"))
        assert caller.line() == b"HTTP/1.1 100 Continue\r\n"
        assert caller.line() == b"\r\n"
        caller.send(SMALL)
        assert caller.answer().status == 200
    assert shared.upstream.arrived[0].body == SMALL


def test_a_refused_write_leaves_its_connection_usable(shared: Stage) -> None:
    """Its body is taken off the connection after all the waiting."""
    with Caller(shared.port) as caller:
        caller.send(request("/t/nobodys/x", "POST", body=LARGE[:100_000]) + request("/after"))
        assert caller.answer().status == 404
        assert caller.answer().status == 200
    assert shared.upstream.targets == ["/after"]


def test_a_caller_that_leaves_before_its_body_was_read(shared: Stage) -> None:
    with Caller(shared.port) as caller:
        caller.send(request("/gone", "PUT", "Content-Length: 100", "X-Request-Id: left-in-the-wait") + b"abc")
    assert shared.proxy.log_line("left-in-the-wait")["status"] == 499
    assert not shared.upstream.arrived


def test_refused_after_the_body_was_taken(shared: Stage) -> None:
    """An empty body of unknown length was taken, and nothing of it is waited for again."""
    release = threading.Event()

    def held(peer: Peer, _: Arrived) -> None:
        assert release.wait(20)
        peer.send(answer())

    shared.upstream.script = held
    with Caller(shared.port) as first:
        first.send(request("/t/single/x"))
        shared.upstream.wait_for(1)
        refused = call_raw(
            shared.port, request("/t/single/y", "PUT", "Transfer-Encoding: chunked") + chunked(), method="PUT"
        )
        release.set()
        assert first.answer().status == 200
    assert refused.status == 503
    assert "no place became free" in refused.json["message"]
    assert not refused.values("connection")


def test_all_writes_succeed_while_the_providers_keys_are_slow(tmp_path: Path) -> None:
    upstream = Upstream()
    role = {"name": "all", "allow": ["*"], "targets": ["*"], "groups": ["*"]}
    with Issuer() as issuer:
        issuer.held = threading.Event()
        oidc = {"issuer": issuer.url, "audience": [CLIENT], "groups_claim": "groups"}
        bearer = f"Authorization: Bearer {issuer.token(groups=['team'])}"
        with running(
            tmp_path / "proxy",
            [target("prod", f"http://127.0.0.1:{upstream.port}")],
            sections={"oidc": oidc},
            roles=[role],
        ) as proxy:
            calls = {
                "/small": request("/small", "POST", bearer, body=SMALL),
                "/large": request("/large", "POST", bearer, body=LARGE),
            }
            release = threading.Timer(2 * SLOW, issuer.held.set)
            release.start()
            try:
                assert [got.status for got in all_at_once(proxy.port, calls)] == [200, 200]
            finally:
                issuer.held.set()
                release.join()
    upstream.close()
    assert {arrived.target: arrived.body for arrived in upstream.arrived} == {"/small": SMALL, "/large": LARGE}
