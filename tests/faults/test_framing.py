"""How requests are framed, and that nothing of a refused one is ever taken for a second request."""

from __future__ import annotations

import time
from http.client import HTTPException

import pytest
from tests.faults.callers import Answer, Caller, call_raw, chunked, request
from tests.faults.conftest import Stage

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
MIB = 1 << 20


def test_a_body_with_its_length(steady: Stage) -> None:
    assert steady.call("/x", "POST", body=b"hello").status == 200
    (arrived,) = steady.upstream.arrived
    assert (arrived.body, arrived.values("content-length")) == (b"hello", ["5"])


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "GET"])
def test_an_empty_body(steady: Stage, method: str) -> None:
    assert steady.call("/x", method, body=b"").status == 200
    (arrived,) = steady.upstream.arrived
    assert arrived.values("content-length") == (["0"] if method in ("POST", "PUT", "PATCH") else [])


def test_a_chunked_body_arrives_whole_with_its_length(steady: Stage) -> None:
    steady_body = chunked(b"hel", b"l", b"o" * 70_000)
    assert call_raw(steady.port, request("/x", "PUT", "Transfer-Encoding: chunked") + steady_body).status == 200
    (arrived,) = steady.upstream.arrived
    assert arrived.body == b"hell" + b"o" * 70_000
    assert arrived.values("content-length") == ["70004"]
    assert not arrived.values("transfer-encoding")


def test_chunk_extensions_and_trailers_are_dropped(steady: Stage) -> None:
    body = b"3;ext=1\r\nabc\r\n0\r\nX-Amz-Date: 20200101T000000Z\r\nUser-Agent: trailer\r\n\r\n"
    assert call_raw(steady.port, request("/x", "PUT", "Transfer-Encoding: chunked") + body).status == 200
    (arrived,) = steady.upstream.arrived
    assert arrived.body == b"abc"
    assert not arrived.values("user-agent")
    assert len(arrived.values("x-amz-date")) == 1


def test_a_body_that_comes_in_small_pieces_over_a_while(steady: Stage) -> None:
    """With pauses longer than a caller is left unwatched: nobody may take pieces away from who collects them."""
    with Caller(steady.port) as caller:
        caller.send(request("/x", "PUT", "Content-Length: 6"))
        for pause in (0.5, 0.0, 0.5, 0.1, 0.1, 0.5):
            time.sleep(pause)
            caller.send(b"a")
        assert caller.answer().status == 200
    assert steady.upstream.arrived[0].body == b"a" * 6


def test_100_continue_comes_before_the_body_is_sent(steady: Stage) -> None:
    with Caller(steady.port) as caller:
        caller.send(request("/x", "PUT", "Content-Length: 5", "Expect: 100-continue"))
        assert caller.line() == b"HTTP/1.1 100 Continue\r\n"
        assert caller.line() == b"\r\n"
        caller.send(b"hello")
        assert caller.answer().status == 200
    assert steady.upstream.arrived[0].body == b"hello"


def test_too_large_a_length_is_refused_without_100_continue(hasty: Stage) -> None:
    with Caller(hasty.port) as caller:
        caller.send(request("/x", "PUT", f"Content-Length: {MIB + 1}", "Expect: 100-continue"))
        assert caller.line() == b"HTTP/1.1 413 Content Too Large\r\n"
    assert not hasty.upstream.arrived


def test_http_1_0(steady: Stage) -> None:
    steady.upstream.script = lambda peer, _: peer.send(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"abc", b"def")
    )
    with Caller(steady.port) as caller:
        caller.send(b"GET /x HTTP/1.0\r\nHost: localhost\r\n\r\n")
        answer = caller.answer()
        assert answer.body == b"abcdef"
        assert not answer.values("transfer-encoding")
        assert caller.is_closed()
    assert steady.upstream.arrived[0].request_line == b"GET /x HTTP/1.1"


def test_pipelined_requests_are_answered_in_order(steady: Stage) -> None:
    steady.upstream.script = lambda peer, arrived: peer.send(
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + arrived.target[-2:].encode()
    )
    with Caller(steady.port) as caller:
        caller.send(request("/01") + request("/02", "PUT", "Content-Length: 3") + b"abc" + request("/03"))
        assert [caller.answer().body for _ in range(3)] == [b"01", b"02", b"03"]
    assert steady.upstream.targets == ["/01", "/02", "/03"]


