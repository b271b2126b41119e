"""Forward passes: many sequences in one, or a long sequence in several; each pass copies its results back once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from densereward.capture import AttentionRow, Need, Objectives, ScoringInput
from densereward.engines.torch.attention import SingleSequence
from densereward.engines.torch.chunks import Chunk, ExpandedSequence, chunks_of, expand
from densereward.engines.torch.contributions import contributions
from densereward.engines.torch.failures import as_engine_failures
from densereward.engines.torch.float32 import in_float32_arithmetic
from densereward.engines.torch.kv_cache import KVCache, Prompt, PromptCache
from densereward.engines.torch.packed_batch import PackedBatch
from densereward.engines.torch.packing import pack
from densereward.engines.torch.residual import ResidualStream
from densereward.errors import CannotPack, EngineFailure
from densereward.heads.base import DecoderHead, PositionHead
from densereward.heads.language_model import LanguageModelHead

__all__ = ["Passes", "SequenceResult"]

_LONG_PROMPT = 64
"""Tokens from which on a prompt is worth caching."""


@dataclass(slots=True)
class SequenceResult:
    """What the passes give for one sequence.

    Attributes:
        expanded: the sequence.
        values: what the head gives at each of its `read_at`; filled chunk by chunk.
        objectives: the parts of these, for a head that sums over objectives; filled likewise.
        rows: the scored rows from the sequence's first token on, layers counted from 0.
        received: per layer, the attention that each token of the sequence received; summed chunk by chunk.
    """

    expanded: ExpandedSequence
    values: Float32[np.ndarray, " R"] = field(init=False)
    objectives: Float32[np.ndarray, "K R"] | None = None
    rows: dict[Need, Float32[np.ndarray, " L"]] = field(default_factory=dict)
    received: dict[int, Float32[np.ndarray, " S"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = np.full(len(self.expanded.read_at), np.nan, dtype=np.float32)

    @property
    def prompt(self) -> Prompt:
        """The prompt's ids, the key of the prompt cache."""
        return tuple(self.expanded.sequence.token_ids[: self.expanded.sequence.prompt_length])

    def add_objectives(self, indices: Int64[np.ndarray, " r"], parts: Float32[np.ndarray, "K r"]) -> None:
        """Fill in the parts of some values."""
        if self.objectives is None:
            self.objectives = np.full((len(parts), len(self.values)), np.nan, dtype=np.float32)
        self.objectives[:, indices] = parts

    def add_received(self, layer: int, received: Float32[np.ndarray, " _"]) -> None:
        """Add attention that the sequence's first tokens received."""
        total = self.received.setdefault(layer, np.zeros(self.expanded.length, dtype=np.float32))
        total[: len(received)] += received


