"""Proximal policy optimisation with a reward for each token: the training loop.

In each step, the policy continues a batch of openings. The judge rewards each token, and a KL penalty to the reference
is subtracted. Advantages are estimated by GAE with gamma 1. The policy gets clipped updates, the critic squared-error
updates. Methods differ in the judge alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .judge import Judged
from .policy import Policy, Responses

__all__ = ["Moments", "Settings", "advantages", "train"]

Judging = Callable[[Tensor, Responses], Judged]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; plan.toml has the chosen ones.

    Attributes:
        tokens: The most that are written after an opening.
        warm_up: Batches of the start policy that the critic is fitted to before the policy learns.
        warm_up_epochs: How often the critic is fitted to each of them.
        scale: A factor on the standardised rewards.
        whiten: Whether each batch's advantages are standardised.
    """

    tokens: int = 20
    batch: int = 24
    epochs: int = 2
    minibatches: int = 2
    learning_rate: float = 1e-4
    critic_rate: float = 1e-4
    clip: float = 0.2
    kl: float = 0.05
    gae_lambda: float = 0.95
    whiten: bool = True
    warm_up: int = 12
    warm_up_epochs: int = 4
    scale: float = 1.0


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the start policy's scores, which standardise the rewards of every method."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Batch:
    """What the policy wrote and what is needed to learn from it; [batch, tokens] unless noted."""

    openings: Tensor  # [batch, tokens of an opening]
    responses: Responses
    hidden: Tensor  # of the shared layers, [batch, opening + tokens, width]
    old: Tensor  # log-probabilities under the policy that wrote
    log_ratio: Tensor  # those minus the reference's
    entropy: Tensor
    rewards: Tensor  # the judge's, standardised, minus the KL penalty
    values: Tensor
    judged: Judged

    @property
    def mask(self) -> Tensor:
        """True for the tokens of the texts."""
        return self.responses.mask


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates with gamma 1, [batch, tokens]; the value after a text's end is 0."""
    rewards, values = rewards * mask, values * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    errors, running = rewards + next_values - values, torch.zeros_like(rewards[:, 0])
    estimates = torch.zeros_like(rewards)
    for token in reversed(range(rewards.shape[1])):
        running = errors[:, token] + gae_lambda * running
        estimates[:, token] = running
    return estimates * mask


def train(
    policy: Policy, judge: Judging, moments: Moments, settings: Settings, *, steps: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Train `policy` in place and yield one record per step.

    The same seed gives every method the same openings and the same warm-up texts.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.upper.parameters(), lr=settings.learning_rate)
    critic = [*policy.critic.parameters(), *policy.value_head.parameters()]
    critic_optimizer = torch.optim.Adam(critic, lr=settings.critic_rate)

    def fit_critic(batch: Batch, rows: Tensor, targets: Tensor) -> None:
        values = policy.values(batch.hidden[rows], targets.shape[1])
        _descend(critic_optimizer, critic, _mean((values - targets[rows]) ** 2, batch.mask[rows]))

    def fit_policy(batch: Batch, rows: Tensor, estimates: Tensor) -> None:
        logits = policy.logits(policy.upper, batch.hidden[rows], estimates.shape[1])
        new = _log_probabilities(logits, batch.responses.choices[rows])
        ratio, gain = (new - batch.old[rows]).exp(), estimates[rows]
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        _descend(
            optimizer, policy.upper.parameters(), -_mean(torch.min(ratio * gain, clipped * gain), batch.mask[rows])
        )

    def minibatches(batch: Batch) -> tuple[Tensor, ...]:
        return torch.randperm(len(batch.mask), generator=generator).to(batch.mask.device).chunk(settings.minibatches)

    warm_up = [collect(policy, judge, moments, settings, generator) for _ in range(settings.warm_up)]
    for _ in range(settings.warm_up_epochs):
        for batch in warm_up:
            for rows in minibatches(batch):
                fit_critic(batch, rows, _returns(batch))
    for step in range(steps):
        started = time.monotonic()
        batch = collect(policy, judge, moments, settings, generator)
        estimates = advantages(batch.rewards, batch.values, batch.mask, settings.gae_lambda)
        targets = estimates + batch.values
        gain = _whitened(estimates, batch.mask) if settings.whiten else estimates
        for _ in range(settings.epochs):
            for rows in minibatches(batch):
                fit_critic(batch, rows, targets)
                fit_policy(batch, rows, gain)
        yield {"step": step, **_record(batch, policy.facts.end), "seconds": round(time.monotonic() - started, 3)}


