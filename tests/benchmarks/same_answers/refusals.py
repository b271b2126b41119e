"""Requests that are refused, for each server: every error code that a request can get, and some ways to each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.benchmarks.same_answers.models import KEY, POISON
from tests.benchmarks.same_answers.samples import Json
from tests.benchmarks.same_answers.traffic import Request, posted

GOOD: Json = {"prompt": "Why?", "response": "hello"}
TEXT: Json = {"messages": [{"role": "user", "content": "How was it?"}], "response": "The food was good 😀."}
IDS: Json = {"prompt_token_ids": [5, 6], "response_token_ids": [20, 30]}


def requests(server: str) -> Iterator[Request]:
    """What is sent to a server beside random requests."""
    for path in ("/v1/models", "/v1/methods", "/ready", "/health"):
        yield Request(path, "GET", path)
    yield from {
        "one": _one,
        "several": _several,
        "steps": _steps,
        "architectures": _architectures,
        "tokenizers": _tokenizers,
    }[server]()


def _refused(body: Any, path: str = "/token_rewards") -> Request:
    return posted(path, body, "refused")


def _asked(sample: Any, path: str = "/token_rewards", **more: Any) -> Request:
    return _refused({"samples": [sample]} | more, path)


def _without(*names: str, **more: Any) -> Json:
    return {name: value for name, value in (GOOD | more).items() if name not in names}


BAD_SAMPLES: list[Any] = [
    _without("prompt"),
    GOOD | {"messages": [], "prompt_token_ids": []},
    _without("response"),
    GOOD | {"response_token_ids": [5]},
    GOOD | {"respnse": "x"},
    _without("response", response_token_ids=[5, "6"]),
    _without("response", response_token_ids="abc"),
    "hello",
    None,
    {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5},
    GOOD | {"response_mask": [1, 0, 1, 1]},
    GOOD | {"response_mask": [1] * 5, "response_spans": [[0, 2], [2, 5]]},
    GOOD | {"weights": [1.0]},
    GOOD | {"token_entropies": [0.5] * 9},
    GOOD | {"response_mask": [0] * 5},
    GOOD | {"response_mask": [1, 1, 2, 1, 1]},
    GOOD | {"finished": 1},
    _without("prompt", prompt_token_ids=[5, 320]),
    _without("prompt", prompt_token_ids=[10**40]),
    _without("response", response_token_ids=[5, -1]),
    _without("prompt", prompt_token_ids=[5] * 2042),
    *(GOOD | {"response_spans": spans} for spans in ([[2, 4], [0, 2]], [[0, 3], [2, 5]], [[3, 2]], [[2, 6]], [])),
    GOOD | {"response_spans": [[-1, 5]]},
    GOOD | {"response_spans": [[0, 1, 2]]},
    _without("response", response_token_ids=[5], response_spans=[[0, 5]]),
    _without("prompt", messages=[{"role": "critic", "content": "x"}]),
    _without("prompt", messages=[{"role": "user"}]),
    {"prompt": "", "response": "", "finished": False},
    GOOD | {"response": POISON, "id": "poisoned"},
]
BAD_METHODS: list[Any] = [
    ["redd"],
    ["red", "red"],
    ["red", {"name": "abc", "label": "red"}],
    [{"name": "red", "bta": 1}],
    [{"name": "abc", "beta": 1.5}],
    [{"name": "abc", "layers": [0, 0]}],
    [{"name": "abc", "layers": [3]}],
    [{"name": "segment", "offset": 1e308}],
    [],
    "red",
    [{"beta": 1}],
    ["weights"],
    ["steps"],
    ["implicit"],
    ["contrastive", "red"],
]
BAD_BODIES: list[Any] = [
    {},
    {"samples": []},
    {"samples": {"0": GOOD}},
    [],
    None,
    3,
    "samples",
    {"samples": [GOOD], "sampels": []},
    {"samples": [GOOD], "on_error": "skip"},
    {"samples": [GOOD], "model": 3},
    {"samples": [GOOD], "include": ["all"]},
    {"samples": [GOOD], "truncate": "left"},
    {"samples": [GOOD], "priority": 1001},
    {"samples": [GOOD], "encoding_format": "bytes"},
]
BAD_QUERIES: list[Json] = [
    {"prompts": ["Why?"]},
    {"prompts": ["Why?", "Who?"]},
    {"finished": [True]},
    {"response_spans": [[[0, 1]], [[0, 9]]]},
    {"query": []},
    {"query": [3, 4]},
    {"token_rewards": False, "method": "red"},
    {"eos": "</s>", "finished": [True, True]},
    {"eos": ""},
    {"method": "magic"},
    {"method": "weights"},
    {"query": ["Why?" + POISON, "Why?"]},
    {"query": ["Why? " + "word " * 2000, "Why?"]},
    {"model": "other"},
]
BAD_INPUTS: list[Any] = [[5, 320], [5] * 3000, "", POISON, [], [[]], [5, 6.0], None, 3]
BAD_WHOLES: list[Json] = [
    {},
    {"input": "x", "messages": TEXT["messages"]},
    {"messages": []},
    {"input": ["x"] * 65},
    {"input": "Why?", "use_activation": True},
    {"input": "Why?", "dimensions": 1},
    {"input": "Why?", "padding": "longest"},
    {"input": "Why?", "activatoin": 1},
    {"input": "Why?", "task": "embed"},
    {"input": "Why?", "endianness": "middle"},
    {"input": "Why?", "encoding_format": "bytes"},
]
BOTH = ["one", "two"]
BAD_ENSEMBLES: list[Json] = [
    {"model": ["one", "three"]},
    {"model": ["one", "one"]},
    {"model": ["one"]},
    {"model": "one", "ensemble": {"how": "min"}},
    {"model": "safe", "ensemble": {"how": "mean"}},
    {"model": "safe", "methods": ["implicit"]},
    {"model": BOTH, "ensemble": {"how": "most"}},
    {"model": BOTH, "ensemble": {"normalize": {"one": [0, 1]}}},
    {"model": BOTH, "ensemble": {"normalize": "running"}},
    {"model": BOTH, "include": ["tokens"]},
    {"model": BOTH, "methods": [{"name": "red", "clip": 1}]},
    {"model": ["one", "pair"], "methods": ["implicit"]},
    {"model": "pair", "methods": ["abc"]},
    {"methods": ["implicit", "implicit"]},
    {"methods": [{"name": "contrastive", "better": ""}]},
]
NO_STEPS: list[Json] = [
    {"response": " \n\n "},
    {"response": "a<extra_0>b"},
    {"response_token_ids": [200, 240]},
    {"response_token_ids": []},
    {"response_token_ids": [2]},
    {"response_token_ids": [320]},
]
LACKING: list[Json] = [
    {"methods": ["red"]},
    {"methods": ["contribution"]},
    {"methods": ["occlusion"]},
    {"include": ["attention", "prefix_scores"]},
]


def _one() -> Iterator[Request]:
    yield _asked(GOOD, methods=[{"name": "red", "normalize": "running"}])  # before there were rewards enough
    for sample in BAD_SAMPLES:
        yield _refused({"samples": [GOOD, sample, GOOD | {"id": "last"}]})
    yield _refused({"samples": BAD_SAMPLES, "on_error": "item"})
    yield _refused({"samples": BAD_SAMPLES, "on_error": "item"}, "/rewards")
    for methods in BAD_METHODS:
        yield _asked(GOOD, methods=methods)
    yield _asked(GOOD | {"response": POISON}, methods=["contribution"])
    for weights in ([0.0] * 5, [2.0, -1.0, 1.0, 1.0, 1.0], [1e308] * 5):
        yield _asked(GOOD | {"weights": weights}, methods=["weights"])
    for response, method in (("a " * 600, "occlusion"), ("word " * 120, {"name": "shapley", "orders": 1000})):
        yield _asked(GOOD | {"response": response}, methods=[method])
    yield _asked({"prompt": "", "response": "Yes", "finished": False}, methods=["occlusion"])
    yield _asked(IDS | {"response_token_ids": [20]}, methods=["future_attention"])  # served, with a warning
    yield _asked({"prompt": "", "response": "Yes"}, methods=["red"])  # the same
    many = [GOOD | {"response": "word " * 120}] * 40
    yield _refused({"samples": many, "methods": [{"name": "shapley", "orders": 30}]})
    yield from _bodies()
    yield from _foreign()


def _bodies() -> Iterator[Request]:
    """Bodies, keys and routes that are wrong whatever the samples."""
    for body in BAD_BODIES:
        yield _refused(body)
    for text in (b'{"samples": [', b"", b"{]", b"\xff\xfe", b'{"samples": [{"prompt": NaN}]}', b"[" * 10_000):
        yield _refused(text)
    yield _asked(GOOD, "/rewards", methods=["red"])
    yield _asked(GOOD, model="other")
    yield _asked(GOOD, ensemble={"how": "min"})
    yield _refused({"samples": [GOOD] * 65})
    yield _refused(json.dumps({"samples": [GOOD]}).encode() + b" " * 400_000)
    for key in ("", "Bearer", "Bearer wrong", f"Basic {KEY}"):
        yield Request("refused", "POST", "/rewards", b"not even JSON", {"Authorization": key})
    for method, path in (("GET", "/nothing"), ("POST", "/v1"), ("GET", "/token_rewards"), ("DELETE", "/v1/models")):
        yield Request("refused", method, path)


def _foreign() -> Iterator[Request]:
    """Other servers' routes."""
    asked = {"query": ["Why? hello", "Why? no"], "prompts": ["Why?", "Why?"], "labels": ["4", "4"]}
    for more in BAD_QUERIES:
        yield _refused(asked | more, "/get_reward")
    for address in ("?method=red&method=abc", "?methd=red", "?token_rewards=perhaps", "?token_rewards=false"):
        yield _refused(asked, "/get_reward" + address)
    for path in ("/classify", "/pooling"):
        for bad in BAD_INPUTS:
            yield _refused({"input": ["Why?", bad]}, path)
        for body in BAD_WHOLES:
            yield _refused(body, path)


