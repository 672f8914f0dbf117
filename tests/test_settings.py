"""The configuration: defaults, file, environment, and all mistakes of it together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from pydantic import ValidationError

from mlflow_proxy.configuration import SettingsError, load
from mlflow_proxy.options import LISTED, options, options_markdown
from mlflow_proxy.settings import Server, Settings, Upstream
from mlflow_proxy.targets import Mode

ARN = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-app/app-1"
TRACKING_ARN = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/team"
TARGET = f'[[targets]]\nname = "dev"\narn = "{ARN}"\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        path = tmp_path / "proxy.toml"
        path.write_text(text, "utf-8")
        return path

    return write_file


def problems_of(path: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(path, environ or {})
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# What is right


def test_smallest_configuration(write: Write) -> None:
    loaded = load(write(TARGET), {})
    assert (loaded.server.host, loaded.server.port) == ("127.0.0.1", 8080)
    assert loaded.server.body_limit == 64 * 1024 * 1024
    assert 1 <= loaded.server.workers <= 4
    assert loaded.listens_on_loopback
    (target,) = loaded.build_targets()
    assert target.default
    assert target.arn.mode is Mode.APP
    assert target.endpoint.url == "https://mlflow.sagemaker.us-east-1.app.aws"


def test_whole_configuration(write: Write, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    loaded = load(
        write(f"""
