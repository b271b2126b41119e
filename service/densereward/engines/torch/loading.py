"""Load a model onto one device, every weight from its files; a model whose files lack one is refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from densereward.engines.torch import attention
from densereward.engines.torch.adapters import adapter_of, merged, saved_modules
from densereward.engines.torch.weights import weight_shapes
from densereward.errors import CannotPack, ModelError
from densereward.heads import head_for
from densereward.heads.base import Checkpoint, ScoreHead

__all__ = [
    "Dtype",
    "choose_device",
    "choose_dtype",
    "load_language_model",
    "load_scorer",
    "max_length",
    "read_config",
    "weights_fingerprint",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Weights in published checkpoints that no reward needs: the language model's head, buffers of older versions.
_UNREAD = re.compile(r"(^|\.)(lm_head|embed_out)\.|\.rotary_emb\.|\.masked_bias$|\.attn\.bias$|\.attention\.bias$")

# Model types whose configs are those of a transformers type under another name, and their entries of other names.
_SAME_CONFIG: dict[str, tuple[str, dict[str, str]]] = {
    "gpt_neox_reward_model": ("gpt_neox", {}),
    "internlm2": ("llama", {"bias": "attention_bias"}),
}

# Beyond their original length, these rotary factors change with the longest sequence in a batch; that is not served.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def choose_device(device: str) -> torch.device:
    """The device to run on; "auto" is the first GPU, or the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of the weights; "auto" is bfloat16 on a GPU and float32 on the CPU."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_scorer(
    source: str,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head: str | None = None,
    *,
    packs: bool = True,
    pickled: bool = False,
) -> tuple[PreTrainedModel, ScoreHead]:
    """A reward model from a folder or a hub id, and the head of its family.

    Args:
        source: folder or hub id.
        revision: of a hub model.
        device: to load it onto.
        dtype: of the weights.
        head: the name of the head, where nothing in the checkpoint says which it is.
        packs: whether the model is to run in packed batches.
        pickled: whether weights may be pickled, where there are no safetensors.

    Raises:
        ModelError: no such model, one of no known family, or weights that its files do not hold.
        CannotPack: its score is not read at one position.
    """
    if (adapter := adapter_of(source, revision)) is not None:
        return _load_adapter(source, revision, adapter, device, dtype, pickled=pickled)
    config = read_config(source, revision)
    checkpoint = Checkpoint(config, weight_shapes(source, revision, pickled=pickled))
    try:
        head_class = head_for(checkpoint, head)
        model_class = head_class.model_class(checkpoint)
    except ModelError as error:
        raise ModelError(f"{source}: {error.message}") from error
    if packs and head_class.pooling == "text":
        raise CannotPack(f"{checkpoint.architecture} cannot be packed: it is bidirectional")
    renamed = dict(head_class.renamed)
    model = _load(model_class, source, revision, config, device, dtype, renamed, packs=packs, pickled=pickled)
    try:
        score_head = head_class(model)
    except ModelError as error:
        raise ModelError(f"{source}: {error.message}") from error
    if packs and score_head.pooling != "position":
        raise CannotPack(f"{checkpoint.architecture} cannot be packed: its score is a mean over all positions")
    return model, score_head


def _load_adapter(
    source: str,
    revision: str | None,
    adapter: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    pickled: bool = False,
) -> tuple[PreTrainedModel, ScoreHead]:
    """A LoRA adapter merged into its base model; either of them has the score head."""
    base = str(adapter["base_model_name_or_path"])
    brought = saved_modules(source, revision)
    config = read_config(base)
    outputs = {shape[0] for name, shape in brought.items() if re.search(r"(^|\.)(score|classifier)\.weight$", name)}
    if outputs:
        config.num_labels = outputs.pop()
    suffix = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}[adapter["task_type"]]
    config.architectures = [suffix]
    checkpoint = Checkpoint(config)
    try:
        head_class = head_for(checkpoint)
        cpu = torch.device("cpu")
        weight_shapes(base, pickled=pickled)  # refuses what must not be read
        model_class = head_class.model_class(checkpoint)
        model = _load(model_class, base, None, config, cpu, torch.float32, supplied=brought, pickled=pickled)
        model = merged(model, source, revision).to(device=device, dtype=dtype).eval()
        return model, head_class(model)
    except ModelError as error:
        message = error.message.removeprefix(f"{source}: ")
        raise ModelError(f"{source}: {message}", code=error.error_code, **error.details) from error


