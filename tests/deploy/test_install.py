"""deploy/install.sh and the systemd unit on Debian hosts of their own: a real systemd starts the unit, sandbox and all.

The hosts have no network but loopback, neither pip nor ensurepip: what installs there installs anywhere offline. Amazon
Linux and Ubuntu are there only as their /etc/os-release, for what the script advises where Python is missing.
"""

from __future__ import annotations

import ensurepip
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives import serialization
from tests.deploy.host import PATH, ROOT, Host, running, why_not
from tests.faults.certificates import Authority

from deploy import wheelhouse

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

UNIT = ROOT / "deploy" / "systemd" / "mlflow-proxy.service"
INSTALL = "/srv/{}/deploy/install.sh"
ARN = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/team"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
# The bad version does what BROKEN or MUTE says instead of serving.
FIRST, SECOND, BAD = "0.1.0", "0.2.0", "0.3.0"
INSTEAD = "/srv/instead"
BROKEN, MUTE = "raise SystemExit('this version cannot start')", "import time; time.sleep(3600)"


class Upstream(http.server.BaseHTTPRequestHandler):
    """Stands where SageMaker MLflow would be, on the host's loopback. A request for /slow is held until it may end."""

    arrived = threading.Event()
    may_answer = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if "slow" in self.path:
            self.arrived.set()
            assert self.may_answer.wait(60)
        body = json.dumps({"signed": "AWS4-HMAC-SHA256" in self.headers["Authorization"]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def configuration(port: int = 8080, **server: Any) -> str:
    """Callers are not identified on loopback; there is a worker, and what is asked for."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in {"port": port, "workers": 1, **server}.items()]
    target = f'[[targets]]\nname = "team"\narn = "{ARN}"\nendpoint = "http://127.0.0.1:9500"\n'
    return "\n".join(["[server]", *lines, target])


def version(wheel: Path, number: str, to: Path) -> None:
    """The proxy's wheel as another version."""
    before = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(to / wheel.name.replace(before, number), "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name.endswith("METADATA"):
                text = text.replace(f"\nVersion: {before}\n".encode(), f"\nVersion: {number}\n".encode())
            if name == "mlflow_proxy/__init__.py":
                text += f'\n__version__ = "{number}"\n'.encode()
            if number == BAD and name == "mlflow_proxy/server.py":
                text += f"\n\ndef serve(*_):\n    exec(open({INSTEAD!r}).read())\n".encode()
            new.writestr(name.replace(f"-{before}.dist-info", f"-{number}.dist-info"), text)


class Layers(NamedTuple):
    """What lies over a host's Debian system. `built`: the release of a version, as if it had been installed before."""

    applications: Path
    image: Path
    built: dict[str, Path]
    said: str


@pytest.fixture(scope="session")
def applications(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer with a folder for each version in /srv, as deploy/wheelhouse.py makes it."""
    layer = tmp_path_factory.mktemp("applications")
    made = layer / "srv" / FIRST
    made.parent.mkdir()
    make = [sys.executable, str(ROOT / "deploy" / "wheelhouse.py"), str(made)]
    done = subprocess.run(make, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (made / "wheelhouse").glob("sagemaker_mlflow_proxy-*.whl")
    for number in (SECOND, BAD):
        folder = layer / "srv" / number
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns(wheel.name))
        version(wheel, number, folder / "wheelhouse")
    (layer / "srv" / "proxy.toml").write_text(configuration())
    (layer / "etc" / "mlflow-proxy").mkdir(parents=True)
    variables = layer / "etc" / "mlflow-proxy" / "environment"
    variables.write_text(f"# of the tests\nAWS_ACCESS_KEY_ID=AKIDEXAMPLE\nAWS_SECRET_ACCESS_KEY='{SECRET}'\n")
    variables.chmod(0o600)
    return layer


@pytest.fixture(scope="session")
def layers(applications: Path, tmp_path_factory: pytest.TempPathFactory) -> Layers:
    """An image of a host with the first version, made in a chroot without a running systemd, as images are."""
    folder = tmp_path_factory.mktemp("image")
    with running(folder, layers=(applications,), init=("/usr/bin/sleep", "infinity")) as host:
        for number in (BAD, FIRST):
            done = install(host, number, "--config", "/srv/proxy.toml")
            assert done.returncode == 0, done.stdout + done.stderr
    built = {}
    for release in (folder / "files" / "opt" / "mlflow-proxy" / "releases").iterdir():
        number = release.name.split("-")[0]
        built[number] = folder / "built" / number
        to = built[number] / "opt" / "mlflow-proxy" / "releases"
        to.mkdir(parents=True)
        if number == FIRST:
            subprocess.run(["cp", "-al", str(release), str(to)], check=True)
        else:
            release.rename(to / release.name)
    return Layers(applications, folder / "files", built, done.stdout)


@pytest.fixture
def host(layers: Layers, tmp_path: Path) -> Iterator[Host]:
    """A host that was booted from that image, with an upstream."""
    with running(tmp_path / "host", layers=(layers.built[BAD], layers.image, layers.applications)) as booted:
        Upstream.arrived.clear()
        Upstream.may_answer.clear()
        server = booted.in_network(lambda: http.server.ThreadingHTTPServer(("127.0.0.1", 9500), Upstream))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield booted
        Upstream.may_answer.set()
        server.shutdown()
        server.server_close()


def install(host: Host, number: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return host.run("bash", INSTALL.format(number), "--wheelhouse", f"/srv/{number}/wheelhouse", *arguments)


def state(host: Host, name: str) -> str:
    return host.out("systemctl", "show", f"--property={name}", "--value", "mlflow-proxy")


def running_version(host: Host, url: str = "http://127.0.0.1:8080") -> str:
    """What the service itself says, once it is there."""
    text = host.out("curl", "-fsSk", "--retry", "40", "--retry-connrefused", "--retry-delay", "1", f"{url}/-/version")
    return str(json.loads(text)["version"])


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


CALL = ["curl", "-sS", "-H", "Content-Type: application/json", "-d", "{}", "-w", " %{http_code}"]


def call(host: Host, path: str = "/api/2.0/mlflow/experiments/search") -> str:
    return host.out(*CALL, f"http://127.0.0.1:8080{path}")


# The unit


def test_unit_is_hardened_and_without_mistakes(host: Host) -> None:
    host.out("systemd-analyze", "verify", "/etc/systemd/system/mlflow-proxy.service")
    assert host.run("systemd-analyze", "verify", "mlflow-proxy.service").stderr == ""
    shown = host.out("systemd-analyze", "security", "--offline=true", "/etc/systemd/system/mlflow-proxy.service")
    exposure = re.search(r"Overall exposure level for mlflow-proxy.service: ([\d.]+)", shown)
    assert exposure is not None
    assert float(exposure[1]) <= 2.0


def test_image_without_systemd_says_so_and_starts_when_it_boots(layers: Layers, host: Host) -> None:
    assert "systemd is not running here, so nothing was started. The service starts when the host boots." in layers.said
    assert running_version(host) == FIRST
    assert host.out("cat", "/proc/net/route").count("\n") == 0  # no way out
    assert call(host) == '{"signed": true} 200'

    def lines() -> list[str]:
        journal = host.out("journalctl", "--identifier", "mlflow-proxy", "--output", "cat")
        return [line for line in journal.splitlines() if "SearchExperiments" in line]

    wait_for(lines, "the request is not in the journal")
    assert json.loads(lines()[0])["status"] == 200
    assert SECRET not in host.out("journalctl", "--no-pager") + host.out("ps", "axww")

    processes = host.out("systemctl", "show", "--property=ControlGroup", "--value", "mlflow-proxy")
    pids = (host / f"/sys/fs/cgroup{processes}/cgroup.procs").read_text().split()
    assert len(pids) >= 2
    for pid in pids:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert status["Uid"].split()[0] == host.out("id", "-u", "mlflow-proxy") != "0"
        assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapBnd"], 16)) == ("1", "2", 0)
    assert host.out("stat", "-c", "%U:%G %a", "/etc/mlflow-proxy/proxy.toml") == "root:mlflow-proxy 640"
    assert host.out("getent", "passwd", "mlflow-proxy").endswith(":/var/lib/mlflow-proxy:/usr/sbin/nologin")
    assert host.out("find", "/opt/mlflow-proxy", "!", "-user", "root") == ""
    assert host.out("find", "/run/mlflow-proxy", "-mindepth", "1", "-maxdepth", "1", "-name", "mlflow-proxy-*")


def test_reload_replaces_the_workers_only(host: Host) -> None:
    assert running_version(host) == FIRST
    before = state(host, "MainPID")
    text = (host / "/etc/mlflow-proxy/proxy.toml").read_text()
    (host / "/etc/mlflow-proxy/proxy.toml").write_text(
        text + text[text.index("[[targets]]") :].replace("team", "other", 1)
    )
    with (host / "/etc/mlflow-proxy/proxy.toml").open("a") as file:
        file.write("default = true\n")
    assert call(host, "/t/other/api/2.0/mlflow/experiments/search").endswith(" 404")
    host.out("systemctl", "reload", "mlflow-proxy")
    path = "/t/other/api/2.0/mlflow/experiments/search"
    wait_for(lambda: call(host, path).endswith(" 200"), "the new configuration does not count")
    assert state(host, "MainPID") == before
    assert state(host, "NRestarts") == "0"


def test_stop_lets_requests_finish(host: Host) -> None:
    assert running_version(host) == FIRST
    caller = host.start(*CALL, "http://127.0.0.1:8080/api/2.0/mlflow/slow")
    assert Upstream.arrived.wait(60)
    stopping = host.start("systemctl", "stop", "mlflow-proxy")
    wait_for(lambda: state(host, "ActiveState") == "deactivating", "the stop does not begin")
    Upstream.may_answer.set()
    answer, error = caller.communicate(timeout=60)
    assert answer == '{"signed": true} 200', error
    stopping.communicate(timeout=60)
    assert (state(host, "ActiveState"), state(host, "Result")) == ("inactive", "success")
    assert not (host / "/run/mlflow-proxy").exists()


def test_worker_and_main_process_that_die_come_back(host: Host) -> None:
    assert running_version(host) == FIRST
    before = state(host, "MainPID")
    host.out("kill", "-KILL", before)
    wait_for(lambda: state(host, "MainPID") not in (before, "0"), "it is not started anew")
    assert running_version(host) == FIRST


def test_port_below_1024_with_tls(host: Host, tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "tests").issue("mlflow.example.com")
    shutil.copy(certificate, host / "/etc/mlflow-proxy/cert.pem")
    shutil.copy(key, host / "/etc/mlflow-proxy/key.pem")
    host.out("chown", "root:mlflow-proxy", "/etc/mlflow-proxy/key.pem")
    host.out("chmod", "640", "/etc/mlflow-proxy/key.pem")
    paths = {"tls_certificate": "/etc/mlflow-proxy/cert.pem", "tls_key": "/etc/mlflow-proxy/key.pem"}
    (host / "/srv/tls.toml").write_text(configuration(443, drain_timeout=100, **paths))
    refused = install(host, FIRST, "--config", "/srv/tls.toml", "--timeout", "20")
    assert refused.returncode == 1
    assert "cannot listen on 127.0.0.1:443" in refused.stderr
    assert running_version(host) == FIRST
    assert state(host, "TimeoutStopUSec") == "45s"

    drop_in = f"/srv/{FIRST}/deploy/systemd/ports-below-1024.conf"
    host.out("install", "-D", "-m", "644", drop_in, "/etc/systemd/system/mlflow-proxy.service.d/ports-below-1024.conf")
    done = install(host, FIRST, "--config", "/srv/tls.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Healthy:   https://127.0.0.1:443/-/health" in done.stdout
    assert running_version(host, "https://127.0.0.1") == FIRST
    assert state(host, "TimeoutStopUSec") == "1min 55s"


# Upgrades


def test_upgrade_and_again(host: Host) -> None:
    old = "/opt/mlflow-proxy/releases"
    for name in ("never-whole", "oldest"):
        (host / f"{old}/{name}").mkdir()
    host.out("touch", "-d", "-1 year", f"{old}/oldest/complete")
    assert running_version(host) == FIRST
    done = install(host, SECOND)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^Installed: {SECOND}-\w{{12}}, configuration /etc/mlflow-proxy/proxy.toml$", done.stdout, re.M)
    assert running_version(host) == SECOND
    assert host.out("mlflow-proxy", "--version") == f"mlflow-proxy, version {SECOND}"
    assert sorted(path.name.split("-")[0] for path in (host / old).iterdir()) == [FIRST, SECOND, BAD]

    before, files = state(host, "MainPID"), host.out("find", "/opt", "/etc", "-newer", "/etc/mlflow-proxy/proxy.toml")
    again = install(host, SECOND, "--config", "/srv/proxy.toml")
    assert again.returncode == 0, again.stderr
    assert "Nothing to do: release" in again.stdout
    assert state(host, "MainPID") == before
    assert host.out("find", "/opt", "/etc", "-newer", "/etc/mlflow-proxy/proxy.toml") == files
    assert not (host / "/opt/mlflow-proxy/undo").exists()


@pytest.mark.parametrize(("instead", "why"), [(BROKEN, "this version cannot start"), (MUTE, "")])
def test_version_that_is_not_healthy_is_undone_with_its_configuration(host: Host, instead: str, why: str) -> None:
    assert running_version(host) == FIRST
    (host / INSTEAD).write_text(instead)
    (host / "/srv/other.toml").write_text(configuration(port=8081, drain_timeout=100))
    done = install(host, BAD, "--config", "/srv/other.toml", "--timeout", "4" if instead == MUTE else "60")
    assert done.returncode == 1
    assert f"Release {BAD}-" in done.stderr
    assert "did not become healthy at http://127.0.0.1:8081/-/health. The journal's last lines:\n" in done.stderr
    assert why in done.stderr
    assert re.search(rf"Release {FIRST}-\w{{12}} runs again, with its configuration\.\n$", done.stderr)
    assert running_version(host) == FIRST
    assert (host / "/etc/mlflow-proxy/proxy.toml").read_text() == configuration()
    assert state(host, "TimeoutStopUSec") == "45s"
    assert "Nothing to do" in install(host, FIRST).stdout


def test_first_installation_that_is_not_healthy_leaves_nothing_running(layers: Layers, tmp_path: Path) -> None:
    with running(tmp_path / "host", layers=(*layers.built.values(), layers.applications)) as host:
        (host / INSTEAD).write_text(MUTE)
        done = install(host, BAD, "--config", "/srv/proxy.toml", "--timeout", "2")
        assert done.returncode == 1
        assert done.stderr.endswith("Nothing was installed before, so nothing runs now.\n")
        assert host.run("systemctl", "is-active", "mlflow-proxy").stdout == "inactive\n"
        assert not (host / "/etc/systemd/system/mlflow-proxy.service").exists()
        assert install(host, FIRST, "--config", "/srv/proxy.toml").returncode == 0
        assert running_version(host) == FIRST


def test_mistakes_in_the_configuration_change_nothing(host: Host, tmp_path: Path) -> None:
    assert running_version(host) == FIRST
    before = state(host, "MainPID"), (host / "/etc/mlflow-proxy/proxy.toml").read_text()
    certificate, key = Authority(tmp_path, "tests").issue("mlflow.example.com")
    shutil.copy(certificate, host / "/srv/cert.pem")
    shutil.copy(key, host / "/etc/mlflow-proxy/key.pem")
    host.out("chmod", "600", "/etc/mlflow-proxy/key.pem")  # the service could not read it
    text = configuration(prot=1, tls_certificate="/srv/cert.pem", tls_key="/etc/mlflow-proxy/key.pem")
    (host / "/srv/bad.toml").write_text(text.replace("mlflow-tracking-server", "mlflow-server"))
    done = install(host, FIRST, "--config", "/srv/bad.toml")
    assert done.returncode == 1
    assert "  ✗ server.prot: no such option; did you mean port?\n" in done.stderr
    assert "  ✗ targets[1].arn: " in done.stderr
    assert "  ✗ server.tls_key: '/etc/mlflow-proxy/key.pem' cannot be read (Permission denied)\n" in done.stderr
    assert "these are mistakes in /srv/bad.toml" in done.stderr
    assert (state(host, "MainPID"), (host / "/etc/mlflow-proxy/proxy.toml").read_text()) == before
    assert sorted(path.name for path in (host / "/etc/mlflow-proxy").iterdir()) == [
        "environment",
        "key.pem",
        "proxy.toml",
    ]

    with (host / "/etc/mlflow-proxy/environment").open("a") as file:
        file.write("MLFLOW_PROXY_SERVER__PORT='none'\n")
    done = install(host, FIRST)
    assert done.returncode == 1
    assert "  ✗ server.port: " in done.stderr
    assert state(host, "MainPID") == before[0]


@pytest.mark.parametrize("how", ["TERM", "KILL"])
def test_interrupted_run_is_undone(host: Host, how: str) -> None:
    """By itself where it can, else by the next run."""
    assert running_version(host) == FIRST
    (host / INSTEAD).write_text(MUTE)
    arguments = ["--wheelhouse", f"/srv/{BAD}/wheelhouse", "--timeout", "600"]
    run = host.start("bash", "-c", 'echo $$ >/run/installer && exec bash "$@"', "-", INSTALL.format(BAD), *arguments)
    wait_for(
        lambda: "/opt/mlflow-proxy/releases/" in _main(host) and BAD in _main(host), "the new version does not run"
    )
    host.out("kill", f"-{how}", (host / "/run/installer").read_text().strip())
    run.communicate(timeout=60)
    if how == "TERM":
        assert run.returncode == 130
        assert running_version(host) == FIRST
        assert not (host / "/opt/mlflow-proxy/undo").exists()
        return
    assert (host / "/opt/mlflow-proxy/undo").exists()
    done = install(host, FIRST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("An earlier run was interrupted: going back to what was before it …\n")
    assert running_version(host) == FIRST
    assert not (host / "/opt/mlflow-proxy/undo").exists()


def _main(host: Host) -> str:
    """The command line of the service's main process."""
    return host.run("cat", f"/proc/{state(host, 'MainPID')}/cmdline").stdout


def test_half_installed_release_is_made_anew(host: Host) -> None:
    (release,) = (host / "/opt/mlflow-proxy/releases").glob(f"{FIRST}-*")
    (release / "complete").unlink()
    shutil.rmtree(next(release.glob("lib/python3*/site-packages")) / "mlflow_proxy")
    done = install(host, FIRST)
    assert done.returncode == 0, done.stderr
    assert f"Installing release {release.name} with Python 3.11" in done.stdout
    assert running_version(host) == FIRST


def test_two_runs_at_once_are_refused(host: Host) -> None:
    hold = "touch /run/held; until [ -e /run/go ]; do sleep 0.1; done"
    held = host.start("flock", "/run/mlflow-proxy-install.lock", "bash", "-c", hold)
    wait_for((host / "/run/held").exists, "the lock is not held")
    done = install(host, FIRST)
    assert (done.returncode, done.stderr) == (1, "Error: another run of this script is under way\n")
    (host / "/run/go").touch()
    held.communicate(timeout=60)


# Uninstalling


def test_uninstall_keeps_what_is_yours_and_purge_leaves_nothing(layers: Layers, tmp_path: Path) -> None:
    with running(tmp_path / "host", layers=(layers.built[FIRST], layers.applications)) as host:
        before = {path for path in files(host) if not path.startswith("/opt/mlflow-proxy")}
        assert install(host, FIRST, "--config", "/srv/proxy.toml").returncode == 0
        (host / "/var/lib/mlflow-proxy/keys.jsonl").touch()
        done = host.run("bash", INSTALL.format(FIRST), "uninstall")
        assert done.returncode == 0, done.stderr
        assert host.run("systemctl", "status", "mlflow-proxy").returncode == 4  # no such unit
        left = {path for path in files(host) - before if "mlflow" in path}
        assert left == {
            "/etc/mlflow-proxy/proxy.toml",
            *("/var/lib/mlflow-proxy", "/var/lib/mlflow-proxy/keys.jsonl", "/var/log/mlflow-proxy"),
        }
        for _ in range(2):
            done = host.run("bash", INSTALL.format(FIRST), "uninstall", "--purge")
            assert done.returncode == 0, done.stderr
        # Caches and copies that Debian's own programs keep when users and services come and go.
        ours = re.compile(
            r"/(var/(log|lib/systemd|cache|tmp)|etc/(passwd|group|shadow|gshadow|subuid|subgid)-)|\.pyc$|__pycache__"
        )
        assert {path for path in files(host) - before if not ours.search(path)} == set()
        assert before - files(host) == {"/etc/mlflow-proxy", "/etc/mlflow-proxy/environment"}
        assert "mlflow" not in (host / "/etc/passwd").read_text() + (host / "/etc/group").read_text()


def files(host: Host) -> set[str]:
    return set(host.out("find", "/", "-xdev", "-not", "-path", "/srv/*").splitlines())


# What is missing


_DEBIAN = "  apt-get update && apt-get install -y python3 python3-venv"
_DEADSNAKES = (
    "  apt-get update && apt-get install -y software-properties-common && add-apt-repository -y ppa:deadsnakes/ppa"
    " && apt-get install -y python3.12 python3.12-venv"
)
OS_RELEASES = {
    'ID="amzn"\nID_LIKE="fedora"\nVERSION_ID="2023"': "  dnf install -y python3.13",
    'ID="amzn"\nVERSION_ID="2"': "  this Amazon Linux has no Python 3.11: use Amazon Linux 2023",
    'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"': _DEBIAN,
    'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="22.04"': _DEADSNAKES,
    'ID=debian\nVERSION_ID="12"': _DEBIAN,
    'ID=debian\nVERSION_ID="11"': "  debian 11 has no Python 3.11: use a newer release of it",
    'ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_ID="22"': _DEBIAN,
    'ID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.5"': "  dnf install -y python3.12",
    "ID=arch": "  install Python 3.11 or newer with its venv module as this system does it",
}


@pytest.fixture(scope="module")
def bare(applications: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host without systemd, and in /tools all programs but Python."""
    folder = tmp_path_factory.mktemp("bare")
    with running(folder, layers=(applications,), init=("/usr/bin/sleep", "infinity")) as host:
        host.out("bash", "-c", "mkdir /tools && ln -s /usr/bin/* /usr/sbin/* /tools/ 2>/dev/null; rm /tools/python3*")
        yield host


@pytest.mark.parametrize("release", OS_RELEASES)
def test_without_python_it_says_what_to_run(bare: Host, release: str) -> None:
    (bare / "/etc/os-release").unlink()
    (bare / "/etc/os-release").write_text(f"{release}\n")
    arguments = ["--wheelhouse", f"/srv/{FIRST}/wheelhouse", "--config", "/srv/proxy.toml"]
    done = bare.run("bash", INSTALL.format(FIRST), *arguments, environ={"PATH": "/tools"})
    assert done.returncode == 1
    assert "which this host does not have" in done.stderr
    assert OS_RELEASES[release] in done.stderr.splitlines()
    assert not (bare / "/opt/mlflow-proxy").exists()


def test_newest_python_is_taken_and_those_that_will_not_do_are_named(bare: Host) -> None:
    fakes = bare / "/fakes"
    fakes.mkdir()
    for name, number in (("python3.13", "3.13"), ("python3.12", "3.9"), ("python3", "3.10")):
        # An interpreter of another version, as far as the script can tell.
        pretend = f"import sys; sys.version_info = ({number.replace('.', ', ')}); exec(sys.stdin.read())"
        (fakes / name).write_text(f"#!/bin/bash\nexec /usr/bin/python3.11 -I -c '{pretend}' \"${{@:3}}\"\n")
        (fakes / name).chmod(0o755)
    done = bare.run("bash", INSTALL.format(FIRST), environ={"PATH": f"/fakes:{PATH}"})
    assert done.returncode == 1
    assert "this is not a clone of the repository" in done.stderr
    find = f'source <(sed "/^action=/,\\$d" {INSTALL.format(FIRST)}); find_python "$1"; echo "$python"'
    done = bare.run("bash", "-c", find, "-", "3.13", environ={"PATH": f"/fakes:{PATH}"})
    assert done.stdout == "/fakes/python3.13\n", done.stderr
    done = bare.run("bash", "-c", find, "-", "3.11", environ={"PATH": f"/fakes:{PATH}"})
    assert done.stdout == "/usr/bin/python3.11\n", done.stderr
    done = bare.run("bash", "-c", find, "-", "3.14", environ={"PATH": f"/fakes:{PATH}"})
    assert done.returncode == 1
    named = re.findall(r"^  (/\S+) (.*)$", done.stderr, re.M)
    assert named == [
        ("/fakes/python3.13", "is Python 3.13"),
        ("/fakes/python3.12", "is Python 3.9"),
        ("/usr/bin/python3.11", "is Python 3.11"),
        ("/fakes/python3", "is Python 3.10"),
    ]
    done = bare.run("bash", "-c", find, "-", "", environ={"PATH": PATH})
    assert "/usr/bin/python3.11 lacks ensurepip (the package python3-venv)" in done.stderr


@pytest.mark.parametrize(
    ("change", "arguments", "error"),
    [
        ("", "--config /srv/none.toml", "--config /srv/none.toml: there is no such file"),
        ("", "", "there is no configuration yet; name one with --config"),
        ("rm requirements.txt", "--config /srv/proxy.toml", "requirements.txt is missing"),
        ("rm wheelhouse/pip-*", "--config /srv/proxy.toml", "no wheel of pip"),
        ("rm wheelhouse/sagemaker*", "--config /srv/proxy.toml", "no wheel of the proxy"),
        ("for f in wheelhouse/*_x86_64.whl wheelhouse/*_aarch64.whl; do mv $f ${f%.whl}_riscv64.whl; done", "",
         "the wheels are for another kind of machine"),
        ("", "--timeout soon", "--timeout soon: is not a number of seconds"),
        ("", "--wheels /srv", "--wheels: no such option"),
        ("", "--config", "--config needs a value"),
        ("", "--purge", "--purge goes with uninstall"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said(bare: Host, change: str, arguments: str, error: str) -> None:
    copy = f"rm -rf /srv/x && cp -a /srv/{FIRST} /srv/x && cd /srv/x && {{ {change or 'true'}; }} 2>/dev/null; "
    done = bare.run("bash", "-c", f"{copy} bash deploy/install.sh --wheelhouse wheelhouse {arguments}")
    assert done.returncode == 1
    assert error in done.stderr
    assert not (bare / "/etc/systemd/system/mlflow-proxy.service").exists()


def test_only_root_installs(bare: Host) -> None:
    done = bare.run("setpriv", "--reuid", "65534", "--clear-groups", "bash", INSTALL.format(FIRST))
    assert (done.returncode, done.stderr) == (1, "Error: this needs root; run it with sudo\n")


# From a clone, and the folder of wheels


def test_from_a_clone(applications: Path, tmp_path: Path) -> None:
    """The package index is a folder here; ensurepip is what Debian's package python3-venv adds."""
    layer = tmp_path / "layer"
    shutil.copytree(Path(ensurepip.__file__).parent, layer / "usr/lib/python3.11/ensurepip")
    clone = layer / "srv" / "clone"
    for name in ("src", "deploy", "requirements"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    index = layer / "srv" / "index"
    shutil.copytree(applications / "srv" / FIRST / "wheelhouse", index)
    shutil.copytree(next((layer / "usr/lib/python3.11/ensurepip").glob("_bundled")), index, dirs_exist_ok=True)
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "-d",
        str(index),
        "hatchling",
    ]
    subprocess.run(fetch, check=True, capture_output=True)
    with running(tmp_path / "host", layers=(layer, applications)) as host:
        environ = {"PATH": PATH, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/index"}
        script = ["bash", "/srv/clone/deploy/install.sh", "--config", "/srv/proxy.toml"]
        done = host.run(*script, environ=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        assert running_version(host) == FIRST
        assert host.out("find", "/tmp", "-name", "tmp.*") == ""
        assert "Nothing to do" in host.run(*script, environ=environ).stdout


def test_wheels_for_another_python_and_machine(tmp_path: Path) -> None:
    """Conditions are judged for the host: all that its Python needs is there, whichever patch version it has."""
    folder = tmp_path / "made"
    command = [sys.executable, str(ROOT / "deploy" / "wheelhouse.py"), str(folder), "--python", "3.12"]
    done = subprocess.run([*command, "--machine", "aarch64"], check=True, capture_output=True, text=True)
    assert done.stdout == f"{folder}: for Python 3.12 on aarch64\n"
    wheels = {path.name for path in (folder / "wheelhouse").iterdir()}
    assert {name.split("-")[0].lower() for name in wheels} >= {"sagemaker_mlflow_proxy", "pip"}
    assert all(name.endswith(("-any.whl", "_aarch64.whl")) for name in wheels)
    assert not any("-cp3" in name and "-cp312-" not in name and "-abi3-" not in name for name in wheels)
    lock = (folder / "requirements.txt").read_text()
    for patch in ("3.12.0", "3.12.9"):
        for entry in wheelhouse.needed(lock, patch, "aarch64"):
            name, number = entry.split(" ")[0].split("==")
            assert any(wheel.lower().startswith(f"{name.replace('-', '_')}-{number}-") for wheel in wheels), entry
    assert (folder / "deploy" / "systemd" / "mlflow-proxy.service").read_bytes() == UNIT.read_bytes()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 2, "the folder is there already"


def test_conditions_of_the_lock_file() -> None:
    lock = (
        "# made by a tool\n"
        "alpha==1.0 ; python_full_version < '3.11.3' \\\n    --hash=sha256:aa\n"
        "beta==1 ; python_full_version < '3.12' \\\n    --hash=sha256:bb\n"
        "beta==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:cc \\\n    --hash=sha256:dd\n"
        "gamma==3 \\\n    --hash=sha256:ee\n"
    )
    found = {
        number: [entry.split(" ")[0] for entry in wheelhouse.needed(lock, number, "x86_64")]
        for number in ("3.11.2", "3.11.9", "3.12.3")
    }
    assert found == {
        "3.11.2": ["alpha==1.0", "beta==1", "gamma==3"],
        "3.11.9": ["beta==1", "gamma==3"],
        "3.12.3": ["beta==2", "gamma==3"],
    }
    assert next(wheelhouse.needed(lock, "3.12.3", "x86_64")).endswith("sha256:cc \\\n    --hash=sha256:dd\n")


# docs/deploy-host.md

PAGE = (ROOT / "docs" / "deploy-host.md").read_text("utf-8")


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of a language under a heading of the page."""
    part = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", part, re.M | re.S)


def test_the_page_does_what_it_says(layers: Layers, tmp_path: Path) -> None:
    """Its commands in order, on a host without network; only installations take the folder of wheels each time."""
    with running(tmp_path / "host", layers=(layers.built[FIRST], layers.applications)) as host:
        shutil.copytree(layers.applications / "srv" / FIRST, host / "/root/mlflow-proxy")
        host.out("tar", "-C", "/root", "-czf", "/root/mlflow-proxy.tar.gz", "mlflow-proxy")
        shutil.rmtree(host / "/root/mlflow-proxy")
        (host / "/etc/mlflow-proxy/environment").unlink()
        folder = "/root"

        def shell(commands: str, code: int = 0) -> str:
            commands = re.sub(
                r"(bash deploy/install.sh)(?= --config|$)", r"\1 --wheelhouse wheelhouse", commands, flags=re.M
            )
            script = f'sudo() {{ "$@"; }}\ncd {folder}\n{commands}'
            done = host.run("bash", "-euo", "pipefail", "-c", script)
            assert done.returncode == code, commands + done.stdout + done.stderr
            return done.stdout

        (toml,) = blocks("Install", "toml")
        (host / "/root/proxy.toml").write_text(toml)
        printed = shell(blocks("Without network", "bash")[1])
        (shown,) = blocks("Install", "text")
        assert printed.splitlines()[1:] == [
            line.replace("0.1.0-854a06f0d2cf", _release(host)) for line in shown.splitlines()[2:]
        ]
        folder = "/root/mlflow-proxy"
        (host / f"{folder}/proxy.toml").write_text(toml)

        keys, secrets, check = blocks("Keys and secrets", "bash")
        assert re.fullmatch(r"mlp_\w+\n", shell(keys))
        shell(secrets)
        assert "1 active API key" in shell(check, code=1)  # no way to AWS from here
        table = re.findall(r"^\| `(/\S+)` \|[^|]*\| (.*) \|$", PAGE, re.M)
        assert len(table) == 9
        for path, owner in table:
            parts = [part.strip("`") for part in owner.split(", ")]
            user, mode = parts[0], parts[1] if len(parts) > 1 else None
            user = user if ":" in user else f"{user}:{user}"
            assert host.out("stat", "-c", f"%U:%G{' %a' if mode else ''}", path) == " ".join(filter(None, (user, mode)))

        certificate, key = Authority(tmp_path, "tests").issue("mlflow.example.com")
        shutil.copy(certificate, host / f"{folder}/cert.pem")
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        old, plain = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        (host / f"{folder}/key.pem").write_bytes(private.private_bytes(serialization.Encoding.PEM, old, plain))
        place, port = blocks("TLS and ports", "bash")
        shell(place + port)
        target = toml[toml.index("[[targets]]") :]
        (host / f"{folder}/proxy.toml").write_text(blocks("TLS and ports", "toml")[0] + target)
        through_script, by_reload = blocks("Change the configuration", "bash")
        assert "Healthy:   https://127.0.0.1:443/-/health" in shell(through_script)
        shell(by_reload)
        assert "Nothing to do" in shell(blocks("Upgrade and rollback", "bash")[0])

        assert host.out("curl", "-sko", "/dev/null", "-w", "%{http_code}", "https://127.0.0.1/-/version") == "401"
        show, bound = blocks("Logs", "bash")
        wait_for(lambda: '"status": 401' in shell(show.splitlines()[0]), "the request is not in the journal")
        shell(bound)
        assert shell(blocks("Uninstall", "bash")[0]) == blocks("Uninstall", "text")[0]


def _release(host: Host) -> str:
    return Path(host.out("readlink", "/opt/mlflow-proxy/current")).name


def test_messages_on_the_page_are_those_of_the_script() -> None:
    script = (ROOT / "deploy" / "install.sh").read_text("utf-8")
    source = script + "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    rows = PAGE.split("\n## Troubleshooting\n", 1)[1]
    quoted = [part.strip() for text in re.findall(r'"([^"]+)"', rows) for part in re.split("…|;|3\\.12", text)]
    shown = "".join(blocks("Install", "text") + blocks("Upgrade and rollback", "text"))
    quoted += re.findall(
        r"did not become healthy at|The journal's last lines:|Going back|runs again, with its configuration", shown
    )
    assert len(quoted) > 15
    assert [part for part in quoted if part not in source] == []


def test_exposure_on_the_page_is_the_units() -> None:
    command = ["systemd-analyze", "security", "--offline=true", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    exposure = re.search(r"Overall exposure level for mlflow-proxy.service: ([\d.]+)", done.stdout)
    assert exposure is not None
    assert f"rates it {exposure[1]} (0 is best; 2.0 is the most that a test lets pass)" in PAGE
