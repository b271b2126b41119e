"""The way of models that cannot be packed: transformers' own attention, whole texts, slower and just as exact.

Bidirectional models read prompt and response as a pair, several in a padded batch with its mask. Decoders that mix
tokens in ways of their own run in batches of equal lengths, so that nothing is ever padded. Prefixes that are scored
closed are sequences of their own (`EngineFacts.reencodes`).
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
from densereward.engines.torch.exact import all_in_float32
from densereward.engines.torch.facts import facts_of, with_head
from densereward.engines.torch.loading import Dtype, choose_device, choose_dtype, load_scorer
from densereward.engines.torch.own_attention import OwnAttention, failures
from densereward.engines.torch.probes import gives_rows, has_fused, is_causal
from densereward.errors import EngineFailure, ModelError
from densereward.heads.base import PositionHead, ScoreHead

__all__ = ["UnpackedEngine"]


@dataclass(frozen=True, slots=True)
class _Read:
    """What a pass gives for one sequence.

    Attributes:
        scores: of all its positions, or one of the whole text.
        rows: the scored token's row in each layer, if the pass was asked for rows.
    """

    scores: Float32[np.ndarray, " _"]
    rows: Float32[np.ndarray, "A S"]


class UnpackedEngine:
    """A transformers reward model in this process. See `engines.base.Engine`.

    Args:
        model: loaded by `loading.load_scorer`.
        head: that of its family.
        why: what keeps the model from being packed.
        longest: tokens in the longest sequence to read; by default what the config gives.
        batch_tokens: tokens in one padded batch; by default what suits the device.
        separator: what ends each step, if the model is a token classifier that was trained on steps.

    Raises:
        ModelError: the model cannot be read as a reward model in this way either.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: ScoreHead,
        why: str,
        longest: int | None = None,
        batch_tokens: int | None = None,
        separator: str | None = None,
    ) -> None:
        self._whole = head.pooling == "text"
        self._head = head if isinstance(head, PositionHead) else None
        if self._head is None and not self._whole:
            raise ModelError(why)  # a gate is read in the packed pass
        model.requires_grad_(False)
        if self._whole:
            _widen_head(model)
        facts = facts_of(model, head.name, longest, batch_tokens)
        self.facts = replace(
            with_head(facts, head, separator),
            engine="unpacked",
            max_length=min(facts.max_length, _positions(model)),
            notice=head.notice or f"it runs in transformers' own attention, not packed with others: {why}",
            reads_pairs=self._whole,
            reencodes=True,
            shares_prompts=False,
        )
        self._attention = OwnAttention(model, whole=self._whole, fused=has_fused(model))
        try:
            if not self._whole and not is_causal(self._scores_alone, TOLERANCE[self.facts.dtype]):
                raise ModelError(f"{why}, and its tokens look ahead, so that how it reads a dialogue is not known")
            reads_once = head.pooling != "mean" and head.unit == "sequence"
            self._rows = reads_once and gives_rows(self._attention, facts.layers)
        except EngineFailure as failure:
            advice = "" if self.facts.dtype == "float32" else "; try --dtype float32"
            raise ModelError(f"it does not run in {self.facts.dtype}: {failure.message}{advice}") from failure

    @classmethod
    def load(
        cls,
        source: str,
        why: str,
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
        model, read_by = load_scorer(
            source, revision, chosen, choose_dtype(dtype, chosen), head, packs=False, pickled=pickled
        )
        return cls(model, read_by, why, longest, batch_tokens, separator)

    @property
    def provides(self) -> frozenset[Need]:
        """Scores of steps; or of prefixes, open ones too where nothing looks ahead, and the scored row."""
        if self.facts.unit != "sequence":
            return frozenset([StepScores()])
        scores: list[Need] = [PrefixScores("closed"), Variants()]
        scores += [] if self._whole else [PrefixScores("open")]
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
                reads = self._run([batch[i] for i in indices])
                captured |= {i: self._captured(batch[i], read) for i, read in zip(indices, reads, strict=True)}
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
        """Indices of sequences that run together: of equal length, or where padding is masked, of nearly equal.

        Those of which rows are wanted run apart, since that takes another attention.
        """

        def kind(i: int) -> tuple[bool, int]:
            return _wants_rows(batch[i]), 0 if self._whole else len(batch[i].token_ids)

        ordered = sorted(range(len(batch)), key=lambda i: (*kind(i), len(batch[i].token_ids)))
        for _, group in groupby(ordered, key=kind):
            together: list[int] = []
            for i in group:
                if together and (len(together) + 1) * len(batch[i].token_ids) > self.facts.batch_tokens:
                    yield together
                    together = []
                together.append(i)
            if together:
                yield together

    def _run(self, batch: Sequence[ScoringInput], *, eager: bool = False) -> list[_Read]:
        """One pass."""
        wanted = any(map(_wants_rows, batch))
        output = self._attention.output(batch, rows=wanted, eager=eager)
        if self._head is None:
            scores: Tensor = output.logits.float()
        else:
            scores = torch.stack([_scores(self._head, hidden) for hidden in output.last_hidden_state])
        on_host = scores.cpu().numpy()
        rows = (self._scored_rows(output.attentions if wanted else (), i, each) for i, each in enumerate(batch))
        return [_Read(*each) for each in zip(on_host, rows, strict=True)]

    def _scores_alone(self, sequence: ScoringInput) -> Float32[np.ndarray, " _"]:
        with torch.inference_mode(), failures():
            return self._run([sequence])[0].scores

    def _scored_rows(self, attentions: Sequence[Tensor], index: int, sequence: ScoringInput) -> Any:
        length = len(sequence.token_ids)
        rows = [each[index, :, 0, :length].float().mean(dim=0) for each in attentions]
        return torch.stack(rows).cpu().numpy() if rows else np.zeros((0, length), np.float32)

    def _captured(self, sequence: ScoringInput, read: _Read) -> Captured:
        """In the form that methods read."""
        steps = read.scores[list(sequence.steps)]
        own = float(read.scores[0] if self._whole else read.scores[sequence.scored_position])
        reward = float(steps.mean(dtype=np.float64)) if self.facts.unit == "token" else own
        step_scores = steps if StepScores() in sequence.needs else None
        return from_positions(sequence, reward, read.scores, lambda layer: read.rows[layer], step_scores)


def _scores(head: PositionHead, hidden: Tensor) -> Float32[Tensor, " S"]:
    """Of every position of one sequence."""
    scores = head.scores(hidden)
    if head.pooling == "mean":
        scores = scores.cumsum(0) / torch.arange(1, len(scores) + 1, device=scores.device)
    return scores


def _wants_rows(sequence: ScoringInput) -> bool:
    return any(isinstance(need, AttentionRow) for need in sequence.needs)


def _widen_head(model: Any) -> None:
    """What stands behind the encoder computes in float32, whatever the model's dtype."""

    def widen(_module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in given)

    for child in model.children():
        if child is not model.base_model:
            child.float().register_forward_pre_hook(widen)


def _positions(model: Any) -> int:
    """Positions that the model has rows for, less those that it never uses: RoBERTa counts from behind its padding."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if embeddings is None:
        return 2**31
    unused = 0 if embeddings.padding_idx is None else embeddings.padding_idx + 1
    return int(embeddings.num_embeddings - unused)
