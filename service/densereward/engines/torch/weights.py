"""What a checkpoint holds, read from the heads of its files and nothing more."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from transformers.utils.hub import cached_file

from densereward.errors import ModelError

__all__ = ["find_file", "shapes_in", "weight_shapes"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def weight_shapes(source: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights in a folder or a hub repository, by name; empty where there are no safetensors.

    Raises:
        ModelError: a file is damaged, or one of several is missing.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _files(source, revision):
        path = find_file(source, revision, name)
        if path is None:
            raise ModelError(f"cannot load {source}: the index names {name}, which is not there")
        shapes |= shapes_in(path)
    return shapes


def shapes_in(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in one file, by name.

    Raises:
        ModelError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged file can break the reader in any way
        raise ModelError(f"cannot load {Path(path).parent}: {Path(path).name}: {error}") from error


def _files(source: str, revision: str | None) -> list[str]:
    index = find_file(source, revision, _INDEX)
    if index is None:
        return [_SINGLE] if find_file(source, revision, _SINGLE) else []
    return sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))


def find_file(source: str, revision: str | None, name: str) -> str | None:
    """Where a file of a folder or a hub repository is; None where there is none.

    Raises:
        ModelError: there is no such folder or repository.
    """
    try:
        path: str | None = cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except Exception as error:  # a name, a network or a disk can be wrong in any way
        raise ModelError(f"cannot load {source}: {error}") from error
    return path
