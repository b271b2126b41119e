"""What an engine says of its model, and what is done to the model before it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from densereward.engines.base import EngineFacts
from densereward.engines.torch.linear import speed_up
from densereward.engines.torch.loading import max_length, weights_fingerprint
from densereward.engines.torch.memory import keep_freed_memory
from densereward.heads.base import ScoreHead

__all__ = ["facts_of", "prepare", "special_ids", "with_head"]

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens in a pass: on a CPU larger passes gain nothing, and a GPU needs them to be busy."""


def prepare(model: PreTrainedModel) -> None:
    """Turn training off, and on a CPU make the model fast."""
    model.requires_grad_(False)
    if model.device.type == "cpu":
        speed_up(model.base_model)
        keep_freed_memory()


def facts_of(
    model: PreTrainedModel, head: str, longest: int | None = None, batch_tokens: int | None = None
) -> EngineFacts:
    """The facts of a transformers model.

    Args:
        model: the model.
        head: the head's name.
        longest: tokens in the longest sequence to read; by default what the config gives.
        batch_tokens: tokens in one pass; by default what suits the device.

    Raises:
        ModelError: nothing says how long a sequence may be.
    """
    embedding: Any = model.get_input_embeddings()
    return EngineFacts(
        engine="torch",
        family=type(model).__name__,
        head=head,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        residual_dtype=str(model.dtype).removeprefix("torch."),
        max_length=max_length(model.config, longest),
        vocabulary_size=embedding.num_embeddings,
        layers=model.config.get_text_config().num_hidden_layers,
        batch_tokens=batch_tokens or _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cuda"]),
        pair_cost=_pair_cost(model),
        weights_fingerprint=weights_fingerprint(model),
        weights_bytes=sum(each.numel() * each.element_size() for each in model.parameters()),
        special_ids=special_ids(model.config),
    )


def with_head(facts: EngineFacts, head: ScoreHead, separator: str | None) -> EngineFacts:
    """The facts of a reward model: those of its decoder or encoder, and those of its head.

    Args:
        facts: from `facts_of`.
        head: the score head.
        separator: what ends each step, if the model is a token classifier that was trained on steps.
    """
    steps = head.steps_with(separator)
    return replace(
        facts,
        unit=head.unit if steps is None else "step",
        steps=steps,
        score_token=head.score_token,
        tokens=head.tokens,
        notice=head.notice,
        gate=head.gate,
    )


def special_ids(config: Any) -> dict[str, frozenset[int]]:
    """The model's own BOS and EOS ids, as far as its config names them."""
    return {name: _ids(config, f"{name}_token_id") for name in ("bos", "eos")}


def _ids(config: Any, name: str) -> frozenset[int]:
    ids = getattr(config.get_text_config(), name, None)
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


def _pair_cost(model: PreTrainedModel) -> float:
    """Multiplications for one query and one key, in all heads and layers, over those of one token in all matrices."""
    config = model.config.get_text_config()
    head: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_attention_heads * head * config.num_hidden_layers
    embedding: Any = model.get_input_embeddings()
    matrices = sum(each.numel() for each in model.parameters() if each.ndim > 1) - embedding.weight.numel()
    return float(attention / matrices)
