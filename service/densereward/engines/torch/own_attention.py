"""A pass in transformers' own attention, of whose weights one query's are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from densereward.capture import ScoringInput
from densereward.engines.torch.failures import as_engine_failures

__all__ = ["OwnAttention", "failures"]


class OwnAttention:
    """A model, run as transformers runs it.

    Args:
        model: the model.
        whole: whether it reads texts whole, in padded batches; otherwise its decoder runs on equal lengths.
        fused: whether it can run in torch's fused attention.
    """

    def __init__(self, model: PreTrainedModel, *, whole: bool, fused: bool) -> None:
        self.model: Any = model
        self.whole = whole
        self._fused = fused

    def output(self, batch: Sequence[ScoringInput], *, rows: bool, eager: bool = False) -> Any:
        """What transformers gives for a batch: in its fused attention, unless the weights are asked for.

        Args:
            batch: of equal lengths, if texts are not read whole.
            rows: whether the scored query's attention weights are wanted.
            eager: whether to take eager attention in any case.
        """
        if self._fused:
            self.model.set_attn_implementation("eager" if eager or rows else "sdpa")
        model = self.model if self.whole else self.model.base_model
        given = {name: torch.from_numpy(each).to(self.model.device) for name, each in self._given(batch).items()}
        place = 0 if self.whole else batch[0].scored_position  # which all of equal length share
        with _only_rows(self.model, place) if rows else nullcontext():
            return model(**given, output_attentions=rows, **({} if self.whole else {"use_cache": False}))

    def _given(self, batch: Sequence[ScoringInput]) -> dict[str, np.ndarray]:
        longest = max(len(sequence.token_ids) for sequence in batch)
        pad = self.model.config.get_text_config().pad_token_id or 0
        ids, mask = np.full((len(batch), longest), pad, dtype=np.int64), np.zeros((len(batch), longest), dtype=np.int64)
        types = np.zeros_like(ids)
        for i, sequence in enumerate(batch):
            length = len(sequence.token_ids)
            ids[i, :length], mask[i, :length] = sequence.token_ids, 1
            types[i, sequence.prompt_length : length] = 1
        given = {"input_ids": ids}
        if self.whole:
            given["attention_mask"] = mask
            if (getattr(self.model.config, "type_vocab_size", 0) or 0) > 1:
                given["token_type_ids"] = types
        return given


@contextmanager
def _only_rows(model: Any, place: int) -> Iterator[None]:
    """Attention weights are cut to one query's as soon as a layer has made them: S x S is never kept for all layers."""

    def cut(each: Any) -> Any:
        if isinstance(each, Tensor) and each.ndim == 4 and each.shape[2] > 1:
            return each[:, :, place : place + 1].clone()
        return each

    def cutting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            output = forward(*given, **named)
            return tuple(map(cut, output)) if isinstance(output, tuple) else output

        return run

    # Not by hooks: what transformers collects, it takes from `forward` itself.
    modules = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    for module in modules:
        module.forward = cutting(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def failures() -> AbstractContextManager[None]:
    """Turn what torch raises in such a pass into an `EngineFailure`."""
    return as_engine_failures("--max-length", (RuntimeError, IndexError))
