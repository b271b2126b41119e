"""A sample made ready for the engine: its ids, the trainer's tokens, and the sequences scored beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from densereward.capture import Need, ScoringInput
from densereward.methods.base import Response
from densereward.methods.boundaries import TextBoundaries
from densereward.scoring.auxiliary import closed_prefixes, variants_of
from densereward.scoring.placement import Slots, slots_of
from densereward.scoring.plans import Plan
from densereward.tokenization.align import Aligned, Aligner
from densereward_client.wire import Sample

__all__ = ["PreparedSample", "prepare_sample"]


@dataclass(frozen=True, slots=True)
class PreparedSample:
    """One sample, ready for the engine.

    Attributes:
        aligned: the sample as ids.
        sequence: what the engine scores of it.
        slots: where the rewards go.
        response: what methods may know of the response.
        variants: per method of the request, what else it needs to be scored.
        prefixes: closed prefixes that are sequences of their own.
    """

    aligned: Aligned
    sequence: ScoringInput
    slots: Slots
    response: Response
    variants: Sequence[Sequence[ScoringInput]] = ()
    prefixes: Sequence[ScoringInput] = ()

    @property
    def auxiliary(self) -> list[ScoringInput]:
        """All that is scored beside the sequence: variants, method by method, and then the prefixes."""
        return [*chain(*self.variants), *self.prefixes]


def prepare_sample(
    sample: Sample,
    plans: Sequence[Plan],
    needs: frozenset[Need],
    aligner: Aligner,
    *,
    truncate: bool,
    reencodes: bool,
    limit: int,
) -> PreparedSample:
    """Align a sample, find its slots, and add what its methods want scored beside it.

    Args:
        sample: as the trainer sent it.
        plans: the request's methods.
        needs: what the engine must keep of the sample's own sequence.
        aligner: the model's.
        truncate: whether a prompt may lose its beginning.
        reencodes: whether closed prefixes are sequences of their own to the engine.
        limit: tokens that the queue holds.

    Raises:
        InvalidRequest: a field, a length or an id that cannot be served, or a method that cannot serve the response.
        TooLong: more tokens than the model reads.
        TooLarge: the closed prefixes are more than the queue can hold.
    """
    aligned = aligner.align(sample, needs, truncate=truncate)
    slots = slots_of(aligned.sample, len(aligned.response_ids))
    response = _response(aligned, slots, aligner)
    for each in plans:
        each.method.check(response)
    variants = [variants_of(sample, aligned.sequence, response, each, aligner) for each in plans]
    sequence, prefixes = closed_prefixes(aligned.sequence, response, plans, reencodes=reencodes, limit=limit)
    return PreparedSample(aligned, sequence, slots, response, variants, prefixes)


def _response(aligned: Aligned, slots: Slots, aligner: Aligner) -> Response:
    sample = aligned.sample
    boundaries = None
    if aligned.spans is not None:
        text = partial(aligner.vocabulary.bytes_of, aligned.response_ids)
        read = text if sample.response is None else sample.response.encode
        boundaries = TextBoundaries(read, aligned.spans, slots.spans)
    return Response(
        length=len(aligned.response_ids),
        count=slots.count,
        ids=aligned.response_ids,
        blank_id=aligner.vocabulary.blank_id,
        weights=None if sample.weights is None else np.asarray(sample.weights, dtype=np.float64),
        entropies=None if sample.token_entropies is None else np.asarray(sample.token_entropies, dtype=np.float64),
        finished=aligned.finished,
        text_boundaries=boundaries,
        steps=aligned.steps,
    )
