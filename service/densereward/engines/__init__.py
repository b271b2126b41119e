"""Engines by name. An engine turns sequences into what one forward pass holds; see `base.Engine`."""

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
"""What `--engine` names. `load(source, ...)` takes by keyword those of the settings that the engine uses."""

INTERNAL_ENGINES = Table(
    "engine",
    {
        "unpacked": "densereward.engines.torch.unpacked:UnpackedEngine",
        "language_model": "densereward.engines.torch.language_model:LanguageModel",
        "pair": "densereward.engines.torch.pair:Pair",
    },
)
"""What the server takes by itself: for models that cannot be packed, and for pairs of language models."""
