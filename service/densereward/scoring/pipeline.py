"""Read this first: what happens to a request.

    plan       its methods are read, and what they need of the forward pass                (plans.py)
    align      each sample becomes ids, with the response's place and the closing tokens   (align.py)
    further    what its methods want scored beside it: variants, closed prefixes           (further.py)
    batch      sequences of all callers wait together for the engine                       (batcher.py)
    engine     one forward pass keeps the scores and attention rows that were asked for    (engines/, heads/)
    method     each method turns them into rewards on the model's tokens                   (methods/)
    place      the rewards move to the trainer's own tokens                                (slots.py)
    answer     all of it in the shape of densereward_client.wire                           (answer.py)

One `Pipeline` is one loaded model. `prepare` is what comes before the wait for the engine, `answer` what comes after
it; both run in threads, off the event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np

from densereward.capture import Captured, Need
from densereward.engines.base import TOLERANCE, Engine
from densereward.errors import DenseRewardError, EngineFailure
from densereward.metrics import Metrics
from densereward.scheduling.batcher import Batcher, Scored
from densereward.scoring.answer import envelope, error_item, reward_item, token_rewards_item
from densereward.scoring.auxiliary import check_further, with_further
from densereward.scoring.model_card import card_of, fingerprint_of
from densereward.scoring.plans import Plan, needs_of, plan
from densereward.scoring.reencoding import together
from densereward.scoring.running_deviation import Spread
from densereward.tokenization.align import Aligned, Aligner
from densereward_client.wire import Message, RewardsRequest, Sample, TokenRewardsRequest

__all__ = ["Pipeline", "Samples", "Scorer", "Scores", "Work", "answer_to"]

Samples = Sequence[Sample | DenseRewardError]
"""A request's samples; an error stands where one could not even be read."""


@runtime_checkable
class Scorer(Protocol):
    """What a route asks: a model's pipeline, or several together; each hands its own work from step to step.

    Attributes:
        fingerprint: changes when a model, how it reads text, or how models are combined does.
        closing_text: what the tokens are read from that close a response; None where no text is read as these.
    """

    fingerprint: str
    closing_text: str | None

    def prepare(self, request: RewardsRequest, samples: Samples) -> Any:
        """All that comes before the engine. Blocks; for a thread."""

    async def score(self, work: Any) -> Any:
        """Wait for the engine."""

    def answer(self, work: Any, scores: Any) -> dict[str, Any]:
        """All that comes after it. Blocks; for a thread."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine gave for a sample: its own pass, and per method what its variants gave."""

    scored: Scored
    variants: Sequence[Sequence[Captured]]


Scores = Sequence[Outcome | DenseRewardError]
"""What the engine gave for each sample; an error stands where one could not be scored."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request on its way through the engine.

    Attributes:
        plans: its methods; none for sequence rewards.
        aligned: its samples, ready for the engine, or the error that stands for one.
        started: when it began, by time.perf_counter.
        counted: whether its rewards are some of those whose spread is measured.
    """

    request: RewardsRequest
    samples: Samples
    plans: Sequence[Plan]
    aligned: Sequence[Aligned | DenseRewardError]
    started: float
    counted: bool = True


async def answer_to(scorer: Scorer, request: RewardsRequest, samples: Samples) -> dict[str, Any]:
    """From a request to its answer.

    Raises:
        DenseRewardError: what could not be served, and what to do next.
    """
    work = await asyncio.to_thread(scorer.prepare, request, samples)
    return await asyncio.to_thread(scorer.answer, work, await scorer.score(work))


