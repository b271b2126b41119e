"""The torch engine: pack a batch, run one forward pass, read the head, give each sequence what it needs."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32
from transformers import PreTrainedModel

from densereward.capture import (
    AttentionRow,
    Captured,
    Contributions,
    Gradients,
    Need,
    Objectives,
    Prefixes,
    PrefixMode,
    PrefixScores,
    ReceivedAttention,
    ScoringInput,
    StepScores,
    Variants,
)
from densereward.engines.captured import from_positions
from densereward.engines.torch.chunks import expand
from densereward.engines.torch.facts import facts_of, prepare, with_head
from densereward.engines.torch.gradients import gradients
from densereward.engines.torch.loading import Dtype, choose_device, choose_dtype, load_scorer
from densereward.engines.torch.packing import counted_from_0
from densereward.engines.torch.passes import Passes, SequenceResult
from densereward.engines.torch.residual import ResidualDtype
from densereward.errors import EngineFailure
from densereward.heads.base import DecoderHead
from densereward.heads.bradley_terry import BradleyTerryHead

__all__ = ["TorchEngine"]

logger = logging.getLogger("densereward")


class TorchEngine:
    """A transformers reward model in this process. See `engines.base.Engine`.

    Args:
        model: loaded by `loading.load_scorer`.
        longest: tokens in the longest sequence to read; by default what the config gives.
        batch_tokens: tokens in one pass, beyond which a sequence runs in chunks; by default what suits the device.
        prompt_cache: bytes for the keys and values of prompts that come again; 0 caches none.
        separator: what ends each step, if the model is a token classifier that was trained on steps.
        head: that of its family; by default a sequence classifier's.
        residual_dtype: float32, where the model allows it, or that of the weights.

    Raises:
        ModelError: the model cannot be read as a reward model.
        CannotPack: it can, but not in packed batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        longest: int | None = None,
        batch_tokens: int | None = None,
        prompt_cache: int = 0,
        separator: str | None = None,
        head: DecoderHead | None = None,
        residual_dtype: ResidualDtype = "float32",
    ) -> None:
        self._model: Any = model
        prepare(model)
        self._head = head or BradleyTerryHead(model)
        self.facts = with_head(facts_of(model, self._head.name, longest, batch_tokens), self._head, separator)
        # A gate is read in the same pass as what it weighs, so prompts are not cached and nothing runs in chunks.
        gated = self.facts.gate is not None
        tokens, cache = (sys.maxsize, 0) if gated else (self.facts.batch_tokens, prompt_cache)
        self._passes = Passes(model, self._head, self.facts.layers, tokens, cache)
        self._passes.check_attention()
        if residual_dtype == "float32":
            self.facts = replace(self.facts, residual_dtype=self._passes.widen_residual())
        self._differentiated: frozenset[Need] = frozenset()
        if self.facts.unit != "sequence":
            return
        layers = range(-self.facts.layers, self.facts.layers)
        contributed = [Contributions(), *(Contributions(layer) for layer in layers)]
        kinds: list[list[Need]] = [[*contributed], [Gradients()]]
        self._differentiated = frozenset(need for needs in kinds if self._can_give(needs[0]) for need in needs)

    def _can_give(self, need: Need) -> bool:
        """Whether a few tokens get what they need."""
        probe = ScoringInput([0, 1, 2, 3], 1, 3, 3, needs=frozenset([need]))
        try:
            self.forward([probe])
        except EngineFailure as failure:
            logger.info("%s: %s", need, failure.message)
            return False
        return True

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        longest: int | None = None,
        batch_tokens: int | None = None,
        prompt_cache: int = 0,
        separator: str | None = None,
        head: str | None = None,
        pickled: bool = False,
        residual_dtype: ResidualDtype = "float32",
    ) -> TorchEngine:
        """Load from a folder or a hub id.

        Raises:
            ModelError: the model cannot be loaded or read as a reward model.
            CannotPack: it can, but not in packed batches.
        """
        chosen = choose_device(device)
        model, score_head = load_scorer(source, revision, chosen, choose_dtype(dtype, chosen), head, pickled=pickled)
        # What packs is a decoder; others are refused while they are loaded.
        decoder_head = cast("DecoderHead", score_head)
        return cls(model, longest, batch_tokens, prompt_cache, separator, decoder_head, residual_dtype)

    @property
    def provides(self) -> frozenset[Need]:
        """Scores of steps; or scores of prefixes, attention in each layer, and what can be differentiated."""
        if self.facts.unit != "sequence":
            return frozenset([StepScores()])
        layers = range(-self.facts.layers, self.facts.layers)
        in_layers = (kind(layer) for kind in (AttentionRow, ReceivedAttention) for layer in layers)
        scores: list[Need] = [PrefixScores("open"), PrefixScores("closed"), Variants()]
        scores += [Objectives()] if self._head.objectives else []
        return frozenset([*scores, *in_layers]) | self._differentiated

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Score a batch in one pass, or a sequence that is too long for one in chunks.

        Raises:
            EngineFailure: a pass failed.
        """
        results = self._passes.run([expand(sequence) for sequence in batch])
        return [self._captured(result) for result in results]

    def _captured(self, result: SequenceResult) -> Captured:
        """What a sequence needs of its result."""
        sequence, layers = result.expanded.sequence, self.facts.layers
        response = slice(sequence.prompt_length, sequence.response_stop)
        by_layer: dict[type[Need], dict[Any, Float32[np.ndarray, " T"]]] = defaultdict(dict)
        for need in sequence.needs:
            if isinstance(need, AttentionRow | Contributions):
                by_layer[type(need)][need.layer] = result.rows[counted_from_0(need, layers)][response]
            elif isinstance(need, ReceivedAttention):
                by_layer[type(need)][need.layer] = result.received[need.layer % layers][response]
        steps = result.values[len(result.values) - len(sequence.steps) :]
        return Captured(
            reward=float(result.values[0] if self.facts.unit != "token" else steps.mean(dtype=np.float64)),
            length=sequence.response_length,
            prefixes=_prefixes(sequence, result.values[1 : len(result.values) - len(steps)]),
            step_scores=steps if StepScores() in sequence.needs else None,
            objectives=_objectives(result) if Objectives() in sequence.needs else None,
            attention_rows=by_layer[AttentionRow],
            contributions=by_layer[Contributions],
            received_attention=by_layer[ReceivedAttention],
            gradients=self._gradients(result) if Gradients() in sequence.needs else None,
        )

    def _gradients(self, result: SequenceResult) -> Float32[np.ndarray, " T"]:
        with self._passes.failures():
            return gradients(self._model, self._head, result.expanded.sequence, float(result.values[0]))

    def reference(self, sequence: ScoringInput) -> Captured:
        """One sequence in transformers' own eager attention: score, open prefix scores, rows.

        Raises:
            EngineFailure: the model has no such attention.
        """
        hidden, rows = self._passes.reference(self._model, sequence)
        with torch.inference_mode():
            parts = self._head.parts(hidden, hidden[[sequence.gate]], [0] * len(hidden))
            scores = parts.sum(dim=0).cpu().numpy()
        steps = scores[list(sequence.steps)]
        reward = float(scores[sequence.scored_position] if self.facts.unit != "token" else steps.mean())
        return from_positions(sequence, reward, scores, lambda layer: rows[layer].cpu().numpy())

    def exactly(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """`forward`, computed in float32 on the weights as they are.

        Raises:
            EngineFailure: the model cannot be run so.
        """
        with self._passes.in_float32(self._model):
            return self.forward(batch)

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._model = None
        self._passes.close()
        torch.cuda.empty_cache()


def _objectives(result: SequenceResult) -> Float32[np.ndarray, "K _"]:
    """The parts of the reward and of s_1..s_T. These are read after s_0, if there is one."""
    sequence = result.expanded.sequence
    if result.objectives is None:
        raise EngineFailure("the head has no objectives")
    first = 1 + min(sequence.prompt_length, 1)
    return result.objectives[:, [0, *range(first, first + sequence.response_length)]]


def _prefixes(sequence: ScoringInput, values: Float32[np.ndarray, " _"]) -> dict[PrefixMode, Prefixes]:
    """The scores of open prefixes come first, then those of closed ones; both begin with s_0, if it has a token."""
    prefixes: dict[PrefixMode, Prefixes] = {}
    length = sequence.response_length
    if PrefixScores("open") in sequence.needs:
        open_values, values = np.split(values, [length + min(sequence.prompt_length, 1)])
        prefixes["open"] = _with_before(open_values, length)
    if PrefixScores("closed") in sequence.needs:
        prefixes["closed"] = _with_before(values, len(sequence.closed_prefixes) - 1, sequence.boundaries)
    return prefixes


def _with_before(values: Float32[np.ndarray, " _"], length: int, boundaries: Sequence[int] | None = None) -> Prefixes:
    before, after = np.split(values, [len(values) - length])
    return Prefixes(float(before[0]) if len(before) else None, after, boundaries)
