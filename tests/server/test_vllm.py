"""POST /classify and POST /pooling: vLLM's shapes, against one eager pass of the whole text and the server's routes."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import reference
import tiny
from serving import Api, Json, Server, refusal, serving

DIALOGUE: list[Json] = [
    {"role": "user", "content": "How was it?"},
    {"role": "assistant", "content": "The food was good 😀."},
]
TEXT = "<|im_start|>user\nHow was it?<|im_end|>\n<|im_start|>assistant\nThe food was good 😀.<|im_end|>\n"
TEXTS = [TEXT, "Thank you", "A café in Zürich<|im_end|>"]
TOKENIZER = tiny.make_tokenizer()
PATHS = ("/classify", "/pooling")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return reference.eager(model_folder)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def got(http: httpx.Client, path: str, **request: Any) -> Json:
    response = http.post(path, json=request)
    assert response.status_code == 200, response.text
    content: Json = response.json()
    assert [item["index"] for item in content["data"]] == list(range(len(content["data"])))
    return content


def scores(http: httpx.Client, path: str, **request: Any) -> list[float]:
    """One a text, from either route."""
    data = got(http, path, **request)["data"]
    pooled = [item["probs"] if path == "/classify" else item["data"] for item in data]
    assert all(len(each) == 1 for each in pooled)
    return [each[0] for each in pooled]


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_text_is_scored_at_its_last_token_as_it_stands(http: httpx.Client, model: Any, path: str) -> None:
    expected = [reference.score(model, ids_of(text)) for text in TEXTS]
    assert scores(http, path, input=TEXTS) == pytest.approx(expected, abs=1e-5)
    assert scores(http, path, input=TEXTS[0]) == pytest.approx(expected[:1], abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_text_gets_the_reward_of_its_parts(http: httpx.Client, api: Api, path: str) -> None:
    expected = api.item({"messages": DIALOGUE[:1], "response": DIALOGUE[1]["content"]}, "/rewards")["reward"]
    assert scores(http, path, input=TEXT) == pytest.approx([expected], abs=1e-5)
    assert scores(http, path, messages=DIALOGUE) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_ids_texts_and_several_of_them_get_the_same_scores(http: httpx.Client, path: str) -> None:
    expected = pytest.approx(scores(http, path, input=TEXTS), abs=1e-5)
    assert scores(http, path, input=[ids_of(text) for text in TEXTS]) == expected
    assert [score for text in TEXTS for score in scores(http, path, input=ids_of(text))] == expected
    assert scores(http, path, input=[TEXTS[0], ids_of(TEXTS[1]), TEXTS[2]]) == expected


def test_many_inputs_are_answered_in_their_order(http: httpx.Client, model: Any) -> None:
    texts = [f"Thank you {i} times" for i in range(64)]
    expected = [reference.score(model, ids_of(text)) for text in texts]
    assert scores(http, "/classify", input=texts) == pytest.approx(expected, abs=1e-5)


def test_classify_answers_in_vllms_shape(http: httpx.Client) -> None:
    content = got(http, "/classify", input=TEXTS, model="tiny", request_id="mine")
    assert content.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert (content["id"], content["object"], content["model"]) == ("classify-mine", "list", "tiny")
    tokens = sum(len(ids_of(text)) for text in TEXTS)
    assert content["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    probs = content["data"][0]["probs"]
    assert content["data"][0] == {"index": 0, "label": None, "probs": probs, "num_classes": 1}
    assert content["data"][-1]["probs"][-1] == scores(http, "/classify", input=TEXTS[-1])[0]  # as verl reads it


def test_pooling_answers_in_vllms_shape(http: httpx.Client) -> None:
    content = got(http, "/pooling", input=TEXTS[1], task="classify")
    assert content["id"].startswith("pooling-")
    assert content.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert content["data"][0].keys() == {"index", "object", "data"}
    assert content["data"][0]["object"] == "pooling"


def test_token_classify_gives_the_score_after_each_token_of_the_input(http: httpx.Client, api: Api, model: Any) -> None:
    content = got(http, "/pooling", input=TEXTS, task="token_classify")
    for text, item in zip(TEXTS, content["data"], strict=True):
        assert np.shape(item["data"]) == (len(ids_of(text)), 1)
        expected = reference.prefix_scores(model, [], ids_of(text))
        assert np.ravel(item["data"]) == pytest.approx(expected, abs=1e-5)
    sample = {"prompt": "", "response": TEXTS[1], "finished": False}
    [own] = api.items([sample], methods=["red"], include=["prefix_scores"])
    assert np.ravel(content["data"][1]["data"]) == pytest.approx(own["prefix_scores"], abs=1e-5)
    assert content["data"][1]["data"][-1] == pytest.approx(scores(http, "/classify", input=TEXTS[1]), abs=1e-5)


@pytest.mark.parametrize(("endianness", "dtype"), [(None, "=f4"), ("native", "=f4"), ("little", "<f4"), ("big", ">f4")])
@pytest.mark.parametrize("task", ["classify", "token_classify"])
def test_base64_holds_the_same_numbers(http: httpx.Client, task: str, endianness: str | None, dtype: str) -> None:
    order = {} if endianness is None else {"endianness": endianness}
    coded = got(http, "/pooling", input=TEXTS, task=task, encoding_format="base64", **order)["data"]
    plain = got(http, "/pooling", input=TEXTS, task=task, encoding_format="float")["data"]
    for one, same in zip(coded, plain, strict=True):
        assert np.frombuffer(base64.b64decode(one["data"]), dtype) == pytest.approx(np.ravel(same["data"]), abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_what_says_nothing_about_numbers_is_taken(http: httpx.Client, path: str) -> None:
    """What vLLM's clients send, at its default or about something else than numbers."""
    idle: Json = {
        "user": "me",
        "priority": 3,
        "request_id": "mine",
        "cache_salt": "salt",
        "truncation_side": "left",
        "use_activation": False,
        "truncate_prompt_tokens": None,
        "padding": "do_not_pad",
        "dimensions": None,
        "embed_dtype": "float32",
        "chat_template_kwargs": {},
    }
    assert scores(http, path, input=TEXTS, **idle) == pytest.approx(scores(http, path, input=TEXTS), abs=1e-5)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_activation", True),
        ("activation", True),
        ("softmax", True),
        ("normalize", True),
        ("truncate_prompt_tokens", 100),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -1),
        ("padding", "max_length"),
        ("dimensions", 1),
        ("embed_dtype", "float16"),
        ("add_generation_prompt", True),
        ("continue_final_message", True),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("mm_processor_kwargs", {}),
        ("media_io_kwargs", {}),
    ],
)
def test_an_option_that_would_change_a_number_is_refused_by_its_name(
    http: httpx.Client, path: str, name: str, value: Any
) -> None:
    status, error = refusal(http.post(path, json={"input": TEXTS, name: value}))
    assert (status, error["code"], error["details"]) == (422, "unsupported_option", {"field": name})
    assert error["message"].startswith(f"{name} cannot be had: ")


