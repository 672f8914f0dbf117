"""docs/deploy-aws.md is true: its settings, commands, examples, outputs, alarms and numbers are the application's."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from infra.certificate import handler
from infra.settings import Settings, SettingsError, load, options_table
from tests.infra.test_monitoring import alarms
from tests.infra.variants import ACCOUNT, COMPUTES, MODES, REGION, ROOT, SIGN_IN, resolve, synthesize

from infra import app

PAGE = (ROOT / "docs" / "deploy-aws.md").read_text()
AWS = {"CDK_DEFAULT_ACCOUNT": ACCOUNT, "CDK_DEFAULT_REGION": REGION}


class Block(NamedTuple):
    language: str
    text: str


BLOCKS = [
    Block(language, re.sub(rf"(?m)^{indent}", "", text))
    for indent, language, text in re.findall(r"(?ms)^( *)```(\w+)\n(.*?)^ *```$", PAGE)
]
PROSE = re.sub(r"(?ms)^ *```.*?^ *```$", "", PAGE)


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables' rows, without their heads."""
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    rules = {index for index, row in enumerate(cells) if set("".join(row)) <= set("-")}
    return [row for index, row in enumerate(cells) if index not in rules and index + 1 not in rules]


def test_all_settings_are_listed() -> None:
    assert options_table() in PAGE, "paste the output of the command that stands before the table"


def commands(begin: str) -> list[str]:
    """All commands of the page that begin so, each on one line."""
    lines = [
        line for block in BLOCKS if block.language == "bash" for line in block.text.replace("\\\n", " ").split("\n")
    ]
    return [line for line in lines if line.startswith(begin)]


EXAMPLES = commands("make deploy ")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8
    assert all(
        name in " ".join(EXAMPLES) for name in ("STACK_ENV=prod", "compute=fargate", "nat_gateways=0", "vpc_id=")
    )


@pytest.fixture
def options_file(tmp_path: Path) -> Path:
    """The example of proxy_options, as the page's command writes it."""
    (text,) = re.findall(r"(?s)cat > proxy-options\.toml <<'END'\n(.*?)\nEND\n", PAGE)
    path = tmp_path / "proxy-options.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", EXAMPLES)
def test_settings_of_each_example_can_be_used(command: str, options_file: Path) -> None:
    command = command.replace("=proxy-options.toml", f"={options_file}")
    words = shlex.split(command.replace("$(curl -s https://checkip.amazonaws.com)", "192.0.2.7"))
    given = dict(word.split("=", 1) for word in words[2:])
    context = dict(part.split("=", 1) for part in shlex.split(given.pop("CONTEXT", "")))
    assert set(given) <= {"MLFLOW_TYPE", "STACK_ENV", "BOOTSTRAP"}
    assert load(context, AWS | given).mlflow_type == given["MLFLOW_TYPE"]


def test_options_of_the_proxy_in_the_example_are_used(options_file: Path) -> None:
    made = load({"proxy_options": str(options_file)}, AWS)
    assert set(made.proxy_options or {}) == {"oidc", "limits", "tracing"}
    assert made.traces


def test_mistakes_are_told_as_the_page_says() -> None:
    context = {"nat_gateways": "0", "mlflow_type": "serverless", "host_name": "m.example.com"}
    with pytest.raises(SettingsError) as caught:
        load(context, AWS)
    assert f"{caught.value}\n" in [block.text for block in BLOCKS]


def test_make_knows_the_commands() -> None:
    targets = set(re.findall(r"(?m)^([a-z.][a-z/.-]*):", (ROOT / "Makefile").read_text()))
    named = set(re.findall(r"(?m)(?:`|^)make ([a-z.][a-z/.-]*)", "\n".join([PROSE, *(one.text for one in BLOCKS)])))
    assert {"deploy", "cost", "destroy"} <= named <= targets


def test_settings_that_are_named_exist() -> None:
    named = set(re.findall(r"`([a-z_]+)=[^`]*`", PROSE)) | set(re.findall(r"`([a-z]+_[a-z_]+)`", PROSE))
    # Of the log and of request lines.
    assert named - {"upstream_ms"} <= set(Settings.model_fields)


def test_outputs_are_those_of_the_stack() -> None:
    outputs = {name.strip("`"): text for name, text in rows(section("The first API key, the first call"))}
    given = synthesize().templates["flaskapp"]["Outputs"]
    assert set(outputs) == set(given)
    for name in set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", PROSE)) & {"KeysSecrets", "Url", *outputs}:
        assert name in given
    command = str(resolve(given["CertificateCommand"]["Value"]))
    (shown,) = commands("aws acm get-certificate")
    assert [word for word in shlex.split(shown) if word.startswith("--")] == [
        word for word in shlex.split(command) if word.startswith("--") and word != "--region"
    ]


