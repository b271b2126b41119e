"""The table and the raw numbers, and what machine they are of."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.benchmarks.harness import Chart, Group, Reading, agreement, ratios, spread, take_turns
from tests.benchmarks.svg import draw

_CPU_INFO = Path("/proc/cpuinfo")
_Raw = dict[str, Any]
"""A group as it is written down: `Result.raw`."""


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
    readings: list[Reading]
    charts: list[Chart]

    @classmethod
    def measured(cls, model: str, name: str, group: Group, tolerance: float) -> Result:
        """Measure a group: a first turn warms up and shows that all agree, then the rounds."""
        started = time.perf_counter()
        differences = agreement({key: run() for key, run in group.contestants.items()}, group.figures, tolerance)
        seconds = take_turns(group.contestants, group.rounds)
        print(f"  {time.perf_counter() - started:.0f} s", file=sys.stderr)
        return cls(
            model, name, group, seconds, differences, group.notes(), group.readings(seconds), group.charts(seconds)
        )

    def rows(self) -> list[str]:
        """A line of the table for each figure, then for each reading."""
        figures = [
            f"| {figure.title} | {_ratio(found.median)} | {_ratio(found.low)} .. {_ratio(found.high)} "
            f"| {figure.goal or '-'} | {self._median(figure.over)} / {self._median(figure.under)} "
            f"| {_difference(self.differences[figure.title])} |"
            for figure in self.group.figures
            for found in [spread(ratios(self.seconds, figure))]
        ]
        return [*figures, *map(_reading, self.readings)]

    def _median(self, contestant: str) -> str:
        return f"{spread(self.seconds[contestant]).median:.3g}"

    def remarks(self) -> list[str]:
        """What was worked on, and what was noted."""
        rounds = len(next(iter(self.seconds.values()), []))
        counted = f"; {rounds} rounds" if rounds else ""
        return [" ".join([f"* {self.name}: {self.group.work}{counted}.", *self.notes])]

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
            "readings": [asdict(each) for each in self.readings],
            "charts": [asdict(each) for each in self.charts],
            "rows": self.rows(),
            "remarks": self.remarks(),
        }


def _reading(reading: Reading) -> str:
    unit = f" {reading.unit}" if reading.unit else ""
    median, quartiles = "not measured", "-"
    if reading.values:
        found = spread(reading.values)
        median, quartiles = f"{_ratio(found.median)}{unit}", f"{_ratio(found.low)} .. {_ratio(found.high)}"
    return f"| {reading.title} | {median} | {quartiles} | {reading.goal or '-'} | - | - |"


def _ratio(value: float) -> str:
    if 0 < value < 0.01:
        return f"{value:.0e}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


_HEADER = """\
| figure | median | quartiles | goal | seconds of the two | largest difference |
|---|---|---|---|---|---|"""

_METHOD = """\
Every figure is a ratio of two contestants that did the same work in the same run, in turns, with the same weights,
float32 on a CPU; medians over the rounds, quartiles beside them. A row without seconds is no ratio but was read off.
Transformers runs in processes of its own, so that no setting of our engine helps or hinders it.
"Largest difference" is between the numbers the two computed, relative to the largest of them. A goal is where the
figure is to get, not a promise that it is there."""


def table(results: Sequence[_Raw], remarks: Sequence[str], charts: Sequence[str] = ()) -> str:
    """The whole page; charts are the links to them."""
    parts = ["# Measurements", *_machines(results), _METHOD]
    for model in dict.fromkeys(each["model"] for each in results):
        own = [each for each in results if each["model"] == model]
        parts.append(f"## {model}")
        parts.append("\n".join([_HEADER, *(row for each in own for row in each["rows"])]))
        parts.append("\n".join(remark for each in own for remark in each["remarks"]))
    return "\n\n".join([*parts, *charts, *remarks]) + "\n"


def _machines(results: Sequence[_Raw]) -> list[str]:
    """What each run was made on, with its groups where there were several runs."""
    runs: dict[str, dict[str, None]] = {}
    for each in results:
        runs.setdefault(each["machine"], {})[each["group"]] = None
    if len(runs) == 1:
        return [f"{machine}." for machine in runs]
    return ["In several runs:", "\n".join(f"* {machine}: {', '.join(groups)}." for machine, groups in runs.items())]


def write(folder: Path, name: str, machine: Machine, results: Sequence[Result], remarks: Sequence[str]) -> str:
    """Write the table and, beside it, the raw numbers and the charts; the table comes back.

    Groups that an earlier run wrote there and this one did not measure stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    before: list[_Raw] = json.loads(file.read_text())["results"] if file.exists() else []
    found = {(each["model"], each["group"]): each for each in before}
    found |= {(each.model, each.name): each.raw() | {"machine": str(machine)} for each in results}
    everything = list(found.values())
    for each in results:
        for chart in each.charts:
            (folder / f"{name}-{chart.name}.svg").write_text(draw(chart))
    charts = [f"![{chart['title']}]({name}-{chart['name']}.svg)" for each in everything for chart in each["charts"]]
    page = table(everything, remarks, charts)
    (folder / f"{name}.md").write_text(page)
    file.write_text(json.dumps({"results": everything}, indent=1) + "\n")
    return page
