"""Average two trained adapters into one that a build merges like any other.

    python -m densereward.default_model.average SHORT_RUN/adapter LONG_RUN/adapter --output FOLDER

A short run leans on single words, a long one reads whole sentences better and spreads its verdict over them: the mean
of their weights keeps most of both. Low-rank updates do not average factor by factor, but half of one plus half of the
other is exactly an update of the summed rank. The runs must share the base and the seed (so they start from the same
factors).
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def average_adapters(first: Path, second: Path, output: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write to `output` the adapter whose merged weights are the mean of the two merged ones, stored as `dtype`.

    Raises:
        ValueError: the adapters differ in base, scale or the names of their weights.
    """
    configs = [json.loads((folder / CONFIG).read_text(encoding="utf-8")) for folder in (first, second)]
    weights = [load_file(folder / WEIGHTS) for folder in (first, second)]
    bases = {config["base_model_name_or_path"] for config in configs}
    scales = {config["lora_alpha"] / config["r"] for config in configs}
    if len(bases) > 1 or len(scales) > 1 or weights[0].keys() != weights[1].keys():
        raise ValueError("adapters of one base, one scale and one set of layers can be averaged, others not")
    rank = sum(config["r"] for config in configs)
    mean = {name: combine(name, weights[0][name], weights[1][name]).to(dtype).contiguous() for name in weights[0]}
    output.mkdir(parents=True, exist_ok=True)
    save_file(mean, output / WEIGHTS, metadata={"format": "pt"})
    config = configs[0] | {"r": rank, "lora_alpha": round(rank * scales.pop() / 2)}
    (output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def combine(name: str, first: Tensor, second: Tensor) -> Tensor:
    """Stack low-rank factors along the rank, (r, in) and (out, r); average every other weight."""
    if ".lora_A." in name:
        return torch.cat([first, second], dim=0)
    if ".lora_B." in name:
        return torch.cat([first, second], dim=1)
    return (first + second) / 2


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Average two adapters.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    average_adapters(arguments.first, arguments.second, arguments.output, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
