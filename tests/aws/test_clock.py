"""When a target's clock is believed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.aws.clock import ServiceClock

NOW = 1_795_500_000.0
EXPIRED = "Signature expired: 20261124T053000Z is now earlier than 20261124T054000Z (20261124T054500Z - 5 min.)"
EARLY = "Signature not yet current: 20261124T053000Z is still later than 20261124T052000Z"
MISMATCH = "The request signature we calculated does not match the signature you provided."


def clock() -> ServiceClock:
    return ServiceClock(now=lambda: NOW)


def date(ahead: float) -> str:
    return formatdate(NOW + ahead, usegmt=True)


@pytest.fixture(params=["UTC", "Asia/Tokyo", "America/New_York"])
def _timezone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("_timezone")
@pytest.mark.parametrize(
    ("text", "difference"),
    [
        (date(0), 0.0),
        (date(-3600), -3600.0),
        (date(90), 90.0),
        # RFC 9110 section 5.6.7: recipients accept the obsolete forms too; all are in GMT
        ("Tuesday, 24-Nov-26 06:00:00 GMT", 0.0),
        ("Tue Nov 24 06:00:00 2026", 0.0),
        ("Tue, 24 Nov 2026 06:00:00 -0000", 0.0),
        ("Tue, 24 Nov 2026 06:00:00", 0.0),
    ],
)
def test_difference(text: str, difference: float) -> None:
    assert clock().difference(text) == difference


@pytest.mark.parametrize(
    "text",
    [None, "", "yesterday", "Tue", "99 Nov 2026", "Tue, 24 Nov 2026 25:61:00 GMT", "Tue, 24 Nov 99999999 06:00:00 GMT"],
)
def test_no_date_says_nothing(text: str | None) -> None:
    assert clock().difference(text) is None
    tested = clock()
    assert not tested.correct("RequestTimeTooSkewed", "", text)
    assert tested.offset == 0.0


@given(text=st.text(max_size=40))
def test_any_date_is_read_or_ignored(text: str) -> None:
    difference = clock().difference(text)
    assert difference is None or isinstance(difference, float)


@pytest.mark.parametrize(
    ("error_type", "message", "ahead", "corrected"),
    [
        ("RequestTimeTooSkewed", "", 600, True),
        ("RequestTimeTooSkewed", "", -600, True),
        ("RequestTimeTooSkewed", "", 61, True),
        ("RequestTimeTooSkewed", "", 59, False),
        ("RequestTimeTooSkewed", "", 0, False),
        ("InvalidSignatureException", EXPIRED, 900, True),
        ("InvalidSignatureException", EARLY, -900, True),
        ("InvalidSignatureException", EXPIRED, 30, False),
        ("InvalidSignatureException", EXPIRED, -59, False),
        ("InvalidSignatureException", MISMATCH, 900, False),
        ("InvalidSignatureException", "", 900, False),
        ("SignatureDoesNotMatch", EXPIRED, 900, False),
        ("AccessDeniedException", EXPIRED, 900, False),
        ("ExpiredTokenException", "The security token included in the request is expired", 900, False),
        ("", EXPIRED, 900, False),
    ],
)
def test_correction(
    error_type: str, message: str, ahead: float, corrected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tested = clock()
    with caplog.at_level(logging.WARNING):
        assert tested.correct(error_type, message, date(ahead)) == corrected
    assert tested.offset == (ahead if corrected else 0.0)
    assert tested.now() == NOW + tested.offset
    assert bool(caplog.records) == corrected


def test_corrected_clock_is_not_corrected_again_by_the_same() -> None:
    """The difference counts from the clock that signed; so a second failure is no skew, and ends the repetition."""
    tested = clock()
    assert tested.correct("RequestTimeTooSkewed", "", date(600))
    assert not tested.correct("RequestTimeTooSkewed", "", date(600))
    assert not tested.correct("RequestTimeTooSkewed", "", date(650))
    assert tested.offset == 600
    assert tested.correct("RequestTimeTooSkewed", "", date(0))  # this machine's time was set right
    assert tested.offset == 0


def test_default_clock_is_this_machines() -> None:
    before = time.time()
    now = ServiceClock().now()
    assert before <= now <= time.time()
