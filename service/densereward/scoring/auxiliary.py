"""What is scored beside a sample's own sequence: its variants, its prompt with instructions, its closed prefixes.

All of it joins the queue, so a sample or a request that asks for more than the queue holds is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from densereward.capture import ScoringInput
from densereward.errors import InvalidRequest, TooLarge
from densereward.scoring.plans import Plan, boundaries_of
from densereward.scoring.reencoding import apart, tokens_apart
from densereward.tokenization.align import Aligned, Aligner
from densereward_client.wire import Sample

__all__ = ["check_further", "with_further"]


def with_further(
    aligned: Aligned, sample: Sample, plans: Sequence[Plan], aligner: Aligner, *, reencodes: bool, limit: int
) -> Aligned:
    """An aligned sample with all that the methods need to be scored for it.

    Args:
        aligned: the sample by itself.
        sample: as it was sent.
        plans: the request's methods.
        aligner: what aligned it.
        reencodes: whether closed prefixes are sequences of their own to the engine.
        limit: tokens that the queue holds.

    Raises:
        InvalidRequest: a method cannot serve the response, or would leave nothing to score.
        TooLarge: the closed prefixes are more than the queue can hold.
    """
    for each in plans:
        each.method.check(aligned.response)
    boundaries = boundaries_of(plans, aligned.response)
    sequence = aligned.sequence if boundaries is None else replace(aligned.sequence, boundaries=boundaries)
    variants = [_variants(sample, aligned, each, aligner) for each in plans]
    if not reencodes:
        return replace(aligned, sequence=sequence, variants=variants)
    _check_prefixes(tokens_apart(sequence), limit)
    sequence, prefixes = apart(sequence)
    return replace(aligned, sequence=sequence, variants=variants, prefixes=prefixes)


def check_further(samples: int, tokens: int, limit: int) -> None:
    """Refuse a request as soon as its variants are more than the queue can hold, before more of them are made.

    Raises:
        TooLarge: they are.
    """
    if tokens > limit:
        raise TooLarge(
            f"what is scored beside the first {samples} samples holds {tokens} tokens and the queue {limit}; send "
            "fewer samples at once, or take larger units or fewer orders",
            tokens=tokens,
            limit=limit,
        )


def _variants(sample: Sample, aligned: Aligned, plan: Plan, aligner: Aligner) -> list[ScoringInput]:
    """What a method needs to be scored beside the response itself."""
    response = aligned.response
    asked = plan.method.variants(response, plan.params) if response.length else ()
    variants = [aligned.sequence.with_response(ids, finished=response.finished) for ids in asked]
    if not all(each.token_ids for each in variants):
        raise InvalidRequest(
            f"{plan.key} leaves out all of the response, and without a prompt or closing tokens nothing is left to "
            "score; give a prompt",
            code="empty_variant",
        )
    told = plan.method.instructions(plan.params) if response.length else ()
    variants += [aligner.instructed(sample, aligned.sequence, each) for each in told]
    for each in variants:
        aligner.check_length(each)
    return variants


def _check_prefixes(tokens: int, limit: int) -> None:
    """Refuse a sample whose prefixes are more than the queue can hold, before they are made."""
    if tokens > limit:
        raise TooLarge(
            f"each closed prefix is a sequence of its own to this model: {tokens} tokens, and the queue holds "
            f"{limit}; take a larger `stride`, or a shorter response",
            tokens=tokens,
            limit=limit,
        )
