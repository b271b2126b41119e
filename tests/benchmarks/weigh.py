"""`python -m tests.benchmarks.weigh FOLDER WAY TOKENS`: bytes that one pass takes at its peak, beside the model.

A process for each, so that no other pass has left anything behind. The way is "ours" or "eager".
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from densereward.engines.torch.engine import TorchEngine
from tests.benchmarks.contestants import padded_eager, token_rewards
from tests.benchmarks.harness import Contestant
from tests.benchmarks.peers import plain_model
from tests.benchmarks.work import made_up, random_ids

WAYS = ("ours", "eager")
_WARM = 32  # tokens of a first pass, which loads what any pass needs


def weighed(folder: Path, way: str, tokens: int) -> float:
    """The bytes, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.weigh", str(folder), way, str(tokens)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return float(printed)


def _pass(folder: str, way: str) -> Any:
    if way == "ours":
        engine = TorchEngine.load(folder, device="cpu", dtype="float32")
        return lambda sequence: token_rewards(engine, [sequence])
    model = plain_model(folder, "eager")
    return lambda sequence: padded_eager(model, [sequence], 1)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak(run: Contestant) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process keeps would hide what the pass takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def main(folder: str, way: str, tokens: int) -> None:
    """Load, warm up, weigh, print."""
    torch.set_num_threads(1)
    score = _pass(folder, way)
    prompt = made_up(tokens // 4, 0, 256)
    warm, sequence = (random_ids(prompt[: count // 4], count - count // 4, 1, 256) for count in (_WARM, tokens))
    score(warm)
    print(_peak(lambda: score(sequence)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
