"""The torch engine: pack, one forward pass, read the head, give each sequence what it asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from transformers import PreTrainedModel

from densereward.capture import AttentionRow, Captured, Need, Prefixes, PrefixMode, PrefixScores, ScoringInput
from densereward.engines.base import EngineFacts
from densereward.engines.torch.loading import (
    Dtype,
    choose_device,
    choose_dtype,
    load_classifier,
    max_length,
    weights_fingerprint,
)
from densereward.engines.torch.packing import PackedBatch, pack
from densereward.errors import EngineFailure
from densereward.heads.bradley_terry import BradleyTerryHead

__all__ = ["TorchEngine"]


# On a CPU, larger passes only fall out of the caches; a GPU needs them to be busy.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class TorchEngine:
    """A transformers reward model in this process. See `engines.base.Engine`.

    Args:
        model: a sequence classifier loaded by `loading.load_classifier`.
        longest: tokens in the longest sequence to read; by default what the config gives.

    Raises:
        ModelError: the model cannot be read as a reward model.
    """

    def __init__(self, model: PreTrainedModel, longest: int | None = None) -> None:
        self._model: Any = model
        embedding: Any = model.get_input_embeddings()
        self._backbone: Any = model.base_model
        self._head = BradleyTerryHead(model)
        config = model.config
        self.facts = EngineFacts(
            engine="torch",
            family=type(model).__name__,
            head=self._head.name,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            max_length=max_length(config, longest),
            vocabulary_size=embedding.num_embeddings,
            layers=config.get_text_config().num_hidden_layers,
            batch_tokens=_BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cuda"]),
            pair_cost=_pair_cost(model),
            weights_fingerprint=weights_fingerprint(model),
        )

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        longest: int | None = None,
    ) -> TorchEngine:
        """Load from a folder or a hub id.

        Raises:
            ModelError: the model cannot be loaded or read as a reward model.
        """
        chosen = choose_device(device)
        return cls(load_classifier(source, revision, chosen, choose_dtype(dtype, chosen)), longest)

    @property
    def provides(self) -> frozenset[Need]:
        """Prefix scores, open and closed, and the scored row of every layer."""
        layers = self.facts.layers
        return frozenset(
            [PrefixScores("open"), PrefixScores("closed"), *(AttentionRow(layer) for layer in range(-layers, layers))]
        )

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Score a batch in one pass.

        Raises:
            EngineFailure: the pass failed.
        """
        try:
            with torch.inference_mode():
                packed = pack(batch, self._model.device, self.facts.layers)
                scores, rows = self._run(packed)
        except RuntimeError as error:
            raise EngineFailure(f"the forward pass failed: {error}") from error
        return self._unpack(packed, scores, rows)

    def _run(self, packed: PackedBatch) -> tuple[Float32[np.ndarray, " M"], dict[int, Float32[np.ndarray, " R"]]]:
        """One pass, one copy back: the head at every read place, then the kept rows."""
        hidden = self._backbone(
            input_ids=packed.token_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
        ).last_hidden_state[0]
        if packed.row_layers != packed.rows.keys():
            missing = sorted(packed.row_layers - packed.rows.keys())
            raise EngineFailure(f"{self.facts.family} gave no attention row for layers {missing}")
        layers = sorted(packed.rows)
        results = [self._head.scores(hidden[packed.read]), *(packed.rows[layer] for layer in layers)]
        scores, *rows = torch.split(torch.cat(results).cpu(), [len(each) for each in results])
        return scores.numpy(), {layer: row.numpy() for layer, row in zip(layers, rows, strict=True)}

    def _unpack(
        self, packed: PackedBatch, scores: Float32[np.ndarray, " M"], rows: dict[int, Float32[np.ndarray, " R"]]
    ) -> list[Captured]:
        """Cut what the pass gave into sequences."""
        captured = []
        read = key = 0
        for placed in packed.placed:
            sequence = placed.sequence
            reads = scores[read : read + len(placed.reads)]
            response = slice(key + sequence.prompt_length, key + sequence.response_stop)
            wanted = {need.layer for need in sequence.needs if isinstance(need, AttentionRow)}
            captured.append(
                Captured(
                    reward=float(reads[0]),
                    length=sequence.response_length,
                    prefixes=_prefixes(sequence, reads[1:]),
                    attention_rows={layer: rows[layer % self.facts.layers][response] for layer in wanted},
                )
            )
            read += len(reads)
            key += sequence.scored_position + 1
        return captured

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._model = self._backbone = None
        torch.cuda.empty_cache()


def _pair_cost(model: PreTrainedModel) -> float:
    """Multiplications for one query and one key, in all heads and layers, over those of a token's matrices."""
    config = model.config.get_text_config()
    head: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_attention_heads * head * config.num_hidden_layers
    embedding: Any = model.get_input_embeddings()
    matrices = sum(each.numel() for each in model.parameters() if each.ndim > 1) - embedding.weight.numel()
    return float(attention / matrices)


def _prefixes(sequence: ScoringInput, reads: Float32[np.ndarray, " _"]) -> dict[PrefixMode, Prefixes]:
    """Open prefixes come first, then closed ones; each with s_0 wherever there is a token to read it at."""
    prefixes: dict[PrefixMode, Prefixes] = {}
    length = sequence.response_length
    if PrefixScores("open") in sequence.needs:
        open_reads, reads = np.split(reads, [length + min(sequence.prompt_length, 1)])
        prefixes["open"] = _with_before(open_reads, length)
    if PrefixScores("closed") in sequence.needs:
        prefixes["closed"] = _with_before(reads, length)
    return prefixes


def _with_before(reads: Float32[np.ndarray, " _"], length: int) -> Prefixes:
    before, after = np.split(reads, [len(reads) - length])
    return Prefixes(float(before[0]) if len(before) else None, after)
