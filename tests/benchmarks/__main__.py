"""`python -m tests.benchmarks`: measure, print the table, and write it to tests/benchmarks/results."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from tests.benchmarks import report
from tests.benchmarks.figures import GROUPS
from tests.benchmarks.harness import agreement, take_turns
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
    parser.add_argument("--name", help="of the files in results (default: cpu, or quick)")
    given = parser.parse_args(arguments)
    size = QUICK if given.quick else FULL
    size = replace(size, rounds=given.repeats or size.rounds)
    print(measure(size, given.threads, given.only, RESULTS, given.name or ("quick" if given.quick else "cpu")))


def measure(size: Size, threads: int, only: Sequence[str], folder: Path, name: str) -> str:
    """Measure groups of figures on every model and write them; the table comes back."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    machine = report.Machine.here(threads)
    with tempfile.TemporaryDirectory() as scratch:
        models, remarks = _models(size, Path(scratch))
        results = [result for title, model in models for result in _results(title, model, size, threads, only)]
    if size != replace(FULL, rounds=size.rounds):
        remarks = [*remarks, "Sizes smaller than the goals are meant for: for a look, not for the record."]
    return report.write(folder, name, machine, results, remarks)


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


def _results(title: str, model: Path, size: Size, threads: int, only: Sequence[str]) -> Iterator[report.Result]:
    with ExitStack() as resources:
        work = Work(title, model, size, threads, resources)
        for name in only:
            print(f"{title}: {name} ...", file=sys.stderr)
            yield _result(work, name)


def _result(work: Work, name: str) -> report.Result:
    """One group: a first turn warms up and shows that all agree, then the rounds."""
    group = GROUPS[name](work)
    differences = agreement({key: run() for key, run in group.contestants.items()}, group.figures, TOLERANCE)
    seconds = take_turns(group.contestants, group.rounds)
    return report.Result(work.title, name, group, seconds, differences, group.notes())


if __name__ == "__main__":
    main()
