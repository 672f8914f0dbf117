"""Makes a folder that hosts without a package index install from: python3 deploy/wheelhouse.py FOLDER

In it are `wheelhouse/`, with this package, all that it needs and pip; `requirements.txt`, the lock file; and `deploy/`.
It is for one minor version of Python and one kind of machine, by default those it is made on. Run with the standard
library and pip alone, from a clone of the repository.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pip import __version__ as pip_version
from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "base.txt"
# Of Ubuntu 22.04, Debian 12 and Amazon Linux 2023, which have glibc 2.34 or newer.
GLIBC = ("manylinux_2_34", "manylinux_2_28", "manylinux2014")
_NOT_FOR_HOSTS = shutil.ignore_patterns("container", "grafana", "helm", "nginx", "wheelhouse.py", "__pycache__")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put it; must not exist yet")
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="Python of the host, such as 3.12")
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64")
    given = parser.parse_args()
    if re.fullmatch(r"3\.1[1-9]", given.python) is None:
        parser.error(f"--python {given.python}: write it as 3.12; 3.11 is the oldest that will do")
    if given.folder.exists():
        parser.error(f"{given.folder} is there already")
    make(given.folder, given.python, given.machine)
    sys.stdout.write(f"{given.folder}: for Python {given.python} on {given.machine}\n")


def make(folder: Path, python: str, machine: str) -> None:
    """Fill the folder. Exits with pip's own message if that cannot fetch something."""
    wheels = folder / "wheelhouse"
    pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    target = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    target += [option for glibc in GLIBC for option in ("--platform", f"{glibc}_{machine}")]
    lock = folder / "requirements.txt"
    # pip would judge the lock's conditions by the Python that it runs with. Hosts differ in the patch version, too, so
    # what is needed by the first and by the last of a minor version is all there.
    first, last = (set(needed(LOCK.read_text("utf-8"), f"{python}.{patch}", machine)) for patch in (0, 99))
    for several in filter(None, (first, last - first)):
        lock.write_text("".join(sorted(several)), "utf-8")
        pip("download", "--no-deps", "--dest", str(wheels), *target, "--require-hashes", "-r", str(lock))
    pip("download", "--no-deps", "--dest", str(wheels), *target, f"pip=={pip_version}")
    shutil.copy(LOCK, lock)
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=_NOT_FOR_HOSTS)


def needed(lock: str, python: str, machine: str) -> Iterator[str]:
    """The entries of a lock file that a full version of Python (such as 3.11.2) needs, without their conditions."""
    conditions = {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for entry in entries(lock):
        first, _, hashes = entry.partition(" \\\n")
        requirement = Requirement(first)
        if requirement.marker is None or requirement.marker.evaluate(conditions):
            yield f"{requirement.name}{requirement.specifier} \\\n{hashes}"


def entries(lock: str) -> Iterable[str]:
    """A lock file's entries, each with its hashes."""
    return [entry for entry in re.split(r"(?m)^(?=[a-z0-9])", lock) if entry.strip() and not entry.startswith("#")]


def pip(*arguments: str) -> None:
    """Run pip; it says itself what is wrong."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    code = subprocess.run(command, check=False).returncode  # noqa: S603
    if code:
        sys.exit(f"pip {arguments[0]} failed; is the package index reachable?")


if __name__ == "__main__":
    main()
