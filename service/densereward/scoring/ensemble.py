"""Several reward models as one: each scores the same samples, and their rewards are added on the same tokens.

With z_m = (R_m - mean_m) / deviation_m, or R_m itself where `normalize` is not given, the ensemble's reward is a
weighted sum, and its token rewards and baseline are the models' own with the same weights, so that their sum is the
ensemble's reward exactly:

    mean          mean z_m                          w_m = 1 / M
    min           the lowest z_m                    w_m = [m is the lowest]                 (WCO, arXiv 2310.02743)
    uncertainty   mean z_m - penalty * var z_m      w_m = (1 - penalty * (z_m - mean z)) / M   (UWO, same)

var z = mean z_m (z_m - mean z), so the last row is an identity and no approximation. Models with different tokenizers
share the trainer's `response_spans`, or the first model's tokens where the trainer sent none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from densereward.errors import EngineFailure, InvalidRequest
from densereward.scoring.answer import encoder
from densereward.scoring.combine import all_scores, merged, on_the_same_tokens
from densereward.scoring.pipeline import Pipeline, Samples, Scores, Work
from densereward.scoring.placement import check_sum
from densereward.scoring.plans import default_method
from densereward_client.wire import Ensemble, RewardsRequest, TokenRewardsRequest

__all__ = ["EnsemblePipeline"]

_Scales = tuple[Float64[np.ndarray, " M"], Float64[np.ndarray, " M"]]
"""Means and deviations."""


@dataclass(frozen=True, slots=True)
class _Works:
    """A request on its way through all the models."""

    request: RewardsRequest
    each: Sequence[Work]


class EnsemblePipeline:
    """Several pipelines, called as one.

    Args:
        name: what the answer calls it.
        members: the models, at least two.
        ensemble: how their rewards are combined.
    """

    def __init__(self, name: str, members: Sequence[Pipeline], ensemble: Ensemble) -> None:
        self.name = name
        self._members = members
        self._ensemble = ensemble
        texts = {member.closing_text for member in members}
        self.closing_text = texts.pop() if len(texts) == 1 else None
        identity = repr([*(member.fingerprint for member in members), ensemble.model_dump()])
        self.fingerprint = f"fp-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        if isinstance(ensemble.normalize, Mapping):
            names = [member.name for member in members]
            if missing := sorted(set(names) ^ ensemble.normalize.keys()):
                raise InvalidRequest(
                    f"ensemble.normalize must name each of {', '.join(names)}, and nothing else; look at "
                    f"{', '.join(missing)}",
                    code="invalid_ensemble",
                    field="ensemble",
                )

    def prepare(self, request: RewardsRequest, samples: Samples) -> _Works:
        """All that comes before the engines. Blocks; for a thread.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        asked = self._for_a_member(request)
        first = self._members[0].prepare(asked, samples)
        works = [first]
        for member in self._members[1:]:
            shared = on_the_same_tokens(samples, first.prepared, self._members[0], member)
            works.append(member.prepare(asked, shared))
        return _Works(request, works)

    async def score(self, work: _Works) -> list[Scores]:
        """Every model's scores, all at once.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        return await all_scores(self._members, work.each)

    def answer(self, work: _Works, scores: Sequence[Scores]) -> dict[str, Any]:
        """All that comes after the engines. Blocks; for a thread.

        Raises:
            DenseRewardError: what could not be served, and what to do next.
        """
        answers = [
            member.answer(own, found) for member, own, found in zip(self._members, work.each, scores, strict=True)
        ]
        request = work.request
        encode = encoder(request.encoding_format) if isinstance(request, TokenRewardsRequest) else None
        scales = self._scales()
        items = [
            self._item(parts, scales, encode) for parts in zip(*(answer["data"] for answer in answers), strict=True)
        ]
        return merged(answers) | {"data": items, "model": self.name, "fingerprint": self.fingerprint}

    def _for_a_member(self, request: RewardsRequest) -> RewardsRequest:
        """The request as each model gets it: plain numbers, nothing that only one model could answer."""
        if not isinstance(request, TokenRewardsRequest):
            return request
        if request.include:
            raise InvalidRequest(
                "an ensemble has no tokens, scores or segments of its own; ask one of its models",
                code="invalid_ensemble",
                field="include",
            )
        for asked in request.method_requests("red"):
            if {"normalize", "clip"} & asked.params.keys():
                raise InvalidRequest(
                    f"method {asked.key}: in an ensemble, `normalize` belongs to `ensemble`, and nothing is clipped",
                    code="invalid_ensemble",
                    field="methods",
                )
        methods = request.methods or [default_method([member.card.methods for member in self._members])]
        return request.model_copy(update={"encoding_format": "float", "methods": methods})

    def _item(self, parts: Sequence[dict[str, Any]], scales: _Scales, encode: Any) -> dict[str, Any]:
        """One sample's answers as one."""
        if failed := next((part for part in parts if "error" in part), None):
            return failed
        rewards = {member.name: part["reward"] for member, part in zip(self._members, parts, strict=True)}
        means, deviations = scales
        z = (np.array(list(rewards.values())) - means) / deviations
        weights = _weights(z, self._ensemble)
        reward = float(weights @ z)
        item = parts[0] | {
            "reward": reward,
            "rewards": rewards,
            "disagreement": float(z.std()),
            "warnings": [
                *dict.fromkeys(warning for part in parts for warning in part["warnings"]),
                *self._notices(weights),
            ],
        }
        check_sum(np.zeros(0, np.float32), reward, reward)
        if encode is None:
            return item
        for name in ("attention_mass", "passes", "standard_error"):
            item.pop(name, None)
        share = weights / deviations
        token_rewards, baseline = {}, {}
        for key in parts[0]["token_rewards"]:
            each = [part["token_rewards"][key].astype(np.float64) for part in parts]
            if len({len(own) for own in each}) > 1:
                raise EngineFailure(f"the models gave {[len(own) for own in each]} rewards for one sample's tokens")
            left_out = np.array([part["baseline"][key] for part in parts]) - means
            combined = (share @ np.stack(each)).astype(np.float32)
            baseline[key] = float(share @ left_out)
            check_sum(combined, baseline[key], reward)
            token_rewards[key] = encode(combined)
        return item | {"token_rewards": token_rewards, "baseline": baseline}

    def _notices(self, weights: Float64[np.ndarray, " M"]) -> list[str]:
        """What may surprise a trainer."""
        notices = []
        if self._ensemble.normalize is None:
            notices.append("not_normalized: the models' rewards were combined as they are; see `ensemble.normalize`")
        if (weights < 0).any():
            notices.append("negative_weight: a model is so far above the mean that `penalty` turns its rewards round")
        return notices

    def _scales(self) -> _Scales:
        """Mean and deviation of each model's rewards, as they are to be taken off; the same for all samples."""
        given = self._ensemble.normalize
        if given is None:
            return np.zeros(len(self._members)), np.ones(len(self._members))
        if given == "running":
            pairs = [member.running_deviation.measured() for member in self._members]
        else:
            pairs = [given[member.name] for member in self._members]
        return np.array([mean for mean, _ in pairs]), np.array([deviation for _, deviation in pairs])


def _weights(z: Float64[np.ndarray, " M"], ensemble: Ensemble) -> Float64[np.ndarray, " M"]:
    """What each model's normalised reward counts."""
    if ensemble.how == "min":
        lowest: Float64[np.ndarray, " M"] = np.eye(len(z))[int(z.argmin())]
        return lowest
    penalty = ensemble.penalty if ensemble.how == "uncertainty" else 0.0
    weights: Float64[np.ndarray, " M"] = (1 - penalty * (z - z.mean())) / len(z)
    return weights
