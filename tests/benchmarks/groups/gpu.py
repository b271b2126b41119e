"""The engine on a GPU: how near it is to the matrix rate, and what sharing, closing and long sequences cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from densereward.capture import ScoringInput
from densereward.engines import ENGINES
from densereward.engines.base import Engine
from densereward.engines.torch.engine import TorchEngine
from tests.benchmarks.contestants import closed_prefixes, one_by_one, sequence_rewards, token_rewards
from tests.benchmarks.floor import MatrixProducts, model_flops
from tests.benchmarks.harness import Contestant, Figure, Group, Numbers, Reading, Seconds, difference
from tests.benchmarks.work import Work, log_normal_lengths, made_up, random_ids

_CLOSING = (3, 4, 5)
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Scale:
    """How much is measured, in tokens; `group` counts responses."""

    batch: int
    mean: int
    longest: int
    long: int
    group: int
    prompt: int
    response: int


FULL = Scale(batch=16384, mean=512, longest=4096, long=32768, group=8, prompt=2048, response=256)
TINY = Scale(batch=256, mean=32, longest=64, long=512, group=3, prompt=32, response=8)


@dataclass(frozen=True)
class Model:
    """One model, its engine, and how much of what to do with it."""

    model: Any
    engine: TorchEngine
    scale: Scale
    rounds: int
    resources: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.engine.facts = replace(self.engine.facts, batch_tokens=2**40)  # each list is one pass

    @property
    def batch(self) -> list[ScoringInput]:
        """Log-normal lengths that fill a pass; a quarter of each is the prompt."""
        scale = self.scale
        lengths = log_normal_lengths(scale.batch // scale.mean, scale.mean, scale.longest)
        return [self.sequence(each // 4, each - each // 4, seed) for seed, each in enumerate(lengths)]

    def sequence(self, prompt: int, response: int, seed: int, prompt_seed: int | None = None) -> ScoringInput:
        """Made-up ids."""
        vocabulary = self.engine.facts.vocabulary_size
        start = made_up(prompt, seed if prompt_seed is None else prompt_seed, vocabulary)
        return random_ids(start, response, seed + 1000, vocabulary)

    def floor(self, lengths: Sequence[int]) -> tuple[MatrixProducts, float]:
        """A contestant of plain products, and what share of the model's arithmetic it does."""
        config, flops = self.model.config, model_flops(self.model, lengths)
        like = torch.empty(0, device=self.model.device, dtype=self.model.dtype)
        products = MatrixProducts.fastest(config.hidden_size, config.intermediate_size, flops, like)
        return products, flops / products.flops


def packed(model: Model) -> Group:
    """A full pass: its share of the matrix rate, and what token rewards cost on top of the score."""
    return _near_the_floor(model, model.batch, "a packed batch")