[server]
host = "0.0.0.0"
port = 8443
workers = 2
tls_certificate = "{certificate}"
tls_key = "{key}"
public_url = "https://mlflow.example.com"
allowed_hosts = ["a.example.com", "*.b.example.com"]
trusted_proxies = ["10.0.0.0/8", "192.0.2.7", "fd00::/8"]
body_limit = "10MiB"
header_timeout = 2.5
[upstream]
connect_timeout = 1
proxy = "http://user:password@proxy.example.com:3128"
[aws]
profile = "mlflow"
sts_endpoint = "http://127.0.0.1:9600"
[ui]
link_expires = 60
[log]
format = "json"
level = "debug"
requests = false
[access]
anonymous = "i-understand"
[[targets]]
name = "app"
arn = "{ARN}"
assume_role_arn = "arn:aws:iam::444455556666:role/path/mlflow"
external_id = "xx"
session_name = "me@example"
[[targets]]
name = "team"
arn = "{TRACKING_ARN}"
default = true
endpoint = "http://127.0.0.1:9500"
ca_bundle = "{certificate}"
"""),
        {},
    )
    assert loaded.server.trusted_proxies == [ip_network(text) for text in ("10.0.0.0/8", "192.0.2.7", "fd00::/8")]
    assert (loaded.server.body_limit, loaded.server.header_timeout) == (10 << 20, 2.5)
    assert (loaded.log.format, loaded.log.requests, loaded.ui.link_expires) == ("json", False, 60)
    assert not loaded.listens_on_loopback
    app, team = loaded.build_targets()
    assert (app.name, app.default, app.external_id, app.session_name) == ("app", False, "xx", "me@example")
    assert app.assume_role_arn == "arn:aws:iam::444455556666:role/path/mlflow"
    assert (team.default, team.endpoint.url, team.ca_bundle) == (True, "http://127.0.0.1:9500", str(certificate))
    assert team.arn.mode is Mode.TRACKING


def test_two_targets_without_default(write: Write) -> None:
    loaded = load(write(TARGET + TARGET.replace("dev", "prod")), {})
    assert [target.default for target in loaded.build_targets()] == [False, False]


def test_settings_cannot_be_changed(write: Write) -> None:
    loaded = load(write(TARGET), {})
    with pytest.raises(ValidationError):
        loaded.server.port = 1  # type: ignore[misc]


# Environment


def test_environment_overrides_the_file_option_by_option(write: Write) -> None:
    path = write('[server]\nport = 1111\nworkers = 3\nallowed_hosts = ["a"]\n[log]\nlevel = "error"\n' + TARGET)
    loaded = load(
        path,
        {
            "MLFLOW_PROXY_SERVER__PORT": "2222",
            "MLFLOW_PROXY_SERVER__ALLOWED_HOSTS": '["b", "*.c"]',
            "MLFLOW_PROXY_LOG__REQUESTS": "false",
            "MLFLOW_PROXY_UPSTREAM__IDLE_TIMEOUT": "1.5",
            "MLFLOW_PROXY_CONFIG": "/elsewhere.toml",
            "OTHER_VARIABLE": "x",
        },
    )
    assert (loaded.server.port, loaded.server.workers, loaded.server.allowed_hosts) == (2222, 3, ["b", "*.c"])
    assert (loaded.log.level, loaded.log.requests, loaded.upstream.idle_timeout) == ("error", False, 1.5)


def test_environment_alone() -> None:
    loaded = load(None, {"MLFLOW_PROXY_TARGETS": json.dumps([{"name": "dev", "arn": ARN}])})
    assert [target.name for target in loaded.build_targets()] == ["dev"]


def test_targets_of_the_environment_replace_the_files(write: Write) -> None:
    listed = [{"name": "a", "arn": ARN, "default": True}, {"name": "b", "arn": TRACKING_ARN}]
    loaded = load(write(TARGET), {"MLFLOW_PROXY_TARGETS": json.dumps(listed)})
    assert [(target.name, target.default) for target in loaded.build_targets()] == [("a", True), ("b", False)]


def test_section_as_json_with_single_options_over_it(write: Write) -> None:
    environ = {"MLFLOW_PROXY_SERVER": '{"port": 3333, "workers": 1}', "MLFLOW_PROXY_SERVER__PORT": "4444"}
    loaded = load(write(TARGET), environ)
    assert (loaded.server.port, loaded.server.workers) == (4444, 1)


def test_none_takes_an_option_of_the_file_back(write: Write) -> None:
    path = write('[upstream]\nproxy = "http://proxy:3128"\n' + TARGET)
    assert load(path, {}).upstream.proxy == "http://proxy:3128"
    assert load(path, {"MLFLOW_PROXY_UPSTREAM__PROXY": "none"}).upstream.proxy is None


def test_process_environment_counts_by_default(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_PROXY_SERVER__PORT", "5555")
    monkeypatch.setenv("HTTP_PROXY", "http://never.example:1")
    assert load(write(TARGET)).server.port == 5555
    assert load(write(TARGET), {}).server.port == 8080  # and only then
    assert load(write(TARGET)).upstream.proxy is None


def test_no_dotenv_file_is_read(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MLFLOW_PROXY_SERVER__PORT=6666\n")
    monkeypatch.chdir(tmp_path)
    assert load(write(TARGET), {}).server.port == 8080


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("MLFLOW_PROXY_SERVER__PROT", "did you mean MLFLOW_PROXY_SERVER__PORT?"),
        ("MLFLOW_PROXY_SERVRE__PORT", "did you mean MLFLOW_PROXY_SERVER__PORT?"),
        ("MLFLOW_PROXY_SERVER_PORT", "did you mean MLFLOW_PROXY_SERVER__PORT?"),
        ("MLFLOW_PROXY_TARGET", "did you mean MLFLOW_PROXY_TARGETS?"),
        ("MLFLOW_PROXY_XYZZY__QWERTY", "docs/configuration.md"),
        ("MLFLOW_PROXY_TARGETS__0__NAME", "no such option"),
    ],
)
def test_unknown_variable(write: Write, variable: str, words: str) -> None:
    problems = problems_of(write(TARGET), {variable: "1"})
    assert problems[0].startswith(f"environment variable {variable}: no such option")
    assert words in problems[0]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MLFLOW_PROXY_SERVER__ALLOWED_HOSTS", "a.example.com"),
        ("MLFLOW_PROXY_SERVER__ALLOWED_HOSTS", '"a.example.com"'),
        ("MLFLOW_PROXY_SERVER__TRUSTED_PROXIES", "10.0.0.0/8"),
        ("MLFLOW_PROXY_SERVER", "8080"),
        ("MLFLOW_PROXY_SERVER", "{port: 8080}"),
        ("MLFLOW_PROXY_TARGETS", ARN),
        ("MLFLOW_PROXY_TARGETS", '{"name": "dev"}'),
        ("MLFLOW_PROXY_TARGETS", ""),
    ],
)
def test_variable_that_should_be_json(write: Write, variable: str, value: str) -> None:
    """And the file's mistakes are listed with it."""
    problems = problems_of(write("[log]\nlevel = 'loud'\n" + TARGET), {variable: value})
    assert [problem.split(":")[0] for problem in problems] == [f"environment variable {variable}", "log.level"]
    assert "write it like [" in problems[0] or "write it like {" in problems[0]


