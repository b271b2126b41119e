"""InternLM2's reward models in their own layout, against a decoder of this file's own that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from densereward.capture import AttentionRow, Need, PrefixScores, ScoringInput
from densereward.checks.examine import examine, refuse
from densereward.checks.loading import load_unchecked
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import ModelError
from densereward.settings import ModelSettings
from densereward_client.wire import Sample

HIDDEN, HEADS, KEY_HEADS, SIZE, INNER, LAYERS, WORDS = 64, 4, 2, 16, 96, 3, 324
REWARD = 323
CONFIG = {
    "architectures": ["InternLM2ForRewardModel"],
    "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
    "attn_implementation": "eager",
    "model_type": "internlm2",
    "bias": False,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "max_position_embeddings": 512,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_HEADS,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "reward_token_id": REWARD,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "vocab_size": WORDS,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path)


def save(folder: Path, *, bias: bool = False) -> Path:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 8

    weights = {"model.tok_embeddings.weight": normal(WORDS, HIDDEN) * 8, "model.norm.weight": 1 + normal(HIDDEN)}
    for layer in range(LAYERS):
        own = {
            "attention.wqkv.weight": normal((HEADS + 2 * KEY_HEADS) * SIZE, HIDDEN) * 3,
            "attention.wo.weight": normal(HIDDEN, HEADS * SIZE),
            "feed_forward.w1.weight": normal(INNER, HIDDEN),
            "feed_forward.w3.weight": normal(INNER, HIDDEN),
            "feed_forward.w2.weight": normal(HIDDEN, INNER),
            "attention_norm.weight": 1 + normal(HIDDEN),
            "ffn_norm.weight": 1 + normal(HIDDEN),
        }
        if bias:
            own |= {
                "attention.wqkv.bias": normal((HEADS + 2 * KEY_HEADS) * SIZE),
                "attention.wo.bias": normal(HIDDEN),
            }
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in own.items()}
    weights["v_head.weight"] = normal(1, HIDDEN)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"bias": bias}))
    tiny.make_tokenizer().save_pretrained(folder)
    written = folder / "tokenizer_config.json"
    own_code = {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    named = {"tokenizer_class": "InternLM2Tokenizer"}
    written.write_text(json.dumps(json.loads(written.read_text()) | own_code | named))
    return folder


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def rotated(x: Tensor) -> Tensor:
    """[T, SIZE], the first half against the second."""
    angle = torch.arange(len(x))[:, None] / 1e6 ** (torch.arange(0, SIZE, 2) / SIZE)
    one, two = x[:, : SIZE // 2], x[:, SIZE // 2 :]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], 1)


def reading(folder: Path, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The score at every position, and the last layer's row of the last token."""
    weights = load_file(folder / "model.safetensors")
    x = weights["model.tok_embeddings.weight"][ids]
    row = torch.zeros(len(ids))
    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for layer in range(LAYERS):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        fused = normed(x, own["attention_norm.weight"]) @ own["attention.wqkv.weight"].T
        fused = fused + own.get("attention.wqkv.bias", torch.zeros(1))
        outputs, row = [], torch.zeros(len(ids))
        for head in range(HEADS):
            group, place = divmod(head, HEADS // KEY_HEADS)
            first = group * (HEADS // KEY_HEADS + 2)  # of the group's parts: its queries, its key, its value
            part = [fused[:, (first + i) * SIZE : (first + i + 1) * SIZE] for i in range(HEADS // KEY_HEADS + 2)]
            logits = rotated(part[place]) @ rotated(part[-2]).T / SIZE**0.5
            each = logits.masked_fill(later, -torch.inf).softmax(-1)
            outputs.append(each @ part[-1])
            row += each[-1] / HEADS
        attended = torch.cat(outputs, 1) @ own["attention.wo.weight"].T
        x = x + attended + own.get("attention.wo.bias", torch.zeros(1))
        y = normed(x, own["ffn_norm.weight"])
        inner = torch.nn.functional.silu(y @ own["feed_forward.w1.weight"].T) * (y @ own["feed_forward.w3.weight"].T)
        x = x + inner @ own["feed_forward.w2.weight"].T
    return normed(x, weights["model.norm.weight"]) @ weights["v_head.weight"][0], row


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_read_as_it_reads_itself(bias: bool, tmp_path: Path) -> None:
    save(tmp_path, bias=bias)
    engine, aligner = load_unchecked(ModelSettings(model=[str(tmp_path)], device="cpu"))
    refuse(examine(engine, aligner))
    needs: frozenset[Need] = frozenset([PrefixScores("open"), AttentionRow(-1)])
    sequence = aligner.align(Sample(prompt="How was it?", response="The fox was good."), needs).sequence
    scores, row = reading(tmp_path, list(sequence.token_ids))
    [captured] = engine.forward([sequence])
    response = slice(sequence.prompt_length, sequence.response_stop)
    assert captured.reward == pytest.approx(float(scores[-1]), abs=1e-5)
    np.testing.assert_allclose(captured.prefixes["open"].after, scores[response], atol=1e-5)
    np.testing.assert_allclose(captured.attention_rows[-1], row[response], atol=1e-5)


def test_its_reward_token_is_written_behind_every_dialogue(folder: Path) -> None:
    _, aligner = load_unchecked(ModelSettings(model=[str(folder)], device="cpu"))
    messages = [{"role": "user", "content": "How was it?"}]
    closed, cut = (
        aligner.align(Sample.model_validate({"messages": messages, "response": "Good.", "finished": finished})).sequence
        for finished in (True, False)
    )
    assert list(closed.token_ids[closed.response_stop :]) == aligner.closing_ids
    assert aligner.vocabulary.bytes_of(aligner.closing_ids[:-1]) == b"<|im_end|>\n"
    assert aligner.closing_ids[-1] == REWARD
    assert list(cut.token_ids[cut.response_stop :]) == [REWARD]
    assert [each.token_ids[each.scored_position] for each in (closed, cut)] == [REWARD, REWARD]
    assert cut.with_response([5, 6], finished=False).token_ids[-3:] == [5, 6, REWARD]


def test_variants_and_closed_prefixes_are_read_at_the_reward_token(folder: Path) -> None:
    engine, aligner = load_unchecked(ModelSettings(model=[str(folder)], device="cpu"))
    sample = Sample(prompt="How was it?", response="The fox was good.")
    sequence = aligner.align(sample, frozenset([PrefixScores("closed")])).sequence
    [captured] = engine.forward([sequence])
    prompt, response = sequence.token_ids[: sequence.prompt_length], sequence.response_ids
    for t in (1, len(response) // 2, len(response)):
        scores, _ = reading(folder, [*prompt, *response[:t], *aligner.closing_ids])
        assert captured.prefixes["closed"].after[t - 1] == pytest.approx(float(scores[-1]), abs=1e-5)


def test_a_config_without_its_reward_token_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "reward_token_id"}))
    with pytest.raises(ModelError, match="no `reward_token_id`"):
        TorchEngine.load(str(folder), device="cpu")


def test_a_missing_part_of_its_fused_weights_is_missed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.attention.wqkv.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="3 missing keys"):
        TorchEngine.load(str(folder), device="cpu")


def test_sequences_beside_each_other_are_read_as_alone(folder: Path) -> None:
    engine = TorchEngine.load(str(folder), device="cpu")
    batch = [ScoringInput(list(range(3, 3 + n)), 1, n - 1, n - 1) for n in (5, 30, 12)]
    for sequence, captured in zip(batch, engine.forward(batch), strict=True):
        scores, _ = reading(folder, list(sequence.token_ids))
        assert captured.reward == pytest.approx(float(scores[-1]), abs=1e-5)
