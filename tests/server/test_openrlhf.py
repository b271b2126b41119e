"""POST /get_reward: what OpenRLHF sends and reads, against the server's own routes on the same texts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

import tiny
from serving import STEP, Api, Json, Server, refusal, serving

PROMPT = "<|im_start|>user\nHow was it?<|im_end|>\n<|im_start|>assistant\n"
RESPONSES = ["The food was good 😀.", "Thank you<|im_end|>", "So-so.<|im_end|>\n", "", "A café in Zürich."]
SAMPLES: list[Json] = [{"prompt": PROMPT, "response": response} for response in RESPONSES]


def asked(responses: list[str] = RESPONSES, **more: Any) -> Json:
    """As OpenRLHF writes it."""
    query = [PROMPT + response for response in responses]
    return {"query": query, "prompts": [PROMPT] * len(query), "labels": ["4"] * len(query)} | more


def got(http: httpx.Client, url: str = "/get_reward", **request: Any) -> Json:
    response = http.post(url, json=request)
    assert response.status_code == 200, response.text
    content: Json = response.json()
    return content


def flat(spans: list[list[int]]) -> list[int]:
    return [offset for span in spans for offset in span]


def test_rewards_are_one_number_a_query_and_equal_those_of_the_rewards_route(http: httpx.Client, api: Api) -> None:
    content = got(http, **asked())
    expected = [item["reward"] for item in api.items(SAMPLES, "/rewards")]
    assert content["rewards"] == pytest.approx(expected, abs=1e-5)
    assert content["scores"] == content["rewards"]
    assert all(type(reward) is float for reward in content["rewards"])


def test_token_rewards_are_those_of_the_default_method_on_the_reward_models_tokens(
    http: httpx.Client, api: Api
) -> None:
    content = got(http, **asked())
    logs = content["extra_logs"]
    items = api.items(SAMPLES, include=["spans"])
    assert logs.keys() == {"token_rewards", "baseline", "token_spans"}
    for i, item in enumerate(items):
        assert logs["token_rewards"][i] == pytest.approx(item["token_rewards"]["red"], abs=STEP)
        assert logs["baseline"][i] == pytest.approx(item["baseline"]["red"], abs=STEP)
        assert logs["token_spans"][i] == flat(item["spans"])
        assert sum(logs["token_rewards"][i]) + logs["baseline"][i] == pytest.approx(content["rewards"][i], abs=1e-5)
    assert content["warnings"] == [item["warnings"] for item in items]


def test_a_trainer_that_says_where_its_tokens_are_gets_token_rewards_on_them(http: httpx.Client, api: Api) -> None:
    spans = [[[0, 3], [3, 15], [15, 23]], [[0, 9], [9, 19]]]
    method = {"name": "abc", "beta": 0.5}
    logs = got(http, **asked(RESPONSES[:2], response_spans=spans, method=method))["extra_logs"]
    samples = [sample | {"response_spans": own} for sample, own in zip(SAMPLES, spans, strict=False)]
    items = api.items(samples, methods=[method])
    assert logs.keys() == {"token_rewards", "baseline"}
    assert [len(each) for each in logs["token_rewards"]] == [3, 2]
    for rewards, item in zip(logs["token_rewards"], items, strict=True):
        assert rewards == pytest.approx(item["token_rewards"]["abc"], abs=STEP)


@pytest.mark.parametrize("response", ["Thank you", "Thank you<|im_end|>", "Thank you<|im_end|>\n"])
def test_an_end_of_the_policys_that_closes_the_response_is_not_written_twice(
    http: httpx.Client, api: Api, response: str
) -> None:
    once = api.item({"prompt": PROMPT, "response": "Thank you<|im_end|>\n", "finished": False}, "/rewards")
    assert got(http, **asked([response]))["rewards"] == pytest.approx([once["reward"]], abs=1e-5)


def test_a_response_that_was_cut_by_length_is_scored_open_where_the_trainer_says_so(
    http: httpx.Client, api: Api
) -> None:
    content = got(http, **asked(RESPONSES[:2], finished=[False, True]))
    samples = [SAMPLES[0] | {"finished": False}, SAMPLES[1]]
    expected = [item["reward"] for item in api.items(samples, "/rewards")]
    assert content["rewards"] == pytest.approx(expected, abs=1e-5)
    assert content["rewards"][0] != pytest.approx(got(http, **asked(RESPONSES[:1]))["rewards"][0], abs=1e-4)


@pytest.mark.parametrize("in_url", [True, False])
def test_a_response_without_the_policys_end_of_sequence_was_cut_by_length(http: httpx.Client, in_url: bool) -> None:
    end = "<|im_end|>"
    url = str(httpx.URL("/get_reward", params={"eos": end})) if in_url else "/get_reward"
    content = got(http, url, **asked(RESPONSES[:2], **({} if in_url else {"eos": end})))
    assert content["rewards"] == pytest.approx(got(http, **asked(RESPONSES[:2], finished=[False, True]))["rewards"])


def test_an_empty_prompt_is_an_empty_prompt(http: httpx.Client, api: Api) -> None:
    content = got(http, query=[PROMPT, "Thank you"], prompts=["", ""])
    items = api.items([{"prompt": "", "response": PROMPT}, {"prompt": "", "response": "Thank you"}], include=["spans"])
    assert content["rewards"] == pytest.approx([item["reward"] for item in items], abs=1e-5)
    assert content["extra_logs"]["token_spans"] == [flat(item["spans"]) for item in items]


def test_a_query_that_is_its_prompt_has_an_empty_response(http: httpx.Client, api: Api) -> None:
    """An end of sequence that closes the prompt is the prompt's."""
    prompt = PROMPT + "<|im_end|>"
    content = got(http, query=[prompt], prompts=[prompt], eos="<|im_end|>")
    item = api.item({"prompt": prompt, "response": "", "finished": False})
    assert content["rewards"] == pytest.approx([item["reward"]], abs=1e-5)
    assert content["extra_logs"]["token_rewards"] == [[]]


