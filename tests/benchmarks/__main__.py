"""`python -m tests.benchmarks`: measure, print the table, and write it to tests/benchmarks/results."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from tests.benchmarks import report
from tests.benchmarks.figures import GROUPS, ON_EMBEDDED, ONLY_EMBEDDED
from tests.benchmarks.work import FULL, QUICK, Size, Work, write_random_model

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4  # float32 through some layers; a wrong result is off by far more


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute or two; written to quick.md")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contestant (default 2)")
    parser.add_argument("--repeats", type=int, help="rounds in which the contestants take turns")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="these groups of figures")
    parser.add_argument("--vllm-python", type=Path, help="an interpreter with vLLM, for the group vllm")
    parser.add_argument("--name", help="of the files in results (default: cpu, or quick)")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end as well
    size = QUICK if given.quick else FULL
    size = replace(size, rounds=given.repeats or size.rounds)
    name = given.name or ("quick" if given.quick else "cpu")
    print(measure(size, given.threads, given.only, RESULTS, name, given.vllm_python))


def measure(
    size: Size, threads: int, only: Sequence[str], folder: Path, name: str, vllm_python: Path | None = None
) -> str:
    """Measure groups of figures on every model; the table is written after each of them, and comes back."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    machine = report.Machine.here(threads)
    results: list[report.Result] = []
    page = ""
    with tempfile.TemporaryDirectory() as scratch:
        models, remarks = _models(size, Path(scratch))
        if size != replace(FULL, rounds=size.rounds):
            remarks.append("Sizes smaller than the goals are meant for: for a look, not for the record.")
        for place, (title, model) in enumerate(models):
            groups = [name for name in only if (name in ON_EMBEDDED if place else name not in ONLY_EMBEDDED)]
            for result in _results(Work(title, model, size, threads, vllm_python), groups):
                results.append(result)
                page = report.write(folder, name, machine, results, remarks)
    return page


def _models(size: Size, scratch: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Titles and folders of the models, and what is to be said of one that is missing."""
    models = [(f"Llama, hidden {size.hidden} x {size.layers} layers", write_random_model(scratch / "random", size))]
    if not size.embedded:
        return models, []
    try:
        from densereward.default_model import DefaultModelError, ensure_default_model
    except ImportError:
        return models, ["The embedded model was not measured: it is not installed."]
    try:
        return [*models, ("The embedded model", ensure_default_model())], []
    except (DefaultModelError, OSError) as error:
        return models, [f"The embedded model was not measured: {type(error).__name__} while it was made ready."]


def _results(work: Work, only: Sequence[str]) -> Iterator[report.Result]:
    with work.resources:
        for name in only:
            print(f"{work.title}: {name} ...", file=sys.stderr)
            yield report.Result.measured(work.title, name, GROUPS[name](work), TOLERANCE)


if __name__ == "__main__":
    main()
