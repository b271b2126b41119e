"""Contributions and received attention, against autograd and whole attention maps in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForSequenceClassification

import reference
import tiny
from densereward.capture import Captured, Contributions, Gradients, ReceivedAttention, ScoringInput
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import EngineFailure

LAYERS = 3
PROMPT, RESPONSE = 12, 17
IDS = random.Random(5).choices(range(3, 320), k=PROMPT + RESPONSE + 2)
LAST = len(IDS) - 1

# A derivative of fourth order: transformers' norms stay float32 in a float64 model, so the step cannot be tiny.
STEP = 0.05
STEPS = (-2, -1, 1, 2)
SLOPE = (1 / 12, -8 / 12, 8 / 12, -1 / 12)


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp(request.param), request.param)


def captured(folder: Path) -> Captured:
    in_layers = [kind(layer) for kind in (Contributions, ReceivedAttention) for layer in range(LAYERS)]
    needs = frozenset([Contributions(), *in_layers])
    engine = TorchEngine.load(str(folder), device="cpu")
    return engine.forward([ScoringInput(IDS, PROMPT, RESPONSE, LAST, needs=needs)])[0]


def double(folder: Path, attention: str = "eager") -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation=attention, experts_implementation="eager"
    )
    return model.double().eval()


@contextmanager
def weakened(token: int, share: float) -> Iterator[str]:
    """Attention in which the last layer's scored query gets only a share of one token's weight times value."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **others: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        keys, values = (each.repeat_interleave(groups, 1) for each in (k, v))
        logits = q @ keys.transpose(-1, -2) * scaling
        if (cap := others.get("softcap")) is not None:
            logits = torch.tanh(logits / cap) * cap
        far = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (far < 0) | (far >= (others.get("sliding_window") or len(IDS)))
        logits = logits.masked_fill(hidden, -torch.inf)
        if (sinks := others.get("s_aux")) is not None:
            logits = torch.cat([logits, sinks[:, None, None].expand_as(logits[..., :1])], -1)
        weights = logits.softmax(-1)[..., : k.shape[2]]
        if module.layer_idx == LAYERS - 1:
            weights[..., LAST, token] *= share
        return (weights @ values).transpose(1, 2), None

    AttentionInterface.register("weakened", attend)
    yield "weakened"


def score(model: Any) -> float:
    with torch.no_grad():
        return float(model.score(model.base_model(input_ids=torch.tensor([IDS])).last_hidden_state)[0, LAST, 0])


def test_a_contribution_is_what_the_score_loses_as_the_tokens_value_is_left_out(folder: Path) -> None:
    found = captured(folder).contributions[LAYERS - 1]
    with weakened(0, 1.0) as attention:
        model = double(folder, attention)
    expected = []
    for token in range(PROMPT, PROMPT + RESPONSE):
        scores = []
        for steps in STEPS:
            with weakened(token, 1 + steps * STEP):
                scores.append(score(model))
        expected.append(np.dot(SLOPE, scores) / STEP)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_contributions_of_any_layer_and_of_all_are_weight_times_value_times_gradient(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    response = slice(PROMPT, PROMPT + RESPONSE)
    expected = [reference.contributions(double(folder), IDS, layer)[response] for layer in range(LAYERS)]
    found = captured(folder).contributions
    for layer in range(LAYERS):
        np.testing.assert_allclose(found[layer], expected[layer], atol=2e-5 * np.abs(expected[layer]).max())
    total = np.sum(expected, axis=0)
    np.testing.assert_allclose(found[None], total, atol=2e-5 * np.abs(total).max())


def test_received_attention_is_the_sum_of_the_columns_below_the_diagonal(folder: Path) -> None:
    with torch.no_grad():
        maps = double(folder).base_model(input_ids=torch.tensor([IDS]), output_attentions=True).attentions
    found = captured(folder).received_attention
    for layer in range(LAYERS):
        heads = maps[layer][0, :, PROMPT : PROMPT + RESPONSE, PROMPT : PROMPT + RESPONSE].mean(0)
        np.testing.assert_allclose(found[layer], torch.tril(heads, -1).sum(0).numpy(), atol=1e-5)
        assert found[layer][-1] == 0


def test_gradients_are_the_scores_change_along_the_embedding(folder: Path) -> None:
    """dR/dshare as the response token's embedding moves from the padding token's to its own, in float64."""
    engine = TorchEngine.load(str(folder), device="cpu")
    found = engine.forward([ScoringInput(IDS, PROMPT, RESPONSE, LAST, needs=frozenset([Gradients()]))])[0].gradients
    model = double(folder)
    embedding = model.get_input_embeddings()
    embedded, padding = embedding(torch.tensor([IDS])).detach(), embedding(torch.tensor(model.config.pad_token_id))
    shares = torch.ones(len(IDS), dtype=torch.float64, requires_grad=True)
    moved = padding.detach() + shares[None, :, None] * (embedded - padding.detach())
    hidden = model.base_model(inputs_embeds=moved).last_hidden_state
    (expected,) = torch.autograd.grad(model.score(hidden)[0, LAST, 0], shares)
    response = expected[PROMPT : PROMPT + RESPONSE].numpy()
    assert found is not None
    np.testing.assert_allclose(found, response, atol=1e-4 * np.abs(response).max())


def test_a_model_whose_second_run_scores_differently_serves_no_contributions(tmp_path: Path) -> None:
    engine = TorchEngine.load(str(tiny.save(tmp_path)), device="cpu")
    assert {Contributions(), Contributions(-1), Gradients()} <= engine.provides
    first: Any = engine._model.model.layers[0]
    mixing = first.register_forward_pre_hook(  # neighbours, as a convolution would
        lambda _, args, kwargs: ((args[0] + args[0].roll(1, dims=1), *args[1:]), kwargs), with_kwargs=True
    )
    asked = ScoringInput(IDS, PROMPT, RESPONSE, LAST, needs=frozenset([Contributions(-1)]))
    with pytest.raises(EngineFailure, match="cannot serve contributions"):
        engine.forward([asked])
    assert not {Contributions(), Contributions(-1)} & TorchEngine(engine._model).provides
    mixing.remove()
    engine.forward([asked])
