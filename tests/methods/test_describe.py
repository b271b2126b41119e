"""What the pages and GET /v1/methods say of each method is what its code says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from densereward.methods import METHODS
from densereward.methods.describe import HEADINGS, describe, pages

PAGES = Path(__file__).parents[2] / "service" / "docs" / "methods"


def test_the_pages_are_what_make_docs_writes() -> None:
    assert {each.name: each.read_text(encoding="utf-8") for each in PAGES.iterdir()} == pages()


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_all_there_is_to_know(name: str) -> None:
    described = describe(name)
    assert all(getattr(described, heading) for heading in HEADINGS)
    kind: Any = METHODS[name].params_type
    assert described.parameters.keys() == kind.model_fields.keys()
    assert all(each["description"] for each in described.parameters.values())
    assert "r_t" in described.equation or "r(" in described.equation