def test_stacks_are_named_as_they_are() -> None:
    names = {name for mode in MODES for name in app.stack_ids(mode)}
    named = set(re.findall(r"sagemaker-infra-[a-z]+(?:-(?:tracking|serverless))?", PAGE))
    assert {name for name in named if name.count("-") == 3 or name.endswith(("networking", "domain"))} <= names
    listed = " ".join(row[0] for row in rows(section("What is made")))
    assert all(f"`{name}`" in listed for name in names if not name.endswith("-serverless"))


def test_alarms_are_those_of_the_stack() -> None:
    listed = {name.strip("`"): when for name, when, _ in rows(section("Look inside"))}
    found = alarms()
    assert set(listed) == set(found)
    numbers = {
        "Proxy5xx": "10 requests in 5 minutes",
        "SlowAnswers": "10 s",
        "Throttling": "50 answers",
        "AuthFailureBurst": "100 answers",
        "CertificateExpires": "30 days",
    }
    for name, words in numbers.items():
        assert words in listed[name]
        assert found[name]["Threshold"] == int(words.split()[0])


def test_dashboard_and_log_streams_have_these_names() -> None:
    made = synthesize()
    dashboard = made.one("flaskapp", "AWS::CloudWatch::Dashboard")["DashboardName"]
    assert f"`{dashboard}`" in PAGE
    user_data = (ROOT / "infra" / "host" / "user_data.sh").read_text()
    assert '"{instance_id}/proxy"' in user_data
    assert '"{instance_id}/first-boot"' in user_data
    # CloudFormation names a group after its stack and its logical id.
    assert any(name.startswith("ProxyLogs") for name in made.resources("flaskapp", "AWS::Logs::LogGroup"))


def test_numbers_are_those_of_the_code() -> None:
    assert f"It lasts {handler._DAYS} days" in PAGE
    assert f"when less than {handler._RENEW_DAYS} days are" in PAGE.replace("\n", " ")
    rolling = synthesize().resources("flaskapp", "AWS::AutoScaling::AutoScalingGroup").values()
    assert [one["UpdatePolicy"]["AutoScalingRollingUpdate"]["PauseTime"] for one in rolling] == ["PT15M"]
    assert "within 15 minutes" in PAGE


# AWS WAF guide, "Baseline rule groups", of the core rule set.
COMMON_RULES = {
    "NoUserAgent_HEADER",
    "UserAgent_BadBots_HEADER",
    *(f"SizeRestrictions_{part}" for part in ("QUERYSTRING", "Cookie_HEADER", "BODY", "URIPATH")),
    *(f"EC2MetaDataSSRF_{part}" for part in ("BODY", "COOKIE", "URIPATH", "QUERYARGUMENTS")),
    *(f"{kind}_{part}" for kind in ("GenericLFI", "GenericRFI") for part in ("QUERYARGUMENTS", "URIPATH", "BODY")),
    *(f"RestrictedExtensions_{part}" for part in ("URIPATH", "QUERYARGUMENTS")),
    *(f"CrossSiteScripting_{part}" for part in ("COOKIE", "QUERYARGUMENTS", "BODY", "URIPATH")),
}


def test_rules_to_count_are_rules_of_aws() -> None:
    (block,) = (one.text for one in BLOCKS if "waf_counted_rules" in one.text)
    script = block.replace("make deploy MLFLOW_TYPE=tracking CONTEXT=", "printf %s ")
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    counted = load(dict([shown.split("=", 1)]), AWS).waf_counted_rules
    assert len(set(counted)) == 10
    assert set(counted) <= COMMON_RULES
    assert load({}, AWS).waf_counted_rules[0] in counted
    assert f"default, {load({}, AWS).waf_rate}, is 100 a second" in PAGE


def test_what_may_fail_is_in_that_stack() -> None:
    variants = [synthesize(mode, compute) for mode in MODES for compute in COMPUTES] + [
        synthesize(certificate_arn="", hosted_zone_id="Z1", hosted_zone_name="e.com", host_name="m.e.com"),
        synthesize(**SIGN_IN, mtls_ca_bundle="s3://bucket/key"),
    ]
    failing = [row for row in rows(section("When something fails")) if len(row) == 4]
    assert {row[0] for row in failing} == {"networking", "domain", "mlflow", "flaskapp"}
    for stack, what, _, todo in failing:
        types = {one["Type"] for made in variants for one in made.templates[stack]["Resources"].values()}
        for name in re.findall(r"`([A-Za-z:]+)`", what):
            assert any(f"::{type_.split('::', 1)[1]}".endswith(f"::{name}") for type_ in types), (stack, name)
        assert todo


def test_deploy_says_what_the_page_says() -> None:
    source = (ROOT / "infra" / "commands" / "deploy.py").read_text()
    shown = "\n".join(block.text for block in BLOCKS if block.language == "text")
    for words in ("Looking at what must be there:", "build and synthesize", "New key  ", "Dashboard  ", "make destroy"):
        assert words in source
        assert words in shown


def test_readme_of_the_folder_names_all_its_files() -> None:
    readme = (ROOT / "infra" / "README.md").read_text()
    files = {path.name for path in (ROOT / "infra").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`([a-z0-9_]+\.py)`", readme)) == files