@pytest.mark.parametrize(
    ("path", "request_", "field"),
    [
        ("/classify", {"input": TEXT, "use_activatoin": False}, "use_activatoin"),
        ("/classify", {"input": TEXT, "task": "classify"}, "task"),
        ("/pooling", {"input": TEXT, "task": "embed"}, "task"),
        ("/pooling", {"input": TEXT, "task": "score"}, "task"),
        ("/pooling", {"input": TEXT, "encoding_format": "bytes"}, "encoding_format"),
        ("/pooling", {"input": TEXT, "endianness": "middle"}, "endianness"),
        ("/pooling", {"data": {}}, None),
        ("/classify", {}, None),
        ("/classify", {"input": TEXT, "messages": DIALOGUE}, None),
        ("/classify", {"input": []}, "input"),
        ("/classify", {"input": [[]]}, "input"),
        ("/classify", {"input": 3}, "input"),
        ("/classify", {"input": [TEXT, None]}, "input"),
        ("/classify", {"input": [TEXT, [True]]}, "input"),
        ("/classify", {"input": [5, 6.0]}, "input"),
        ("/classify", {"messages": []}, "messages"),
        ("/classify", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "messages"),
        ("/classify", {"messages": [*DIALOGUE, {"role": "critic", "content": "No."}]}, "messages"),
        ("/classify", {"input": TEXT, "add_special_tokens": 1}, "add_special_tokens"),
    ],
)
def test_a_request_that_says_something_else_is_refused(
    http: httpx.Client, path: str, request_: Json, field: str | None
) -> None:
    status, error = refusal(http.post(path, json=request_))
    assert (status, error["details"].get("field")) == (422, field)


