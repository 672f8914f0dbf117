"""The AWS CDK application: four stacks, two modes. `app.py` puts them together; each stack is one file."""

import os
import sys
from pathlib import Path

# CDK's library runs in Node.js. The one from PyPI in this environment goes before the system's, which may be too old.
_NODE = Path(sys.executable).parent / "node"
if _NODE.exists():
    os.environ.setdefault("JSII_NODE", str(_NODE))
