"""The contestants, a few lines each: our engine, and transformers used in the usual ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densereward.capture import AttentionRow, Captured, Need, PrefixMode, PrefixScores, ScoringInput
from densereward.engines.base import Engine, EngineFacts
from densereward.methods import METHODS
from densereward.methods.base import Response
from densereward.scheduling.cost import BatchCost, cost_of
from tests.benchmarks.harness import Numbers

_ALL_NEEDS: frozenset[Need] = frozenset([PrefixScores(), AttentionRow(-1)])


# --- our engine ---------------------------------------------------------------------------------------------------


def sequence_rewards(engine: Engine, sequences: Sequence[ScoringInput]) -> Numbers:
    """One number a sequence."""
    return {"reward": np.array([captured.reward for captured in _forward(engine, sequences, frozenset())])}


def token_rewards(engine: Engine, sequences: Sequence[ScoringInput]) -> Numbers:
    """Everything that `red` and `abc` take from the pass, and their rewards."""
    passed = _forward(engine, sequences, _ALL_NEEDS)
    return {
        "reward": np.array([captured.reward for captured in passed]),
        "prefix_scores": np.concatenate([_prefix_scores(captured) for captured in passed]),
        "attention": np.concatenate([captured.attention_rows[-1] for captured in passed]).astype(np.float64),
        "red": np.concatenate([_credit("red", captured) for captured in passed]),
        "abc": np.concatenate([_credit("abc", captured) for captured in passed]),
    }


def closed_prefixes(engine: Engine, sequence: ScoringInput) -> Numbers:
    """Each prefix of one response as if it ended there."""
    captured = _forward(engine, [sequence], frozenset([PrefixScores("closed")]))[0]
    return {"reward": np.array([captured.reward]), "closed_scores": _prefix_scores(captured, "closed")}


def one_by_one(engine: Engine, sequences: Sequence[ScoringInput]) -> Numbers:
    """Token rewards of sequences that never meet in a batch, so that nothing is shared."""
    each = [token_rewards(engine, [sequence]) for sequence in sequences]
    return {name: np.concatenate([numbers[name] for numbers in each]) for name in each[0]}


def _forward(engine: Engine, sequences: Sequence[ScoringInput], needs: frozenset[Need]) -> list[Captured]:
    asked = [replace(sequence, needs=needs) for sequence in sequences]
    batches = within_budget(asked, engine.facts)
    return [captured for batch in batches for captured in engine.forward(batch)]


def within_budget(sequences: Sequence[ScoringInput], facts: EngineFacts) -> Iterator[list[ScoringInput]]:
    """Batches in the given order, as large as the server's; a prompt counts once in a batch."""
    batch: list[ScoringInput] = []
    cost = BatchCost(facts.pair_cost)
    for sequence in sequences:
        item = cost_of(sequence)
        if batch and not cost.fits(item, float(facts.batch_tokens)):
            yield batch
            batch, cost = [], BatchCost(facts.pair_cost)
        batch.append(sequence)
        cost.add(item)
    yield batch


def _prefix_scores(captured: Captured, mode: PrefixMode = "open") -> np.ndarray[Any, np.dtype[np.float64]]:
    prefixes = captured.prefixes[mode]
    assert prefixes.before is not None
    return np.append(prefixes.before, prefixes.after)


def _credit(name: str, captured: Captured) -> np.ndarray[Any, np.dtype[np.float64]]:
    method = METHODS[name]()
    credit = method.credit(captured, Response(captured.length, captured.length), method.params_type())
    return np.asarray(credit.rewards, dtype=np.float64)


# --- transformers -------------------------------------------------------------------------------------------------


def padded_eager(model: Any, sequences: Sequence[ScoringInput], batch_size: int) -> Numbers:
    """The way ABC's authors do it: eager attention returns every layer's whole map, of which one row is kept."""
    rewards, prefixes, rows = [], [], []
    with torch.inference_mode():
        for batch in _chunks(sequences, batch_size):
            output = model.base_model(**_padded(batch), output_attentions=True, use_cache=False)
            scores = model.score(output.last_hidden_state)[..., 0]
            last_layer = output.attentions[-1].mean(dim=1)
            for index, each in enumerate(batch):
                rewards.append(scores[index, each.scored_position].item())
                prefixes.append(scores[index, each.prompt_length - 1 : each.response_stop])
                rows.append(last_layer[index, each.scored_position, each.prompt_length : each.response_stop])
    return {"reward": np.array(rewards), "prefix_scores": _joined(prefixes), "attention": _joined(rows)}


def padded_sdpa(model: Any, sequences: Sequence[ScoringInput], batch_size: int, *, by_length: bool = False) -> Numbers:
    """Sequence scores only, in batches as they come or of neighbouring lengths."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].token_ids) if by_length else 0)
    rewards = np.empty(len(sequences))
    with torch.inference_mode():
        for indices in _chunks(order, batch_size):
            batch = [sequences[i] for i in indices]
            hidden = model.base_model(**_padded(batch), use_cache=False).last_hidden_state
            scored = torch.tensor([each.scored_position for each in batch])
            rewards[indices] = model.score(hidden[torch.arange(len(batch)), scored])[:, 0].numpy()
    return {"reward": rewards}


def every_prefix(model: Any, sequence: ScoringInput, batch_size: int) -> Numbers:
    """A reward model as a black box: each prefix is a sequence of its own, neighbours share a batch."""
    prefixes = [
        replace(sequence, token_ids=sequence.token_ids[:stop], scored_position=stop - 1)
        for stop in range(sequence.prompt_length, sequence.response_stop + 1)
    ]
    scores = padded_sdpa(model, [*prefixes, sequence], batch_size)["reward"]
    return {"reward": scores[-1:], "prefix_scores": scores[:-1]}


def every_closed_prefix(model: Any, sequence: ScoringInput, batch_size: int) -> Numbers:
    """The same with the closing tokens after each prefix."""
    stops = range(sequence.prompt_length, sequence.response_stop + 1)
    ids = [[*sequence.token_ids[:stop], *sequence.closing_ids] for stop in stops]
    prefixes = [replace(sequence, token_ids=each, scored_position=len(each) - 1) for each in ids]
    scores = padded_sdpa(model, prefixes, batch_size)["reward"]
    return {"reward": scores[-1:], "closed_scores": scores}


def _padded(batch: Sequence[ScoringInput]) -> dict[str, Tensor]:
    """Right-padded ids and their mask. The pad id does not matter: nothing looks to its right."""
    parts = [torch.tensor(each.token_ids) for each in batch]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _joined(parts: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return torch.cat(list(parts)).double().numpy()
