"""Language models: the log-probability of the token that follows, over the whole vocabulary.

log p(v | h) = z_v - log sum_w exp z_w with z = h W^T + b, as the family scales or caps it. W has a row for each of V
tokens, so M positions have M x V logits; only some of them are there at a time, in float32, and each stretch is
folded into a running log-sum-exp.
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
"""Logits that are there at once: 8 MB, which a CPU's cache may hold, or enough to keep a GPU busy."""


_KNOWN = {"final_logit_softcapping", "logit_scale", "logits_scaling", "attn_logit_softcapping"}
_ABOUT_LOGITS = re.compile(r"logit|soft_?cap|lm_head_mult")


class LanguageModelHead:
    """The output embedding of a causal language model.

    Raises:
        ModelError: the model has none, or its config shapes logits in a way that is not known here.
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
        """Tokens that it knows."""
        return len(self._weight)

    def read(self, hidden: Float[Tensor, "M E"], next_ids: Int64[Tensor, " M"]) -> Float32[Tensor, " M"]:
        """Log-probabilities of the tokens that follow, in nats."""
        parts = zip(hidden.split(_POSITIONS), next_ids.split(_POSITIONS), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.cat([self._log_probabilities(*part) for part in parts])

    def logits(self, hidden: Float[Tensor, "m E"]) -> Float32[Tensor, "m V"]:
        """All logits of a few positions, to compare them with the model's own."""
        return self._shaped(product(hidden, self._weight) + self._bias)

    def _log_probabilities(self, hidden: Float[Tensor, "m E"], next_ids: Int64[Tensor, " m"]) -> Float32[Tensor, " m"]:
        total = torch.full(next_ids.shape, -torch.inf, device=hidden.device)
        size = _TOKENS.get(hidden.device.type, _TOKENS["cuda"])
        for weight, bias in zip(self._weight.split(size), self._bias.split(size), strict=True):
            logits = self._shaped(product(hidden, weight) + bias if self._biased else product(hidden, weight))
            first = logits[:, 0]
            # A log-sum-exp by way of log_softmax, which is four times as fast as logsumexp on a CPU.
            total = torch.logaddexp(total, first - logits.log_softmax(dim=1)[:, 0])
        own = (hidden.float() * self._weight[next_ids].float()).sum(dim=1) + self._bias[next_ids]
        return self._shaped(own) - total

    def _shaped(self, logits: Float32[Tensor, ...]) -> Float32[Tensor, ...]:
        """As the family scales and caps them."""
        if self._scale != 1:
            logits = logits * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def _refuse_unknown(config: dict[str, Any]) -> None:
    """A cap or factor of another name would change every probability, some too little to be noticed in half precision.

    Raises:
        ModelError: the config has one.
    """
    numbers = {name: value for name, value in config.items() if isinstance(value, float | int) and value not in (0, 1)}
    if strange := sorted(name for name in numbers if _ABOUT_LOGITS.search(name) and name not in _KNOWN):
        raise ModelError(f"the config sets {', '.join(strange)}, which is not known to the language model's head")