def load_language_model(
    source: str, device: torch.device, dtype: torch.dtype, *, pickled: bool = False
) -> PreTrainedModel:
    """A `*ForCausalLM` model from a folder or a hub id, ready for packed batches.

    Raises:
        ModelError: no such model, another kind of model, or weights that its files do not hold.
    """
    weight_shapes(source, pickled=pickled)  # refuses what must not be read
    config = read_config(source)
    return _load(AutoModelForCausalLM, source, None, config, device, dtype, pickled=pickled)


def read_config(source: str, revision: str | None = None, *, quantised: bool = False) -> PretrainedConfig:
    """The config; code that comes with a model is never run.

    Raises:
        ModelError: there is none that can be read, or the weights are quantised and must not be.
    """
    try:
        written, _ = PretrainedConfig.get_config_dict(source, revision=revision)
        if (same := _SAME_CONFIG.get(written.get("model_type", ""))) is not None:
            model_type, renamed = same
            return AutoConfig.for_model(
                **{renamed.get(key, key): value for key, value in written.items()} | {"model_type": model_type}
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # a model's files can break the loader in any way; the operator needs one message
        raise ModelError(f"cannot load {source}: {error}") from error
    if getattr(config, "quantization_config", None) and not quantised:
        raise ModelError(f"{source}: its weights are quantised, which is not served; take those they were made from")
    return config


def _load(
    model_class: Any,
    source: str,
    revision: str | None,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    renamed: dict[str, str] | None = None,
    supplied: Collection[str] = (),
    *,
    packs: bool = True,
    pickled: bool = False,
) -> PreTrainedModel:
    attention.register()
    try:
        model, report = model_class.from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=dtype,
            attn_implementation=attention.IMPLEMENTATION if packs else "eager",
            key_mapping=renamed or None,
            trust_remote_code=False,
            use_safetensors=None if pickled else True,
            device_map=None if device.type == "cpu" else {"": device},  # straight to where it runs, file by file
            output_loading_info=True,
        )
    except Exception as error:  # as above
        if isinstance(error, KeyError) and error.args == (attention.IMPLEMENTATION,):
            raise CannotPack(f"{config.model_type} cannot be packed: its attention is code of its own") from error
        raise ModelError(f"cannot load {source}: {error}") from error
    report["missing_keys"] = [name for name in report.get("missing_keys") or () if name not in supplied]
    _refuse_incomplete(source, report)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _refuse_incomplete(source: str, report: dict[str, Any]) -> None:
    problems = {"missing_keys": "missing_weights", "mismatched_keys": "mismatched_weights", "error_msgs": "model_error"}
    for problem, code in problems.items():
        _refuse(source, problem, report.get(problem), "such weights would be random and so would the rewards", code)
    unexpected = [name for name in report.get("unexpected_keys") or () if not _UNREAD.search(name)]
    why = "the config is not that of these weights, or the family is another"
    _refuse(source, "unexpected_keys", unexpected, why, "unexpected_weights")


def _refuse(source: str, problem: str, names: Iterable[object] | None, why: str, code: str) -> None:
    if found := sorted(map(str, names or ())):
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        what = f"{len(found)} {problem.replace('_', ' ')} while loading ({shown})"
        raise ModelError(f"{source}: {what}; {why}", code=code, keys=found)


def max_length(config: PretrainedConfig, requested: int | None = None) -> int:
    """Tokens in the longest sequence that the model reads, at most `requested`.

    Raises:
        ModelError: neither the config nor the request gives a length.
    """
    text = config.get_text_config()
    lengths = [getattr(text, "max_position_embeddings", None), requested]
    limit = min((length for length in lengths if isinstance(length, int)), default=None)
    if limit is None:
        raise ModelError(f"{config.model_type}: the config names no max_position_embeddings; set --max-length")
    rope = getattr(text, "rope_parameters", None) or {}
    per_layer_type = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    for parameters in per_layer_type:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            limit = min(limit, parameters.get("original_max_position_embeddings", limit))
    return limit


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash over every parameter: name, shape, dtype, and two sums that change when a value changes or moves."""
    digest = hashlib.sha256()
    with torch.inference_mode():
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            for part in tensor.detach().flatten().split(2**24):
                values = part.double()
                places = torch.arange(len(values), device=values.device) % 8191 + 1
                digest.update(torch.stack([values.sum(), (values * places).sum()]).cpu().numpy().tobytes())
    return digest.hexdigest()
