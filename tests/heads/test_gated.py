"""ArmoRM and QRM in their own layouts, against their own formula: objectives at a position, the gate at the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import reference
import tiny
from densereward.capture import Contributions, Gradients, Need, Objectives, PrefixScores, ScoringInput
from densereward.checks.examine import examine, refuse
from densereward.checks.loading import load_unchecked
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import InvalidRequest, ModelError
from densereward.methods import METHODS
from densereward.settings import ModelSettings
from densereward_client.wire import Sample
from serving import Api, serving

OBJECTIVES, QUANTILES, HIDDEN = 5, 3, 64
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_3 = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
)
DIALOGUE: Any = [{"role": "user", "content": "How was it?"}]


def armo_layers() -> list[nn.Module]:
    return [nn.Linear(HIDDEN, 32), nn.Linear(32, 32), nn.Linear(32, OBJECTIVES)]


def qrm_layers() -> list[nn.Module]:
    norms = [nn.BatchNorm1d(32) for _ in range(2)]
    for norm in norms:
        norm.running_mean, norm.running_var = torch.randn(32), torch.rand(32) + 0.5
        nn.init.normal_(norm.weight)
    first, second = nn.Linear(HIDDEN, 32, bias=False), nn.Linear(32, 32, bias=False)
    return [first, nn.ReLU(), norms[0], second, nn.ReLU(), norms[1], nn.Linear(32, OBJECTIVES)]


def save(folder: Path, name: str) -> dict[str, Any]:
    """A folder as the family publishes it; what its own reading needs."""
    config = tiny.make_config("llama", vocab_size=324)
    torch.manual_seed(1)
    decoder = AutoModel.from_config(config, attn_implementation="eager").eval()
    outputs = OBJECTIVES * (QUANTILES if name == "QRM" else 1)
    objectives = nn.Linear(HIDDEN, outputs, bias=False)
    mixing, scale = torch.randn(OBJECTIVES, OBJECTIVES), torch.tensor([1.5])
    layers = nn.ModuleList(armo_layers() if name == "ArmoRM" else qrm_layers()).eval()
    weights = {f"model.{key}": tensor for key, tensor in decoder.state_dict().items()}
    weights |= {f"gating.layers.{key}": tensor for key, tensor in layers.state_dict().items()}
    weights |= {"regression_layer.weight": objectives.weight.data, "reward_transform_matrix": mixing}
    weights["gating.logit_scale"] = scale
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, folder / "model.safetensors")
    architecture = "LlamaForRewardModelWithGating" + ("31" if name == "QRM" else "")
    written = {"architectures": [architecture], "gating_temperature": 2.0, "num_objectives": OBJECTIVES}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | written))
    tokenizer = tiny.make_tokenizer(template=LLAMA_3)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    return {"decoder": decoder, "objectives": objectives, "mixing": mixing, "scale": scale, "layers": layers}


def own_reading(name: str, parts: dict[str, Any], hidden: Tensor, gate: Tensor) -> Tensor:
    """The family's scores at some positions, by the hidden state at their gate."""
    rewards = parts["objectives"](hidden)
    if name == "QRM":
        rewards = rewards.reshape(-1, OBJECTIVES, QUANTILES).mean(dim=2)
    x = gate[None]
    for i, layer in enumerate(parts["layers"]):
        last = i == len(parts["layers"]) - 1
        x = torch.relu(layer(x)) if name == "ArmoRM" and not last else layer(x)
    weights = torch.softmax(x / 2.0, dim=1) * parts["scale"]
    scores: Tensor = (weights * (rewards @ parts["mixing"])).sum(dim=1)
    return scores


def own_scores(name: str, parts: dict[str, Any], ids: list[int], gate: int) -> Tensor:
    """The family's forward pass at every position, the gate where its pattern begins."""
    with torch.no_grad():
        hidden = parts["decoder"](input_ids=torch.tensor([ids])).last_hidden_state[0]
        return own_reading(name, parts, hidden, hidden[gate])


def doubled(parts: dict[str, Any]) -> dict[str, Any]:
    return {key: each.double() for key, each in parts.items()}


