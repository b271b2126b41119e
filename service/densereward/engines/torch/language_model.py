"""A causal language model as an engine: the log-probability of each token of a response.

The score of a sequence is the log-probability of its response and closing tokens, log p(y | x). The score of a prefix
is that of the response so far, so the difference of two prefix scores is a token's own log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from transformers import PreTrainedModel

from densereward.capture import (
    Captured,
    LogProbabilities,
    Need,
    Prefixes,
    PrefixMode,
    PrefixScores,
    ScoringInput,
    Variants,
)
from densereward.engines.torch.attention import SingleSequence
from densereward.engines.torch.chunks import ExpandedSequence
from densereward.engines.torch.facts import facts_of, prepare
from densereward.engines.torch.loading import Dtype, choose_device, choose_dtype, load_language_model
from densereward.engines.torch.passes import Passes
from densereward.engines.torch.residual import ResidualDtype
from densereward.errors import ModelError
from densereward.heads.language_model import LanguageModelHead

__all__ = ["LanguageModel", "captured_sums"]

_LOGS = frozenset([LogProbabilities(), LogProbabilities(alone=True)])
_PROBE = 12
"""Tokens on which the head is compared with the model's own logits."""

_ROUNDING = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
"""How far a logit may be off, relative to the largest: the model rounds logits to its dtype."""


class LanguageModel:
    """A transformers language model in this process. See `engines.base.Engine`.

    The first token of a sequence without a prompt has no probability, since nothing comes before it; it counts as 0.

    Args:
        model: loaded by `loading.load_language_model`.
        longest: tokens in the longest sequence to read; by default what the config gives.
        batch_tokens: tokens in one pass, beyond which a sequence runs in chunks; by default what suits the device.
        prompt_cache: bytes for the keys and values of prompts that come again; 0 caches none.
        residual_dtype: float32, where the model allows it, or that of the weights.

    Raises:
        ModelError: the model does something with its logits that is not known here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        longest: int | None = None,
        batch_tokens: int | None = None,
        prompt_cache: int = 0,
        residual_dtype: ResidualDtype = "float32",
    ) -> None:
        prepare(model)
        self._model: Any = model
        self._head = LanguageModelHead(model)
        facts = facts_of(model, self._head.name, longest, batch_tokens)
        size = min(facts.vocabulary_size, self._head.size)
        self.facts = replace(facts, vocabulary_size=size, needs_prompt=True)
        self._passes = Passes(model, self._head, self.facts.layers, self.facts.batch_tokens, prompt_cache)
        self._check_logits(model)
        self._passes.check_attention()
        if residual_dtype == "float32":
            self.facts = replace(self.facts, residual_dtype=self._passes.widen_residual())

    @classmethod
    def load(
        cls,
        source: str,
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        longest: int | None = None,
        batch_tokens: int | None = None,
        prompt_cache: int = 0,
        pickled: bool = False,
        residual_dtype: ResidualDtype = "float32",
    ) -> LanguageModel:
        """Load from a folder or a hub id.

        Raises:
            ModelError: the model cannot be loaded or read as a language model.
        """
        chosen = choose_device(device)
        model = load_language_model(source, chosen, choose_dtype(dtype, chosen), pickled=pickled)
        return cls(model, longest, batch_tokens, prompt_cache, residual_dtype)

    @property
    def provides(self) -> frozenset[Need]:
        """Log-probabilities, and their sums over prefixes."""
        return frozenset([PrefixScores("open"), Variants(), LogProbabilities(), LogProbabilities(alone=True)])

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Log-probabilities of a batch in one pass, or of a sequence that is too long for one in chunks.

        Raises:
            EngineFailure: a pass failed.
        """
        results = self._passes.run([_expand(sequence) for sequence in batch])
        values = [_with_first_token(result.values, result.expanded.sequence) for result in results]
        return [
            captured_sums(sequence, own, own if sequence.needs & _LOGS else None)
            for sequence, own in zip(batch, values, strict=True)
        ]

    def reference(self, sequence: ScoringInput) -> Captured:
        """One sequence in transformers' own eager attention.

        Raises:
            EngineFailure: the model has no such attention.
        """
        expanded = _expand(sequence)
        hidden, _ = self._passes.reference(self._model, sequence)
        with torch.inference_mode():
            next_ids = torch.from_numpy(expanded.next_ids).to(hidden.device)
            values = self._head.read(hidden[torch.from_numpy(expanded.read_at)], next_ids).cpu().numpy()
        return captured_sums(sequence, _with_first_token(values, sequence), None)

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

    def _check_logits(self, model: Any) -> None:
        """Compare the head's logits with those of the model's own forward pass."""
        ids = np.random.default_rng(0).integers(0, self.facts.vocabulary_size, (1, _PROBE))
        inputs = {
            "input_ids": torch.from_numpy(ids).to(model.device),
            "position_ids": torch.arange(_PROBE, device=model.device)[None],
            "use_cache": False,
            "packed": SingleSequence(),
        }
        try:
            with torch.inference_mode():
                own = model(**inputs).logits[0].float()
                here = self._head.logits(self._passes.backbone(**inputs).last_hidden_state[0])
        except Exception as error:  # a model's own code can fail in any way
            raise ModelError(f"{self.facts.family} cannot be read as a language model: {error}") from error
        if own.shape != here.shape or not (own - here).abs().max() <= _ROUNDING[self.facts.dtype] * own.abs().max():
            raise ModelError(
                f"{self.facts.family} gives other logits than are read here; it does something with its logits that is "
                "not known"
            )


def captured_sums(
    sequence: ScoringInput, values: Float32[np.ndarray, " _"], log_probabilities: Float32[np.ndarray, " _"] | None
) -> Captured:
    """A sequence whose score is the sum of its tokens' values, and its prefixes, whose scores are the sums so far.

    Args:
        sequence: the sequence.
        values: one per response and closing token.
        log_probabilities: of the same tokens, where they are needed.
    """
    prefixes: dict[PrefixMode, Prefixes] = {}
    if PrefixScores("open") in sequence.needs:
        after = np.cumsum(values[: sequence.response_length], dtype=np.float64).astype(np.float32)
        prefixes["open"] = Prefixes(0.0, after)
    return Captured(
        reward=float(values.sum(dtype=np.float64)),
        length=sequence.response_length,
        prefixes=prefixes,
        log_probabilities=log_probabilities,
    )


def _expand(sequence: ScoringInput) -> ExpandedSequence:
    """A sequence whose head is read before each response token and each closing token."""
    ids = np.asarray(sequence.token_ids, dtype=np.int64)
    read_at = np.arange(max(sequence.prompt_length - 1, 0), len(ids) - 1)
    nothing = np.zeros(0, dtype=np.int64)
    return ExpandedSequence(sequence, ids, np.arange(len(ids)), nothing, read_at, next_ids=ids[read_at + 1])


def _with_first_token(values: Float32[np.ndarray, " _"], sequence: ScoringInput) -> Float32[np.ndarray, " _"]:
    """One value per token; 0 for a first token that nothing comes before."""
    first = 0 if sequence.prompt_length else 1
    return np.concatenate([np.zeros(first, np.float32), values])
