"""Several models in one server: each by its name, and together as an ensemble on the trainer's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import tiny
from densereward_client import Client
from serving import STEP, Api, Json, serving

TEXT: Json = {"prompt": "Well?\n", "response": "Thank you, that was good food 😀."}
SPANS = [[0, 6], [6, 14], [14, 30], [30, 35]]
NAMES = ["one", "two"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A Llama, and a Qwen3 whose tokenizer has other merges and adds a BOS."""
    folder = tmp_path_factory.mktemp("several")
    one = tiny.save(folder / "one")
    two = tiny.save(folder / "two", "qwen3", adds_bos=True, seed=3)
    tokenizer = tiny.make_tokenizer(adds_bos=True, words=300)
    tokenizer.save_pretrained(two)
    flags = ["--device", "cpu", "--model", f"one={one}", "--model", f"two={two}", "--ensemble", "safe=two+one:min"]
    with serving(folder / "log", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        yield Api(http)


def alone(several: Api, sample: Json, **request: Any) -> list[Json]:
    return [several.item(sample, model=name, **request) for name in NAMES]


def test_every_model_is_listed_and_answers_by_its_name_the_first_by_default(several: Api) -> None:
    listed = several.http.get("/v1/models").json()
    cards = listed["data"]
    assert [card["id"] for card in cards] == several.http.get("/ready").json()["models"] == NAMES
    assert listed["ensembles"] == [{"id": "safe", "object": "ensemble", "models": ["two", "one"], "how": "min"}]
    assert cards[0]["tokenizer_fingerprint"] != cards[1]["tokenizer_fingerprint"]
    first, second = alone(several, TEXT)
    assert first["reward"] != pytest.approx(second["reward"], abs=1e-3)
    assert several.item(TEXT)["reward"] == pytest.approx(first["reward"], abs=1e-6)
    assert several.item(TEXT, model="default")["reward"] == pytest.approx(first["reward"], abs=1e-6)


@pytest.mark.parametrize("how", ["mean", "min", "uncertainty"])
@pytest.mark.parametrize("normalize", [None, {"one": [0.5, 2.0], "two": [-1.0, 0.25]}])
def test_an_ensemble_is_its_formula_on_the_models_own_answers(several: Api, how: str, normalize: Any) -> None:
    sample = TEXT | {"response_spans": SPANS}
    methods = ["red", {"name": "abc", "beta": 0.5}]
    parts = alone(several, sample, methods=methods)
    ensemble = {"how": how, "penalty": 0.3, "normalize": normalize}
    item = several.item(sample, model=NAMES, ensemble=ensemble, methods=methods)
    scales = normalize or {"one": [0.0, 1.0], "two": [0.0, 1.0]}
    rewards = np.array([part["reward"] for part in parts])
    z = np.array([(reward - scales[name][0]) / scales[name][1] for name, reward in zip(NAMES, rewards, strict=True)])
    expected = {"mean": z.mean(), "min": z.min(), "uncertainty": z.mean() - 0.3 * z.var()}[how]
    assert item["reward"] == pytest.approx(expected, abs=STEP * 10)
    assert item["rewards"] == {
        name: pytest.approx(reward, abs=1e-6) for name, reward in zip(NAMES, rewards, strict=True)
    }
    assert item["disagreement"] == pytest.approx(z.std(), abs=STEP * 10)
    for name in ("red", "abc"):
        total = sum(item["token_rewards"][name]) + item["baseline"][name]
        assert total == pytest.approx(expected, abs=STEP * 20)
        own = np.array(
            [np.array(part["token_rewards"][name]) / scales[each][1] for each, part in zip(NAMES, parts, strict=True)]
        )
        if how == "mean":
            np.testing.assert_allclose(item["token_rewards"][name], own.mean(axis=0), atol=STEP * 10)
        if how == "min":
            np.testing.assert_allclose(item["token_rewards"][name], own[z.argmin()], atol=STEP * 10)


def test_an_ensemble_may_have_a_name(several: Api) -> None:
    by_name = several.answer([TEXT], model="safe")
    assert by_name["model"] == "safe"
    assert by_name["data"] == several.answer([TEXT], model=["two", "one"], ensemble={"how": "min"})["data"]


def test_without_spans_the_rewards_are_on_the_first_models_tokens(several: Api) -> None:
    item = several.item(TEXT, model=NAMES)
    first, second = alone(several, TEXT)
    assert len(item["token_rewards"]["red"]) == len(first["token_rewards"]["red"])
    assert len(first["token_rewards"]["red"]) != len(second["token_rewards"]["red"])
    turned = several.item(TEXT, model=NAMES[::-1])
    assert len(turned["token_rewards"]["red"]) == len(second["token_rewards"]["red"])
    assert turned["reward"] == pytest.approx(item["reward"], abs=1e-6)


def test_rewards_alone_are_combined_too_and_normalised_by_what_each_model_gave_so_far(several: Api) -> None:
    samples = [TEXT | {"response": f"{n} thanks"} for n in range(8)]
    running = {"how": "min", "normalize": "running"}
    items = several.items(samples, "/rewards", model=NAMES, ensemble=running)
    own = np.array([[item["rewards"][name] for name in NAMES] for item in items])
    assert len({item["reward"] for item in items}) == 8
    assert np.abs([item["reward"] for item in items]).max() < 20
    assert own.std(axis=0).min() > 0


def test_base64_and_the_client_read_the_same(several: Api) -> None:
    plain = several.item(TEXT, model=NAMES)
    with Client(str(several.http.base_url)) as client:
        answer = client.token_rewards([TEXT], model=NAMES, ensemble={"how": "mean"}, encoding_format="base64")
    assert answer.model == "one+two"
    np.testing.assert_allclose(answer.data[0].token_rewards["red"], plain["token_rewards"]["red"], atol=STEP)
    assert answer.data[0].disagreement == pytest.approx(plain["disagreement"], abs=1e-5)


def test_a_named_ensemble_stays_what_the_server_made_it(several: Api) -> None:
    scales = {"one": [0, 1], "two": [0, 1]}
    same = several.item(TEXT, model="safe", ensemble={"normalize": scales})
    assert same["reward"] == pytest.approx(several.item(TEXT, model="safe")["reward"], abs=1e-6)
    assert several.item(TEXT, model="safe")["warnings"][0].startswith("not_normalized:")
    assert same["warnings"] == []
    status, error = several.refusal([TEXT], model="safe", ensemble={"how": "mean"})
    assert (status, error["code"]) == (422, "invalid_ensemble")


def test_a_penalty_that_turns_a_models_rewards_round_is_told(several: Api) -> None:
    item = several.item(TEXT, model=NAMES, ensemble={"how": "uncertainty", "penalty": 1000})
    assert any(warning.startswith("negative_weight:") for warning in item["warnings"])


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"model": ["one", "three"]}, 404, "unknown_model"),
        ({"model": ["one", "one"]}, 422, "invalid_ensemble"),
        ({"model": ["one"]}, 422, "invalid_request"),
        ({"model": "one", "ensemble": {"how": "min"}}, 422, "invalid_ensemble"),
        ({"model": NAMES, "ensemble": {"how": "most"}}, 422, "invalid_request"),
        ({"model": NAMES, "ensemble": {"normalize": {"one": [0, 1]}}}, 422, "invalid_ensemble"),
        ({"model": NAMES, "ensemble": {"how": "uncertainty", "penalty": 1e41}}, 422, "invalid_request"),
        ({"model": NAMES, "ensemble": {"normalize": {"one": [0, 1e-300], "two": [0, 1]}}}, 422, "invalid_request"),
        ({"model": NAMES, "include": ["tokens"]}, 422, "invalid_ensemble"),
        ({"model": NAMES, "methods": [{"name": "red", "clip": 1}]}, 422, "invalid_ensemble"),
    ],
)
def test_what_makes_no_ensemble_is_refused(several: Api, request_: Json, status: int, code: str) -> None:
    refused, error = several.refusal([TEXT], **request_)
    assert (refused, error["code"]) == (status, code)


