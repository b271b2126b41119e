"""Engines: they run the reward model on sequences, and return what the methods need of the forward pass.

    base       the contract: Engine, StreamingEngine, and EngineFacts, what an engine says of its model
    captured   open prefix scores and attention rows, taken from the numbers of all positions
    torch/     transformers models in this process, in packed batches or not; language models and pairs of them
    vllm/      vLLM's client; attention rows come from its workers

Attention is captured in `torch/attention_capture.py`, in `torch/transformers_pass.py` for models that cannot be packed,
and in `vllm/worker.py`.
"""

from __future__ import annotations

from densereward.registry import Table

__all__ = ["ENGINES", "INTERNAL_ENGINES"]

ENGINES = Table(
    "engine",
    {
        "torch": "densereward.engines.torch.engine:TorchEngine",
        "vllm": "densereward.engines.vllm.engine:VllmEngine",
    },
)
"""What `--engine` names. `load(source, ...)` takes by keyword those options of `checks.loading` that it uses."""

INTERNAL_ENGINES = Table(
    "engine",
    {
        "unpacked": "densereward.engines.torch.unpacked:UnpackedEngine",
        "language_model": "densereward.engines.torch.language_model:LanguageModel",
        "pair": "densereward.engines.torch.pair:Pair",
    },
)
"""What the server takes by itself: for models that cannot be packed, and for pairs of language models."""
