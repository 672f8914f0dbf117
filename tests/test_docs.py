"""Keeps the documentation true: what it names exists, what it lists is what the code has, and its examples run."""

import base64
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.access.test_actions import AWS_READS, AWS_WRITES

from mlflow_proxy import cli, configuration, options, settings
from mlflow_proxy.access.actions import routes
from mlflow_proxy.access.caller import Caller
from mlflow_proxy.access.identity import Identity
from mlflow_proxy.access.own_pages import own_page
from mlflow_proxy.access.policy import Policy
from mlflow_proxy.aws.role_sessions import role_session
from mlflow_proxy.errors import Refusal
from mlflow_proxy.local import Fault, LocalSageMaker
from mlflow_proxy.relay import DROPPED_HEADERS, rewrite_location
from mlflow_proxy.requests import PASSED_HEADERS, SINGLE_HEADERS
from mlflow_proxy.settings import CONFIG_VARIABLE, KEY_VARIABLE
from mlflow_proxy.targets import Mode, default_endpoint, parse_arn, parse_endpoint
from mlflow_proxy.telemetry.audit import AuditLog
from mlflow_proxy.telemetry.metrics import FAMILIES, LIMITS, PREFIX, UPSTREAM_ERRORS
from mlflow_proxy.telemetry.record import Record
from mlflow_proxy.telemetry.resources import NotLookedInto
from mlflow_proxy.transform import canonical_path, canonical_query

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "mlflow_proxy"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TARGET = '[[targets]]\nname = "team"\narn = "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-tracking-server/team"\n'
KEYS_AND_A_ROLE = '[access]\nkeys_file = "keys.jsonl"\n[[roles]]\nname = "a"\ntargets = ["*"]\nallow = ["*"]\n'
# The pages on ways of identifying, and what turns each on.
WAYS = {
    "docs/access-keys.md": ("access", "keys_file"),
    "docs/access-tokens.md": ("oidc", "issuer"),
    "docs/access-browser.md": ("oidc", "client_id"),
    "docs/access-load-balancer.md": ("load_balancer", "arn"),
    "docs/access-certificates.md": ("certificates", "subject_header"),
}

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
    known = {option.variable for option in options.options()} | {CONFIG_VARIABLE, KEY_VARIABLE}
    known |= {f"{settings.ENV_PREFIX}{section}".upper() for section in settings.Settings.model_fields}
    text = re.sub(r"^```text\n.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(rf"{settings.ENV_PREFIX}[A-Z_]+", text))
    assert named <= known


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate, its key, and a secret."""
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
    (folder / "secret").write_bytes(bytes(32))
    return folder


# Options that name files, and what is put in their place.
_FILES = {
    "tls_certificate|ca_bundle": "cert.pem",
    "tls_key": "key.pem",
    "client_secret_file|session_secret_file": "secret",
    "keys_file": "keys.jsonl",
    "to": "audit.jsonl",
}
TOML = blocks("toml")


def load(block: Block, folder: Path) -> settings.Settings:
    """A block as a configuration: one without targets is a part, which must fit with any. Files are in `folder`."""
    text = block.text if "[[targets]]" in block.text else f"{block.text}\n{TARGET}"
    for names, file in _FILES.items():
        text = re.sub(rf'^({names}) = "[\w./-]*"', rf'\1 = "{folder / file}"', text, flags=re.MULTILINE)
    config = folder / "proxy.toml"
    config.write_text(text, "utf-8")
    return configuration.load(config, {})


@pytest.mark.parametrize("block", TOML, ids=ids(TOML))
def test_configurations_are_without_mistakes(block: Block, stubs: Path) -> None:
    assert load(block, stubs).build_targets()


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
    exports = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("export ")]
    loaded = configuration.load(None, dict(export.split("=", 1) for export in exports))
    assert [target.name for target in loaded.targets] == ["team"]
    assert [role.name for role in loaded.roles] == ["writer"]
    assert loaded.identifies


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
    file.write_text(f"{KEYS_AND_A_ROLE}{TARGET}", "utf-8")
    assert not configuration.load(file, {"MLFLOW_PROXY_SERVER__HOST": "0.0.0.0"}).listens_on_loopback


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


# Who may do what


@pytest.mark.parametrize("page", WAYS)
def test_each_way_of_identifying_has_a_configuration_that_works_as_pasted(page: str, stubs: Path) -> None:
    """Whole but for targets: it identifies callers this way, and gives somebody a role."""
    loaded = [load(block, stubs) for block in TOML if block.page == page and "[[roles]]" in block.text]
    section_name, option = WAYS[page]
    assert getattr(getattr(loaded[0], section_name), option)
    for each in loaded:
        assert each.identifies
        assert all(role.allow for role in each.roles)


def test_every_way_of_identifying_has_its_page() -> None:
    assert {f"docs/{page.name}" for page in DOCS.glob("access-*.md")} == WAYS.keys()
    table = rows(section("docs/access.md", "## How a caller is identified"))
    linked = {f"docs/{link}" for row in table for link in _LINK.findall(row[2])}
    assert linked == WAYS.keys()


def test_ways_of_identifying_are_asked_in_the_order_shown() -> None:
    """The order in which `Identity` looks at what was presented, as its source has it."""
    looked = re.findall(r'b"([a-z-]+)" in presented', inspect.getsource(Identity))
    looked = list(dict.fromkeys(looked))
    assert {"x-api-key", "authorization", "x-amzn-oidc-data", "cookie"} == set(looked)
    shown = " ".join(row[1] for row in rows(section("docs/access.md", "## How a caller is identified"))).lower()
    places = [shown.index(name) for name in looked]
    assert places == sorted(places)


def test_a_refusal_looks_as_shown(stubs: Path) -> None:
    (block,) = [block for block in TOML if block.page == "docs/access.md" and "scientist" in block.text]
    loaded = load(block, stubs)
    policy = Policy(loaded.roles, loaded.build_targets())
    shown = json.loads(block_after("docs/access.md", "Who may not gets 403", "json"))
    with pytest.raises(Refusal) as caught:
        policy.decide(Caller("user:bob", "token", frozenset({"data-x"})), "team", "DeleteRun")
    assert caught.value.status == 403
    assert shown == json.loads(caught.value.answer(shown["request_id"])[2])
    scientist = Caller("user:alice@example.com", "token")
    assert policy.decide(scientist, "team", "DeleteRun").role == "scientist"
    for denied in ("DeleteExperiment", "CreateRegisteredModel"):
        with pytest.raises(Refusal, match="denies"):
            policy.decide(scientist, "team", denied)


def test_actions_are_those_listed() -> None:
    """By kind, those of AWS's own list apart."""
    writes = {action.name: action.writes for _, _, action in routes() if not action.by_body}
    reaching = {name for name in writes if writes[name] and name.startswith(("Invoke", "Test", "Presign", "Inspect"))}
    kinds = {
        "reads": {name for name in writes if not writes[name]},
        "writes": {name for name in writes if writes[name]} - reaching,
        "reaches out, hands out, or shows": reaching,
    }
    aws = AWS_READS | AWS_WRITES
    table = [row for row in rows(section("docs/access.md", "## Actions")) if row[0] in kinds]
    assert {row[0]: (set(code(row[1])), set(code(row[2]))) for row in table} == {
        kind: (names & aws, names - aws) for kind, names in kinds.items()
    }
    assert all(name.startswith(("Get", "List", "Search", "Access")) for name in kinds["reads"])


def test_own_pages_need_what_is_said() -> None:
    table = {code(row[0])[0]: row[3] for row in rows(section("docs/operating.md", "## Health, readiness, version"))}
    assert table.pop("/-/health") == "nothing"
    assert table
    for path, needs in table.items():
        action = own_page(path).action
        assert not own_page(path).stranger
        assert needs == (f"a role that allows `{action}`" if action else "any role")


def test_role_sessions_are_called_as_shown() -> None:
    role = settings.RoleSettings(
        name="writer",
        targets=["*"],
        assume_role_arn="arn:aws:iam::111122223333:role/x",
        session_tags=True,
        source_identity=True,
    )
    sessions = [role_session(role, subject, "eu-central-1") for subject in ("user:alice@example.com", "key:ci")]
    name, caller, of_role, source = rows(section("docs/access.md", "## As which IAM role"))
    assert [code(cell)[0] for cell in name[1:]] == [session.session_name for session in sessions]
    assert [code(cell)[0] for cell in caller[1:]] == [dict(session.tags)["caller"] for session in sessions]
    assert [code(cell)[0] for cell in of_role[1:]] == [dict(session.tags)["role"] for session in sessions]
    assert source[1:] == ["as the session name"] * 2
    assert [session.source_identity for session in sessions] == [session.session_name for session in sessions]
    changed = dict(role_session(role, "cert:CN=trainer,O=Example", "eu-central-1").tags)["caller"]
    assert f"`{changed}` for `cert:CN=trainer,O=Example`" in read("docs/access.md").replace("\n", " ")


def test_the_commands_for_keys_run(tmp_path: Path) -> None:
    """Make, list, rotate and revoke, in the order shown; then what reads the list, and changes a copy of a secret."""
    page = "docs/access-keys.md"
    config = next(block.text for block in TOML if block.page == page)
    config = config.replace("/etc/mlflow-proxy/", f"{tmp_path}/")
    (tmp_path / "proxy.toml").write_text(f"{config}\n{TARGET}", "utf-8")
    copies = re.findall(r"^mlflow-proxy keys new .*--file.*$", read(page), re.MULTILINE)
    assert len(copies) == 2
    script = block_after(page, "## Make, list, rotate, revoke", "bash") + block_after(
        page, "`keys list --json`", "bash"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([script, "rm keys.jsonl", *copies])],
        cwd=tmp_path,
        env={"PATH": path, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^mlp_\w+$", done.stdout, re.MULTILINE)) == 4
    table = block_after(page, "## Make, list, rotate, revoke", "text")
    assert table.splitlines()[0].split() in [line.split() for line in done.stdout.splitlines()]
    fields_of_a_key = json.loads((tmp_path / "keys.jsonl").read_text().splitlines()[0]).keys()
    assert list(json.loads(block_after(page, "## The keys file", "json"))) == list(fields_of_a_key)
    listed = [code(row[0])[0] for row in rows(section(page, "## The keys file"))[:8]]
    assert listed == [*fields_of_a_key, "ends", "revoked"]


def test_a_token_is_shown_as_said() -> None:
    claims = {"sub": "alice", "groups": ["ü>?"]}
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    command = block_after("docs/access-tokens.md", "What a token says of itself", "bash")
    script = f"TOKEN=e30.{part}.x\n{command}"
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == claims


def test_verdicts_of_limits_are_those_listed() -> None:
    table = [row for row in rows(section("docs/limits.md", "## What callers get")) if row[0] in ("429", "503")]
    listed = [code(row[1])[0] for row in table]
    assert set(listed) == LIMITS - {"waited"}
    assert len(listed) == len(set(listed))


def test_audit_events_and_fields_are_those_listed(tmp_path: Path) -> None:
    """As requests and the command for keys write them; those of sign-in are few, and have tests of their own."""
    file = tmp_path / "audit.jsonl"
    log = AuditLog(str(file))
    for action, status in (("DeleteRun", 200), ("DeleteRun", 403), ("CreatePresignedMlflowAppUrl", 200)):
        record = Record("POST", "id")
        record.writes, record.action, record.status, record.error = True, action, status, "why"
        record.not_looked_into, record.repeated = "opaque", 1
        log.request(record)
    log.close()
    config = tmp_path / "proxy.toml"
    text = KEYS_AND_A_ROLE.replace("keys.jsonl", str(tmp_path / "keys.jsonl"))
    config.write_text(f'{text}{TARGET}[audit]\nto = "{file}"\n', "utf-8")
    for arguments in (["new", "--name", "ci", "--role", "a"], ["rotate", "ci"], ["revoke", "ci"]):
        done = CliRunner().invoke(cli.main, ["keys", *arguments, "-c", str(config)])
        assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    listed = {name for row in rows(section("docs/audit.md", "## Schema")) for name in code(row[0])}
    assert set().union(*lines) | {"lines"} == listed
    events = [name for row in rows(section("docs/audit.md", "## What is in it")) for name in code(row[0])]
    rest = {"sign-in", "sign-in-failed", "sign-out", "lines-dropped"}
    assert {line["event"] for line in lines} | rest == set(events)
    source = (SOURCE / "portal/signin.py").read_text("utf-8") + (SOURCE / "telemetry/audit.py").read_text("utf-8")
    assert all(f'"{event}"' in source or f"'{event}'" in source for event in rest)
    reasons = {name for row in rows(section("docs/audit.md", "## What is not looked into")) for name in code(row[0])}
    assert reasons == {*get_args(NotLookedInto)} - {""}


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
    assert listed == [*Record("GET", "id").fields(), "repeated", "error"]
    sample = json.loads(block_after("docs/operating.md", "## The log", "json"))
    assert list(sample) == list(Record("GET", "id").fields())


def test_metrics_are_those_listed() -> None:
    table = rows(section("docs/operating.md", "## Metrics"))
    listed = {code(row[0])[0]: (row[1], tuple(code(row[2]))) for row in table}
    assert listed == {PREFIX + name: (family.kind, family.labels) for name, family in FAMILIES.items()}


def test_kinds_of_upstream_errors_are_those_listed() -> None:
    points = section("docs/operating.md", "## Metrics").split("\n- ")
    (point,) = [point for point in points if point.startswith("`kind` is")]
    assert set(code(point)) - {"kind"} == UPSTREAM_ERRORS


@pytest.mark.parametrize("name", NAMES)
def test_metrics_that_are_named_exist(name: str) -> None:
    named = {found for text in code(_FENCE.sub("", read(name))) for found in re.findall(rf"^{PREFIX}\w+$", text)}
    assert named <= {PREFIX + family for family in FAMILIES}


@pytest.mark.parametrize("name", NAMES)
def test_alerts_that_are_named_exist(name: str) -> None:
    rules = set(re.findall(r"- alert: (\w+)", read("deploy/grafana/alerts.yml")))
    assert set(re.findall(r"`(MlflowProxy\w+)`", read(name))) <= rules


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
    for called, rest in re.findall(r"(?<![\w/-])mlflow-proxy ([a-z]+)\b([^\n|#;&]*)", text):
        assert called in commands, f"mlflow-proxy {called}"
        command = commands[called]
        part = re.match(r" ([a-z]+)\b", rest)
        if isinstance(command, click.Group) and part is not None:
            assert part[1] in command.commands, f"mlflow-proxy {called} {part[1]}"
            command = command.commands[part[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest)) <= known, f"mlflow-proxy {called}{rest}"


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    fenced = "\n".join(body for _, body in _FENCE.findall(read(name)))
    text = "\n".join([fenced, *code(_FENCE.sub("", read(name)))])
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/dependencies.md", "docs/security.md"])
def test_modules_exist(name: str) -> None:
    modules = set(re.findall(r"(?<![\w/])(?:[a-z_0-9]+/)*[a-z_0-9]+\.py\b", read(name)))
    assert modules
    places = (SOURCE, ROOT, ROOT / "infra")
    assert [module for module in modules if not any((place / module).exists() for place in places)] == []


def test_each_control_has_a_test_that_exists() -> None:
    page = read("docs/security.md").split("\n## Threats, controls, tests\n")[1].split("\n## ")[0]
    controls = rows(page)
    assert len(controls) > 50
    for control, _, shown in controls:
        tests = re.findall(r"\[`(\w+)`\]\(\.\./(tests/[^)]+\.py)\)", shown)
        assert tests, control
        for function, file in tests:
            assert re.search(rf"^ *(async )?def {function}\(", read(file), re.MULTILINE), f"{file}::{function}"


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
        "## The extra `tracing`": names(project["project"]["optional-dependencies"]["tracing"]),
        "## The extra `local`": names(project["project"]["optional-dependencies"]["local"]),
        "## Development": names(project["dependency-groups"]["dev"]),
        "## Benchmarks": names(project["dependency-groups"]["bench"]),
        "## Deployment": names(project["dependency-groups"]["infra"]),
    }
    for heading, packages in expected.items():
        assert {code(row[0])[0] for row in rows(section("docs/dependencies.md", heading))} == packages
    assert set(project["project"]["optional-dependencies"]) == {"local", "tracing"}
    assert set(project["dependency-groups"]) == {"dev", "bench", "infra"}


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
