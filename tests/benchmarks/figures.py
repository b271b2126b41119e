"""The figures, group by group. A new row is a contestant and a line here; a new group a function and a line below."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from densereward_client.wire import Sample
from tests.benchmarks.contestants import (
    closed_prefixes,
    every_closed_prefix,
    every_prefix,
    one_by_one,
    padded_eager,
    padded_sdpa,
    sequence_rewards,
    token_rewards,
)
from tests.benchmarks.floor import MatrixProducts, copy_rate, model_bytes, model_flops
from tests.benchmarks.harness import Contestant, Figure, Group
from tests.benchmarks.serving import Served, server
from tests.benchmarks.work import Work

MICRO_BATCH = 8
PREFIX_BATCH = 8  # the fastest of 1, 4, 8, 16, 32, 64 for this contestant


def overhead(work: Work) -> Group:
    """What token rewards cost on top of the score, and how near the score is to the machine's limit."""
    sequences = work.sequences(work.samples)
    lengths = [len(each.token_ids) for each in sequences]
    model = work.peer("sdpa")
    flops, moved = model_flops(model, lengths), model_bytes(model, lengths)
    products = MatrixProducts.fastest(model.config.hidden_size, model.config.intermediate_size, flops)
    memory = moved / copy_rate()
    return Group(
        work=f"{len(lengths)} sequences, {sum(lengths)} tokens, mean {np.mean(lengths):.0f}, longest {max(lengths)}",
        contestants={
            "matrix products": products,
            "ours, sequence rewards": partial(sequence_rewards, work.engine, sequences),
            "ours, token rewards": partial(token_rewards, work.engine, sequences),
        },
        figures=[
            Figure("token rewards / sequence only, time", "ours, token rewards", "ours, sequence rewards", "<= 1.03"),
            Figure(
                "share of the arithmetic floor, sequence only",
                "matrix products",
                "ours, sequence rewards",
                factor=flops / products.flops,
            ),
        ],
        rounds=3 * work.size.rounds,
        notes=lambda: [
            f"Floor: {flops / 1e12:.3f} TFLOP of matrices and attention; at least {moved / 1e9:.2f} GB moved, which "
            f"would take {memory:.3f} s by itself."
        ],
    )


def padded(work: Work) -> Group:
    """The batch, against transformers in padded batches."""
    sequences = work.sequences(work.samples)
    lengths = [len(each.token_ids) for each in sequences]
    sdpa = partial(padded_sdpa, work.peer("sdpa"), sequences)
    contestants: dict[str, Contestant] = {
        "ours, token rewards": partial(token_rewards, work.engine, sequences),
        "ours, sequence rewards": partial(sequence_rewards, work.engine, sequences),
        "eager, whole maps": partial(padded_eager, work.peer("eager"), sequences, MICRO_BATCH),
        "SDPA, one batch": partial(sdpa, len(sequences)),
        "SDPA, micro-batches": partial(sdpa, MICRO_BATCH),
        "SDPA, sorted": partial(sdpa, MICRO_BATCH, by_length=True),
        "SDPA, one by one": partial(sdpa, 1),
    }
    tokens, rewards = "ours, token rewards", "ours, sequence rewards"
    return Group(
        work=f"{len(lengths)} sequences, mean {np.mean(lengths):.0f} tokens, longest {max(lengths)}",
        contestants=contestants,
        figures=[
            Figure(
                f"token rewards over eager `output_attentions`, padded by {MICRO_BATCH}, speed",
                "eager, whole maps",
                tokens,
                ">= 4",
            ),
            Figure("sequence only over SDPA, padded in one batch, speed", "SDPA, one batch", rewards, ">= 2.5"),
            Figure(f"sequence only over SDPA, padded by {MICRO_BATCH}, speed", "SDPA, micro-batches", rewards),
            Figure(f"sequence only over SDPA, padded by {MICRO_BATCH}, sorted, speed", "SDPA, sorted", rewards),
            Figure("sequence only over SDPA, one by one, speed", "SDPA, one by one", rewards),
        ],
        rounds=work.size.rounds,
    )