# Mistakes

MISTAKES = [
    # option, what stands in the file, words of the message
    ("server.port", "[server]\nport = 0", "greater than or equal to 1"),
    ("server.port", "[server]\nport = 65536", "less than or equal to 65535"),
    ("server.port", '[server]\nport = "http"', "'http' input should be a valid integer"),
    ("server.prot", "[server]\nprot = 1", "no such option; did you mean port?"),
    ("server.xyzzy", "[server]\nxyzzy = 1", "no such option; see docs/configuration.md"),
    ("sever", "[sever]\nport = 1", "no such option; did you mean server?"),
    ("server", "server = 5", "valid dictionary"),
    ("server.workers", "[server]\nworkers = 0", "greater than or equal to 1"),
    ("server.body_limit", '[server]\nbody_limit = "64 parsecs"', "byte unit"),
    ("server.body_limit", "[server]\nbody_limit = 10", "1024"),
    (
        "server.trusted_proxies",
        '[server]\ntrusted_proxies = ["10.0.0.1/8"]',
        "'10.0.0.1/8' is not a network; write one",
    ),
    ("server.trusted_proxies", '[server]\ntrusted_proxies = ["lb.example.com"]', "write one like 10.0.0.0/8"),
    ("server.trusted_proxies", '[server]\ntrusted_proxies = "10.0.0.0/8"', "valid list"),
    ("server.allowed_hosts", '[server]\nallowed_hosts = "a"', "valid list"),
    ("server.public_url", '[server]\npublic_url = "mlflow.example.com"', "write one like https://host"),
    ("server.public_url", '[server]\npublic_url = "https://h/path?a=b"', "with a plain path at the most"),
    ("server.public_url", '[server]\npublic_url = "https://h/a/../b"', "with a plain path at the most"),
    ("server.public_url", '[server]\npublic_url = "https://h/t/app"', "begins with /t"),
    ("server.host", '[server]\nhost = "0.0.0.0"', 'access.anonymous = "i-understand"'),
    ("server.host", '[server]\nhost = "::"', 'access.anonymous = "i-understand"'),
    ("server.tls_key", '[server]\ntls_certificate = "cert.pem"', "TLS needs both"),
    ("server.tls_certificate", '[server]\ntls_key = "key.pem"', "TLS needs both"),
    ("server.tls_certificate", '[server]\ntls_certificate = "/no/cert"\ntls_key = "/no/key"', "No such file"),
    ("server.tls_certificate", '[server]\ntls_certificate = 5\ntls_key = "/no/key"', "valid path"),
    ("upstream.connect_timeout", "[upstream]\nconnect_timeout = 0", "greater than 0"),
    ("upstream.retries", "[upstream]\nretries = 6", "less than or equal to 5"),
    ("upstream.proxy", '[upstream]\nproxy = "https://h:1"', "write http://host:port"),
    ("upstream.proxy", '[upstream]\nproxy = "h:3128"', "write http://host:port"),
    ("upstream.proxy", '[upstream]\nproxy = "http://h"', "write http://host:port"),
    ("aws.sts_endpoint", '[aws]\nsts_endpoint = "sts"', "write one like https://host"),
    ("aws.sagemaker_endpoint", '[aws]\nsagemaker_endpoint = "https://h/?x"', "only scheme, host and port"),
    ("ui.link_expires", "[ui]\nlink_expires = 301", "less than or equal to 300"),
    ("ui.session_expires", "[ui]\nsession_expires = 1799", "greater than or equal to 1800"),
    ("log.format", '[log]\nformat = "xml"', "'auto', 'json' or 'text'"),
    ("access.anonymous", '[access]\nanonymous = "yes"', "'loopback' or 'i-understand'"),
]
TARGET_MISTAKES = [
    ("arn", 'arn = "team"', "is not an ARN; write arn:aws:sagemaker"),
    ("arn", f'arn = "{ARN.replace(":aws:", ":aws-cn:")}"', "partition 'aws-cn', where SageMaker MLflow is not offered"),
    ("arn", f'arn = "{ARN.replace("sagemaker", "s3")}"', "service 's3'"),
    ("name", 'name = "a/b"', "use 1 to 63 letters"),
    ("name", 'name = ""', "use 1 to 63 letters"),
    ("endpoint", 'endpoint = "https://h/x"', "only scheme, host and port"),
    ("endpoint", 'endpoint = "h:9500"', "write one like https://host"),
    ("assume_role_arn", 'assume_role_arn = "role/x"', "write arn:aws:iam::<account>:role/<name>"),
    ("assume_role_arn", 'assume_role_arn = "arn:aws:iam::12345678901\\u0661:role/x"', "is not a role's ARN"),
    ("session_name", 'session_name = "a b"', "pattern"),
    ("session_name", 'session_name = "n\\u00e4me"', "pattern"),
    ("ca_bundle", 'ca_bundle = "/no/such.pem"', "No such file or directory); name a readable PEM file"),
    ("external_id", 'external_id = "xx"', "counts only with assume_role_arn"),
    ("asume_role_arn", 'asume_role_arn = "x"', "no such option; did you mean assume_role_arn?"),
    ("default", 'default = "maybe"', "valid boolean"),
]


