"""The container image: built from its Dockerfile without a daemon, looked at, and run as the documentation says."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Any
from uuid import uuid4

import botocore.session
import pytest
import yaml  # type: ignore[import-untyped]
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.deploy.containers import (
    Container,
    Images,
    Options,
    base_system,
    missing_programs,
    options,
    run,
    running,
    wait_until_healthy,
)
from tests.faults.certificates import Authority
from tests.faults.proxies import free_port

from mlflow_proxy import __version__
from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.configuration import load
from mlflow_proxy.local import Fault, LocalSageMaker
from mlflow_proxy.settings import ENV_PREFIX

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "container"
DOCKERFILE = FOLDER / "Dockerfile"
PAGE = (ROOT / "docs" / "deploy-container.md").read_text("utf-8")
CACHE = ROOT / ".cache" / "container"
NAME = "localhost/mlflow-proxy:1"
PYTHON = "3.13"
USER = 65532
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
PORT = f"{ENV_PREFIX}SERVER__PORT"
SNAPSHOTS = ROOT / "tests" / "infra" / "snapshots"
BUILDERS = ("gcc", "cc", "make", "pip", "pip3", "hatchling", "cyclonedx-py", "git")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems and changing users needs root"),
    pytest.mark.timeout(900),  # the first test waits for the image
]


@dataclass(frozen=True)
class Image:
    """The built image: its configuration, its files, and all that is known of it."""

    config: Mapping[str, Any]
    root: Path
    description: str

    @property
    def health(self) -> list[str]:
        found: list[str] = self.config["Healthcheck"]["Test"]
        return found

    @property
    def packages(self) -> Path:
        return self.root / f"opt/mlflow-proxy/lib/python{PYTHON}/site-packages"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    missing = missing_programs()
    assert not missing, f"needs Debian packages: apt-get install --no-install-recommends {' '.join(missing)}"
    store = Images(tmp_path_factory.mktemp("container") / "store", CACHE)
    yield store
    store.remove()


@pytest.fixture(scope="session")
def image(images: Images) -> Iterator[Image]:
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text(), re.M)
    assert base is not None
    images.add_base(base_system(CACHE), base[1])
    images.build(ROOT, DOCKERFILE, NAME)
    described = images.description(NAME)
    with images.mounted(NAME) as root:
        yield Image(described["Docker"]["config"], root, json.dumps(described))


@pytest.fixture
def shell(image: Image, tmp_path: Path) -> Callable[..., str]:
    """Runs a command in the image as its user, and gives what it prints."""

    def command(*words: str) -> str:
        config = {**image.config, "Entrypoint": []}
        code, printed, said = run(tmp_path / uuid4().hex, image.root, config, Options(), words)
        assert code == 0, said
        return printed

    return command


# The Dockerfile and what goes in


def test_hadolint_has_nothing_to_say() -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_page_lists_the_build_arguments() -> None:
    section = PAGE.split("\n## Build\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`[A-Z`, ]+) \| (`[^|]+`) \| ", section, re.M)
    listed = {
        pair
        for names, values in rows
        for pair in zip(names.strip("`").split("`, `"), values.strip("`").split("`, `"), strict=True)
    }
    arguments = set(re.findall(r"^ARG ([A-Z_]+)=(\S+)$", DOCKERFILE.read_text(), re.M))
    assert listed == {one for one in arguments if one[0] != "SOURCE_DATE_EPOCH"}
    for lock in ("base", "tracing"):
        assert f"`{lock}`" in section
        assert (ROOT / "requirements" / f"{lock}.txt").is_file()
    assert str(DOCKERFILE.relative_to(ROOT)) in section


def test_only_what_the_image_is_made_of_is_sent_to_the_builder(images: Images, tmp_path: Path) -> None:
    everything = tmp_path / "Dockerfile"
    everything.write_text("FROM scratch\nCOPY . /\n")
    images.build(ROOT, everything, "localhost/context:1")
    with images.mounted("localhost/context:1") as root:
        assert {path.name for path in root.iterdir()} == {
            "LICENSE",
            "README.md",
            "deploy",
            "pyproject.toml",
            "requirements",
            "src",
        }
        assert [path.name for path in (root / "deploy").iterdir()] == ["container"]
        assert list(root.rglob("__pycache__")) == []
        assert (root / "src/mlflow_proxy/cli.py").is_file()


# What comes out


def test_the_configuration_is_as_the_page_says(image: Image) -> None:
    section = PAGE.split("## What is in the image", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.M))
    code = {what: re.findall(r"`([^`]+)`", value) for what, value in rows.items()}
    config = image.config
    assert code["user"] == [config["User"]] == [f"{USER}:{USER}"]
    assert code["entry point, command"] == [*config["Entrypoint"], *config["Cmd"]]
    assert [f"{port}/tcp" for port in code["port"]] == list(config["ExposedPorts"])
    assert set(code["variables"]) <= set(config["Env"])
    assert f"MLFLOW_PROXY_CONFIG={code['configuration'][0]}" in config["Env"]
    assert code["must be writable"] == list(config["Volumes"])
    assert code["stop signal"] == [config["StopSignal"]]
    assert (image.root / code["bill of materials"][0].lstrip("/")).is_file()
    assert {one.partition("=")[0] for one in config["Env"] if one.startswith(ENV_PREFIX)} == {
        one.partition("=")[0] for one in code["variables"]
    }
    assert tomllib.loads((image.root / code["configuration"][0].lstrip("/")).read_text()) == {}


def test_labels_name_this_version(image: Image) -> None:
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"] == "docker.io/library/python:3.13-slim-trixie"


def test_nothing_in_it_gives_or_takes_rights(image: Image) -> None:
    privileged, owned, open_to_all = [], [], []
    for folder, names, files in os.walk(image.root):
        if Path(folder) == image.root:
            names.remove("dev")  # each container gets its own
        for name in [*names, *files]:
            found = Path(folder, name).lstat()
            path = Path(folder, name).relative_to(image.root)
            if stat.S_ISREG(found.st_mode) and found.st_mode & (stat.S_ISUID | stat.S_ISGID):
                privileged.append(path)
            if USER in (found.st_uid, found.st_gid):
                owned.append(path)
            if not stat.S_ISLNK(found.st_mode) and found.st_mode & stat.S_IWOTH:
                open_to_all.append(str(path))
    assert privileged == []
    assert owned == []
    assert set(open_to_all) <= {"tmp", "var/tmp", "run/lock"}


def test_nothing_that_builds_or_installs_is_left(image: Image, shell: Callable[..., str]) -> None:
    look = f"for name in {' '.join(BUILDERS)}; do command -v $name; done; true"
    assert shell("sh", "-c", look) == ""
    modules = "pip ensurepip hatchling cyclonedx setuptools"
    find = f"import importlib.util; print(*(importlib.util.find_spec(name) for name in {modules.split()}))"
    assert set(shell("python", "-c", find).split()) == {"None"}
    library = image.root / f"usr/lib/python{PYTHON}"
    assert list(library.glob("site-packages/pip*")) == []
    assert list(library.glob("ensurepip*")) == []
    assert not (image.root / "tools").exists()
    assert not (image.root / "source").exists()


def test_no_secret_of_the_build_is_kept(image: Image) -> None:
    assert not (image.root / "run/secrets").exists()
    assert not (image.root / "etc/pip.conf").exists()
    assert "pip.conf" not in image.description
    assert "ca.pem" not in image.description


def test_all_code_is_compiled_in_advance(image: Image) -> None:
    """With bytecode that is never compared with its source, of the Python that runs it."""
    sources = [path for path in image.packages.rglob("*.py") if "__pycache__" not in path.parts]
    sources += (image.root / f"usr/lib/python{PYTHON}").glob("*.py")
    assert len(sources) > 500
    compiled = [path.parent / "__pycache__" / f"{path.stem}.cpython-313.pyc" for path in sources]
    assert [path for path in compiled if not path.is_file()] == []
    mine = (image.packages / "mlflow_proxy/__pycache__/cli.cpython-313.pyc").read_bytes()
    assert int.from_bytes(mine[4:8], "little") == 0b01  # hash-based, not checked (PEP 552)
    assert mine[2:4] == MAGIC_NUMBER[2:4]


# The bill of materials


@pytest.fixture(scope="session")
def bill(image: Image) -> Mapping[str, Any]:
    text = (image.root / "usr/share/sbom/mlflow-proxy.cdx.json").read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


def of_kind(bill: Mapping[str, Any], kind: str) -> dict[str, str]:
    components = [one for one in bill["components"] if one["purl"].startswith(f"pkg:{kind}/")]
    found = {one["name"]: one["version"] for one in components}
    assert len(found) == len(components)
    return found


def test_a_broken_bill_would_be_noticed(bill: Mapping[str, Any]) -> None:
    broken = json.dumps({**bill, "components": [{"name": "nothing else"}]})
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_the_bill_names_exactly_the_locked_packages(bill: Mapping[str, Any]) -> None:
    lock = (ROOT / "requirements/base.txt").read_text("utf-8").replace("\\\n", "")
    locked = [Requirement(line.split("--hash")[0]) for line in lock.splitlines() if re.match(r"[a-z0-9]", line)]
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    expected = {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in locked
        if one.marker is None or one.marker.evaluate(environment)
    }
    found = {canonicalize_name(name): version for name, version in of_kind(bill, "pypi").items()}
    assert found == expected
    about = bill["metadata"]["component"]
    assert (about["name"], about["version"]) == ("sagemaker-mlflow-proxy", __version__)
    needs = {one["ref"]: one.get("dependsOn", []) for one in bill["dependencies"]}
    assert len(needs[about["bom-ref"]]) >= 15


def test_the_bill_names_exactly_the_packages_of_the_base(bill: Mapping[str, Any], image: Image) -> None:
    entries = (image.root / "var/lib/dpkg/status").read_text("utf-8").strip().split("\n\n")
    installed = {}
    for entry in entries:
        fields = dict(re.findall(r"^([\w-]+): (.*)$", entry, re.M))
        if fields["Status"] == "install ok installed":
            installed[fields["Package"]] = fields["Version"]
    assert of_kind(bill, "deb") == installed
    assert "libssl3t64" in installed
    assert of_kind(bill, "generic")["python"].startswith(f"{PYTHON}.")


def test_the_page_shows_entries_as_they_are(bill: Mapping[str, Any]) -> None:
    shown = PAGE.split("## The bill of materials", 1)[1].split("```text\n", 1)[1].split("```", 1)[0].split()
    urls = [re.sub(r"@[^?]+", "", one["purl"]) for one in bill["components"]]
    architecture = os.uname().machine.replace("x86_64", "amd64").replace("aarch64", "arm64")
    for line in shown:
        if line != "…":
            assert re.sub(r"@[^?]+", "", line).replace("amd64", architecture) in urls


# Running


def commands(heading: str) -> list[str]:
    """The `docker run` commands below a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [found.strip() for found in re.findall(r"^docker run (?:.*\\\n)*.*\n", section, re.M)]