@pytest.mark.parametrize("name", ["ArmoRM", "QRM"])
def test_objectives_are_weighed_as_the_prompt_says_at_every_prefix(name: str, tmp_path: Path) -> None:
    parts = save(tmp_path, name)
    engine, aligner = load_unchecked(ModelSettings(model=[str(tmp_path)], device="cpu"))
    assert {each.status for each in refuse(examine(engine, aligner))} == {"ok"}
    assert (engine.facts.head, engine.facts.family[:29]) == ("gated", "LlamaForRewardModelWithGating")
    needs = frozenset([PrefixScores("open"), PrefixScores("closed")])
    samples = [
        Sample.model_validate({"messages": [{"role": "user", "content": question}], "response": response})
        for question, response in [
            ("How was it?", "Thank you, that was good food."),
            ("How was it?", "The fox."),
            ("Why?", "So."),
        ]
    ]
    batch = [aligner.align(each, needs).sequence for each in samples]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pattern = tokenizer.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        ids = list(each.token_ids)
        [gate] = [i for i in range(len(ids)) if ids[i : i + len(pattern)] == pattern]
        expected = own_scores(name, parts, ids, gate).numpy()
        assert captured.reward == pytest.approx(float(expected[-1]), abs=1e-5)
        response = slice(each.prompt_length, each.response_stop)
        np.testing.assert_allclose(captured.prefixes["open"].after, expected[response], atol=1e-5)
        for count in range(1, each.response_length + 1):
            cut = [*ids[: each.prompt_length + count], *each.closing_ids]
            closed = float(own_scores(name, parts, cut, gate)[-1])
            assert captured.prefixes["closed"].after[count - 1] == pytest.approx(closed, abs=1e-5)


@pytest.mark.parametrize("name", ["ArmoRM", "QRM"])
def test_the_parts_of_the_objectives_are_told_and_sum_to_the_scores(name: str, tmp_path: Path) -> None:
    save(tmp_path, name)
    engine, aligner = load_unchecked(ModelSettings(model=[str(tmp_path)], device="cpu"))
    needs: frozenset[Need] = frozenset([PrefixScores("open"), Objectives()])
    asked = Sample.model_validate({"messages": DIALOGUE, "response": "Thank you, that was good food."})
    plain = aligner.align(asked).sequence
    [captured, _] = engine.forward([aligner.align(asked, needs).sequence, plain])
    assert captured.objectives is not None
    assert captured.objectives.shape == (OBJECTIVES, 1 + captured.length)
    expected = [captured.reward, *captured.prefixes["open"].after]
    np.testing.assert_allclose(captured.objectives.sum(axis=0), expected, atol=1e-5)
    assert np.abs(captured.objectives).max() > 1e-3


@pytest.mark.parametrize("name", ["ArmoRM", "QRM"])
def test_contributions_are_weight_times_value_times_gradient_under_each_prompts_own_gate(
    name: str, tmp_path: Path
) -> None:
    parts = save(tmp_path, name)
    engine = TorchEngine.load(str(tmp_path), device="cpu")
    layers = range(engine.facts.layers)
    needs: frozenset[Need] = frozenset([Contributions(), *(Contributions(layer) for layer in layers)])
    batch = [made_up(seed, needs) for seed in range(3)]
    batch.insert(1, made_up(3))
    captured = engine.forward(batch)
    parts = doubled(parts)
    for sequence, found in zip(batch, captured, strict=True):
        ids, response = list(sequence.token_ids), slice(sequence.prompt_length, sequence.response_stop)
        with torch.no_grad():
            gate = parts["decoder"](input_ids=torch.tensor([ids])).last_hidden_state[0, sequence.gate]
        own = SimpleNamespace(
            config=parts["decoder"].config,
            model=parts["decoder"],
            score=lambda hidden, gate=gate: own_reading(name, parts, hidden[None], gate),
        )
        expected = {layer: reference.contributions(own, ids, layer)[response] for layer in layers}
        assert set(found.contributions) == ({None, *layers} if sequence.needs else set())
        for layer, each in found.contributions.items():
            wanted = np.sum(list(expected.values()), axis=0) if layer is None else expected[layer]
            np.testing.assert_allclose(each, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["ArmoRM", "QRM"])
