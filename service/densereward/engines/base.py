"""The whole contract of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from densereward.capture import Captured, Need, ScoringInput, Steps
from densereward.errors import EngineDied

__all__ = ["TOLERANCE", "Engine", "EngineFacts", "StreamingEngine"]


TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far a score may move with the batch around it, relative to the largest score: rounding, not more."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of the model it holds.

    Attributes:
        engine: the engine's name.
        family: the model's architecture.
        head: the score head's name.
        device: where it runs.
        dtype: of the weights; the score head is float32.
        max_length: tokens in the longest sequence it reads, closing tokens included.
        vocabulary_size: token ids are below it.
        layers: attention layers, counted from 0.
        batch_tokens: tokens in a forward pass that the device does best with.
        pair_cost: what one query looking at one key costs, in tokens' worth of matrix products.
        weights_fingerprint: changes when a weight does.
        weights_bytes: what they take.
        unit: what the head scores: a sequence (and likewise any prefix of it), a token, or a step.
        steps: how steps are written; None where the unit is no step.
        gate: what prompts must end with, for a model that weighs objectives by what it reads where that begins.
        notice: what an operator must know of the scores; None where they are rewards as they stand.
        score_token: what is written behind all that closes a response, where the score is read there.
        tokens: what the head takes some ids for, which the tokenizer must agree with.
        reads_pairs: whether prompt and response are a pair of texts to the model.
        reencodes: whether closed prefixes are had by scoring them as sequences of their own.
        special_ids: the model's own BOS and EOS ids by "bos" and "eos", as far as its config names them.
        shares_prompts: whether sequences of one pass that begin with the same prompt run it once.
        advice: what else could be had, and how, where this engine cannot give what a method needs.
        needs_prompt: whether nothing can be said of a response to an empty prompt.
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
        """All that can be had for a sequence beside its score; by `forward`, but for what is re-encoded."""

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Score a batch; each sequence gets what its own `needs` name.

        Raises:
            EngineFailure: the pass failed.
        """

    def reference(self, sequence: ScoringInput) -> Captured:
        """One sequence by an independent and slower way, to compare with.

        Raises:
            EngineFailure: there is none.
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
    """Decides by itself what runs together: takes sequences one by one, whenever they come, from any thread.

    Attributes:
        death: done when the engine has ended by itself; all that was handed over fails then, and all that will be.
    """

    death: Future[EngineDied]

    def submit(self, sequence: ScoringInput) -> Future[Captured]:
        """Hand over a sequence; cancelling what comes back drops it.

        The future fails with `EngineFailure` where this sequence cannot be scored, with `EngineDied` where none can.
        """

    def metrics(self) -> bytes:
        """The engine's own, as Prometheus reads them."""
