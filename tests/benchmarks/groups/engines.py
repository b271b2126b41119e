"""Our server with either engine, side by side: throughput, waits and memory by the length of the sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from densereward_client.wire import Sample
from tests.benchmarks import callers, servers
from tests.benchmarks.callers import Callers
from tests.benchmarks.harness import Contestant, Figure, Group, Reading, Seconds
from tests.benchmarks.work import Work

_CALLERS = 8
_PARTS = ((0.5, "p50"), (0.99, "p99"))


def engines(work: Work) -> Group:
    """The same samples to a server on torch and to one on vLLM, one sample a call."""
    size = work.size
    titles = {
        length: f"engine vllm over engine torch, sequences of {length}, throughput" for length in size.engine_lengths
    }
    if work.vllm_python is None:
        return Group(
            work="needs --vllm-python, an interpreter that has vLLM and densereward",
            contestants={},
            readings=lambda _: [Reading(title, []) for title in titles.values()],
        )
    started = {
        "torch": work.resources.enter_context(servers.engine("torch", work.folder, work.threads)),
        "vllm": work.resources.enter_context(
            servers.engine("vllm", work.folder, work.threads, str(work.vllm_python), {"enforce_eager": False})
        ),
    }
    contestants: dict[str, Callers[Sequence[Sample]]] = {
        _name(engine, length): Callers(running.url, callers.token_rewards, _calls(work, length), _CALLERS)
        for length in size.engine_lengths
        for engine, running in started.items()
    }
    turns: dict[str, Contestant] = dict(contestants)

    def readings(_: Seconds) -> list[Reading]:
        waits = [
            Reading(
                f"{name}, {shown} of a call", [float(np.quantile(each, part)) * 1e3 for each in calls.waits[1:]], "ms"
            )
            for name, calls in contestants.items()
            for part, shown in _PARTS
        ]
        return [
            *waits,
            *(
                Reading(f"engine {name}, memory of all processes", [each.bytes / 1e6], "MB")
                for name, each in started.items()
            ),
        ]

    return Group(
        work=f"{size.engine_tokens} tokens of each length, one sample a call from {_CALLERS} callers, `red` and `abc`",
        contestants=turns,
        figures=[Figure(title, _name("torch", length), _name("vllm", length)) for length, title in titles.items()],
        rounds=size.rounds,
        notes=lambda: ["Float32, the same number of threads, the other server idle meanwhile; vLLM compiled."],
        readings=readings,
    )


def _name(engine: str, length: int) -> str:
    return f"engine {engine}, sequences of {length}"


def _calls(work: Work, length: int) -> list[list[Sample]]:
    """A quarter of each is the prompt; no two are alike."""
    count = max(1, work.size.engine_tokens // length)
    prompt = length // 4
    return [[work.sample(prompt, length - prompt, seed=30_000 + length * 100 + i)] for i in range(count)]
