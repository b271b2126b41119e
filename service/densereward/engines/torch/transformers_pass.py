"""A forward pass in transformers' own attention, which keeps the weights of one query."""

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

__all__ = ["TransformersPass", "failures"]


class TransformersPass:
    """A model, run as transformers runs it.

    Args:
        model: the model.
        reads_texts: whether it reads whole texts, in padded batches; otherwise its decoder runs on equal lengths.
        fused: whether it can run in torch's fused attention.
    """

    def __init__(self, model: PreTrainedModel, *, reads_texts: bool, fused: bool) -> None:
        self.model: Any = model
        self.reads_texts = reads_texts
        self._fused = fused

    def run(self, batch: Sequence[ScoringInput], *, rows: bool, eager: bool = False) -> Any:
        """Transformers' output for a batch.

        Args:
            batch: of equal lengths, unless the model reads whole texts.
            rows: whether to keep the scored query's attention weights, which only eager attention has.
            eager: whether to run in eager attention in any case.
        """
        if self._fused:
            self.model.set_attn_implementation("eager" if eager or rows else "sdpa")
        model = self.model if self.reads_texts else self.model.base_model
        inputs = {name: torch.from_numpy(each).to(self.model.device) for name, each in self._inputs(batch).items()}
        query = 0 if self.reads_texts else batch[0].scored_position  # all of equal length share it
        with _one_query(self.model, query) if rows else nullcontext():
            return model(**inputs, output_attentions=rows, **({} if self.reads_texts else {"use_cache": False}))

    def _inputs(self, batch: Sequence[ScoringInput]) -> dict[str, np.ndarray]:
        longest = max(len(sequence.token_ids) for sequence in batch)
        pad = self.model.config.get_text_config().pad_token_id or 0
        ids, mask = np.full((len(batch), longest), pad, dtype=np.int64), np.zeros((len(batch), longest), dtype=np.int64)
        types = np.zeros_like(ids)
        for i, sequence in enumerate(batch):
            length = len(sequence.token_ids)
            ids[i, :length], mask[i, :length] = sequence.token_ids, 1
            types[i, sequence.prompt_length : length] = 1
        inputs = {"input_ids": ids}
        if self.reads_texts:
            inputs["attention_mask"] = mask
            if (getattr(self.model.config, "type_vocab_size", 0) or 0) > 1:
                inputs["token_type_ids"] = types
        return inputs


@contextmanager
def _one_query(model: Any, query: int) -> Iterator[None]:
    """Cut each layer's attention weights to one query's at once, so that S x S is never kept for all layers."""

    def cut(each: Any) -> Any:
        if isinstance(each, Tensor) and each.ndim == 4 and each.shape[2] > 1:
            return each[:, :, query : query + 1].clone()
        return each

    def cutting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            return tuple(map(cut, output)) if isinstance(output, tuple) else output

        return run

    # Hooks would not do: transformers collects the weights from `forward` itself.
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