def long(work: Work) -> Group:
    """One long sequence: no padding to save, only maps not to make."""
    length = work.size.long
    sequences = work.sequences([work.sample(length // 4, length - length // 4, seed=length)])
    title = f"token rewards over eager `output_attentions`, T = {length}, speed"
    return Group(
        work=f"one sequence of {len(sequences[0].token_ids)} tokens",
        contestants={
            "ours, token rewards": partial(token_rewards, work.engine, sequences),
            "eager, whole maps": partial(padded_eager, work.peer("eager"), sequences, 1),
        },
        figures=[Figure(title, "eager, whole maps", "ours, token rewards", ">= 8")],
        rounds=work.size.rounds,
    )


def prefixes(work: Work) -> Group:
    """One response: its prefix scores from one pass, or a pass for every prefix."""
    count = work.size.prefixes
    sequences = work.sequences([work.sample(count // 4, count, seed=count)])
    title = f"token rewards over one pass per prefix, T = {count}, padded by {PREFIX_BATCH}, speed"
    return Group(
        work=f"one response of {sequences[0].response_length} tokens on a prompt of {sequences[0].prompt_length}",
        contestants={
            "ours, token rewards": partial(token_rewards, work.engine, sequences),
            "every prefix": partial(every_prefix, work.peer("sdpa"), sequences[0], PREFIX_BATCH),
        },
        figures=[Figure(title, "every prefix", "ours, token rewards")],
        rounds=work.size.rounds,
    )


def closed(work: Work) -> Group:
    """One response: its closed prefixes as blocks in one pass, or a pass for every one."""
    count = work.size.prefixes
    sequence = work.sequences([work.sample(count // 4, count, seed=count)])[0]
    title = f"closed prefixes over one pass per prefix, T = {count}, padded by {PREFIX_BATCH}, speed"
    return Group(
        work=f"one response of {sequence.response_length} tokens on a prompt of {sequence.prompt_length}",
        contestants={
            "ours, closed prefixes": partial(closed_prefixes, work.engine, sequence),
            "every closed prefix": partial(every_closed_prefix, work.peer("sdpa"), sequence, PREFIX_BATCH),
        },
        figures=[Figure(title, "every closed prefix", "ours, closed prefixes", ">= 100")],
        rounds=work.size.rounds,
    )


def shared(work: Work) -> Group:
    """Several responses to one prompt: the prompt once, or once for each."""
    size = work.size
    prompt = work.sample(size.group_prompt, 1, seed=0).messages
    responses = [work.sample(1, size.group_response, seed=seed).response for seed in range(size.group)]
    sequences = work.sequences([Sample(messages=prompt, response=response) for response in responses])
    title = (
        f"{size.group} responses of {size.group_response} tokens on one {size.group_prompt}-token prompt, over unshared"
    )
    return Group(
        work=f"{size.group} responses to a prompt of {sequences[0].prompt_length} tokens",
        contestants={
            "ours, together": partial(token_rewards, work.engine, sequences),
            "ours, one by one": partial(one_by_one, work.engine, sequences),
        },
        figures=[Figure(f"{title}, speed", "ours, one by one", "ours, together", ">= 4")],
        rounds=work.size.rounds,
    )


def served(work: Work) -> Group:
    """The same samples over HTTP, one a call, and straight into the engine."""
    size = work.size
    samples = [work.samples[i % len(work.samples)] for i in range(size.callers * size.calls)]
    sequences = work.sequences(samples)
    calls = Served(work.resources.enter_context(server(work.folder, work.threads)), samples, size.callers)
    tokens = sum(len(each.token_ids) for each in sequences)
    return Group(
        work=f"{len(samples)} samples as text, {tokens} tokens, from {size.callers} callers with one sample a call",
        contestants={
            "raw engine, token rewards": partial(token_rewards, work.engine, sequences),
            "served, token rewards": calls,
        },
        figures=[
            Figure("served / raw engine, throughput", "raw engine, token rewards", "served, token rewards", ">= 0.9")
        ],
        rounds=work.size.rounds,
        notes=lambda: [
            "The callers run on the server's own cores and took "
            f"{np.median(calls.client_shares) * 100:.0f} % of one of them; the raw engine had all cores to itself."
        ],
    )


GROUPS: dict[str, Callable[[Work], Group]] = {
    "overhead": overhead,
    "padded": padded,
    "long": long,
    "prefixes": prefixes,
    "closed": closed,
    "shared": shared,
    "served": served,
}
