"""What the work must cost at least: its arithmetic at the matrix rate, its bytes at the copy rate, both measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.benchmarks.harness import Numbers

_FLOAT = 4  # bytes


def model_flops(model: Any, lengths: Sequence[int]) -> float:
    """Multiplications and additions of the matrices and of causal attention; not of norms, softmax, embedding."""
    config = model.config
    width: int = config.num_attention_heads * config.head_dim
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = 2 * 2 * pairs * width * config.num_hidden_layers  # queries with keys, weights with values
    weights = sum(each.weight.numel() for each in _matrices(model))
    return float(2 * weights * sum(lengths) + attention)


def model_bytes(model: Any, lengths: Sequence[int]) -> float:
    """Each matrix read once, its inputs read and its outputs written once a token."""
    weights = sum(each.weight.numel() for each in _matrices(model))
    activations = sum(each.in_features + each.out_features for each in _matrices(model)) * sum(lengths)
    return float(_FLOAT * (weights + activations))


def _matrices(model: Any) -> list[nn.Linear]:
    return [each for each in model.base_model.modules() if isinstance(each, nn.Linear)]


@dataclass(frozen=True)
class MatrixProducts:
    """A contestant that does about the model's arithmetic as plain products, in the machine's fastest shape."""

    product: Callable[[], object]
    turns: int
    flops: float

    @classmethod
    def fastest(cls, hidden: int, wide: int, work: float) -> MatrixProducts:
        """Square matrices or the model's own widths, whichever has the higher rate."""
        shapes = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, hidden, wide), (4096, wide, hidden)]
        rows, inner, columns = max(shapes, key=lambda shape: _rate(*shape))
        flops = 2.0 * rows * inner * columns
        turns = max(1, round(work / flops))
        return cls(_product(rows, inner, columns), turns, turns * flops)

    def __call__(self) -> Numbers:
        """Run them."""
        with torch.inference_mode():
            for _ in range(self.turns):
                self.product()
        return {}


def _product(rows: int, inner: int, columns: int) -> Callable[[], object]:
    out = torch.empty(rows, columns)
    return partial(torch.mm, torch.randn(rows, inner), torch.randn(inner, columns), out=out)


def _rate(rows: int, inner: int, columns: int) -> float:
    return 2.0 * rows * inner * columns / _best_seconds(_product(rows, inner, columns))


def copy_rate() -> float:
    """Bytes read and written a second, by copying far more than the caches hold."""
    source = torch.ones(2**25)
    return 2.0 * _FLOAT * len(source) / _best_seconds(partial(torch.empty_like(source).copy_, source))


def _best_seconds(action: Callable[[], object], turns: int = 5) -> float:
    action()
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
