"""Models that cannot be packed, against their own reading: one text at a time, eager, nothing padded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import reference
import tiny
from decoder_kinds import UNPACKED, save
from densereward.capture import AttentionRow, Need, PrefixScores, ScoringInput
from densereward.checks.examine import examine, refuse
from densereward.checks.loading import load_unchecked
from densereward.engines.base import Engine
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.unpacked import UnpackedEngine
from densereward.errors import CannotPack, EngineFailure, InvalidRequest, ModelError
from densereward.scheduling.cost import BatchCost, cost_of
from densereward.settings import ModelSettings
from densereward_client.wire import Sample

TYPED = ("bert", "electra", "albert")  # which know a pair's first text from its second
PROMPT = "How was it?"
RESPONSES = ["The food was good 😀.", "Thank you", "It's a café in Zürich: naïve, quick brown fox."]


def opened(folder: Path, **settings: Any) -> tuple[Engine, Any]:
    return load_unchecked(ModelSettings(model=[str(folder)], device="cpu", **settings))


@pytest.mark.parametrize("kind", tiny.ENCODERS)
def test_an_encoder_reads_pairs_as_its_tokenizer_writes_them(kind: str, tmp_path: Path) -> None:
    tiny.save_encoder(tmp_path, kind)
    engine, aligner = opened(tmp_path)
    refuse(examine(engine, aligner))
    assert (engine.facts.engine, engine.facts.head) == ("unpacked", "encoder")
    rows = frozenset([AttentionRow(-1), AttentionRow(0)])
    samples = [Sample(prompt=PROMPT, response=response) for response in RESPONSES]
    batch = [aligner.align(sample, rows & engine.provides).sequence for sample in samples]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for response, sequence, captured in zip(RESPONSES, batch, engine.forward(batch), strict=True):
        given = tokenizer(
            PROMPT, response, return_tensors="pt", return_token_type_ids=kind in ("bert", "electra", "albert")
        )
        assert given["input_ids"][0].tolist() == list(sequence.token_ids)
        with torch.no_grad():
            output = model(**given, output_attentions=True)
        assert captured.reward == pytest.approx(float(output.logits[0, 0]), abs=1e-5)
        for layer in (-1, 0):
            row = output.attentions[layer][0, :, 0].mean(dim=0)[sequence.prompt_length : sequence.response_stop]
            assert captured.attention_rows[layer] == pytest.approx(row.numpy(), abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "roberta", "modernbert"])
def test_texts_of_any_length_share_a_batch_in_fused_attention_too(kind: str, tmp_path: Path) -> None:
    tiny.save_encoder(tmp_path, kind)
    engine, aligner = opened(tmp_path)
    texts = ["Thank you", "It was good. " * 5, "It", "The food was good 😀. " * 3]
    plain = [aligner.align(Sample(prompt=PROMPT, response=text)).sequence for text in texts]
    alone = [engine.reference(each).reward for each in plain]
    assert [each.reward for each in engine.forward(plain)] == pytest.approx(alone, abs=1e-5)
    needs: frozenset[Need] = frozenset([AttentionRow(-1)])
    mixed = [replace(each, needs=needs if i % 2 else frozenset()) for i, each in enumerate(plain)]
    captured = engine.forward(mixed)
    assert [each.reward for each in captured] == pytest.approx(alone, abs=1e-5)
    assert [len(each.attention_rows) for each in captured] == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", tiny.ENCODERS)
def test_layers_behind_an_encoder_compute_in_float32(kind: str, tmp_path: Path) -> None:
    tiny.save_encoder(tmp_path, kind)
    if kind == "deberta":
        with pytest.raises(ModelError, match=r"does not run in bfloat16: .*; try --dtype float32"):
            opened(tmp_path, dtype="bfloat16")
        return
    engine, aligner = opened(tmp_path, dtype="bfloat16")
    assert {each.status for each in examine(engine, aligner) if each.name == "dtype_drift"} == {"ok"}
    sequences = [aligner.align(Sample(prompt=PROMPT, response=response)).sequence for response in RESPONSES]
    rewards = torch.tensor([each.reward for each in engine.forward(sequences)])
    assert not torch.equal(rewards.bfloat16().float(), rewards)


@pytest.mark.parametrize("kind", ["big_bird", "longformer"])
def test_encoders_that_attend_to_a_part_of_the_text_are_refused(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny.make_tokenizer(template=None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{kind} was not tried as an encoder of pairs"):
        opened(tmp_path)


def test_ids_of_a_prompt_must_hold_what_stands_round_a_pairs_first_text(tmp_path: Path) -> None:
    _, aligner = opened(tiny.save_encoder(tmp_path, "bert"))
    framed = aligner.align(Sample(prompt=PROMPT, response="Thank")).sequence
    given = list(framed.token_ids[: framed.prompt_length])
    same = aligner.align(Sample(prompt_token_ids=given, response="Thank")).sequence
    assert list(same.token_ids) == list(framed.token_ids)
    for ids in (given[1:], given[:-1], [], given[:1]):
        with pytest.raises(InvalidRequest, match="of which the first begins with") as refused:
            aligner.align(Sample(prompt_token_ids=ids, response="Thank"))
        assert refused.value.error_code == "no_frame"


def test_a_prompt_that_is_shortened_keeps_its_frame(tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path, "bert")
    written = json.loads((folder / "tokenizer_config.json").read_text())
    framed = {"cls_token": "<|bos|>", "sep_token": "<|im_end|>"}
    kept = {name: value for name, value in written.items() if name not in ("bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept | framed))
    _, aligner = opened(folder)
    aligned = aligner.align(Sample(prompt="So. " * 200, response="Thank"), truncate=True)
    ids = list(aligned.sequence.token_ids)
    assert (len(ids), ids[0], ids[aligned.sequence.prompt_length - 1]) == (128, 0, 2)
    assert aligned.dropped > 0


def test_what_ends_a_text_is_not_written_twice(tmp_path: Path) -> None:
    _, aligner = opened(tiny.save_encoder(tmp_path, "bert"))
    for finished in (True, False):
        sample = Sample(prompt=PROMPT, response_token_ids=[5, 6, 2], finished=finished)
        assert list(aligner.align(sample).sequence.token_ids[-3:]) == [5, 6, 2]


def test_a_score_that_is_not_read_at_the_first_position_has_no_row(tmp_path: Path) -> None:
    tiny.save_encoder(tmp_path, "modernbert", classifier_pooling="mean")
    engine, _ = opened(tmp_path)
    assert AttentionRow(-1) not in engine.provides
    assert PrefixScores("closed") in engine.provides


def test_an_encoders_prefix_is_another_text_so_it_gives_no_open_one(tmp_path: Path) -> None:
    engine, _ = opened(tiny.save_encoder(tmp_path))
    assert PrefixScores("open") not in engine.provides


def test_positions_end_where_the_model_has_rows_for_them(tmp_path: Path) -> None:
    engine, _ = opened(tiny.save_encoder(tmp_path, "roberta"))
    assert engine.facts.max_length == 128  # of 131 rows the first three stand for padding
    longest = ScoringInput([3] * 128, 5, 122, 127)
    assert np.isfinite(engine.forward([longest])[0].reward)
    with pytest.raises(EngineFailure):
        engine.forward([ScoringInput([3] * 129, 5, 123, 128)])


def test_a_pair_has_no_dialogue_in_it(tmp_path: Path) -> None:
    tiny.save_encoder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = tiny.CHATML
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="reads pairs of texts, and its chat template writes dialogues"):
        opened(tmp_path)


def test_a_response_that_was_cut_is_a_whole_text_of_the_pair_nevertheless(tmp_path: Path) -> None:
    _, aligner = opened(tiny.save_encoder(tmp_path))
    finished, cut = (
        aligner.align(Sample(prompt=PROMPT, response="Thank", finished=finished)).sequence.token_ids
        for finished in (True, False)
    )
    assert list(finished) == list(cut)


@pytest.mark.parametrize("kind", list(UNPACKED))
def test_a_decoder_that_cannot_be_packed_gives_what_it_gives_alone(kind: str, tmp_path: Path) -> None:
    special, message = UNPACKED[kind]
    save(tmp_path, kind, **special)
    with pytest.raises(CannotPack, match=message):
        TorchEngine.load(str(tmp_path), device="cpu", longest=512)
    engine = UnpackedEngine.load(str(tmp_path), "it mixes tokens", device="cpu", longest=512)
    assert "not packed with others: it mixes tokens" in str(engine.facts.notice)
    assert PrefixScores("open") in engine.provides
    random = np.random.default_rng(0)
    wanted: frozenset[Need] = frozenset([PrefixScores("open"), AttentionRow(-1)])
    needs = wanted & engine.provides
    lengths = (30, 5, 30, 17)
    batch = [ScoringInput(random.integers(3, 320, 9 + n).tolist(), 9, n, 8 + n, needs=needs) for n in lengths]
    model = reference.eager(tmp_path)
    for each, captured in zip(batch, engine.forward(batch), strict=True):
        with torch.no_grad():
            output = model.base_model(input_ids=torch.tensor([each.token_ids]), output_attentions=True, use_cache=False)
            scores = model.score(output.last_hidden_state)[0, :, 0].numpy()
        largest = max(1.0, float(np.abs(scores).max()))
        assert captured.reward == pytest.approx(float(scores[-1]), abs=1e-5 * largest)
        assert captured.prefixes["open"].after == pytest.approx(scores[9:], abs=1e-5 * largest)
        if needs >= {AttentionRow(-1)}:
            row = output.attentions[-1][0, :, -1].mean(dim=0)[9:].numpy()
            assert captured.attention_rows[-1] == pytest.approx(row, abs=1e-5)


def test_a_prompt_that_responses_share_is_billed_for_each_of_them() -> None:
    sequences = [ScoringInput([*range(3, 23), token], 20, 1, 20) for token in (5, 6)]
    for shares, tokens in ((True, 22), (False, 42)):
        cost = BatchCost(0.0)
        for sequence in sequences:
            cost.add(cost_of(sequence, shares=shares))
        assert cost.total.tokens == tokens
