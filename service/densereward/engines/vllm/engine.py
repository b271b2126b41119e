"""The vLLM engine: vLLM's scheduler, kernels, tensor parallelism and quantisation, and the same answers.

vLLM runs in processes of its own. Its client (`AsyncLLM`) runs here, in an event loop of its own. Sequences are handed
over one by one, and vLLM decides what runs together. Scores of every position and the scored token's attention rows
come back in one tensor (`engines.vllm.worker`). A sequence that needs only its score is pooled at its last token, so
that vLLM can take the prompt's keys from its prefix cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from densereward.capture import AttentionRow, Captured, Need, PrefixScores, ScoringInput, Variants
from densereward.engines.captured import from_positions
from densereward.engines.torch.loading import Dtype
from densereward.engines.vllm.attention_rows import RowRequest
from densereward.engines.vllm.checks import check_engine
from densereward.engines.vllm.facts import facts_of, layers_with_rows
from densereward.engines.vllm.loop_thread import LoopThread
from densereward.engines.vllm.model import ServedModel, check_installed, engine_arguments, served_model
from densereward.errors import EngineDied, EngineFailure, ModelError

__all__ = ["VllmEngine"]

_WATCH = 0.5
"""Seconds between two checks that the engine's processes live."""

_LAYERS_PER_REQUEST = 4
"""Layers whose rows one request to vLLM asks for: the keys of each are kept until its sequence ends."""

_DIED = "the engine's process ended; this server stops taking requests and exits, so that its supervisor restarts it"


