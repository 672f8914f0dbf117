"""Images and containers without a daemon and without a registry: buildah builds, crun runs.

What stands in for the base image is Debian's own system with Python, made by mmdebstrap: registries of images need not
be reached. `options` reads a documented `docker run` command, so that what runs here is what people are told to run.
The containers share this machine's network; ports that are published are those of the process itself.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

PROGRAMS = {"buildah": "buildah", "crun": "crun", "mmdebstrap": "mmdebstrap"}
# As in the official image python:3.13-slim-trixie: the same Debian, the same minor version of Python.
_RELEASE = "trixie"
_INCLUDED = "python3,python3-venv,ca-certificates,netbase,tzdata"
# As there, too: pip in the standard library's folder and with commands, and no bytecode.
_LIKE_THE_OFFICIAL = """
set -e
find "$1/usr/lib/python3.13" -name __pycache__ -prune -exec rm -r {} +
mkdir -p "$1/usr/lib/python3.13/site-packages/pip"
touch "$1/usr/lib/python3.13/site-packages/pip/__init__.py"
printf '#!/bin/sh\\n' > "$1/usr/local/bin/pip3"
chmod 755 "$1/usr/local/bin/pip3"
"""
_LEFT_OUT = [f"path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
# What docker gives a container that is told nothing else.
_DEFAULT_CAPABILITIES = tuple(
    "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP SETUID "  # noqa: SIM905
    "SYS_CHROOT".split()
)
_CAPABILITY_SETS = ("bounding", "effective", "permitted", "inheritable")
# crun refuses a machine with both versions of control groups, although it is told to leave them alone: in a mount
# namespace of its own it sees one.
_ONE_KIND_OF_CGROUPS = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'if [ -d /sys/fs/cgroup/unified ]; then umount /sys/fs/cgroup/unified; fi; exec "$@"',
    "crun",
)


def missing_programs() -> list[str]:
    """The Debian packages to install first."""
    return [package for program, package in PROGRAMS.items() if shutil.which(program) is None]


def base_system(cache: Path) -> Path:
    """A tar archive with the stand-in for the base image, made if the cache has none of this recipe."""
    recipe = json.dumps([_RELEASE, _INCLUDED, _LIKE_THE_OFFICIAL, _LEFT_OUT])
    archive = cache / f"base-{sha256(recipe.encode()).hexdigest()[:16]}.tar"
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    begun = cache / f"{uuid4().hex}.tar"
    hook = cache / f"{uuid4().hex}.sh"
    hook.write_text(_LIKE_THE_OFFICIAL)
    how = ["--quiet", "--variant=minbase", f"--include={_INCLUDED}", f'--customize-hook=sh {hook} "$1"']
    how += [f"--dpkgopt={option}" for option in ["force-unsafe-io", *_LEFT_OUT]]
    try:
        _run(["mmdebstrap", *how, _RELEASE, str(begun), _debian_mirror()])
        begun.rename(archive)
    finally:
        begun.unlink(missing_ok=True)
        hook.unlink()
    return archive


def _debian_mirror() -> str:
    """The one that this machine uses, if it is a Debian."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return next((uri for uri in listed if uri.rstrip("/").endswith("/debian")), "http://deb.debian.org/debian")