@pytest.mark.parametrize("path", PATHS)
def test_a_bad_input_is_named_as_the_request_names_it(http: httpx.Client, path: str, poison: str) -> None:
    for bad, status, code in (
        ([5, 320], 422, "id_out_of_vocabulary"),
        ([-1], 422, "id_out_of_vocabulary"),
        ([5] * 3000, 422, "too_long"),
        ("", 422, "empty_sample"),
        (poison, 500, "not_finite"),
    ):
        found, error = refusal(http.post(path, json={"input": [TEXT, bad]}))
        assert (found, error["code"], error["details"]["index"]) == (status, code, 1)
        assert error["message"].startswith("input[1]: ")


@pytest.mark.parametrize("path", PATHS)
def test_the_key_and_the_limits_are_those_of_every_scoring_route(server: Server, http: httpx.Client, path: str) -> None:
    assert refusal(httpx.post(server.url + path, json={"input": TEXT}, trust_env=False))[0] == 401
    assert refusal(http.post(path, json={"input": ["x"] * 65}))[0] == 413
    assert refusal(http.post(path, json={"input": "x" * 400_000}))[0] == 413
    assert refusal(http.post(path, content=b'{"input": '))[0] == 400
    assert refusal(http.post(path, json={"input": TEXT, "model": "other"}))[0] == 404
    assert any(f'route="{path}"' in name and 'status="401"' in name for name in server.metrics())


# --- other models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    tiny.save(folder / "bos", adds_bos=True)
    tiny.save_judge(folder / "judge")
    tiny.save_encoder(folder / "encoder")
    for seed, name in enumerate(["policy", "base"]):
        tiny.save_language_model(folder / name, "qwen3", seed)
    return folder


@pytest.fixture(scope="module")
def others(folder: Path) -> Iterator[httpx.Client]:
    """A model whose tokenizer writes a BOS, and models to which a whole text says too little; no key."""
    models = [part for name in ("bos", "judge", "encoder") for part in ("--model", f"{name}={folder / name}")]
    pair = ["--pair", f"policy={folder / 'policy'},reference={folder / 'base'}", "--ensemble", "both=bos+judge:min"]
    with (
        serving(folder / "log", "--device", "cpu", "--step-separator", r"\n\n", *models, *pair) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield http


def test_a_bos_is_written_where_the_tokenizer_writes_one_and_the_text_has_none(
    others: httpx.Client, folder: Path
) -> None:
    model = reference.eager(folder / "bos")
    bare, with_bos = (reference.score(model, ids) for ids in (ids_of(TEXT), [0, *ids_of(TEXT)]))
    assert bare != pytest.approx(with_bos, abs=1e-4)
    for path in PATHS:
        assert scores(others, path, input=[TEXT, "<|bos|>" + TEXT]) == pytest.approx([with_bos] * 2, abs=1e-5)
        assert scores(others, path, input=TEXT, add_special_tokens=False) == pytest.approx([bare], abs=1e-5)
        assert scores(others, path, input=ids_of(TEXT)) == pytest.approx([bare], abs=1e-5)
        assert scores(others, path, messages=DIALOGUE) == pytest.approx([bare], abs=1e-5)
        assert scores(others, path, messages=DIALOGUE, add_special_tokens=True) == pytest.approx([with_bos], abs=1e-5)


def test_the_bos_has_a_score_of_its_own_among_those_after_each_token(others: httpx.Client) -> None:
    content = got(others, "/pooling", input=TEXT, task="token_classify")
    assert len(content["data"][0]["data"]) == 1 + len(ids_of(TEXT)) == content["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("judge", "needs_prompt_and_response", "judges steps or tokens of a response"),
        ("encoder", "needs_prompt_and_response", "reads prompt and response as a pair of texts"),
        ("pair", "needs_prompt_and_response", "gives the response's tokens alone a probability"),
        ("both", "invalid_ensemble", "ensemble"),
    ],
)
def test_a_model_to_which_a_whole_text_says_too_little_refuses_it(
    others: httpx.Client, path: str, name: str, code: str, words: str
) -> None:
    status, error = refusal(others.post(path, json={"input": TEXT, "model": name}))
    assert (status, error["code"]) == (422, code)
    assert words in error["message"]
