"""Read this first: what happens to a request, folder by folder.

    server         bytes become a request, and its samples are parsed one by one              (server/routes)
    plans          its methods are read, and what they need of the forward pass               (scoring/plans)
    tokenization   each sample becomes ids: read, framed, closed                              (tokenization/align)
    auxiliary      sequences that its methods need beside it                                  (scoring/auxiliary)
    scheduling     sequences of all callers wait in one queue and run in batches              (scheduling/batcher)
    engine         one forward pass keeps the scores and attention rows that were asked for   (engines, heads)
    methods        each method turns them into credit on the model's tokens                   (scoring/redistribution)
    placement      the credit moves to the trainer's own tokens                               (scoring/placement)
    answer         all of it in the shape of densereward_client.wire                          (scoring/answer)

One `Pipeline` is one loaded model. `prepare` is what comes before the wait for the engine, `answer` what comes after
it; both run in threads, off the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from densereward.capture import Captured, Need
from densereward.engines.base import TOLERANCE, Engine
from densereward.errors import DenseRewardError, EngineFailure
from densereward.metrics import Metrics
from densereward.scheduling.batcher import Batcher
from densereward.scoring.answer import envelope, error_item, reward_item, token_rewards_item
from densereward.scoring.auxiliary import check_auxiliary
from densereward.scoring.model_card import card_of, fingerprint_of
from densereward.scoring.outcome import Outcome, checked_finite, take_outcome
from densereward.scoring.plans import Plan, needs_of, plan
from densereward.scoring.preparation import PreparedSample, prepare_sample
from densereward.scoring.redistribution import redistribute
from densereward.scoring.running_deviation import RunningDeviation
from densereward.tokenization.align import Aligner
from densereward_client.wire import Message, Precision, RewardsRequest, Sample, TokenRewardsRequest

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


Scores = Sequence[Outcome | DenseRewardError]
"""What the engine gave for each sample; an error stands where one could not be scored."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request on its way through the engine.

    Attributes:
        plans: its methods; none for sequence rewards.
        prepared: its samples, ready for the engine, or the error that stands for one.
        started: when it began, by time.perf_counter.
        counted: whether its rewards count towards the model's running deviation.
    """

    request: RewardsRequest
    samples: Samples
    plans: Sequence[Plan]
    prepared: Sequence[PreparedSample | DenseRewardError]
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
        precision: what half precision costs, as it was measured.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        aligner: Aligner,
        batcher: Batcher,
        metrics: Metrics,
        precision: Precision | None = None,
    ) -> None:
        self.name = name
        self._engine = engine
        self._aligner = aligner
        self._batcher = batcher
        self._metrics = metrics
        self.running_deviation = RunningDeviation(TOLERANCE[engine.facts.dtype])
        self.card = card_of(name, engine, aligner, precision)
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
        return Work(request, samples, plans, self._prepared(request, samples, plans, needs), started)

    def plan(self, request: TokenRewardsRequest) -> list[Plan]:
        """The request's methods, as this model would run them.

        Raises:
            DenseRewardError: a method or a parameter that is not there.
        """
        return plan(request, self._engine)

    def preassembled(self, given: str | Sequence[int] | Sequence[Message], *, special_tokens: bool) -> Sample:
        """What holds prompt and response already, as a sample; see `Aligner.preassembled`.

        Raises:
            InvalidRequest: the model must know where the response begins, or reads no dialogues.
        """
        return self._aligner.preassembled(given, special_tokens=special_tokens)

    async def score(self, work: Work) -> Scores:
        """Run what could be prepared; errors keep their places.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        sequences = [[each.sequence, *each.auxiliary] for each in work.prepared if isinstance(each, PreparedSample)]
        results = iter(await self._batcher.score(list(chain(*sequences)), work.request.priority))
        return [take_outcome(each, results) if isinstance(each, PreparedSample) else each for each in work.prepared]

    def answer(self, work: Work, scores: Scores) -> dict[str, Any]:
        """All that comes after the engine. Blocks; for a thread.

        Raises:
            EngineFailure: what the engine could not do.
        """
        scored = [self._checked(work, index, result) for index, result in enumerate(scores)]
        served = [each.scored for each in scored if isinstance(each, Outcome)]
        captured = [each.captured for each in served]
        if work.counted:
            self.running_deviation.add([each.reward for each in captured])
        work = replace(work, plans=self._settled(work.plans, captured))
        items = [self._item(work, index, result) for index, result in enumerate(scored)]
        kind = "token_rewards" if isinstance(work.request, TokenRewardsRequest) else "rewards"
        prepared = [each for each in work.prepared if isinstance(each, PreparedSample)]
        sequences = [each.sequence for each in prepared]
        auxiliary = list(chain(*(each.auxiliary for each in prepared)))
        answer = envelope(kind, items, sequences, auxiliary, served, work.started)
        self._metrics.scored(self.name, len(served), answer["usage"]["forward_tokens"])
        return answer | {"model": self.name, "fingerprint": self.fingerprint}

    def _settled(self, plans: Sequence[Plan], captured: Sequence[Captured]) -> list[Plan]:
        """The methods' parameters, with what only the samples and those before them tell."""
        settled = []
        for each in plans:
            params = each.method.settle(captured, each.params)
            if params.normalize == "running" and captured:
                params = params.model_copy(update={"normalize": self.running_deviation.measured()[1]})
            settled.append(replace(each, params=params))
        return settled

    def _prepared(
        self, request: RewardsRequest, samples: Samples, plans: Sequence[Plan], needs: frozenset[Need]
    ) -> list[PreparedSample | DenseRewardError]:
        prepared: list[PreparedSample | DenseRewardError] = []
        tokens = 0
        limit = self._batcher.max_queue_tokens
        for index, sample in enumerate(samples):
            try:
                each = self._prepare_one(sample, plans, needs, truncate=request.truncate is not None)
            except DenseRewardError as error:
                prepared.append(_in_its_place(error, index, sample, request))
                continue
            prepared.append(each)
            tokens += sum(sequence.forward_tokens for sequence in each.auxiliary)
            check_auxiliary(index + 1, tokens, limit)
        return prepared

    def _prepare_one(
        self, sample: Sample | DenseRewardError, plans: Sequence[Plan], needs: frozenset[Need], *, truncate: bool
    ) -> PreparedSample:
        if isinstance(sample, DenseRewardError):
            raise sample
        return prepare_sample(
            sample,
            plans,
            needs,
            self._aligner,
            truncate=truncate,
            reencodes=self._engine.facts.reencodes,
            limit=self._batcher.max_queue_tokens,
        )

    def _checked(self, work: Work, index: int, result: Outcome | DenseRewardError) -> Outcome | DenseRewardError:
        result = checked_finite(result)
        if isinstance(result, EngineFailure):
            return _in_its_place(result, index, work.samples[index], work.request)
        return result

    def _item(self, work: Work, index: int, result: Outcome | DenseRewardError) -> dict[str, Any]:
        sample, prepared = work.samples[index], work.prepared[index]
        if isinstance(result, DenseRewardError):
            return error_item(index, result)
        if not (isinstance(sample, Sample) and isinstance(prepared, PreparedSample)):
            raise TypeError(f"sample {index} was scored and never prepared")
        if not isinstance(work.request, TokenRewardsRequest):
            return reward_item(index, sample, prepared, result.scored.captured)
        captured = result.scored.captured
        try:
            redistributed = redistribute(prepared, captured, result.variants, work.plans)
        except EngineFailure as error:
            return error_item(index, _in_its_place(error, index, sample, work.request))
        return token_rewards_item(
            index,
            sample,
            prepared,
            captured,
            redistributed=redistributed,
            request=work.request,
            vocabulary=self._aligner.vocabulary,
        )


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