@pytest.mark.parametrize(("option", "text", "words"), MISTAKES, ids=[f"{m[0]}-{i}" for i, m in enumerate(MISTAKES)])
def test_mistake(write: Write, option: str, text: str, words: str) -> None:
    (problem,) = problems_of(write(f"{text}\n{TARGET}"))
    assert problem.startswith(f"{option}:")
    assert words in problem


@pytest.mark.parametrize(("option", "text", "words"), TARGET_MISTAKES)
def test_mistake_of_a_target(write: Write, option: str, text: str, words: str) -> None:
    """The second of two targets has it: they count from 1."""
    lines = {"name": 'name = "prod"', "arn": f'arn = "{ARN}"', option: text}
    (problem,) = problems_of(write(TARGET + "[[targets]]\n" + "\n".join(lines.values())))
    assert problem.startswith(f"targets[2].{option}:")
    assert words in problem


@pytest.mark.parametrize("missing", ["name", "arn"])
def test_required_option(write: Write, missing: str) -> None:
    text = "\n".join(line for line in TARGET.splitlines() if not line.startswith(missing))
    assert problems_of(write(text)) == [f"targets[1].{missing}: is required"]


@pytest.mark.parametrize(
    "text", ["", "[server]\nport = 1", "targets = []", 'targets = "dev"', "targets = 5", "[targets]\nname = 'x'"]
)
def test_no_target(write: Write, text: str) -> None:
    assert "targets: none is configured; add a [[targets]] table with name and arn" in problems_of(write(text))


