"""What a configuration lays open is told once, at start."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tests.faults.proxies import Table, running, target

from mlflow_proxy.configuration import load
from mlflow_proxy.exposure import exposures
from mlflow_proxy.settings import is_loopback

KEYS = '[access]\nkeys_file = "/keys.jsonl"\n'
ANYBODY = '[access]\nanonymous = "i-understand"\n'
TARGET = """[[roles]]
name = "writer"
targets = ["*"]
allow = ["*"]
[[targets]]
name = "team"
arn = "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-tracking-server/team"
"""
WAYS_OUT = ("server.tls_certificate", "server.trusted_proxies", "server.public_url", "127.0.0.1")


def exposed(folder: Path, server: str) -> list[str]:
    path = folder / "proxy.toml"
    path.write_text(f"[server]\n{server}\n{KEYS}{TARGET}")
    return list(exposures(load(path, {})))


@pytest.mark.parametrize(
    "server",
    [
        'host = "0.0.0.0"',
        'host = "::"',
        'host = "10.1.2.3"',
        'host = "0.0.0.0"\npublic_url = "http://mlflow.example.com"',
        'host = "0.0.0.0"\nallowed_hosts = ["mlflow.example.com"]',
    ],
)
def test_plain_http_beyond_this_machine(tmp_path: Path, server: str) -> None:
    (exposure,) = exposed(tmp_path, server)
    assert "travel unencrypted" in exposure
    assert all(way_out in exposure for way_out in WAYS_OUT)


@pytest.mark.parametrize(
    "server",
    [
        "",
        'host = "127.0.0.1"',
        'host = "::1"',
        'host = "0.0.0.0"\npublic_url = "https://mlflow.example.com"',
        'host = "0.0.0.0"\npublic_url = "HTTPS://mlflow.example.com"',
        'host = "0.0.0.0"\ntrusted_proxies = ["10.1.2.1"]',
    ],
)
def test_nothing_to_tell(tmp_path: Path, server: str) -> None:
    assert exposed(tmp_path, server) == []


def test_anybody(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text(f'[server]\nhost = "0.0.0.0"\n{ANYBODY}{TARGET[TARGET.index("[[targets]]") :]}')
    anybody, plain = exposures(load(path, {}))
    assert "not identified" in anybody
    assert "unencrypted" in plain


def test_no_page_shows_an_exposed_example() -> None:
    root = Path(__file__).parents[1]
    listening = 0
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for block in re.findall(r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            server = tomllib.loads(block).get("server", {})
            if not is_loopback(server.get("host", "127.0.0.1")):
                listening += 1
                https = server.get("public_url", "").startswith("https://")
                assert https or server.get("trusted_proxies") or server.get("tls_certificate"), f"{page.name}: {block}"
    assert listening >= 4


def test_it_is_told_once_for_all_workers(tmp_path: Path) -> None:
    (tmp_path / "keys.jsonl").touch()
    sections: dict[str, Table] = {"access": {"keys_file": str(tmp_path / "keys.jsonl")}}
    roles: list[Table] = [{"name": "writer", "targets": ["*"], "allow": ["*"]}]
    upstream = target("team", "http://127.0.0.1:1")
    server = {"host": "0.0.0.0", "workers": 2}
    with running(tmp_path / "proxy", [upstream], server=server, sections=sections, roles=roles) as proxy:
        proxy.stop()
        assert proxy.stderr.read_text().count("travel unencrypted") == 1
