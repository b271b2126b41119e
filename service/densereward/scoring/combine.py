"""Several models on the same samples: their rewards on the same tokens, and their answers as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from copy import copy
from itertools import accumulate
from typing import Any

from densereward.capture import Span
from densereward.errors import DenseRewardError, InvalidRequest
from densereward.scoring.pipeline import Pipeline, Samples, Scores, Work
from densereward.scoring.preparation import PreparedSample
from densereward_client.wire import Sample

__all__ = ["all_scores", "merged", "on_the_same_tokens"]

_SUMMED = ("prompt_tokens", "response_tokens", "forward_tokens")


def on_the_same_tokens(
    samples: Samples, prepared: Sequence[PreparedSample | DenseRewardError], first: Pipeline, other: Pipeline
) -> list[Sample | DenseRewardError]:
    """The samples for another model, with the trainer's spans, or else the first model's tokens, as slots.

    A sample that cannot be shared becomes the error that says why.
    """
    return [_shared(*each, first, other) for each in zip(samples, prepared, strict=True)]


def _shared(
    sample: Sample | DenseRewardError, prepared: PreparedSample | DenseRewardError, first: Pipeline, other: Pipeline
) -> Sample | DenseRewardError:
    if isinstance(sample, DenseRewardError):
        return copy(sample)  # each model writes the sample's place into its own
    if isinstance(prepared, DenseRewardError):
        return sample
    same = other.card.tokenizer_fingerprint == first.card.tokenizer_fingerprint
    if not same and (sample.prompt_token_ids is not None or sample.response_token_ids is not None):
        return InvalidRequest(
            f"ids are {first.name}'s tokens, and {other.name} has others; give `messages` or `prompt`, and `response` "
            "as text",
            code="ids_of_another_model",
        )
    if sample.response_spans is not None or sample.response is None:
        return sample
    if prepared.aligned.spans is None:
        return InvalidRequest(
            f"the bytes of {first.name}'s tokens cannot be known; give `response_spans`", code="no_spans"
        )
    return sample.model_copy(update={"response_spans": _without_overlap(prepared.aligned.spans)})


def _without_overlap(spans: Sequence[Span]) -> list[Span]:
    """The spans as a trainer would send them; of separators, which stand where their steps end, nothing is left."""
    ends = [0, *accumulate((stop for _, stop in spans), max)]
    return [(max(start, before), max(stop, before)) for (start, stop), before in zip(spans, ends[:-1], strict=True)]


async def all_scores(models: Sequence[Pipeline], works: Sequence[Work]) -> list[Scores]:
    """Every model's scores, all at once.

    Raises:
        DenseRewardError: what could not be served, and what to do next.
    """
    scoring = [asyncio.ensure_future(model.score(work)) for model, work in zip(models, works, strict=True)]
    try:
        return list(await asyncio.gather(*scoring))
    finally:  # where one model refuses, the others need not go on
        for each in scoring:
            each.cancel()
        await asyncio.gather(*scoring, return_exceptions=True)


def merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first answer with what all of them together used, and the longest times."""
    return answers[0] | {
        "usage": {name: sum(answer["usage"][name] for answer in answers) for name in _SUMMED},
        "timing": {name: max(answer["timing"][name] for answer in answers) for name in answers[0]["timing"]},
    }
