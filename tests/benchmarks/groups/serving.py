"""Our server against the raw engine and against other servers, over HTTP on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from densereward.capture import ScoringInput
from densereward_client.wire import Sample
from tests.benchmarks import callers, servers
from tests.benchmarks.callers import Callers
from tests.benchmarks.contestants import token_rewards
from tests.benchmarks.harness import Contestant, Figure, Group, Numbers, Reading, Seconds
from tests.benchmarks.work import Work


def served(work: Work) -> Group:
    """The same samples over HTTP, one a call, and straight into the engine."""
    samples = _traffic(work)
    calls = Callers(work.server, callers.token_rewards, [[each] for each in samples], work.size.callers)
    return Group(
        work=_described(work, work.sequences(samples)),
        contestants={
            "raw engine, token rewards": partial(token_rewards, work.engine, work.sequences(samples)),
            "served, token rewards": calls,
        },
        figures=[
            Figure("served / raw engine, throughput", "raw engine, token rewards", "served, token rewards", ">= 0.9")
        ],
        rounds=work.size.rounds,
        notes=lambda: [
            f"{_share_of(calls)} The answers hold the prefix scores as well; the raw engine had all cores to itself."
        ],
    )


def vllm(work: Work) -> Group:
    """The same ids to vLLM's server, which answers with a score for every token."""
    title = "served token rewards over vLLM's /pooling token_classify, throughput"
    if work.vllm_python is None:
        return Group(
            work="needs --vllm-python, an interpreter that has vLLM",
            contestants={},
            readings=lambda _: [Reading(title, [], goal=">= 1.2")],
        )
    theirs = work.resources.enter_context(servers.vllm(work.vllm_python, work.folder, work.threads))

    def ours_and_theirs(sequences: Sequence[ScoringInput]) -> tuple[Callers[Any], Callers[Any]]:
        asked = [[_as_ids(sequence)] for sequence in sequences]
        return (
            Callers(work.server, callers.token_rewards, asked, work.size.callers),
            Callers(theirs, callers.vllm_scores, sequences, work.size.callers),
        )

    size, sequences = work.size, work.sequences(_traffic(work))
    calls, their_calls = ours_and_theirs(sequences)
    grouped, their_grouped = ours_and_theirs(work.sequences(_grouped(work)))
    return Group(
        work=_described(work, sequences),
        contestants={
            "served, token rewards": calls,
            "vLLM": their_calls,
            "served, groups": grouped,
            "vLLM, groups": their_grouped,
        },
        figures=[
            Figure(title, "vLLM", "served, token rewards", ">= 1.2"),
            Figure(
                f"{title}, {size.group} responses of {size.group_response} to each prompt of {size.group_prompt}",
                "vLLM, groups",
                "served, groups",
            ),
        ],
        rounds=work.size.rounds,
        notes=lambda: [
            f"{_share_of(calls)} The same ids to both, float32, the same number of threads, the other server idle "
            "meanwhile; vLLM compiled, its answers in base64. Ours also computes `red`, `abc` and its row."
        ],
    )


def plain(work: Work) -> Group:
    """The same text to a plain reward server: as trainers send it, and one sample a call."""
    theirs = work.resources.enter_context(servers.plain(work.folder, work.threads))
    samples, singles = work.samples, list(islice(_traffic(work), work.size.callers))
    one, count = work.size.callers, len(samples)
    contestants: dict[str, Contestant] = {
        "ours, rewards": Callers(work.server, callers.rewards, [samples], 1),
        "ours, token rewards": Callers(work.server, callers.token_rewards, [samples], 1),
        "plain": Callers(theirs, callers.plain_rewards, [_texts(work, samples)], 1),
        "ours, single": Callers(work.server, callers.rewards, [[each] for each in singles], one),
        "plain, single": Callers(theirs, callers.plain_rewards, [_texts(work, [each]) for each in singles], one),
    }
    over = "over a plain FastAPI server with padded SDPA, throughput"
    return Group(
        work=f"calls of {count} samples as text, then {len(singles)} samples, one a call, from {one} callers",
        contestants=contestants,
        figures=[
            Figure(f"served rewards, calls of {count}, {over}", "plain", "ours, rewards", ">= 3"),
            Figure(f"served token rewards, calls of {count}, {over}", "plain", "ours, token rewards"),
            Figure(f"served rewards, one sample a call, {over}", "plain, single", "ours, single"),
        ],
        rounds=work.size.rounds,
    )


def health(work: Work) -> Group:
    """Whether the server still answers at once while it computes."""
    samples = _traffic(work)
    calls = Callers(work.server, callers.token_rewards, [[each] for each in samples], work.size.callers)
    rounds: list[list[float]] = []

    def watched() -> Numbers:
        seconds: list[float] = []
        with callers.probed(f"{work.server}/health", seconds):
            numbers = calls()
        rounds.append(seconds)
        return numbers

    def readings(_: Seconds) -> list[Reading]:
        taken = [np.array(seconds) * 1000 for seconds in rounds[1:]]  # the first turn warms up
        title = f"/health while {work.size.callers} callers wait"
        return [
            Reading(f"{title}, p50", [float(np.quantile(each, 0.5)) for each in taken], "ms"),
            Reading(f"{title}, p99", [float(np.quantile(each, 0.99)) for each in taken], "ms", "< 50 ms"),
            Reading(f"{title}, the slowest", [float(each.max()) for each in taken], "ms"),
        ]

    return Group(
        work=_described(work, work.sequences(samples)),
        contestants={"served and watched": watched},
        rounds=work.size.rounds,
        notes=lambda: [f"{sum(map(len, rounds[1:]))} questions from a process of its own, one every 10 ms or so."],
        readings=readings,
    )


def _traffic(work: Work) -> list[Sample]:
    """Samples of the batch's lengths, none like another: nothing is shared and nothing comes again."""
    count = work.size.callers * work.size.calls
    lengths = [work.lengths[i % len(work.lengths)] for i in range(count)]
    return [work.sample(length // 4, length - length // 4, seed=10_000 + i) for i, length in enumerate(lengths)]


def _grouped(work: Work) -> list[Sample]:
    """As many samples in groups on one prompt, as GRPO has them; a group's calls come one after the other."""
    size = work.size
    samples = []
    for i in range(size.callers * size.calls):
        prompt = work.sample(size.group_prompt, 1, seed=20_000 + i // size.group).messages
        samples.append(Sample(messages=prompt, response=work.sample(1, size.group_response, seed=20_000 + i).response))
    return samples


def _as_ids(sequence: ScoringInput) -> Sample:
    prompt = list(sequence.token_ids[: sequence.prompt_length])
    return Sample.model_validate({"prompt_token_ids": prompt, "response_token_ids": list(sequence.response_ids)})


def _texts(work: Work, samples: Sequence[Sample]) -> list[str]:
    """Whole dialogues, closing tokens included."""
    template = work.aligner.template
    assert template is not None
    return [template.prompt(_messages(each)) + (each.response or "") + template.closing for each in samples]


def _messages(sample: Sample) -> list[dict[str, Any]]:
    return [each.model_dump() for each in sample.messages or ()]


def _described(work: Work, sequences: Sequence[ScoringInput]) -> str:
    tokens = sum(len(each.token_ids) for each in sequences)
    asked = f"from {work.size.callers} callers with one sample a call"
    return f"{len(sequences)} samples, {tokens} tokens, {asked}; the server keeps no prompts for the next round"


def _share_of(calls: Callers[Any]) -> str:
    return f"The callers run on the server's own cores and took {np.median(calls.shares) * 100:.0f} % of one of them."
