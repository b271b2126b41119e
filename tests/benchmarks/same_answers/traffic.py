"""Random requests: every route that scores, every method with its parameters, and requests with a fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.benchmarks.same_answers.models import Target
from tests.benchmarks.same_answers.samples import SHORT, Json, Samples

PREFIXES = ["open", "closed"]
PARAMETERS: dict[str, dict[str, list[Any]]] = {
    "red": {"first_token": ["subtract", "zero", "fold"], "prefix_mode": PREFIXES, "stride": [1, 2, 7]},
    "sentence": {"prefix_mode": PREFIXES, "place": ["spread", "last"]},
    "message": {"prefix_mode": PREFIXES, "threshold": [None, 0.0, -0.5, 0.5], "tau": [None, 0.02, 1.0]},
    "segment": {"prefix_mode": PREFIXES, "entropy": [2.0, 0.5], "slope": [0.0, 0.1], "offset": [0.0, -0.3]},
    "abc": {"layers": ["last", [0], [-1, 0], [1, -1]]},
    "contribution": {"layers": ["all", "last", [0, -1], [1]], "rescale": [False, True]},
    "future_attention": {"layers": ["last", [0], [-1, 0]]},
    "attribution": {"weights": ["softmax", "signed"]},
    "occlusion": {"unit": ["sentence", "word", "token"], "absent": ["remove", "blank"]},
    "shapley": {
        "unit": ["sentence", "word", "word", "token"],
        "absent": ["remove", "blank"],
        "within_sentences": [False, True],
        "orders": [2, 3],
        "seed": [0, 1, 99],
    },
    "steps": {"form": ["score", "signed", "difference"], "place": ["last", "spread"]},
    "implicit": {"ratio_scale": [0.05, 1.0], "ratio_clip": [None, 0.05]},
    "contrastive": {"better": ["Be kind.", "Sei nett 😀"], "worse": ["Be short."]},
}
COMMON: dict[str, list[Any]] = {"beta": [0.0, 0.3, 0.8, 1.0], "normalize": [None, 2.0, "running"], "clip": [0.05, 1.0]}
"""Parameters of every method."""

MANY_PASSES = ("occlusion", "shapley")
INCLUDED = ("tokens", "spans", "segments", "prefix_scores", "attention", "objectives")
TEXTUAL = INCLUDED[:3]
"""What a model without open prefix scores can include."""

WRONG: list[Any] = [None, 3, -1, "x", [], {}, True, 1.5, 10**30, [[0]], ["red", "red"]]


@dataclass(frozen=True)
class Request:
    """One HTTP request; `kind` is what it is counted as."""

    kind: str
    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.content.decode(errors='replace')[:400]}"


def posted(path: str, body: Any, kind: str | None = None) -> Request:
    """A request with a JSON body; bytes are sent as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request(kind or path.partition("?")[0], "POST", path, content)


