"""Answers in the shape of densereward_client.wire, as dictionaries whose arrays are still numpy."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from densereward.capture import Captured, ScoringInput
from densereward.errors import DenseRewardError
from densereward.methods.base import Credit
from densereward.scheduling.batcher import Scored
from densereward.scoring.placement import Placed, slot_boundaries
from densereward.scoring.plans import Plan
from densereward.scoring.preparation import PreparedSample
from densereward.scoring.redistribution import Redistributed
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.wire import Sample, TokenRewardsRequest, encode_base64

__all__ = ["encoder", "envelope", "error_item", "method_details", "reward_item", "token_rewards_item"]

Encode = Callable[[np.ndarray], Any]


def encoder(encoding_format: str) -> Encode:
    """How arrays stand in an answer."""
    return encode_base64 if encoding_format == "base64" else np.ascontiguousarray


def envelope(
    kind: str,
    items: list[dict[str, Any]],
    sequences: Sequence[ScoringInput],
    auxiliary: Sequence[ScoringInput],
    scored: Sequence[Scored],
    started: float,
) -> dict[str, Any]:
    """The part of an answer that is about the whole request; `started` by time.perf_counter."""
    return {
        "id": f"{'tr' if kind == 'token_rewards' else 'rw'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "data": items,
        "usage": {
            "prompt_tokens": sum(each.prompt_length for each in sequences),
            "response_tokens": sum(each.response_length for each in sequences),
            "forward_tokens": sum(each.forward_tokens for each in (*sequences, *auxiliary)),
        },
        "timing": {
            "queue_ms": 1e3 * max((each.queue_seconds for each in scored), default=0.0),
            "forward_ms": 1e3 * max((each.forward_seconds for each in scored), default=0.0),
            "total_ms": 1e3 * (time.perf_counter() - started),
        },
    }


def error_item(index: int, error: DenseRewardError) -> dict[str, Any]:
    """A sample that was not served."""
    return {"index": index, "id": error.details.get("id"), "error": error.as_error()}


def reward_item(index: int, sample: Sample, prepared: PreparedSample, captured: Captured) -> dict[str, Any]:
    """A sample's sequence reward."""
    item = {"index": index, "id": sample.id, "reward": captured.reward, "warnings": list(prepared.aligned.warnings)}
    return item | ({"truncated_prompt_tokens": prepared.aligned.dropped} if prepared.aligned.dropped else {})


def token_rewards_item(
    index: int,
    sample: Sample,
    prepared: PreparedSample,
    captured: Captured,
    *,
    redistributed: Sequence[Redistributed],
    request: TokenRewardsRequest,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """A sample's token rewards by every method, and what the request includes beside them."""
    encode = encoder(request.encoding_format)
    item = reward_item(index, sample, prepared, captured) | {"token_rewards": {}, "baseline": {}}
    if "segments" in request.include:
        item["segments"] = {}
    for each in redistributed:
        key, credit = each.plan.key, each.credit
        item["token_rewards"][key] = encode(each.placed.rewards)
        item["baseline"][key] = each.placed.baseline
        if each.passes > 1:
            item.setdefault("passes", {})[key] = each.passes
        for name, value in method_details(each.plan, credit, each.placed).items():
            item.setdefault(name, {})[key] = value
        if "segments" in request.include:
            for name, values in _segments(credit, prepared).items():
                item.setdefault(name, {})[key] = values
        item["warnings"] += [warning for warning in credit.warnings if warning not in item["warnings"]]
    return item | _included(request, prepared, captured, vocabulary, encode)


def _included(
    request: TokenRewardsRequest, prepared: PreparedSample, captured: Captured, vocabulary: Vocabulary, encode: Encode
) -> dict[str, Any]:
    included: dict[str, Any] = {}
    if "tokens" in request.include:
        sequence = prepared.sequence
        response = sequence.token_ids[sequence.prompt_length : sequence.response_stop]
        included["tokens"] = [vocabulary.token_text(token_id) for token_id in response]
    if "spans" in request.include:
        included["spans"] = prepared.aligned.spans
    if "prefix_scores" in request.include:
        prefixes = captured.prefixes["open"]
        included |= {"prefix_scores": encode(prefixes.after), "prompt_score": prefixes.before}
    if "objectives" in request.include and captured.objectives is not None:
        included["objectives"] = [
            {"reward": float(each[0]), "scores": encode(each[1:])} for each in captured.objectives
        ]
    if "attention" in request.include:
        included["attention"] = encode(captured.attention_rows[-1])
    return included


def method_details(plan: Plan, credit: Credit, placed: Placed) -> dict[str, float]:
    """What an answer says of a method beside its rewards."""
    details = {}
    if credit.attention_mass is not None:
        details["attention_mass"] = credit.attention_mass
    if credit.standard_error is not None:
        details["standard_error"] = credit.standard_error * plan.params.beta * placed.scale
    if plan.params.normalize is not None:
        details["scale"] = placed.scale
    if plan.params.clip is not None:
        details["clipped"] = placed.clipped
    return details


def _segments(credit: Credit, prepared: PreparedSample) -> dict[str, list[Any]]:
    """A method's segments on the trainer's tokens, and which of these to keep, as far as it says so."""
    if not credit.segments:
        return {}
    stops = slot_boundaries([each.stop for each in credit.segments], prepared.slots, prepared.aligned.spans)
    spans = list(zip([0, *stops[:-1]], stops, credit.segments, strict=True))
    segments = [{"start": start, "end": stop, "score": each.score, "keep": each.keep} for start, stop, each in spans]
    if any(each.keep is None for each in credit.segments):
        return {"segments": segments}
    kept = range(prepared.slots.count) if prepared.slots.kept is None else prepared.slots.kept
    marked = [int(bool(each.keep)) for start, stop, each in spans for _ in range(start, stop)]
    mask = [0] * prepared.slots.count
    for slot in kept:
        mask[slot] = marked[slot]
    return {"segments": segments, "mask": mask}
