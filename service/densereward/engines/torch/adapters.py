"""LoRA adapters: loaded with their base model and merged into it in float32; the result is a model like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from densereward.engines.torch.weights import find_file, shapes_in
from densereward.errors import ModelError

__all__ = ["adapter_of", "base_of", "merged", "saved_modules"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_WRAPPED = "base_model.model."
_TASKS = ("SEQ_CLS", "TOKEN_CLS")


def adapter_of(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """The adapter's config, if a folder or a hub repository holds an adapter and no model.

    Raises:
        ModelError: an adapter that cannot be merged into a reward model.
    """
    if find_file(source, revision, _CONFIG) is None or find_file(source, revision, "config.json") is not None:
        return None
    config: dict[str, Any] = json.loads(Path(str(find_file(source, revision, _CONFIG))).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{source} is an adapter of type {config.get('peft_type')}; only LORA is merged")
    if config.get("task_type") not in _TASKS:
        raise ModelError(
            f"{source} is an adapter for the task {config.get('task_type')}; a reward model's is one of "
            f"{', '.join(_TASKS)}"
        )
    if not config.get("base_model_name_or_path"):
        raise ModelError(f"{source}: {_CONFIG} does not name the base model")
    return config


def base_of(source: str, revision: str | None = None) -> str:
    """The base model of an adapter; any other model itself."""
    adapter = adapter_of(source, revision)
    return source if adapter is None else str(adapter["base_model_name_or_path"])


def saved_modules(source: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that an adapter brings beside its LoRA matrices (its head), by their names in the model.

    Raises:
        ModelError: the adapter has no safetensors.
    """
    path = find_file(source, revision, _WEIGHTS)
    if path is None:
        raise ModelError(f"{source} has no {_WEIGHTS}")
    shapes = {name.removeprefix(_WRAPPED): shape for name, shape in shapes_in(path).items()}
    return {name: shape for name, shape in shapes.items() if ".lora_" not in name}


def merged(model: Any, source: str, revision: str | None) -> Any:
    """A base model with an adapter's weights in it.

    Args:
        model: the base, float32.
        source: folder or hub id of the adapter.
        revision: of the adapter.

    Raises:
        ModelError: a weight of the adapter has no place in the base, or is missing.
    """
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(source, revision=revision, inference_mode=True)
    wrapped = get_peft_model(model, config)
    weights = load_peft_weights(source, device="cpu", revision=revision)
    result: Any = set_peft_model_state_dict(wrapped, weights)
    missing = [name for name in result.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if problems := sorted([*missing, *result.unexpected_keys]):
        raise ModelError(
            f"{source}: the adapter and its base do not fit together at {', '.join(problems[:3])}",
            code="adapter_mismatch",
            keys=problems,
        )
    return wrapped.merge_and_unload(safe_merge=True)
