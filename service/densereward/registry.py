"""Tables of names to "module:attribute", imported only when a name is used, so that listing them needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

__all__ = ["Table"]


class Table(Mapping[str, Any]):
    """A read-only mapping that imports a row when it is looked up.

    Args:
        kind: what the rows are, for the message of a failed look-up.
        rows: name to "module:attribute".
    """

    def __init__(self, kind: str, rows: Mapping[str, str]) -> None:
        self._kind = kind
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Any:
        if name not in self._rows:
            raise KeyError(f"no {self._kind} named {name!r}; there are {', '.join(self._rows)}")
        module, attribute = self._rows[name].split(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
