"""What a trainer's environment gets: no torch, and nothing that is not declared."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import densereward_client

DECLARED = {"httpx", "numpy", "pydantic"}

# Run in a process of its own: this one has long imported everything.
SHOW_IMPORTED = """
import json, sys
import densereward_client, densereward_client.advantages
import densereward_client.trainers, densereward_client.trainers.skyrl
print(json.dumps({name: getattr(module, "__file__", None) for name, module in sys.modules.items()}))
"""


def imported() -> dict[str, str | None]:
    """Every module that importing the client loads, with its file; what needs no trainer included."""
    shown = subprocess.run([sys.executable, "-I", "-c", SHOW_IMPORTED], capture_output=True, text=True, check=True)
    modules: dict[str, str | None] = json.loads(shown.stdout)
    return modules


def test_the_client_never_imports_torch_nor_the_service() -> None:
    roots = {name.partition(".")[0] for name in imported()}
    assert "densereward_client" in roots
    assert roots.isdisjoint({"torch", "transformers", "fastapi", "densereward"})


def test_the_client_imports_nothing_but_what_it_declares() -> None:
    ours = [file for name, file in imported().items() if file and name.partition(".")[0] == "densereward_client"]
    roots = set().union(*(imports_of(Path(file)) for file in ours))
    assert roots - sys.stdlib_module_names == DECLARED


def test_the_package_of_trainers_imports_none_of_them() -> None:
    assert imports_of(Path(densereward_client.__file__).parent / "trainers" / "__init__.py") == set()


def imports_of(file: Path) -> set[str]:
    """What the top level of a file imports from other packages; under TYPE_CHECKING nothing is imported."""
    found = set()
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module:
            found.add(statement.module.partition(".")[0])
    return found


def test_all_names_exactly_what_is_public() -> None:
    names = densereward_client.__all__
    modules = {"advantages", "binding", "tensors", "tokens", "trainers", "wire"}
    public = {name for name in vars(densereward_client) if not name.startswith("_")}
    assert len(set(names)) == len(names)
    assert public - modules == set(names)
