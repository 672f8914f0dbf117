"""What a reload says has changed: names of options, never values."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_proxy import configuration
from mlflow_proxy.reloads import changed_options

CONFIGURATION = """
[limits]
storage = "redis://:secret@127.0.0.1:6379/0"
[[roles]]
name = "reader"
targets = ["*"]
allow = ["Get*"]
[[roles]]
name = "writer"
targets = ["*"]
allow = ["*"]
[[targets]]
name = "dev"
arn = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/team"
"""
OTHER_TARGET = CONFIGURATION[CONFIGURATION.index("[[targets]]") :].replace("dev", "prod")


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("[limits]", "[limits]", []),
        (":secret@", ":other@", ["limits.storage"]),
        ('["Get*"]', '["Search*"]', ["roles[reader].allow"]),
        ("us-east-1", "eu-west-1", ["targets[dev].arn"]),
        ('"writer"', '"owner"', ["roles[owner] (new)", "roles[writer] (gone)"]),
        ('"dev"', '"prod"', ["targets[prod] (new)", "targets[dev] (gone)"]),
        ("[[targets]]", f"{OTHER_TARGET}\n[[targets]]", ["targets[prod] (new)"]),
        ("[limits]", "[log]\nlevel = 'debug'\n[limits]\nqueue = 1", ["log.level", "limits.queue"]),
    ],
)
def test_names_of_what_differs(tmp_path: Path, old: str, new: str, names: list[str]) -> None:
    assert old in CONFIGURATION
    before, after = tmp_path / "before.toml", tmp_path / "after.toml"
    before.write_text(CONFIGURATION)
    after.write_text(CONFIGURATION.replace(old, new, 1))
    assert list(changed_options(configuration.load(before), configuration.load(after))) == names


def test_the_order_of_roles_matters(tmp_path: Path) -> None:
    settings = configuration.load(_written(tmp_path, CONFIGURATION))
    turned = settings.model_copy(update={"roles": settings.roles[::-1]})
    assert list(changed_options(settings, turned)) == ["roles (order)"]


def _written(folder: Path, text: str) -> Path:
    path = folder / "proxy.toml"
    path.write_text(text)
    return path
