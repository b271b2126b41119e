"""The torch engine: pack, one forward pass, read the head, give each sequence what it asked for."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import PreTrainedModel

from densereward.capture import (
    AttentionRow,
    Captured,
    Contributions,
    Gradients,
    Need,
    Prefixes,
    PrefixMode,
    PrefixScores,
    ReceivedAttention,
    ScoringInput,
)
from densereward.engines.base import EngineFacts
from densereward.engines.torch.contributions import contributions
from densereward.engines.torch.gradients import gradients
from densereward.engines.torch.kept import KeptKeys, Prompt, PromptKeys
from densereward.engines.torch.linear import speed_up
from densereward.engines.torch.loading import (
    Dtype,
    choose_device,
    choose_dtype,
    load_classifier,
    max_length,
    weights_fingerprint,
)
from densereward.engines.torch.memory import keep_freed_memory
from densereward.engines.torch.packing import PackedBatch, counted_from_0, pack
from densereward.engines.torch.pieces import Piece, WrittenOut, in_pieces, write_out
from densereward.errors import EngineFailure
from densereward.heads.bradley_terry import BradleyTerryHead

__all__ = ["TorchEngine"]

logger = logging.getLogger("densereward")


# On a CPU, larger passes gain nothing; a GPU needs them to be busy.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}

_LONG_PROMPT = 64
"""Tokens of a prompt that is worth looking up."""


class TorchEngine:
    """A transformers reward model in this process. See `engines.base.Engine`.

    Args:
        model: a sequence classifier loaded by `loading.load_classifier`.
        longest: tokens in the longest sequence to read; by default what the config gives.
        batch_tokens: tokens in one pass, beyond which a sequence runs in pieces; by default what suits the device.
        prompt_cache: bytes for the keys of prompts that come again; 0 runs every prompt anew.

    Raises:
        ModelError: the model cannot be read as a reward model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        longest: int | None = None,
        batch_tokens: int | None = None,
        prompt_cache: int = 0,
    ) -> None:
        self._model: Any = model.requires_grad_(False)
        self._prompts = PromptKeys(prompt_cache)
        embedding: Any = model.get_input_embeddings()
        self._backbone: Any = model.base_model
        if model.device.type == "cpu":
            speed_up(model.base_model)
            keep_freed_memory()
        self._head = BradleyTerryHead(model)
        config = model.config
        self.facts = EngineFacts(
            engine="torch",
            family=type(model).__name__,
            head=self._head.name,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            max_length=max_length(config, longest),
            vocabulary_size=embedding.num_embeddings,
            layers=config.get_text_config().num_hidden_layers,
            batch_tokens=batch_tokens or _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cuda"]),
            pair_cost=_pair_cost(model),
            weights_fingerprint=weights_fingerprint(model),
        )
        layers = range(-self.facts.layers, self.facts.layers)
        contributed = [Contributions(), *(Contributions(layer) for layer in layers)]
        kinds: list[list[Need]] = [[*contributed], [Gradients()]]
        self._differentiated = frozenset(need for needs in kinds if self._can_give(needs[0]) for need in needs)

    def _can_give(self, need: Need) -> bool:
        """Whether a few tokens get through."""
        probe = ScoringInput([0, 1, 2, 3], 1, 3, 3, needs=frozenset([need]))
        try:
            self.forward([probe])
        except EngineFailure as failure:
            logger.info("%s: %s", need, failure.message)
            return False
        return True

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        longest: int | None = None,
        batch_tokens: int | None = None,
        prompt_cache: int = 0,
    ) -> TorchEngine:
        """Load from a folder or a hub id.

        Raises:
            ModelError: the model cannot be loaded or read as a reward model.
        """
        chosen = choose_device(device)
        return cls(
            load_classifier(source, revision, chosen, choose_dtype(dtype, chosen)), longest, batch_tokens, prompt_cache
        )

    @property
    def provides(self) -> frozenset[Need]:
        """Prefix scores, open and closed, in every layer all that can be kept of it, and what can be differentiated."""
        layers = range(-self.facts.layers, self.facts.layers)
        in_layers = (kind(layer) for kind in (AttentionRow, ReceivedAttention) for layer in layers)
        return frozenset([PrefixScores("open"), PrefixScores("closed"), *in_layers]) | self._differentiated

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Score a batch in one pass, or a sequence that is too long for one in pieces.

        Raises:
            EngineFailure: a pass failed.
        """
        results = [_Result(write_out(sequence)) for sequence in batch]
        try:
            with torch.inference_mode():
                if len(results) == 1 and len(results[0].whole.ids) > self.facts.batch_tokens:
                    for piece in in_pieces(results[0].whole, self.facts.batch_tokens):
                        self._run([piece], results)
                else:
                    self._run_together(results)
                for result in results:
                    if Gradients() in result.whole.sequence.needs:
                        sequence, score = result.whole.sequence, float(result.scores[0])
                        result.gradients = gradients(self._model, self._head, sequence, score)
        except torch.OutOfMemoryError as error:
            self._prompts.clear()
            raise EngineFailure(
                "the device's memory is too small for this sequence; set --max-batch-tokens or --max-length lower",
                code="out_of_memory",
            ) from error
        except RuntimeError as error:
            raise EngineFailure(f"the forward pass failed: {error}") from error
        return [result.captured(self.facts.layers) for result in results]

    def _run_together(self, results: Sequence[_Result]) -> None:
        """One pass; prompts whose keys are kept do not run again, and those that come again are kept."""
        prompts = {result.prompt: None for result in results if len(result.prompt) >= _LONG_PROMPT}
        recalled = {prompt: self._prompts.recall(prompt) for prompt in prompts}
        again = {prompt: self._prompts.comes_again(prompt) for prompt in prompts}
        keep = {prompt: KeptKeys() for prompt in prompts if again[prompt] and recalled[prompt] is None}
        pieces = [Piece.after(result.whole, recalled.get(result.prompt)) for result in results]
        self._run(pieces, results, keep)
        for prompt, kept in keep.items():
            self._prompts.store(prompt, kept)

    def _run(
        self, pieces: Sequence[Piece], results: Sequence[_Result], keep: Mapping[Prompt, KeptKeys] | None = None
    ) -> None:
        """One pass, one copy back: the head at every read place, then the kept rows."""
        packed = pack(pieces, self._model.device, self.facts.layers, keep)
        hidden = self._backbone(
            input_ids=packed.token_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
        ).last_hidden_state[0]
        scores = self._head.scores(hidden[packed.read])
        if packed.contributions:
            packed.rows.update(
                contributions(self._backbone, self._head, packed, self._head.scores(hidden[packed.scored]))
            )
        if packed.row_needs != packed.rows.keys() or None in packed.sums.values():
            raise EngineFailure(f"{self.facts.family} did not run its attention in all the layers that are needed")
        _hand_out(packed, results, scores)

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._model = self._backbone = None
        self._prompts.clear()
        torch.cuda.empty_cache()


def _pair_cost(model: PreTrainedModel) -> float:
    """Multiplications for one query and one key, in all heads and layers, over those of a token's matrices."""
    config = model.config.get_text_config()
    head: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_attention_heads * head * config.num_hidden_layers
    embedding: Any = model.get_input_embeddings()
    matrices = sum(each.numel() for each in model.parameters() if each.ndim > 1) - embedding.weight.numel()
    return float(attention / matrices)