def _several() -> Iterator[Request]:
    """Ensembles and pairs that cannot be."""
    for more in BAD_ENSEMBLES:
        yield _asked(TEXT, **more)
    for model in (BOTH, "with_pair", ["bare", "one"], ["two", "bare"]):
        yield _refused({"samples": [TEXT, IDS, GOOD], "model": model, "on_error": "item"})
        yield _asked(IDS, model=model)
    yield _asked({"prompt": "", "response": "Yes"}, model="pair")
    yield _asked(GOOD | {"prompt": "<|bos|><|bos|>Why?"}, model="two")  # served, with a warning, as the next one is
    yield _asked(GOOD, model=BOTH, ensemble={"how": "uncertainty", "penalty": 1000})
    yield _asked({"prompt": "Well?\n", "response": "Yes"}, methods=["contrastive"])
    yield _asked(IDS, methods=["implicit"])
    yield _asked(TEXT, model="bare")
    for model in ("safe", "pair"):
        yield _refused({"input": "Why?", "model": model}, "/classify")
    yield _refused({"query": ["Why? hello"], "prompts": ["Why?"], "model": "safe"}, "/get_reward")


def _steps() -> Iterator[Request]:
    """Responses without steps, or with separators of their own."""
    dialogue = {"messages": TEXT["messages"]}
    for response in NO_STEPS:
        yield _asked(dialogue | response, model="trl")
        yield _asked(dialogue | response, model="process")
    for more in LACKING:
        yield _asked(TEXT, **more)
    yield _refused({"input": "Why?"}, "/pooling")


