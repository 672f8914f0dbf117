"""The machine and the programs of a run, in words: enough to judge the figures, nothing that names a host."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil

from benchmarks import envoy
from benchmarks.load import find_wrk
from benchmarks.peers import find_nginx


def machine() -> str:
    """Processor, cores, memory and kernel."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB of memory, {platform.system()} {kernel}"


def programs() -> str:
    """The versions of what took part."""
    nginx = find_nginx()
    found = [
        f"Python {platform.python_version()}",
        f"nginx {_version([nginx, '-v']).rpartition('/')[2]}" if nginx else "",
        f"Envoy {envoy.version()}" if envoy.version() else "",
        f"wrk {_version([find_wrk(), '-v']).removeprefix('wrk ').split(' ')[0].removeprefix('debian/')}",
    ]
    return ", ".join(part for part in found if part)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return " ".join(value.split())
    return platform.machine()


def _version(command: list[str]) -> str:
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return (shown.stdout + shown.stderr).strip().splitlines()[0].strip()
