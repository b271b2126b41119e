"""How cost grows: memory with tokens; seconds with tokens, sequences, and responses to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from densereward.capture import ScoringInput
from tests.benchmarks.contestants import padded_eager, padded_sdpa, token_rewards
from tests.benchmarks.floor import MatrixProducts, model_flops, shared_flops
from tests.benchmarks.harness import Chart, Contestant, Group, Numbers, Reading, Seconds, spread
from tests.benchmarks.weigh import WAYS, weighed
from tests.benchmarks.work import Work, made_up, random_ids

_MEGABYTE = 1e6
_OURS, _FLOOR = "ours, token rewards", "floor of the arithmetic"
_Sequences = Mapping[int, Sequence[ScoringInput]]


def memory(work: Work) -> Group:
    """What a pass takes beside the model, each weighed in a process of its own."""
    lengths = work.size.memory
    taken: dict[str, dict[int, float]] = {way: {} for way in WAYS}

    def weigh(way: str, tokens: int) -> Numbers:
        taken[way][tokens] = weighed(work.folder, way, tokens)
        return {}

    def listed(way: str) -> str:
        return ", ".join(f"{taken[way][tokens] / _MEGABYTE:.0f}" for tokens in lengths)

    def exponent(way: str) -> float:
        above, below = (max(taken[way][tokens], 1.0) for tokens in (lengths[-1], lengths[-2]))
        return float(np.log(above / below) / np.log(lengths[-1] / lengths[-2]))

    top = f"T = {lengths[-1]}"
    return Group(
        work=f"one sequence of {', '.join(map(str, lengths))} tokens, a process for each pass",
        contestants={f"{way}, {tokens}": partial(weigh, way, tokens) for way in WAYS for tokens in lengths},
        rounds=0,
        notes=lambda: [f"MB beside the model: ours {listed('ours')}; eager `output_attentions` {listed('eager')}."],
        readings=lambda _: [
            Reading(f"peak memory of a pass, {top}, ours", [taken["ours"][lengths[-1]] / _MEGABYTE], "MB"),
            Reading(f"peak memory of a pass, {top}, eager maps", [taken["eager"][lengths[-1]] / _MEGABYTE], "MB"),
            Reading("its growth, exponent of T, ours", [exponent("ours")], goal="about 1"),
            Reading("its growth, exponent of T, eager maps", [exponent("eager")]),
        ],
        charts=lambda _: [
            Chart(
                "memory",
                "Peak memory of one pass, beside the model",
                "tokens in the sequence",
                "MB",
                {
                    label: [(tokens, taken[way][tokens] / _MEGABYTE) for tokens in lengths]
                    for way, label in zip(WAYS, (_OURS, "eager, whole maps"), strict=True)
                },
            )
        ],
    )


def growth_length(work: Work) -> Group:
    """Seconds for one sequence of more and more tokens."""
    sequences = {each: [_sequence(work, each // 4, each - each // 4, each)] for each in work.size.growth_length}
    return _growth(
        work,
        sequences,
        Chart("tokens", "One sequence, token rewards", "tokens in the sequence", "seconds", {}),
        {"eager, whole maps": lambda batch: work.eager(padded_eager, batch, 1)},
        lambda batch: model_flops(work.shapes, [len(each.token_ids) for each in batch]),
    )


def growth_batch(work: Work) -> Group:
    """Seconds for more and more sequences of one length."""
    mean = work.size.mean_length
    seeds = range(max(work.size.growth_batch))
    every = [_sequence(work, mean // 4, mean - mean // 4, seed, prompt_seed=seed) for seed in seeds]
    return _growth(
        work,
        {each: every[:each] for each in work.size.growth_batch},
        Chart("batch", f"A batch of sequences of {mean} tokens", "sequences", "seconds", {}),
        {"SDPA, score only": lambda batch: work.sdpa(padded_sdpa, batch, len(batch))},
        lambda batch: model_flops(work.shapes, [len(each.token_ids) for each in batch]),
    )


def growth_group(work: Work) -> Group:
    """Seconds for more and more responses to one prompt."""
    size = work.size
    every = [_sequence(work, size.group_prompt, size.group_response, seed) for seed in range(max(size.growth_group))]
    title = f"Responses of {size.group_response} tokens to one prompt of {size.group_prompt}"
    return _growth(
        work,
        {each: every[:each] for each in size.growth_group},
        Chart("group", title, "responses", "seconds", {}),
        {"SDPA, score only": lambda batch: work.sdpa(padded_sdpa, batch, len(batch))},
        lambda batch: shared_flops(work.shapes, size.group_prompt, [size.group_response] * len(batch)),
    )


def _growth(
    work: Work,
    batches: _Sequences,
    empty: Chart,
    peers: Mapping[str, Callable[[Sequence[ScoringInput]], Numbers]],
    flops: Callable[[Sequence[ScoringInput]], float],
) -> Group:
    """Contestants at every size, and a chart of their medians with the arithmetic's floor."""
    sizes = work.config
    products = MatrixProducts.fastest(sizes.hidden_size, sizes.intermediate_size, flops(batches[max(batches)]) / 8)
    ways: dict[str, Callable[[Sequence[ScoringInput]], Numbers]] = {_OURS: partial(token_rewards, work.engine), **peers}
    contestants: dict[str, Contestant] = {"matrix products": products}
    contestants |= {f"{way}, {size}": partial(run, batches[size]) for way, run in ways.items() for size in batches}

    def charts(seconds: Seconds) -> list[Chart]:
        rate = products.flops / spread(seconds["matrix products"]).median
        lines = {way: [(size, spread(seconds[f"{way}, {size}"]).median) for size in batches] for way in ways}
        lines[_FLOOR] = [(size, flops(batch) / rate) for size, batch in batches.items()]
        return [Chart(empty.name, empty.title, empty.x_label, empty.y_label, lines)]

    return Group(
        work=f"{empty.title}: {', '.join(map(str, batches))} {empty.x_label}",
        contestants=contestants,
        rounds=work.size.dear_rounds,
        charts=charts,
    )


def _sequence(work: Work, prompt: int, response: int, seed: int, prompt_seed: int = 0) -> ScoringInput:
    """Made-up ids; equal seeds are equal prompts."""
    vocabulary = work.engine.facts.vocabulary_size
    return random_ids(made_up(prompt, prompt_seed, vocabulary), response, seed + 1000, vocabulary)