def test_the_url_says_what_a_trainers_body_cannot(http: httpx.Client, api: Api) -> None:
    bare = got(http, "/get_reward?token_rewards=false", **asked())
    assert bare["extra_logs"] == {}
    assert bare["rewards"] == pytest.approx(got(http, **asked())["rewards"], abs=1e-5)
    uniform = got(http, "/get_reward?method=uniform&model=tiny", **asked())
    expected = [item["token_rewards"]["uniform"] for item in api.items(SAMPLES, methods=["uniform"])]
    assert uniform["extra_logs"]["token_rewards"] == [pytest.approx(each, abs=STEP) for each in expected]


def test_the_body_holds_where_the_url_says_otherwise(http: httpx.Client) -> None:
    content = got(http, "/get_reward?method=uniform&token_rewards=false", **asked(method="sparse", token_rewards=True))
    assert content["extra_logs"]["token_rewards"][0][:-1] == [0.0] * (
        len(content["extra_logs"]["token_rewards"][0]) - 1
    )


def test_many_queries_are_answered_in_their_order(http: httpx.Client, api: Api) -> None:
    responses = [f"Thank you {i} times" for i in range(64)]
    content = got(http, **asked(responses))
    items = api.items([{"prompt": PROMPT, "response": each} for each in responses], "/rewards")
    assert content["rewards"] == pytest.approx([item["reward"] for item in items], abs=1e-5)
    assert len(content["extra_logs"]["token_rewards"]) == 64


