"""Where the boxes of a picture stand, and the picture as SVG. What they say comes from `picture`.

From top to bottom: callers, what stands before the VPC, the VPC with its zones, what the VPC's endpoints lead to, and
what is behind that. Lines run in channels left and right of the zones, so that none crosses a box.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from infra.picture import Arrow, Box, Picture

_WIDTH, _HEIGHT = 1080, 1082
# Colours of stacks by light and dark background: line, and fill.
_STACKS = {
    "networking": ("sagemaker-infra-networking", ("#52708f", "#e8eff6"), ("#8fb0d1", "#1d2b3a")),
    "domain": ("sagemaker-infra-domain", ("#7c4fb0", "#f1e9fa"), ("#b893e3", "#2c2139")),
    "mlflow": ("sagemaker-infra-mlflow-{}", ("#0d7f73", "#dff3f0"), ("#4cc0b2", "#12302d")),
    "flaskapp": ("sagemaker-infra-flaskapp-{}", ("#b45309", "#fdf0e0"), ("#e8a15a", "#38260f")),
    "": ("not made by these stacks", ("#6b7280", "#f3f4f6"), ("#9ca3af", "#242a33")),
}
_KINDS = {"request": "a request's way", "api": "what it takes besides", "record": "logs and alarms"}
_LINE = 15
# Of the fonts that browsers take, one letter is about so wide, as a part of the font's size.
_LETTER, _TITLE_LETTER = 0.55, 0.6
_TITLE_SIZE, _TEXT_SIZE = 13.0, 11.5

_ZONES_LEFT, _ZONES_RIGHT, _ZONE_GAP = 104, 940, 26
_PUBLIC, _PRIVATE, _ISOLATED = (276, 62), (350, 216), (578, 84)
_CELL_TOP, _CELL_HEIGHT = 704, 46
_SERVICES, _BEHIND, _SERVICE_HEIGHT = 806, 920, 66
_COLUMNS = ("mlflow", "roles", "secrets", "logs", "store", "ssm")
_CHANNEL_LOGS, _CHANNEL_OUT, _CHANNEL_NAT, _CHANNEL_RIGHT, _CHANNEL_OPERATORS = 330, 66, 84, 961, 1047


class Place(NamedTuple):
    """Where a box stands."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """Of its width."""
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def centre(self) -> float:
        """Of its height."""
        return self.y + self.height / 2


Point = tuple[float, float]


def places(picture: Picture) -> dict[str, Place]:
    """Where each box stands that the picture has; `host` and `nat` once for each zone, with its number."""
    inner = Place(_ZONES_LEFT + 16, 0, _ZONES_RIGHT - _ZONES_LEFT - 32, 0)
    made = {
        "clients": Place(352, 18, 340, 46),
        "operators": Place(856, 18, 208, 46),
        "access_logs": Place(212, 136, 200, 58),
        "waf": Place(432, 136, 180, 58),
        "maker": Place(652, 136, 166, 58),
        "certificate": Place(848, 136, 180, 58),
        "balancer": Place(inner.x, 378, inner.width, 46),
        "compute": Place(inner.x, 458, inner.width, 96),
        "valkey": Place(inner.x + 60, 608, inner.width - 120, 44),
    }
    width, gap = 152, 12
    for index, name in enumerate(_COLUMNS):
        x = 48 + index * (width + gap)
        made[name] = Place(x, _SERVICES, width, _SERVICE_HEIGHT)
        made[f"to_{name}"] = Place(x, _CELL_TOP, width, _CELL_HEIGHT)
    made["artifacts"] = made["mlflow"]._replace(y=_BEHIND)
    made["alarms"] = made["logs"]._replace(y=_BEHIND)
    made["topic"] = made["store"]._replace(y=_BEHIND)
    made["domain"] = made["roles"]._replace(y=_BEHIND)
    found = {name: place for name, place in made.items() if name in picture.boxes}
    for number, zone in enumerate(_zones(picture)):
        found[f"host {number}"] = Place(zone.middle - 100, 484, 200, 62)
        if picture.zones[number].nat:
            found[f"nat {number}"] = Place(zone.x + 28, _PUBLIC[0] + 24, 130, 30)
    return found


def _zones(picture: Picture) -> list[Place]:
    count = len(picture.zones)
    width = (_ZONES_RIGHT - _ZONES_LEFT - (count - 1) * _ZONE_GAP) / count
    bottom = sum(_ISOLATED) + 6
    return [Place(_ZONES_LEFT + n * (width + _ZONE_GAP), 250, width, bottom - 250) for n in range(count)]


def route(arrow: Arrow, at: dict[str, Place]) -> list[Point]:
    """The corners of an arrow's line. Raises KeyError for one that has no way."""
    begin, end = at.get(arrow.begin, _NOWHERE), at.get(arrow.end, _NOWHERE)
    nat = next((place for name, place in at.items() if name.startswith("nat")), _NOWHERE)
    down = [(begin.middle, begin.bottom), (begin.middle, end.y)]
    ways: dict[tuple[str, str], list[Point]] = {
        ("clients", "waf"): down,
        ("clients", "balancer"): down,
        ("waf", "balancer"): down,
        ("maker", "certificate"): [(begin.right, begin.centre), (end.x, end.centre)],
        ("certificate", "balancer"): [
            (_CHANNEL_RIGHT, begin.bottom),
            (_CHANNEL_RIGHT, end.centre),
            (end.right, end.centre),
        ],
        ("balancer", "access_logs"): [(_CHANNEL_LOGS, begin.y), (_CHANNEL_LOGS, end.bottom)],
        ("balancer", "compute"): down,
        ("compute", "valkey"): down,
        ("compute", "endpoints"): [
            (begin.right, begin.centre),
            (_CHANNEL_RIGHT, begin.centre),
            (_CHANNEL_RIGHT, _CELL_TOP - 26),
        ],
        ("compute", "nat"): [
            (begin.x, begin.centre),
            (_CHANNEL_NAT, begin.centre),
            (_CHANNEL_NAT, nat.y + 22),
            (nat.x, nat.y + 22),
        ],
        ("nat", "mlflow"): [
            (nat.x, nat.y + 9),
            (_CHANNEL_OUT, nat.y + 9),
            (_CHANNEL_OUT, end.y),
        ],
        ("mlflow", "artifacts"): down,
        ("logs", "alarms"): down,
        ("alarms", "topic"): [(begin.right, begin.centre), (end.x, end.centre)],
        ("operators", "ssm"): [
            (_CHANNEL_OPERATORS, begin.bottom),
            (_CHANNEL_OPERATORS, _SERVICES - 20),
            (end.middle + 40, _SERVICES - 20),
            (end.middle + 40, end.y),
        ],
    }
    if arrow.begin == f"to_{arrow.end}":
        return down
    return ways[arrow.begin, arrow.end]