@dataclass(slots=True)
class _Result:
    """What the passes give for one sequence.

    Attributes:
        whole: the sequence, written out.
        scores: at each of its reads; filled piece by piece.
        rows: the scored rows from the sequence's first token on, layers counted from 0.
        sums: per layer, the attention that each token of the sequence received; added up piece by piece.
        gradients: of the response's tokens.
    """

    whole: WrittenOut
    scores: Float32[np.ndarray, " R"] = field(init=False)
    rows: dict[Need, Float32[np.ndarray, " L"]] = field(default_factory=dict)
    sums: dict[int, Float32[np.ndarray, " S"]] = field(default_factory=dict)
    gradients: Float32[np.ndarray, " T"] | None = None

    def __post_init__(self) -> None:
        self.scores = np.full(len(self.whole.reads), np.nan, dtype=np.float32)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt, as it is looked up."""
        return tuple(self.whole.sequence.token_ids[: self.whole.sequence.prompt_length])

    def receive(self, layer: int, sums: Float32[np.ndarray, " _"]) -> None:
        """Add attention that the sequence's first tokens received."""
        total = self.sums.setdefault(layer, np.zeros(self.whole.length, dtype=np.float32))
        total[: len(sums)] += sums

    def captured(self, layers: int) -> Captured:
        """In the form that methods read."""
        sequence = self.whole.sequence
        response = slice(sequence.prompt_length, sequence.response_stop)
        kept: dict[type[Need], dict[Any, Float32[np.ndarray, " T"]]] = defaultdict(dict)
        for need in sequence.needs:
            if isinstance(need, AttentionRow | Contributions):
                kept[type(need)][need.layer] = self.rows[counted_from_0(need, layers)][response]
            elif isinstance(need, ReceivedAttention):
                kept[type(need)][need.layer] = self.sums[need.layer % layers][response]
        return Captured(
            reward=float(self.scores[0]),
            length=sequence.response_length,
            prefixes=_prefixes(sequence, self.scores[1:]),
            attention_rows=kept[AttentionRow],
            contributions=kept[Contributions],
            received_attention=kept[ReceivedAttention],
            gradients=self.gradients,
        )


