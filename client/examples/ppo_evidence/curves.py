"""Learning curves as SVG: panels of lines with error bands, on linear axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "Panel", "draw"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND = 420, 360, 56, 16, 44, 48, 170
_COLOURS = ("#222222", "#999999", "#56b4e9", "#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Line:
    """Points (x, y) in order, and half the width of the band at each."""

    points: Sequence[tuple[float, float]]
    band: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Lines by name under one title; a name has one colour in all panels."""

    title: str
    x_label: str
    lines: Mapping[str, Line]


def draw(panels: Sequence[Panel]) -> str:
    """The panels side by side, and one legend for all."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    width = _WIDTH * len(panels) + _LEGEND
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{_HEIGHT}' viewBox='0 0 {width} {_HEIGHT}' "
        "font-family='Helvetica, Arial, sans-serif' font-size='12' fill='#222222'>",
        "<rect width='100%' height='100%' fill='white'/>",
    ]
    for index, panel in enumerate(panels):
        parts += [f"<g transform='translate({_WIDTH * index} 0)'>", *_panel(panel, names), "</g>"]
    for index, name in enumerate(names):
        y, left = _TOP + 10 + 22 * index, _WIDTH * len(panels) + 6
        parts.append(f"<path d='M{left} {y}h24' stroke='{_colour(index)}' stroke-width='2.5'/>")
        parts.append(_text(left + 32, y + 4, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, names: Sequence[str]) -> Iterator[str]:
    xs = [x for line in panel.lines.values() for x, _ in line.points]
    ys = [y for line in panel.lines.values() for _, y in line.points]
    if not xs:
        return
    across, up = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        share_x = (x - across[0]) / (across[-1] - across[0])
        share_y = (y - up[0]) / (up[-1] - up[0])
        return _LEFT + share_x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - share_y * (_HEIGHT - _TOP - _BOTTOM)

    yield _text(_LEFT, 24, panel.title, size=14)
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, panel.x_label, anchor="middle")
    for tick in across:
        yield _text(at(tick, up[0])[0], _HEIGHT - _BOTTOM + 18, f"{tick:g}", anchor="middle")
    for tick in up:
        y = at(across[0], tick)[1]
        yield f"<path d='M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}' stroke='#dddddd'/>"
        yield _text(_LEFT - 8, y + 4, f"{tick:g}", anchor="end")
    for name, line in panel.lines.items():
        colour = _colour(names.index(name))
        if line.band:
            both = [(x, y + b) for (x, y), b in zip(line.points, line.band, strict=True)]
            both += [(x, y - b) for (x, y), b in reversed(list(zip(line.points, line.band, strict=True)))]
            yield f"<polygon points='{_coordinates(at(x, y) for x, y in both)}' fill='{colour}' fill-opacity='0.10'/>"
        points = _coordinates(at(x, y) for x, y in line.points)
        yield f"<polyline points='{points}' stroke='{colour}' stroke-width='2' fill='none'/>"


def _ticks(low: float, high: float) -> list[float]:
    """About five round values, from at most `low` to at least `high`."""
    rough = max(high - low, 1e-6) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), max(math.floor(low / step) + 1, math.ceil(high / step))
    return [round(step * index, 10) for index in range(first, last + 1)]


def _coordinates(points: Iterator[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'>{escape(text)}</text>"