_NOWHERE = Place(0, 0, 0, 0)


def draw(picture: Picture) -> str:
    """The picture as SVG, for light and dark pages, with a title and a description for those who do not see it."""
    at = places(picture)
    parts = [
        *_head(picture),
        *_frames(picture),
        *(line for arrow in picture.arrows for line in _arrow(arrow, route(arrow, at))),
        *(line for name, place in at.items() for line in _box(picture, name, place)),
        *(line for arrow in picture.arrows for line in _label(arrow, route(arrow, at))),
        *_legend(picture),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _head(picture: Picture) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="title desc"'
    )
    yield "  font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\">"
    yield f'<title id="title">{escape(picture.title)}</title>'
    yield f'<desc id="desc">{escape(describe(picture))}</desc>'
    yield "<style>"
    yield f"  text {{ font-size: {_TEXT_SIZE}px; fill: var(--text) }}"
    yield f"  .title {{ font-size: {_TITLE_SIZE}px; font-weight: 600 }}"
    yield "  .soft { fill: var(--soft) } .frame { fill: none; stroke: var(--soft); stroke-dasharray: 5 4 }"
    yield "  .box { stroke-width: 1.4 } .line { fill: none; stroke-width: 1.6 } .request { stroke-width: 2.6 }"
    yield "  .record { stroke-dasharray: 2 4; stroke-width: 2 }"
    yield "  .halo { stroke: var(--page); stroke-width: 5; paint-order: stroke }"
    yield f"  svg {{ {_variables(0)} }}"
    yield f"  @media (prefers-color-scheme: dark) {{ svg {{ {_variables(1)} }} }}"
    yield "</style>"
    yield "<defs>"
    for kind in _KINDS:
        yield (
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.5 8 4 0 7.5z" fill="var(--{kind})"/></marker>'
        )
    yield "</defs>"
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="var(--page)"/>'


def _variables(dark: int) -> str:
    plain = {
        "page": ("#ffffff", "#11161d"),
        "text": ("#1f2937", "#e5e7eb"),
        "soft": ("#5b6472", "#a7b0bd"),
        "subnet": ("#f4f7fa", "#161e28"),
        "request": ("#1d4ed8", "#7ea6ff"),
        "api": ("#4b5563", "#b6bfcc"),
        "record": ("#a21caf", "#e191ea"),
    }
    found = {name: colours[dark] for name, colours in plain.items()}
    for name, (_, *colours) in _STACKS.items():
        found[f"{name or 'none'}-line"], found[f"{name or 'none'}-fill"] = colours[dark]
    return " ".join(f"--{name}: {colour};" for name, colour in found.items())


