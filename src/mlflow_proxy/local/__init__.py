"""A SageMaker with MLflow on this machine, for trying the proxy out and for tests.

It checks requests as the service does, with botocore and never with the proxy's own code, and needs the extra
`local`. `LocalSageMaker` is what tests and the demo use, `run_local` the command.
"""

from .command import guide, run_local
from .errors import LocalError
from .faults import Fault
from .stand_in import LocalSageMaker

__all__ = ["Fault", "LocalError", "LocalSageMaker", "guide", "run_local"]
