"""A policy and its reference: served as a model, and beside a reward model with another tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import reference
import tiny
from serving import STEP, Api, Json, command, serving

RATIO = 1e-4
"""How far a log-ratio may move with its batch; log-probabilities of the tiny models are about -6."""

TEXT: Json = {
    "messages": [{"role": "user", "content": "How was it?"}],
    "response": "Thank you, that was good food 😀.",
}
SPANS = [[0, 6], [6, 14], [14, 30], [30, 35]]
IMPLICIT: Json = {"name": "implicit", "ratio_scale": 0.1}
SHARP: Json = {"name": "implicit", "ratio_scale": 1.0, "ratio_clip": 0.05, "label": "sharp"}
TELL: Json = {"better": "Be kind.", "worse": "Be short."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, and a pair of Qwen3 that cut texts into other tokens than it does."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.save(folder / "rm")
    for seed, name in enumerate(["policy", "base"]):
        tiny.save_language_model(folder / name, "qwen3", seed)
        tiny.make_tokenizer(words=300).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def paired(folder: Path) -> Iterator[Api]:
    pair = f"policy={folder / 'policy'},reference={folder / 'base'}"
    flags = ["--device", "cpu", "--model", f"rm={folder / 'rm'}", "--pair", pair]
    with serving(folder / "log", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        yield Api(http)


def naive(folder: Path, sample: Json, told: str = "") -> tuple[Any, Any, Any]:
    """Log-probabilities of response and closing tokens under policy and reference, and the response's byte ends."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    content = f"{told}\n\n{sample['messages'][0]['content']}" if told else sample["messages"][0]["content"]
    before = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    prompt, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (before, sample["response"]))
    closing = tokenizer.encode("<|im_end|>\n", add_special_tokens=False)
    assert tokenizer.decode([*prompt, *ids, *closing]) == before + sample["response"] + "<|im_end|>\n"
    first, second = (
        reference.log_probabilities(
            AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager").eval(),
            [*prompt, *ids, *closing],
            len(prompt),
        )
        for name in ("policy", "base")
    )
    return first, second, len(ids)


def on_last(values: Any, length: int) -> Any:
    return np.append(values[: length - 1], values[length - 1 :].sum())


def test_a_pair_is_a_reward_model_whose_reward_is_the_sum_of_log_ratios(paired: Api, folder: Path) -> None:
    first, second, length = naive(folder, TEXT)
    methods = ["red", IMPLICIT, SHARP]
    item = paired.item(TEXT, model="pair", methods=methods, include=["prefix_scores"])
    assert item["reward"] == pytest.approx((first - second).sum(), abs=RATIO)
    red, implicit, sharp = (item["token_rewards"][name] for name in ("red", "implicit", "sharp"))
    assert red == pytest.approx(on_last(first - second, length), abs=RATIO)
    assert implicit == pytest.approx(on_last(0.1 * (first - second), length), abs=RATIO)
    assert sharp == pytest.approx(on_last((first - second).clip(-0.05, 0.05), length), abs=RATIO)
    assert item["prompt_score"] == 0
    assert item["baseline"]["red"] == pytest.approx(0, abs=RATIO)


def test_contrastive_rewards_compare_two_instructions(paired: Api, folder: Path) -> None:
    better, worse = (naive(folder, TEXT, told)[0] for told in ("Be kind.", "Be short."))
    length = naive(folder, TEXT)[2]
    expected = on_last(1 / (1 + np.exp(worse - better)) - 0.5, length)
    item = paired.item(TEXT, model="pair", methods=[{"name": "contrastive"} | TELL])
    assert item["token_rewards"]["contrastive"] == pytest.approx(expected, abs=RATIO)
    assert item["reward"] == pytest.approx(paired.item(TEXT, "/rewards", model="pair")["reward"], abs=RATIO)
    assert item["passes"] == {"contrastive": 3}
    same = paired.item(TEXT, model="pair", methods=[{"name": "contrastive", "better": "Hm.", "worse": "Hm."}])
    assert same["token_rewards"]["contrastive"] == pytest.approx([0] * length, abs=RATIO)


def test_an_unfinished_response_has_no_closing_tokens_to_be_likely(paired: Api, folder: Path) -> None:
    first, second, length = naive(folder, TEXT)
    item = paired.item(TEXT | {"finished": False}, model="pair", methods=[IMPLICIT])
    assert item["token_rewards"]["implicit"] == pytest.approx((0.1 * (first - second))[:length], abs=RATIO)


