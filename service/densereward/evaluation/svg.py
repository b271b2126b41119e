"""The parts that the drawings are made of, as SVG elements."""

from __future__ import annotations

from xml.etree import ElementTree as Xml

__all__ = ["document", "line", "rectangle", "text", "write"]


def document(width: float, height: float) -> Xml.Element:
    """An empty drawing of this size, in pixels."""
    return Xml.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
    )


def write(root: Xml.Element) -> str:
    """The drawing as text."""
    return Xml.tostring(root, encoding="unicode") + "\n"


def text(parent: Xml.Element, x: float, y: float, words: str, anchor: str = "start", **more: str) -> Xml.Element:
    """Words on the baseline y that start, end or have their middle at x, as `anchor` says; `more` are attributes."""
    element = Xml.SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}, **more)
    element.text = words
    return element


def line(parent: Xml.Element, x1: float, y1: float, x2: float, y2: float, **more: str) -> Xml.Element:
    """A straight line."""
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    return Xml.SubElement(parent, "line", ends, **more)


def rectangle(parent: Xml.Element, x: float, y: float, width: float, height: float, **more: str) -> Xml.Element:
    """A rectangle with (x, y) at its upper left."""
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    return Xml.SubElement(parent, "rect", place, **more)
