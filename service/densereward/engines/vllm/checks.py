"""Checks of a vLLM engine at its start: are its rows those of its kernels, and are its prefix scores causal?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from densereward.capture import PrefixScores, ScoringInput
from densereward.engines.base import TOLERANCE
from densereward.errors import EngineFailure, ModelError

__all__ = ["check_engine"]

_SHORT = 48
"""Tokens in the short probe."""

_MOST = 64
"""Long probes that run at once: more than one pass holds, so that some run in chunks beside others."""

_STRICTER = 10
"""How much stricter float32 rows are judged than scores, which may move with the batch around them."""


async def check_engine(engine: Any, layers: Sequence[int]) -> None:
    """Check rows and prefix scores, on more sequences at once than a pass holds.

    Args:
        engine: a `VllmEngine`.
        layers: those whose rows it gives.

    Raises:
        ModelError: they are wrong, or vLLM does not give them.
    """
    facts = engine.facts
    longest = min(facts.max_length, facts.batch_tokens + 16)
    count = min(_MOST, facts.batch_tokens // longest + 2)
    probes = [_probe(facts, seed, length) for seed, length in enumerate([min(_SHORT, longest), *[longest] * count])]
    try:
        found = await asyncio.gather(*(engine.row_errors(each, layers) for each in probes))
        moves = await asyncio.gather(*(_prefix_error(engine, each) for each in probes[:2]))
    except EngineFailure as failure:
        raise ModelError(f"this vLLM does not give what it was asked for: {failure.message}") from failure
    limit = TOLERANCE[facts.dtype]
    if (moved := max(moves)) > limit:
        raise ModelError(
            f"the score of a prefix moves by {moved:.2g} with the tokens after it: they attend to later ones"
        )
    limit *= _STRICTER if facts.dtype == "float32" else 1
    for layer in layers:
        if not (error := max(errors[layer] for errors in found)) <= limit:
            raise ModelError(
                f"the attention row of layer {layer} is off by {error:.2g} from what its kernel computed; serve this "
                "model with --engine torch"
            )


async def _prefix_error(engine: Any, probe: ScoringInput) -> float:
    """How far a prefix's score in a longer text is from its score alone, relative to the latter (or to 1)."""
    if probe.response_length < 2:
        return 0.0
    middle = probe.prompt_length + probe.response_length // 2
    cut = ScoringInput(probe.token_ids[:middle], probe.prompt_length, middle - probe.prompt_length, middle - 1)
    whole, alone = await asyncio.gather(engine.scored(probe), engine.scored(cut))
    within = float(whole.prefixes["open"].after[cut.response_length - 1])
    return abs(within - float(alone.reward)) / max(1.0, abs(float(alone.reward)))


def _probe(facts: Any, seed: int, length: int) -> ScoringInput:
    ids = np.random.default_rng(seed).integers(0, facts.vocabulary_size, length).tolist()
    return ScoringInput(
        ids, min(1, length - 1), length - min(1, length - 1), length - 1, needs=frozenset([PrefixScores()])
    )