def test_every_list_pads_into_a_batch_as_the_trainer_pads(http: httpx.Client) -> None:
    """It makes a tensor of each value, pads the last axis, and joins the first ones: lists of pairs would not fit."""
    answers = [got(http, **asked([response])) for response in RESPONSES]
    for name in ("token_rewards", "baseline", "token_spans"):
        tensors = [torch.tensor([each["extra_logs"][name]]) for each in answers]
        longest = max(tensor.size(-1) for tensor in tensors)
        padded = [torch.nn.functional.pad(tensor, (0, longest - tensor.size(-1))) for tensor in tensors]
        assert torch.cat(padded).shape[0] == len(RESPONSES)
    assert all(torch.tensor([each["rewards"]]).shape == (1, 1) for each in answers)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_query_that_does_not_begin_with_its_prompt_is_refused_by_its_index(http: httpx.Client) -> None:
    request = asked()
    request["prompts"][2] = PROMPT + "x"
    status, error = refusal(http.post("/get_reward", json=request))
    assert (status, error["code"], error["details"]) == (422, "prompt_mismatch", {"field": "query", "index": 2})
    assert error["message"].startswith("query[2] does not begin with prompts[2]")


@pytest.mark.parametrize(
    ("more", "code", "field"),
    [
        ({"prompts": [PROMPT]}, "length_mismatch", "prompts"),
        ({"finished": [True]}, "length_mismatch", "finished"),
        ({"response_spans": [[[0, 1]]]}, "length_mismatch", "response_spans"),
        ({"query": []}, "invalid_request", "query"),
        ({"query": "text"}, "invalid_request", "query"),
        ({"query": [3] * len(RESPONSES)}, "invalid_request", "query"),
        ({"prompts": None}, "invalid_request", "prompts"),
        ({"token_reward": True}, "invalid_request", "token_reward"),
        ({"token_rewards": False, "method": "red"}, "invalid_request", "method"),
        ({"token_rewards": False, "response_spans": [[]] * len(RESPONSES)}, "invalid_request", "response_spans"),
        ({"eos": "</s>", "finished": [True] * len(RESPONSES)}, "invalid_request", "eos"),
        ({"eos": ""}, "invalid_request", "eos"),
        ({"method": "magic"}, "unknown_method", "methods"),
        ({"method": "weights"}, "missing_weights", None),
    ],
)
def test_what_cannot_be_answered_is_refused_by_its_name(http: httpx.Client, more: Json, code: str, field: Any) -> None:
    status, error = refusal(http.post("/get_reward", json=asked() | more))
    assert (status, error["code"], error["details"].get("field")) == (422, code, field)


def test_a_bad_query_is_named_as_the_request_names_it(http: httpx.Client, poison: str) -> None:
    status, error = refusal(http.post("/get_reward", json=asked([RESPONSES[0], "word " * 2000])))
    assert (status, error["code"], error["details"]["index"]) == (422, "too_long", 1)
    assert error["message"].startswith("query[1]: ")
    status, error = refusal(http.post("/get_reward", json=asked([poison])))
    assert (status, error["code"]) == (500, "not_finite")
    assert error["message"].startswith("query[0]: ")


@pytest.mark.parametrize("name", ["model", "method", "eos", "token_rewards"])
def test_a_url_that_says_a_thing_twice_is_refused_by_its_name(http: httpx.Client, name: str) -> None:
    status, error = refusal(http.post(f"/get_reward?{name}=a&{name}=b", json=asked()))
    assert (status, error["code"], error["details"]) == (422, "invalid_request", {"field": name})
    assert error["message"] == f"{name} stands in the URL 2 times; give it once"


@pytest.mark.parametrize("url", ["/get_reward?methd=red", "/get_reward?token_rewards=perhaps"])
def test_a_url_that_says_something_else_is_refused(http: httpx.Client, url: str) -> None:
    assert refusal(http.post(url, json=asked()))[0] == 422


def test_an_unknown_model_is_a_404_and_a_body_that_is_not_json_a_400(http: httpx.Client) -> None:
    assert refusal(http.post("/get_reward", json=asked(model="other")))[0] == 404
    assert refusal(http.post("/get_reward", content=b'{"query": ['))[0] == 400


