"""What each variant makes, as files that reviewers can read: snapshots/. Run with SNAPSHOTS=write to write them anew.

A mode and compute with a self-signed certificate is shown whole; another TLS variant as its difference from that one.
Hashes of assets are left out, so that a changed source file does not change every snapshot.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from tests.infra.variants import CLIENT_CERTIFICATES, COMPUTES, MODES, SIGN_IN, TLS, synthesize

FOLDER = Path(__file__).parent / "snapshots"
VARIANTS = {name: more for name, more in TLS.items() if name != "self-signed"} | {
    "sign-in": SIGN_IN,
    "client-certificates": CLIENT_CERTIFICATES,
}


class Text(str):
    """A text that is shown line by line."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def readable(template: dict[str, Any]) -> str:
    """A template as YAML: resources by their logical ids, functions in short, user data as the script that it is."""
    shown = {
        "Resources": {name: _resource(resource) for name, resource in sorted(template["Resources"].items())},
        "Outputs": {name: _short(one.get("Value")) for name, one in sorted(template.get("Outputs", {}).items())},
    }
    text = yaml.dump(shown, Dumper=_Dumper, sort_keys=False, width=160, allow_unicode=True)
    # When the function for certificates is asked again.
    text = re.sub(r"Quarter: [0-9]{4}-Q[1-4]", "Quarter: <quarter>", text)
    return re.sub(r"[0-9a-f]{64}", "<hash>", text)


def _resource(resource: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in resource.items() if name != "Metadata"}
    return dict(_short(kept))


def _short(value: Any) -> Any:  # noqa: PLR0911  (one per function of CloudFormation)
    if isinstance(value, list):
        return [_short(one) for one in value]
    if not isinstance(value, dict):
        return value
    if list(value) == ["Ref"]:
        return f"!Ref {value['Ref']}"
    if list(value) == ["Fn::GetAtt"]:
        return "!GetAtt " + ".".join(value["Fn::GetAtt"])
    if list(value) == ["Fn::ImportValue"]:
        return f"!ImportValue {value['Fn::ImportValue']}"
    if list(value) == ["Fn::Join"]:
        separator, parts = value["Fn::Join"]
        joined = separator.join(map(_part, parts))
        return Text(joined) if "\n" in joined else joined
    if list(value) == ["Fn::Base64"]:
        return _short(value["Fn::Base64"])
    return {name: _short(one) for name, one in value.items() if name not in ("Tags", "TagSpecifications")}


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    short = _short(part)
    return "${" + (short.lstrip("!") if isinstance(short, str) else json.dumps(short)) + "}"


def check(name: str, text: str) -> None:
    path = FOLDER / name
    if os.environ.get("SNAPSHOTS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    kept = path.read_text() if path.exists() else ""
    assert text == kept, f"{path.name} differs; look at it, then write it anew with SNAPSHOTS=write"


def test_shared_stacks() -> None:
    made = synthesize().templates
    check("networking.yaml", readable(made["networking"]))
    check("domain.yaml", readable(made["domain"]))


@pytest.mark.parametrize("mode", MODES)
def test_mlflow(mode: str) -> None:
    check(f"mlflow-{mode}.yaml", readable(synthesize(mode).templates["mlflow"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", COMPUTES)
def test_proxy(mode: str, compute: str) -> None:
    base = readable(synthesize(mode, compute).templates["flaskapp"])
    check(f"flaskapp-{mode}-{compute}-self-signed.yaml", base)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("tls", VARIANTS)
def test_proxy_with_other_tls(mode: str, compute: str, tls: str) -> None:
    base = readable(synthesize(mode, compute).templates["flaskapp"]).splitlines()
    other = readable(synthesize(mode, compute, **VARIANTS[tls]).templates["flaskapp"]).splitlines()
    difference = "\n".join(difflib.unified_diff(base, other, "self-signed", tls, lineterm="", n=2)) + "\n"
    assert difference != "\n"
    check(f"flaskapp-{mode}-{compute}-{tls}.diff", difference)


def test_no_snapshot_is_left_over() -> None:
    named = {f"flaskapp-{mode}-{compute}-{tls}.diff" for mode in MODES for compute in COMPUTES for tls in VARIANTS}
    named |= {f"flaskapp-{mode}-{compute}-self-signed.yaml" for mode in MODES for compute in COMPUTES}
    named |= {f"mlflow-{mode}.yaml" for mode in MODES} | {"networking.yaml", "domain.yaml"}
    assert {path.name for path in FOLDER.iterdir()} == named


def test_snapshots_hide_no_secret_and_no_folder_of_this_machine() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert str(Path.home()) not in text
        assert "/tmp/infra" not in text
