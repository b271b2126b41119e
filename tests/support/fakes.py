"""An engine whose numbers are plain to see, which can be held, broken, and watched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from densereward.capture import (
    AttentionRow,
    Captured,
    Contributions,
    Gradients,
    Need,
    Prefixes,
    PrefixScores,
    ReceivedAttention,
    ScoringInput,
    Variants,
)
from densereward.engines.base import EngineFacts
from densereward.errors import EngineDied, EngineFailure
from densereward.scheduling.queue import Scored

FACTS = EngineFacts(
    engine="fake",
    family="Fake",
    head="fake",
    device="cpu",
    dtype="float32",
    max_length=4096,
    vocabulary_size=320,
    layers=2,
    batch_tokens=512,
    pair_cost=0.0,
    weights_fingerprint="0",
)


class FakeEngine:
    """The score of a sequence is the sum of its ids; a prefix's is the sum so far; rows are even.

    Attributes:
        batches: the ids of every batch run, in order.
        gate: while it is clear, `forward` waits.
        poison: a batch that holds this id raises.
    """

    facts = FACTS

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.poison: int | None = None
        self.closed = False

    @property
    def provides(self) -> frozenset[Need]:
        kinds = (AttentionRow, Contributions, ReceivedAttention)
        in_layers = (kind(layer) for kind in kinds for layer in range(-2, 2))
        single: list[Need] = [PrefixScores("open"), PrefixScores("closed"), Contributions(), Gradients(), Variants()]
        return frozenset([*single, *in_layers])

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        self.started.set()
        self.gate.wait(10)
        self.batches.append([list(each.token_ids) for each in batch])
        if any(self.poison in each.token_ids for each in batch):
            raise RuntimeError("poisoned")
        return [self._captured(each) for each in batch]

    def reference(self, sequence: ScoringInput) -> Captured:
        return self._captured(sequence)

    def exactly(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        return [self._captured(each) for each in batch]

    def close(self) -> None:
        self.closed = True

    @staticmethod
    def _prefixes(each: ScoringInput, sums: np.ndarray, *, closed: bool) -> Prefixes:
        rest = float(sum(each.closing_ids)) if closed else 0.0
        before = float(sums[each.prompt_length - 1]) + rest if each.prompt_length else None
        return Prefixes(before, sums[each.prompt_length : each.response_stop] + np.float32(rest))

    @staticmethod
    def _captured(each: ScoringInput) -> Captured:
        sums = np.cumsum(each.token_ids, dtype=np.float32)
        length = each.response_length
        return Captured(
            reward=float(sums[each.scored_position]),
            length=length,
            prefixes={
                need.mode: FakeEngine._prefixes(each, sums, closed=need.mode == "closed")
                for need in each.needs
                if isinstance(need, PrefixScores)
            },
            attention_rows=FakeEngine._even(each, AttentionRow),
            contributions=FakeEngine._even(each, Contributions),
            received_attention=FakeEngine._even(each, ReceivedAttention),
            gradients=np.zeros(length, np.float32) if Gradients() in each.needs else None,
        )

    @staticmethod
    def _even(each: ScoringInput, kind: type[Any]) -> dict[Any, np.ndarray]:
        row = np.full(each.response_length, 0.5 / max(each.response_length, 1), np.float32)
        return {need.layer: row for need in each.needs if isinstance(need, kind)}


class FakeStream(FakeEngine):
    """The same sums, one sequence by one; each is given back when the test says so.

    Attributes:
        held: what was handed over and not given back, in order.
        death: as an engine's that streams.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[ScoringInput, Future[Captured]]] = []
        self.death: Future[EngineDied] = Future()

    def submit(self, sequence: ScoringInput) -> Future[Captured]:
        given: Future[Captured] = Future()
        self.held.append((sequence, given))
        return given

    def give_back(self, place: int = 0) -> None:
        sequence, given = self.held.pop(place)
        if not given.set_running_or_notify_cancel():
            return
        if self.poison in sequence.token_ids:
            given.set_exception(RuntimeError("poisoned"))
        else:
            given.set_result(self._captured(sequence))

    def metrics(self) -> bytes:
        return b"fake:passes 1\n"


def sequence(*ids: int) -> ScoringInput:
    """One token of prompt, the rest response."""
    return ScoringInput(ids, 1, len(ids) - 1, len(ids) - 1)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go on until something holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def rewards(results: list[Scored | EngineFailure]) -> list[float | str]:
    """A score each, or what went wrong."""
    return [each.captured.reward if isinstance(each, Scored) else each.message for each in results]