class Passes:
    """Runs a decoder with a head on it, and owns the prompt cache.

    Args:
        model: loaded by `loading`.
        head: what is read.
        layers: how many the model has.
        batch_tokens: tokens in one pass, beyond which a sequence runs in chunks.
        prompt_cache: bytes for the keys and values of prompts that come again; 0 caches none.
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
        self._prompts = PromptCache(prompt_cache)
        self._stream: ResidualStream | None = None

    def check_attention(self) -> None:
        """Refuse a model in which a packed sequence could read its neighbours: only our attention may mix tokens.

        Raises:
            CannotPack: a layer has attention of its own, or mixes tokens by something else.
        """
        rows: frozenset[Need] = frozenset(AttentionRow(layer) for layer in range(self._layers))
        probe = ScoringInput([0, 1, 2, 3], 1, 3, 3, needs=rows)
        try:
            expanded = expand(probe)
            self.run([replace(expanded, next_ids=np.zeros(len(expanded.read_at), dtype=np.int64))])
        except EngineFailure as failure:
            raise CannotPack(f"{self._family} cannot be packed: {failure.message}") from failure
        config = self._config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        if strange := {kind for kind in kinds if kind.startswith("linear") or not kind.endswith("attention")}:
            raise CannotPack(f"{self._family} has layers of type {', '.join(sorted(strange))}, which cannot be packed")

    def widen_residual(self) -> str:
        """Keep the residual stream of a half-precision model in float32, if that can be done; the stream's dtype."""

        def probe() -> Tensor:
            ids = torch.arange(4, device=self._device)[None]
            with torch.inference_mode(), self.failures():
                output = self.backbone(input_ids=ids, position_ids=ids, use_cache=False, packed=SingleSequence())
            hidden: Tensor = output.last_hidden_state
            return hidden

        self._stream = ResidualStream(self.backbone, probe)
        return str(self._stream.dtype).removeprefix("torch.")

    @contextmanager
    def in_float32(self, model: nn.Module) -> Iterator[None]:
        """All that runs within is computed in float32 arithmetic, on the weights as they are."""
        with self._stream.off() if self._stream else nullcontext(), in_float32_arithmetic(model):
            yield

    def reference(self, model: Any, sequence: ScoringInput) -> tuple[Float[Tensor, "S E"], Float32[Tensor, "A S"]]:
        """One sequence in transformers' own eager attention: hidden states, and each layer's row of the scored token.

        Raises:
            EngineFailure: the model has no such attention, or gives no rows.
        """
        implementation = model.config._attn_implementation
        try:
            model.set_attn_implementation("eager")
            ids = torch.tensor([list(sequence.token_ids)], device=self._device)
            with torch.inference_mode(), self.failures():
                output = self.backbone(input_ids=ids, use_cache=False, output_attentions=True)
        except (ValueError, TypeError) as error:
            raise EngineFailure(f"the model does not run in transformers' eager attention: {error}") from error
        finally:
            model.set_attn_implementation(implementation)
        if not output.attentions or any(each is None for each in output.attentions):
            raise EngineFailure("transformers' eager attention gives no attention weights")
        rows = torch.stack([each[0, :, sequence.scored_position].float().mean(dim=0) for each in output.attentions])
        return output.last_hidden_state[0], rows

    def run(self, sequences: Sequence[ExpandedSequence]) -> list[SequenceResult]:
        """One pass for all, or for a single sequence that is too long for it, one pass per chunk.

        Raises:
            EngineFailure: a pass failed.
        """
        results = [SequenceResult(each) for each in sequences]
        with torch.inference_mode(), self.failures():
            if len(results) == 1 and len(results[0].expanded.ids) > self._batch_tokens:
                for chunk in chunks_of(results[0].expanded, self._batch_tokens):
                    self._run_pass([chunk], results)
            else:
                self._run_batch(results)
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
        """Drop the model and the prompt cache."""
        self.backbone = None
        self._prompts.clear()

    def _read(
        self, hidden: Float[Tensor, "M E"], gates: Float[Tensor, "_ E"], packed: PackedBatch
    ) -> tuple[Float32[Tensor, " M"], Float32[Tensor, "K M"]]:
        """What the head gives wherever it is read, and its parts, if the batch needs the parts."""
        head = self._head
        if isinstance(head, LanguageModelHead):
            values = head.read(hidden, packed.next_ids)
            return values, values.new_zeros(0, len(values))
        if isinstance(head, PositionHead) and not head.objectives:
            values = head.scores(hidden)
            return values, values.new_zeros(0, len(values))
        reads_each = torch.tensor([len(each.read_indices) for each in packed.placed], device=self._device)
        owner = torch.arange(len(reads_each), device=self._device).repeat_interleave(reads_each)
        parts = head.parts(hidden, gates, owner)
        needed = any(Objectives() in each.chunk.expanded.sequence.needs for each in packed.placed)
        return parts.sum(dim=0), parts if needed else parts[:0]

    def _run_batch(self, results: Sequence[SequenceResult]) -> None:
        """One pass; cached prompts do not run again, and those that come again are cached."""
        prompts = {result.prompt: None for result in results if len(result.prompt) >= _LONG_PROMPT}
        caches = {prompt: self._prompts.get(prompt) for prompt in prompts}
        again = {prompt: self._prompts.seen_before(prompt) for prompt in prompts}
        new_caches = {prompt: KVCache() for prompt in prompts if again[prompt] and caches[prompt] is None}
        chunks = [Chunk.after(result.expanded, caches.get(result.prompt)) for result in results]
        self._run_pass(chunks, results, new_caches)
        for prompt, cache in new_caches.items():
            self._prompts.store(prompt, cache)

    def _run_pass(
        self,
        chunks: Sequence[Chunk],
        results: Sequence[SequenceResult],
        new_caches: Mapping[Prompt, KVCache] | None = None,
    ) -> None:
        """One pass: the decoder, then the head wherever it is read, then contributions."""
        packed = pack(chunks, self._device, self._layers, new_caches)
        hidden = self.backbone(
            input_ids=packed.token_ids, position_ids=packed.position_ids, use_cache=False, packed=packed
        ).last_hidden_state[0]
        head = self._head
        gated = isinstance(head, DecoderHead) and head.gate is not None
        gates = hidden[packed.gates] if gated else hidden[:0]
        values, objectives = self._read(hidden[packed.read_at], gates, packed)
        if packed.contributions and isinstance(head, DecoderHead):
            packed.rows.update(contributions(self.backbone, head, packed, hidden[packed.scored], gates))
        if packed.row_needs != packed.rows.keys() or None in packed.received.values():
            raise EngineFailure(f"{self._family} did not run its attention in all the layers that are needed")
        _distribute(packed, results, values, objectives)


def _distribute(
    packed: PackedBatch,
    results: Sequence[SequenceResult],
    values: Float32[Tensor, " M"],
    objectives: Float32[Tensor, "K M"],
) -> None:
    """Copy what a pass gave to the host, in one copy, and give each sequence its own."""
    needs, places = list(packed.rows), list(packed.received)
    received = [each for each in packed.received.values() if each is not None]
    parts = [values, *packed.rows.values(), *received, objectives.flatten()]
    on_host = np.split(torch.cat(parts).cpu().numpy(), np.cumsum([len(part) for part in parts])[:-1])
    read = key = 0
    for result, placed in zip(results, packed.placed, strict=True):
        indices = placed.read_indices
        result.values[indices] = on_host[0][read : read + len(indices)]
        if len(objectives):
            result.add_objectives(indices, on_host[-1].reshape(objectives.shape)[:, read : read + len(indices)])
        read += len(indices)
    rows = dict(zip(needs, on_host[1 : 1 + len(needs)], strict=True))
    for index in packed.row_chunks:
        length = results[index].expanded.sequence.scored_position + 1
        results[index].rows |= {need: row[key : key + length] for need, row in rows.items()}
        key += length
    for (index, layer), each in zip(places, on_host[1 + len(needs) : -1], strict=True):
        results[index].add_received(layer, each)
