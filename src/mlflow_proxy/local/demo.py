"""`mlflow-proxy demo`: the proxy with a local SageMaker, with the commands to try it; Ctrl-C ends all of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

import click

from mlflow_proxy.access.key_file import change_keys
from mlflow_proxy.access.key_record import make_key

from .errors import LocalError
from .stand_in import LocalSageMaker
from .walkthrough import CLIENT, CURL, ROLES

_HOST = "127.0.0.1"
_LAUNCH = Path(__file__).with_name("launch.py")  # ends the proxy with the demo, whatever ends that
_START_DEADLINE = 60.0
_STOP_DEADLINE = 15.0


def run_demo(port: int) -> int:
    """Start everything, print what to try, wait for SIGINT or SIGTERM. Returns the exit code."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    if not _is_free(port):
        click.echo(f"Port {port} is in use. Choose another: make demo PORT=8081", err=True)
        return 1
    with tempfile.TemporaryDirectory(prefix="mlflow-proxy-demo-", ignore_cleanup_errors=True) as folder:
        state = Path(folder)
        click.echo("Starting a local SageMaker MLflow: one managed tracking server, one serverless MLflow App …")
        sagemaker = LocalSageMaker(state, progress=lambda line: click.echo(f"  {line}"))
        try:
            sagemaker.start()
            if ended.is_set():
                return 0
            return _with_proxy(sagemaker, state, port, ended)
        except LocalError as error:
            click.echo(f"The demo did not start: {error}", err=True)
            return 1
        finally:
            sagemaker.stop()


class Keys(NamedTuple):
    """The demo's two API keys."""

    reader: str
    writer: str


def _make_keys(path: Path) -> Keys:
    now = datetime.now(UTC)
    made = [make_key(name, name, created=now, expires=now + timedelta(days=1)) for name in Keys._fields]
    with change_keys(path, create=True) as kept:
        kept += [key for _, key in made]
    return Keys(*(text for text, _ in made))


def _configuration(sagemaker: LocalSageMaker, state: Path, port: int) -> str:
    return f"""[server]
port = {port}
workers = 2

[log]
format = "text"
level = "warning"

[access]
keys_file = "{state / "keys.jsonl"}"

[audit]
to = "{state / "audit.jsonl"}"

[[roles]]
name = "reader"
targets = ["tracking"]
allow = ["AccessUI", "Get*", "List*", "Search*"]
assume_role_arn = "{sagemaker.roles["reader"]}"
session_tags = true

# For an App, IAM is all or nothing: what this role allows is the only line between reading and writing.
[[roles]]
name = "app-reader"
subjects = ["key:reader"]
targets = ["app"]
allow = ["AccessUI", "Get*", "List*", "Search*"]
assume_role_arn = "{sagemaker.roles["writer"]}"
session_tags = true

[[roles]]
name = "writer"
targets = ["*"]
allow = ["*", "CreatePresigned*"]
assume_role_arn = "{sagemaker.roles["writer"]}"
session_tags = true

{sagemaker.proxy_toml()}"""


def _with_proxy(sagemaker: LocalSageMaker, state: Path, port: int, ended: threading.Event) -> int:
    config = state / "proxy.toml"
    config.write_text(_configuration(sagemaker, state, port))
    keys = _make_keys(state / "keys.jsonl")
    click.echo("  The proxy starts")
    proxy = subprocess.Popen(  # noqa: S603
        [sys.executable, str(_LAUNCH), str(os.getpid()), "mlflow_proxy", "serve", "--config", str(config)],
        env={**os.environ, **sagemaker.environment()},
        start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends things in order
    )
    try:
        _wait_until_ready(proxy, port, keys.writer, ended)
        if not ended.is_set():
            click.echo(guide(f"http://{_HOST}:{port}", state, keys, sagemaker))
        while not ended.wait(0.5):
            if proxy.poll() is not None:
                raise LocalError(f"the proxy ended by itself with exit code {proxy.returncode}")
        click.echo("\nEnding …")
        return 0
    finally:
        proxy.terminate()
        try:
            proxy.wait(_STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            proxy.kill()
            proxy.wait()


def guide(url: str, state: Path, keys: Keys, sagemaker: LocalSageMaker) -> str:
    """What to try, ready to paste."""
    bar = "─" * 78
    return f"""
{bar}
The proxy is ready: {url}

  managed tracking server   {url}/   (or {url}/t/tracking/)
  serverless MLflow App     {url}/t/app/
  overview                  {url}/-/

Two keys: the writer's may do everything, the reader's may only look. In a browser any
user name goes with the key as password.

  writer   {keys.writer}
  reader   {keys.reader}

The proxy's configuration: {state / "proxy.toml"}
Its audit log:             {state / "audit.jsonl"}
The local SageMaker checks every signature, as AWS does; its faults and journal:
  {sagemaker.admin_endpoint}/_local/faults   {sagemaker.admin_endpoint}/_local/requests

Seven calls with plain curl. Paste into another terminal:

PROXY={url}            # the tracking server
# PROXY={url}/t/app    # the MLflow App: the same commands
KEY={keys.writer}
READER={keys.reader}

{CURL}

{ROLES}

The same with any MLflow client, no AWS plugin:

export MLFLOW_TRACKING_URI={url}            # the tracking server
# export MLFLOW_TRACKING_URI={url}/t/app    # the MLflow App
{CLIENT}

Ctrl-C ends everything. Requests appear below.
{bar}"""


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _wait_until_ready(proxy: subprocess.Popen[bytes], port: int, key: str, ended: threading.Event) -> None:
    opener = build_opener(ProxyHandler({}))  # an http_proxy of the environment is not for this
    ready = Request(f"http://{_HOST}:{port}/-/ready", headers={"X-API-Key": key})
    give_up = time.monotonic() + _START_DEADLINE
    reason = ""
    while time.monotonic() < give_up and not ended.is_set():
        if proxy.poll() is not None:
            raise LocalError(f"the proxy ended with exit code {proxy.returncode}")
        try:
            with opener.open(ready, timeout=10):
                return
        except (URLError, OSError) as error:
            reason = str(error)
        time.sleep(0.2)
    if not ended.is_set():
        raise LocalError(f"the proxy was not ready within {_START_DEADLINE:g} s ({reason})")
