"""The policy, its reference and its critic: three short stacks of layers on one frozen stack that they share."""

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
    """What the policy wrote after its openings, all [batch, tokens]; what follows a text's end is not part of it.

    Attributes:
        ids: In the tokenizer's ids.
        choices: The same as places in the policy's own, shorter list of ids.
        mask: True for the tokens of the text, the one that ends it included.
    """

    ids: Tensor
    choices: Tensor
    mask: Tensor


class Policy(nn.Module):
    """A small language model of which only the upper layers learn, beside the same layers as they were at the start.

    Products are computed in `precision`, with weights and sums in float32 where something is learnt.
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
        """Continue each opening until its end or for so many tokens, at temperature 1."""
        self._writer.load_state_dict(self.upper.state_dict())
        caches, ids, choices = (DynamicCache(), DynamicCache()), self._begun(openings), []
        for _ in range(tokens):
            # The cache is given by position, since its name depends on the version of transformers.
            hidden = self.lower(None, None, None, caches[0], inputs_embeds=self.embedding(ids)).last_hidden_state
            hidden = self._writer(None, None, None, caches[1], inputs_embeds=hidden).last_hidden_state
            logits = functional.linear(hidden[:, -1].to(self.precision), self.head).float()
            # Drawn on the CPU, so that a seed means the same on every device.
            drawn = torch.rand(len(ids), 1, generator=generator).to(ids.device)
            choice = torch.searchsorted(logits.softmax(-1).cumsum(-1), drawn).clamp(max=len(self.kept) - 1)
            choices.append(choice)
            ids = self.kept[choice]
        chosen = torch.cat(choices, dim=1)
        ends = (self.kept[chosen] == self.facts.end).long()
        return Responses(self.kept[chosen], chosen, ends.cumsum(1) - ends == 0)

    @torch.no_grad()
    def read(self, openings: Tensor, responses: Responses) -> Tensor:
        """What the shared layers make of every token but the last: it never changes, so it is computed once."""
        ids = torch.cat([self._begun(openings), responses.ids[:, :-1]], dim=1)
        hidden: Tensor = self.lower(inputs_embeds=self.embedding(ids), use_cache=False).last_hidden_state
        return hidden

    def logits(self, stack: LlamaModel, hidden: Tensor, tokens: int) -> Tensor:
        """What each token was chosen by, under the policy or its reference, [batch, tokens, kept ids]."""
        with self._autocast():
            states = self._states(stack, hidden, tokens)
            return functional.linear(states.to(self.precision), self.head).float()

    def values(self, hidden: Tensor, tokens: int) -> Tensor:
        """What the critic expects to come, before each token is chosen, [batch, tokens]."""
        with self._autocast():
            states = self._states(self.critic, hidden, tokens)
        values: Tensor = self.value_head(states.float())[..., 0]
        return values

    def _begun(self, openings: Tensor) -> Tensor:
        return functional.pad(openings, (1, 0), value=self.facts.begin)

    def _autocast(self) -> torch.autocast:
        kind = self.kept.device.type
        return torch.autocast(kind, self.precision, enabled=self.precision != torch.float32)

    def _states(self, stack: LlamaModel, hidden: Tensor, tokens: int) -> Tensor:
        states: Tensor = stack(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return states[:, -tokens:]


def _part(decoder: LlamaModel, layers: Sequence[nn.Module], norm: nn.Module) -> LlamaModel:
    """Some layers as a decoder of their own, which takes and gives hidden states; copies, not views."""
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = len(layers)
    with torch.device("meta"):
        part = LlamaModel(config)
    part.rotary_emb = copy.deepcopy(decoder.rotary_emb)
    part.add_module("embed_tokens", nn.Identity())
    part.add_module("norm", copy.deepcopy(norm))
    part.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    for place, layer in enumerate(part.layers):
        layer.get_submodule("self_attn").layer_idx = place  # type: ignore[assignment]  # where the cache keeps its keys
    return part