def _hand_out(packed: PackedBatch, results: Sequence[_Result], scores: Float32[Tensor, " M"]) -> None:
    """Bring what a pass gave to the host in one copy, and cut it into sequences."""
    needs, places = list(packed.rows), list(packed.sums)
    parts = [scores, *packed.rows.values(), *(each for each in packed.sums.values() if each is not None)]
    on_host = np.split(torch.cat(parts).cpu().numpy(), np.cumsum([len(part) for part in parts])[:-1])
    read = key = 0
    for result, placed in zip(results, packed.placed, strict=True):
        slots = placed.read_slots
        result.scores[slots] = on_host[0][read : read + len(slots)]
        read += len(slots)
    rows = dict(zip(needs, on_host[1 : 1 + len(needs)], strict=True))
    for index in packed.rows_of:
        length = results[index].whole.sequence.scored_position + 1
        results[index].rows |= {need: row[key : key + length] for need, row in rows.items()}
        key += length
    for (index, layer), sums in zip(places, on_host[1 + len(needs) :], strict=True):
        results[index].receive(layer, sums)


def _prefixes(sequence: ScoringInput, reads: Float32[np.ndarray, " _"]) -> dict[PrefixMode, Prefixes]:
    """Open prefixes come first, then closed ones; each with s_0 wherever there is a token to read it at."""
    prefixes: dict[PrefixMode, Prefixes] = {}
    length = sequence.response_length
    if PrefixScores("open") in sequence.needs:
        open_reads, reads = np.split(reads, [length + min(sequence.prompt_length, 1)])
        prefixes["open"] = _with_before(open_reads, length)
    if PrefixScores("closed") in sequence.needs:
        prefixes["closed"] = _with_before(reads, len(sequence.closed_prefixes) - 1, sequence.boundaries)
    return prefixes


def _with_before(reads: Float32[np.ndarray, " _"], length: int, boundaries: Sequence[int] | None = None) -> Prefixes:
    before, after = np.split(reads, [len(reads) - length])
    return Prefixes(float(before[0]) if len(before) else None, after, boundaries)
