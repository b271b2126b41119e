"""The contract of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from densereward.capture import Captured, Need, ScoringInput, Steps
from densereward.errors import EngineDied

__all__ = ["TOLERANCE", "Engine", "EngineFacts", "StreamingEngine"]


TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far a score may move with the batch around it, by rounding, relative to the largest score."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of the model it holds.

    Attributes:
        engine: the engine's row in the table of engines.
        family: the model's architecture.
        head: the score head's name.
        device: where it runs.
        dtype: of the weights; the score head is float32.
        residual_dtype: of the residual stream; None where the engine does not say.
        max_length: tokens in the longest sequence it reads, closing tokens included.
        vocabulary_size: token ids are below it.
        layers: attention layers, counted from 0.
        batch_tokens: tokens in a forward pass that suit the device.
        pair_cost: the cost of one query on one key, in units of one token's matrix products.
        weights_fingerprint: changes when a weight does.
        weights_bytes: bytes of the weights.
        unit: what the head scores: a sequence (and likewise any prefix of it), a token, or a step.
        steps: how steps are written; None where the unit is no step.
        gate: the text that prompts must end with; where it begins, the model reads the weights of its objectives.
        notice: what an operator must know of the scores; None where they are plain rewards.
        score_token: the id written after the closing tokens, for a model whose score is read there.
        tokens: tokens that the head knows by their ids; the tokenizer must have the same ids for them.
        reads_pairs: whether the model reads prompt and response as a pair of texts.
        reencodes: whether closed prefixes are scored as sequences of their own.
        special_ids: the model's own BOS and EOS ids by "bos" and "eos", as far as its config names them.
        shares_prompts: whether sequences of one pass that begin with the same prompt run it once.
        advice: for refusals: which other engine gives what this one cannot.
        needs_prompt: whether a response to an empty prompt cannot be scored.
    """

    engine: str
    family: str
    head: str
    device: str
    dtype: str
    max_length: int
    vocabulary_size: int
    layers: int
    batch_tokens: int
    pair_cost: float
    weights_fingerprint: str
    weights_bytes: int = 0
    residual_dtype: str | None = None
    unit: Literal["sequence", "token", "step"] = "sequence"
    steps: Steps | None = None
    gate: str | None = None
    notice: str | None = None
    score_token: int | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    reads_pairs: bool = False
    reencodes: bool = False
    special_ids: Mapping[str, frozenset[int]] = field(default_factory=dict)
    shares_prompts: bool = True
    advice: str | None = None
    needs_prompt: bool = False


@runtime_checkable
class Engine(Protocol):
    """Runs the reward model.

    Called from one thread at a time. `forward` keeps the order of its batch, and what it gives for a sequence does
    not depend on the rest of the batch beyond rounding.
    """

    facts: EngineFacts

    @property
    def provides(self) -> frozenset[Need]:
        """The needs that can be met for a sequence: by `forward`, or by re-encoding (`EngineFacts.reencodes`)."""

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Score a batch; each sequence gets what its own `needs` name.

        Raises:
            EngineFailure: the pass failed.
        """

    def reference(self, sequence: ScoringInput) -> Captured:
        """One sequence, computed in an independent and slower way, for a comparison.

        Raises:
            EngineFailure: the engine has no such way.
        """

    def exactly(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """`forward`, computed in float32 on the weights as they are.

        Raises:
            EngineFailure: the model cannot be run so.
        """

    def close(self) -> None:
        """Free the device."""


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that forms its own batches: it takes sequences one by one, at any time, from any thread.

    Attributes:
        death: done when the engine has ended by itself; then all sequences fail, those still to come too.
    """

    death: Future[EngineDied]

    def submit(self, sequence: ScoringInput) -> Future[Captured]:
        """Hand over a sequence; cancelling its future drops it.

        The future fails with `EngineFailure` where this sequence cannot be scored, with `EngineDied` where none can.
        """

    def metrics(self) -> bytes:
        """The engine's own metrics, as Prometheus reads them."""
