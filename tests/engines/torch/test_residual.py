"""A float32 residual stream under half-precision weights: how much noise it takes out of token rewards, and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import tiny
from decoder_kinds import SERVED, SIZES
from densereward.capture import Contributions, Need, PrefixMode, PrefixScores, ScoringInput
from densereward.checks.numbers import self_check
from densereward.engines.torch import attention
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.residual import ResidualDtype

NEEDS: frozenset[Need] = frozenset([PrefixScores("open"), PrefixScores("closed"), Contributions()])
RANDOM = np.random.default_rng(0)
ROUTED = {"mixtral", "qwen3_moe", "gpt_oss"}
PROMPT = RANDOM.integers(3, 320, 10).tolist()
SEQUENCES = [
    ScoringInput(
        [*PROMPT, *RANDOM.integers(3, 320, length).tolist(), 2], 10, length, 10 + length, closing_ids=[2], needs=NEEDS
    )
    for length in (50, 90, 140)
]


def engine_of(model: Any, dtype: torch.dtype, residual_dtype: ResidualDtype = "float32") -> TorchEngine:
    attention.register()
    model.to(dtype)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return TorchEngine(model, residual_dtype=residual_dtype)


def deep_llama(layers: int) -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = tiny.make_config("llama", num_hidden_layers=layers, **sizes)
    return AutoModelForSequenceClassification.from_config(config).eval()


def decoder(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | SERVED[kind] | {"num_hidden_layers": 8})
    return AutoModelForSequenceClassification.from_config(config).eval()


def noise(engine: TorchEngine, mode: PrefixMode = "open") -> float:
    """Root mean square error of `red`, as a share of its size, against float32 arithmetic on the same weights."""
    rewards, exact = (
        np.concatenate([np.diff(each.prefixes[mode].after, prepend=each.prefixes[mode].before) for each in captured])  # type: ignore[arg-type]
        for captured in (engine.forward(SEQUENCES), engine.exactly(SEQUENCES))
    )
    return float(np.sqrt(((rewards - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize(("layers", "bound"), [(24, 0.035), (48, 0.05)])
def test_the_noise_of_token_rewards_stays_small_in_deep_models(layers: int, bound: float) -> None:
    assert noise(engine_of(deep_llama(layers), torch.bfloat16)) < bound
    assert noise(engine_of(deep_llama(layers), torch.bfloat16, "weights")) > 2 * bound


@pytest.mark.parametrize("kind", [*SERVED, "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_packed_decoder_has_it_and_less_noise_by_it(kind: str, dtype: torch.dtype) -> None:
    made = (lambda: tiny.make_model("gpt2", n_layer=8)) if kind == "gpt2" else (lambda: decoder(kind))
    wide, narrow = engine_of(made(), dtype), engine_of(made(), dtype, "weights")
    assert (wide.facts.residual_dtype, narrow.facts.residual_dtype) == ("float32", str(dtype).removeprefix("torch."))
    if kind in ROUTED:  # rounding sends a token to other experts now and then, whatever the stream
        return
    modes: tuple[PrefixMode, ...] = ("open", "closed")
    for mode in modes:
        assert noise(wide, mode) < noise(narrow, mode)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
def test_contributions_are_had_with_it_too(kind: str) -> None:
    engine = engine_of(tiny.make_model(kind), torch.bfloat16)
    assert Contributions() in engine.provides
    for one, exact in zip(engine.forward(SEQUENCES), engine.exactly(SEQUENCES), strict=True):
        size = float(np.abs(exact.contributions[None]).max())
        np.testing.assert_allclose(one.contributions[None], exact.contributions[None], atol=0.1 * size)


def test_a_model_of_full_precision_and_one_that_keeps_its_own_dtype_are_left_alone() -> None:
    for engine in (
        engine_of(tiny.make_model("llama"), torch.float32),
        engine_of(tiny.make_model("llama"), torch.bfloat16, "weights"),
    ):
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in engine._model.modules())
        assert engine.facts.residual_dtype == engine.facts.dtype


def test_a_decoder_in_which_float32_does_not_arrive_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    layer: Any = model.get_submodule("model.layers.1")
    whole = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, *args, **kw: whole(self, *args, **kw).to(torch.bfloat16))
    engine = engine_of(model, torch.bfloat16)
    assert engine.facts.residual_dtype == "bfloat16"
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    [captured] = engine.forward(SEQUENCES[:1])
    assert np.isfinite(captured.reward)


def test_a_deep_model_in_half_precision_passes_the_self_check() -> None:
    self_check(engine_of(deep_llama(48), torch.bfloat16))
