"""Writes the image's software bill of materials (CycloneDX 1.6, JSON) to standard output, in the image's build stage.

It names the Python packages of the environment, the Python that runs them, and the packages of the base's Debian: all
that is installed when the build is done. It says nothing about how the base was made, and gives the same bytes for the
same packages.

    sbom.py <python of the environment> <pyproject.toml>
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

_FIELDS = "${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\n"


def python_packages(python: str, project: str) -> dict[str, Any]:
    """The bill of an environment, with the project itself as what it is about; not validated."""
    command = [str(Path(sys.executable).with_name("cyclonedx-py")), "environment"]
    command += ["--output-reproducible", "--no-validate", "--spec-version", "1.6", "--output-format", "JSON"]
    made = subprocess.run([*command, "--pyproject", project, python], check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    bill: dict[str, Any] = json.loads(made.stdout)
    return bill


def component(kind: str, url: PackageURL) -> dict[str, Any]:
    """One entry, known by its package URL."""
    return {"type": kind, "bom-ref": str(url), "name": url.name, "version": url.version, "purl": str(url)}


def debian_packages() -> Iterator[dict[str, Any]]:
    """What dpkg has installed."""
    release = platform.freedesktop_os_release()
    distribution = f"{release['ID']}-{release['VERSION_ID']}"
    command = ["dpkg-query", "--show", f"--showformat={_FIELDS}"]
    listed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
    for line in sorted(listed.splitlines()):
        name, version, architecture, status = line.split("\t")
        if status == "installed":
            qualifiers = {"arch": architecture, "distro": distribution}
            yield component("library", PackageURL("deb", release["ID"], name, version, qualifiers))


def main(python: str, project: str) -> None:
    """Print the bill, or raise if it does not keep to the schema."""
    bill = python_packages(python, project)
    bill["components"].append(component("platform", PackageURL("generic", None, "python", platform.python_version())))
    bill["components"].extend(debian_packages())
    text = json.dumps(bill, indent=1, sort_keys=True)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        sys.exit(f"the bill of materials breaks its schema: {problem.data}")
    print(text)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
