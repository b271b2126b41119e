"""What is imported when: a table of names costs no torch, and folders import one way (see pyproject's contracts)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jaxtyping import TypeCheckError

from densereward.engines import ENGINES, INTERNAL_ENGINES
from densereward.heads import HEADS
from densereward.methods import METHODS
from densereward.registry import Table
from densereward.scheduling.cost import cost_of


def heavy_modules_after(statement: str) -> set[str]:
    program = (
        f"import sys\n{statement}\nprint(*sorted(m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_methods_and_tables_need_no_torch() -> None:
    statement = (
        "from densereward.scoring import placement, plans\n"
        "from densereward import methods, engines, heads\n"
        "[methods.METHODS[name]() for name in methods.METHODS]; list(engines.ENGINES); list(heads.HEADS)"
    )
    assert heavy_modules_after(statement) == set()


def test_the_command_line_needs_nothing_until_a_command_runs() -> None:
    assert heavy_modules_after("import densereward.cli") == set()


@pytest.mark.parametrize("table", [ENGINES, INTERNAL_ENGINES, HEADS, METHODS])
def test_every_row_of_a_table_can_be_imported(table: Table) -> None:
    assert all(table[name] is not None for name in table)


def test_a_name_that_no_row_has_names_those_there_are() -> None:
    with pytest.raises(KeyError, match="no method named 'magic'; there are red, sentence"):
        METHODS["magic"]


def test_types_are_checked_in_tests_by_parallel_workers_too() -> None:
    with pytest.raises(TypeCheckError, match="cost_of"):
        cost_of("no sequence")  # type: ignore[arg-type]
