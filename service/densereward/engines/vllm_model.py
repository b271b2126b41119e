"""What vLLM may be given: reward models that it reads as their family does, in versions whose insides are known here.

vLLM loads much that it then reads in its own way: it squashes scores, takes a language model for a classifier, or
leaves a normaliser out. Here the head is found as for the torch engine, from the config and the heads of the files, and
only those pass that vLLM reads alike.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densereward.engines.torch.adapters import adapter_of
from densereward.engines.torch.loading import max_length, read_config
from densereward.engines.torch.weights import weight_files, weight_shapes
from densereward.errors import ModelError
from densereward.heads import head_for
from densereward.heads.base import Checkpoint

__all__ = ["OWN_ARGUMENTS", "VERSIONS", "Served", "check_version", "refuse_arguments", "served"]

VERSIONS = ("0.32", "0.33")
"""Of vLLM; the hooks in `vllm_worker` are written for their insides. The first is the one the tests run."""

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
    }
)
"""Arguments of vLLM's engine that are this server's own settings, or would change what is scored."""

_TORCH = "serve it with --engine torch"

_READ_ALIKE = frozenset({"bradley_terry"})
"""Heads that vLLM reads as their families do: a linear layer `score`, for every position by itself."""


@dataclass(frozen=True, slots=True)
class Served:
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


def served(source: str, revision: str | None, longest: int | None) -> Served:
    """Look at a model in a folder or on the hub.

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
    files = [Path(each) for each in weight_files(source, revision)]
    return Served(
        source=source,
        revision=revision,
        config=config,
        head=head.name,
        longest=max_length(config, longest),
        fingerprint=_fingerprint(files),
        size=sum(each.stat().st_size for each in files),
    )


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_version(version: str) -> None:
    """Refuse a vLLM whose insides nobody has looked at.

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
    """Refuse arguments of vLLM's engine that it does not have, or that are not the operator's.

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
