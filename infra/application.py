"""What is sent to AWS with the templates: the application for hosts, and the function that makes certificates.

Both are folders below build/, made from this repository and the lock file; wheels are fetched for the machine in AWS,
not for this one. What has not changed is not built again.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAMBDA_RUNTIME = "python3.14"
# Of Ubuntu 24.04, which has it without pip and ensurepip; and a host may reach no package index.
_HOST_PYTHON = "3.12"
_MACHINES = {"arm64": "aarch64", "x86_64": "x86_64"}
_GLIBC = ("manylinux_2_34", "manylinux_2_28", "manylinux2014")
_LOCK = "requirements/base.txt"
_LOCK_WITH_TRACING = "requirements/tracing.txt"
_HANDLER = "infra/certificate/handler.py"
_NOT_FOR_HOSTS = ("container", "grafana", "helm", "nginx", "wheelhouse.py", "__pycache__")


class BuildError(Exception):
    """Something that is sent to AWS could not be built. The message says what to do."""


def build_application(architecture: str, root: Path = ROOT, *, tracing: bool = False) -> Path:
    """A folder with `deploy/install.sh`, and in `wheelhouse/` this package and all it needs, pip included.

    `requirements.txt` there is the lock file; `tracing` adds the extra of that name. `root` is the repository's folder.
    Raises BuildError.
    """
    deploy, base, wanted = root / "deploy", root / _LOCK, root / (_LOCK_WITH_TRACING if tracing else _LOCK)
    if not (deploy / "install.sh").is_file():
        raise BuildError(
            "deploy/install.sh is missing, which hosts are set up with; restore it, or take compute=fargate"
        )

    def make(folder: Path) -> None:
        machine = _MACHINES[architecture]
        _python(str(deploy / "wheelhouse.py"), str(folder), "--python", _HOST_PYTHON, "--machine", machine)
        if tracing:
            more = folder.with_suffix(".txt")
            more.write_text("".join(sorted(set(_entries(wanted)) - set(_entries(base)))), "utf-8")
            wheels, target = str(folder / "wheelhouse"), _target(architecture, _HOST_PYTHON)
            _pip("download", "--no-deps", "--dest", wheels, *target, "--require-hashes", "-r", str(more))
            more.unlink()
            shutil.copy(wanted, folder / "requirements.txt")

    sources = [path for path in _files(root / "src") if "__pycache__" not in path.parts]
    setup = [path for path in _files(deploy) if path.relative_to(deploy).parts[0] not in _NOT_FOR_HOSTS]
    inputs = [*sources, *setup, root / "pyproject.toml", base, wanted]
    return _built(root, f"application-{architecture}", inputs, make)


def build_certificate_function(architecture: str, root: Path = ROOT) -> Path:
    """A folder with the function and the library that it takes, for Lambda's Python. Raises BuildError."""
    handler, lock = root / _HANDLER, root / _LOCK

    def make(folder: Path) -> None:
        needed = folder.with_suffix(".txt")
        names = ("cryptography", "cffi", "pycparser")
        needed.write_text("".join(one for one in _entries(lock) if one.split("==")[0] in names), "utf-8")
        target = _target(architecture, LAMBDA_RUNTIME.removeprefix("python"))
        _pip("install", "--target", str(folder), "--no-compile", "--require-hashes", "-r", str(needed), *target)
        needed.unlink()
        shutil.copy(handler, folder)

    return _built(root, f"certificate-function-{architecture}", [handler, lock], make)


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _built(root: Path, name: str, inputs: Iterable[Path], make: Callable[[Path], None]) -> Path:
    """The folder of that name, made anew if any input changed. An interrupted build leaves nothing that looks whole."""
    digest = sha256(Path(__file__).read_bytes())
    for path in sorted(inputs):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    folder = root / "build" / name
    stamp = folder.with_suffix(".sha256")
    if folder.is_dir() and stamp.is_file() and stamp.read_text("utf-8") == digest.hexdigest():
        return folder
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    make(folder)
    stamp.write_text(digest.hexdigest(), "utf-8")
    return folder


def _target(architecture: str, python: str) -> list[str]:
    platforms = [option for one in _GLIBC for option in ("--platform", f"{one}_{_MACHINES[architecture]}")]
    return ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", *platforms]


def _entries(lock: Path) -> list[str]:
    """A lock file's entries, each with its hashes."""
    return [entry for entry in re.split(r"(?m)^(?=[a-z0-9])", lock.read_text("utf-8")) if entry.strip()]


def _pip(*arguments: str) -> None:
    _python("-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:])


def _python(*arguments: str) -> None:
    """Run this Python, for pip above all. Raises BuildError with what it says."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        what = " ".join(arguments[:3])
        raise BuildError(f"{what} failed; is the package index reachable?\n{result.stderr.strip()}")
