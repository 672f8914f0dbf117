"""The part of the chart's values.schema.json that is about the proxy's own options, made from the options themselves.

`python -m tests.deploy.helm_schema` writes it into the chart; a test fails when the two differ. It knows the types of
options, so that a misspelt or mistyped one ends `helm upgrade`. What a value must be beyond that, the proxy says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow_proxy.options import LISTED, Option, options, sections

SCHEMA = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "values.schema.json"

_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "file": {"type": "string"},
    "number": {"type": "integer"},
    "seconds": {"type": "number"},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "size": {"type": ["integer", "string"]},
    "true / false": {"type": "boolean"},
    "list of texts": {"type": "array", "items": {"type": "string"}},
    "table of texts": {"type": "object", "additionalProperties": {"type": "string"}},
}


def configuration_schema() -> dict[str, Any]:
    """JSON schema of the value `config`."""
    tables = {name: _table([option for option in options() if option.section == name]) for name, _ in sections()}
    return {
        "description": "The proxy's configuration, option for option as in docs/configuration.md.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {"type": "array", "items": table} if name in LISTED else table for name, table in tables.items()
        },
    }


def _table(listed: list[Option]) -> dict[str, Any]:
    table: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {option.name: _option(option) for option in listed},
    }
    required = [option.name for option in listed if option.default == "required"]
    return {**table, "required": required} if required else table


def _option(option: Option) -> dict[str, Any]:
    if option.type in _TYPES:
        return {"description": option.description, **_TYPES[option.type]}
    return {"description": option.description, "enum": [choice.strip("` ") for choice in option.type.split("/")]}


if __name__ == "__main__":
    schema = json.loads(SCHEMA.read_text("utf-8"))
    schema["properties"]["config"] = configuration_schema()
    SCHEMA.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", "utf-8")