class Pipeline:
    """One model, from samples to answers.

    Under `on_error: "request"` the first bad sample raises its error, with its index. Under `"item"` the error
    stands in the sample's place and the rest are served.

    Args:
        name: what requests call the model.
        engine: what runs it.
        aligner: what reads samples for it.
        batcher: the queue in front of the engine.
        metrics: where samples are counted.
    """

    def __init__(self, name: str, engine: Engine, aligner: Aligner, batcher: Batcher, metrics: Metrics) -> None:
        self.name = name
        self._engine = engine
        self._aligner = aligner
        self._batcher = batcher
        self._metrics = metrics
        self.spread = Spread(TOLERANCE[engine.facts.dtype])
        self.card = card_of(name, engine, aligner)
        self.fingerprint = fingerprint_of(self.card, engine, aligner)
        self.closing_text = self.card.closing_text

    async def close(self) -> None:
        """Finish what waits, then free the engine."""
        await self._batcher.close()
        self._engine.close()

    def prepare(self, request: RewardsRequest, samples: Samples) -> Work:
        """All that comes before the engine. Blocks; for a thread.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        started = time.perf_counter()
        plans: list[Plan] = []
        needs: frozenset[Need] = frozenset()
        if isinstance(request, TokenRewardsRequest):
            plans = self.plan(request)
            needs = needs_of(plans, request, self._engine)
        return Work(request, samples, plans, self._align(request, samples, plans, needs), started)

    def plan(self, request: TokenRewardsRequest) -> list[Plan]:
        """The request's methods, as this model would run them.

        Raises:
            DenseRewardError: a method or a parameter that is not there.
        """
        return plan(request, self._engine)

    def whole(self, given: str | Sequence[int] | Sequence[Message], *, special_tokens: bool) -> Sample:
        """What holds prompt and response already, as a sample; see `Aligner.whole`.

        Raises:
            InvalidRequest: the model must know where the response begins, or reads no dialogues.
        """
        return self._aligner.whole(given, special_tokens=special_tokens)

    async def score(self, work: Work) -> Scores:
        """Run what could be aligned; errors keep their places.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        asked = [[each.sequence, *each.further] for each in work.aligned if isinstance(each, Aligned)]
        results = iter(await self._batcher.score(list(chain(*asked)), work.request.priority))
        return [
            _outcome(
                next(results),
                [list(islice(results, len(variants))) for variants in part.variants],
                list(islice(results, len(part.prefixes))),
                part.sequence.boundaries,
            )
            if isinstance(part, Aligned)
            else part
            for part in work.aligned
        ]

    def answer(self, work: Work, scores: Scores) -> dict[str, Any]:
        """All that comes after the engine. Blocks; for a thread.

        Raises:
            EngineFailure: what the engine could not do.
        """
        scored = [self._checked(work, index, result) for index, result in enumerate(scores)]
        served = [each.scored for each in scored if isinstance(each, Outcome)]
        captured = [each.captured for each in served]
        if work.counted:
            self.spread.add([each.reward for each in captured])
        work = replace(work, plans=self._settled(work.plans, captured))
        items = [self._item(work, index, result) for index, result in enumerate(scored)]
        kind = "token_rewards" if isinstance(work.request, TokenRewardsRequest) else "rewards"
        sequences = [each.sequence for each in work.aligned if isinstance(each, Aligned)]
        variants = [each for part in work.aligned if isinstance(part, Aligned) for each in part.further]
        answer = envelope(kind, items, sequences, variants, served, work.started)
        self._metrics.scored(self.name, len(served), answer["usage"]["forward_tokens"])
        return answer | {"model": self.name, "fingerprint": self.fingerprint}

    def _settled(self, plans: Sequence[Plan], captured: Sequence[Captured]) -> list[Plan]:
        """The methods' parameters, with what only the samples and those before them tell."""
        settled = []
        for each in plans:
            params = each.method.settle(captured, each.params)
            if params.normalize == "running" and captured:
                params = params.model_copy(update={"normalize": self.spread.measured()[1]})
            settled.append(replace(each, params=params))
        return settled

    def _align(
        self, request: RewardsRequest, samples: Samples, plans: Sequence[Plan], needs: frozenset[Need]
    ) -> list[Aligned | DenseRewardError]:
        aligned: list[Aligned | DenseRewardError] = []
        tokens = 0
        for index, sample in enumerate(samples):
            try:
                part = self._align_one(sample, plans, needs, truncate=request.truncate is not None)
            except DenseRewardError as error:
                aligned.append(_in_its_place(error, index, sample, request))
                continue
            aligned.append(part)
            tokens += sum(each.forward_tokens for each in part.further)
            check_further(index + 1, tokens, self._batcher.max_queue_tokens)
        return aligned

    def _align_one(
        self, sample: Sample | DenseRewardError, plans: Sequence[Plan], needs: frozenset[Need], *, truncate: bool
    ) -> Aligned:
        if isinstance(sample, DenseRewardError):
            raise sample
        aligned = self._aligner.align(sample, needs, truncate=truncate)
        limit = self._batcher.max_queue_tokens
        reencodes = self._engine.facts.reencodes
        return with_further(aligned, sample, plans, self._aligner, reencodes=reencodes, limit=limit)

    def _checked(self, work: Work, index: int, result: Outcome | DenseRewardError) -> Outcome | DenseRewardError:
        result = _finite(result)
        if isinstance(result, EngineFailure):
            return _in_its_place(result, index, work.samples[index], work.request)
        return result

    def _item(self, work: Work, index: int, result: Outcome | DenseRewardError) -> dict[str, Any]:
        sample, part = work.samples[index], work.aligned[index]
        if isinstance(result, DenseRewardError):
            return error_item(index, result)
        if not (isinstance(sample, Sample) and isinstance(part, Aligned)):
            raise TypeError(f"sample {index} was scored and never aligned")
        if not isinstance(work.request, TokenRewardsRequest):
            return reward_item(index, sample, part, result.scored.captured)
        try:
            return token_rewards_item(
                index,
                sample,
                part,
                result.scored.captured,
                variants=result.variants,
                plans=work.plans,
                request=work.request,
                vocabulary=self._aligner.vocabulary,
            )
        except EngineFailure as error:
            return error_item(index, _in_its_place(error, index, sample, work.request))


