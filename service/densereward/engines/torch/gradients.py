"""The gradient of a sequence's score at the embeddings of its tokens: one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from densereward.capture import ScoringInput
from densereward.engines.torch.attention import SingleSequence
from densereward.engines.torch.contributions import check_same
from densereward.heads.base import DecoderHead

__all__ = ["gradients"]


def gradients(model: Any, head: DecoderHead, sequence: ScoringInput, score: float) -> Float32[np.ndarray, " T"]:
    """The gradient times the embedding less the padding token's, for each token of the response.

    Args:
        model: the reward model; without a padding token nothing is subtracted.
        head: the score head.
        sequence: what was scored.
        score: its score, from the packed pass.

    Raises:
        EngineFailure: this pass gives another score.
    """
    embedding = model.get_input_embeddings()
    padding = model.config.get_text_config().pad_token_id
    with torch.inference_mode(mode=False), torch.enable_grad():
        ids = torch.tensor(sequence.token_ids, device=model.device)
        embedded = embedding(ids).detach().requires_grad_()
        positions = torch.arange(len(ids), device=model.device)[None]
        hidden = model.base_model(
            inputs_embeds=embedded[None], position_ids=positions, use_cache=False, packed=SingleSequence()
        ).last_hidden_state[0]
        again = head.parts(hidden[[sequence.scored_position]], hidden[[sequence.gate]], [0]).sum(dim=0)
        (gradient,) = torch.autograd.grad(again.sum(), embedded)
        difference = embedded.detach().float()
        if padding is not None and 0 <= padding < embedding.num_embeddings:
            difference = difference - embedding(ids.new_tensor(padding)).detach().float()
    check_same(again.detach(), again.new_tensor([score]), hidden.dtype, "gradients")
    values = (gradient.float() * difference).sum(dim=-1)[sequence.prompt_length : sequence.response_stop]
    result: Float32[np.ndarray, " T"] = values.cpu().numpy()
    return result
