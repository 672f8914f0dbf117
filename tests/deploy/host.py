"""A Debian host of its own for tests: a real systemd with a real journal, in namespaces, with no network but its own.

The system is made once by mmdebstrap and kept below .cache/; each host writes into an overlay over it, so hosts start
in a second and know nothing of each other. It needs root with all capabilities, as a virtual machine gives it, and a
cgroup2 hierarchy; a container usually has neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
# What Ubuntu's and Debian's cloud images have, as far as it is needed: neither pip nor ensurepip.
PACKAGES = ("python3", "systemd-sysv", "dbus", "procps", "rsyslog", "logrotate", "curl", "ca-certificates", "gpgv")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CLONE_NEWNET = 0x40000000
_BOOT_DEADLINE = 60.0

# Runs in the new namespaces: lays the overlay, makes /dev and the rest, and becomes the first process there.
_BECOME_HOST = r"""
set -eu
layers=$1 upper=$2 root=$3; shift 3
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$layers,upperdir=$upper/files,workdir=$upper/work" "$root"
cd "$root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
for node in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "dev/${node%:*}" c 1 "${node#*:}"; done
mknod -m 666 dev/tty c 5 0
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ip link set lo up
mkdir run/before
pivot_root . run/before
umount -l /run/before
exec env -i container=test PATH="$PATH" "$@"
"""

T = TypeVar("T")


def why_not() -> str | None:
    """Why there can be no such host here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces and a Debian system of its own"
    if shutil.which("mmdebstrap") is None:
        return "needs mmdebstrap; scripts/system-packages installs it"
    if subprocess.run(["unshare", "--mount", "--pid", "--net", "--cgroup", "--fork", "true"], check=False).returncode:
        return "needs a machine where root may make namespaces; this looks like a container without the right to"
    return None


def image() -> Path:
    """The folder with the Debian system, made if it is not there (half a minute)."""
    name = sha256(repr((SUITE, PACKAGES)).encode()).hexdigest()[:12]
    folder = ROOT / ".cache" / f"host-{SUITE}-{name}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="host-", dir=folder.parent) as scratch:
            made = Path(scratch) / "files"
            command = [
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                f"--include={','.join(PACKAGES)}",
                SUITE,
                str(made),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"mmdebstrap failed:\n{done.stderr}"
            (made / "etc" / "machine-id").write_text(f"{name}{name}{name}"[:32] + "\n")
            with contextlib.suppress(OSError):  # somebody else was quicker
                made.rename(folder)
    return folder


class Host:
    """A running host. `layers`: what lies over the Debian system, the uppermost first; `init`: its first process."""

    def __init__(self, folder: Path, *, layers: tuple[Path, ...] = (), init: tuple[str, ...] = ("/sbin/init",)) -> None:
        self.files = folder / "files"
        for path in (self.files, folder / "work", folder / "root"):
            path.mkdir(parents=True)
        self._cgroup = _cgroups() / f"mlflow-proxy-test-{os.getpid()}-{folder.name}"
        self._cgroup.mkdir()
        lower = ":".join(map(str, [*layers, image()]))
        unshare = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup", "--kill-child"]
        self._log = folder / "console"
        become = ["bash", "-c", _BECOME_HOST, "host", lower, str(folder), str(folder / "root"), *init]
        # It must be in its cgroup before it gets a namespace of cgroups.
        first = f'echo $$ >{self._cgroup}/cgroup.procs && exec "$@"'
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", first, "first", *unshare, *become],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH},
            )
        self.pid = self._first_process(init[0])
        if init == ("/sbin/init",):
            self._wait_until_booted()

    def __truediv__(self, path: str) -> Path:
        """The path of a file on the host, as this process reaches it."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def run(self, *command: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on the host, as root, and wait for it."""
        process = self.start(*command, environ=environ)
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def start(self, *command: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Begin a command on the host."""
        variables = [f"{name}={value}" for name, value in ({"PATH": PATH, "LANG": "C.UTF-8"} | (environ or {})).items()]
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid), "--all", "env", "-i", *variables, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def out(self, *command: str) -> str:
        """What a command prints, which must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def in_network(self, make: Callable[[], T]) -> T:
        """Call something in a thread that sees the host's network; sockets that it makes stay there."""
        results: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                with open(f"/proc/{self.pid}/ns/net") as namespace:
                    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                results.append(make())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def stop(self) -> None:
        """End all its processes at once."""
        self._process.send_signal(signal.SIGKILL)  # and with it the first process, and with that all others
        self._process.wait(30)
        end = time.monotonic() + 30
        while self._cgroup.exists():
            for folder in sorted(self._cgroup.rglob("*/"), key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            assert time.monotonic() < end, "processes of the host did not end"
            time.sleep(0.02)

    def _first_process(self, name: str) -> int:
        end = time.monotonic() + _BOOT_DEADLINE
        while True:
            assert self._process.poll() is None, self._log.read_text()
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
                if children and Path(f"/proc/{children[0]}/cmdline").read_bytes().startswith(name.encode() + b"\0"):
                    return int(children[0])
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.02)

    def _wait_until_booted(self) -> None:
        end = time.monotonic() + _BOOT_DEADLINE
        while True:
            state = self.run("systemctl", "is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                return
            assert time.monotonic() < end, f"systemd is {state!r}: {self._log.read_text()}"
            time.sleep(0.1)


@contextlib.contextmanager
def running(folder: Path, *, layers: tuple[Path, ...] = (), init: tuple[str, ...] = ("/sbin/init",)) -> Iterator[Host]:
    """A host that is ended, whatever happens."""
    host = Host(folder, layers=layers, init=init)
    try:
        yield host
    finally:
        host.stop()


def _cgroups() -> Path:
    """Where this machine's cgroup2 hierarchy is."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise AssertionError("this machine has no cgroup2 hierarchy")
