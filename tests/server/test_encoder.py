"""A bidirectional reward model over HTTP, against its own reading: what it serves, at what cost, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from serving import Api, Json, serving

PROMPT, RESPONSE = "How was it?", "The food was good 😀."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    log = tmp_path_factory.mktemp("log") / "log"
    with (
        serving(log, "--device", "cpu", "--model", f"encoder={folder}") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Api(http)


SAMPLE: Json = {"prompt": PROMPT, "response": RESPONSE}


def prefix_scores(folder: Path) -> tuple[list[float], list[float]]:
    """The pair with each prefix of the response in its place, one eager pass each; CLS's row of the whole."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    before = tokenizer(PROMPT)["input_ids"]
    response = tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    scores = []
    for length in range(len(response) + 1):
        ids = [*before, *response[:length], tokenizer.sep_token_id or tokenizer.eos_token_id]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), output_attentions=True)
        scores.append(float(output.logits[0, 0]))
    row = output.attentions[-1][0, :, 0].mean(dim=0)[len(before) : len(before) + len(response)]
    return scores, [float(each) for each in row]


def test_closed_prefixes_are_texts_of_their_own(encoder: Api, folder: Path) -> None:
    scores, _ = prefix_scores(folder)
    red = {"name": "red", "prefix_mode": "closed"}
    answer = encoder.answer([SAMPLE], methods=[red])
    [item] = answer["data"]
    assert item["reward"] == pytest.approx(scores[-1], abs=1e-5)
    assert item["token_rewards"]["red"] == pytest.approx(np.diff(scores), abs=2e-5)
    assert item["baseline"]["red"] == pytest.approx(scores[0], abs=1e-5)
    prefixes, prompt = len(scores), answer["usage"]["prompt_tokens"]
    assert answer["usage"]["forward_tokens"] > prefixes * (prompt + prefixes / 2)


def test_a_stride_takes_that_many_fewer_passes(encoder: Api, folder: Path) -> None:
    scores, _ = prefix_scores(folder)
    strided = {"name": "red", "prefix_mode": "closed", "stride": 3}
    every = {"name": "red", "prefix_mode": "closed"}
    few, all_ = (encoder.answer([SAMPLE], methods=[method]) for method in (strided, every))
    rewards = few["data"][0]["token_rewards"]["red"]
    assert rewards[2] == pytest.approx(scores[3] - scores[0], abs=2e-5)
    assert sum(rewards) == pytest.approx(scores[-1] - scores[0], abs=2e-5)
    assert few["usage"]["forward_tokens"] < all_["usage"]["forward_tokens"] / 2


def test_abc_shares_out_by_the_first_positions_row(encoder: Api, folder: Path) -> None:
    scores, row = prefix_scores(folder)
    item = encoder.item(SAMPLE, methods=[{"name": "abc", "beta": 1}])
    assert item["token_rewards"]["abc"] == pytest.approx(np.array(row) / sum(row) * scores[-1], abs=2e-5)


def test_variants_and_closed_prefixes_come_in_one_answer(encoder: Api) -> None:
    red = {"name": "red", "prefix_mode": "closed"}
    together = encoder.item(SAMPLE, methods=["occlusion", red, "sparse"])
    alone = [encoder.item(SAMPLE, methods=[each]) for each in ("occlusion", red)]
    for item, name in zip(alone, ("occlusion", "red"), strict=True):
        assert together["token_rewards"][name] == pytest.approx(item["token_rewards"][name], abs=1e-5)


def test_the_card_says_what_it_costs_and_what_cannot_be_had(encoder: Api) -> None:
    [card] = encoder.http.get("/v1/models").json()["data"]
    assert (card["engine"], card["prefix_modes"]) == ("unpacked", ["closed"])
    assert "not packed" in card["notice"]
    assert "it is bidirectional" in card["notice"]
    assert card["methods"]["abc"]["available"]
    assert card["methods"]["red"] == {
        "available": False,
        "reason": "this model's prefixes are only scored closed: ask with `prefix_mode` = `closed`",
        "passes": None,
        "cost": None,
    }


def test_what_cannot_be_had_is_refused_with_what_can(encoder: Api) -> None:
    _, error = encoder.refusal([SAMPLE], methods=["red"])
    assert "closed ones it gives, to methods with" in error["message"]
    dialogue: Json = {"messages": [{"role": "user", "content": PROMPT}], "response": RESPONSE}
    for sample, code in ((dialogue, "no_chat_template"), (SAMPLE | {"response": RESPONSE * 30}, "too_long")):
        status, error = encoder.refusal([sample], methods=["sparse"])
        assert (status, error["code"]) == (422, code)


def test_prefixes_beyond_what_the_queue_holds_are_refused_before_they_are_made(folder: Path, tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--model", f"encoder={folder}", "--max-queue-tokens", "600"]
    with serving(tmp_path / "log", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        sample = SAMPLE | {"response": "The food was good. " * 3}
        status, error = Api(http).refusal([sample], methods=[{"name": "red", "prefix_mode": "closed"}])
        assert (status, error["code"]) == (413, "too_large")
        assert "each closed prefix is a sequence of its own to this model" in error["message"]
        assert Api(http).item(sample, methods=["abc"])["reward"] is not None


def test_another_frame_is_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    """Only what stands between the texts of a pair differs, and every score with it."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    definition = json.loads((other / "tokenizer.json").read_text())
    pair = definition["post_processor"]["pair"]
    pair.insert(2, pair[2])
    (other / "tokenizer.json").write_text(json.dumps(definition))
    models = ["--model", f"one={folder}", "--model", f"two={other}"]
    with (
        serving(tmp_path / "log", "--device", "cpu", *models) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        answers = [Api(http).answer([SAMPLE], methods=["sparse"], model=name) for name in ("one", "two")]
    assert answers[0]["data"][0]["reward"] != answers[1]["data"][0]["reward"]
    assert answers[0]["fingerprint"] != answers[1]["fingerprint"]