def test_the_key_and_the_limits_are_those_of_every_scoring_route(server: Server, http: httpx.Client) -> None:
    assert refusal(httpx.post(server.url + "/get_reward", json=asked(), trust_env=False))[0] == 401
    assert refusal(http.post("/get_reward", json=asked(["x"] * 65)))[0] == 413
    assert refusal(http.post("/get_reward", json=asked(["x" * 400_000])))[0] == 413
    assert any('route="/get_reward"' in name and 'status="401"' in name for name in server.metrics())


# --- other models, and the trainer itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Two models, their ensemble, one that closes no response, and one that judges steps; no key."""
    folder = tmp_path_factory.mktemp("others")
    models = ["--model", f"one={tiny.save(folder / 'one')}", "--model", f"two={tiny.save(folder / 'two', 'qwen3')}"]
    models += ["--model", f"bare={tiny.save(folder / 'bare')}"]
    tiny.make_tokenizer(template=None).save_pretrained(folder / "bare")
    (folder / "bare" / "chat_template.jinja").unlink()
    judge = ["--model", f"judge={tiny.save_judge(folder / 'judge')}", "--step-separator", r"\n\n"]
    flags = ["--device", "cpu", *models, *judge, "--ensemble", "both=one+two:min"]
    with serving(folder / "log", *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        yield Api(http)


def test_a_model_that_judges_steps_answers_by_its_own_default(others: Api) -> None:
    sample: Json = {"prompt": PROMPT, "response": "One.\n\nTwo."}
    logs = got(others.http, **asked([sample["response"]], model="judge"))["extra_logs"]
    expected = others.item(sample, model="judge")["token_rewards"]["steps"]
    assert logs["token_rewards"] == [pytest.approx(expected, abs=STEP)]


def test_an_ensemble_answers_on_the_policys_tokens_or_with_its_reward_alone(others: Api) -> None:
    status, error = refusal(others.http.post("/get_reward", json=asked(RESPONSES[:1], model="both")))
    assert (status, error["code"], error["details"]["field"]) == (422, "invalid_ensemble", "response_spans")
    expected = others.item(SAMPLES[0], "/rewards", model="both")["reward"]
    spans = [[[0, 9], [9, 23]]]
    for more in ({"token_rewards": False}, {"response_spans": spans}):
        content = got(others.http, **asked(RESPONSES[:1], model="both", **more))
        assert content["rewards"] == pytest.approx([expected], abs=1e-5)
    assert len(content["extra_logs"]["token_rewards"][0]) == 2


EOS = "<|eot_id|>"
"""No token of the models'."""
OWN = "<|im_end|>"
CLOSING = {"one": "<|im_end|>\n", "both": "<|im_end|>\n", "bare": ""}


def summed(content: Json) -> list[float]:
    logs = content["extra_logs"]
    return [sum(own) + left for own, left in zip(logs["token_rewards"], logs["baseline"], strict=True)]


@pytest.mark.parametrize("model", ["one", "bare"])
@pytest.mark.parametrize("times", [1, 3])
def test_the_policys_end_is_left_out_where_the_model_has_another(others: Api, model: str, times: int) -> None:
    content = got(others.http, **asked(["Good" + EOS * times, "Good"], model=model, eos=EOS))
    items = others.items(
        [
            {"prompt": PROMPT, "response": "Good"},
            {"prompt": PROMPT, "response": "Good", "finished": False},
        ],
        include=["spans"],
        model=model,
    )
    assert content["rewards"] == pytest.approx([item["reward"] for item in items], abs=1e-5)
    assert summed(content) == pytest.approx(content["rewards"], abs=1e-5)
    for i, item in enumerate(items):
        assert content["extra_logs"]["token_rewards"][i] == pytest.approx(item["token_rewards"]["red"], abs=STEP)
        assert content["extra_logs"]["token_spans"][i] == flat(item["spans"])


@pytest.mark.parametrize("model", ["one", "bare", "both"])
@pytest.mark.parametrize("eos", [EOS, OWN])
@pytest.mark.parametrize("times", [1, 3])
def test_the_first_end_of_the_policys_has_the_reward_of_the_models_own(
    others: Api, model: str, eos: str, times: int
) -> None:
    size = len(eos)
    ends = [[4 + size * i, 4 + size * (i + 1)] for i in range(times)]
    content = got(
        others.http,
        **asked(["Good" + eos * times], model=model, eos=eos, response_spans=[[[0, 2], [2, 4], *ends]], method="red"),
    )
    after = 4 + len(CLOSING[model])
    spans = [[0, 2], [2, 4], [4, after], *[[after, after]] * (times - 1)]
    expected = others.item(
        {"prompt": PROMPT, "response": "Good" + CLOSING[model], "response_spans": spans}, methods=["red"], model=model
    )
    assert content["rewards"] == pytest.approx([expected["reward"]], abs=1e-5)
    [rewards] = content["extra_logs"]["token_rewards"]
    assert rewards == pytest.approx(expected["token_rewards"]["red"], abs=STEP)
    assert not any(rewards[3:])
    assert summed(content) == pytest.approx(content["rewards"], abs=1e-5)


@pytest.mark.parametrize("token_rewards", [True, False])
def test_an_end_that_is_the_models_own_changes_nothing(others: Api, token_rewards: bool) -> None:
    request = asked(["Thank you" + OWN], model="one", token_rewards=token_rewards)
    plain, with_eos = got(others.http, **request), got(others.http, **request, eos=OWN)
    assert with_eos["rewards"] == pytest.approx(plain["rewards"], abs=1e-5)
    assert with_eos["extra_logs"].get("token_spans") == plain["extra_logs"].get("token_spans")


@pytest.mark.parametrize(
    "spans", [[[0, 14]], [[0, 3], [3, 14]], [[0, 3], [3, 7], [7, 14]], [[0, 4]], [[0, 4], [14, 14]], [[0, 2]]]
)
@pytest.mark.parametrize("model", ["one", "bare"])
def test_spans_that_hold_more_or_less_than_the_end_keep_the_sum(others: Api, model: str, spans: list[Any]) -> None:
    content = got(others.http, **asked(["Good" + EOS], model=model, eos=EOS, response_spans=[spans]))
    expected = others.item({"prompt": PROMPT, "response": "Good"}, "/rewards", model=model)["reward"]
    assert content["rewards"] == pytest.approx([expected], abs=1e-5)
    assert summed(content) == pytest.approx([expected], abs=1e-5)
    assert len(content["extra_logs"]["token_rewards"][0]) == len(spans)


@pytest.mark.parametrize("spans", [[[0, 15]], [[0, 4], [4, 15]], [[0, 4], [14, 4]], [[0, 4], [3, 14]], []])
def test_spans_that_are_wrong_in_what_was_sent_are_refused(others: Api, spans: list[Any]) -> None:
    request = asked(["Good" + EOS], model="one", eos=EOS, response_spans=[spans])
    status, error = refusal(others.http.post("/get_reward", json=request))
    assert (status, error["code"], error["details"]["index"]) == (422, "invalid_spans", 0)


def test_openrlhfs_own_executor_reads_the_answer(others: Api) -> None:
    """With `pip install aiohttp pylatexenc` and `pip install --no-deps openrlhf==0.11.2`."""
    agent = pytest.importorskip("openrlhf.utils.agent")
    tokenizer = tiny.make_tokenizer()
    answer = tokenizer.encode("Thank you<|im_end|>")

    async def generate(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer, finish_reason="stop", logprobs=None)])

    url = f"{others.http.base_url}/get_reward?token_rewards=false".replace("//get", "/get")
    executor = agent.SingleTurnAgentExecutor(url)
    sampling = SimpleNamespace(max_tokens=64, logprobs=None)
    engine = SimpleNamespace(generate=generate)
    found = asyncio.run(executor.execute(PROMPT, "4", sampling, 2048, tokenizer, engine))
    expected = others.item(SAMPLES[1], "/rewards")["reward"]
    assert found["reward"] == found["scores"] == pytest.approx([expected], abs=1e-5)
    assert found["extra_logs"] == {}
