"""Language models: the log-probability of the next token, over the whole vocabulary.

log p(v | h) = z_v - log sum_w exp z_w with z = h W^T + b, scaled or capped as the family does it. M positions have
M x V logits for a vocabulary of V tokens. Only some are in memory at a time, in float32: the vocabulary is taken in
parts, and each part is added to a running log-sum-exp.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from densereward.errors import ModelError
from densereward.heads.output_embedding import output_embedding
from densereward.heads.products import product

__all__ = ["LanguageModelHead"]

_POSITIONS = 1024
_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Positions and tokens whose logits are in memory at once: 8 MB, for a CPU's cache, or enough to keep a GPU busy."""


_KNOWN = {"final_logit_softcapping", "logit_scale", "logits_scaling", "attn_logit_softcapping"}
_ABOUT_LOGITS = re.compile(r"logit|soft_?cap|lm_head_mult")


class LanguageModelHead:
    """The output embedding of a causal language model.

    Raises:
        ModelError: the model has none, or its config changes logits in a way that is not known here.
    """

    name = "language_model"

    def __init__(self, model: PreTrainedModel) -> None:
        layer = output_embedding(model, "output embedding; it is no causal language model")
        config = model.config.get_text_config()
        _refuse_unknown(config.to_dict())
        self._weight: Tensor = layer.weight.detach()
        self._biased = layer.bias is not None
        self._bias = layer.bias.detach().float() if self._biased else self._weight.new_zeros(len(self._weight)).float()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies by it,
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides

    @property
    def size(self) -> int:
        """V, the size of its vocabulary."""
        return len(self._weight)

    def read(self, hidden: Float[Tensor, "M E"], next_ids: Int64[Tensor, " M"]) -> Float32[Tensor, " M"]:
        """Log-probabilities of the next tokens, in nats.

        Args:
            hidden: hidden states at M positions.
            next_ids: the token after each.
        """
        parts = zip(hidden.split(_POSITIONS), next_ids.split(_POSITIONS), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.cat([self._log_probabilities(*part) for part in parts])

    def logits(self, hidden: Float[Tensor, "m E"]) -> Float32[Tensor, "m V"]:
        """All logits of a few positions, for a comparison with the model's own."""
        return self._shaped(product(hidden, self._weight) + self._bias)

    def _log_probabilities(self, hidden: Float[Tensor, "m E"], next_ids: Int64[Tensor, " m"]) -> Float32[Tensor, " m"]:
        total = torch.full(next_ids.shape, -torch.inf, device=hidden.device)
        size = _TOKENS.get(hidden.device.type, _TOKENS["cuda"])
        for weight, bias in zip(self._weight.split(size), self._bias.split(size), strict=True):
            logits = self._shaped(product(hidden, weight) + bias if self._biased else product(hidden, weight))
            first = logits[:, 0]
            # log_softmax gives the log-sum-exp, four times as fast on a CPU as logsumexp.
            total = torch.logaddexp(total, first - logits.log_softmax(dim=1)[:, 0])
        own = (hidden.float() * self._weight[next_ids].float()).sum(dim=1) + self._bias[next_ids]
        return self._shaped(own) - total

    def _shaped(self, logits: Float32[Tensor, ...]) -> Float32[Tensor, ...]:
        """The logits, scaled and capped as the family does it."""
        if self._scale != 1:
            logits = logits * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def _refuse_unknown(config: dict[str, Any]) -> None:
    """Refuse a cap or factor of an unknown name: in half precision a comparison of logits could miss its effect.

    Raises:
        ModelError: the config has one.
    """
    numbers = {name: value for name, value in config.items() if isinstance(value, float | int) and value not in (0, 1)}
    if unknown := sorted(name for name in numbers if _ABOUT_LOGITS.search(name) and name not in _KNOWN):
        raise ModelError(f"the config sets {', '.join(unknown)}, which is not known to the language model's head")
