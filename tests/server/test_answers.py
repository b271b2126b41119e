"""What every route answers with, to the last key."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from densereward import __version__
from densereward.methods import METHODS
from densereward_client.wire import ModelList
from serving import NOT_BY_A_SCORE, Api, Json, Server

SAMPLE = {"prompt": "Why?", "response": "Because."}


@pytest.fixture(scope="module")
def three(api: Api) -> Json:
    samples = [SAMPLE | {"id": "first"}, SAMPLE | {"finished": False}, {"prompt_token_ids": [5], "response": "x"}]
    return api.answer(samples)


def test_an_answer_has_exactly_the_keys_of_the_contract(three: Json) -> None:
    assert three.keys() == {"id", "object", "model", "fingerprint", "created", "data", "usage", "timing"}
    assert three["object"] == "token_rewards"
    assert three["model"] == "tiny"
    assert isinstance(three["created"], int)
    assert abs(three["created"] - time.time()) < 120
    assert three["timing"].keys() == {"queue_ms", "forward_ms", "total_ms"}
    assert 0 < three["timing"]["forward_ms"] < three["timing"]["total_ms"]


def test_items_come_back_in_order_with_their_ids(three: Json) -> None:
    assert [(item["index"], item["id"]) for item in three["data"]] == [(0, "first"), (1, None), (2, None)]
    for item in three["data"]:
        assert item.keys() == {"index", "id", "reward", "token_rewards", "baseline", "warnings"}
        assert isinstance(item["reward"], float)
        assert item["warnings"] == []
        assert item["token_rewards"].keys() == item["baseline"].keys() == {"red"}
        assert all(isinstance(reward, float) for reward in item["token_rewards"]["red"])


def test_usage_counts_prompt_response_and_all_that_ran(three: Json) -> None:
    # "Why?" is 4 tokens of this tokenizer, "Because." 8; a finished response gets the 2 closing tokens.
    assert [len(item["token_rewards"]["red"]) for item in three["data"]] == [8, 8, 1]
    assert three["usage"] == {"prompt_tokens": 9, "response_tokens": 17, "forward_tokens": 30}


def test_rewards_answers_with_one_number_a_sample(api: Api, three: Json) -> None:
    answer = api.answer([SAMPLE | {"id": "first"}, SAMPLE | {"finished": False}], "/rewards")
    assert answer.keys() == three.keys()
    assert answer["object"] == "rewards"
    assert answer["fingerprint"] == three["fingerprint"]
    expected = [{key: item[key] for key in ("index", "id", "warnings")} for item in three["data"][:2]]
    rewards = [item.pop("reward") for item in answer["data"]]
    assert answer["data"] == expected
    assert rewards == pytest.approx([item["reward"] for item in three["data"][:2]], abs=1e-6)


def test_every_answer_has_an_id_of_its_own(api: Api) -> None:
    answers = [api.answer([SAMPLE], path) for path in ("/token_rewards", "/token_rewards", "/rewards")]
    assert [answer["id"][:3] for answer in answers] == ["tr-", "tr-", "rw-"]
    assert len({answer["id"] for answer in answers}) == 3
    assert len({answer["fingerprint"] for answer in answers}) == 1


def test_every_response_carries_a_request_id(api: Api, server: Server) -> None:
    responses = [api.post([SAMPLE]), api.post([]), server.get("/health"), server.get("/nothing")]
    assert [response.status_code for response in responses] == [200, 422, 200, 404]
    assert len({response.headers["X-Request-ID"] for response in responses}) == 4


def test_models_tells_what_is_served_and_how_it_reads_text(server: Server) -> None:
    response = server.get("/v1/models")
    ModelList.model_validate_json(response.content)
    answer = response.json()
    assert answer.keys() == {"object", "data", "ensembles"}
    assert answer["object"] == "list"
    [card] = answer["data"]
    fingerprints = {name: card.pop(name) for name in ("tokenizer_fingerprint", "template_fingerprint")}
    assert all(len(value) == 64 and set(value) <= set("0123456789abcdef") for value in fingerprints.values())
    costs = {name: method.pop("cost") for name, method in card["methods"].items()}
    assert costs["red"].startswith("One forward pass")
    for name in NOT_BY_A_SCORE:
        refused = card["methods"].pop(name)
        assert not refused["available"]
        assert refused["reason"]
    served = [name for name in METHODS if name not in NOT_BY_A_SCORE]
    passes = dict.fromkeys(METHODS, 1) | {"attribution": 3, "occlusion": None, "shapley": None}
    assert card == {
        "id": "tiny",
        "object": "model",
        "family": "LlamaForSequenceClassification",
        "head": "bradley_terry",
        "engine": "torch",
        "dtype": "float32",
        "residual_dtype": "float32",
        "max_length": 2048,
        "closing_token_ids": [2, 201],
        "closing_text": "<|im_end|>",
        "adds_bos": False,
        "step_cut": None,
        "step_separator": None,
        "notice": None,
        "precision": None,
        "prefix_modes": ["open", "closed"],
        "methods": {name: {"available": True, "passes": passes[name], "reason": None} for name in served},
    }


def test_health_and_ready_say_so(server: Server) -> None:
    assert server.get("/health").json() == {"status": "alive"}
    assert server.get("/ready").json() == {"status": "ready", "model": "tiny", "models": ["tiny"]}


def test_metrics_count_requests_samples_and_tokens(api: Api, server: Server) -> None:
    assert server.get("/metrics").headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    before = server.metrics()
    tokens = api.answer([SAMPLE, SAMPLE])["usage"]["forward_tokens"]
    api.refusal([])
    server.get("/a-path-that-nobody-counts")
    after = server.metrics()

    def moved(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert moved('densereward_requests_total{route="/token_rewards",status="200"}') == 1
    assert moved('densereward_requests_total{route="/token_rewards",status="422"}') == 1
    assert moved('densereward_requests_total{route="other",status="404"}') == 1
    assert moved('densereward_request_seconds_count{route="/token_rewards"}') == 2
    assert moved('densereward_samples_total{model="tiny"}') == 2
    assert moved('densereward_forward_tokens_total{model="tiny"}') == tokens
    assert moved("densereward_batch_sequences_sum") == 2
    assert moved("densereward_batch_tokens_sum") + moved("densereward_shared_tokens_total") == tokens
    assert moved("densereward_shared_tokens_total") > 0
    assert moved("densereward_batch_tokens_count") == moved("densereward_forward_seconds_count") > 0
    assert after["densereward_queue_sequences"] == after["densereward_queue_tokens"] == 0
    assert after["densereward_ready"] == 1
    assert not [name for name in after if "nobody" in name]


@pytest.fixture(scope="module")
def openapi(http: httpx.Client) -> Json:
    document: Json = http.get("/openapi.json").json()
    return document


def test_docs_show_the_openapi_document(http: httpx.Client, openapi: Json) -> None:
    page = http.get("/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "/openapi.json" in page.text
    assert openapi["info"]["version"] == __version__
    assert openapi["paths"].keys() == {
        "/token_rewards",
        "/rewards",
        "/get_reward",
        "/classify",
        "/pooling",
        "/v1/methods",
        "/v1/models",
        "/health",
        "/ready",
        "/metrics",
    }


@pytest.mark.parametrize(
    ("path", "request_model", "answer_model"),
    [
        ("/token_rewards", "TokenRewardsRequest", "TokenRewardsResponse"),
        ("/rewards", "RewardsRequest", "RewardsResponse"),
        ("/get_reward", "GetRewardRequest", "GetRewardResponse"),
        ("/classify", "ClassifyRequest", "ClassifyResponse"),
        ("/pooling", "PoolingRequest", "PoolingResponse"),
    ],
)
def test_openapi_documents_bodies_answers_and_errors(
    openapi: Json, path: str, request_model: str, answer_model: str
) -> None:
    operation = openapi["paths"][path]["post"]
    assert _schema(operation["requestBody"]) == {"$ref": f"#/components/schemas/{request_model}"}
    assert operation["requestBody"]["required"]
    assert _schema(operation["responses"].pop("200")) == {"$ref": f"#/components/schemas/{answer_model}"}
    assert operation["responses"].keys() == {"400", "401", "404", "413", "422", "429", "500", "503", "504"}
    for response in operation["responses"].values():
        assert _schema(response) == {"$ref": "#/components/schemas/ErrorBody"}


def _schema(content: Json) -> Any:
    return content["content"]["application/json"]["schema"]


def test_openapi_schemas_are_valid_and_whole(openapi: Json) -> None:
    schemas = openapi["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    references = {reference.removeprefix("#/components/schemas/") for reference in _references(openapi)}
    assert references <= schemas.keys()
    assert {"Sample", "Message", "MethodRequest"} <= references
    assert "response_spans" in schemas["Sample"]["properties"]


def _references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(_references, node.values()))
    return set().union(*map(_references, node)) if isinstance(node, list) else set()


def test_openapi_accepts_what_the_server_accepts_and_answers(openapi: Json, api: Api) -> None:
    def valid(name: str, instance: Json) -> bool:
        schema = {"$ref": f"#/components/schemas/{name}", "components": openapi["components"]}
        return bool(Draft202012Validator(schema).is_valid(instance))

    request: Json = {"samples": [SAMPLE], "methods": ["red", {"name": "abc", "beta": 0.8}], "include": ["tokens"]}
    assert valid("TokenRewardsRequest", request)
    assert not valid("TokenRewardsRequest", request | {"methodz": []})
    assert valid("TokenRewardsResponse", api.answer(**request))
    assert valid("ErrorBody", api.post([]).json())


def test_a_prompt_that_is_too_long_is_shortened_only_when_asked_and_told(api: Api) -> None:
    ids = [10 + i % 7 for i in range(3000)]
    sample = {"prompt_token_ids": ids, "response_token_ids": [10, 11, 12]}
    assert api.refusal([sample])[1]["code"] == "too_long"
    item = api.item(sample, truncate="prompt_left", methods=["red"])
    dropped = item["truncated_prompt_tokens"]
    assert dropped == 3000 + 3 + 2 - 2048
    same = api.item(sample | {"prompt_token_ids": ids[dropped:]}, methods=["red"])
    assert item["reward"] == pytest.approx(same["reward"], abs=1e-5)
    assert item["token_rewards"]["red"] == pytest.approx(same["token_rewards"]["red"], abs=1e-5)
    assert item["warnings"] == [f"truncated: the prompt lost its first {dropped} tokens"]
    assert "truncated_prompt_tokens" not in same
    assert api.item(sample, "/rewards", truncate="prompt_left")["truncated_prompt_tokens"] == dropped
    assert api.refusal([sample], truncate="response_right")[1]["code"] == "invalid_request"
