"""Models that judge tokens or steps, against their own reading of a whole response in one eager pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

import tiny
from serving import STEP, Api, Json, command, serving

DIALOGUE: Json = {"messages": [{"role": "user", "content": "How was it?"}]}
SOLUTION = "The food was good.\n\nSo was the fox 😀.\n\nThank you"
STEPS = SOLUTION.split("\n\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    tiny.save_judge(folder / "trl", "qwen3")
    tiny.save_judge(folder / "tokens", "gpt2", num_labels=1)
    tiny.save_process_model(folder / "process")
    return folder


@pytest.fixture(scope="module")
def judges(folder: Path) -> Iterator[Api]:
    """A token classifier trained on steps, and a process reward model."""
    models = [part for name in ("trl", "process") for part in ("--model", f"{name}={folder / name}")]
    flags = ["--device", "cpu", "--step-separator", r"\n\n", *models]
    with serving(folder / "log", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        yield Api(http)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Iterator[Api]:
    """A token classifier with one label, and one with two whose names say which is good."""
    labels: Json = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    named = tiny.save_judge(folder / "named", "llama", **labels)
    models = ["--model", f"scores={folder / 'tokens'}", "--model", f"named={named}"]
    with (
        serving(folder / "tokens_log", "--device", "cpu", *models) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Api(http)


def trl_reading(folder: Path) -> list[float]:
    """As TRL's PRMTrainer writes a row: steps tokenised apart, each with the separator, judged at its last token."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "trl")
    model = AutoModelForTokenClassification.from_pretrained(folder / "trl", attn_implementation="eager").eval()
    ids = [tokenizer.bos_token_id, *tokenizer.encode(_prompt(tokenizer), add_special_tokens=False)]
    ends = []
    for step in STEPS:
        ids += tokenizer.encode(step, add_special_tokens=False) + tokenizer.encode("\n\n", add_special_tokens=False)
        ends.append(len(ids) - 1)
    with torch.no_grad():
        return [float(each) for each in model(input_ids=torch.tensor([ids])).logits[0, ends].softmax(dim=-1)[:, 1]]


