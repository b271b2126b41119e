"""The engine for models that cannot be packed: transformers' own attention, slower and with the same numbers.

Encoders read prompt and response as a pair of texts, in padded batches with a mask. Decoders that mix tokens by
something else than attention run in batches of equal lengths, so that nothing is padded. Closed prefixes are scored as
sequences of their own (`EngineFacts.reencodes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import PreTrainedModel

from densereward.capture import (
    AttentionRow,
    Captured,
    Need,
    PrefixScores,
    ScoringInput,
    StepScores,
    Variants,
)
from densereward.engines.base import TOLERANCE
from densereward.engines.captured import from_positions
from densereward.engines.torch.facts import facts_of, with_head
from densereward.engines.torch.float32 import all_in_float32
from densereward.engines.torch.loading import Dtype, choose_device, choose_dtype, load_scorer
from densereward.engines.torch.probes import gives_rows, has_fused, is_causal
from densereward.engines.torch.transformers_pass import TransformersPass, failures
from densereward.errors import EngineFailure, ModelError
from densereward.heads.base import PositionHead, ScoreHead

__all__ = ["UnpackedEngine"]


@dataclass(frozen=True, slots=True)
class _PassResult:
    """What a pass gives for one sequence.

    Attributes:
        scores: of all its positions, or one of the whole text.
        rows: the scored token's row in each layer; none of a pass that needs no rows.
    """

    scores: Float32[np.ndarray, " _"]
    rows: Float32[np.ndarray, "A S"]


class UnpackedEngine:
    """A transformers reward model in this process. See `engines.base.Engine`.

    Args:
        model: loaded by `loading.load_scorer`.
        head: that of its family.
        reason: why the model cannot be packed.
        longest: tokens in the longest sequence to read; by default what the config gives.
        batch_tokens: tokens in one padded batch; by default what suits the device.
        separator: what ends each step, if the model is a token classifier that was trained on steps.

    Raises:
        ModelError: the model cannot be read as a reward model in this way, either.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: ScoreHead,
        reason: str,
        longest: int | None = None,
        batch_tokens: int | None = None,
        separator: str | None = None,
    ) -> None:
        self._reads_texts = head.pooling == "text"
        self._head = head if isinstance(head, PositionHead) else None
        if self._head is None and not self._reads_texts:
            raise ModelError(reason)  # a gate is read in the packed pass
        model.requires_grad_(False)
        if self._reads_texts:
            _widen_head(model)
        facts = facts_of(model, head.name, longest, batch_tokens)
        self.facts = replace(
            with_head(facts, head, separator),
            engine="unpacked",
            max_length=min(facts.max_length, _positions(model)),
            notice=head.notice or f"it runs in transformers' own attention, not packed with others: {reason}",
            reads_pairs=self._reads_texts,
            reencodes=True,
            shares_prompts=False,
        )
        self._attention = TransformersPass(model, reads_texts=self._reads_texts, fused=has_fused(model))
        try:
            if not self._reads_texts and not is_causal(self._scores_alone, TOLERANCE[self.facts.dtype]):
                raise ModelError(
                    f"{reason}, and its tokens attend to later ones, so that it is not known how it reads a dialogue"
                )
            reads_once = head.pooling != "mean" and head.unit == "sequence"
            self._rows = reads_once and gives_rows(self._attention, facts.layers)
        except EngineFailure as failure:
            advice = "" if self.facts.dtype == "float32" else "; try --dtype float32"
            raise ModelError(f"it does not run in {self.facts.dtype}: {failure.message}{advice}") from failure

    @classmethod
    def load(
        cls,
        source: str,
        reason: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        longest: int | None = None,
        batch_tokens: int | None = None,
        separator: str | None = None,
        head: str | None = None,
        pickled: bool = False,
    ) -> UnpackedEngine:
        """Load from a folder or a hub id.

        Raises:
            ModelError: the model cannot be loaded or read as a reward model.
        """
        chosen = choose_device(device)
        model, score_head = load_scorer(
            source, revision, chosen, choose_dtype(dtype, chosen), head, packs=False, pickled=pickled
        )
        return cls(model, score_head, reason, longest, batch_tokens, separator)

    @property
    def provides(self) -> frozenset[Need]:
        """Scores of steps; or scores of prefixes, open ones too where the model is causal, and the scored row."""
        if self.facts.unit != "sequence":
            return frozenset([StepScores()])
        scores: list[Need] = [PrefixScores("closed"), Variants()]
        scores += [] if self._reads_texts else [PrefixScores("open")]
        layers = range(-self.facts.layers, self.facts.layers)
        return frozenset([*scores, *(AttentionRow(layer) for layer in layers if self._rows)])

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Score a batch, in as many passes as its lengths take.

        Raises:
            EngineFailure: a pass failed.
        """
        captured: dict[int, Captured] = {}
        with torch.inference_mode(), failures():
            for indices in self._batches(batch):
                results = self._run([batch[i] for i in indices])
                captured |= {i: self._captured(batch[i], result) for i, result in zip(indices, results, strict=True)}
        return [captured[i] for i in range(len(batch))]

    def reference(self, sequence: ScoringInput) -> Captured:
        """One sequence by itself, in eager attention.

        Raises:
            EngineFailure: the pass failed.
        """
        with torch.inference_mode(), failures():
            return self._captured(sequence, self._run([sequence], eager=True)[0])

    def exactly(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """`forward`, computed in float32 on the weights as they are.

        Raises:
            EngineFailure: the model cannot be run so.
        """
        with all_in_float32(self._attention.model):
            return self.forward(batch)

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._attention.model = None
        torch.cuda.empty_cache()

    def _batches(self, batch: Sequence[ScoringInput]) -> Iterator[list[int]]:
        """Indices of the sequences of each pass: of equal length, or of nearly equal length where padding is masked.

        Sequences that need rows run in passes of their own, since only eager attention gives rows.
        """

        def kind(i: int) -> tuple[bool, int]:
            return _needs_rows(batch[i]), 0 if self._reads_texts else len(batch[i].token_ids)

        ordered = sorted(range(len(batch)), key=lambda i: (*kind(i), len(batch[i].token_ids)))
        for _, group in groupby(ordered, key=kind):
            indices: list[int] = []
            for i in group:
                if indices and (len(indices) + 1) * len(batch[i].token_ids) > self.facts.batch_tokens:
                    yield indices
                    indices = []
                indices.append(i)
            if indices:
                yield indices

    def _run(self, batch: Sequence[ScoringInput], *, eager: bool = False) -> list[_PassResult]:
        """One pass."""
        needs_rows = any(map(_needs_rows, batch))
        output = self._attention.run(batch, rows=needs_rows, eager=eager)
        if self._head is None:
            scores: Tensor = output.logits.float()
        else:
            scores = torch.stack([_scores(self._head, hidden) for hidden in output.last_hidden_state])
        on_host = scores.cpu().numpy()
        rows = (self._scored_rows(output.attentions if needs_rows else (), i, each) for i, each in enumerate(batch))
        return [_PassResult(*each) for each in zip(on_host, rows, strict=True)]

    def _scores_alone(self, sequence: ScoringInput) -> Float32[np.ndarray, " _"]:
        with torch.inference_mode(), failures():
            return self._run([sequence])[0].scores

    def _scored_rows(self, attentions: Sequence[Tensor], index: int, sequence: ScoringInput) -> Any:
        length = len(sequence.token_ids)
        rows = [each[index, :, 0, :length].float().mean(dim=0) for each in attentions]
        return torch.stack(rows).cpu().numpy() if rows else np.zeros((0, length), np.float32)

    def _captured(self, sequence: ScoringInput, result: _PassResult) -> Captured:
        """What a sequence needs of a pass."""
        steps = result.scores[list(sequence.steps)]
        own = float(result.scores[0] if self._reads_texts else result.scores[sequence.scored_position])
        reward = float(steps.mean(dtype=np.float64)) if self.facts.unit == "token" else own
        step_scores = steps if StepScores() in sequence.needs else None
        return from_positions(sequence, reward, result.scores, lambda layer: result.rows[layer], step_scores)


def _scores(head: PositionHead, hidden: Tensor) -> Float32[Tensor, " S"]:
    """The score at every position of one sequence."""
    scores = head.scores(hidden)
    if head.pooling == "mean":
        scores = scores.cumsum(0) / torch.arange(1, len(scores) + 1, device=scores.device)
    return scores


def _needs_rows(sequence: ScoringInput) -> bool:
    return any(isinstance(need, AttentionRow) for need in sequence.needs)


def _widen_head(model: Any) -> None:
    """Let all layers behind the encoder compute in float32, whatever the model's dtype."""

    def widen(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in args)

    for child in model.children():
        if child is not model.base_model:
            child.float().register_forward_pre_hook(widen)


def _positions(model: Any) -> int:
    """Positions that the model has embeddings for and uses: RoBERTa counts from after its padding token's."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if embeddings is None:
        return 2**31
    unused = 0 if embeddings.padding_idx is None else embeddings.padding_idx + 1
    return int(embeddings.num_embeddings - unused)