def _outcome(
    own: Scored | EngineFailure,
    variants: Sequence[Sequence[Scored | EngineFailure]],
    prefixes: Sequence[Scored | EngineFailure],
    boundaries: Sequence[int] | None,
) -> Outcome | EngineFailure:
    """The results of a sample, its variants and prefixes; the first failure stands for all of it."""
    if isinstance(own, EngineFailure):
        return own
    if failure := next((each for each in prefixes if isinstance(each, EngineFailure)), None):
        return failure
    closed = [each.captured for each in prefixes if isinstance(each, Scored)]
    own = replace(own, captured=together(own.captured, closed, boundaries))
    captured = []
    for each in variants:
        if failure := next((result for result in each if isinstance(result, EngineFailure)), None):
            return failure
        captured.append([result.captured for result in each if isinstance(result, Scored)])
    return Outcome(own, captured)


def _finite(result: Outcome | DenseRewardError) -> Outcome | DenseRewardError:
    """A capture that holds a number that is not finite is a failure."""
    if isinstance(result, DenseRewardError):
        return result
    captured = [result.scored.captured, *chain(*result.variants)]
    arrays = (array for each in captured for array in each.arrays)
    if all(math.isfinite(each.reward) for each in captured) and all(np.isfinite(array).all() for array in arrays):
        return result
    return EngineFailure("the model gave a number that is not finite", code="not_finite")


def _in_its_place(
    error: DenseRewardError, index: int, sample: Sample | DenseRewardError, request: RewardsRequest
) -> DenseRewardError:
    """The error with the sample's index, to stand for the sample, or raised where one bad sample fails them all."""
    error.details["index"] = index
    if isinstance(sample, Sample) and sample.id is not None:
        error.details["id"] = sample.id
    error.message = f"samples[{index}]: {error.message}"
    if request.on_error == "request":
        raise error
    return error