def process_reading(folder: Path, template: bool = True) -> list[float]:
    """As the card of Qwen2.5-Math-PRM reads it: the whole text with its special tokens, judged at each of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "process")
    weights = load_file(folder / "process" / "model.safetensors")
    decoder = AutoModel.from_pretrained(folder / "process", attn_implementation="eager").eval()
    text = _prompt(tokenizer) + "".join(step + "<extra_0>" for step in STEPS) + "<|im_end|>\n"
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        hidden = decoder(input_ids=ids).last_hidden_state[0]
        inner = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
        logits = inner @ weights["score.2.weight"].T + weights["score.2.bias"]
    places = ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")
    return [float(each) for each in logits.softmax(dim=-1)[places][:, 1]]


def _prompt(tokenizer: Any) -> str:
    return str(tokenizer.apply_chat_template(DIALOGUE["messages"], tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize(("model", "reading"), [("trl", trl_reading), ("process", process_reading)])
def test_steps_are_judged_as_the_family_reads_them(judges: Api, folder: Path, model: str, reading: Any) -> None:
    expected = reading(folder)
    item = judges.item(
        DIALOGUE | {"response": SOLUTION}, model=model, methods=["steps"], include=["segments", "tokens", "spans"]
    )
    assert len(set(np.round(expected, 4))) == 3
    assert [each["score"] for each in item["segments"]["steps"]] == pytest.approx(expected, abs=STEP)
    assert item["reward"] == pytest.approx(expected[-1], abs=STEP)
    rewards = np.zeros(len(item["tokens"]))
    rewards[[each["end"] - 1 for each in item["segments"]["steps"]]] = expected
    assert item["token_rewards"]["steps"] == pytest.approx(rewards.tolist(), abs=STEP)
    texts = [SOLUTION.encode()[start:stop].decode(errors="replace") for start, stop in item["spans"]]
    assert [texts[each["end"] - 1] for each in item["segments"]["steps"]] == [".", ".", "u"]


@pytest.mark.parametrize("place", ["last", "spread"])
def test_forms_of_step_rewards_come_back_on_the_trainers_tokens(judges: Api, place: str) -> None:
    spans = [[0, 18], [18, 20], [20, 40], [40, 42], [42, 51]]
    sample = DIALOGUE | {"response": SOLUTION, "response_spans": spans}
    asked = [
        {"name": "steps", "form": form, "place": place, "label": form} for form in ("score", "signed", "difference")
    ]
    item = judges.item(sample, model="process", methods=asked, include=["segments"])
    p = np.array([each["score"] for each in item["segments"]["score"]])
    expected_by_form = {"score": p, "signed": 2 * p - 1, "difference": np.diff(p, prepend=0)}
    for form, values in expected_by_form.items():
        found = np.array(item["token_rewards"][form])
        assert [found[:2].sum(), found[2:4].sum(), found[4]] == pytest.approx(values.tolist(), abs=STEP)
        if place == "last":
            assert found[[1, 3]].tolist() == [0, 0]
    assert item["baseline"]["difference"] == pytest.approx(0, abs=STEP)


def test_ids_are_read_as_their_text_and_rewarded_one_by_one(judges: Api, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "process")
    ids = tokenizer.encode(SOLUTION, add_special_tokens=False)
    closing = tokenizer.encode("<|im_end|>\n", add_special_tokens=False)
    expected = judges.item(DIALOGUE | {"response": SOLUTION}, model="process", methods=["steps"], include=["segments"])
    for given in (ids, [*ids, *closing[:1]], [*ids, *closing]):
        item = judges.item(
            DIALOGUE | {"response_token_ids": given}, model="process", methods=["steps"], include=["segments"]
        )
        rewards = item["token_rewards"]["steps"]
        assert len(rewards) == len(given)
        assert item["reward"] == pytest.approx(expected["reward"], abs=STEP)
        assert np.count_nonzero(rewards) == 3
        assert rewards[len(ids) - 1] == pytest.approx(expected["reward"], abs=STEP)


def test_the_last_step_of_a_cut_response_is_judged_and_the_answer_says_so(judges: Api) -> None:
    sample = DIALOGUE | {"response": SOLUTION}
    whole, cut = judges.items([sample, sample | {"finished": False}], model="trl", methods=["steps"])
    assert cut["reward"] == pytest.approx(whole["reward"], abs=STEP)
    assert not whole["warnings"]
    assert cut["warnings"] == ["unfinished: the last step was cut by length, and is judged as if it had ended"]


def test_tokens_are_judged_one_by_one_and_the_reward_is_their_mean(tokens: Api, folder: Path) -> None:
    for name, where in (("scores", "tokens"), ("named", "named")):
        tokenizer = AutoTokenizer.from_pretrained(folder / where)
        model = AutoModelForTokenClassification.from_pretrained(folder / where, attn_implementation="eager").eval()
        prompt = tokenizer.encode(_prompt(tokenizer), add_special_tokens=False)
        ids = tokenizer.encode(SOLUTION, add_special_tokens=False)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) :]
        expected = (logits[:, 0] if name == "scores" else logits.softmax(dim=-1)[:, 0]).tolist()
        item = tokens.item(DIALOGUE | {"response": SOLUTION}, model=name)
        assert item["token_rewards"]["steps"] == pytest.approx(expected, abs=1e-5)
        assert item["reward"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert tokens.item(DIALOGUE | {"response": SOLUTION}, "/rewards", model=name)["reward"] == pytest.approx(
            np.mean(expected), abs=1e-5
        )


def test_controls_mask_and_beta_work_on_models_that_judge_steps(judges: Api) -> None:
    sample = DIALOGUE | {
        "response": SOLUTION,
        "response_spans": [[0, 20], [20, 42], [42, 51]],
        "response_mask": [1, 0, 1],
    }
    item = judges.item(sample, model="process", methods=["uniform", "sparse", {"name": "steps", "beta": 0.5}])
    p = judges.item(sample | {"response_mask": [1, 1, 1]}, model="process", methods=["steps"])["token_rewards"]["steps"]
    reward = item["reward"]
    assert item["token_rewards"]["sparse"] == pytest.approx([0, 0, reward], abs=STEP)
    assert item["token_rewards"]["uniform"] == pytest.approx([reward / 3, 0, 2 * reward / 3], abs=STEP)
    expected = [p[0] / 2, 0, (p[1] + p[2]) / 2 + reward / 2]
    assert item["token_rewards"]["steps"] == pytest.approx(expected, abs=STEP)


@pytest.mark.parametrize("spans", [[[0, 18], [20, 40], [42, 51]], [[0, 18], [18, 19], [20, 40], [42, 51]]])
def test_a_steps_reward_stays_in_it_where_the_trainers_tokens_leave_white_space_out(
    judges: Api, spans: list[list[int]]
) -> None:
    item = judges.item(
        DIALOGUE | {"response": SOLUTION, "response_spans": spans},
        model="trl",
        methods=["steps"],
        include=["segments"],
    )
    scores = [each["score"] for each in item["segments"]["steps"]]
    rewards = [value for value, (start, _) in zip(item["token_rewards"]["steps"], spans, strict=True) if start != 18]
    assert rewards == pytest.approx(scores, abs=STEP)


def test_an_ensemble_of_a_judge_and_a_scorer_has_a_method_by_default_that_both_can_serve(
    judges: Api, folder: Path
) -> None:
    item = judges.item(DIALOGUE | {"response": SOLUTION}, model=["trl", "process"])
    assert item["token_rewards"].keys() == {"steps"}


@pytest.mark.parametrize("others", [1, 7])
def test_a_response_is_judged_the_same_in_any_batch(judges: Api, others: int) -> None:
    samples = [DIALOGUE | {"response": "good food\n\n" * count + "End"} for count in range(1, 1 + others)]
    together = judges.items([*samples, DIALOGUE | {"response": SOLUTION}], model="trl", methods=["steps"])
    alone = judges.item(DIALOGUE | {"response": SOLUTION}, model="trl", methods=["steps"])
    assert together[-1]["token_rewards"]["steps"] == pytest.approx(alone["token_rewards"]["steps"], abs=STEP)


@pytest.mark.parametrize(
    ("response", "request_", "code"),
    [
        ({"response": " \n\n "}, {}, "empty_response"),
        ({"response": "a<extra_0>b"}, {"model": "process"}, "separator_in_response"),
        ({"response": "Yes"}, {"methods": ["red"]}, "method_unavailable"),
        ({"response": "Yes"}, {"methods": ["occlusion"]}, "method_unavailable"),
        ({"response": "Yes"}, {"include": ["prefix_scores"]}, "method_unavailable"),
        ({"response_token_ids": [200, 240]}, {}, "no_text"),
        ({"response_token_ids": []}, {}, "empty_response"),
        ({"response_token_ids": [2]}, {}, "empty_response"),
    ],
)
def test_what_cannot_be_judged_is_refused(judges: Api, response: Json, request_: Json, code: str) -> None:
    status, error = judges.refusal([DIALOGUE | response], **request_)
    assert (status, error["code"]) == (422, code)


def test_tokens_that_are_not_there_cannot_be_judged(tokens: Api) -> None:
    status, error = tokens.refusal([DIALOGUE | {"response": ""}])
    assert (status, error["code"]) == (422, "empty_response")


def test_the_models_say_what_they_judge(judges: Api, tokens: Api) -> None:
    trl, process = judges.http.get("/v1/models").json()["data"]
    assert (trl["head"], trl["step_separator"], trl["closing_token_ids"]) == ("token_classifier", "\n\n", [])
    assert (process["head"], process["step_cut"], process["step_separator"]) == ("process", "\n\n", "<extra_0>")
    assert process["family"] == "Qwen2ForProcessRewardModel"
    for card in (trl, process, *tokens.http.get("/v1/models").json()["data"]):
        available = [name for name, method in card["methods"].items() if method["available"]]
        assert available == ["steps", "uniform", "sparse", "weights"]
        assert card["prefix_modes"] == []
    item = judges.item(DIALOGUE | {"response": SOLUTION})
    assert item["token_rewards"].keys() == {"steps"}


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"num_labels": 3}, [], "num_labels = 3; a reward model that scores tokens has 1 or 2"),
        ({"id2label": {0: "toxic", 1: "rude"}}, [], "which of these is the good one cannot be told"),
        ({"id2label": {0: "good", 1: "positive"}}, [], "which of these is the good one cannot be told"),
    ],
)
def test_labels_that_do_not_say_what_is_good_are_not_served(
    tmp_path: Path, changes: Json, flags: list[str], message: str
) -> None:
    folder = tiny.save_judge(tmp_path / "model", **changes)
    ended = command("serve", "--port", "0", "--model", str(folder), "--device", "cpu", *flags)
    assert ended.returncode == 1
    assert message in ended.stderr


def test_a_separator_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_process_model(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(folder)
    ended = command("serve", "--port", "0", "--model", str(folder), "--device", "cpu")
    assert ended.returncode == 1
    assert "does not know '<extra_0>' as a token of its own" in ended.stderr


def test_the_fingerprint_tells_how_steps_are_written(folder: Path, judges: Api, tmp_path: Path) -> None:
    sample = DIALOGUE | {"response": SOLUTION}
    flags = ["--device", "cpu", "--model", f"trl={folder / 'trl'}", "--step-separator", r"\n"]
    with serving(tmp_path / "log", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        other = Api(http).answer([sample])
    assert other["fingerprint"] != judges.answer([sample], model="trl")["fingerprint"]


def test_a_separator_that_no_model_heeds_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    ended = command("serve", "--port", "0", "--model", str(folder), "--device", "cpu", "--step-separator", r"\n")
    assert ended.returncode == 1
    assert "--step-separator is for token classifiers, and none is served" in ended.stderr
