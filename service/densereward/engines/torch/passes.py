"""Forward passes: many sequences in one, or a long one in several; what is read comes back in one copy a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from densereward.capture import AttentionRow, Need, Objectives, ScoringInput
from densereward.engines.torch.contributions import contributions
from densereward.engines.torch.failures import as_engine_failures
from densereward.engines.torch.kept import KeptKeys, Prompt, PromptKeys
from densereward.engines.torch.packed_batch import PackedBatch
from densereward.engines.torch.packing import pack
from densereward.engines.torch.pieces import Piece, WrittenOut, in_pieces, write_out
from densereward.errors import CannotPack, EngineFailure
from densereward.heads.base import DecoderHead, PositionHead
from densereward.heads.language_model import LanguageModelHead

__all__ = ["Passes", "Result"]

_LONG_PROMPT = 64
"""Tokens of a prompt that is worth looking up."""


@dataclass(slots=True)
class Result:
    """What the passes give for one sequence.

    Attributes:
        whole: the sequence, written out.
        reads: what the head says at each of its reads; filled piece by piece.
        objectives: their parts, for a head that sums over objectives; filled likewise.
        rows: the scored rows from the sequence's first token on, layers counted from 0.
        sums: per layer, the attention that each token of the sequence received; added up piece by piece.
    """

    whole: WrittenOut
    reads: Float32[np.ndarray, " R"] = field(init=False)
    objectives: Float32[np.ndarray, "K R"] | None = None
    rows: dict[Need, Float32[np.ndarray, " L"]] = field(default_factory=dict)
    sums: dict[int, Float32[np.ndarray, " S"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reads = np.full(len(self.whole.reads), np.nan, dtype=np.float32)

    @property
    def prompt(self) -> Prompt:
        """The prompt, as it is looked up."""
        return tuple(self.whole.sequence.token_ids[: self.whole.sequence.prompt_length])

    def add_objectives(self, slots: Int64[np.ndarray, " r"], parts: Float32[np.ndarray, "K r"]) -> None:
        """Fill in the parts of some reads."""
        if self.objectives is None:
            self.objectives = np.full((len(parts), len(self.reads)), np.nan, dtype=np.float32)
        self.objectives[:, slots] = parts

    def receive(self, layer: int, sums: Float32[np.ndarray, " _"]) -> None:
        """Add attention that the sequence's first tokens received."""
        total = self.sums.setdefault(layer, np.zeros(self.whole.length, dtype=np.float32))
        total[: len(sums)] += sums


