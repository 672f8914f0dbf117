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
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAMBDA_RUNTIME = "python3.14"
# Of Ubuntu 24.04, which has Python 3.12 and glibc 2.39.
_HOST_PYTHON = "3.12"
_MACHINES = {"arm64": "aarch64", "x86_64": "x86_64"}
_HOST_GLIBC = ("manylinux_2_39", "manylinux_2_34", "manylinux_2_28", "manylinux2014")
_LAMBDA_GLIBC = ("manylinux_2_34", "manylinux_2_28", "manylinux2014")
_LOCK = "requirements/base.txt"
_HANDLER = "infra/certificate/handler.py"
_NOT_FOR_HOSTS = ("container", "helm", "nginx")


class BuildError(Exception):
    """Something that is sent to AWS could not be built. The message says what to do."""


def build_application(architecture: str, root: Path = ROOT) -> Path:
    """A folder with `deploy/install.sh`, and in `wheelhouse/` this package and all it needs, pip included.

    `root` is the repository's folder. Raises BuildError.
    """
    deploy, lock = root / "deploy", root / _LOCK
    if not (deploy / "install.sh").is_file():
        raise BuildError(
            "deploy/install.sh is missing, which hosts are set up with; restore it, or take compute=fargate"
        )

    def make(folder: Path) -> None:
        wheels = folder / "wheelhouse"
        _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(root))
        # Ubuntu's Python comes without pip and ensurepip, and a host may reach no package index.
        for what in (["--require-hashes", "-r", str(lock)], [f"pip=={version('pip')}"]):
            _pip("download", "--dest", str(wheels), *_target(architecture, _HOST_PYTHON, _HOST_GLIBC), *what)
        # These are for other ways to run the proxy; a change in them must not replace hosts.
        shutil.copytree(deploy, folder / "deploy", ignore=shutil.ignore_patterns(*_NOT_FOR_HOSTS))
        shutil.copy(lock, folder / "requirements.txt")

    sources = [path for path in _files(root / "src") if "__pycache__" not in path.parts]
    setup = [path for path in _files(deploy) if path.relative_to(deploy).parts[0] not in _NOT_FOR_HOSTS]
    return _built(root, f"application-{architecture}", [*sources, *setup, root / "pyproject.toml", lock], make)


def build_certificate_function(architecture: str, root: Path = ROOT) -> Path:
    """A folder with the function and the library that it takes, for Lambda's Python. Raises BuildError."""
    handler, lock = root / _HANDLER, root / _LOCK

    def make(folder: Path) -> None:
        needed = folder.with_suffix(".txt")
        needed.write_text("".join(_locked(lock, "cryptography", "cffi", "pycparser")), "utf-8")
        target = _target(architecture, LAMBDA_RUNTIME.removeprefix("python"), _LAMBDA_GLIBC)
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
    folder.mkdir(parents=True)
    make(folder)
    stamp.write_text(digest.hexdigest(), "utf-8")
    return folder


def _target(architecture: str, python: str, glibc: Iterable[str]) -> list[str]:
    machine = _MACHINES[architecture]
    platforms = [option for one in glibc for option in ("--platform", f"{one}_{machine}")]
    return ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", *platforms]


def _locked(lock: Path, *names: str) -> list[str]:
    """A lock file's entries of some packages, with their hashes."""
    entries = re.split(r"(?m)^(?=[a-z0-9])", lock.read_text("utf-8"))
    return [entry for entry in entries if entry.split("==")[0] in names]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise BuildError(f"pip {arguments[0]} failed; is the package index reachable?\n{result.stderr.strip()}")
