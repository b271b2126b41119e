"""What the vLLM engine says of the model that vLLM has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from densereward.engines.base import EngineFacts
from densereward.engines.torch.facts import special_ids
from densereward.engines.vllm.model import ServedModel

__all__ = ["facts_of", "layers_with_rows"]


def layers_with_rows(hooked: Sequence[dict[str, Any]]) -> tuple[list[int], dict[int, str]]:
    """Layers whose rows all workers can capture, and for the others the reason why not.

    Args:
        hooked: what each worker's `densereward_install_hooks` returned.
    """
    layers = set.intersection(*(set(each["layers"]) for each in hooked))
    return sorted(layers), {layer: reason for each in hooked for layer, reason in each["missing"].items()}


def facts_of(model: ServedModel, llm: Any, missing: dict[int, str]) -> EngineFacts:
    """The facts of a loaded model.

    Args:
        model: what vLLM was given.
        llm: vLLM's client.
        missing: by layer, the reason why its rows cannot be captured.
    """
    config = model.config.get_text_config()
    described = ", ".join(f"{layer} ({reason})" for layer, reason in sorted(missing.items()))
    return EngineFacts(
        engine="vllm",
        family=next(iter(model.config.architectures)),
        head=model.head,
        device=str(llm.vllm_config.device_config.device_type),
        dtype=str(llm.model_config.dtype).removeprefix("torch."),
        max_length=llm.model_config.max_model_len,
        vocabulary_size=config.vocab_size,
        layers=config.num_hidden_layers,
        batch_tokens=llm.vllm_config.scheduler_config.max_num_batched_tokens,
        pair_cost=0.0,
        weights_fingerprint=model.fingerprint,
        weights_bytes=model.size,
        special_ids=special_ids(model.config),
        notice=f"attention rows are not available in layers {described}" if missing else None,
        shares_prompts=False,
        advice="--engine torch gives closed prefixes, contributions, received attention and gradients",
    )
