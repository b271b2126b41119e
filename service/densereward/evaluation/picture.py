"""A response whose tokens are coloured by their rewards, as an SVG document.

    python -m densereward.evaluation.picture FILE

The embedded model scores `RESPONSE`. The picture needs nothing but the numbers that it shows, so it can be drawn again
from itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as Xml

from densereward.default_model.build import ensure_default_model
from densereward.evaluation import svg
from densereward.evaluation.scoring import Scorer

__all__ = ["METHODS", "RESPONSE", "draw", "score"]

RESPONSE = "Thank you for the question. You are being rather silly. I am happy to help."
METHODS = {
    "red": "how far each token moved the score",
    "contribution": "what each token added to the final score",
}

_BLUE, _ORANGE = "#0072b2", "#d55e00"  # a pair that colour-blind readers tell apart
_STRONGEST = 0.6  # opacity of the largest reward: a token on it can be read on white and on black
_MARGIN, _TOP, _ROW, _TOKEN, _GAP = 20.0, 62.0, 84.0, 28.0, 3.0
_LETTER, _NARROWEST = 9.0, 40.0  # width of a letter, and of the number below a token
_STYLE = """
text { font: 14px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.token { font: 15px ui-monospace, 'DejaVu Sans Mono', monospace }
.number { font: 12px ui-monospace, 'DejaVu Sans Mono', monospace; fill: #59636e }
.method, .title { font-weight: 600 }
.note { fill: #59636e }
.page { fill: #ffffff; stroke: #d1d9e0 }
.ground { stroke: #d1d9e0 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .number, .note { fill: #9198a1 }
  .page { fill: #0d1117; stroke: #3d444d }
  .ground { stroke: #3d444d }
}
"""


def draw(reward: float, tokens: Sequence[str], rewards: Mapping[str, Sequence[float]]) -> str:
    """A row of tokens for each of `METHODS` in `rewards`, each token with its reward; all rows have one scale."""
    rounded = {name: [round(float(each), 2) + 0.0 for each in values] for name, values in rewards.items()}
    largest = max(abs(each) for values in rounded.values() for each in values) or 1.0
    words = [token.strip() for token in tokens]
    widths = [max(_NARROWEST, _LETTER * len(word) + 8) for word in words]
    width = 2 * _MARGIN + sum(widths) + _GAP * (len(words) - 1)
    height = _TOP + _ROW * len(rounded) + 44
    root = svg.document(width, height)
    Xml.SubElement(root, "title").text = " ".join(words)
    Xml.SubElement(root, "style").text = _STYLE
    svg.rectangle(root, 0.5, 0.5, width - 1, height - 1, rx="8", **{"class": "page"})
    title = f"The reward model gives this response {reward:+.2f}. Which tokens earned it?"
    svg.text(root, _MARGIN, 34.0, title, **{"class": "title"})
    for row, (name, values) in enumerate(rounded.items()):
        y = _TOP + _ROW * row
        _label(root, y + 12, name)
        x = _MARGIN
        for word, value, wide in zip(words, values, widths, strict=True):
            _token(root, x, y + 22, wide, word, value, value / largest)
            x += wide + _GAP
    _legend(root, width, height - 24, largest)
    return svg.write(root)


def score() -> tuple[float, list[str], dict[str, list[float]]]:
    """`RESPONSE` by the embedded model: its reward, its tokens, and their rewards by each of `METHODS`."""
    with Scorer(ensure_default_model()) as scorer:
        (scored,) = scorer.texts([RESPONSE], [{"name": name} for name in METHODS])
        (reward,) = scorer.answers([RESPONSE])
    tokens = [RESPONSE[start:stop] for start, stop in scored.spans]
    return float(reward), tokens, {name: values.tolist() for name, values in scored.rewards.items()}


def _label(root: Xml.Element, y: float, name: str) -> None:
    label = svg.text(root, _MARGIN, y, "", **{"class": "label"})
    Xml.SubElement(label, "tspan", {"class": "method"}).text = name
    Xml.SubElement(label, "tspan", {"class": "note", "dx": "8"}).text = METHODS[name]


def _token(root: Xml.Element, x: float, y: float, width: float, word: str, value: float, share: float) -> None:
    colour = {"fill": _BLUE if share >= 0 else _ORANGE, "fill-opacity": f"{_STRONGEST * abs(share):.3f}"}
    svg.rectangle(root, x, y, width, _TOKEN, rx="4", **{"class": "ground"}, **colour)
    svg.text(root, x + width / 2, y + 19, word, "middle", **{"class": "token"})
    svg.text(root, x + width / 2, y + _TOKEN + 14, f"{value:+.2f}", "middle", **{"class": "number"})


def _legend(root: Xml.Element, width: float, y: float, largest: float) -> None:
    """The scale, from the most lost to the most earned."""
    steps, step = 20, 10.0
    left = width / 2 - steps * step / 2
    for each in range(steps):
        share = (each + 0.5) / steps * 2 - 1
        colour = {"fill": _BLUE if share >= 0 else _ORANGE, "fill-opacity": f"{_STRONGEST * abs(share):.3f}"}
        svg.rectangle(root, left + step * each, y - 10, step, 12.0, **colour)
    svg.text(root, left - 8, y, f"lowers the reward, {-largest:+.2f}", "end", **{"class": "note"})
    svg.text(root, left + steps * step + 8, y, f"{largest:+.2f}, raises it", **{"class": "note"})


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(*score()), encoding="utf-8")