def _frames(picture: Picture) -> Iterator[str]:
    """Region, VPC, zones, subnets."""
    yield _rect(Place(16, 92, 1048, 908), 'class="frame"', 10)
    yield _text(30, 112, "AWS region", "soft")
    vpc = Place(40, 212, 988, 554)
    yield _rect(vpc, 'class="box" fill="none" stroke="var(--networking-line)"', 8)
    yield _text(_ZONES_LEFT, 234, f"VPC {picture.vpc}", "title")
    kinds = (("public", _PUBLIC), ("private", _PRIVATE), ("isolated", _ISOLATED))
    for number, zone in enumerate(_zones(picture)):
        yield _rect(zone, 'class="frame"', 6)
        yield _text(zone.x + 10, zone.y + 17, f"Availability Zone {number + 1}", "soft")
        for kind, (top, height) in kinds:
            yield _rect(Place(zone.x + 6, top, zone.width - 12, height), 'fill="var(--subnet)"', 4)
            yield _text(zone.x + 14, top + 15, f"{kind} subnet {picture.zones[number].subnets[kind]}", "soft")
    yield _rect(Place(46, _CELL_TOP - 26, 976, _CELL_HEIGHT + 36), 'fill="var(--subnet)"', 4)
    others = f"; also {', '.join(picture.other_endpoints)}" if picture.other_endpoints else ""
    yield _text(_ZONES_LEFT, _CELL_TOP - 9, f"VPC endpoints, in the private subnets{others}", "soft")


def _box(picture: Picture, name: str, place: Place) -> Iterator[str]:
    kind = name.partition(" ")[0]
    box = Box("networking", "NAT gateway") if kind == "nat" else picture.boxes[kind]
    stack = box.stack or "none"
    style = f'class="box" fill="var(--{stack}-fill)" stroke="var(--{stack}-line)"'
    yield _rect(place, style, 5)
    if kind == "compute":  # hosts stand in it
        yield _text(place.x + 12, place.y + 18, box.title, "title")
        return
    lines = [(box.title, "title"), *((line, "") for line in box.lines)]
    top = place.centre - _LINE * len(lines) / 2 + 11
    for index, (line, style) in enumerate(lines):
        yield _text(place.middle, top + index * _LINE, line, style, middle=True)


def _arrow(arrow: Arrow, points: list[Point]) -> Iterator[str]:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    yield (f'<path class="line {arrow.kind}" stroke="var(--{arrow.kind})" d="{path}" marker-end="url(#{arrow.kind})"/>')


def _label(arrow: Arrow, points: list[Point]) -> Iterator[str]:
    """Beside where the last part of the line begins, with the page's colour around its letters."""
    if arrow.label:
        (x1, y1), (x2, _) = points[-2:]
        upright = x1 == x2
        x, y = (x1 + 9, y1 + 18) if upright else ((x1 + x2) / 2, y1 - 6)
        if arrow.end == "mlflow":  # below the VPC
            y = _SERVICES - 16
        yield _text(x, y, arrow.label, "halo", middle=not upright)


def _legend(picture: Picture) -> Iterator[str]:
    top = 1024
    for index, (stack, (name, *_)) in enumerate(_STACKS.items()):
        x = 20 + (index % 3) * 262
        y = top + (index // 3) * 26
        style = f'class="box" fill="var(--{stack or "none"}-fill)" stroke="var(--{stack or "none"}-line)"'
        yield _rect(Place(x, y - 12, 20, 15), style, 3)
        yield _text(x + 28, y, name.format(picture.mode))
    for index, (kind, words) in enumerate(_KINDS.items()):
        y = top - 4 + index * 20
        yield from _arrow(Arrow("", "", kind), [(830, y), (880, y)])
        yield _text(890, y + 4, words)


def _rect(place: Place, style: str, radius: int) -> str:
    x, y, width, height = (f"{one:g}" for one in place)
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" {style}/>'


def _text(x: float, y: float, text: str, style: str = "", *, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    styled = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}"{anchor}{styled}>{escape(text)}</text>'


def text_width(text: str, *, title: bool = False) -> float:
    """About how wide a text is."""
    return len(text) * (_TITLE_LETTER * _TITLE_SIZE if title else _LETTER * _TEXT_SIZE)


def describe(picture: Picture) -> str:
    """The picture in words: which box leads to which."""
    names = {name: box.title for name, box in picture.boxes.items()} | {
        "nat": "NAT gateway",
        "endpoints": "VPC endpoints",
    }
    ways = (
        f"{names[one.begin]}{' endpoint' if one.begin.startswith('to_') else ''} to {names[one.end]}"
        for one in picture.arrows
    )
    return f"{picture.title}, in a VPC over {len(picture.zones)} zones. Arrows: {'; '.join(ways)}."
