"""What torch raises, turned into what an engine raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from densereward.errors import EngineFailure

__all__ = ["as_engine_failures"]


@contextmanager
def as_engine_failures(settings: str, kinds: tuple[type[Exception], ...] = (RuntimeError,)) -> Iterator[None]:
    """Turn torch's errors into an `EngineFailure`.

    Args:
        settings: those to lower where the device's memory is too small.
        kinds: of errors that mean a failed pass.

    Raises:
        EngineFailure: torch failed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineFailure(
            f"the device's memory is too small for this sequence; set {settings} lower", code="out_of_memory"
        ) from error
    except kinds as error:
        raise EngineFailure(f"the forward pass failed: {error}") from error
