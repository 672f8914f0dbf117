"""`mlflow-proxy local`: the local SageMaker by itself, in a terminal, until Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .errors import LocalError
from .stand_in import LocalSageMaker

_ENDINGS = (signal.SIGINT, signal.SIGTERM)


def run_local(
    state_dir: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 9500,
    region: str = "us-east-1",
    cross_account: bool = False,
    presigned_artifacts: bool = True,
    say: Callable[[str], None] = lambda line: print(line, flush=True),  # noqa: T201 (a command's output)
) -> int:
    """Start, tell how to use it, wait for SIGINT or SIGTERM, end everything. The exit code is returned."""
    for number in _ENDINGS:
        signal.signal(number, _interrupt)
    sagemaker = LocalSageMaker(
        state_dir,
        host=host,
        port=port,
        region=region,
        cross_account=cross_account,
        presigned_artifacts=presigned_artifacts,
        progress=say,
    )
    try:
        began = time.monotonic()
        sagemaker.start()
        say(f"Ready after {time.monotonic() - began:.1f} s.\n\n{guide(sagemaker)}\nCtrl-C ends it.")
        threading.Event().wait()
    except LocalError as error:
        say(f"The local SageMaker did not start: {error}")
        return 1
    except KeyboardInterrupt:
        say("Ending.")
    finally:
        sagemaker.stop()
    return 0


def _interrupt(*_: object) -> None:
    """Leave whatever is under way, once; what then ends must not be interrupted itself."""
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def guide(sagemaker: LocalSageMaker) -> str:
    """What a person needs to use it, ready to paste."""
    exports = "\n".join(f"export {name}={value}" for name, value in sagemaker.environment().items())
    arns = "\n".join(f"  {target.name:<14} {target.arn.text}" for target in sagemaker.targets)
    roles = "\n".join(f"  {name:<14} {arn}" for name, arn in sagemaker.roles.items())
    return f"""\
SageMaker MLflow  {sagemaker.endpoint}
SageMaker API     {sagemaker.sagemaker_endpoint}
STS, S3, IAM      {sagemaker.moto_endpoint}
faults, journal   {sagemaker.admin_endpoint}/_local/faults  {sagemaker.admin_endpoint}/_local/requests

Targets
{arns}
Roles
{roles}

# For any AWS client, the proxy included:
{exports}

# For AWS's own MLflow plugin (pip install mlflow sagemaker-mlflow):
export SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT={sagemaker.endpoint}
export MLFLOW_TRACKING_URI={sagemaker.tracking_arn}
python -c 'import mlflow; print(mlflow.create_experiment("hello"))'

# For the proxy, in proxy.toml:
{sagemaker.proxy_toml()}"""