def call(port: int, path: str, key: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def configured(folder: Path, sagemaker: LocalSageMaker) -> None:
    """The folder that the page makes, with the local SageMaker's target in place of the one on AWS."""
    heredoc = re.search(r"<<'END'\n(.*?)^END$", PAGE, re.M | re.S)
    assert heredoc is not None
    folder.mkdir()
    file = folder / "proxy.toml"
    file.write_text(heredoc[1])
    load(file, {})
    file.write_text(heredoc[1].split("[[targets]]")[0] + sagemaker.proxy_toml())
    for path in (folder, file):
        os.chown(path, USER, USER)


class Started:
    """A container that serves, as the page starts it."""

    def __init__(self, container: Container, port: int, key: str) -> None:
        self.container, self.port, self.key = container, port, key


@pytest.fixture
def started(image: Image, sagemaker: LocalSageMaker, tmp_path: Path) -> Iterator[Started]:
    """The page's commands, one after the other."""
    mounted = tmp_path / "proxy"
    configured(mounted, sagemaker)
    make, serve = (command.replace("$PWD", str(tmp_path)) for command in commands("Run"))
    told, name, arguments = options(make, {})
    assert name == NAME.rpartition("/")[2]
    code, printed, said = run(tmp_path / "keys", image.root, image.config, told, arguments)
    assert code == 0, said
    told, name, arguments = options(serve, sagemaker.environment())
    assert (name, arguments) == ("mlflow-proxy:1", [])
    assert told.published == ("127.0.0.1:8080:8080",)
    port = free_port()
    told = replace(told, environ={**sagemaker.environment(), **told.environ, PORT: str(port)})
    with running(tmp_path / "serve", image.root, image.config, told) as container:
        wait_until_healthy(container, image.health)
        yield Started(container, port, printed.strip())


def test_the_page_starts_it_with_as_few_rights_as_there_are() -> None:
    told, *_ = options(commands("Run")[1], {})
    assert told.read_only
    assert not told.new_privileges
    assert told.capabilities == ()
    assert told.tmpfs == ("/tmp",)
    assert told.user is None
    assert all(read_only for _, _, read_only in told.binds)
    by_variables, *_ = options(commands("Configure by variables")[0], {})
    assert replace(by_variables, environ={}, binds=told.binds, stop_seconds=told.stop_seconds) == told


def test_it_serves_with_nothing_writable_but_tmp(started: Started, sagemaker: LocalSageMaker) -> None:
    status, body = call(started.port, SEARCH, started.key)
    assert status == 200, body
    assert b"experiments" in body
    assert call(started.port, SEARCH, "mlp_wrongkey_x")[0] == 401
    process = Path(f"/proc/{started.container.pid}/status").read_text()
    facts = dict(re.findall(r"^(\w+):\s+(.*)$", process, re.M))
    assert facts["Uid"].split() == facts["Gid"].split() == [str(USER)] * 4
    assert {facts[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert facts["NoNewPrivs"] == "1"
    refused = started.container.execute("sh", "-c", "touch /x /opt/x /etc/x /home/x /var/tmp/x; ls -A /tmp")
    assert refused.stderr.count("Read-only file system") == 5
    assert len(refused.stdout.split()) == 1  # the workers' folder
    checked = started.container.execute("mlflow-proxy", "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_health_is_told_apart_from_its_absence(started: Started, image: Image) -> None:
    test = image.health[1:]
    assert started.container.execute(*test).returncode == 0
    nobody = started.container.execute(*test, environ={PORT: str(free_port())})
    assert nobody.returncode == 1
    assert "no answer from 0.0.0.0" in nobody.stderr


def test_stopping_waits_for_a_request_under_way(started: Started, image: Image, sagemaker: LocalSageMaker) -> None:
    answers: list[tuple[int, bytes]] = []
    number = sagemaker.faults.add(Fault(latency=2, path="experiments/search", requests=1))
    try:
        caller = threading.Thread(target=lambda: answers.append(call(started.port, SEARCH, started.key)))
        caller.start()
        end = time.monotonic() + 30
        while not [fault for fault in sagemaker.faults.state() if fault["id"] == number and fault["hits"]]:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not answers
        assert started.container.stop(image.config["StopSignal"]) == 0
        caller.join(30)
    finally:
        sagemaker.faults.remove(number)
    assert [status for status, _ in answers] == [200]


def test_https_and_any_user_are_healthy_too(image: Image, tmp_path: Path) -> None:
    """A platform may choose the number of the user, as OpenShift does. Certificates are not for loopback."""
    authority = Authority(tmp_path, "authority")
    folder = tmp_path / "proxy"
    folder.mkdir()
    for file, name in zip(authority.issue("mlflow.example.com"), ("tls.crt", "tls.key"), strict=True):
        (folder / name).write_bytes(file.read_bytes())
    (folder / "proxy.toml").touch()
    told, *_ = options(commands("Configure by variables")[0], {})
    section = f"{ENV_PREFIX}SERVER__"
    environ = {
        **told.environ,
        "AWS_EC2_METADATA_DISABLED": "true",
        PORT: str(free_port()),
        f"{section}TLS_CERTIFICATE": "/etc/mlflow-proxy/tls.crt",
        f"{section}TLS_KEY": "/etc/mlflow-proxy/tls.key",
    }
    binds = ((str(folder), "/etc/mlflow-proxy", True),)
    told = replace(told, user="1000720000:0", environ=environ, binds=binds)
    with running(tmp_path / "serve", image.root, image.config, told) as container:
        wait_until_healthy(container, image.health)
        with pytest.raises((OSError, HTTPException)):
            call(int(environ[PORT]), "/-/health", "none")
        assert container.stop(image.config["StopSignal"]) == 0


def test_compose_says_the_same_as_the_command() -> None:
    service = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["proxy"]
    told, name, _ = options(commands("Run")[1], dict.fromkeys(service["environment"], "x"))
    assert service.pop("image") == name
    assert service.pop("restart") == "unless-stopped"
    assert service.pop("read_only") is told.read_only
    assert tuple(service.pop("tmpfs")) == told.tmpfs
    assert service.pop("cap_drop") == ["ALL"]
    assert service.pop("security_opt") == ["no-new-privileges"]
    assert service.pop("stop_grace_period") == f"{told.stop_seconds}s"
    assert tuple(service.pop("ports")) == told.published
    assert [one.replace("./", "$PWD/") for one in service.pop("volumes")] == [
        f"{source}:{to}:ro" for source, to, _ in told.binds
    ]
    assert set(service.pop("environment")) == set(told.environ)
    assert service == {}


def test_stopping_leaves_time_to_drain() -> None:
    told, *_ = options(commands("Run")[1], {})
    assert told.stop_seconds > load(FOLDER / "proxy.toml", _one_target()).server.drain_timeout


def _one_target() -> dict[str, str]:
    told, *_ = options(commands("Configure by variables")[0], {})
    return dict(told.environ)


# Fargate


def task(mode: str) -> Mapping[str, Any]:
    """The container of the CDK application's task definition, as reviewers see it."""
    text = (SNAPSHOTS / f"flaskapp-{mode}-fargate-self-signed.yaml").read_text("utf-8")
    resources = yaml.safe_load(text)["Resources"].values()
    (definition,) = (one for one in resources if one["Type"] == "AWS::ECS::TaskDefinition")
    (container,) = definition["Properties"]["ContainerDefinitions"]
    found: dict[str, Any] = container
    return found


def with_local_places(
    variables: Mapping[str, str], sagemaker: LocalSageMaker, arn: str, keys: str, port: int
) -> dict[str, str]:
    """The variables of a task, with what AWS would fill in exchanged for what is here."""
    targets = json.loads(variables[f"{ENV_PREFIX}TARGETS"])
    roles = json.loads(variables[f"{ENV_PREFIX}ROLES"])
    filled = {name: re.sub(r"\$\{[^}]+\}", "balancer.example.com", value) for name, value in variables.items()}
    return filled | {
        PORT: str(port),
        f"{ENV_PREFIX}ACCESS__KEYS_SECRET": keys,
        f"{ENV_PREFIX}TARGETS": json.dumps([{**one, "arn": arn, "endpoint": sagemaker.endpoint} for one in targets]),
        f"{ENV_PREFIX}ROLES": json.dumps(
            [{**role, "assume_role_arn": sagemaker.roles[role["name"]]} for role in roles]
        ),
        f"{ENV_PREFIX}LIMITS__STORAGE": f"rediss://127.0.0.1:{free_port()}/0",  # away: then each task counts alone
    }


@pytest.mark.parametrize("mode", ["tracking", "serverless"])
def test_a_fargate_task_serves(mode: str, image: Image, sagemaker: LocalSageMaker, tmp_path: Path) -> None:
    container = task(mode)
    assert container.keys().isdisjoint({"Command", "EntryPoint", "User", "WorkingDirectory"})
    # The others are for the agent of ECS Exec, which is not here.
    (mount,) = (mount for mount in container["MountPoints"] if mount["ContainerPath"] in image.config["Volumes"])
    assert [one["ContainerPort"] for one in container["PortMappings"]] == [8080]
    # ECS copies what the image has at the volume's folder, owner and mode included (its guide, "Use bind mounts").
    volume = tmp_path / "volume"
    volume.mkdir()
    inside = (image.root / mount["ContainerPath"].lstrip("/")).stat()
    os.chown(volume, inside.st_uid, inside.st_gid)
    volume.chmod(stat.S_IMODE(inside.st_mode))

    environment = sagemaker.environment()
    text, key = make_key("task", "writer", created=datetime.now(UTC).replace(microsecond=0), expires=None)
    session: Any = botocore.session.Session()
    secrets = session.create_client(
        "secretsmanager",
        region_name=sagemaker.region,
        endpoint_url=sagemaker.moto_endpoint,
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )
    name = f"mlflow-proxy/{uuid4().hex}"
    secret = secrets.create_secret(Name=name, SecretString=json.dumps(key.fields()) + "\n")["ARN"]

    variables = {one["Name"]: one["Value"] for one in container["Environment"]}
    port = free_port()
    arn = sagemaker.tracking_arn if mode == "tracking" else sagemaker.app_arn
    environ = with_local_places(variables, sagemaker, arn, secret, port)
    assert set(environ) == set(variables)
    told = Options(
        read_only=container["ReadonlyRootFilesystem"],
        binds=((str(volume), mount["ContainerPath"], mount["ReadOnly"]),),
        environ={**environment, "AWS_ENDPOINT_URL_SECRETS_MANAGER": sagemaker.moto_endpoint, **environ},
        stop_seconds=container["StopTimeout"],
    )
    with running(tmp_path / "task", image.root, image.config, told) as running_task:
        wait_until_healthy(running_task, image.health)
        assert len(list(volume.iterdir())) == 1
        status, body = call(port, SEARCH, text)
        assert status == 200, (body, running_task.errors.read_text())
        assert call(port, SEARCH, "mlp_wrongkey_x")[0] == 401
        assert running_task.stop(image.config["StopSignal"]) == 0
    assert list(volume.iterdir()) == []
    secrets.delete_secret(SecretId=secret, ForceDeleteWithoutRecovery=True)
