"""The names, shapes and dtypes of a checkpoint's weights, read from its files' headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from densereward.errors import ModelError

__all__ = ["find_file", "shapes_in", "stored_in_float32", "weight_files", "weight_shapes"]

_SAFE = "model.safetensors"
_PICKLED = "pytorch_model.bin"


def weight_shapes(source: str, revision: str | None = None, *, pickled: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights in a folder or a hub repository, by name; empty where there are none.

    Args:
        source: folder or hub id.
        revision: of a hub repository.
        pickled: whether they may be pickled, where there are no safetensors.

    Raises:
        ModelError: a file is damaged, one of several is missing, or they are pickled and must not be.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if files := _files(source, revision, _SAFE):
        for path in files:
            shapes |= shapes_in(path)
    elif files := _files(source, revision, _PICKLED):
        if not pickled:
            raise ModelError(
                f"cannot load {source}: its weights are pickled, and pickles can run code while they are read; "
                "convert them to safetensors, or let torch read them, by its unpickler for nothing but tensors, with "
                "--allow pickle",
                code="pickle",
            )
        for path in files:
            shapes |= {name: tuple(tensor.shape) for name, tensor in _unpickled(path).items()}
    return shapes


def shapes_in(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in one safetensors file, by name.

    Raises:
        ModelError: it is damaged.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def weight_files(source: str, revision: str | None = None) -> list[str]:
    """Paths of the safetensors files that hold the weights; empty where there are none."""
    return _files(source, revision, _SAFE)


def stored_in_float32(source: str, revision: str | None = None) -> bool:
    """Whether any weight is stored wider than in half precision."""
    for path in _files(source, revision, _SAFE):
        with _reading(path), safe_open(path, framework="pt") as file:
            if any(file.get_slice(key).get_dtype() in ("F32", "F64") for key in file.keys()):  # noqa: SIM118
                return True
    pickled = (_unpickled(path) for path in _files(source, revision, _PICKLED))
    return any(tensor.dtype in (torch.float32, torch.float64) for weights in pickled for tensor in weights.values())


def _unpickled(path: str) -> dict[str, Tensor]:
    """A pickled file's tensors, without their values."""
    with _reading(path):
        weights: dict[str, Tensor] = torch.load(path, map_location="meta", weights_only=True)
    return weights


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file can break the reader in any way
        raise ModelError(f"cannot load {Path(path).parent}: {Path(path).name}: {error}") from error


def _files(source: str, revision: str | None, name: str) -> list[str]:
    """Paths of the weight files of one kind: a single one, or those that an index names."""
    index = find_file(source, revision, f"{name}.index.json")
    if index is None:
        single = find_file(source, revision, name)
        return [] if single is None else [single]
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    paths = {each: find_file(source, revision, each) for each in names}
    if missing := [each for each, path in paths.items() if path is None]:
        raise ModelError(f"cannot load {source}: the index names {missing[0]}, which is not there")
    return [path for path in paths.values() if path is not None]


def find_file(source: str, revision: str | None, name: str) -> str | None:
    """The path of a file of a folder or a hub repository; None where there is none.

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
