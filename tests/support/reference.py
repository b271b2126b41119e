"""Independent scores, rows and contributions of a reward model, computed the slow and obvious way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
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


def log_probabilities(model: Any, sequence: Sequence[int], start: int) -> NDArray[np.float64]:
    """Of each token from `start` on, given those before it: the whole softmax, in a pass of its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(sequence)])).logits[0].double()
    found = torch.log_softmax(logits, dim=-1)
    return np.array([float(found[i - 1, sequence[i]]) for i in range(start, len(sequence))])


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


def contributions(model: Any, sequence: Sequence[int], layer: int) -> NDArray[np.float64]:
    """What each token adds to a Llama's score at the last one: the formula, head by head and token by token.

    The gradient is autograd's, through what follows at that one position.
    """
    last = len(sequence) - 1
    heads = model.config.num_attention_heads
    groups = heads // model.config.num_key_value_heads
    layers = model.model.layers
    attended: list[Tensor] = [torch.empty(0)] * len(layers)
    values: list[Tensor] = [torch.empty(0)] * len(layers)
    for i, each in enumerate(layers):
        each.self_attn.register_forward_hook(lambda _, __, out, i=i: attended.__setitem__(i, out[0].detach()))
        each.self_attn.v_proj.register_forward_hook(lambda _, __, out, i=i: values.__setitem__(i, out.detach()))
    with torch.no_grad():
        output = model.model(
            input_ids=torch.tensor([list(sequence)]), output_hidden_states=True, output_attentions=True
        )
    stream = output.hidden_states[layer][0, last]
    own = attended[layer][0, last].clone().requires_grad_()
    for i in range(layer, len(layers)):
        stream = stream + (own if i == layer else attended[i][0, last])
        stream = stream + layers[i].mlp(layers[i].post_attention_layernorm(stream))
    (gradient,) = torch.autograd.grad(model.score(model.model.norm(stream))[0], own)
    toward = (gradient @ layers[layer].self_attn.o_proj.weight).detach()  # [heads * size]
    size = len(toward) // heads
    result = np.zeros(len(sequence))
    for token in range(len(sequence)):
        for head in range(heads):
            weight = output.attentions[layer][0, head, last, token]
            start = head // groups * size
            value = values[layer][0, token, start : start + size]
            result[token] += float(weight * (value @ toward[head * size : (head + 1) * size]))
    return result
