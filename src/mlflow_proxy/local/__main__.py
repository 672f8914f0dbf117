"""`python -m mlflow_proxy.local [folder]`: the local SageMaker by itself."""

import sys
import tempfile
from pathlib import Path

from .command import run_local

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="local-sagemaker-"))
    sys.exit(run_local(folder))
