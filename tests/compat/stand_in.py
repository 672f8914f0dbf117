"""A local SageMaker with the MLflow of another environment, in a process of its own: moto allows one in a process.

Arguments: a folder, the interpreter. Prints its summary as JSON when it is ready, and ends with its standard input.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

from mlflow_proxy.local import LocalSageMaker

if __name__ == "__main__":
    with LocalSageMaker(Path(sys.argv[1]), mlflow_python=Path(sys.argv[2])) as sagemaker:
        summary = {**sagemaker.summary(), "tables": tomllib.loads(sagemaker.proxy_toml())["targets"]}
        print(json.dumps(summary), flush=True)
        sys.stdin.read()
