"""What the trainers' scripts share: a small random policy with its own tokenizer, and files to and from the test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import tiny

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
ENDING = 3.5  # added to the EOS's logit, so that about every tenth token is one


def make_tokenizer(pad: str = "</s>") -> PreTrainedTokenizerFast:
    """A SentencePiece-style tokenizer, unlike the reward model's; by default its pad token is the EOS."""
    tokenizer = tiny.make_sentencepiece_style_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_policy(tokenizer: PreTrainedTokenizerFast, seed: int = 3) -> PreTrainedModel:
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    model = tiny.make_model("llama", seed, AutoModelForCausalLM, vocab_size=len(tokenizer), **special)
    head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = ENDING
    model.lm_head = head
    return model


def read_job() -> Any:
    """What the test asks for."""
    return json.loads(Path(sys.argv[1]).read_text())


def write(job: Any, seen: Any) -> None:
    """What the trainer did, for the test; each of several processes writes a file of its own."""
    Path(job["output"] + os.environ.get("RANK", "")).write_text(json.dumps(seen))
