"""What the work must cost at least: its arithmetic at the matrix rate, its bytes at the copy rate, both measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from densereward.engines.torch.linear import speed_up
from tests.benchmarks.harness import Numbers

_FLOAT = 4  # bytes


def model_flops(model: Any, lengths: Sequence[int]) -> float:
    """Multiplications and additions of the matrices and of causal attention; not of norms, softmax, embedding."""
    return _flops(model, sum(lengths), sum(map(_causal, lengths)))


def shared_flops(model: Any, prompt: int, responses: Sequence[int]) -> float:
    """The same for responses to one prompt, which stands once and is looked at by each."""
    pairs = _causal(prompt) + sum(prompt * length + _causal(length) for length in responses)
    return _flops(model, prompt + sum(responses), pairs)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def _flops(model: Any, tokens: int, pairs: int) -> float:
    config = model.config
    width: int = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * pairs * width * config.num_hidden_layers  # queries with keys, weights with values
    weights = sum(each.weight.numel() for each in _matrices(model))
    return float(2 * weights * tokens + attention)


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
    def fastest(cls, hidden: int, wide: int, work: float, like: Tensor | None = None) -> MatrixProducts:
        """Square matrices or the model's own widths, by either library, whichever has the highest rate.

        Args:
            hidden: the model's width.
            wide: that of its feed-forward layers.
            work: how many multiplications and additions to do.
            like: has the device and the dtype; by default float32 on the CPU.
        """
        like = torch.empty(0) if like is None else like
        rows, squares = (16384, (4096, 8192)) if like.is_cuda else (4096, (1024, 2048))
        shapes: list[tuple[int, int, int]] = [(rows, hidden, wide), (rows, wide, hidden)]
        shapes += [(size, size, size) for size in squares]
        flops = {product: _flops_of(*shape) for shape in shapes for product in _products(like, *shape)}
        best = max(flops, key=lambda product: flops[product] / _best_seconds(product))
        turns = max(1, round(work / flops[best]))
        return cls(best, turns, turns * flops[best])

    def __call__(self) -> Numbers:
        """Run them."""
        with torch.inference_mode():
            for _ in range(self.turns):
                self.product()
        _wait_for_the_device()
        return {}


def _products(like: Tensor, rows: int, inner: int, columns: int) -> list[Callable[[], object]]:
    """The same product by torch's own choice of library, and by the engine's."""
    left, right = torch.randn(rows, inner).to(like), torch.randn(inner, columns).to(like)
    layer = nn.Linear(inner, columns, bias=False, device=like.device, dtype=like.dtype).requires_grad_(False)
    speed_up(layer)
    return [partial(torch.mm, left, right, out=like.new_empty(rows, columns)), partial(layer, left)]


def _flops_of(rows: int, inner: int, columns: int) -> float:
    return 2.0 * rows * inner * columns


def _wait_for_the_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_rate() -> float:
    """Bytes read and written a second, by copying far more than the caches hold."""
    source = torch.ones(2**25)
    return 2.0 * _FLOAT * len(source) / _best_seconds(partial(torch.empty_like(source).copy_, source))


def _best_seconds(action: Callable[[], object], turns: int = 5) -> float:
    action()
    _wait_for_the_device()
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        action()
        _wait_for_the_device()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
