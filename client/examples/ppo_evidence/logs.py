"""Logs of finished runs: one compressed file per run, a header and then a line per step."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .plan import Plan, Run, is_tuning

__all__ = ["ByMethod", "Log", "log_path", "read_log", "read_logs", "refuse_other"]

_WINDOW = 10  # steps, of every moving average
_NO_COLUMNS, _OF_A_STUDY = ("ids", "warnings"), ("steps", "settings")


def log_path(logs: Path, run: Run) -> Path:
    """The file of a finished run."""
    return logs / run.study / f"{run.method.replace(' ', '-')}.{run.seed}.jsonl.gz"


def read_log(path: Path) -> list[dict[str, Any]]:
    """A run's header, then its steps."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def refuse_other(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a file was made with what is expected.

    Raises:
        ValueError: It was not; the message names what differs.
    """
    if different := [name for name, value in expected.items() if name not in found or found[name] != value]:
        raise ValueError(f"{path} was made with another {', '.join(different)}; move it away")


@dataclass(frozen=True)
class Log:
    """One finished run: its header, one column per quantity, and how often the judge warned."""

    head: Mapping[str, Any]
    columns: Mapping[str, NDArray[np.float64]]
    warnings: Mapping[str, int]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's hyperparameters."""
        settings: Mapping[str, Any] = self.head["settings"]
        return settings

    @property
    def identity(self) -> dict[str, Any]:
        """Everything besides the plan that decides a run's numbers; runs may be compared only if it is equal."""
        of_run = {field.name for field in fields(Run)}
        return {name: value for name, value in self.head.items() if name not in of_run}

    def smooth(self, name: str) -> NDArray[np.float64]:
        """Moving average over the last ten steps; over fewer at the beginning."""
        sums = np.concatenate([[0.0], np.cumsum(self.columns[name])])
        ends = np.arange(1, len(sums))
        starts = np.maximum(0, ends - _WINDOW)
        smoothed: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
        return smoothed

    def mean(self, name: str = "reward", steps: int | None = None) -> float:
        """Mean over all steps, or over the first `steps`."""
        return float(np.mean(self.columns[name][:steps]))

    def first(self, name: str) -> float:
        """Mean over the first ten steps."""
        return float(np.mean(self.columns[name][:_WINDOW]))

    def last(self, name: str = "reward", steps: int | None = None) -> float:
        """Mean over the last ten steps, of all or of the first `steps`."""
        return float(np.mean(self.columns[name][:steps][-_WINDOW:]))

    def reward_at(self, kl: float) -> float | None:
        """The smoothed reward when the smoothed KL first reaches `kl`; None if it never does."""
        passed = np.flatnonzero(self.smooth("kl") >= kl)
        return float(self.smooth("reward")[passed[0]]) if len(passed) else None

    def reaches(self, reward: float) -> float | None:
        """The number of steps until the smoothed reward reaches `reward`; None if it never does."""
        passed = np.flatnonzero(self.smooth("reward") >= reward)
        return float(passed[0] + 1) if len(passed) else None


ByMethod = dict[str, dict[int, Log]]


def read_logs(folder: Path) -> dict[str, ByMethod]:
    """Finished runs by study, method and seed; studies and methods in the plan's order.

    Raises:
        ValueError: Some runs were made with another plan, reward model or start policy than the rest. Only tuning runs
            may differ, since they are compared with no other; the report names the differences.
    """
    logs: dict[str, ByMethod] = defaultdict(lambda: defaultdict(dict))
    first: dict[tuple[str, ...], dict[str, Any]] = {}  # what the first run of each group was made with
    for path in sorted(folder.glob("*/*.jsonl.gz")):
        head, *steps = read_log(path)
        columns = {
            name: np.array([step[name] for step in steps], dtype=float) for name in steps[0] if name not in _NO_COLUMNS
        }
        warnings: Counter[str] = Counter()
        for step in steps:
            warnings.update(step.get("warnings", {}))
        log = Log(head, columns, warnings)
        kind = "tuning" if is_tuning(head["study"]) else "studies"
        identity = first.setdefault((kind,), log.identity)
        refuse_other(path, head, dict.fromkeys(log.identity) | identity)  # a key the first lacks differs too
        refuse_other(path, head, first.setdefault((kind, head["study"]), {key: head[key] for key in _OF_A_STUDY}))
        refuse_other(path, head, first.setdefault((kind, "", head["method"]), {"request": head["request"]}))
        logs[head["study"]][head["method"]][head["seed"]] = log
    plan = Plan()
    return {
        study: {method: logs[study][method] for method in plan.methods if method in logs[study]}
        for study in sorted(logs, key=[*plan.studies, *logs].index)
    }