def test_two_defaults_and_a_name_used_twice(write: Write) -> None:
    text = TARGET + "default = true\n"
    assert problems_of(write(text + text.replace("dev", "prod") + TARGET)) == [
        "targets: dev and prod are both default = true; keep one",
        "targets: the name 'dev' is used twice; each target needs its own",
    ]


def test_all_mistakes_are_listed_together(write: Write) -> None:
    """Those of the file, of its targets, of what no option shows alone, and of the environment."""
    path = write(
        """
colour = "red"
[server]
port = 0
host = "0.0.0.0"
public_url = "nope"
tls_certificate = "/no/such/cert.pem"
tls_key = "/no/such/key.pem"
[upstream]
proxy = "socks5://h:1"
[log]
levle = "info"
"""
        + TARGET
        + "default = true\n"
        + TARGET.replace("aws:", "aws-cn:")
        + 'default = true\nexternal_id = "xx"\n'
    )
    problems = problems_of(
        path,
        {
            "MLFLOW_PROXY_UI__LINK_EXPIRES": "1",
            "MLFLOW_PROXY_SEVER__PORT": "1",
            "MLFLOW_PROXY_SERVER__ALLOWED_HOSTS": "a",
        },
    )
    starts = [problem.split(":")[0] for problem in problems]
    assert sorted(starts) == sorted(
        [
            "environment variable MLFLOW_PROXY_SEVER__PORT",
            "environment variable MLFLOW_PROXY_SERVER__ALLOWED_HOSTS",
            "colour",
            "server.port",
            "server.host",
            "server.public_url",
            "server.tls_certificate",
            "upstream.proxy",
            "log.levle",
            "ui.link_expires",
            "targets[2].arn",
            "targets",  # two defaults
            "targets",  # one name twice
            "targets[2].external_id",
        ]
    )


def test_environment_is_part_of_what_is_checked_together(write: Write) -> None:
    """With another mistake about, too: what the environment put right is not complained about, and the reverse."""
    path = write('[server]\nport = 0\nhost = "0.0.0.0"\n' + TARGET)
    assert [p.split(":")[0] for p in problems_of(path, {"MLFLOW_PROXY_SERVER__HOST": "127.0.0.1"})] == ["server.port"]
    path = write("[server]\nport = 0\n" + TARGET)
    problems = problems_of(path, {"MLFLOW_PROXY_SERVER__HOST": "0.0.0.0"})
    assert [problem.split(":")[0] for problem in problems] == ["server.port", "server.host"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.8.9.10"])
def test_loopback_needs_no_consent(write: Write, host: str) -> None:
    assert load(write(f'[server]\nhost = "{host}"\n{TARGET}'), {}).listens_on_loopback


@pytest.mark.parametrize("host", ["localhost", "127.evil.example", "proxy.internal", ""])
def test_listening_takes_an_address(write: Write, host: str) -> None:
    with pytest.raises(SettingsError, match=r"server\.host: '.*' is not an address to listen on"):
        load(write(f'[server]\nhost = "{host}"\n{TARGET}'), {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"port = ", "is not valid TOML"),
        (b"[server\n", "is not valid TOML"),
        (b"[server]\nport = 1\nport = 2\n", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
    ],
)
def test_broken_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "proxy.toml"
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert words in problem


def test_missing_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "none.toml") == [f"{tmp_path}/none.toml: cannot be read (No such file or directory)"]
    assert problems_of(tmp_path) == [f"{tmp_path}: cannot be read (Is a directory)"]


toml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
known = st.sampled_from([(option.section, option.name) for option in options()])


