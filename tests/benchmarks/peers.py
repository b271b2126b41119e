"""Transformers in a process of its own: our engine changes how the process that holds it keeps memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from tests.benchmarks.harness import Numbers

_Parameters = ParamSpec("_Parameters")
_model: Any = None  # the worker's


class Peer:
    """The same weights in plain transformers, in a process that our engine never enters.

    Args:
        folder: the model's.
        attention: transformers' name of the attention function.
        threads: of the process.
    """

    def __init__(self, folder: Path, attention: str, threads: int) -> None:
        self._worker = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_load, initargs=(folder, attention, threads)
        )

    def __call__(
        self,
        score: Callable[Concatenate[Any, _Parameters], Numbers],
        *args: _Parameters.args,
        **kwargs: _Parameters.kwargs,
    ) -> Numbers:
        """What `score` makes of the model and the arguments, over there."""
        return self._worker.submit(_run, score, *args, **kwargs).result()

    def close(self) -> None:
        """End the process."""
        self._worker.shutdown()


def plain_model(folder: str | Path, attention: str) -> Any:
    """The model as transformers gives it, in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def _load(folder: Path, attention: str, threads: int) -> None:
    global _model
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    _model = plain_model(folder, attention)


def _run(score: Callable[..., Numbers], *args: Any, **kwargs: Any) -> Numbers:
    return score(_model, *args, **kwargs)
