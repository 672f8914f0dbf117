"""Callers behind a corporate proxy: it opens tunnels by CONNECT, and what goes through them is the proxy's alone."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.faults.certificates import Authority
from tests.faults.proxies import Proxy, running
from tests.faults.test_outgoing_proxy import open_tunnel
from tests.faults.upstreams import Upstream
from tests.integration.conftest import targets_of

from mlflow_proxy.access.key_record import make_key
from mlflow_proxy.local import LocalSageMaker

QUERY = json.dumps({"max_results": 10, "filter": "name = 'Default'"})
CLIENT = """
import mlflow
print(sorted(found.name for found in mlflow.search_experiments()))
"""


class Site(NamedTuple):
    proxy: Proxy
    corporate: Upstream
    bundle: Path
    key: str

    @property
    def url(self) -> str:
        return f"https://localhost:{self.proxy.port}"

    @property
    def way(self) -> str:
        return f"http://alice:s3cret@127.0.0.1:{self.corporate.port}"


@pytest.fixture(scope="module")
def site(sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("corporate")
    authority = Authority(folder, "ours")
    certificate, tls_key = authority.issue("localhost")
    key, kept = make_key("notebook", "reader", created=datetime.now(UTC), expires=None)
    (folder / "keys").write_text(f"{json.dumps(kept.fields())}\n")
    corporate = Upstream()
    corporate.script = open_tunnel
    with running(
        folder / "proxy",
        targets_of(sagemaker),
        server={"tls_certificate": str(certificate), "tls_key": str(tls_key)},
        sections={"access": {"keys_file": str(folder / "keys")}},
        roles=[{"name": "reader", "targets": ["*"], "allow": ["Search*", "Get*"]}],
        environ=sagemaker.environment(),
    ) as proxy:
        yield Site(proxy, corporate, authority.bundle, key)
    corporate.close()


@pytest.fixture(autouse=True)
def _forgotten(site: Site) -> None:
    site.corporate.reset()
    site.corporate.script = open_tunnel


def assert_a_tunnel_and_no_more(site: Site) -> None:
    """The corporate proxy was asked for a tunnel, as the user that it knows, and saw nothing of what is inside."""
    assert site.corporate.arrived
    for arrived in site.corporate.arrived:
        assert (arrived.method, arrived.target) == ("CONNECT", f"localhost:{site.proxy.port}")
        assert ("Proxy-Authorization", f"Basic {base64.b64encode(b'alice:s3cret').decode()}") in arrived.headers
        assert site.key.encode() not in arrived.head


def test_curl(site: Site) -> None:
    done = subprocess.run(
        [
            *("curl", "--silent", "--show-error", "--fail", "--max-time", "60", "--proxy", site.way),
            *("--cacert", str(site.bundle), "--header", "@-", "--json", QUERY),
            f"{site.url}/api/2.0/mlflow/experiments/search",
        ],
        input=f"Authorization: Bearer {site.key}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Default" in [found["name"] for found in json.loads(done.stdout)["experiments"]]
    assert_a_tunnel_and_no_more(site)


def test_mlflows_client(site: Site) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(site.proxy.folder),
            "HTTPS_PROXY": site.way,
            "MLFLOW_TRACKING_URI": site.url,
            "MLFLOW_TRACKING_TOKEN": site.key,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(site.bundle),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'Default'" in done.stdout
    assert_a_tunnel_and_no_more(site)


def test_a_connection_that_the_corporate_proxy_opens_up_is_refused_by_the_caller(site: Site, tmp_path: Path) -> None:
    """TLS inspection shows a certificate of a CA of the company's own: who lacks that CA says so."""
    other = Authority(tmp_path, "corporate")
    done = subprocess.run(
        [
            *("curl", "--silent", "--show-error", "--max-time", "60", "--proxy", site.way),
            *("--cacert", str(other.bundle), f"{site.url}/-/health"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 60, done.stderr  # "peer certificate cannot be authenticated"
