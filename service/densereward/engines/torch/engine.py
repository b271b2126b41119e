"""The torch engine: pack, one forward pass, read the head, give each sequence what it asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from transformers import PreTrainedModel

from densereward.capture import AttentionRow, Captured, Need, PrefixScores, ScoringInput
from densereward.engines.base import EngineFacts
from densereward.engines.torch.loading import (
    Dtype,
    choose_device,
    choose_dtype,
    load_classifier,
    max_length,
    weights_fingerprint,
)
from densereward.engines.torch.packing import PackedBatch, pack, read_positions
from densereward.errors import EngineFailure
from densereward.heads.bradley_terry import BradleyTerryHead

__all__ = ["TorchEngine"]


class TorchEngine:
    """A transformers reward model in this process. See `engines.base.Engine`.

    Args:
        model: a sequence classifier loaded by `loading.load_classifier`.

    Raises:
        ModelError: the model cannot be read as a reward model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
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
            max_length=max_length(config),
            vocabulary_size=embedding.num_embeddings,
            layers=config.get_text_config().num_hidden_layers,
            weights_fingerprint=weights_fingerprint(model),
        )

    @classmethod
    def load(
        cls, source: str, *, revision: str | None = None, device: str = "auto", dtype: Dtype = "auto"
    ) -> TorchEngine:
        """Load from a folder or a hub id.

        Raises:
            ModelError: the model cannot be loaded or read as a reward model.
        """
        chosen = choose_device(device)
        return cls(load_classifier(source, revision, chosen, choose_dtype(dtype, chosen)))

    @property
    def provides(self) -> frozenset[Need]:
        """Prefix scores, and the scored row of every layer."""
        layers = self.facts.layers
        return frozenset([PrefixScores(), *(AttentionRow(layer) for layer in range(-layers, layers))])

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
        return self._unpack(batch, packed.bounds, scores, rows)

    def _run(self, packed: PackedBatch) -> tuple[Float32[np.ndarray, " M"], dict[int, Float32[np.ndarray, " N"]]]:
        """One pass, one copy back: the head at every read position, then the kept rows."""
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
        self,
        batch: Sequence[ScoringInput],
        bounds: list[int],
        scores: Float32[np.ndarray, " M"],
        rows: dict[int, Float32[np.ndarray, " N"]],
    ) -> list[Captured]:
        """Cut what the pass gave into sequences."""
        reads = np.split(scores, np.cumsum([len(read_positions(sequence)) for sequence in batch])[:-1])
        return [
            self._captured(sequence, start, read, rows)
            for sequence, start, read in zip(batch, bounds[:-1], reads, strict=True)
        ]

    def _captured(
        self,
        sequence: ScoringInput,
        start: int,
        read: Float32[np.ndarray, " _"],
        rows: dict[int, Float32[np.ndarray, " N"]],
    ) -> Captured:
        response = slice(start + sequence.prompt_length, start + sequence.response_stop)
        prefixes = PrefixScores() in sequence.needs
        before = min(sequence.prompt_length, 1)  # an empty prompt has no position to read s_0 at
        return Captured(
            reward=float(read[0]),
            length=sequence.response_length,
            prompt_score=float(read[1]) if prefixes and before else None,
            prefix_scores=read[1 + before :] if prefixes else None,
            attention_rows={
                need.layer: rows[need.layer % self.facts.layers][response]
                for need in sequence.needs
                if isinstance(need, AttentionRow)
            },
        )

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._model = self._backbone = None
        torch.cuda.empty_cache()