def test_beside_a_reward_model_the_ratios_lie_on_its_tokens_and_its_reward_on_the_last(paired: Api) -> None:
    alone = paired.item(TEXT, include=["spans"])
    item = paired.item(TEXT, methods=["red", IMPLICIT, "abc"])
    pairs = paired.item(TEXT | {"response_spans": alone["spans"]}, model="pair", methods=[IMPLICIT])
    assert list(item["token_rewards"]) == ["red", "implicit", "abc"]
    assert item["reward"] == pytest.approx(alone["reward"], abs=STEP)
    assert item["token_rewards"]["red"] == pytest.approx(alone["token_rewards"]["red"], abs=STEP)
    expected = np.array(pairs["token_rewards"]["implicit"])
    expected[-1] += alone["reward"]
    assert item["token_rewards"]["implicit"] == pytest.approx(expected, abs=RATIO)


def test_beta_mask_scale_and_clip_are_applied_to_the_sum_with_the_reward(paired: Api) -> None:
    sample = TEXT | {"response_spans": SPANS}
    [ratios, reward] = [paired.item(sample, model=model, methods=[IMPLICIT]) for model in ("pair", "rm")]
    ratio, total = np.array(ratios["token_rewards"]["implicit"]), reward["reward"]
    end = np.array([0, 0, 0, total])
    asked = [
        IMPLICIT | {"beta": 0.25, "label": "quarter"},
        IMPLICIT | {"normalize": 2.0, "clip": 0.05, "label": "bounded"},
    ]
    item = paired.item(sample, methods=asked)
    assert item["token_rewards"]["quarter"] == pytest.approx(0.25 * ratio + end, abs=RATIO)
    bounded = ((ratio + end) / 2).clip(-0.05, 0.05)
    assert item["token_rewards"]["bounded"] == pytest.approx(bounded, abs=RATIO)
    assert item["scale"] == {"bounded": 0.5}
    assert item["clipped"]["bounded"] == pytest.approx(((ratio + end) / 2 - bounded).sum(), abs=RATIO)
    masked = paired.item(sample | {"response_mask": [0, 1, 1, 0]}, methods=[IMPLICIT])["token_rewards"]["implicit"]
    assert masked == pytest.approx([0, ratio[0] + ratio[1], ratio[2] + ratio[3] + total, 0], abs=RATIO)


def test_a_bad_sample_fails_alone_and_an_empty_response_has_all_left_out(paired: Api) -> None:
    bad = TEXT | {"response_mask": [1]}
    items = paired.items([TEXT, bad, TEXT | {"response": ""}], methods=["implicit"], on_error="item")
    assert [item.get("error", {}).get("code") for item in items] == [None, "length_mismatch", None]
    assert items[2]["token_rewards"] == {"implicit": []}
    [only] = paired.items([bad], methods=[{"name": "implicit", "normalize": "running"}], on_error="item")
    assert only["error"]["code"] == "length_mismatch"
    for method in ("implicit", "contrastive"):
        item = paired.item(TEXT | {"response": "", "response_spans": [[0, 0]]}, methods=[method])
        assert item["token_rewards"][method] == pytest.approx([item["reward"]], abs=STEP)
    assert items[2]["baseline"]["implicit"] == pytest.approx(items[2]["reward"], abs=STEP)


def test_base64_and_running_scales_work_beside_a_pair(paired: Api) -> None:
    samples = [TEXT | {"response": "good " * count} for count in range(1, 20)]
    asked = [IMPLICIT | {"normalize": "running"}]
    plain = paired.items(samples, methods=asked)
    coded = paired.items(samples, methods=asked, encoding_format="base64")
    for first, second in zip(plain, coded, strict=True):
        assert isinstance(second["token_rewards"]["implicit"], str)
        assert first["scale"]["implicit"] == pytest.approx(second["scale"]["implicit"], rel=0.2)


@pytest.mark.parametrize(
    ("sample", "request_", "code"),
    [
        ({"prompt": "", "response": "Yes"}, {"model": "pair"}, "empty_prompt"),
        ({"prompt": "Well?\n", "response": "Yes"}, {"methods": ["contrastive"]}, "needs_messages"),
        ({"prompt_token_ids": [5], "response_token_ids": [6]}, {"methods": ["implicit"]}, "ids_of_another_model"),
        (TEXT, {"model": ["rm", "pair"], "methods": ["implicit"]}, "invalid_ensemble"),
        (TEXT | {"messages": []}, {"methods": ["contrastive"]}, "needs_messages"),
        (TEXT, {"model": "pair", "methods": ["abc"]}, "method_unavailable"),
        (TEXT, {"methods": ["implicit", "implicit"]}, "repeated_method"),
        (TEXT, {"methods": [{"name": "implicit", "ratio_scale": 0}]}, "invalid_params"),
        (TEXT, {"methods": [{"name": "contrastive", "better": ""}]}, "invalid_params"),
    ],
)
def test_what_a_pair_cannot_answer_is_refused(paired: Api, sample: Json, request_: Json, code: str) -> None:
    status, error = paired.refusal([sample], **request_)
    assert (status, error["code"]) == (422, code)


