"""What README tells people to paste works as it stands there, in both modes, for a writer and a reader."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from tests.compat.client_runs import bare_environment
from tests.compat.environments import NEWEST, ROOT, python_of
from tests.faults.proxies import Proxy, Table, running
from tests.integration.conftest import targets_of

from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.local.walkthrough import CLIENT, CURL, ROLES

README = (ROOT / "README.md").read_text("utf-8")
COMMAND = Path(sys.executable).with_name("mlflow-proxy")


class Site(NamedTuple):
    """A proxy like the demo's, and its two keys."""

    proxy: Proxy
    writer: str
    reader: str

    def url(self, mode: str) -> str:
        """What README calls PROXY."""
        return f"http://127.0.0.1:{self.proxy.port}" + ("" if mode == "tracking" else f"/t/{mode}")


def signed_roles(sagemaker: LocalSageMaker) -> list[Table]:
    """README's roles, signed by IAM roles of the same names; the reader's IAM role knows nothing of the App."""
    by_name = {role["name"]: role for role in tomllib.loads(block_with("keys_file", "toml"))["roles"]}
    tags = {"session_tags": True}
    return [
        {**by_name["reader"], "targets": ["tracking"], "assume_role_arn": sagemaker.roles["reader"], **tags},
        {**by_name["reader"], "name": "app-reader", "subjects": ["key:reader"], "targets": ["app"]},
        {**by_name["writer"], "assume_role_arn": sagemaker.roles["writer"], **tags},
    ]


@pytest.fixture(scope="module")
def site(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("readme")
    keys = folder / "keys.jsonl"
    made = {name: make_key(name, name, created=datetime.now(UTC), expires=None) for name in ("writer", "reader")}
    keys.write_text("".join(f"{json.dumps(kept.fields())}\n" for _, kept in made.values()))
    sections: dict[str, Table] = {"access": {"keys_file": str(keys)}, "audit": {"to": str(folder / "audit.jsonl")}}
    roles, environ = signed_roles(sagemaker), sagemaker.environment()
    targets = [each for each in targets_of(sagemaker) if each["name"] != "cross-account"]
    with running(folder, targets, sections=sections, roles=roles, environ=environ) as proxy:
        yield Site(proxy, made["writer"][0], made["reader"][0])


def block_with(text: str, language: str = "bash") -> str:
    """The block of README that holds `text`."""
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if text in block]
    return block


def test_readme_has_the_commands_of_the_demo() -> None:
    assert CURL in block_with("# 7  delete it")
    assert ROLES in block_with("$READER")
    assert CLIENT in block_with("import mlflow")


def shell(lines: list[str], folder: Path, **more: str) -> str:
    """Standard output of a script in which every command must succeed."""
    environment = {**bare_environment("", folder), **more}
    del environment["MLFLOW_TRACKING_URI"]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def curl_lines(site: Site, mode: str) -> list[str]:
    """The block with the seven calls, its first lines changed to this site's address and keys."""
    lines = block_with("# 7  delete it").splitlines()
    assert lines[0].startswith("PROXY=http://127.0.0.1:8080 ")
    assert lines[1].startswith("# PROXY=http://127.0.0.1:8080/t/app ")
    assert lines[2].startswith("KEY=mlp_… ")
    assert lines[3].startswith("READER=mlp_… ")
    return [f"PROXY={site.url(mode)}", f"KEY={site.writer}", f"READER={site.reader}", *lines[4:]]


def test_the_seven_calls(site: Site, mode: str, tmp_path: Path) -> None:
    lines = curl_lines(site, mode)
    assert len([line for line in lines if re.match(r"(?:[A-Z]+=\$\()?curl ", line)]) == 7
    output = shell(lines, tmp_path)
    named = re.match(r"experiment (\d+)\n", output)
    assert named is not None, output
    run = re.search(r"run ([0-9a-f]{32})$", output, re.MULTILINE)
    assert run is not None, output
    answers = _json_values(output)
    search, got, listed, *rest = answers
    assert named[1] in [each["experiment_id"] for each in search["experiments"]]
    assert got["experiment"]["experiment_id"] == named[1]
    assert got["experiment"]["name"].startswith("hello-")
    assert listed["root_uri"].startswith("s3://")
    assert run[1] in listed["root_uri"]
    assert rest == [{}, {}]
    assert "error_code" not in output


def lines_that_start_a_run(lines: list[str]) -> list[str]:
    """Of the seven calls the fourth, in the experiment that is always there."""
    begin, fourth, fifth = map(
        lines.index, ("# 1  make an experiment", "# 4  start a run in it", "# 5  list its artifacts")
    )
    return [*lines[:begin], "EXPERIMENT=0", *lines[fourth:fifth]]


def test_an_error_is_never_taken_for_an_id(site: Site, mode: str, tmp_path: Path) -> None:
    """A refusal has digits, too: those of its request id."""
    lines = curl_lines(site, mode)
    lines[1] = f"KEY={site.reader}"
    output = shell(lines[: lines.index("# 2  find experiments")], tmp_path)
    assert re.fullmatch(r'experiment was not made: \{"error_code": "PERMISSION_DENIED".*\}\n', output)
    output = shell(lines_that_start_a_run(lines), tmp_path)
    assert re.fullmatch(r'run was not made: \{"error_code": "PERMISSION_DENIED".*\}\n', output)


