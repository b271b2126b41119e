"""The table and the raw numbers, and what machine they are of."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from tests.benchmarks.harness import Group, ratios, spread

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """Where and with what the numbers were taken; load is what ran beside them when they began."""

    processor: str
    cores: int
    threads: int
    load: float
    python: str
    torch: str
    transformers: str
    date: str

    @classmethod
    def here(cls, threads: int) -> Machine:
        """This one."""
        return cls(
            processor=_processor(),
            cores=os.cpu_count() or 1,
            threads=threads,
            load=round(os.getloadavg()[0], 2),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            date=datetime.now(UTC).date().isoformat(),
        )

    def __str__(self) -> str:
        return (
            f"{self.processor}, cores: {self.cores}, threads: {self.threads}, load average at the start {self.load}; "
            f"Python {self.python}, torch {self.torch}, transformers {self.transformers}; {self.date}"
        )


def _processor() -> str:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Result:
    """One group, measured."""

    model: str
    name: str
    group: Group
    seconds: dict[str, list[float]]
    differences: dict[str, float | None]
    notes: list[str]

    def rows(self) -> list[str]:
        """A line of the table for each figure."""
        return [
            f"| {figure.title} | {_ratio(found.median)} | {_ratio(found.low)} .. {_ratio(found.high)} "
            f"| {figure.goal or '-'} | {self._median(figure.over)} / {self._median(figure.under)} "
            f"| {_difference(self.differences[figure.title])} |"
            for figure in self.group.figures
            for found in [spread(ratios(self.seconds, figure))]
        ]

    def _median(self, contestant: str) -> str:
        return f"{spread(self.seconds[contestant]).median:.3g}"

    def remarks(self) -> list[str]:
        """What was worked on, and what was noted."""
        rounds = len(next(iter(self.seconds.values())))
        return [" ".join([f"* {self.name}: {self.group.work}; {rounds} rounds.", *self.notes])]

    def raw(self) -> dict[str, object]:
        """Everything that was measured."""
        figures = [asdict(each) | {"ratios": ratios(self.seconds, each)} for each in self.group.figures]
        return {
            "model": self.model,
            "group": self.name,
            "work": self.group.work,
            "notes": self.notes,
            "seconds": self.seconds,
            "figures": figures,
            "differences": self.differences,
        }


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


_HEADER = """\
| figure | median | quartiles | goal | seconds of the two | largest difference |
|---|---|---|---|---|---|"""

_METHOD = """\
Every figure is a ratio of two contestants that did the same work in the same run, in turns, with the same float32
weights; medians over the rounds, quartiles beside them. "Largest difference" is between the numbers the two computed,
relative to the largest of them. A goal is where the figure is to get, not a promise that it is there."""


def table(machine: Machine, results: Sequence[Result], remarks: Sequence[str]) -> str:
    """The whole page."""
    parts = ["# Measurements", str(machine) + ".", _METHOD]
    for model in dict.fromkeys(result.model for result in results):
        own = [result for result in results if result.model == model]
        parts.append(f"## {model}")
        parts.append("\n".join([_HEADER, *(row for result in own for row in result.rows())]))
        parts.append("\n".join(remark for result in own for remark in result.remarks()))
    return "\n\n".join([*parts, *remarks]) + "\n"


def write(folder: Path, name: str, machine: Machine, results: Sequence[Result], remarks: Sequence[str]) -> str:
    """Write the table and, beside it, the raw numbers; the table comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    page = table(machine, results, remarks)
    (folder / f"{name}.md").write_text(page)
    raw = {"machine": asdict(machine), "remarks": list(remarks), "results": [result.raw() for result in results]}
    (folder / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    return page
