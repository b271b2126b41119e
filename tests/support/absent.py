"""Packages that need a GPU to be installed at all, as empty modules: what a trainer imports of them is never used."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Absent(MetaPathFinder, Loader):
    """Finds these packages, whatever is asked of them."""

    def __init__(self, *packages: str) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in self._packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.setdefault("__version__", "0")


def leave_out(*packages: str) -> None:
    """Importing these gives empty modules from now on."""
    sys.meta_path.insert(0, Absent(*packages))
