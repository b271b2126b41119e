"""Which models vLLM is given, and with which arguments: models that it reads as their family does.

vLLM loads many models that it then reads in its own way: it squashes scores, takes a language model for a classifier,
or leaves a normaliser out. So the head is found as for the torch engine, from the config and the files' headers, and
only models whose head vLLM reads alike are taken.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from densereward.engines.torch.adapters import adapter_of
from densereward.engines.torch.loading import Dtype, max_length, read_config
from densereward.engines.torch.weights import weight_files, weight_shapes
from densereward.errors import ModelError
from densereward.heads import head_for
from densereward.heads.base import Checkpoint

__all__ = [
    "OWN_ARGUMENTS",
    "VERSIONS",
    "ServedModel",
    "check_installed",
    "check_version",
    "engine_arguments",
    "refuse_arguments",
    "served_model",
]

VERSIONS = ("0.32", "0.33")
"""Versions of vLLM whose internals the hooks in `engines.vllm.worker` are written for. The tests run the first."""

OWN_ARGUMENTS = frozenset(
    {
        "model",
        "revision",
        "dtype",
        "max_model_len",
        "max_num_batched_tokens",
        "runner",
        "convert",
        "pooler_config",
        "hf_overrides",
        "worker_extension_cls",
        "skip_tokenizer_init",
        "tokenizer",
        "trust_remote_code",
        "load_format",
        "data_parallel_size",
        "pipeline_parallel_size",
        "hf_config_path",
        "config_format",
        "code_revision",
        "model_weights",
        "model_class_overrides",
        "worker_cls",
        "scheduler_cls",
        "enable_lora",
        "speculative_config",
        "kv_transfer_config",
        "kv_offloading_size",
        "kv_offloading_backend",
    }
)
"""Arguments of vLLM's engine that are this server's own settings, or would change what is scored."""

_EXTENSION = "densereward.engines.vllm.worker.RowsExtension"

_KEYS_ON_CPU = 2**30
"""Bytes for keys and values on a CPU, where vLLM is not to fill the memory with them."""

_TORCH = "serve it with --engine torch"

_READ_ALIKE = frozenset({"bradley_terry"})
"""Heads that vLLM reads as their families do: a linear layer `score`, at each position."""


_READ_WINDOWS = frozenset({"mistral", "ministral", "mixtral", "phi3", "phimoe", "starcoder2"})
"""Model types in which transformers, too, gives all layers the `sliding_window` of a config without `layer_types`."""

_ONLY_VLLMS = ("method", "classifier_from_token")
"""Entries of a config with which vLLM makes a head out of the language model's, whatever head there is."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that vLLM may be given.

    Attributes:
        source: folder or hub id.
        revision: of a hub model.
        config: its config.
        head: its head's name.
        longest: tokens in the longest sequence to read.
        fingerprint: changes when a byte of its weights does.
        size: bytes of its weights.
    """

    source: str
    revision: str | None
    config: Any
    head: str
    longest: int
    fingerprint: str
    size: int


def served_model(source: str, revision: str | None, longest: int | None) -> ServedModel:
    """Read what vLLM needs of a model in a folder or on the hub.

    Raises:
        ModelError: vLLM cannot be given it.
    """
    if adapter_of(source, revision) is not None:
        raise ModelError(f"{source} is an adapter, which is merged only by the torch engine; {_TORCH}")
    config = read_config(source, revision, quantised=True)
    checkpoint = Checkpoint(config, weight_shapes(source, revision))
    try:
        head = head_for(checkpoint)
        if head.name not in _READ_ALIKE:
            raise ModelError(f"models with the head {head.name} are not read by vLLM as by their family; {_TORCH}")
        head.model_class(checkpoint)  # refuses what is no reward model
    except ModelError as error:
        raise ModelError(f"{source}: {error.message}") from error
    if not checkpoint.holds("score.weight"):
        raise ModelError(f"{source} has no weight called score.weight; such a head would be random")
    _refuse_otherwise_read(source, config)
    files = [Path(each) for each in weight_files(source, revision)]
    return ServedModel(
        source=source,
        revision=revision,
        config=config,
        head=head.name,
        longest=max_length(config, longest),
        fingerprint=_fingerprint(files),
        size=sum(each.stat().st_size for each in files),
    )


def _refuse_otherwise_read(source: str, config: Any) -> None:
    """Refuse a config that vLLM reads in another way than transformers.

    Raises:
        ModelError: it is one.
    """
    text = config.get_text_config()
    windowed = getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None)
    if windowed and text.model_type not in _READ_WINDOWS:
        raise ModelError(
            f"{source}: vLLM applies the sliding_window in its config, and transformers has none in {text.model_type}; "
            f"take it out if the model was trained without, or {_TORCH}"
        )
    if getattr(text, "is_causal", None) is False:
        raise ModelError(
            f"{source}: its tokens attend to later ones (is_causal), so that a prefix has no score; {_TORCH}"
        )
    if found := [name for name in _ONLY_VLLMS if getattr(text, name, None) is not None]:
        raise ModelError(f"{source}: with `{found[0]}` in its config, vLLM makes a head of its own; {_TORCH}")


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_version(version: str) -> None:
    """Refuse a version of vLLM that the hooks are not written for.

    Raises:
        ModelError: it is of another version.
    """
    found = re.match(r"\d+\.\d+", version)
    if found is None or found[0] not in VERSIONS:
        raise ModelError(
            f"vLLM {version} is not known here; install {' or '.join(f'{each}.*' for each in VERSIONS)}, or {_TORCH}",
            code="vllm_version",
        )


def refuse_arguments(given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse arguments that vLLM's engine does not have, or that an operator may not set.

    Raises:
        ModelError: there is one.
    """
    if unknown := sorted(set(given) - set(known)):
        raise ModelError(f"--engine-arguments: vLLM's engine has no {', '.join(unknown)}")
    if own := sorted(set(given) & OWN_ARGUMENTS):
        raise ModelError(
            f"--engine-arguments: {', '.join(own)} cannot be set there; for what an operator may choose there are "
            "--model, --revision, --dtype, --max-length and --max-batch-tokens"
        )


