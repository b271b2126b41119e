"""What is scored beside a sample's own sequence: its variants, its prompt with instructions, its closed prefixes.

All of it joins the queue. A sample or a request that needs more than the queue can hold is refused before it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from densereward.capture import ScoringInput
from densereward.errors import InvalidRequest, TooLarge
from densereward.methods.base import Response
from densereward.scoring.plans import Plan, boundaries_of
from densereward.scoring.reencoding import count_prefix_tokens, split_prefixes
from densereward.tokenization.align import Aligner
from densereward_client.wire import Sample

__all__ = ["check_auxiliary", "closed_prefixes", "variants_of"]


def variants_of(
    sample: Sample, sequence: ScoringInput, response: Response, plan: Plan, aligner: Aligner
) -> list[ScoringInput]:
    """The sequences that a method needs beside the sample's own: other responses, and other prompts.

    Raises:
        InvalidRequest: nothing would be left to score, or a prompt cannot take an instruction.
        TooLong: more tokens than the model reads.
    """
    if not response.length:
        return []
    other_responses = plan.method.variants(response, plan.params)
    variants = [sequence.with_response(ids, finished=response.finished) for ids in other_responses]
    if not all(each.token_ids for each in variants):
        raise InvalidRequest(
            f"{plan.key} leaves out all of the response, and without a prompt or closing tokens nothing is left to "
            "score; give a prompt",
            code="empty_variant",
        )
    variants += [aligner.instructed(sample, sequence, each) for each in plan.method.instructions(plan.params)]
    for each in variants:
        aligner.check_length(each)
    return variants


def closed_prefixes(
    sequence: ScoringInput, response: Response, plans: Sequence[Plan], *, reencodes: bool, limit: int
) -> tuple[ScoringInput, list[ScoringInput]]:
    """The sequence with the closed prefixes that its methods need, and those that are sequences of their own.

    Args:
        sequence: the sample's own.
        response: what is known of its response.
        plans: the request's methods.
        reencodes: whether closed prefixes are sequences of their own to the engine.
        limit: tokens that the queue holds.

    Raises:
        TooLarge: they are more than the queue can hold.
    """
    boundaries = boundaries_of(plans, response)
    if boundaries is not None:
        sequence = replace(sequence, boundaries=boundaries)
    if not reencodes:
        return sequence, []
    if (tokens := count_prefix_tokens(sequence)) > limit:
        raise TooLarge(
            f"each closed prefix is a sequence of its own to this model: {tokens} tokens, and the queue holds "
            f"{limit}; take a larger `stride`, or a shorter response",
            tokens=tokens,
            limit=limit,
        )
    return split_prefixes(sequence)


def check_auxiliary(samples: int, tokens: int, limit: int) -> None:
    """Refuse a request as soon as its auxiliary sequences are more than the queue can hold, before more are made.

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