@settings(max_examples=300, deadline=None)
@given(
    values=st.dictionaries(known, toml_values, max_size=6),
    whole=st.dictionaries(st.sampled_from(list(Settings.model_fields)), toml_values, max_size=2),
)
def test_any_value_is_taken_or_explained(values: dict[tuple[str, str], object], whole: dict[str, object]) -> None:
    """Never a traceback, whatever the type. By the environment, since TOML cannot hold everything."""
    sections: dict[str, dict[str, object]] = {}
    for (section, name), value in values.items():
        sections.setdefault(section, {})[name] = value
    content: dict[str, object] = {
        name: [table] if name == "targets" else table for name, table in sections.items()
    } | whole
    environ = {f"MLFLOW_PROXY_{name.upper()}": json.dumps(value) for name, value in content.items()}
    try:
        problems = load(None, environ) and ["none"]
    except SettingsError as error:
        problems = error.problems
    assert problems
    assert all(problem.strip() for problem in problems)


# Identity and roles

LOAD_BALANCER = "arn:aws:elasticloadbalancing:us-east-1:123456789012:loadbalancer/app/mlflow/50dc6c495c0c9188"


@pytest.mark.parametrize("issuer", [None, "https://id.example.com/"])
def test_two_ways_to_the_same_names_are_of_one_issuer(write: Write, issuer: str | None) -> None:
    text = f"""
[server]
trusted_proxies = ["10.0.0.0/8"]
[oidc]
issuer = "https://id.example.com"
audience = ["mlflow"]
[[roles]]
name = "all"
targets = ["*"]
allow = ["*"]
{TARGET}
[load_balancer]
arn = "{LOAD_BALANCER}"
"""
    assert load(write(f'{text}issuer = "https://id.example.com"\n'), {}).load_balancer.arn == LOAD_BALANCER
    (problem,) = problems_of(write(f'{text}issuer = "{issuer}"\n' if issuer else text))
    assert problem.startswith("load_balancer.issuer: must be oidc.issuer")


@pytest.mark.parametrize(("pattern", "good"), [("GraphQL", False), ("Graph*", False), ("GetRun", True), ("*", True)])
def test_actions_that_a_role_names_are_such_that_requests_need(write: Write, pattern: str, good: bool) -> None:
    """GraphQL is none: each query needs the actions of its fields."""
    path = write(f'{TARGET}[[roles]]\nname = "all"\ntargets = ["*"]\nallow = ["{pattern}"]\n')
    if good:
        assert load(path, {}).roles[0].allow == [pattern]
    else:
        (problem,) = problems_of(path)
        assert problem.startswith(f"roles[1].allow: '{pattern}' matches no action")


# Secrets

SECRET = "hunter2"


@pytest.mark.parametrize(
    "text",
    [
        *(
            f'[upstream]\nproxy = "{url}"'
            for url in (f"https://u:{SECRET}@h:1", f"http://u:{SECRET}@h", f"u:{SECRET}@h:1")
        ),
        f'[upstream]\nproxy = ["http://u:{SECRET}@h:1"]',
        f'[upstream]\nproxy = {{ url = "http://u:{SECRET}@h:1" }}',
        f'upstream = "http://u:{SECRET}@h:1"',
        f'[server]\npublic_url = "https://u:{SECRET}@h"',
        f'[aws]\nsts_endpoint = "https://u:{SECRET}@h"',
        f'[aws]\nproxy = "http://u:{SECRET}@h:1"',
        f'[upstream]\npassword = "{SECRET}"',
        f'[server]\nport = "https://u:{SECRET}@h"',
    ],
)
def test_password_never_shows(write: Write, text: str) -> None:
    assert SECRET not in "\n".join(problems_of(write(f"{text}\n{TARGET}")))


def test_password_in_a_target_or_the_environment_never_shows(write: Write) -> None:
    path = write(TARGET + f'endpoint = "https://u:{SECRET}@h"\n')
    assert SECRET not in "\n".join(problems_of(path))
    for variable in (
        "UPSTREAM__PROXY",
        "UPSTREAM",
        "SERVER__ALLOWED_HOSTS",
        "TARGETS",
        "UPSTREAM__PROXI",
        "SERVER__PUBLIC_URL",
    ):
        problems = problems_of(write(TARGET), {f"MLFLOW_PROXY_{variable}": f"https://u:{SECRET}@h:1"})
        assert SECRET not in "\n".join(problems)


