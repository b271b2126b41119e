"""A model that would answer wrong numbers is found out before it is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from densereward.capture import Captured, Prefixes, ScoringInput
from densereward.checks.numbers import self_check
from densereward.engines.torch import attention
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import ModelError
from fakes import FACTS, FakeEngine


class Spoilt(FakeEngine):
    """The fake engine with one field full of one wrong number."""

    def __init__(self, field: str, number: float) -> None:
        super().__init__()
        self.field, self.number = field, number

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        return [replace(each, **{self.field: self._wrong(each)}) for each in super().forward(batch)]

    def _wrong(self, each: Captured) -> Any:
        array = np.full(each.length, self.number, np.float32)
        prefixes = {"open": Prefixes(0.0, array)}
        return {"reward": self.number, "prefixes": prefixes, "attention_rows": {-1: array}}[self.field]


class Moody(FakeEngine):
    """Scores depend on how many share the batch."""

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        moved = []
        for each in super().forward(batch):
            closed = each.prefixes["closed"].after + np.float32(len(batch))
            moved.append(
                replace(each, reward=each.reward + len(batch) * 1.0, prefixes={"closed": Prefixes(0.0, closed)})
            )
        return moved


def packed(model: Any) -> TorchEngine:
    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return TorchEngine(model)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_sound_model_passes(architecture: str) -> None:
    self_check(packed(tiny.make_model(architecture)))


def test_a_model_shorter_than_the_probes_is_checked_with_those_that_fit() -> None:
    engine = FakeEngine()
    engine.facts = replace(FACTS, max_length=12)
    self_check(engine)
    assert max(len(ids) for batch in engine.batches for ids in batch) == 12


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (Spoilt("reward", float("nan")), "not finite"),
        (Spoilt("prefixes", float("inf")), "not finite"),
        (Spoilt("attention_rows", 0.9), "not a share of 1"),
        (Spoilt("attention_rows", -0.1), "not a share of 1"),
        (Moody(), "move by .* with the batch"),
    ],
)
def test_a_model_with_a_fault_is_named(engine: FakeEngine, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        self_check(engine)


def test_closed_prefixes_that_do_not_end_in_the_reward_are_found() -> None:
    class Unclosed(FakeEngine):
        def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
            return [
                replace(each, prefixes={"closed": Prefixes(0.0, each.prefixes["closed"].after + 1000)})
                for each in super().forward(batch)
            ]

    with pytest.raises(ModelError, match="closed prefix that is all of it"):
        self_check(Unclosed())


def test_a_weight_that_is_not_a_number_is_found() -> None:
    model: Any = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        self_check(packed(model))


def test_a_model_whose_attention_cannot_be_packed_is_found(tmp_path: Path) -> None:
    model: Any = tiny.make_model("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match=r"cannot be packed: .* did not run its attention in all the layers"):
        TorchEngine(model)


def test_a_model_that_mixes_sequences_is_found() -> None:
    class Leaking(FakeEngine):
        def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
            total = sum(sum(each.token_ids) for each in batch) if len(batch) == 2 else 0
            return [replace(each, reward=each.reward + 0.01 * total) for each in super().forward(batch)]

    with pytest.raises(ModelError, match="something in this model mixes sequences"):
        self_check(Leaking())
