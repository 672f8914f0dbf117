"""Runs a Python module for as long as the process that started it lives.

Used as a script, by any interpreter, so nothing but the standard library: `launch.py <parent pid> <module>
[arguments]`. Whatever becomes of the parent, SIGKILL included, this process and its group end within a
second. (Linux has PDEATHSIG for this, but it fires when the starting *thread* ends, and no other system has
it.)
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time


def _outlive_nobody(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGTERM)
    time.sleep(3)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_outlive_nobody, args=(int(sys.argv[1]),), daemon=True).start()
    module = sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    sys.path[0] = os.getcwd()  # not this file's folder, whose modules would hide others
    runpy.run_module(module, run_name="__main__", alter_sys=True)