def _architectures() -> Iterator[Request]:
    """What gates, frames and judges of tokens refuse."""
    yield _asked(GOOD, model="armo")
    yield _refused({"input": "Why?", "model": "armo"}, "/classify")
    for more in LACKING:
        yield _asked(GOOD, model="encoder", **more)
        yield _asked(TEXT, model="bloom", **more)
        yield _asked(TEXT, model="tokens", **more)
    yield _asked(TEXT, model="encoder", methods=["sparse"])
    yield _asked(IDS, model="encoder", methods=["sparse"])
    yield _asked(GOOD | {"response": "good " * 200}, model="encoder", methods=["sparse"])
    yield _asked(TEXT | {"response": ""}, model="named")
    yield _asked(TEXT, model="gemma2", include=["objectives"])


def _tokenizers() -> Iterator[Request]:
    """Dialogues that templates refuse, ids whose bytes cannot be known, a tokenizer without a token for a blank."""
    turns = [{"role": "system", "content": "Be brief."}, *TEXT["messages"]]
    for model in ("gemma", "llama_2"):
        yield _asked(TEXT | {"messages": turns}, model=model)
        yield _asked(TEXT | {"messages": turns[1:] * 2}, model=model)
    for model in ("bert", "mon", "qwen"):
        prompt = [101, 2000, 102] if model == "bert" else [5, 6]
        for method in ("sentence", {"name": "occlusion", "absent": "blank"}, {"name": "occlusion", "unit": "token"}):
            sample = {"prompt_token_ids": prompt, "response_token_ids": [3000, 100, 4000]}
            yield _asked(sample, model=model, methods=[method])
            yield _asked(GOOD, model=model, methods=[method, {"name": "shapley", "absent": "blank"}])
    yield _asked({"prompt_token_ids": [101, 2000, 102], "response_token_ids": [100, 3000]}, model=["bert", "mon"])