class Passes:
    """Runs a decoder with a head on it, and owns the keys that are kept between passes.

    Args:
        model: loaded by `loading`.
        head: what is read.
        layers: how many the model has.
        batch_tokens: tokens in one pass, beyond which a sequence runs in pieces.
        prompt_cache: bytes for the keys of prompts that come again; 0 runs every prompt anew.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: DecoderHead | LanguageModelHead,
        layers: int,
        batch_tokens: int,
        prompt_cache: int,
    ) -> None:
        self.backbone: Any = model.base_model
        self._head = head
        self._device = model.device
        self._family = type(model).__name__
        self._config: Any = model.config
        self._layers = layers
        self._batch_tokens = batch_tokens
        self._prompts = PromptKeys(prompt_cache)

    def check_attention(self) -> None:
        """Every layer must leave the mixing of tokens to attention that keeps sequences apart.

        Raises:
            CannotPack: some layer has attention of its own, or something else that mixes tokens, so that a sequence
                would read its neighbours.
        """
        rows: frozenset[Need] = frozenset(AttentionRow(layer) for layer in range(self._layers))
        probe = ScoringInput([0, 1, 2, 3], 1, 3, 3, needs=rows)
        try:
            whole = write_out(probe)
            self.run([replace(whole, following=np.zeros(len(whole.reads), dtype=np.int64))])
        except EngineFailure as failure:
            raise CannotPack(f"{self._family} cannot be packed: {failure.message}") from failure
        config = self._config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        if strange := {kind for kind in kinds if kind.startswith("linear") or not kind.endswith("attention")}:
            raise CannotPack(f"{self._family} has layers of type {', '.join(sorted(strange))}, which cannot be packed")

    def reference(self, model: Any, sequence: ScoringInput) -> tuple[Float[Tensor, "S E"], Float32[Tensor, "A S"]]:
        """One sequence in transformers' own eager attention: hidden states, and each layer's row of the last token.

        Raises:
            EngineFailure: the model has no such attention, or gives no rows.
        """
        packed = model.config._attn_implementation
        try:
            model.set_attn_implementation("eager")
            ids = torch.tensor([list(sequence.token_ids)], device=self._device)
            with torch.inference_mode(), self.failures():
                output = self.backbone(input_ids=ids, use_cache=False, output_attentions=True)
        except (ValueError, TypeError) as error:
            raise EngineFailure(f"transformers' eager attention cannot be had: {error}") from error
        finally:
            model.set_attn_implementation(packed)
        if not output.attentions or any(each is None for each in output.attentions):
            raise EngineFailure("transformers' eager attention gives no rows")
        rows = torch.stack([each[0, :, sequence.scored_position].float().mean(dim=0) for each in output.attentions])
        return output.last_hidden_state[0], rows

    def run(self, sequences: Sequence[WrittenOut]) -> list[Result]:
        """One pass for all, or for a sequence that is too long for one a pass for each piece.

        Raises:
            EngineFailure: a pass failed.
        """
        results = [Result(each) for each in sequences]
        with torch.inference_mode(), self.failures():
            if len(results) == 1 and len(results[0].whole.ids) > self._batch_tokens:
                for piece in in_pieces(results[0].whole, self._batch_tokens):
                    self._run([piece], results)
            else:
                self._run_together(results)
        return results

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn torch's errors into an `EngineFailure`, and where memory ran out, empty the prompt cache.

        Raises:
            EngineFailure: torch failed.
        """
        try:
            with as_engine_failures("--max-batch-tokens or --max-length"):
                yield
        except EngineFailure as failure:
            if isinstance(failure.__cause__, torch.OutOfMemoryError):
                self._prompts.clear()
            raise

    def close(self) -> None:
        """Let the model and the kept keys go."""
        self.backbone = None
        self._prompts.clear()

    def _read(
        self, hidden: Float[Tensor, "M E"], gates: Float[Tensor, "_ E"], packed: PackedBatch
    ) -> tuple[Float32[Tensor, " M"], Float32[Tensor, "K M"]]:
        """What the head says at every read place; where that is a sum over objectives, also the parts."""
        head = self._head
        if isinstance(head, LanguageModelHead):
            reads = head.read(hidden, packed.following)
            return reads, reads.new_zeros(0, len(reads))
        if isinstance(head, PositionHead) and not head.objectives:
            reads = head.scores(hidden)
            return reads, reads.new_zeros(0, len(reads))
        reads_each = torch.tensor([len(each.read_slots) for each in packed.placed], device=self._device)
        owner = torch.arange(len(reads_each), device=self._device).repeat_interleave(reads_each)
        parts = head.parts(hidden, gates, owner)
        return parts.sum(dim=0), parts if self._wants_objectives(packed) else parts[:0]

    @staticmethod
    def _wants_objectives(packed: PackedBatch) -> bool:
        return any(Objectives() in each.piece.whole.sequence.needs for each in packed.placed)

    def _run_together(self, results: Sequence[Result]) -> None:
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
        self, pieces: Sequence[Piece], results: Sequence[Result], keep: Mapping[Prompt, KeptKeys] | None = None
    ) -> None:
        """One pass, one copy back: the head at every read place, then the kept rows."""
        packed = pack(pieces, self._device, self._layers, keep)
        hidden = self.backbone(
            input_ids=packed.token_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
        ).last_hidden_state[0]
        head = self._head
        gated = isinstance(head, DecoderHead) and head.gate is not None
        gates = hidden[packed.gates] if gated else hidden[:0]
        reads, objectives = self._read(hidden[packed.read], gates, packed)
        if packed.contributions and isinstance(head, DecoderHead):
            packed.rows.update(contributions(self.backbone, head, packed, hidden[packed.scored], gates))
        if packed.row_needs != packed.rows.keys() or None in packed.sums.values():
            raise EngineFailure(f"{self._family} did not run its attention in all the layers that are needed")
        _hand_out(packed, results, reads, objectives)


def _hand_out(
    packed: PackedBatch, results: Sequence[Result], reads: Float32[Tensor, " M"], objectives: Float32[Tensor, "K M"]
) -> None:
    """Bring what a pass gave to the host in one copy, and cut it into sequences."""
    needs, places = list(packed.rows), list(packed.sums)
    sums = [each for each in packed.sums.values() if each is not None]
    parts = [reads, *packed.rows.values(), *sums, objectives.flatten()]
    on_host = np.split(torch.cat(parts).cpu().numpy(), np.cumsum([len(part) for part in parts])[:-1])
    read = key = 0
    for result, placed in zip(results, packed.placed, strict=True):
        slots = placed.read_slots
        result.reads[slots] = on_host[0][read : read + len(slots)]
        if len(objectives):
            result.add_objectives(slots, on_host[-1].reshape(objectives.shape)[:, read : read + len(slots)])
        read += len(slots)
    rows = dict(zip(needs, on_host[1 : 1 + len(needs)], strict=True))
    for index in packed.rows_of:
        length = results[index].whole.sequence.scored_position + 1
        results[index].rows |= {need: row[key : key + length] for need, row in rows.items()}
        key += length
    for (index, layer), received in zip(places, on_host[1 + len(needs) : -1], strict=True):
        results[index].receive(layer, received)