def test_a_pair_can_be_a_member_of_an_ensemble(paired: Api) -> None:
    sample = TEXT | {"response_spans": SPANS}
    parts = [paired.item(sample, model=name) for name in ("rm", "pair")]
    item = paired.item(sample, model=["rm", "pair"])
    assert item["reward"] == pytest.approx((parts[0]["reward"] + parts[1]["reward"]) / 2, abs=RATIO)


def test_the_models_say_what_the_pair_adds(paired: Api) -> None:
    rm, pair = paired.http.get("/v1/models").json()["data"]
    assert (rm["id"], pair["id"], pair["head"], pair["prefix_modes"]) == ("rm", "pair", "log_ratio", ["open"])
    for card in (rm, pair):
        assert card["methods"]["implicit"]["available"]
        assert card["methods"]["contrastive"] | {"cost": None} == {
            "available": True,
            "passes": 3,
            "cost": None,
            "reason": None,
        }
    assert rm["methods"]["abc"]["available"]
    assert not pair["methods"]["abc"]["available"]
    answers = [paired.answer([TEXT], methods=[name]) for name in ("red", "implicit")]
    assert answers[0]["fingerprint"] != answers[1]["fingerprint"]
    assert answers[0]["usage"]["forward_tokens"] < answers[1]["usage"]["forward_tokens"]


def test_one_language_model_serves_only_the_contrast(folder: Path) -> None:
    flags = ["--device", "cpu", "--model", str(folder / "rm"), "--pair", f"policy={folder / 'policy'}"]
    with serving(folder / "alone", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        [card] = http.get("/v1/models").json()["data"]
        item = api.item(TEXT, methods=["contrastive"])
        assert item["token_rewards"]["contrastive"][-1] == pytest.approx(item["reward"], abs=1.0)
        status, error = api.refusal([TEXT], methods=["implicit"])
    assert card["methods"]["contrastive"]["available"]
    assert not card["methods"]["implicit"]["available"]
    assert (status, error["code"]) == (422, "method_unavailable")
    assert "--pair policy=SOURCE,reference=SOURCE" in error["message"]


def test_without_a_pair_the_refusal_says_how_to_get_one(api: Api) -> None:
    status, error = api.refusal([{"prompt": "Well?\n", "response": "Yes"}], methods=["red", "implicit"])
    assert (status, error["code"]) == (422, "method_unavailable")
    assert "--pair policy=SOURCE,reference=SOURCE" in error["message"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("policy={policy},reference={rm}", "1 missing keys while loading"),
        ("policy={policy},reference={other}", "the tokenizers of"),
        ("policy={policy},reference={larger}", "the policy has 320 tokens and the reference 321"),
        ("policy={policy},reference={policy}", "policy and reference are the same model"),
        ("policy={policy},reference=/no/where", "there is no folder /no/where"),
    ],
)
def test_two_models_that_are_no_pair_are_not_served(folder: Path, tmp_path: Path, pair: str, message: str) -> None:
    other = tiny.save_language_model(tmp_path / "other", "qwen3", 5)
    larger = tiny.save_language_model(tmp_path / "larger", "qwen3", vocab_size=321)
    names = {"policy": folder / "policy", "rm": folder / "rm", "other": other, "larger": larger}
    given = pair.format(**names)
    ended = command("serve", "--port", "0", "--model", str(folder / "rm"), "--device", "cpu", "--pair", given)
    assert ended.returncode == 1
    assert message in ended.stderr + ended.stdout


def test_a_file_is_scored_beside_a_pair(folder: Path, tmp_path: Path, paired: Api) -> None:
    import json

    (tmp_path / "samples.jsonl").write_text(json.dumps(TEXT) + "\n")
    pair = f"policy={folder / 'policy'},reference={folder / 'base'}"
    flags = ["--model", str(folder / "rm"), "--device", "cpu", "--pair", pair, "--methods", "implicit"]
    ended = command("score", str(tmp_path / "samples.jsonl"), "-o", str(tmp_path / "out.jsonl"), *flags)
    assert ended.returncode == 0, ended.stderr
    line = json.loads((tmp_path / "out.jsonl").read_text())
    expected = paired.item(TEXT, methods=["implicit"])["token_rewards"]["implicit"]
    assert line["token_rewards"]["implicit"] == pytest.approx(expected, abs=RATIO)
