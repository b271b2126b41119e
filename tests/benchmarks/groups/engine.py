"""The engine against transformers, in one process. A new row is a contestant and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from densereward.capture import ScoringInput
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
from tests.benchmarks.harness import Contestant, Figure, Group, Numbers
from tests.benchmarks.work import Work, lengths_up_to

MICRO_BATCH = 8
PREFIX_BATCH = 8  # the fastest of 1, 4, 8, 16, 32, 64 for this contestant


def overhead(work: Work) -> Group:
    """What token rewards cost on top of the score, and how near the score is to the machine's limit."""
    sequences = work.sequences(work.samples)
    lengths = [len(each.token_ids) for each in sequences]
    products, flops = _floor(work.shapes, lengths)
    moved = model_bytes(work.shapes, lengths)
    memory = moved / copy_rate()
    return Group(
        work=_described(sequences),
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

    def sdpa(batch_size: int, *, by_length: bool = False) -> Numbers:
        return work.sdpa(padded_sdpa, sequences, batch_size, by_length=by_length)

    contestants: dict[str, Contestant] = {
        "ours, token rewards": partial(token_rewards, work.engine, sequences),
        "ours, sequence rewards": partial(sequence_rewards, work.engine, sequences),
        "eager, whole maps": partial(work.eager, padded_eager, sequences, MICRO_BATCH),
        "SDPA, one batch": partial(sdpa, len(sequences)),
        "SDPA, micro-batches": partial(sdpa, MICRO_BATCH),
        "SDPA, sorted": partial(sdpa, MICRO_BATCH, by_length=True),
        "SDPA, one by one": partial(sdpa, 1),
    }
    tokens, rewards = "ours, token rewards", "ours, sequence rewards"
    return Group(
        work=_described(sequences),
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
    products, flops = _floor(work.shapes, [len(sequences[0].token_ids)])
    title = f"eager `output_attentions`, one sequence, T = {length}, speed"
    return Group(
        work=f"one sequence of {len(sequences[0].token_ids)} tokens",
        contestants={
            "matrix products": products,
            "ours, token rewards": partial(token_rewards, work.engine, sequences),
            "eager, whole maps": partial(work.eager, padded_eager, sequences, 1),
        },
        figures=[
            Figure(f"token rewards over {title}", "eager, whole maps", "ours, token rewards"),
            Figure(
                f"the arithmetic floor over {title}", "eager, whole maps", "matrix products", "", products.flops / flops
            ),
        ],
        rounds=work.size.rounds,
        notes=lambda: ["The floor's row is what no engine can exceed that does the same products in float32."],
    )


def long_padded(work: Work) -> Group:
    """A rollout batch with a long sequence in it, padded to that."""
    lengths = lengths_up_to(work.size.long, work.size.long_batch)
    sequences = work.sequences([work.sample(each // 4, each - each // 4, seed=each) for each in lengths])
    title = f"token rewards over eager `output_attentions`, {len(lengths)} padded to T = {work.size.long}, speed"
    return Group(
        work=_described(sequences),
        contestants={
            "ours, token rewards": partial(token_rewards, work.engine, sequences),
            "eager, whole maps": partial(work.eager, padded_eager, sequences, len(sequences)),
        },
        figures=[Figure(title, "eager, whole maps", "ours, token rewards", ">= 8")],
        rounds=work.size.dear_rounds,
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
            "every prefix": partial(work.sdpa, every_prefix, sequences[0], PREFIX_BATCH),
        },
        figures=[Figure(title, "every prefix", "ours, token rewards")],
        rounds=work.size.dear_rounds,
    )


def closed(work: Work) -> Group:
    """One response on a short prompt: its closed prefixes as blocks in one pass, or a pass for every one."""
    return _closed(work, work.size.prefixes // 4, goal="")


def closed_long_prompt(work: Work) -> Group:
    """The same on a prompt that a pass for every prefix reads again and again."""
    return _closed(work, work.size.group_prompt, goal=">= 100")


def _closed(work: Work, prompt_tokens: int, goal: str) -> Group:
    count = work.size.prefixes
    sequence = work.sequences([work.sample(prompt_tokens, count, seed=count)])[0]
    closing = len(sequence.closing_ids)
    apart = sum(stop + closing for stop in range(sequence.prompt_length, sequence.response_stop + 1))
    ours = len(sequence.token_ids) + (sequence.response_length + 1) * closing
    title = (
        f"closed prefixes over one pass per prefix, T = {count}, {prompt_tokens}-token prompt, padded by {PREFIX_BATCH}"
    )
    return Group(
        work=f"one response of {sequence.response_length} tokens on a prompt of {sequence.prompt_length}",
        contestants={
            "ours, closed prefixes": partial(closed_prefixes, work.engine, sequence),
            "every closed prefix": partial(work.sdpa, every_closed_prefix, sequence, PREFIX_BATCH),
        },
        figures=[Figure(f"{title}, speed", "every closed prefix", "ours, closed prefixes", goal)],
        rounds=work.size.dear_rounds,
        notes=lambda: [
            f"{apart} tokens in passes of their own and {ours} in ours: tokens alone would give {apart / ours:.0f}x."
        ],
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
        rounds=2 * work.size.rounds,
    )


def _floor(model: Any, lengths: Sequence[int]) -> tuple[MatrixProducts, float]:
    """Plain products of about the model's arithmetic, and how much that is."""
    flops = model_flops(model, lengths)
    return MatrixProducts.fastest(model.config.hidden_size, model.config.intermediate_size, flops), flops


def _described(sequences: Sequence[ScoringInput]) -> str:
    lengths = [len(each.token_ids) for each in sequences]
    return f"{len(lengths)} sequences, {sum(lengths)} tokens, mean {np.mean(lengths):.0f}, longest {max(lengths)}"
