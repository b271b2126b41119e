"""The policy, its reference and its critic: three short stacks of layers on a frozen stack that they share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, LlamaModel

from .start import Facts

__all__ = ["Policy", "Responses"]


class Responses(NamedTuple):
    """What the policy wrote after its openings, all [batch, tokens]; tokens after a text's end are masked.

    Attributes:
        ids: In the tokenizer's ids.
        choices: The same tokens, as indices in the policy's own, shorter list of ids.
        mask: True for the tokens of the text, with the one that ends it.
    """

    ids: Tensor
    choices: Tensor
    mask: Tensor


class Policy(nn.Module):
    """A small language model whose upper layers learn, and a copy of these layers as they were at the start.

    Matrix products are computed in `precision`; weights that learn are float32.
    """

    kept: Tensor
    openings: Tensor
    head: Tensor

    def __init__(
        self, decoder: LlamaModel, facts: Facts, *, trained: int = 2, precision: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.facts, self.precision = facts, precision
        self.embedding = copy.deepcopy(decoder.embed_tokens).to(precision).requires_grad_(requires_grad=False)
        self.lower = _part(decoder, list(decoder.layers)[:-trained], nn.Identity())
        self.upper = _part(decoder, list(decoder.layers)[-trained:], decoder.norm)
        self.reference = copy.deepcopy(self.upper)
        self.critic = copy.deepcopy(self.upper)
        self.value_head = nn.Linear(decoder.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._writer = copy.deepcopy(self.upper)
        for frozen in (self.lower, self.reference, self._writer):
            frozen.requires_grad_(requires_grad=False)
        for rounded in (self.lower, self._writer):
            nn.Module.to(rounded, precision)
        self.register_buffer("kept", torch.tensor(facts.kept))
        self.register_buffer("openings", torch.tensor(facts.openings))
        self.register_buffer("head", decoder.embed_tokens.weight.detach()[facts.kept].to(precision))

    @torch.no_grad()
    def sample(self, openings: Tensor, tokens: int, generator: torch.Generator) -> Responses:
        """Continue each opening to its end or for `tokens` tokens, at temperature 1."""
        self._writer.load_state_dict(self.upper.state_dict())
        caches, ids, choices = (DynamicCache(), DynamicCache()), self._with_begin(openings), []
        for _ in range(tokens):
            # The cache is given by position, since its name depends on the version of transformers.
            hidden = self.lower(None, None, None, caches[0], inputs_embeds=self.embedding(ids)).last_hidden_state
            hidden = self._writer(None, None, None, caches[1], inputs_embeds=hidden).last_hidden_state
            logits = functional.linear(hidden[:, -1].to(self.precision), self.head).float()
            # Drawn on the CPU, so that a seed gives the same numbers on every device.
            drawn = torch.rand(len(ids), 1, generator=generator).to(ids.device)
            choice = torch.searchsorted(logits.softmax(-1).cumsum(-1), drawn).clamp(max=len(self.kept) - 1)
            choices.append(choice)
            ids = self.kept[choice]
        chosen = torch.cat(choices, dim=1)
        ends = (self.kept[chosen] == self.facts.end).long()
        return Responses(self.kept[chosen], chosen, ends.cumsum(1) - ends == 0)

    @torch.no_grad()
    def read(self, openings: Tensor, responses: Responses) -> Tensor:
        """The shared layers' hidden states, for all tokens but the last; they never change, so compute them once."""
        ids = torch.cat([self._with_begin(openings), responses.ids[:, :-1]], dim=1)
        hidden: Tensor = self.lower(inputs_embeds=self.embedding(ids), use_cache=False).last_hidden_state
        return hidden

    def logits(self, stack: LlamaModel, hidden: Tensor, tokens: int) -> Tensor:
        """The logits that each token is drawn from, by the policy or its reference, [batch, tokens, kept ids]."""
        with self._autocast():
            states = self._states(stack, hidden, tokens)
            return functional.linear(states.to(self.precision), self.head).float()

    def values(self, hidden: Tensor, tokens: int) -> Tensor:
        """The critic's estimate of the return before each token, [batch, tokens]."""
        with self._autocast():
            states = self._states(self.critic, hidden, tokens)
        values: Tensor = self.value_head(states.float())[..., 0]
        return values

    def _with_begin(self, openings: Tensor) -> Tensor:
        return functional.pad(openings, (1, 0), value=self.facts.begin)

    def _autocast(self) -> torch.autocast:
        kind = self.kept.device.type
        return torch.autocast(kind, self.precision, enabled=self.precision != torch.float32)

    def _states(self, stack: LlamaModel, hidden: Tensor, tokens: int) -> Tensor:
        states: Tensor = stack(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return states[:, -tokens:]


def _part(decoder: LlamaModel, layers: Sequence[nn.Module], norm: nn.Module) -> LlamaModel:
    """A decoder of copies of these layers, from hidden states to hidden states."""
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = len(layers)
    with torch.device("meta"):
        part = LlamaModel(config)
    part.rotary_emb = copy.deepcopy(decoder.rotary_emb)
    part.add_module("embed_tokens", nn.Identity())
    part.add_module("norm", copy.deepcopy(norm))
    part.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    for index, layer in enumerate(part.layers):
        layer.get_submodule("self_attn").layer_idx = index  # type: ignore[assignment]  # its place in the cache
    return part
