"""The architecture's pictures: what the stacks give now, legible, and true to the templates."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import pytest
from infra.picture import IMAGES, VARIANTS, Picture, Templates, read
from infra.picture_drawing import draw, text_width
from tests.infra.variants import Synthesized, synthesize

SVG = "{http://www.w3.org/2000/svg}"


@cache
def made(name: str) -> Synthesized:
    return synthesize(**VARIANTS[name])


@cache
def picture(name: str) -> Picture:
    return read(Templates(made(name).templates))


@cache
def drawn(name: str) -> ET.Element:
    return ET.fromstring(draw(picture(name)))


@pytest.mark.parametrize("name", VARIANTS)
def test_picture_on_disk_is_what_the_stacks_give(name: str) -> None:
    path = IMAGES / f"architecture-aws-{name}.svg"
    assert path.read_text() == draw(picture(name)), "write it anew: .venv/bin/python -m infra.picture"


def test_no_picture_is_left_over() -> None:
    assert {path.stem.removeprefix("architecture-aws-") for path in IMAGES.glob("architecture-aws-*")} == set(VARIANTS)


class Area(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    what: str

    def overlaps(self, other: Area) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def holds(self, other: Area) -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


def texts(root: ET.Element) -> list[Area]:
    """Where the texts are, as wide as in the widest font that browsers would take."""
    found = []
    for one in root.iter(f"{SVG}text"):
        text = one.text or ""
        width = text_width(text, title=one.get("class") == "title")
        left, base = float(one.attrib["x"]), float(one.attrib["y"])
        left -= width / 2 if one.get("text-anchor") == "middle" else 0
        found.append(Area(left, base - 9, left + width, base + 3, text))
    return found


def boxes(root: ET.Element) -> list[Area]:
    """The boxes in which something stands: those with a colour of their stack."""
    found = []
    for one in root.iter(f"{SVG}rect"):
        if one.get("class") == "box" and one.get("fill") != "none":
            x, y, width, height = (float(one.attrib[name]) for name in ("x", "y", "width", "height"))
            found.append(Area(x, y, x + width, y + height, str(one.attrib["stroke"])))
    return found


def lines(root: ET.Element) -> Iterator[list[Area]]:
    """The parts of each arrow's line, all of them upright or level."""
    for one in root.iter(f"{SVG}path"):
        if "line" in one.get("class", ""):
            corners = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", one.attrib["d"])]
            parts = []
            for (x1, y1), (x2, y2) in pairwise(corners):
                assert x1 == x2 or y1 == y2
                parts.append(Area(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), one.attrib["d"]))
            yield parts


@pytest.mark.parametrize("name", VARIANTS)
def test_no_text_leaves_its_box_or_meets_another(name: str) -> None:
    root = drawn(name)
    found = texts(root)
    for one, other in combinations(found, 2):
        assert not one.overlaps(other), (one.what, other.what)
    for text in found:
        for box in boxes(root):
            assert box.holds(text) or not box.overlaps(text), text.what
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(Area(0, 0, width, height, "").holds(text) for text in found)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_box_meets_another(name: str) -> None:
    """Hosts stand in their group, whole."""
    for one, other in combinations(boxes(drawn(name)), 2):
        assert not one.overlaps(other) or one.holds(other), (one, other)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_line_crosses_a_text_a_box_or_another_line(name: str) -> None:
    root = drawn(name)
    found = list(lines(root))
    for parts in found:
        for part in parts:
            touched = [text.what for text in texts(root) if text.overlaps(part)]
            assert touched == []
            # At its ends it touches the boxes that it leads from and to, and goes through none.
            inner = Area(part.left + 0.5, part.top + 0.5, part.right - 0.5, part.bottom - 0.5, "")
            assert not [box for box in boxes(root) if box.overlaps(inner)], part
    for one, other in combinations(found, 2):
        assert not [part for part in one for also in other if part.overlaps(also)], (one, other)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_can_be_read_without_being_seen_and_in_the_dark(name: str) -> None:
    root = drawn(name)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title desc"
    title, description = (root.find(f"{SVG}{kind}") for kind in ("title", "desc"))
    assert title is not None
    assert title.text == picture(name).title
    assert description is not None
    assert "AWS WAF to Application Load Balancer" in (description.text or "")
    style = root.find(f"{SVG}style")
    assert style is not None
    light, dark = (style.text or "").split("prefers-color-scheme: dark")
    names = set(re.findall(r"--([a-z-]+):", light))
    assert names == set(re.findall(r"--([a-z-]+):", dark))
    assert set(re.findall(r"var\(--([a-z-]+)\)", ET.tostring(root, encoding="unicode"))) <= names


def _luminance(colour: str) -> float:
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_have_contrast_enough() -> None:
    """4.5 to 1 (WCAG 2.2, 1.4.3)."""
    style = next(drawn("tracking-ec2").iter(f"{SVG}style")).text or ""
    for scheme in style.split("prefers-color-scheme: dark"):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", scheme))
        grounds = [value for name, value in colours.items() if name.endswith("-fill") or name in ("page", "subnet")]
        assert len(grounds) == 7
        pairs = [("text", ground) for ground in grounds] + [("soft", colours["page"]), ("soft", colours["subnet"])]
        for name, ground in pairs:
            bright, dim = sorted((_luminance(colours[name]), _luminance(ground)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, ground)


def arrows(templates: dict[str, Any]) -> set[tuple[str, str]]:
    return {(one.begin, one.end) for one in read(Templates(templates)).arrows}


def without(templates: dict[str, Any], type_: str) -> dict[str, Any]:
    """The templates without the resources of a type."""
    changed = copy.deepcopy(templates)
    for template in changed.values():
        template["Resources"] = {n: one for n, one in template["Resources"].items() if one["Type"] != type_}
    return changed


@pytest.mark.parametrize(
    ("type_", "gone"),
    [
        ("AWS::WAFv2::WebACLAssociation", ("waf", "balancer")),
        ("AWS::EC2::SecurityGroupIngress", ("compute", "valkey")),
        ("AWS::EC2::VPCEndpoint", ("to_roles", "roles")),
        ("AWS::EC2::VPCEndpoint", ("compute", "endpoints")),
        ("AWS::IAM::Policy", ("to_secrets", "secrets")),
        ("AWS::IAM::Policy", ("mlflow", "artifacts")),
        ("AWS::IAM::Policy", ("operators", "ssm")),
    ],
)
def test_an_arrow_stands_for_something_in_the_templates(type_: str, gone: tuple[str, str]) -> None:
    whole = made("tracking-ec2").templates
    assert gone in arrows(whole)
    assert gone not in arrows(without(whole, type_))


def test_app_is_reached_through_the_nat_gateway_and_a_tracking_server_through_its_endpoint() -> None:
    server, app = (arrows(made(name).templates) for name in ("tracking-ec2", "serverless-fargate"))
    assert ("to_mlflow", "mlflow") in server
    assert ("nat", "mlflow") not in server
    assert ("nat", "mlflow") in app
    assert ("to_mlflow", "mlflow") not in app


@pytest.mark.parametrize(
    "chosen",
    [{"waf": "false"}, {"zones": "3", "nat_gateways": "per-zone"}, {"nat_gateways": "0"}, {"endpoints": "none"}],
    ids=",".join,
)
def test_other_settings_can_be_drawn_too(chosen: dict[str, str]) -> None:
    found = read(Templates(synthesize(**chosen).templates))
    root = ET.fromstring(draw(found))
    assert ("waf" in found.boxes) is (chosen.get("waf") != "false")
    assert len(list(root.iter(f"{SVG}text"))) > 40
