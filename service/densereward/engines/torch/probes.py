"""What a model that cannot be packed gives, found by trying it on a few tokens: its config does not say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from densereward.capture import ScoringInput
from densereward.engines.torch.transformers_pass import TransformersPass, failures

__all__ = ["gives_rows", "has_fused", "is_causal"]

_PROBE = 8
"""Tokens in a probe."""


def has_fused(model: Any) -> bool:
    """Whether the model can run in torch's fused attention; afterwards it is in eager attention."""
    with suppress(ValueError, ImportError):
        model.set_attn_implementation("sdpa")
    found = bool(model.config._attn_implementation == "sdpa")
    if found:
        model.set_attn_implementation("eager")
    return found


def is_causal(scores: Callable[[ScoringInput], Float32[np.ndarray, " S"]], tolerance: float) -> bool:
    """Whether no position's score changes with the tokens after it.

    Args:
        scores: of all positions of a sequence.
        tolerance: how far a score may move, relative to the largest one.
    """
    one, other = ([*range(_PROBE - 1), last] for last in (0, _PROBE))
    first, second = (scores(ScoringInput(ids, 2, _PROBE - 2, _PROBE - 1))[:-1] for ids in (one, other))
    return bool(np.allclose(first, second, atol=tolerance * max(1, np.abs(first).max()) / 10))


def gives_rows(attention: TransformersPass, layers: int) -> bool:
    """Whether the model gives attention weights in every layer, and its score is read at one known position.

    Raises:
        EngineFailure: the model does not run.
    """
    probe = ScoringInput(range(_PROBE), 2, _PROBE - 2, _PROBE - 1)
    with torch.inference_mode(), failures():
        weights = attention.run([probe], rows=True).attentions
    if not weights or len(weights) != layers or any(each is None for each in weights):
        return False
    shape = (1, attention.model.config.get_text_config().num_attention_heads, 1, _PROBE)
    if any(each.shape != shape or not _are_shares(each) for each in weights):
        return False
    return not attention.reads_texts or _reads_first(attention, probe)


def _reads_first(attention: TransformersPass, probe: ScoringInput) -> bool:
    """Whether the score depends on the first position's hidden state and on no other's."""
    base = attention.model.base_model
    pooled_inside = getattr(base, "encoder", base)  # some models pool inside their base model, behind its encoder
    gradient = _gradient_at(attention, base, probe)
    if gradient is None:
        gradient = _gradient_at(attention, pooled_inside, probe)
    return gradient is not None and bool((gradient[0, 1:] == 0).all())


def _gradient_at(attention: TransformersPass, module: Any, probe: ScoringInput) -> Tensor | None:
    """The score's gradient at a module's hidden states; None where the score does not depend on them."""
    hidden: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden.append(output[0].detach().requires_grad_())
        output["last_hidden_state"] = hidden[0]
        return output

    handle = module.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            score = attention.run([probe], rows=False, eager=True).logits.sum()
        return torch.autograd.grad(score, hidden[0])[0] if score.requires_grad else None
    finally:
        handle.remove()


def _are_shares(row: Tensor) -> bool:
    """Whether the weights on all keys are shares of one; sinks may take the rest of it."""
    total = row.float().sum(dim=-1)
    return bool((row >= 0).all() and (total > 0.01).all() and (total < 1.01).all())