def test_gradients_are_those_of_the_whole_model_gate_included(name: str, tmp_path: Path) -> None:
    parts = save(tmp_path, name)
    engine = TorchEngine.load(str(tmp_path), device="cpu")
    sequence = made_up(0, frozenset([Gradients()]))
    [captured] = engine.forward([sequence])
    parts = doubled(parts)
    embedding = parts["decoder"].get_input_embeddings()
    padding = embedding.weight[parts["decoder"].config.pad_token_id].detach()
    away = embedding(torch.tensor([list(sequence.token_ids)])).detach() - padding
    shares = torch.ones(len(sequence.token_ids), dtype=torch.float64, requires_grad=True)
    hidden = parts["decoder"](inputs_embeds=padding + shares[None, :, None] * away).last_hidden_state[0]
    score = own_reading(name, parts, hidden[[sequence.scored_position]], hidden[sequence.gate])
    expected = torch.autograd.grad(score.sum(), shares)[0][sequence.prompt_length : sequence.response_stop].numpy()
    assert captured.gradients is not None
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(captured.gradients, expected, atol=1e-4 * np.abs(expected).max())


def made_up(seed: int, needs: frozenset[Need] = frozenset()) -> ScoringInput:
    """A sequence of ids from a seed; its gate is the one of its prompt."""
    ids = np.random.default_rng(seed).integers(3, 320, 32 + seed).tolist()
    return ScoringInput(ids, 12 + seed, 18, 31 + seed, needs=needs, gate=7 + seed)


def test_objectives_and_every_method_of_a_whole_response_are_answered(tmp_path: Path) -> None:
    save(tmp_path / "armo", "ArmoRM")
    with (
        serving(tmp_path / "log", "--device", "cpu", "--model", str(tmp_path / "armo")) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        api = Api(http)
        asked: Any = {"messages": DIALOGUE, "response": "Thank you."}
        item = api.item(asked, include=["objectives", "prefix_scores"])
        card = server.get("/v1/models").json()["data"][0]
        available = [name for name, method in card["methods"].items() if method["available"]]
        signed = api.item(asked, methods=["contribution", "attribution"])["token_rewards"]  # `api` checks the sums
        _, refused = api.refusal([{"prompt": "How?", "response": "So."}])
    assert len(item["objectives"]) == OBJECTIVES
    total = np.sum([each["scores"] for each in item["objectives"]], axis=0)
    np.testing.assert_allclose(total, item["prefix_scores"], atol=1e-5)
    assert sum(each["reward"] for each in item["objectives"]) == pytest.approx(item["reward"], abs=1e-5)
    assert set(METHODS) - set(available) == {"steps", "implicit", "contrastive"}
    assert min(np.ptp(rewards) for rewards in signed.values()) > 0
    assert refused["code"] == "no_gate"


def test_a_long_prompt_that_comes_again_still_has_its_gate(tmp_path: Path) -> None:
    parts = save(tmp_path, "ArmoRM")
    engine = TorchEngine.load(str(tmp_path), device="cpu", prompt_cache=2**24, batch_tokens=50)
    ids = np.random.default_rng(0).integers(3, 320, 150).tolist()
    expected = own_scores("ArmoRM", parts, ids, 95)
    for _ in range(3):
        [captured] = engine.forward([ScoringInput(ids, 100, 50, 149, gate=95)])
        assert captured.reward == pytest.approx(float(expected[-1]), abs=1e-5)


def test_a_prompt_that_does_not_end_where_the_gate_is_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "ArmoRM")
    _, aligner = load_unchecked(ModelSettings(model=[str(tmp_path)], device="cpu"))
    with pytest.raises(InvalidRequest, match="weighs its objectives where a prompt ends with"):
        aligner.align(Sample.model_validate({"prompt": "How was it?", "response": "Good."}))


@pytest.mark.parametrize(
    ("lost", "message"), [("gating.layers.1.weight", "unexpected"), ("reward_transform_matrix", "cannot load|KeyError")]
)
def test_a_gate_that_lacks_a_weight_is_refused(lost: str, message: str, tmp_path: Path) -> None:
    save(tmp_path, "ArmoRM")
    held = load_file(tmp_path / "model.safetensors")
    del held[lost]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_unchecked(ModelSettings(model=[str(tmp_path)], device="cpu"))