class Images:
    """A store of images of its own, below a folder."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder = folder
        self._cache = cache
        folder.mkdir()
        cache.mkdir(parents=True, exist_ok=True)
        storage = folder / "storage.conf"
        storage.write_text(f'[storage]\ndriver = ""\ngraphroot = "{folder / "images"}"\nrunroot = "{folder / "run"}"\n')
        policy = folder / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._policy = policy
        self._environ = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(folder),
            "TMPDIR": str(cache),  # where caches that a build mounts are kept
            "CONTAINERS_STORAGE_CONF": str(storage),
            "BUILDAH_ISOLATION": "chroot",
        }

    def buildah(self, *arguments: str) -> str:
        """Run buildah; what it prints. Raises AssertionError with what it says if it fails."""
        return _run(["buildah", *arguments], environ=self._environ)

    def add_base(self, archive: Path, name: str) -> None:
        """An image of that name from a tar archive."""
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", container, str(archive), "/")
        self._commit(container, name)

    def build(self, context: Path, dockerfile: Path, name: str, *arguments: str) -> str:
        """Build as the documentation says, from images of this store only; what was printed."""
        options = ["--format", "docker", "--network", "host", "--pull-never", "--signature-policy", str(self._policy)]
        # As a company with a package index of its own would.
        secrets = [part for id, path in self._secrets() for part in ("--secret", f"id={id},src={path}")]
        return self.buildah("build", *options, *secrets, *arguments, "-f", str(dockerfile), "-t", name, str(context))

    def _secrets(self) -> Iterator[tuple[str, Path]]:
        """How this machine reaches a package index, for pip in the build."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        options = {
            name.rsplit(".", 1)[-1]: value.strip("'")
            for name, _, value in (line.partition("=") for line in listed.splitlines())
        }
        lines = [f"{name} = {options[name]}" for name in ("index-url", "trusted-host", "proxy") if name in options]
        certificates = options.get("cert")
        if certificates is not None:
            lines.append("cert = /run/secrets/ca.pem")
            yield "ca.pem", Path(certificates)
        settings = self._folder / "pip.conf"
        settings.write_text("\n".join(["[global]", *lines, ""]))
        settings.chmod(0o600)
        yield "pip.conf", settings

    def _commit(self, container: str, name: str) -> None:
        self.buildah("commit", "--rm", "--signature-policy", str(self._policy), container, name)

    def description(self, name: str) -> dict[str, Any]:
        """All that the image says about itself: its configuration and its history."""
        found: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", name))
        return found

    @contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """The image's files."""
        container = self.buildah("from", "--pull-never", name).strip()
        try:
            yield Path(self.buildah("mount", container).strip())
        finally:
            self.buildah("umount", container)
            self.buildah("rm", container)

    def remove(self) -> None:
        """End with all that was made; the cache stays."""
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class Options:
    """How a container runs: what `docker run` was told."""

    read_only: bool = False
    new_privileges: bool = True
    capabilities: tuple[str, ...] = _DEFAULT_CAPABILITIES
    tmpfs: tuple[str, ...] = ()
    binds: tuple[tuple[str, str, bool], ...] = ()  # from, to, read only
    environ: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_seconds: int = 10
    published: tuple[str, ...] = ()


def options(command: str, environ: Mapping[str, str]) -> tuple[Options, str, list[str]]:
    """A `docker run` command as options, image and arguments; AssertionError if it has an option unknown here.

    `environ` gives values to variables that are named only.
    """
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] in (["docker", "run"], ["podman", "run"]), command
    found, rest = Options(), words[2:]
    while rest[0].startswith("-"):
        name, value, rest = _option(rest)
        match name:
            case "--rm" | "--detach" | "-d" | "--name" | "--restart":
                pass
            case "--read-only":
                found = replace(found, read_only=True)
            case "--cap-drop":
                assert value == "ALL", value
                found = replace(found, capabilities=())
            case "--security-opt":
                assert value == "no-new-privileges", value
                found = replace(found, new_privileges=False)
            case "--tmpfs":
                found = replace(found, tmpfs=(*found.tmpfs, value))
            case "--volume" | "-v":
                source, to, *mode = value.split(":")
                assert mode in ([], ["ro"]), value
                found = replace(found, binds=(*found.binds, (source, to, mode == ["ro"])))
            case "--env" | "-e":
                variable, equals, text = value.partition("=")
                if equals or variable in environ:
                    text = text if equals else environ[variable]
                    found = replace(found, environ={**found.environ, variable: text})
            case "--user":
                found = replace(found, user=value)
            case "--stop-timeout":
                found = replace(found, stop_seconds=int(value))
            case "--publish" | "-p":
                found = replace(found, published=(*found.published, value))
            case _:
                raise AssertionError(f"{name} has no meaning here")
    return found, rest[0], rest[1:]


def _option(words: list[str]) -> tuple[str, str, list[str]]:
    if words[0] in ("--rm", "--detach", "-d", "--read-only"):
        return words[0], "", words[1:]
    if words[0].startswith("--") and "=" in words[0]:
        name, _, value = words[0].partition("=")
        return name, value, words[1:]
    return words[0], words[1], words[2:]