class VllmEngine:
    """A reward model in vLLM. See `engines.base.StreamingEngine`.

    Args:
        model: what vLLM is given.
        arguments: the operator's, for vLLM's engine.
        dtype: of the weights.
        batch_tokens: tokens in one pass; by default what vLLM takes.
        caches_prompts: whether vLLM's prefix cache is on.

    Raises:
        ModelError: vLLM cannot load it, or its attention rows are not those of its layers.
    """

    def __init__(
        self,
        model: ServedModel,
        arguments: dict[str, Any],
        dtype: Dtype = "auto",
        batch_tokens: int | None = None,
        *,
        caches_prompts: bool = True,
    ) -> None:
        self._thread = LoopThread()
        self.death: Future[EngineDied] = Future()
        self._request_ids = itertools.count()
        try:
            all_arguments = engine_arguments(model, arguments, dtype, batch_tokens, caches_prompts=caches_prompts)
            self._llm: Any = self._thread.run(_started(all_arguments))
        except Exception:  # whatever it is, the thread must not stay
            self._thread.close()
            raise
        try:
            hooked = self._thread.run(self._llm.collective_rpc("densereward_install_hooks"))
            self._row_layers, missing = layers_with_rows(hooked)
            self.facts = facts_of(model, self._llm, missing)
            self._thread.run(check_engine(self, self._row_layers))
        except Exception:  # whatever it is, vLLM's processes must not stay
            self.close()
            raise
        self._watching = self._thread.submit(self._watch())

    @classmethod
    def load(
        cls,
        source: str,
        *,
        arguments: dict[str, Any] | None = None,
        revision: str | None = None,
        device: str = "auto",
        dtype: Dtype = "auto",
        longest: int | None = None,
        batch_tokens: int | None = None,
        prompt_cache: int = 0,
    ) -> VllmEngine:
        """Load from a folder or a hub id.

        Args:
            source: folder or hub id.
            arguments: of vLLM's engine.
            revision: of a hub model.
            device: `auto`, or the kind that this vLLM is built for.
            dtype: of the weights.
            longest: tokens in the longest sequence to read.
            batch_tokens: tokens in one pass.
            prompt_cache: 0 turns vLLM's prefix cache off; otherwise it holds as many prompts as vLLM has room for.

        Raises:
            ModelError: vLLM is not installed or of an unknown version, or it cannot be given the model.
        """
        check_installed(device)
        return cls(
            served_model(source, revision, longest),
            arguments or {},
            dtype,
            batch_tokens,
            caches_prompts=prompt_cache > 0,
        )

    @property
    def provides(self) -> frozenset[Need]:
        """Scores of open prefixes, and the rows of the layers whose rows can be captured."""
        layers = [number for layer in self._row_layers for number in (layer, layer - self.facts.layers)]
        return frozenset([PrefixScores("open"), Variants(), *(AttentionRow(layer) for layer in layers)])

    def submit(self, sequence: ScoringInput) -> Future[Captured]:
        """Hand over a sequence; cancelling its future takes it out of vLLM.

        The future fails with `EngineFailure` where this sequence cannot be scored, with `EngineDied` where none can.
        """
        return self._thread.submit(self.scored(sequence))

    def forward(self, batch: Sequence[ScoringInput]) -> list[Captured]:
        """Score a batch, in as many passes as vLLM takes.

        Raises:
            EngineFailure: a sequence could not be scored.
            EngineDied: none can.
        """
        futures = [self.submit(each) for each in batch]
        try:
            return [each.result() for each in futures]
        finally:
            for each in futures:
                each.cancel()

    def reference(self, sequence: ScoringInput) -> Captured:  # noqa: ARG002
        """VLLM has no second way to compute.

        Raises:
            EngineFailure: always.
        """
        raise EngineFailure("vLLM has one way to compute; `densereward check --engine vllm` compares with torch's")

    def exactly(self, batch: Sequence[ScoringInput]) -> list[Captured]:  # noqa: ARG002
        """VLLM computes in one dtype.

        Raises:
            EngineFailure: always.
        """
        raise EngineFailure("vLLM computes in one dtype; `densereward check --engine vllm` compares with torch's")

    def metrics(self) -> bytes:
        """VLLM's own metrics, as Prometheus reads them."""
        from prometheus_client import generate_latest
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        registry = get_prometheus_registry()

        class _OfVllm:
            def collect(self) -> Any:
                return (each for each in registry.collect() if each.name.startswith("vllm:"))

        return generate_latest(_OfVllm())

    def close(self) -> None:
        """End vLLM's processes."""
        self.death.cancel()
        llm, self._llm = self._llm, None
        if llm is None:
            return
        with contextlib.suppress(Exception):  # a process that has ended cannot be shut down
            self._thread.run(_shut_down(llm))
        self._thread.close()

    async def _watch(self) -> None:
        """Set `death` when the processes have ended, also while nothing runs."""
        llm = self._llm
        while not llm.errored:  # noqa: ASYNC110  # vLLM has no event for it
            await asyncio.sleep(_WATCH)
        if self.death.set_running_or_notify_cancel():
            self.death.set_result(EngineDied(_DIED, retry_after=30.0))

    async def scored(self, sequence: ScoringInput) -> Captured:
        """`submit`, in the engine's own loop."""
        needed = sorted({need.layer % self.facts.layers for need in sequence.needs if isinstance(need, AttentionRow)})
        everywhere = bool(needed) or PrefixScores("open") in sequence.needs
        rows: dict[int, Float32[np.ndarray, " S"]] = {}
        for layers in _groups(needed) or [()]:
            numbers = await self._pooled(sequence, RowRequest(layers), everywhere=everywhere)
            rows |= dict(zip(layers, numbers[:, 1:].T, strict=True))
        scores = numbers[:, 0]
        return from_positions(sequence, float(scores[-1]), scores, lambda layer: rows[layer % self.facts.layers])

    async def row_errors(self, sequence: ScoringInput, layers: Sequence[int]) -> dict[int, float]:
        """How far each layer's row is from giving what its kernel computed; see `attention_rows.row_error`.

        Raises:
            EngineFailure: there is no row.
        """
        errors: dict[int, float] = {}
        for group in _groups(layers):
            numbers = await self._pooled(sequence, RowRequest(group, checks=True), everywhere=True)
            errors |= dict(zip(group, numbers[0, 1 + len(group) :].tolist(), strict=True))
        return errors

    async def _pooled(
        self, sequence: ScoringInput, rows: RowRequest, *, everywhere: bool
    ) -> Float32[np.ndarray, "_ _"]:
        """Scores and rows from vLLM: of all positions, or of the last one alone."""
        from vllm import PoolingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        if sequence.scored_position + 1 < sequence.response_stop:
            raise EngineFailure("vLLM reads the score at a sequence's last token, which is in the response here")
        ids = list(sequence.token_ids[: sequence.scored_position + 1])
        self._check_ids(ids)
        parameters = PoolingParams(
            task="token_classify" if everywhere else "classify", use_activation=False, extra_kwargs=rows.extra_kwargs
        )
        try:
            outputs = self._llm.encode(tokens_input(ids), parameters, str(next(self._request_ids)))
            data: torch.Tensor = [each.outputs.data async for each in outputs][-1].float()
        except EngineDeadError as error:
            raise EngineDied(_DIED, retry_after=30.0) from error
        except Exception as error:  # whatever vLLM raises is about this sequence, or about its end
            if self._llm is None or self._llm.errored:
                raise EngineDied(_DIED, retry_after=30.0) from error
            raise EngineFailure(f"vLLM failed: {type(error).__name__}: {error.__cause__ or error}") from error
        numbers = data if everywhere else data.reshape(1, -1)
        expected = (len(ids) if everywhere else 1, 1 + len(rows.layers) * (2 if rows.checks else 1))
        if tuple(numbers.shape) != expected:
            raise EngineFailure(f"vLLM gave {tuple(numbers.shape)} numbers where {expected} were asked for")
        return numbers.numpy()

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Refuse what would end vLLM's process, and all requests with it: an id that the model has no embedding for.

        Raises:
            EngineFailure: there is one, or none at all, or too many.
        """
        if not 0 < len(ids) <= self.facts.max_length:
            raise EngineFailure(f"{len(ids)} tokens, where 1 to {self.facts.max_length} can be read")
        if not 0 <= min(ids) <= max(ids) < self.facts.vocabulary_size:
            raise EngineFailure(f"token ids must be below {self.facts.vocabulary_size}")


def _groups(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """The layers of each request to vLLM."""
    return [tuple(layers[i : i + _LAYERS_PER_REQUEST]) for i in range(0, len(layers), _LAYERS_PER_REQUEST)]


async def _started(arguments: Any) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(arguments)
    except Exception as error:  # whatever vLLM finds wrong with model, device or memory
        raise ModelError(f"vLLM cannot load {arguments.model}: {error} (its log says more)") from error


async def _shut_down(llm: Any) -> None:
    llm.shutdown()
