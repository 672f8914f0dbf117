"""Cut botocore's service model of SageMaker down to the proxy's calls; run it when an update of botocore changes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from botocore.loaders import Loader

OPERATIONS = (
    "CreatePresignedMlflowAppUrl",
    "CreatePresignedMlflowTrackingServerUrl",
    "DescribeMlflowApp",
    "DescribeMlflowTrackingServer",
)
MODELS = Path(__file__).parents[2] / "src/mlflow_proxy/aws/models"


def cut(model: dict[str, Any]) -> dict[str, Any]:
    """The four operations and every shape that they reach, without documentation."""
    shapes: dict[str, Any] = {}
    operations = {name: _undocumented(model["operations"][name]) for name in OPERATIONS}
    for operation in operations.values():
        for part in (operation["input"], operation["output"], *operation.get("errors", [])):
            _collect(part["shape"], model["shapes"], shapes)
    return {
        "version": model["version"],
        "metadata": model["metadata"],
        "operations": operations,
        "shapes": dict(sorted(shapes.items())),
    }


def _collect(name: str, source: dict[str, Any], into: dict[str, Any]) -> None:
    if name in into:
        return
    into[name] = _undocumented(source[name])
    references = [*into[name].get("members", {}).values(), *(into[name].get(key) for key in ("member", "key", "value"))]
    for reference in references:
        if isinstance(reference, dict):
            _collect(reference["shape"], source, into)


def _undocumented(definition: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in definition.items() if key != "documentation"}


if __name__ == "__main__":
    full = Loader().load_service_model("sagemaker", "service-2")
    path = MODELS / "sagemaker" / full["metadata"]["apiVersion"] / "service-2.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cut(full), indent=1) + "\n")