@torch.no_grad()
def collect(policy: Policy, judge: Judging, moments: Moments, settings: Settings, generator: torch.Generator) -> Batch:
    """A batch of texts with their rewards."""
    drawn = torch.randint(len(policy.openings), (settings.batch,), generator=generator)
    openings = policy.openings[drawn.to(policy.openings.device)]
    responses = policy.sample(openings, settings.tokens, generator)
    judged = judge(openings, responses)
    hidden = policy.read(openings, responses)
    logits = policy.logits(policy.upper, hidden, settings.tokens)
    old = _log_probabilities(logits, responses.choices)
    reference = _log_probabilities(policy.logits(policy.reference, hidden, settings.tokens), responses.choices)
    log_ratio = (old - reference) * responses.mask
    # The mean is subtracted at one token of each text, so that no method rewards length.
    last = responses.mask.sum(1, keepdim=True) - 1
    rewards = judged.rewards.scatter_add(1, last, torch.full_like(judged.rewards[:, :1], -moments.mean))
    rewards = settings.scale * rewards / moments.deviation - settings.kl * log_ratio
    values = policy.values(hidden, settings.tokens)
    return Batch(openings, responses, hidden, old, log_ratio, _entropy(logits), rewards, values, judged)


def _descend(optimizer: torch.optim.Optimizer, weights: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def _log_probabilities(logits: Tensor, choices: Tensor) -> Tensor:
    return -functional.cross_entropy(logits.flatten(0, 1), choices.flatten(), reduction="none").view_as(choices)


def _entropy(logits: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def _whitened(values: Tensor, mask: Tensor) -> Tensor:
    unmasked = values[mask]
    return (values - unmasked.mean()) / (unmasked.std() + 1e-6) * mask


def _returns(batch: Batch) -> Tensor:
    """The sum of the rewards from each token on."""
    return (batch.rewards * batch.mask).flip(1).cumsum(1).flip(1)


def _record(batch: Batch, end: int) -> dict[str, Any]:
    returns, mask, judged = _returns(batch), batch.mask, batch.judged
    explained = 1 - (returns - batch.values)[mask].var() / returns[mask].var().clamp(min=1e-9)
    rows = [ids[:length] for ids, length in zip(batch.responses.ids.tolist(), mask.sum(1).tolist(), strict=True)]
    pairs = [pair for ids in rows for pair in itertools.pairwise(ids)]
    scores, sums = judged.scores - judged.scores.mean(), judged.rewards.sum(1)
    return {
        "reward": round(float(judged.scores.mean()), 4),
        "kl": round(float(batch.log_ratio.sum(1).mean()), 4),
        "entropy": round(float(_mean(batch.entropy, mask)), 4),
        "length": round(float(mask.sum(1).float().mean()), 2),
        "finished": round(sum(ids[-1] == end for ids in rows) / len(rows), 4),
        "explained": round(float(explained), 4),
        "baseline": round(float(judged.baselines.mean()), 4),
        # How much of R the token rewards pay: the slope of their sums on R.
        "paid": round(float((scores * sums).sum() / (scores**2).sum().clamp(min=1e-9)), 4),
        "distinct": round(len(set(pairs)) / max(1, len(pairs)), 4),
        "warnings": judged.warnings,
        "ids": [[*opening, *ids] for opening, ids in zip(batch.openings.tolist(), rows, strict=True)][:3],
    }
