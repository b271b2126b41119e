"""How much of a half-precision model's token rewards is rounding noise, measured on ordinary texts at the start.

Scores, and the token rewards of `red` and `contribution`, are compared with float32 arithmetic on the same weights:
each text alone and all of them in one batch, prefixes open and closed. Token rewards are differences of scores, so
noise that a score survives can drown them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from densereward.capture import Captured, Contributions, Need, PrefixScores
from densereward.checks.examine import Finding
from densereward.engines.base import Engine
from densereward.errors import EngineFailure, InvalidRequest
from densereward.tokenization.align import Aligner
from densereward_client.wire import Message, Precision, Sample

__all__ = ["NOISE_BOUND", "finding_of", "measure_precision"]

NOISE_BOUND = 0.1
"""Noise of token rewards, as a share of their size, beyond which there is a warning."""

_TEXTS = (
    ("How was your stay?", "The room was clean and quiet. Breakfast was a little cold, but the staff were very kind."),
    ("How do I make bread?", "Mix flour, water, salt and yeast. Let the dough rest for an hour, then bake it."),
    ("What is 12 times 12?", "12 times 12 is 144, since 12 * 10 = 120 and 12 * 2 = 24."),
    ("Can you help me?", "No. I have no time for such questions, and you should have read the manual first."),
)


def measure_precision(engine: Engine, aligner: Aligner) -> Precision | None:
    """The noise of a half-precision model; None where there is none, or no float32 arithmetic to compare with.

    Args:
        engine: loaded and checked.
        aligner: its tokenizer and template.
    """
    if engine.facts.dtype == "float32" or engine.facts.unit != "sequence":
        return None
    kinds: set[Need] = {PrefixScores("open"), Contributions()}
    if not engine.facts.reencodes:
        kinds.add(PrefixScores("closed"))
    needs = frozenset(kinds & engine.provides)
    try:
        sequences = [aligner.align(sample, needs).sequence for sample in _samples(aligner)]
        exact = engine.exactly(sequences)
        rounded = [engine.forward(sequences), [engine.forward([each])[0] for each in sequences]]
    except (EngineFailure, InvalidRequest):  # a tiny model may not read such texts
        return None
    pairs = [pair for each in rounded for pair in zip(each, exact, strict=True)]
    noise = {need: _noise([(_rewards(one, need), _rewards(two, need)) for one, two in pairs]) for need in needs}
    red = [noise[need] for need in needs if isinstance(need, PrefixScores)]
    return Precision(
        dtype=engine.facts.dtype,
        score=max(abs(one.reward - two.reward) for one, two in pairs),
        score_deviation=float(np.std([each.reward for each in exact])),
        red=max((each for each, _ in red), default=None),
        contribution=noise[Contributions()][0] if Contributions() in noise else None,
        flipped_signs=max((flipped for _, flipped in noise.values()), default=None),
    )


def finding_of(precision: Precision | None) -> Finding:
    """What `densereward check` says of it."""
    if precision is None:
        return Finding("precision", "ok", "computed in float32, or without one to compare with")
    parts = {"red": precision.red, "contribution": precision.contribution}
    noise = {name: value for name, value in parts.items() if value is not None}
    shown = ", ".join(f"{value:.1%} of {name}" for name, value in noise.items())
    text = f"{precision.dtype} moves scores by up to {precision.score:.2g}; rounding noise is {shown or 'not measured'}"
    if precision.flipped_signs is not None:
        text += f"; {precision.flipped_signs:.1%} of token rewards change their sign"
    if max(noise.values(), default=0.0) <= NOISE_BOUND:
        return Finding("precision", "ok", text)
    advice = f"more than {NOISE_BOUND:.0%} drowns small rewards; --dtype float32 has none"
    return Finding("precision", "warning", f"{text}; {advice}")


def _samples(aligner: Aligner) -> list[Sample]:
    if aligner.template is None:
        return [Sample(prompt=f"{question}\n", response=response) for question, response in _TEXTS]
    return [
        Sample(messages=[Message(role="user", content=question)], response=response) for question, response in _TEXTS
    ]


def _rewards(captured: Captured, need: Need) -> Float64[np.ndarray, " _"]:
    """The token rewards that one kind of capture gives."""
    if isinstance(need, PrefixScores):
        prefixes = captured.prefixes[need.mode]
        return np.diff(prefixes.after.astype(np.float64), prepend=prefixes.before or 0.0)
    return captured.contributions[None].astype(np.float64)


def _noise(pairs: Sequence[tuple[Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]]]) -> tuple[float, float]:
    """Root mean square error as a share of the rewards' size, and the share of signs that flip."""
    rounded, exact = (np.concatenate(each) for each in zip(*pairs, strict=True))
    size = float(np.sqrt((exact**2).mean()))
    flipped = float((np.sign(rounded) != np.sign(exact)).mean())
    return float(np.sqrt(((rounded - exact) ** 2).mean())) / max(size, 1e-12), flipped