class Container:
    """One container that runs, with this machine's network."""

    def __init__(
        self, folder: Path, root: Path, config: Mapping[str, Any], options: Options, arguments: Sequence[str] = ()
    ) -> None:
        self.output, self.errors = folder / "stdout", folder / "stderr"
        self._options = options
        self._id = f"test-{uuid4().hex}"
        self._crun = [*_ONE_KIND_OF_CGROUPS, "crun", "--cgroup-manager=disabled", f"--root={folder / 'crun'}"]
        folder.mkdir()
        spec = _specification(root, config, options, arguments)
        self._folder, self._process_of_image = folder, spec["process"]
        (folder / "config.json").write_text(json.dumps(spec))
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            self._process = subprocess.Popen(
                [*self._crun, "run", f"--bundle={folder}", self._id], stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def pid(self) -> int:
        """The first process's number, outside."""
        found: int = json.loads(_run([*self._crun, "state", self._id]))["pid"]
        return found

    def execute(self, *command: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """As `docker exec`: as the container's user, with its variables and rights."""
        process = {**self._process_of_image, "args": list(command)}
        process["env"] = process["env"] + [f"{name}={value}" for name, value in (environ or {}).items()]
        described = self._folder / f"{uuid4().hex}.json"
        described.write_text(json.dumps(process))
        return subprocess.run(
            [*self._crun, "exec", f"--process={described}", self._id],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def signal(self, name: str) -> None:
        _run([*self._crun, "kill", self._id, name])

    def wait(self, seconds: float = 60) -> int:
        """The exit code."""
        return self._process.wait(seconds)

    def stop(self, stop_signal: str) -> int:
        """As `docker stop`: the image's signal, then SIGKILL when the time is over. The exit code."""
        self.signal(stop_signal)
        try:
            return self.wait(self._options.stop_seconds)
        except subprocess.TimeoutExpired:
            self.signal("SIGKILL")
            return self.wait()

    def remove(self) -> None:
        """End it and whatever it started, if it is still there."""
        if not self.ended:
            subprocess.run([*self._crun, "delete", "--force", self._id], capture_output=True, check=False)
            try:
                self.wait(10)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGKILL)
                self.wait(10)


@contextmanager
def running(
    folder: Path, root: Path, config: Mapping[str, Any], options: Options, arguments: Sequence[str] = ()
) -> Iterator[Container]:
    """A container that is gone afterwards, whatever happens."""
    container = Container(folder, root, config, options, arguments)
    try:
        yield container
    finally:
        container.remove()


def run(
    folder: Path, root: Path, config: Mapping[str, Any], options: Options, arguments: Sequence[str]
) -> tuple[int, str, str]:
    """A container that ends by itself: its exit code, and what it printed on standard output and error."""
    with running(folder, root, config, options, arguments) as container:
        code = container.wait()
        return code, container.output.read_text(), container.errors.read_text()


def wait_until_healthy(container: Container, test: Sequence[str], seconds: float = 60) -> None:
    """Ask the image's own health check until it says yes; `test` as the image's configuration has it."""
    assert test[0] == "CMD", test
    end = time.monotonic() + seconds
    while True:
        assert not container.ended, container.errors.read_text()
        result = container.execute(*test[1:])
        if result.returncode == 0:
            return
        assert time.monotonic() < end, result.stderr + container.errors.read_text()
        time.sleep(0.2)


def _specification(root: Path, config: Mapping[str, Any], options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """The runtime's configuration (OCI runtime specification 1.0), as docker would write it."""
    user, _, group = (options.user or config["User"]).partition(":")
    variables = dict(entry.split("=", 1) for entry in config["Env"]) | dict(options.environ)
    capabilities = [f"CAP_{name}" for name in options.capabilities] if user == "0" else []
    bounding = [f"CAP_{name}" for name in options.capabilities]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root), "readonly": options.read_only},
        "process": {
            "user": {"uid": int(user), "gid": int(group or 0)},
            "args": [*config["Entrypoint"], *(arguments or config["Cmd"])],
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": config["WorkingDir"] or "/",
            "noNewPrivileges": not options.new_privileges,
            "capabilities": {name: bounding if name == "bounding" else capabilities for name in _CAPABILITY_SETS},
        },
        "mounts": [
            _mount("proc", "/proc", "proc"),
            _mount("tmpfs", "/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("devpts", "/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            _mount("shm", "/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
            _mount("mqueue", "/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
            _mount("sysfs", "/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            *(_mount("tmpfs", to, "tmpfs", "nosuid", "noexec", "nodev", "mode=1777") for to in options.tmpfs),
            *(
                _mount(source, to, "bind", "rbind", "rprivate", "ro" if read_only else "rw")
                for source, to, read_only in options.binds
            ),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def _mount(source: str, to: str, kind: str, *options: str) -> dict[str, Any]:
    return {"source": source, "destination": to, "type": kind, "options": list(options)}


def _run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, stdin=subprocess.DEVNULL)
    assert made.returncode == 0, f"{shlex.join(command)}\n{made.stdout}\n{made.stderr}"
    return made.stdout