def check_installed(device: str) -> None:
    """Refuse a missing or unknown vLLM before anything is loaded.

    Raises:
        ModelError: vLLM is not installed, of an unknown version, or built for another kind of device.
    """
    # No usage statistics are sent, and no process is forked from one with threads.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        from vllm import __version__
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ModelError(f"vLLM is not installed ({error}): pip install 'densereward[vllm]'") from error
    check_version(__version__)
    if device not in ("auto", current_platform.device_type):
        raise ModelError(
            f"this vLLM runs on {current_platform.device_type}, not on {device}; which GPUs it takes is chosen by "
            "CUDA_VISIBLE_DEVICES"
        )


def engine_arguments(
    model: ServedModel, given: dict[str, Any], dtype: Dtype, batch_tokens: int | None, *, caches_prompts: bool
) -> Any:
    """The arguments that vLLM's engine is started with.

    Args:
        model: the model.
        given: the operator's arguments, which win over the device's defaults.
        dtype: of the weights; by default float32 on the CPU, else bfloat16.
        batch_tokens: tokens in one pass; by default what vLLM takes.
        caches_prompts: whether vLLM's prefix cache is on.

    Raises:
        ModelError: an argument that vLLM's engine does not have, or that an operator may not set.
    """
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    refuse_arguments(list(given), [each.name for each in fields(AsyncEngineArgs)])
    on_cpu = current_platform.device_type == "cpu"
    # The hooks do not run inside a CUDA graph, so graphs are split at attention.
    for_device: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": _KEYS_ON_CPU} if on_cpu else {}
    for_device = for_device or {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    chosen = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype
    own: dict[str, Any] = {
        "model": model.source,
        "revision": model.revision,
        "runner": "pooling",
        "dtype": chosen,
        "max_model_len": model.longest,
        "max_num_batched_tokens": batch_tokens,
        "pooler_config": PoolerConfig(seq_pooling_type="LAST", tok_pooling_type="ALL", use_activation=False),
        "hf_overrides": {"head_dtype": "float32"},
        "worker_extension_cls": _EXTENSION,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    defaults: dict[str, Any] = {"enable_prefix_caching": caches_prompts, "enable_chunked_prefill": True}
    return AsyncEngineArgs(**(for_device | defaults | given | own))
