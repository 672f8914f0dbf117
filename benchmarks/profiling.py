"""Where the proxy spends its time: it runs under load while py-spy samples all its processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.load import LOADS, Load, LoadError, batch_body, put_on
from benchmarks.peers import PEERS, ROOT, Running, find_nginx, started
from benchmarks.upstream import upstream

MISSING = """\
py-spy is not installed. It is a tool for developers and in no lock file; install it beside the rest with
  .venv/bin/uv pip install py-spy"""


def profile(kind: str, seconds: int, *, native: bool) -> Path:
    """Profile the proxy under the load `kind`, "get" or "post", for `seconds`; the path of a speedscope file."""
    spy = shutil.which("py-spy", path=f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin")
    spy = spy or shutil.which("py-spy")
    if spy is None:
        raise LoadError(MISSING)
    peer = PEERS[0]
    nginx, reason = find_nginx(), peer.missing()
    if nginx is None or reason:
        raise LoadError(reason or "nginx is not installed (apt-get install nginx-light)")
    output = ROOT / ".cache" / f"profile-{kind}.speedscope.json"
    output.parent.mkdir(exist_ok=True)
    load = next(load for load in LOADS if load.connections == 32 and load.method == kind.upper())
    with tempfile.TemporaryDirectory(prefix="mlflow-proxy-bench-") as name:
        folder = Path(name)
        (folder / "body").write_bytes(batch_body())
        with (
            upstream(nginx, folder / "upstream", 1 << 20) as answering,
            started(peer, folder / peer.key, answering) as proxy,
        ):
            proxy.server.wait_for(proxy.port, peer.ready_path)
            command = [spy, "record", "--pid", str(proxy.server.tree()[0].pid), "--subprocesses", "--rate", "200"]
            command += ["--duration", str(seconds), "--format", "speedscope", "--output", str(output)]
            with _under_load(proxy, load, folder / "body", seconds + 2.0):
                _sample([*command, "--native"] if native else command)
    return output


@contextmanager
def _under_load(proxy: Running, load: Load, body: Path, seconds: float) -> Iterator[None]:
    loading = threading.Thread(
        target=put_on, args=(load, proxy.server, proxy.port, body, seconds), kwargs={"headers": proxy.peer.headers}
    )
    loading.start()
    try:
        yield
    finally:
        loading.join()


def _sample(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadError(f"py-spy failed: {done.stderr[-500:]}")
