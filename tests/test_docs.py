"""Keeps the documentation true: what it names exists, what it lists is what the code has, and its examples run."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlflow_proxy import cli, configuration, options, settings
from mlflow_proxy.errors import Refusal
from mlflow_proxy.local import Fault, LocalSageMaker
from mlflow_proxy.relay import DROPPED_HEADERS, rewrite_location
from mlflow_proxy.requests import PASSED_HEADERS, SINGLE_HEADERS
from mlflow_proxy.settings import CONFIG_VARIABLE
from mlflow_proxy.targets import Mode, default_endpoint, parse_arn, parse_endpoint
from mlflow_proxy.telemetry.record import Record
from mlflow_proxy.transform import canonical_path, canonical_query

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "mlflow_proxy"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TARGET = '[[targets]]\nname = "team"\narn = "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-tracking-server/team"\n'

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`\n]*`")


class Block(NamedTuple):
    page: str
    language: str
    text: str


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(*languages: str) -> list[Block]:
    found = (Block(name, *match) for name in NAMES for match in _FENCE.findall(read(name)))
    return [block for block in found if block.language in languages]


def block_after(page: str, text: str, language: str) -> str:
    """The first block of a language after a text."""
    rest = read(page).split(text, 1)[1]
    return str(next(body for found, body in _FENCE.findall(rest) if found == language))


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level, without blocks of code."""
    return re.split(r"^#+ ", _FENCE.sub("", read(page)).split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, heads and rules left out; `\\|` is a bar within a cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = {index for index, line in enumerate(lines) if re.fullmatch(r"\|[\s:|-]+\|", line)}
    heads = {index - 1 for index in rules}
    return [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for index, line in enumerate(lines)
        if index not in rules | heads
    ]


def code(cell: str) -> list[str]:
    return [found.strip("`") for found in _CODE.findall(cell)]


def ids(items: list[Block]) -> list[str]:
    return [f"{block.page}-{number}" for number, block in enumerate(items)]


# Links


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", read(name)))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (anchor and anchor not in slugs(to)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    listed = {link.split("#")[0] for link in _LINK.findall(read("docs/README.md"))}
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= listed


# Options


def test_all_options_are_listed_as_the_command_prints_them() -> None:
    assert options.options_markdown() in read("docs/configuration.md"), "paste the output of: mlflow-proxy options"


@pytest.mark.parametrize("name", NAMES)
def test_options_that_are_named_exist(name: str) -> None:
    known = {f"{option.section}.{option.name}" for option in options.options()}
    sections = "|".join({option.section for option in options.options()})
    named = {
        found
        for text in code(_FENCE.sub("", read(name)))
        for found in re.findall(rf"(?<![\w/.])(?:{sections})\.[a-z_]+(?![\w.(])", text)
        if not found.endswith(".py")
    }
    assert named <= known


@pytest.mark.parametrize("name", NAMES)
def test_variables_that_are_named_exist(name: str) -> None:
    known = {option.variable for option in options.options()} | {CONFIG_VARIABLE}
    known |= {f"{settings.ENV_PREFIX}{section}".upper() for section in settings.Settings.model_fields}
    text = re.sub(r"^```text\n.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(rf"{settings.ENV_PREFIX}[A-Z_]+", text))
    assert named <= known


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files with a certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mlflow.example.com")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    folder = tmp_path_factory.mktemp("stubs")
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


TOML = blocks("toml")


@pytest.mark.parametrize("block", TOML, ids=ids(TOML))
def test_configurations_are_without_mistakes(block: Block, stubs: tuple[str, str], tmp_path: Path) -> None:
    """All of them: those without targets are parts, which must fit with any."""
    text = block.text if "[[targets]]" in block.text else f"{block.text}\n{TARGET}"
    certificate, key = stubs
    text = re.sub(r'(tls_certificate|ca_bundle) = "[^"]*"', rf'\1 = "{certificate}"', text)
    text = re.sub(r'tls_key = "[^"]*"', f'tls_key = "{key}"', text)
    file = tmp_path / "proxy.toml"
    file.write_text(text, "utf-8")
    assert configuration.load(file, {}).build_targets()


def test_the_first_configuration_is_short_and_whole() -> None:
    text = block_after("docs/configuration.md", "## Ten lines for real AWS", "toml")
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 10
    assert "[[targets]]" in text


def test_variables_do_what_the_file_does(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    table = rows(section("docs/configuration.md", "## Where values come from"))
    assert len(table) >= 4
    for in_file, in_environment in table:
        file.write_text("\n".join([*code(in_file), TARGET]), "utf-8")
        expected = configuration.load(file, {})
        file.write_text(TARGET, "utf-8")
        name, _, value = shlex.split(code(in_environment)[0])[0].partition("=")
        assert configuration.load(file, {name: value}) == expected != configuration.load(file, {})


def test_targets_from_the_environment() -> None:
    text = block_after("docs/configuration.md", "Targets are one JSON list", "bash")
    name, _, value = shlex.split(text.splitlines()[0])[1].partition("=")
    assert [target.name for target in configuration.load(None, {name: value}).targets] == ["team"]


def test_mistakes_look_as_shown(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(block_after("docs/configuration.md", "This file", "text"), "utf-8")
    shown = block_after("docs/configuration.md", "\ngives\n", "text").splitlines()
    with pytest.raises(configuration.SettingsError) as caught:
        configuration.load(file, {})
    assert [f"  ✗ {problem}" for problem in caught.value.problems] == shown[1:]
    assert shown[0].startswith(f"{len(caught.value.problems)} mistakes")


def test_mistaken_variables_look_as_shown() -> None:
    shown = block_after("docs/configuration.md", "Variables are named as they are written", "text").splitlines()
    with pytest.raises(configuration.SettingsError) as caught:
        configuration.load(None, {"MLFLOW_PROXY_SERVER__PROT": "1", "MLFLOW_PROXY_TARGETS": "team"})
    assert caught.value.problems[:2] == shown


def test_other_machines_need_the_risk_named(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(TARGET, "utf-8")
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        with pytest.raises(configuration.SettingsError, match="i-understand"):
            configuration.load(file, {"MLFLOW_PROXY_SERVER__HOST": host})
        named = {"MLFLOW_PROXY_SERVER__HOST": host, "MLFLOW_PROXY_ACCESS__ANONYMOUS": "i-understand"}
        assert not configuration.load(file, named).listens_on_loopback


JSON = blocks("json")


@pytest.mark.parametrize("block", JSON, ids=ids(JSON))
def test_json_is_json(block: Block) -> None:
    json.loads(block.text)


def test_bounds_of_links() -> None:
    table = {code(row[0])[0]: row for row in rows(section("docs/ui.md", "## By presigned link"))[:2]}
    for name, (_, parameter, option, seconds, default) in table.items():
        field = settings.Ui.model_fields[name.removeprefix("ui.")]
        bounds = [getattr(each, bound) for bound in ("ge", "le") for each in field.metadata if hasattr(each, bound)]
        assert seconds == f"{bounds[0]} to {bounds[1]}"
        assert default == str(field.default)
        assert code(parameter) == [name.removeprefix("ui.")]
        assert code(option) == [f"--{name.removeprefix('ui.').replace('_', '-')}"]


# The protocol


def url_examples() -> list[tuple[str, str]]:
    table = next(
        part for part in section("docs/protocol.md", "## URLs").split("\n\n") if part.startswith("| in | out |")
    )
    return [(code(given)[0], expected) for given, expected in rows(table)]


def _canonical(path: bytes, query: bytes) -> str:
    return canonical_path(path) + (f"?{canonical_query(query)}" if query else "")


@pytest.mark.parametrize(("given", "expected"), url_examples())
def test_urls_come_out_as_shown(given: str, expected: str) -> None:
    path, _, query = given.encode().partition(b"?")
    if expected == "400":
        with pytest.raises(Refusal) as caught:
            _canonical(path, query)
        assert caught.value.status == 400
        return
    assert _canonical(path, query) == (given if expected == "the same" else code(expected)[0])


def test_headers_that_pass_are_those_listed() -> None:
    listed = [code(row[0])[0] for row in rows(section("docs/protocol.md", "## Headers that pass upstream"))]
    assert len(listed) == len(set(listed))
    assert {name.encode() for name in listed} == PASSED_HEADERS


def test_headers_that_may_not_be_doubled_are_those_listed() -> None:
    sentence = re.search(r"^Two of (.+?) get 400", section("docs/protocol.md", "## Headers that pass upstream"), re.M)
    assert sentence is not None
    listed = {name.encode() for name in code(sentence[1])} - {"x-mlflow-…".encode()}
    assert {name for name in SINGLE_HEADERS if not name.startswith(b"x-mlflow-")} == listed
    assert {name for name in PASSED_HEADERS if name.startswith(b"x-mlflow-")} <= SINGLE_HEADERS


def test_headers_that_stay_behind_are_named() -> None:
    text = section("docs/protocol.md", "## Answers").lower()
    hop_by_hop = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
    named = {name.encode() for name in code(text)}
    assert {name for name in DROPPED_HEADERS - hop_by_hop if not name.startswith(b"proxy-")} <= named


def test_redirects_become_what_is_shown() -> None:
    endpoint = parse_endpoint("https://eu-central-1.experiments.sagemaker.aws")
    assert rewrite_location("/runs/7", endpoint, "/t/team") == "/t/team/runs/7"
    assert "`/runs/7` of the target `team` becomes `/t/team/runs/7`" in read("docs/protocol.md")


def test_targets_are_what_is_shown() -> None:
    table = {row[0]: [code(cell)[0] for cell in row[1:]] for row in rows(section("docs/protocol.md", "## Targets"))[:4]}
    for column, mode in enumerate(Mode):
        assert table["resource in the ARN"][column].startswith(f"{mode.resource_type}/")
        assert table["SigV4 service name"][column] == mode.service
        assert table["header that names it"][column] == mode.arn_header
        arn = parse_arn(f"arn:aws:sagemaker:eu-central-1:111122223333:{mode.resource_type}/x")
        assert table["endpoint"][column].replace("<region>", "eu-central-1") == default_endpoint(arn).url


# Operating


def test_log_fields_are_those_listed() -> None:
    listed = [name for row in rows(section("docs/operating.md", "## The log")) for name in code(row[0])]
    assert listed == [*Record("GET", "id").fields(), "error"]
    sample = json.loads(block_after("docs/operating.md", "## The log", "json"))
    assert list(sample) == list(Record("GET", "id").fields())


def test_steps_of_the_check_exist() -> None:
    sample = block_after("docs/operating.md", "## Check a configuration", "text")
    steps = re.findall(r"^  [✓✗?] (\w+)", sample, re.MULTILINE)
    assert len(steps) == 10
    source = (SOURCE / "check.py").read_text("utf-8")
    assert [step for step in steps if f'Step("{step}"' not in source] == []


# What is named exists


def _commands() -> dict[str, click.Command]:
    assert isinstance(cli.main, click.Group)
    return dict(cli.main.commands)


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_their_options_exist(name: str) -> None:
    commands = _commands()
    fenced = "\n".join(body for _, body in _FENCE.findall(read(name)))
    text = "\n".join([fenced, *code(_FENCE.sub("", read(name)))])
    for command, rest in re.findall(r"(?<![\w/-])mlflow-proxy ([a-z]+)\b([^\n|#;&]*)", text):
        assert command in commands, f"mlflow-proxy {command}"
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest)) <= known


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    fenced = "\n".join(body for _, body in _FENCE.findall(read(name)))
    text = "\n".join([fenced, *code(_FENCE.sub("", read(name)))])
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/dependencies.md", "SECURITY.md"])
def test_modules_exist(name: str) -> None:
    modules = set(re.findall(r"(?<![\w/])(?:[a-z_0-9]+/)*[a-z_0-9]+\.py\b", read(name)))
    assert modules
    assert [module for module in modules if not ((SOURCE / module).exists() or (ROOT / module).exists())] == []


def test_every_module_has_its_place_in_the_architecture() -> None:
    """But those of the local SageMaker, which is one part there, and files that only make a folder a package."""
    files = {path.relative_to(SOURCE).as_posix(): path.read_text("utf-8") for path in SOURCE.rglob("*.py")}
    modules = {name for name, text in files.items() if "\nfrom " in text and not name.startswith("local/")}
    assert modules - set(code(read("docs/architecture.md"))) == set()


def test_dependencies_are_those_of_the_project() -> None:
    project = tomllib.loads(read("pyproject.toml"))

    def names(listed: list[Any]) -> set[str]:
        return {re.split(r"[\[<>=~! ]", text, maxsplit=1)[0] for text in listed}

    expected = {
        "## The service": names(project["project"]["dependencies"]),
        "## The extra `local`": names(project["project"]["optional-dependencies"]["local"]),
        "## Development": names(project["dependency-groups"]["dev"]),
        "## Benchmarks": names(project["dependency-groups"]["bench"]),
    }
    for heading, packages in expected.items():
        assert {code(row[0])[0] for row in rows(section("docs/dependencies.md", heading))} == packages
    assert set(project["project"]["optional-dependencies"]) == {"local"}
    assert set(project["dependency-groups"]) == {"dev", "bench"}


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE)


# The local SageMaker


def test_fault_fields_are_those_listed() -> None:
    listed = {name for row in rows(section("docs/local.md", "## Faults")) for name in code(row[0])}
    assert listed == {field.name for field in fields(Fault)}


def _reset(sagemaker: LocalSageMaker) -> None:
    sagemaker.faults.clear()
    url = f"{sagemaker.admin_endpoint}/_local/faults"
    subprocess.run(["curl", "-sf", "-X", "DELETE", url], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def undone(sagemaker: LocalSageMaker) -> Iterator[LocalSageMaker]:
    yield sagemaker
    _reset(sagemaker)


def test_commands_for_faults_and_journal_run(undone: LocalSageMaker) -> None:
    script = block_after("docs/local.md", "## Faults", "bash") + block_after("docs/local.md", "## The journal", "bash")
    script, count = re.subn(r"^LOCAL=\S+", f"LOCAL={undone.admin_endpoint}", script, flags=re.MULTILINE)
    assert count == 1
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"id"') > 10


def test_the_pytest_example_runs(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(block_after("docs/local.md", "## From pytest", "python"), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
