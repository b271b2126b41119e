"""Line charts on logarithmic axes, as SVG: enough for a page of measurements, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from tests.benchmarks.harness import Chart

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 210, 50, 60
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666")
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 4")
_STYLE = "font-family='Helvetica, Arial, sans-serif' font-size='13' fill='#222222'"


class _Axis:
    """Puts values on a stretch of pixels, in powers of its base."""

    def __init__(self, values: Sequence[float], base: int, start: float, stop: float) -> None:
        self._base, self._start, self._stop = base, start, stop
        self._low = math.floor(math.log(min(values), base) + 1e-9)
        self._high = max(self._low + 1, math.ceil(math.log(max(values), base) - 1e-9))

    def at(self, value: float) -> float:
        share = (math.log(value, self._base) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        return [float(self._base) ** power for power in range(self._low, self._high + 1)]


def draw(chart: Chart) -> str:
    """The chart as a document. Powers of two along x, powers of ten along y."""
    points = [point for line in chart.lines.values() for point in line]
    x = _Axis([point[0] for point in points], 2, _LEFT, _WIDTH - _RIGHT)
    y = _Axis([point[1] for point in points], 10, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{_HEIGHT}' "
        f"viewBox='0 0 {_WIDTH} {_HEIGHT}' {_STYLE}>",
        "<rect width='100%' height='100%' fill='white'/>",
        _text(_LEFT, 26, chart.title, size=15),
        *_grid(x, y),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16, chart.x_label, anchor="middle"),
        f"<g transform='translate(20 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)'>"
        + _text(0, 0, chart.y_label, anchor="middle")
        + "</g>",
    ]
    for number, (label, line) in enumerate(chart.lines.items()):
        parts += _line(number, label, [(x.at(across), y.at(up)) for across, up in line])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    for value in x.ticks():
        yield _rule(x.at(value), _TOP, x.at(value), _HEIGHT - _BOTTOM)
        yield _text(x.at(value), _HEIGHT - _BOTTOM + 20, f"{value:g}", anchor="middle")
    for value in y.ticks():
        yield _rule(_LEFT, y.at(value), _WIDTH - _RIGHT, y.at(value))
        yield _text(_LEFT - 8, y.at(value) + 4, f"{value:g}", anchor="end")


def _line(number: int, label: str, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
    stroke = f"stroke='{colour}' stroke-width='2' stroke-dasharray='{dash}' fill='none'"
    yield f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in points)}' {stroke}/>"
    yield from (f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in points)
    left, height = _WIDTH - _RIGHT + 14, _TOP + 10 + 22 * number
    yield f"<line x1='{left}' y1='{height}' x2='{left + 28}' y2='{height}' {stroke}/>"
    yield _text(left + 36, height + 4, label)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='#dddddd'/>"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'>{escape(text)}</text>"
