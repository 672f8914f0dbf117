"""The tests may be started by any means: `make test &`, nohup, setsid."""

import subprocess
import sys

import pytest

HEARD = """
import signal
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
"""


def test_programs_under_test_hear_signals() -> None:
    subprocess.run([sys.executable, "-c", HEARD], check=True)


@pytest.mark.parametrize("started", [["nohup"], ["setsid"], ["env", "--ignore-signal=INT,TERM,HUP,QUIT"]])
def test_however_the_tests_are_started(started: list[str]) -> None:
    test = f"{__file__}::{test_programs_under_test_hear_signals.__name__}"
    command = [*started, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
