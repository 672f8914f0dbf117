"""The chart of docs/performance.md: horizontal bars in groups, as an SVG that reads on light and dark pages alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.results import DownloadRow, Row

CHARTED_CONNECTIONS = (32, 256)
COLOURS = {
    "proxy": "#0d9488",
    "proxy-no-audit": "#2fa39b",
    "proxy-bare": "#5eaaa4",
    "envoy": "#b45fc9",
    "naive": "#d97706",
    "nginx": "#8a94a6",
    "direct": "#a3a38f",
}
WIDTH, LEFT, RIGHT = 860, 190, 90
BAR, STEP, GAP, TOP = 15, 19, 20, 26


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: whose, how long in the chart's unit, and what stands at its end."""

    key: str
    title: str
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that are compared with each other."""

    title: str
    bars: Sequence[Bar]


def chart(rows: Sequence[Row], downloads: Sequence[DownloadRow]) -> str:
    """An SVG document: requests per second at many connections (without the load's own limit), then the download."""
    shown = [row for row in rows if row.load.connections in CHARTED_CONNECTIONS and row.peer.key != "direct"]
    loads = dict.fromkeys(row.load for row in shown)
    requests = [Group(load.label, [_request_bar(row) for row in shown if row.load == load]) for load in loads]
    transfers = [Group("download, one caller", [_download_bar(row) for row in downloads])] if downloads else []
    parts: list[str] = []
    y = _panel(parts, 0, "Requests per second (longer is better)", requests) if requests else 0
    y = _panel(parts, y, "Download, GB per second (longer is better)", transfers) if transfers else y
    return _DOCUMENT.format(width=WIDTH, height=y + 6, body="\n".join(parts))


_DOCUMENT = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"
  font-family="system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif" font-size="12">
<title>Requests per second and download rate of each peer</title>
<style>
  text {{ fill: #1f2937 }} .soft {{ fill: #5b6472 }} line {{ stroke: #9aa3b0; stroke-opacity: .45 }}
  @media (prefers-color-scheme: dark) {{ text {{ fill: #e5e7eb }} .soft {{ fill: #a7b0bd }} }}
</style>
{body}
</svg>
"""


def _request_bar(row: Row) -> Bar:
    return Bar(row.peer.key, row.peer.title, row.rate, f"{row.rate:,.0f}".replace(",", " "))


def _download_bar(row: DownloadRow) -> Bar:
    return Bar(row.peer.key, row.peer.title, row.rate, f"{row.rate / 1e9:.2f}")


def _panel(parts: list[str], top: int, title: str, groups: Sequence[Group]) -> int:
    """Draw one panel below `top`; all its groups share a scale. The y where it ends."""
    longest = max(bar.value for group in groups for bar in group.bars)
    scale = _scale(longest)
    parts.append(f'<text x="8" y="{top + 20}" font-size="14" font-weight="600">{escape(title)}</text>')
    y = top + TOP
    for group in groups:
        parts.append(f'<text x="8" y="{y + 18}" font-weight="600" class="soft">{escape(group.title)}</text>')
        y += GAP + 6
        _axis(parts, y, len(group.bars))
        for bar in group.bars:
            _bar(parts, y, bar, scale)
            y += STEP
        y += 6
    return y + 6


def _scale(longest: float) -> Callable[[float], float]:
    room = WIDTH - LEFT - RIGHT
    return lambda value: max(1.0, value / longest * room) if longest else 1.0


def _axis(parts: list[str], y: int, bars: int) -> None:
    parts.append(f'<line x1="{LEFT}" y1="{y - 2}" x2="{LEFT}" y2="{y + bars * STEP - 2}"/>')


def _bar(parts: list[str], y: int, bar: Bar, scale: Callable[[float], float]) -> None:
    length = scale(bar.value)
    weight = ' font-weight="600"' if bar.key == "proxy" else ""
    middle = y + BAR - 3
    parts.append(f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end"{weight}>{escape(bar.title)}</text>')
    parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{COLOURS[bar.key]}"/>')
    parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{middle}"{weight}>{escape(bar.text)}</text>')
