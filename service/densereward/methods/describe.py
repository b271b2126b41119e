"""What each method is, read from its module's docstring: for GET /v1/methods and the pages in service/docs/methods.

python -m densereward.methods.describe FOLDER        writes the pages
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from densereward.methods import METHODS
from densereward.methods.base import Params
from densereward_client.wire import MethodDescription

__all__ = ["HEADINGS", "describe", "pages"]

HEADINGS = ("source", "equation", "sum", "use", "traps", "cost")
"""What every method's docstring says after its first line, in this order, each under its own heading."""

_LINK = re.compile(r"arXiv (\d{4}\.\d{4,5})")


@cache
def describe(name: str) -> MethodDescription:
    """One method.

    Raises:
        ValueError: its docstring lacks a heading.
    """
    kind: Any = METHODS[name]
    text = inspect.getdoc(sys.modules[kind.__module__]) or ""
    title, *parts = re.split(rf"^({'|'.join(map(str.capitalize, HEADINGS))}):", text, flags=re.MULTILINE)
    if [heading.lower() for heading in parts[::2]] != list(HEADINGS):
        raise ValueError(f"the docstring of {kind.__module__} must hold {', '.join(HEADINGS)}, each once")
    facts = {heading.lower(): inspect.cleandoc(part) for heading, part in zip(parts[::2], parts[1::2], strict=True)}
    return MethodDescription(
        name=name,
        title=title.strip().removeprefix(f"`{name}`: ").rstrip("."),
        parameters=_parameters(kind.params_type),
        **facts,
    )


def _parameters(kind: type[Params]) -> dict[str, Any]:
    """Name to JSON schema, the attribute's text as its description."""
    texts = {name: text for each in reversed(kind.__mro__) for name, text in _attributes(each)}
    schema = kind.model_json_schema()
    return {name: {**field, "description": texts[name]} for name, field in schema["properties"].items()}


def _attributes(kind: type) -> Iterator[tuple[str, str]]:
    """The attributes that a class's own docstring describes."""
    _, _, listed = (kind.__dict__.get("__doc__") or "").partition("Attributes:\n")
    for entry in re.split(r"\n(?=\S)", inspect.cleandoc("\n" + listed)):
        names, _, text = entry.partition(": ")
        for name in filter(None, names.split(", ")):
            yield name, " ".join(text.split())


def pages() -> dict[str, str]:
    """Markdown by file name: one page a method, and a list of them."""
    described = [describe(name) for name in METHODS]
    rows = [f"| [`{each.name}`]({each.name}.md) | {each.title} | {_first_line(each.cost)} |" for each in described]
    index = ["# Methods", "Written from the code by `make docs`.", "| method | what | cost |\n|---|---|---|"]
    index[-1] = "\n".join([index[-1], *rows])
    return {"README.md": "\n\n".join(index) + "\n"} | {f"{each.name}.md": _page(each) for each in described}


def _page(method: MethodDescription) -> str:
    parts = [f"# `{method.name}`", f"{_sentence(method.title)}."]
    for heading in HEADINGS:
        text = _LINK.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", getattr(method, heading))
        parts += [f"## {heading.capitalize()}", text]
    rows = [
        f"| `{name}` | `{json.dumps(schema.get('default'))}` | {_sentence(schema['description'])} |"
        for name, schema in method.parameters.items()
    ]
    return "\n\n".join([*parts, "## Parameters", "\n".join(["| name | default | |", "|---|---|---|", *rows])]) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _first_line(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].rstrip(".")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages().items():
        (folder / name).write_text(page, encoding="utf-8")