def test_files_go_through_mlflow_by_plain_http(site: Site, mode: str, tmp_path: Path) -> None:
    """As docs/protocol.md shows, up to MLflow's own limit and not beyond; then the error is shown."""
    page = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    (block,) = [
        block for block in re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "upload" in block
    ]
    whole = lines_that_start_a_run(curl_lines(site, mode))
    content = random.randbytes(10 << 20)
    (tmp_path / "model.bin").write_bytes(content)
    output = shell([*whole, block], tmp_path)
    assert '"path": "model/model.bin"' in output
    assert (tmp_path / "downloaded.bin").read_bytes() == content
    (tmp_path / "model.bin").write_bytes(content + b"!")
    output = shell([*whole, f"({block.splitlines()[0]}\n{block.splitlines()[1]}) || true"], tmp_path)
    assert "Max size is 10MB" in output


PLUGIN = """
import logging, mlflow
mlflow.get_experiment("0")
logging.getLogger("mlflow.tracking.request_header.registry").setLevel("ERROR")
print("quiet", file=__import__("sys").stderr)
mlflow.get_experiment("0")
"""


def test_awss_plugin_beside_the_client(site: Site, tmp_path: Path) -> None:
    """This environment has it. The warning, and how to stop it, are those of docs/operating.md."""
    page = (ROOT / "docs" / "operating.md").read_text("utf-8")
    environment = {**bare_environment(site.url("tracking"), tmp_path), "MLFLOW_TRACKING_TOKEN": site.reader}
    done = subprocess.run(
        [sys.executable, "-c", PLUGIN], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    before, _, after = done.stderr.partition("quiet\n")
    warning = "Encountered unexpected error during resolving request headers: list index out of range"
    assert warning in before
    assert warning not in after
    assert warning in page
    assert PLUGIN.splitlines()[3] in page


def test_the_reader_may_look_and_change_nothing(site: Site, mode: str, tmp_path: Path) -> None:
    """The refusal is README's, word for word, but for the role's name on the App and the request id."""
    lines = curl_lines(site, mode)
    commands = lines[: lines.index("# 1  make an experiment")] + block_with("$READER", "bash").splitlines()
    looked, refused = _json_values(shell(commands, tmp_path))
    assert looked["experiments"]
    (shown,) = _json_values(block_with("PERMISSION_DENIED", "json"))
    if mode == "app":
        shown["message"] = shown["message"].replace("target 'tracking'", "target 'app'")
        shown["message"] = shown["message"].replace("The role 'reader'", "The role 'app-reader'")
    assert {**refused, "request_id": ""} == {**shown, "request_id": ""}
    answer = requests.post(
        f"{site.url(mode)}/api/2.0/mlflow/experiments/create",
        json={"name": "never"},
        headers={"Authorization": f"Bearer {site.reader}"},
        timeout=60,
    )
    assert answer.status_code == 403


@pytest.mark.parametrize("place", ["clone", "elsewhere"])
def test_the_client(site: Site, mode: str, place: str, tmp_path: Path) -> None:
    """As printed, in a folder that has the clone's `.venv`, or one with nothing but MLflow in it."""
    lines = block_with("import mlflow").splitlines()
    assert lines[0].startswith("export MLFLOW_TRACKING_URI=http://127.0.0.1:8080 ")
    assert lines[1].startswith("# export MLFLOW_TRACKING_URI=http://127.0.0.1:8080/t/app ")
    venv = Path(sys.prefix) if place == "clone" else python_of(NEWEST).parent.parent
    (tmp_path / ".venv").symlink_to(venv)
    output = shell([f"export MLFLOW_TRACKING_URI={site.url(mode)}", *lines[1:]], tmp_path, KEY=site.writer)
    assert re.search(r"^0 +[0-9a-f]{32} +0\.5$", output, re.MULTILINE), output


def test_a_key_made_as_shown_works_with_the_configuration_as_shown(
    site: Site, sagemaker: LocalSageMaker, tmp_path: Path
) -> None:
    """`mlflow-proxy keys new` of README, with README's `proxy.toml`; and the service with its roles and that file."""
    text = block_with("keys_file", "toml")
    assert len([line for line in text.splitlines() if line]) <= 15
    (tmp_path / "proxy.toml").write_text(text)
    (command,) = [line for line in block_with("keys new").splitlines() if "keys new" in line]
    assert command.startswith("mlflow-proxy ")
    key = shell([f"{COMMAND}{command.removeprefix('mlflow-proxy')}"], tmp_path).strip()
    configured = tomllib.loads(text)
    sections = {"access": {"keys_file": str(tmp_path / configured["access"]["keys_file"])}}
    targets, environ = targets_of(sagemaker)[:1], sagemaker.environment()
    with running(tmp_path / "proxy", targets, sections=sections, roles=configured["roles"], environ=environ) as proxy:
        statuses = [
            requests.post(
                f"http://127.0.0.1:{proxy.port}/api/2.0/mlflow/experiments/search",
                json={"max_results": 1},
                headers={"X-API-Key": shown},
                timeout=60,
            ).status_code
            for shown in (key, site.writer)
        ]
    assert statuses == [200, 401]


def _json_values(text: str) -> list[dict[str, Any]]:
    """All JSON objects in a text, in order."""
    decoder = json.JSONDecoder()
    found = []
    at = text.find("{")
    while at >= 0:
        value, end = decoder.raw_decode(text, at)
        found.append(value)
        at = text.find("{", end)
    return found
