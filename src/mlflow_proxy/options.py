"""Every option as documentation lists it: `mlflow-proxy options`, and the tables in docs/configuration.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from mlflow_proxy.settings import ENV_PREFIX, Section, Settings

# Sections of which there may be several, each written with double brackets.
LISTED = ("roles", "targets")


class Option(BaseModel):
    """One option, as the documentation lists it."""

    section: str
    name: str
    type: str
    default: str
    description: str

    @property
    def variable(self) -> str | None:
        """Environment variable that sets it; None for those of targets and roles, which are set as one JSON list."""
        return None if self.section in LISTED else f"{ENV_PREFIX}{self.section}__{self.name}".upper()


def options() -> Iterator[Option]:
    """Every option, in the order of the documentation."""
    for section, model in sections():
        for name, field in model.model_fields.items():
            yield Option(
                section=section,
                name=name,
                type=_type_name(field),
                default=_default_text(field),
                description=field.description or "",
            )


def options_markdown() -> str:
    """All options as Markdown tables, one per section; docs/configuration.md contains exactly this."""
    parts: list[str] = []
    for section, model in sections():
        heading = f"[[{section}]]" if section in LISTED else f"[{section}]"
        parts.append(
            f"### `{heading}`\n\n{(model.__doc__ or '').strip()}\n\n| option | type | default | what it does |"
        )
        parts.append("|---|---|---|---|")
        parts += [
            f"| `{option.name}` | {option.type} | {option.default} | {option.description.replace('|', chr(92) + '|')} |"
            for option in options()
            if option.section == section
        ]
        parts.append("")
    return "\n".join(parts).strip()


def sections() -> Iterator[tuple[str, type[Section]]]:
    """The tables of the file, with what each may hold."""
    for name, field in Settings.model_fields.items():
        annotation = field.annotation
        model = annotation if isinstance(annotation, type) else get_args(annotation)[0]
        yield name, model


def _type_name(field: FieldInfo) -> str:
    annotation = field.annotation
    names = [
        _TYPE_NAMES.get(str(getattr(part, "__name__", part)), "text") for part in get_args(annotation) or (annotation,)
    ]
    if getattr(annotation, "__origin__", None) is list:
        return "list of texts"
    if any(getattr(rule, "le", None) == 1 for rule in field.metadata):
        return "share"
    if getattr(annotation, "__origin__", None) is dict:
        return "table of texts"
    if getattr(annotation, "__origin__", None) is Literal:
        return " / ".join(f"`{value}`" for value in get_args(annotation))
    return names[0]


_TYPE_NAMES = {
    "int": "number",
    "float": "seconds",
    "bool": "true / false",
    "ByteSize": "size",
    "Path": "file",
    "str": "text",
}


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return {list: "[]", dict: "{}"}.get(field.default_factory, "see text")  # type: ignore[call-overload, no-any-return]
    if isinstance(field.default, ByteSize):
        return field.default.human_readable().replace(".0", "")
    if field.default is None:
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