def long(model: Model) -> Group:
    """One very long sequence, with its peak memory."""
    length = model.scale.long
    sequence = model.sequence(length // 4, length - length // 4, seed=0)
    group = _near_the_floor(model, [sequence], f"T = {length}")
    peaks = [_peak(partial(token_rewards, model.engine, [sequence]))] if torch.cuda.is_available() else []
    memory = Reading(f"peak memory beside the model, T = {length}", peaks, "MB")
    return replace(group, readings=lambda seconds: [*group.readings(seconds), memory])


def drift(model: Model) -> Group:
    """The same samples together and each by itself: a sample's numbers should not depend on its neighbours."""
    sequences = model.batch
    found: dict[str, Numbers] = {}

    def kept(name: str, run: Contestant) -> Numbers:
        found[name] = run()
        return {}

    ways: dict[str, Contestant] = {
        "together": partial(token_rewards, model.engine, sequences),
        "one by one": partial(one_by_one, model.engine, sequences),
    }

    def readings(_: Seconds) -> list[Reading]:
        together, alone = found["together"], found["one by one"]
        names = ("reward", "prefix_scores", "attention")
        apart = [difference({name: alone[name]}, {name: together[name]}) for name in names]
        return [
            Reading(f"drift of {name} with the batch, share of the largest", [] if each is None else [each])
            for name, each in zip(names, apart, strict=True)
        ]

    return Group(
        work=_described(sequences),
        contestants={name: partial(kept, name, run) for name, run in ways.items()},
        figures=[Figure("one pass over one by one, speed", "one by one", "together")],
        rounds=model.rounds,
        readings=readings,
    )


def shared(model: Model) -> Group:
    """Responses to one prompt in one pass, and as many with prompts that differ."""
    scale = model.scale
    same = [model.sequence(scale.prompt, scale.response, seed, prompt_seed=0) for seed in range(scale.group)]
    others = [model.sequence(scale.prompt, scale.response, seed) for seed in range(scale.group)]
    title = (
        f"{scale.group} responses of {scale.response} tokens on one {scale.prompt}-token prompt, over as many prompts"
    )
    return Group(
        work=_described(same),
        contestants={
            "one prompt": partial(_timed, partial(token_rewards, model.engine, same)),
            "as many prompts": partial(_timed, partial(token_rewards, model.engine, others)),
        },
        figures=[Figure(f"{title}, speed", "as many prompts", "one prompt")],
        rounds=model.rounds,
    )


def vllm(model: Model) -> Group:
    """The same full pass by the vLLM engine, where it is installed."""
    title = "token rewards, engine vllm over engine torch, a packed batch, speed"
    if find_spec("vllm") is None or not torch.cuda.is_available():
        return Group(work="needs vLLM beside torch, and a GPU", contestants={}, readings=lambda _: [Reading(title, [])])
    other = model.resources.enter_context(_on_vllm(model))
    return Group(
        work=_described(model.batch),
        contestants={
            "engine torch": partial(token_rewards, model.engine, model.batch),
            "engine vllm": partial(token_rewards, other, model.batch),
        },
        figures=[Figure(title, "engine torch", "engine vllm")],
        rounds=model.rounds,
    )


@contextmanager
def _on_vllm(model: Model) -> Iterator[Engine]:
    """The same weights in vLLM, which takes them from files."""
    with TemporaryDirectory() as folder:
        model.model.save_pretrained(folder)
        half = {"gpu_memory_utilization": 0.4}
        engine = ENGINES["vllm"].load(folder, arguments=half, longest=model.scale.longest, prompt_cache=0)
        with closing(engine):
            yield engine


def closed(model: Model) -> Group:
    """Closed prefixes as blocks in one pass, and every one as a sequence in full packed passes."""
    scale = model.scale
    sequence = model.sequence(scale.prompt, scale.response, seed=0)
    sequence = replace(sequence, closing_ids=_CLOSING, token_ids=[*sequence.token_ids, *_CLOSING])
    sequence = replace(sequence, scored_position=len(sequence.token_ids) - 1)
    stops = range(sequence.prompt_length, sequence.response_stop + 1)
    each = [[*sequence.token_ids[:stop], *_CLOSING] for stop in stops]
    prefixes = [ScoringInput(ids, 0, len(ids), len(ids) - 1) for ids in each]
    size = max(1, scale.batch // len(sequence.token_ids))
    batches = [prefixes[start : start + size] for start in range(0, len(prefixes), size)]

    def apart() -> Numbers:
        return {"closed_scores": np.concatenate([sequence_rewards(model.engine, batch)["reward"] for batch in batches])}

    return Group(
        work=_described([sequence]),
        contestants={"in one pass": partial(closed_prefixes, model.engine, sequence), "each by itself": apart},
        figures=[
            Figure(
                f"closed prefixes over one packed sequence per prefix, T = {scale.response}, speed",
                "each by itself",
                "in one pass",
            )
        ],
        rounds=min(model.rounds, 3),
    )


def _near_the_floor(model: Model, sequences: Sequence[ScoringInput], title: str) -> Group:
    lengths = [len(each.token_ids) for each in sequences]
    products, factor = model.floor(lengths)

    def readings(seconds: Seconds) -> list[Reading]:
        rates = [products.flops / each / 1e12 for each in seconds["matrix products"]]
        speeds = [sum(lengths) / each for each in seconds["token rewards"]]
        return [Reading("the matrix rate", rates, "TFLOP/s"), Reading(f"token rewards, {title}", speeds, "tokens/s")]

    return Group(
        work=_described(sequences),
        contestants={
            "matrix products": products,
            "sequence rewards": partial(sequence_rewards, model.engine, sequences),
            "token rewards": partial(token_rewards, model.engine, sequences),
        },
        figures=[
            Figure(
                f"share of the matrix rate, sequence only, {title}", "matrix products", "sequence rewards", "", factor
            ),
            Figure(f"share of the matrix rate, token rewards, {title}", "matrix products", "token rewards", "", factor),
            Figure(f"token rewards / sequence only, {title}, time", "token rewards", "sequence rewards", "<= 1.03"),
        ],
        rounds=model.rounds,
        readings=readings,
    )


def _peak(run: Contestant) -> float:
    """Megabytes on the device beside what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / _MEGABYTE


def _timed(run: Contestant) -> Numbers:
    """Other sequences, other numbers: nothing to compare."""
    run()
    return {}


def _described(sequences: Sequence[ScoringInput]) -> str:
    lengths = [len(each.token_ids) for each in sequences]
    return f"sequences: {len(lengths)}, tokens: {sum(lengths)}, longest {max(lengths)}"


GROUPS: dict[str, Callable[[Model], Group]] = {
    "packed": packed,
    "drift": drift,
    "long": long,
    "shared": shared,
    "closed": closed,
    "vllm": vllm,
}


def elsewhere(work: Work) -> Group:
    """The rows of the CPU's page that only a GPU can fill."""
    titles = ["share of a GPU's matrix rate, packed batch", "token rewards / sequence only on a GPU, time"]
    return Group(
        work="measured by `python -m tests.benchmarks.gpu` on a machine with a GPU, on a page of its own",
        contestants={},
        readings=lambda _: [Reading(title, []) for title in titles],
    )
