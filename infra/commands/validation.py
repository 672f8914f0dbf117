"""Trying a deployment after it was made: with an API key that counts for this only, and is revoked afterwards.

The calls themselves are `mlflow-proxy validate`; this is what it needs around it: a way to the load balancer, its
certificate, a key in the secret that the proxy reads.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.settings import Settings
from mlflow_proxy.access.key_record import Key, KeysError, make_key, parse_keys, show_time
from mlflow_proxy.settings import Access

KEY_NAME = "deploy-validation"
_KEY_LIFETIME = timedelta(minutes=30)
# Each worker of the proxy looks at the secret so often; until then it may not know the key. In seconds.
REFRESH = Access().keys_refresh
_MARGIN = 5.0
# How long after that a key may still be refused, since the last look may just have failed.
_GRACE = 120.0
_POLL = 2.0
_ROOT = Path(__file__).parent.parent.parent
_ON_HOST = "/opt/mlflow-proxy/current/bin/"


def role_for_validation(settings: Settings) -> str | None:
    """The role that may make and delete what the validation makes: `writer`, else one that may do everything."""
    able = [role.name for role in settings.roles if "*" in role.allow and not role.deny]
    return "writer" if "writer" in able else next(iter(able), None)


def save_certificate(acm: Any, command: str, path: Path) -> Path:
    """Do what the stack's output CertificateCommand does, without the AWS command line."""
    match = re.search(r"--certificate-arn (\S+)", command)
    assert match is not None, "the stack's output CertificateCommand names the certificate"  # noqa: S101
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(acm.get_certificate(CertificateArn=match[1])["Certificate"], "utf-8")
    return path


def unreachable(url: str, ca: Path | None, seconds: float) -> str | None:
    """Why nothing answers at this URL within that time; None if something does, whatever it says."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            _status(f"{url}/-/health", ca, {})
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                return None  # somebody is there; the validation says what is wrong with the certificate
            if time.monotonic() >= deadline:
                return str(reason)
            time.sleep(min(_POLL, seconds))
        else:
            return None


def _status(url: str, ca: Path | None, headers: Mapping[str, str]) -> int:
    """The status of the answer to a GET. Raises OSError where there is none."""
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310  (the stack's own URL, https)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:  # noqa: S310
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


@contextmanager
def short_lived_key(secrets: Any, arn: str, role: str) -> Iterator[str]:
    """An API key of that role in the secret; revoked at the end, however that comes.

    Raises KeysError if the secret's text cannot be used. Two people who change the secret at the same time overwrite
    each other: Secrets Manager has no conditional writes.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    held = _read(secrets, arn)
    text, key = make_key(
        KEY_NAME,
        role,
        created=now,
        expires=now + _KEY_LIFETIME,
        taken=[part for one in held for part in (one.id, one.name)],
    )
    # Those of earlier deployments are over: one of them is left, so that the secret does not fill up.
    kept = [one for one in held if one.name != KEY_NAME or one.state(now.timestamp()) == "active"]
    try:
        _write(secrets, arn, [*kept, key])
        print(f"  Made the API key {key.id} of role {role}, for this only.", flush=True)  # noqa: T201
        yield text
    finally:
        _revoke(secrets, arn, key)


def _read(secrets: Any, arn: str) -> list[Key]:
    text = secrets.get_secret_value(SecretId=arn)["SecretString"]
    try:
        return list(parse_keys(text.encode()).values())
    except KeysError as error:
        raise KeysError(f"the secret {arn}, {error}") from None


def _write(secrets: Any, arn: str, keys: list[Key]) -> None:
    secrets.put_secret_value(SecretId=arn, SecretString="".join(json.dumps(key.fields()) + "\n" for key in keys))


def _revoke(secrets: Any, arn: str, key: Key) -> None:
    """Void the key. A second Ctrl-C must not keep it alive; if this fails, it still expires by itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        now = datetime.now(UTC).replace(microsecond=0)
        held = _read(secrets, arn)
        if any(one.id == key.id for one in held):
            _write(secrets, arn, [replace(one, revoked=now) if one.id == key.id else one for one in held])
        print(f"  Revoked the API key {key.id}.", flush=True)  # noqa: T201
    except Exception as error:
        ends = show_time(key.expires) if key.expires else "never"
        print(f"  The API key {key.id} could not be revoked ({error}). It expires at {ends}.", flush=True)  # noqa: T201
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until_accepted(url: str, ca: Path | None, key: str, refresh: float) -> bool:
    """Wait until every worker must have looked at the secret since, and one more answer was no refusal.

    `refresh`: how often workers look, in seconds. False if the key is refused even long after that.
    """
    known = time.monotonic() + refresh + _MARGIN
    deadline = known + _GRACE
    print(f"  Waiting until all instances know it (about {refresh + _MARGIN:.0f} s) …", flush=True)  # noqa: T201
    time.sleep(refresh + _MARGIN)
    while time.monotonic() < deadline:
        try:
            if _status(f"{url}/-/whoami", ca, {"Authorization": f"Bearer {key}"}) != 401:
                return True
        except OSError:
            pass
        time.sleep(_POLL)
    return False


def run_validate(url: str, ca: Path | None, key: str) -> int:
    """`mlflow-proxy validate`, with the key in its environment, where no process list shows it. Its exit code."""
    command = [sys.executable, "-m", "mlflow_proxy", "validate", "--url", url]
    if ca is not None:
        command += ["--ca", str(ca)]
    sys.stdout.flush()
    return subprocess.run(command, env={**os.environ, "MLFLOW_PROXY_KEY": key}, check=False).returncode  # noqa: S603


def by_hand(settings: Settings, outputs: Mapping[str, str], region: str, ca: Path | None) -> str:
    """How to validate a load balancer that this machine cannot reach. `ca`: its certificate, if that is self-signed."""
    host, url = outputs["LoadBalancerHost"], outputs["Url"]
    name = url.removeprefix("https://")
    lines = ["", "To validate it where the proxy runs, make a key and open a shell as shown below, and there run:"]
    trusted = ""
    if ca is not None:
        trusted = " --ca /tmp/mlflow-proxy.pem"
        lines.append(f"  cat > /tmp/mlflow-proxy.pem    # paste {ca.relative_to(_ROOT)}, then Ctrl-D")
    folder = _ON_HOST if settings.compute == "ec2" else ""
    lines.append(f"  MLFLOW_PROXY_KEY=… {folder}mlflow-proxy validate --url {url}{trusted}")
    instance = re.search(r"\$\(.*\)", outputs["ShellCommand"])
    if settings.compute == "ec2" and instance is not None:
        lines += [
            "Or from here, through a tunnel of Session Manager, with its plugin for the AWS command line:",
            f"  aws ssm start-session --region {region} --target {instance[0]} \\",
            "    --document-name AWS-StartPortForwardingSessionToRemoteHost \\",
            f"    --parameters 'host={host},portNumber=443,localPortNumber=8443'",
            f"  echo '127.0.0.1 {name}' | sudo tee -a /etc/hosts   # remove it afterwards",
            f"  MLFLOW_PROXY_KEY=… .venv/bin/mlflow-proxy validate --url https://{name}:8443"
            + (f" --ca {ca.relative_to(_ROOT)}" if ca is not None else ""),
        ]
    if settings.allowed_cidrs:
        allowed = ", ".join(settings.allowed_cidrs)
        lines.append(
            f"That comes from an address of the VPC, so allowed_cidrs ({allowed}) must have its network in it."
        )
    return "\n".join(lines)
