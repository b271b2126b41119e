"""A policy and its reference as one reward model: the implicit reward, log p(y | x) - log p_ref(y | x).

What a policy was trained to prefer over its reference is a reward, up to the factor that it was trained with (Rafailov
et al., arXiv 2404.12358). It is a sum over tokens, so every prefix has a score and every token its own part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from densereward.capture import Captured, LogProbabilities, LogRatios, Need, Prefixes, ScoringInput
from densereward.engines.torch.language_model import LanguageModel, captured_sums
from densereward.errors import EngineFailure, ModelError

__all__ = ["Pair"]

_ALONE = LogProbabilities(alone=True)


class Pair:
    """Two language models with one vocabulary. See `engines.base.Engine`.

    A sequence that needs nothing but log-probabilities does not run through the reference.

    Args:
        policy: the trained model.
        reference: what it was trained from.

    Raises:
        ModelError: their vocabularies are of different sizes, or they are one model.
    """

    def __init__(self, policy: LanguageModel, reference: LanguageModel) -> None:
        first, second = policy.facts, reference.facts
        if first.vocabulary_size != second.vocabulary_size:
            raise ModelError(
                f"the policy has {first.vocabulary_size} tokens and the reference {second.vocabulary_size}; a pair has "
                "one vocabulary"
            )
        if first.weights_fingerprint == second.weights_fingerprint:
            raise ModelError("policy and reference are the same model, and every reward would be 0")
        self._policy = policy
        self._reference = reference
        both = first.weights_fingerprint + second.weights_fingerprint
        self.facts = replace(
            first,
            head="log_ratio",
            max_length=min(first.max_length, second.max_length),
            batch_tokens=min(first.batch_tokens, second.batch_tokens),
            weights_fingerprint=hashlib.sha256(both.encode()).hexdigest(),
        )

    @property
    def provides(self) -> frozenset[Need]:
        """Log-ratios, their sums over prefixes, and the policy's log-probabilities."""
        return self._policy.provides | {LogRatios()}

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """The policy's pass, then the reference's pass over the sequences that need it.

        Raises:
            EngineFailure: a pass failed.
        """
        inputs = [replace(sequence, needs=frozenset([_ALONE])) for sequence in batch]
        policy = self._policy.forward(inputs)
        compared = [index for index, sequence in enumerate(batch) if _ALONE not in sequence.needs]
        reference = self._reference.forward([inputs[index] for index in compared]) if compared else []
        results = list(policy)
        for index, other in zip(compared, reference, strict=True):
            results[index] = _log_ratios(batch[index], policy[index], other)
        return results

    def reference(self, sequence: ScoringInput) -> Captured:
        """One sequence in transformers' own eager attention, by both.

        Raises:
            EngineFailure: a model has no such attention.
        """
        policy, reference = (model.reference(sequence) for model in (self._policy, self._reference))
        pairs = zip(policy.arrays, reference.arrays, strict=True)
        prefixes = [Prefixes(0.0, one - two) for one, two in pairs if len(one) == sequence.response_length]
        return Captured(
            policy.reward - reference.reward, sequence.response_length, {"open": prefixes[0]} if prefixes else {}
        )

    def exactly(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """`forward`, computed in float32 on the weights as they are.

        Raises:
            EngineFailure: a model cannot be run so.
        """
        inputs = [replace(sequence, needs=frozenset([_ALONE])) for sequence in batch]
        policy, reference = self._policy.exactly(inputs), self._reference.exactly(inputs)
        return [_log_ratios(*each) for each in zip(batch, policy, reference, strict=True)]

    def close(self) -> None:
        """Drop both models."""
        self._policy.close()
        self._reference.close()


def _log_ratios(sequence: ScoringInput, policy: Captured, reference: Captured) -> Captured:
    """The log-ratios of a sequence that both models have read."""
    first, second = policy.log_probabilities, reference.log_probabilities
    if first is None or second is None:
        raise EngineFailure("a language model gave no log-probabilities")
    ratios = first - second
    captured = captured_sums(sequence, ratios, first if LogProbabilities() in sequence.needs else None)
    return replace(captured, log_ratios=ratios if LogRatios() in sequence.needs else None)
