"""What is sent to AWS with the templates: built for the machine in AWS, whole, and only when something changed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from infra.application import BuildError, build_application, build_certificate_function
from packaging.requirements import Requirement
from tests.infra.variants import ROOT, synthesize

from infra import application


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of its own, so that nothing here writes into this one."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignore)
    for name in ("requirements/base.txt", "requirements/tracing.txt", "infra/certificate/handler.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=ignore)
    return tmp_path


def needed(requirements: str, python: str) -> set[str]:
    """What a lock file asks for on a host with that Python: `name-version`."""
    conditions = {"python_version": "3.12", "python_full_version": python, "implementation_name": "cpython"}
    found = map(Requirement, re.findall(r"(?m)^[a-z0-9-]+==[^\\]+", requirements))
    return {
        f"{one.name.replace('-', '_')}-{str(one.specifier).removeprefix('==')}"
        for one in found
        if one.marker is None or one.marker.evaluate({**conditions, "platform_python_implementation": "CPython"})
    }


def test_application_is_whole_for_hosts_without_a_package_index(root: Path) -> None:
    # With the extra `tracing`, which is all that is needed without it, and more: see below.
    folder = build_application("arm64", root, tracing=True)
    wheels = {path.name for path in (folder / "wheelhouse").iterdir()}
    assert all(name.endswith(("-any.whl", "_aarch64.whl")) for name in wheels)
    assert {name.split("-")[0] for name in wheels} >= {
        "sagemaker_mlflow_proxy",
        "pip",
        "uvloop",
        "botocore",
        "flask",
        "opentelemetry_sdk",
    }
    assert {path.name for path in (folder / "deploy").iterdir()} >= {"install.sh", "systemd"}
    assert not (folder / "deploy" / "helm").exists()
    have = {"-".join(name.split("-")[:2]) for name in wheels}
    for python in ("3.12.0", "3.12.99"):
        assert needed((folder / "requirements.txt").read_text(), python) <= have, "judged by the host's Python"
    # What goes to AWS: one file, small enough to be fetched at each start of a host.
    made = synthesize(application=str(folder))
    assert {path.name for path in made.folder.glob("asset.*/*")} >= {"deploy", "wheelhouse", "requirements.txt"}

    marker = folder / "marker"
    marker.touch()
    build_application("arm64", root, tracing=True)
    assert marker.exists(), "nothing changed, so nothing is built"
    (root / "deploy" / "grafana" / "dashboard.json").write_text("changed")
    build_application("arm64", root, tracing=True)
    assert marker.exists(), "hosts do not have that"


def test_hosts_have_the_extra_for_traces_only_where_wanted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def note(*call: str) -> None:
        calls.append(call)
        Path(call[1]).mkdir()

    monkeypatch.setattr(application, "_python", note)
    build_application("x86_64", root)
    ((script, *_, machine),) = calls
    assert (Path(script).name, machine) == ("wheelhouse.py", "x86_64")


def test_lock_with_tracing_is_the_other_one_and_more() -> None:
    """So hosts run the same versions with and without it; `make lock` writes both."""
    base, tracing = (set(_pins(f"requirements/{name}.txt")) for name in ("base", "tracing"))
    assert base < tracing
    # The build takes what one has more than the other, and judges no conditions there.
    assert not [entry for entry in tracing - base if ";" in entry]
    assert {pin.split("==")[0] for pin in tracing - base} >= {"opentelemetry-sdk"}


def _pins(name: str) -> list[str]:
    return re.findall(r"(?m)^[a-z0-9-]+==[^\\\n]+", (ROOT / name).read_text())


def test_function_has_its_library_for_lambda(root: Path) -> None:
    folder = build_certificate_function("x86_64", root)
    assert (folder / "handler.py").read_bytes() == (ROOT / "infra" / "certificate" / "handler.py").read_bytes()
    number = application.LAMBDA_RUNTIME.removeprefix("python").replace(".", "")
    assert [path.name for path in folder.glob("_cffi_backend*")] == [
        f"_cffi_backend.cpython-{number}-x86_64-linux-gnu.so"
    ]
    assert list(folder.glob("cryptography-*.dist-info"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 250 << 20, "Lambda takes no more, unpacked"


def test_changed_function_is_built_anew(root: Path) -> None:
    folder = build_certificate_function("arm64", root)
    (folder / "marker").touch()
    with (root / "infra" / "certificate" / "handler.py").open("a") as file:
        file.write("# changed\n")
    build_certificate_function("arm64", root)
    assert not (folder / "marker").exists()
    assert (folder / "handler.py").read_text().endswith("# changed\n")


def test_interrupted_build_does_not_look_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: str) -> None:
        raise BuildError("no index")

    with monkeypatch.context() as patched:
        patched.setattr(application, "_python", broken)
        with pytest.raises(BuildError, match="no index"):
            build_certificate_function("arm64", root)
    assert (build_certificate_function("arm64", root) / "handler.py").exists()


def test_without_the_installer_it_says_so(root: Path) -> None:
    (root / "deploy" / "install.sh").unlink()
    with pytest.raises(BuildError, match=r"deploy/install\.sh is missing.*compute=fargate"):
        build_application("arm64", root)
