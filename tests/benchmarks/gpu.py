"""`python -m tests.benchmarks.gpu`: the engine alone, on a GPU, with models of real shapes and random weights.

Needs torch, transformers and the base of the service; no network, no server. Writes results/<device>.md and .json.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedConfig, Qwen3Config

from densereward.engines.torch import attention
from densereward.engines.torch.engine import TorchEngine
from tests.benchmarks import report
from tests.benchmarks.groups.gpu import FULL, GROUPS, TINY, Model

RESULTS = Path(__file__).parent / "results"
_VOCABULARY = 32768  # smaller than the real ones: the embedding is looked up, not multiplied
_LONGEST = 65536
_TOLERANCE = float("inf")  # what half precision does is a figure here, not a reason to stop

_COMMON: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": _LONGEST,
    "pad_token_id": 0,
    "num_labels": 1,
}


def _sizes(hidden: int, layers: int, heads: int, key_heads: int, wide: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": wide,
    }


SHAPES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, int]]] = {
    "llama-1b": (LlamaConfig, _sizes(2048, 16, 32, 8, 8192)),
    "llama-8b": (LlamaConfig, _sizes(4096, 32, 32, 8, 14336)),
    "qwen3-8b": (Qwen3Config, _sizes(4096, 36, 32, 8, 12288) | {"head_dim": 128}),
    "tiny": (LlamaConfig, _sizes(128, 2, 2, 1, 256)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, help="default: all but tiny")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="these groups of figures")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which the contestants take turns")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the page is written")
    given = parser.parse_args(arguments)
    print(measure(given.shapes, given.only, torch.device(given.device), given.repeats, given.folder))


def measure(shapes: Sequence[str], only: Sequence[str], device: torch.device, rounds: int, folder: Path) -> str:
    """Measure groups of figures on every shape and write them; the table comes back."""
    machine = report.Machine.here(torch.get_num_threads())
    if device.type == "cuda":
        machine = replace(machine, processor=f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = [result for shape in shapes for result in _results(shape, only, device, dtype, rounds)]
    name = re.sub("[^a-z0-9]+", "-", machine.processor.split(",")[0].lower()).strip("-")
    remark = f"Weights: random, {str(dtype).removeprefix('torch.')}; the score head is float32."
    return report.write(folder, name, machine, results, [remark])


def _results(
    shape: str, only: Sequence[str], device: torch.device, dtype: torch.dtype, rounds: int
) -> Iterator[report.Result]:
    model = random_model(shape, device, dtype)
    scale = TINY if shape == "tiny" else FULL
    scored = Model(model, TorchEngine(model), scale, rounds)
    with scored.resources:
        for name in only:
            print(f"{shape}: {name} ...", file=sys.stderr)
            yield report.Result.measured(shape, name, GROUPS[name](scored), _TOLERANCE)
    scored.engine.close()
    del model, scored
    gc.collect()
    torch.cuda.empty_cache()


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A sequence classifier with the engine's attention, made where it runs."""
    attention.register()
    kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        model = AutoModelForSequenceClassification.from_config(
            kind(**_COMMON, **sizes), dtype=dtype, attn_implementation=attention.IMPLEMENTATION
        )
    return model.eval()


if __name__ == "__main__":
    main()
