"""The start policy: six of SmolLM2's layers, trained for some hundred steps to write like short reviews.

The first and the last layers of a deep model still fit its embedding and its head. Training on the review snippets of
the data folder repairs what removing the middle layers broke. The embedding is frozen and tied to the head, which keeps
only the ids that these texts use most. The trained policy is kept outside the repository.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedTokenizerBase

from densereward.default_model.build import BASE_FILE, base_folder, load_tokenizer
from densereward.default_model.data import is_held_out, read_vader

LAYERS = (0, 1, 2, 27, 28, 29)
KEPT_IDS, OPENINGS, OPENING_TOKENS = 8192, 128, 4
_FACTS = "start.json"


@dataclass(frozen=True)
class Facts:
    """What defines a start policy in addition to its weights; all ids are the tokenizer's.

    Attributes:
        begin: The id that every text begins with.
        end: The id that ends a text.
        kept: The ids that the policy may write, `end` among them.
        openings: Beginnings of texts, all of the same length, which the policy continues.
        judge_prompt: The prompt that the reward model reads before a text.
    """

    begin: int
    end: int
    kept: list[int]
    openings: list[list[int]]
    judge_prompt: list[int]


def save(folder: Path, decoder: LlamaModel, facts: Facts) -> None:
    """Write a model folder, with the facts in it."""
    decoder.save_pretrained(folder)
    (folder / _FACTS).write_text(json.dumps(asdict(facts)))


def load(folder: Path) -> tuple[LlamaModel, Facts]:
    """What `save` wrote, in float32."""
    decoder: LlamaModel = LlamaModel.from_pretrained(folder, dtype=torch.float32)
    return decoder, Facts(**json.loads((folder / _FACTS).read_text()))


def fingerprint(folder: Path) -> str:
    """A hash of the weights and the facts."""
    content = hashlib.sha256()
    for path in (*sorted(folder.glob("*.safetensors")), folder / _FACTS):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def teach(data: Path, folder: Path, steps: int, batch_tokens: int = 2048, rate: float = 6e-4) -> None:
    """Train a cut decoder on the review snippets in `data`, `batch_tokens` tokens per step, and save it."""
    tokenizer = load_tokenizer()
    rated = [item for item in read_vader(data / "vader") if item.source in ("movie", "amazon")]
    encoded: list[list[int]] = tokenizer([item.text for item in rated], add_special_tokens=False)["input_ids"]
    held_out = [ids for ids, item in zip(encoded, rated, strict=True) if is_held_out(item)]
    texts = [ids for ids, item in zip(encoded, rated, strict=True) if not is_held_out(item)]
    facts = _facts(tokenizer, texts)
    decoder, columns = cut_decoder(), torch.full((len(tokenizer),), -100)
    columns[facts.kept] = torch.arange(len(facts.kept))
    weights = [weight for weight in decoder.parameters() if weight is not decoder.embed_tokens.weight]
    decoder.embed_tokens.requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    batches = _batches(texts, facts, batch_tokens)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 30) * (1 - step / steps)
        loss = _loss(decoder, next(batches), columns)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.2f} nats a token", flush=True)
    with torch.no_grad():
        losses = [_loss(decoder, batch, columns) for batch in itertools.islice(_batches(held_out, facts, 2048), 10)]
    print(f"held-out texts: {float(torch.stack(losses).mean()):.2f} nats a token")
    save(folder, decoder, facts)


def cut_decoder() -> LlamaModel:
    """The first and last layers of the base model, float32."""
    base = AutoModelForCausalLM.from_pretrained(base_folder(), gguf_file=BASE_FILE, dtype=torch.float32).model
    settings = base.config.to_dict()
    settings.pop("quantization_config", None)
    decoder = LlamaModel(LlamaConfig(**settings | {"num_hidden_layers": len(LAYERS)}))
    decoder.embed_tokens, decoder.norm = base.embed_tokens, base.norm
    for index, layer in enumerate(LAYERS):
        decoder.layers[index].load_state_dict(base.layers[layer].state_dict())
    return decoder


def _facts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[int]]) -> Facts:
    begin, end = (tokenizer.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>"))
    counts = Counter(itertools.chain.from_iterable(texts))
    kept = sorted({end, *(token for token, _ in counts.most_common(KEPT_IDS - 1))})
    beginnings = {tuple(ids[:OPENING_TOKENS]) for ids in texts if len(ids) > 2 * OPENING_TOKENS}
    openings = sorted(list(opening) for opening in beginnings if set(opening) <= set(kept))
    Random(0).shuffle(openings)
    turn = [{"role": "user", "content": ""}]
    prompt = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    judge_prompt: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Facts(begin, end, kept, openings[:OPENINGS], judge_prompt)


def _batches(texts: Sequence[list[int]], facts: Facts, size: int) -> Iterator[Tensor]:
    """Batches of texts of about equal length, padded with -1, in a new order each epoch."""
    for epoch in itertools.count():
        order = Random(epoch)
        rows = sorted(
            ([facts.begin, *ids, facts.end][:64] for ids in texts), key=lambda row: (len(row), order.random())
        )
        start, batches = 0, []
        while start < len(rows):
            count = max(1, size // len(rows[min(start + size // 32, len(rows) - 1)]))
            chosen = [torch.tensor(row) for row in rows[start : start + count]]
            batches.append(nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1))
            start += count
        order.shuffle(batches)
        yield from batches


def _loss(decoder: LlamaModel, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean negative log-likelihood of the ids that the head has."""
    targets = torch.where(rows[:, 1:] < 0, -100, columns[rows[:, 1:].clamp(min=0)])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder(input_ids=rows[:, :-1].clamp(min=0), use_cache=False).last_hidden_state
        logits = functional.linear(hidden, decoder.embed_tokens.weight[columns >= 0])
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