def test_ids_cannot_be_two_tokenizers_at_once_and_a_bad_sample_fails_alone(several: Api) -> None:
    ids = {"prompt_token_ids": [5, 6], "response_token_ids": [20, 30]}
    status, error = several.refusal([ids], model=NAMES)
    assert (status, error["code"]) == (422, "ids_of_another_model")
    items = several.items([TEXT, ids], model=NAMES, on_error="item")
    assert "error" not in items[0]
    assert items[1]["error"]["code"] == "ids_of_another_model"


def test_equal_vocabularies_that_cut_texts_differently_still_meet_on_the_same_tokens(tmp_path: Path) -> None:
    """Only the pre-tokenizer differs, which no fingerprint of the vocabulary shows."""
    one, two = tiny.save(tmp_path / "one"), tiny.save(tmp_path / "two", seed=3)
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save_pretrained(two)
    code = {"prompt": "Write.\n", "response": "def add(a, b):\n    return a + b\n"}
    flags = ["--device", "cpu", "--model", f"one={one}", "--model", f"two={two}"]
    with serving(tmp_path / "log", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        item = api.item(code, model=NAMES)
        spans = api.item(code, model="one", include=["spans"])["spans"]
        explicit = api.item(code | {"response_spans": spans}, model=NAMES)
    np.testing.assert_allclose(item["token_rewards"]["red"], explicit["token_rewards"]["red"], atol=STEP)