class Traffic:
    """Requests to one target, from a seeded generator."""

    def __init__(self, random: Random, target: Target) -> None:
        self._random = random
        self._target = target
        self._samples = Samples(random, target)
        self._chance = self._samples.chance

    def request(self) -> Request:
        """Any request."""
        whole = 7 if self._target.whole else 1
        routes: dict[Callable[[], Request], int] = {
            self._token_rewards: 60,
            self._rewards: 10,
            self._get_reward: 10,
            self._classify: whole,
            self._pooling: whole,
            self._faulty: 10,
        }
        [route] = self._random.choices([*routes], [*routes.values()])
        return route()

    def _token_rewards(self) -> Request:
        short = self._chance(0.5)
        body = self._asked(min(SHORT, self._target.longest) if short else self._target.longest)
        if self._chance(0.95):
            body["methods"] = self._methods(self._possible(body["samples"], short=short))
        body["include"] = self._include()
        if self._chance(0.3):
            body["encoding_format"] = self._random.choice(["base64", "base64", "float"])
        return posted("/token_rewards", body)

    def _rewards(self) -> Request:
        return posted("/rewards", self._asked(self._target.longest))

    def _asked(self, longest: int) -> Json:
        """What POST /rewards and POST /token_rewards have in common."""
        body: Json = {"samples": self._samples.several(longest)}
        if self._target.model is not None:
            body["model"] = self._target.model
        if self._chance(0.5):
            body["on_error"] = self._random.choice(["item", "item", "request"])
        if self._chance(0.1):
            body["truncate"] = "prompt_left"
            if "prompt" in body["samples"][0]:
                body["samples"][0]["prompt"] = "The quick brown fox. " * 400 + body["samples"][0]["prompt"]
        if self._chance(0.1):
            body["priority"] = self._random.randint(-5, 5)
        if isinstance(self._target.model, list) and self._chance(0.6):
            body["ensemble"] = self._ensemble(self._target.model)
        return body

    def _ensemble(self, models: list[str]) -> Json:
        ensemble: Json = {"how": self._random.choice(["mean", "min", "uncertainty"])}
        if self._chance(0.3):
            ensemble["penalty"] = self._random.choice([0, 0.3, 1000])
        if self._chance(0.5):
            scales = {name: [0.1, 0.5] for name in models}
            ensemble["normalize"] = self._random.choice(["running", scales])
        return ensemble

    def _include(self) -> list[str]:
        if self._target.tokenizer is None:  # an ensemble, which refuses them all
            return [self._random.choice(INCLUDED)] if self._chance(0.05) else []
        limited = (self._target.steps or self._target.closed) and self._chance(0.9)
        names = TEXTUAL if limited else INCLUDED if self._target.objectives else INCLUDED[:-1]
        return [name for name in names if self._chance(0.2)]

    def _possible(self, samples: list[Json], *, short: bool) -> list[str]:
        """The methods that make sense for some samples."""
        without = set() if short else set(MANY_PASSES)
        if not all("weights" in sample for sample in samples) and self._chance(0.9):
            without.add("weights")
        return [name for name in self._target.methods if name not in without]

    def _methods(self, names: list[str]) -> list[Any]:
        """Some methods; one that comes twice gets labels."""
        chosen = self._random.choices(names, k=self._random.choice([1, 1, 2, 3, 4]))
        methods = [self._method(name) for name in chosen]
        return [
            method | {"label": f"{name}.{number}"} if chosen.count(name) > 1 else self._abridged(method)
            for number, (name, method) in enumerate(zip(chosen, methods, strict=True))
        ]

    def _method(self, name: str) -> Json:
        """A method with some of its parameters."""
        own = PARAMETERS.get(name, {})
        params = {each: self._random.choice(values) for each, values in own.items() if self._chance(0.5)}
        share = 0.02 if self._target.tokenizer is None else 0.12
        params |= {each: self._random.choice(values) for each, values in COMMON.items() if self._chance(share)}
        if self._target.closed and "prefix_mode" in own and self._chance(0.9):
            params["prefix_mode"] = "closed"
        return {"name": name} | params

    def _abridged(self, method: Json) -> Any:
        """A method without parameters by its name alone, mostly."""
        return method["name"] if len(method) == 1 and self._chance(0.7) else method

    def _get_reward(self) -> Request:
        pairs = [self._samples.texts(min(300, self._target.longest)) for _ in range(self._random.choice([1, 2, 4]))]
        eos = self._random.choice([None, None, "<|im_end|>", "<|eot_id|>"])
        responses = [response + (eos or "") * self._random.choice([0, 1, 1, 2]) for _, response in pairs]
        body: Json = {
            "query": [prompt + response for (prompt, _), response in zip(pairs, responses, strict=True)],
            "prompts": [prompt for prompt, _ in pairs],
            "labels": ["4"] * len(pairs),
        } | self._named()
        in_url = []
        if eos is not None:
            in_url.append(f"eos={eos.replace('|', '%7C')}")
        elif self._chance(0.3):
            body["finished"] = [self._chance(0.5) for _ in pairs]
        if self._chance(0.2):
            in_url.append("token_rewards=false")
        else:
            if self._chance(0.5) or self._target.tokenizer is None:
                body["response_spans"] = [self._samples.spans(response) for response in responses]
            if self._chance(0.5):
                body["method"] = self._method(self._random.choice([*self._target.methods[:2], "uniform"]))
        return posted("/get_reward" + ("?" + "&".join(in_url) if in_url else ""), body)

    def _named(self) -> Json:
        """The model, where a request to another server's route can name it."""
        return {"model": self._target.model} if isinstance(self._target.model, str) else {}

    def _classify(self) -> Request:
        return posted("/classify", self._whole())

    def _pooling(self) -> Request:
        body = self._whole()
        options = {
            "task": ["classify", "token_classify", "token_classify"],
            "encoding_format": ["float", "base64"],
            "endianness": ["native", "little", "big"],
        }
        body |= {name: self._random.choice(values) for name, values in options.items() if self._chance(0.7)}
        return posted("/pooling", body)

    def _whole(self) -> Json:
        """Texts that hold prompt and response in one."""
        texts: list[Any] = ["".join(self._samples.texts(300)) for _ in range(self._random.choice([1, 2, 5]))]
        if self._target.tokenizer is not None and self._chance(0.3):
            texts = [self._samples.ids(text) for text in texts]
        body: Json = {"input": texts[0] if self._chance(0.3) else texts}
        if self._target.dialogues and self._chance(0.25):
            answer = {"role": "assistant", "content": self._samples.text(200)}
            body = {"messages": [*self._samples.messages(), answer]}
        body |= self._named()
        if self._chance(0.3):
            body["add_special_tokens"] = self._chance(0.5)
        if self._chance(0.2):
            body |= {"request_id": "mine", "user": "me", "padding": "do_not_pad", "dimensions": None}
        return body

    def _faulty(self) -> Request:
        """A request that was cut, or has one value too many, too few, or of another kind."""
        routes = [self._token_rewards, self._token_rewards, self._rewards, self._get_reward, self._classify]
        good = self._random.choice(routes)()
        if self._chance(0.15):
            return posted(good.path, good.content[: self._random.randrange(len(good.content))], "faulty")
        content = json.loads(good.content)
        where, key = self._random.choice(list(_places(content)))
        if self._chance(0.2):
            del where[key]
        elif self._chance(0.15) and isinstance(where, dict):
            where["unknown"] = self._random.choice(WRONG)
        else:
            where[key] = self._random.choice(WRONG)
        return posted(good.path, content, "faulty")


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Where values stand in a JSON document: what holds each, and its key; of lists the first three."""
    keys = [*content] if isinstance(content, dict) else range(len(content[:3])) if isinstance(content, list) else []
    for key in keys:
        yield content, key
        yield from _places(content[key])
