"""What is sent to AWS with the templates: built for the machine in AWS, whole, and only when something changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from infra.application import BuildError, build_application, build_certificate_function
from tests.infra.variants import ROOT

from infra import application


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of its own, so that nothing here writes into this one."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignore)
    for name in ("requirements/base.txt", "infra/certificate/handler.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "deploy" / "helm").mkdir(parents=True)
    (tmp_path / "deploy" / "install.sh").write_text("echo installed\n")
    (tmp_path / "deploy" / "helm" / "Chart.yaml").write_text("")
    return tmp_path


def resolves(folder: Path, platform: str) -> None:
    """pip finds all that the proxy needs in the wheelhouse, for Ubuntu's Python."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--only-binary", ":all:",
               "--find-links", str(folder / "wheelhouse"), "--target", str(folder / "none"), "--python-version", "3.12",
               "--platform", f"manylinux_2_39_{platform}", "--platform", f"manylinux_2_34_{platform}",
               "--platform", f"manylinux_2_28_{platform}", "--platform", f"manylinux2014_{platform}",
               "-r", str(folder / "requirements.txt")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


def test_application_is_whole_for_hosts_without_a_package_index(root: Path) -> None:
    folder = build_application("arm64", root)
    wheels = {path.name for path in (folder / "wheelhouse").iterdir()}
    assert all(name.endswith(("-any.whl", "_aarch64.whl")) for name in wheels)
    assert {name.split("-")[0] for name in wheels} >= {"sagemaker_mlflow_proxy", "pip", "granian", "botocore", "flask"}
    assert (folder / "deploy" / "install.sh").read_text() == "echo installed\n"
    assert not (folder / "deploy" / "helm").exists()
    resolves(folder, "aarch64")

    marker = folder / "marker"
    marker.touch()
    build_application("arm64", root)
    assert marker.exists(), "nothing changed, so nothing is built"
    (root / "deploy" / "helm" / "Chart.yaml").write_text("changed")
    build_application("arm64", root)
    assert marker.exists(), "hosts do not have that"


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
        patched.setattr(application, "_pip", broken)
        with pytest.raises(BuildError, match="no index"):
            build_certificate_function("arm64", root)
    assert (build_certificate_function("arm64", root) / "handler.py").exists()


def test_without_the_installer_it_says_so(root: Path) -> None:
    (root / "deploy" / "install.sh").unlink()
    with pytest.raises(BuildError, match=r"deploy/install\.sh is missing.*compute=fargate"):
        build_application("arm64", root)