def test_a_head_that_comes_byte_by_byte(steady: Stage) -> None:
    with Caller(steady.port) as caller:
        for byte in request("/slowly"):
            caller.send(bytes([byte]))
            time.sleep(0.002)
        assert caller.answer().status == 200
    assert steady.upstream.targets == ["/slowly"]


REFUSED = {
    "two CL": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 43\r\n\r\n",
    "a list as CL": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0, 0\r\n\r\n",
    "a signed CL": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +0\r\n\r\n",
    "a negative CL": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "a hexadecimal CL": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0x2b\r\n\r\n",
    "an empty CL": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: \r\n\r\n",
    "an immense CL": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "an unknown coding": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "identity after chunked": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "an obscured coding": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "TE in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"zz\r\n0\r\n\r\n",
    "a negative chunk size": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n0\r\n\r\n",
    "a chunk size that overflows": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"10000000000000000\r\n",
    "a chunk longer than said": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"1\r\nab\r\n0\r\n\r\n",
    "two Host": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\n",
    "an empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "a Host with user": b"GET / HTTP/1.1\r\nHost: a@localhost\r\n\r\n",
    "a Host with a path": b"GET / HTTP/1.1\r\nHost: localhost/x\r\n\r\n",
    "two names in Host": b"GET / HTTP/1.1\r\nHost: localhost, evil.example\r\n\r\n",
    "no Host in HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "CONNECT": b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost:443\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TRACK": b"TRACK / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method in lower case": b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method that is no word": b"G@T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a control character in the target": b"GET /\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a space before the colon": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length : 43\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: a\r\n b\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: a\0b\r\n\r\n",
    "a bare CR in a header": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: a\rX: b\r\n\r\n",
    "a header without colon": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept\r\n\r\n",
    "a header without name": b"GET / HTTP/1.1\r\nHost: localhost\r\n: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: localhost\r\n\r\n",
    "HTTP/2 without TLS or preface": b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "garbage": bytes(range(256)) + b"\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 500,
    "headers of 200 KB": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: " + b"a" * 200_000 + b"\r\n\r\n",
    "headers of 600 KB": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: " + b"a" * 600_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 101 + b"\r\n",
    "very many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 3000 + b"\r\n",
    "a long path": b"GET /" + b"a" * 33_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long query": b"GET /?" + b"a" * 33_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a very long path": b"GET /" + b"a" * 600_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
}
WELL_FRAMED = {
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "raw high bytes in the target": b"GET /\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a target without slash": b"GET x HTTP/1.1\r\nHost: localhost\r\n\r\n",
}
STATUSES = {
    "CONNECT": {400, 501},
    "TRACE": {501},
    "TRACK": {501},
    "a method in lower case": {501},
    "an immense CL": {400, 413},
    "an unknown coding": {400, 501},
    "an obscured coding": {400, 501},
    "identity after chunked": {400, 501},
    "headers of 200 KB": {431},
    "headers of 600 KB": {431},
    "many headers": {431},
    "very many headers": {431},
    "a long path": {414},
    "a long query": {414},
    "a very long path": {414, 431},
    "a Host with user": {400, 421},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_leaves_nothing_behind(steady: Stage, name: str) -> None:
    answers = _answers(steady.port, REFUSED[name] + SMUGGLED)
    if answers:  # a server may also just close on what is not HTTP
        assert answers[0].status in STATUSES.get(name, {400}), answers
    assert not [answer for answer in answers if answer.status < 400]
    assert steady.call("/after").status == 200
    assert steady.upstream.targets == ["/after"]


@pytest.mark.parametrize("name", WELL_FRAMED)
def test_a_bad_target_in_a_good_frame_is_refused_alone(steady: Stage, name: str) -> None:
    answers = _answers(steady.port, WELL_FRAMED[name] + request("/second"))
    assert [answer.status for answer in answers] in ([400, 200], [400])
    assert steady.upstream.targets == ["/second"][: len(answers) - 1]


def _answers(port: int, data: bytes) -> list[Answer]:
    """All answers to what is sent at once, until the proxy closes the connection or says nothing more."""
    answers: list[Answer] = []
    with Caller(port) as caller:
        try:
            caller.send(data)
            while True:
                answers.append(caller.answer())
                caller.sock.settimeout(0.3)
        except (HTTPException, OSError):
            return answers


@pytest.mark.parametrize(
    ("target", "status"),
    [("/a%5Cb", 400), ("/t/nobody/x", 404), ("/-/nothing", 404), ("/t/app", 308)],
)
def test_a_refused_requests_body_is_never_a_request(steady: Stage, target: str, status: int) -> None:
    for body in (SMUGGLED, SMUGGLED * 4000):  # one that fits into the first read, and one that does not
        answers = _answers(steady.port, request(target, "POST", body=body))
        refused = 413 if target.startswith("/-/") and len(body) > 16 << 10 else status
        assert [answer.status for answer in answers] == [refused]
        answers = _answers(steady.port, request(target, "PUT", "Transfer-Encoding: chunked") + chunked(body))
        assert [answer.status for answer in answers] == [refused]
    assert not steady.upstream.arrived


def test_length_and_chunked_together_are_one_request_and_the_last(steady: Stage) -> None:
    """RFC 9112 section 6.1: chunked counts, and the connection ends."""
    chunks = chunked(b"abc")
    for head in (
        ("Content-Length: 3", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 99"),
    ):
        steady.upstream.reset()
        with Caller(steady.port) as caller:
            caller.send(request("/x", "PUT", *head) + chunks + SMUGGLED)
            answer = caller.answer()
            assert answer.status in (200, 400)
            assert caller.is_closed()
        steady.call("/after")
        assert steady.upstream.targets == (["/x", "/after"] if answer.status == 200 else ["/after"])
        if answer.status == 200:
            arrived = steady.upstream.arrived[0]
            assert (arrived.body, arrived.values("content-length")) == (b"abc", ["3"])


def test_length_and_chunked_together_and_whole_only_by_length(steady: Stage) -> None:
    answers = _answers(
        steady.port,
        request("/x", "PUT", "Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n" + SMUGGLED,
    )
    assert [answer.status for answer in answers] == [400]
    assert not steady.upstream.arrived


@pytest.mark.parametrize("coding", ["gzip, chunked", "chunked, chunked"])
def test_a_body_in_a_coding_that_is_not_undone_is_refused(steady: Stage, coding: str) -> None:
    answers = _answers(steady.port, request("/x", "PUT", f"Transfer-Encoding: {coding}") + chunked(b"abc"))
    assert answers[0].status in (400, 501)
    assert not steady.upstream.arrived


def test_bare_line_feeds_arrive_as_one_proper_request_or_none(steady: Stage) -> None:
    answers = _answers(steady.port, b"GET /x HTTP/1.1\nHost: localhost\nUser-Agent: a\n\n")
    if answers[0].status == 200:
        (arrived,) = steady.upstream.arrived
        assert arrived.head.count(b"\n") == arrived.head.count(b"\r\n")
        assert (arrived.target, arrived.value("user-agent")) == ("/x", "a")
    else:
        assert answers[0].status == 400
        assert not steady.upstream.arrived


@pytest.mark.parametrize("host", ["localhost", "evil.example"])
def test_in_absolute_form_path_and_query_count_and_the_host_header_is_checked(steady: Stage, host: str) -> None:
    head = f"GET http://{host}/x?y=z HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert call_raw(steady.port, head.encode()).status == 200
    assert steady.upstream.targets == ["/x?y=z"]
    assert steady.upstream.arrived[0].value("host") == f"127.0.0.1:{steady.upstream.port}"
    steady.upstream.reset()
    head = f"GET http://{host}/x?y=z HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    assert call_raw(steady.port, head.encode()).status == 421
    assert not steady.upstream.arrived


def test_a_fragment_never_travels(steady: Stage) -> None:
    status = call_raw(steady.port, b"GET /a?b=c#d HTTP/1.1\r\nHost: localhost\r\n\r\n").status
    assert (status, steady.upstream.targets) in ((200, ["/a?b=c"]), (400, []))


def test_a_refusal_says_what_is_wrong_in_mlflows_shape(steady: Stage) -> None:
    answer = call_raw(steady.port, REFUSED["two Host"])
    assert answer.json["error_code"] == "BAD_REQUEST"
    assert "Host" in answer.json["message"]
    assert answer.json["request_id"] == answer.value("x-request-id")
    assert steady.proxy.log_line(answer.value("x-request-id"))["status"] == 400


def test_a_broken_body_is_the_callers_mistake(steady: Stage) -> None:
    answer = call_raw(steady.port, REFUSED["a chunk size that is none"])
    assert "chunked" in answer.json["message"]
    assert steady.proxy.log_line(answer.value("x-request-id"))["error"]
