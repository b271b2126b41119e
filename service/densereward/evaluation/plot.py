"""A plot of values with their intervals, as an SVG document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

from densereward.evaluation import svg

__all__ = ["Mark", "draw"]

_LEFT, _RIGHT, _TOP, _STEP, _PLOT = 210.0, 30.0, 60.0, 24.0, 460.0
_COLOURS = ("#0072b2", "#d55e00", "#009e73")


@dataclass(frozen=True)
class Mark:
    """A value and its interval."""

    name: str
    value: float
    low: float
    high: float


def draw(title: str, series: Mapping[str, Sequence[Mark]], low: float = 0.3, high: float = 0.9) -> str:
    """A line a name, a point a series; the axis goes from `low` to `high`, chance (0.5) is a dashed line."""
    names = list(dict.fromkeys(mark.name for marks in series.values() for mark in marks))
    width, height = _LEFT + _PLOT + _RIGHT, _TOP + _STEP * len(names) + 70
    root = svg.document(width, height)
    Xml.SubElement(root, "rect", width="100%", height="100%", fill="white")

    def at(value: float) -> float:
        return _LEFT + _PLOT * (min(max(value, low), high) - low) / (high - low)

    bottom = _TOP + _STEP * len(names)
    _text(root, _LEFT, 28.0, title, "start", 15)
    for tick in (low + (high - low) * part / 6 for part in range(7)):
        dashes = "4 3" if abs(tick - 0.5) < 1e-9 else "none"
        _line(root, at(tick), _TOP - 8, at(tick), bottom, "#555" if dashes != "none" else "#ddd", dashes)
        _text(root, at(tick), bottom + 18, f"{tick:.1f}", "middle")
    for row, name in enumerate(names):
        _text(root, _LEFT - 10, _TOP + _STEP * row + 12, name, "end")
    for index, (label, marks) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        for mark in marks:
            y = _TOP + _STEP * names.index(mark.name) + 5 + 7 * index
            _line(root, at(mark.low), y, at(mark.high), y, colour)
            Xml.SubElement(root, "circle", cx=f"{at(mark.value):.1f}", cy=f"{y:g}", r="4", fill=colour)
        Xml.SubElement(root, "circle", cx=f"{_LEFT + 170 * index:g}", cy=f"{bottom + 42:g}", r="4", fill=colour)
        _text(root, _LEFT + 10 + 170 * index, bottom + 46, label, "start")
    return svg.write(root)


def _text(root: Xml.Element, x: float, y: float, words: str, anchor: str, size: int = 12) -> None:
    svg.text(root, x, y, words, anchor, fill="#222", style=f"font: {size}px sans-serif")


def _line(root: Xml.Element, x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "none") -> None:
    svg.line(root, x1, y1, x2, y2, **{"stroke": colour, "stroke-dasharray": dashes})