def test_nothing_of_the_proxys_url_shows_whatever_its_type(write: Write) -> None:
    assert problems_of(write(f"[upstream]\nproxy = 271828\n{TARGET}")) == [
        "upstream.proxy: input should be a valid string"
    ]


def test_password_does_not_show_in_the_settings_themselves(write: Write) -> None:
    urls = f'[upstream]\nproxy = "http://u:{SECRET}@h:1"\n[limits]\nstorage = "redis://u:{SECRET}@h:1"\n'
    loaded = load(write(urls + TARGET), {})
    assert SECRET in f"{loaded.upstream.proxy}"
    assert SECRET in f"{loaded.limits.storage}"
    for shown in (loaded, loaded.upstream, loaded.limits):
        assert SECRET not in repr(shown) + str(shown)


def test_password_in_a_broken_file_never_shows(write: Write) -> None:
    assert SECRET not in "\n".join(problems_of(write(f"[upstream]\nproxy = http://u:{SECRET}@h:1\n")))


# TLS

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
PKCS8, TRADITIONAL = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL


def make_certificate(
    folder: Path,
    *,
    key: PrivateKey | None = None,
    written: PrivateKey | None = None,
    form: serialization.PrivateFormat = PKCS8,
    password: bytes | None = None,
) -> tuple[Path, Path]:
    """A self-signed certificate, and the file of a private key: its own, unless `written` is another."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "proxy.example.com")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    lock: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes((written or key).private_bytes(serialization.Encoding.PEM, form, lock))
    return paths


def tls(certificate: Path, key: Path) -> str:
    return f'[server]\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n{TARGET}'


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def test_good_keys(write: Write, tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    for key in (None, rsa_key):
        certificate, path = make_certificate(tmp_path, key=key)
        assert load(write(tls(certificate, path)), {}).server.tls_key == path


def test_key_that_is_not_pkcs8(write: Write, tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    """Granian takes no other."""
    for key in (ec.generate_private_key(ec.SECP256R1()), rsa_key):
        certificate, path = make_certificate(tmp_path, key=key, form=TRADITIONAL)
        (problem,) = problems_of(write(tls(certificate, path)))
        assert problem.startswith(f"server.tls_key: '{path}' is not an unencrypted PKCS#8 key")
        assert "openssl pkcs8 -topk8 -nocrypt" in problem


def test_encrypted_key(write: Write, tmp_path: Path) -> None:
    certificate, path = make_certificate(tmp_path, password=b"secret")
    (problem,) = problems_of(write(tls(certificate, path)))
    assert "not an unencrypted PKCS#8 key" in problem


def test_key_of_another_certificate(write: Write, tmp_path: Path) -> None:
    certificate, path = make_certificate(tmp_path, written=ec.generate_private_key(ec.SECP256R1()))
    (problem,) = problems_of(write(tls(certificate, path)))
    assert problem.startswith("server.tls_certificate: does not go with tls_key")


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff\xfe\x00"])
def test_unusable_file(write: Write, tmp_path: Path, name: str, content: bytes | None) -> None:
    certificate, key = make_certificate(tmp_path)
    path = certificate if name == "tls_certificate" else key
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems_of(write(tls(certificate, key)))
    assert problem.startswith(f"server.{name}:")


def test_certificate_that_is_a_folder(write: Write, tmp_path: Path) -> None:
    _, key = make_certificate(tmp_path)
    (problem,) = problems_of(write(tls(tmp_path, key)))
    assert problem == f"server.tls_certificate: '{tmp_path}' cannot be read (Is a directory)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_key_that_may_not_be_read(write: Write, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    key.chmod(0)
    (problem,) = problems_of(write(tls(certificate, key)))
    assert problem == f"server.tls_key: '{key}' cannot be read (Permission denied)"


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_ca_bundle_without_certificates(write: Write, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    (problem,) = problems_of(write(TARGET + f'ca_bundle = "{path}"\n'))
    assert problem.startswith(f"targets[1].ca_bundle: '{path}' cannot be used (")
    assert "name a readable PEM file of CA certificates" in problem


# Documentation


def test_every_option_is_explained_once(write: Write) -> None:
    """The options listed are those that a loaded configuration has."""
    role = '[[roles]]\nname = "reader"\ntargets = ["*"]\n'
    dumped = load(write(TARGET + role), {}).model_dump()
    for listed_more_than_once in LISTED:
        (dumped[listed_more_than_once],) = dumped[listed_more_than_once]
    listed = [(option.section, option.name) for option in options()]
    assert listed == [(section, name) for section, table in dumped.items() for name in table]
    assert len(listed) > 40
    assert [option.name for option in options() if not option.description.endswith(".")] == []


def test_markdown_has_every_option() -> None:
    text = options_markdown()
    position = 0
    for option in options():
        heading = f"### `[[{option.section}]]`" if option.section in LISTED else f"### `[{option.section}]`"
        assert text.count(heading) == 1
        row = f"| `{option.name}` | {option.type} | {option.default} | "
        found = text.index(row, position)
        assert text.rindex("### ", 0, found) == text.index(heading)
        position = found
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(list(options()))
    assert [row for row in rows if row.replace("\\|", "").count("|") != 5] == []


@pytest.mark.parametrize(
    ("section", "name", "type_name", "default", "variable"),
    [
        ("server", "host", "text", "127.0.0.1", "MLFLOW_PROXY_SERVER__HOST"),
        ("server", "port", "number", "8080", "MLFLOW_PROXY_SERVER__PORT"),
        ("server", "tls_key", "file", "none", "MLFLOW_PROXY_SERVER__TLS_KEY"),
        ("server", "body_limit", "size", "64MiB", "MLFLOW_PROXY_SERVER__BODY_LIMIT"),
        ("server", "trusted_proxies", "list of texts", "[]", "MLFLOW_PROXY_SERVER__TRUSTED_PROXIES"),
        ("server", "header_timeout", "seconds", "75.0", "MLFLOW_PROXY_SERVER__HEADER_TIMEOUT"),
        ("server", "workers", "number", "see text", "MLFLOW_PROXY_SERVER__WORKERS"),
        ("log", "format", "`auto` / `json` / `text`", "auto", "MLFLOW_PROXY_LOG__FORMAT"),
        ("log", "requests", "true / false", "true", "MLFLOW_PROXY_LOG__REQUESTS"),
        ("oidc", "required_claims", "table of texts", "{}", "MLFLOW_PROXY_OIDC__REQUIRED_CLAIMS"),
        ("roles", "allow", "list of texts", "[]", None),
        ("targets", "arn", "text", "required", None),
        ("targets", "ca_bundle", "file", "none", None),
    ],
)
def test_option(section: str, name: str, type_name: str, default: str, variable: str | None) -> None:
    (option,) = [option for option in options() if (option.section, option.name) == (section, name)]
    assert (option.type, option.default, option.variable) == (type_name, default, variable)


def test_every_variable_of_the_documentation_is_taken(write: Write) -> None:
    """Each with its own default, as far as that can be written."""
    for option in options():
        if option.variable and option.default not in ("see text",):
            environ = {option.variable: option.default}
            assert load(write(TARGET), environ) == load(write(TARGET), {}), option


def test_server_defaults_make_a_server() -> None:
    assert Server() == Server.model_validate({})


def test_the_first_byte_may_take_longer_than_mlflows_client_waits() -> None:
    """A search that the proxy cut first would be repeated by the client, and run again by MLflow each time."""
    assert Upstream().first_byte_timeout > MLFLOW_HTTP_REQUEST_TIMEOUT.default
