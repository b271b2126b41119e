"""Engines by name. An engine turns sequences into what one forward pass holds; see `base.Engine`."""

from __future__ import annotations

from densereward.registry import Table

ENGINES = Table(
    "engine",
    {
        "torch": "densereward.engines.torch.engine:TorchEngine",
        "unpacked": "densereward.engines.torch.unpacked:UnpackedEngine",
        "language_model": "densereward.engines.torch.language_model:LanguageModel",
        "vllm": "densereward.engines.vllm.engine:VllmEngine",
        "pair": "densereward.engines.torch.pair:Pair",
    },
)
