"""Independent readings of a reward model, written the slow and obvious way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification


@dataclass(frozen=True)
class Read:
    """One sequence: the head at every position [S], and the scored token's row per layer [layers, S]."""

    scores: torch.Tensor
    rows: torch.Tensor


def eager(folder: Path) -> Any:
    """The same weights in transformers' eager attention, float32."""
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


def padded(model: Any, sequences: Sequence[Sequence[int]]) -> list[Read]:
    """One right-padded batch with whole attention maps, as trainers do it; the last token is the scored one."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    with torch.no_grad():
        output = model.base_model(input_ids=ids, attention_mask=mask, output_attentions=True)
        scores = model.score(output.last_hidden_state)[..., 0]
    return [
        Read(
            scores[i, : len(sequence)],
            torch.stack([layer[i, :, len(sequence) - 1, : len(sequence)].mean(dim=0) for layer in output.attentions]),
        )
        for i, sequence in enumerate(sequences)
    ]


def score(model: Any, sequence: Sequence[int]) -> float:
    """The model's own classification logit of one sequence, in a pass of its own."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([list(sequence)])).last_hidden_state
        return float(model.score(hidden)[0, -1, 0])


def prefix_scores(
    model: Any, prompt: Sequence[int], response: Sequence[int], closing: Sequence[int] = ()
) -> list[float]:
    """s_0..s_T by one pass per prefix, each closed by what it does not end with yet; no s_0 of nothing at all."""
    passes = [[*prompt, *response[:t], *_rest(response[:t], closing)] for t in range(len(response) + 1)]
    return [score(model, ids) for ids in passes if ids]


def _rest(ids: Sequence[int], closing: Sequence[int]) -> list[int]:
    text = ",".join(map(str, ids)) + ","
    ends = (n for n in range(len(closing), 0, -1) if ("," + text).endswith("," + ",".join(map(str, closing[:n])) + ","))
    return list(closing[next(ends, 0) :])
