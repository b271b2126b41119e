"""Answers in the shape of densereward_client.wire, as dictionaries whose arrays are still numpy."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from densereward.align import Aligned
from densereward.batcher import Scored
from densereward.capture import Captured
from densereward.errors import DenseRewardError
from densereward.methods.base import Credit
from densereward.plans import Plan
from densereward.slots import place
from densereward.tokens import Vocabulary
from densereward_client.wire import Sample, TokenRewardsRequest, encode_base64

__all__ = ["envelope", "error_item", "reward_item", "token_rewards_item"]

Encode = Callable[[np.ndarray], Any]


def envelope(
    kind: str, items: list[dict[str, Any]], aligned: Sequence[Aligned], scored: Sequence[Scored], started: float
) -> dict[str, Any]:
    """The part of an answer that is about the whole request; `started` by time.perf_counter."""
    sequences = [each.sequence for each in aligned]
    return {
        "id": f"{'tr' if kind == 'token_rewards' else 'rw'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "data": items,
        "usage": {
            "prompt_tokens": sum(each.prompt_length for each in sequences),
            "response_tokens": sum(each.response_length for each in sequences),
            "forward_tokens": sum(each.forward_tokens for each in sequences),
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


def reward_item(index: int, sample: Sample, aligned: Aligned, captured: Captured) -> dict[str, Any]:
    """A sample's sequence reward."""
    return {"index": index, "id": sample.id, "reward": captured.reward, "warnings": list(aligned.warnings)}


def token_rewards_item(
    index: int,
    sample: Sample,
    aligned: Aligned,
    captured: Captured,
    *,
    plans: Sequence[Plan],
    request: TokenRewardsRequest,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """A sample's token rewards by every method, and what the request wants beside them.

    Raises:
        EngineFailure: rewards that are not finite or do not sum to the sequence's.
    """
    encode: Encode = encode_base64 if request.encoding_format == "base64" else np.ascontiguousarray
    item = reward_item(index, sample, aligned, captured) | {"token_rewards": {}, "baseline": {}}
    for plan in plans:
        credit = _credit(plan, aligned, captured)
        rewards, baseline = place(credit, captured.reward, plan.params.beta, aligned.slots, aligned.spans)
        item["token_rewards"][plan.key] = encode(rewards)
        item["baseline"][plan.key] = baseline
        if credit.attention_mass is not None:
            item.setdefault("attention_mass", {})[plan.key] = credit.attention_mass
        item["warnings"] += [warning for warning in credit.warnings if warning not in item["warnings"]]
    return item | _included(request, aligned, captured, vocabulary, encode)


def _credit(plan: Plan, aligned: Aligned, captured: Captured) -> Credit:
    """The method's credit; without a response token, all of R on the last slot."""
    if captured.length:
        return plan.method.credit(captured, aligned.trainer_tokens, plan.params)
    rewards = np.zeros(aligned.slots.count)
    rewards[-1:] = captured.reward
    return Credit(
        rewards,
        on="slots",
        warnings=("empty_response: the response holds no token, so no method could share the reward out",),
    )


def _included(
    request: TokenRewardsRequest, aligned: Aligned, captured: Captured, vocabulary: Vocabulary, encode: Encode
) -> dict[str, Any]:
    included: dict[str, Any] = {}
    if "tokens" in request.include:
        sequence = aligned.sequence
        response = sequence.token_ids[sequence.prompt_length : sequence.response_stop]
        included["tokens"] = [vocabulary.token_text(token_id) for token_id in response]
    if "spans" in request.include:
        included["spans"] = aligned.spans
    if "prefix_scores" in request.include:
        prefixes = captured.prefixes["open"]
        included |= {"prefix_scores": encode(prefixes.after), "prompt_score": prefixes.before}
    if "attention" in request.include:
        included["attention"] = encode(captured.attention_rows[-1])
    if "segments" in request.include:
        included["segments"] = {}  # no method served here cuts segments
    return included
