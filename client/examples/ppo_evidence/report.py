"""From the logs to `evidence.md` and its plot; works on whatever is there and says how much that is."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .curves import Line, Panel, draw
from .run import Plan, read_log

__all__ = ["Log", "interval", "read_logs", "sign_test", "write_report"]

Numbers = NDArray[np.float64]
_FINDINGS = Path(__file__).parent / "FINDINGS.md"
_WINDOW, _EQUAL_KL, _CONTROL = 10, (2.0, 5.0, 10.0), "sparse"


@dataclass(frozen=True)
class Log:
    """One finished run: its header and a column a quantity."""

    study: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    columns: Mapping[str, Numbers]

    def smooth(self, name: str) -> Numbers:
        """Means over ten steps that end at each step; fewer at the beginning."""
        sums = np.concatenate([[0.0], np.cumsum(self.columns[name])])
        ends = np.arange(1, len(sums))
        starts = np.maximum(0, ends - _WINDOW)
        smoothed: Numbers = (sums[ends] - sums[starts]) / (ends - starts)
        return smoothed

    def mean(self, name: str = "reward", steps: int | None = None) -> float:
        """Over the whole training, or its first steps."""
        return float(np.mean(self.columns[name][:steps]))

    def last(self, name: str = "reward") -> float:
        """Over the last ten steps."""
        return float(np.mean(self.columns[name][-_WINDOW:]))

    def reward_at(self, kl: float) -> float | None:
        """The smoothed reward when the smoothed KL first reaches this; None where it never does."""
        passed = np.flatnonzero(self.smooth("kl") >= kl)
        return float(self.smooth("reward")[passed[0]]) if len(passed) else None


ByMethod = dict[str, dict[int, Log]]


def read_logs(folder: Path) -> dict[str, ByMethod]:
    """Finished runs: study, method, seed; studies and methods in the plan's order."""
    logs: dict[str, ByMethod] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*/*.jsonl.gz")):
        head, *steps = read_log(path)
        columns = {name: np.array([step[name] for step in steps], dtype=float) for name in steps[0] if name != "ids"}
        logs[head["study"]][head["method"]][head["seed"]] = Log(
            head["study"], head["method"], head["seed"], head["settings"], columns
        )
    plan = Plan()
    return {
        study: {method: logs[study][method] for method in plan.methods if method in logs[study]}
        for study in sorted(logs, key=[*plan.studies, *logs].index)
    }


def interval(values: Sequence[float]) -> str:
    """Mean and two standard errors, where there are enough values to tell."""
    if len(values) < 2:
        return "".join(f"{value:+.3f}" for value in values)
    error = 2 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{np.mean(values):+.3f} ± {error:.3f}"


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided probability of so uneven a split of signs if both were equally likely."""
    count, wins = len(differences), sum(difference > 0 for difference in differences)
    tail = sum(math.comb(count, k) for k in range(max(wins, count - wins), count + 1)) * 0.5**count
    return min(1.0, 2 * tail)


def write_report(logs: Path, output: Path) -> None:
    """Write `evidence.md` and `evidence.svg` into `output`."""
    studies = read_logs(logs)
    parts = ["# Do dense rewards help PPO?\n", _FINDINGS.read_text().strip() + "\n"]
    if main := studies.get("main"):
        output.mkdir(parents=True, exist_ok=True)
        (output / "evidence.svg").write_text(draw(_panels(main)))
        parts += ["![Learning curves](evidence.svg)\n", *_main(main)]
    else:
        parts.append("No run of the main study is finished.\n")
    for name, study in studies.items():
        if name != "main" and not name.startswith("tune"):
            parts += _variant(name, study, main or {})
    parts += _tuning({name: study for name, study in studies.items() if name.startswith("tune")})
    output.mkdir(parents=True, exist_ok=True)
    (output / "evidence.md").write_text("\n".join(parts).rstrip() + "\n")


def _panels(study: ByMethod) -> list[Panel]:
    over_steps, over_kl = {}, {}
    for method, by_seed in study.items():
        rewards = np.stack([log.smooth("reward") for log in by_seed.values()])
        kl = np.stack([log.smooth("kl") for log in by_seed.values()]).mean(0)
        errors = 2 * rewards.std(0, ddof=1) / math.sqrt(len(rewards)) if len(rewards) > 1 else np.zeros_like(kl)
        mean = rewards.mean(0)
        over_steps[method] = Line(list(enumerate(mean.tolist())), errors.tolist())
        over_kl[method] = Line(list(zip(kl.tolist(), mean.tolist(), strict=True)))
    return [
        Panel("Reward, mean of the seeds ± 2 standard errors", "step", over_steps),
        Panel("Reward beside the distance paid for it", "KL to the reference, nats a response", over_kl),
    ]


def _main(study: ByMethod) -> Iterator[str]:
    counts = ", ".join(f"{method} {len(by_seed)}" for method, by_seed in study.items())
    yield f"Finished runs: {counts}. Raw rewards of the judge; ± is two standard errors over seeds.\n"
    sparse = study.get(_CONTROL, {})
    best = _mean_curve(sparse).max() if sparse else math.inf
    head = (
        "method",
        "mean over training",
        "last 10 steps",
        "spread of these",
        "reaches sparse's best",
        "KL",
        "distinct",
    )
    yield from _table(
        [*head, "explained"],
        (
            [
                method,
                interval([log.mean() for log in by_seed.values()]),
                interval([log.last() for log in by_seed.values()]),
                f"{np.std([log.last() for log in by_seed.values()], ddof=min(1, len(by_seed) - 1)):.3f}",
                _reached(_mean_curve(by_seed), best),
                f"{np.mean([log.last('kl') for log in by_seed.values()]):.1f}",
                f"{np.mean([log.last('distinct') for log in by_seed.values()]):.3f}",
                f"{np.mean([log.mean('explained') for log in by_seed.values()]):.2f}",
            ]
            for method, by_seed in study.items()
        ),
    )
    yield "Spread: standard deviation over seeds. KL (nats a response) and distinct pairs of tokens: last 10 steps.\n"
    for control in (_CONTROL, "uniform"):
        yield f"Differences to `{control}`, seed by seed:\n"
        yield from _table(
            ["method", "mean over training", "better in", "sign test", "last 10 steps"], _paired(study, control)
        )
    yield "Reward when the KL first reaches a value (in how many runs it does):\n"
    yield from _table(
        ["method", *(f"{kl:g} nats" for kl in _EQUAL_KL)],
        ([method, *(_at_kl(by_seed, kl) for kl in _EQUAL_KL)] for method, by_seed in study.items()),
    )


def _paired(study: ByMethod, control: str) -> Iterator[list[str]]:
    for method, by_seed in study.items():
        seeds = sorted(by_seed.keys() & study.get(control, {}).keys())
        if method == control or not seeds:
            continue
        whole = [by_seed[seed].mean() - study[control][seed].mean() for seed in seeds]
        last = [by_seed[seed].last() - study[control][seed].last() for seed in seeds]
        wins = sum(difference > 0 for difference in whole)
        yield [method, interval(whole), f"{wins} of {len(seeds)}", f"{sign_test(whole):.3f}", interval(last)]


def _variant(name: str, study: ByMethod, main: ByMethod) -> Iterator[str]:
    changed = _changes(study, main)
    yield f"## {name}\n\nChanged: {changed}.\n"
    rows = []
    for method, by_seed in study.items():
        sparse = study.get(_CONTROL, {})
        before = main.get(method, {})
        own = [log.mean() for log in by_seed.values()]
        to_sparse = [log.mean() - sparse[seed].mean() for seed, log in by_seed.items() if seed in sparse]
        shared = [(log, before[seed]) for seed, log in by_seed.items() if seed in before]
        to_main = [log.mean() - other.mean(steps=len(log.columns["step"])) for log, other in shared]
        kl = f"{np.mean([log.last('kl') for log in by_seed.values()]):.1f}"
        explained = f"{np.mean([log.mean('explained') for log in by_seed.values()]):.2f}"
        less = "" if method == _CONTROL else interval(to_sparse)
        rows.append([method, str(len(own)), interval(own), less, interval(to_main), kl, explained])
    head = ["method", "seeds", "mean over training", "less sparse", "less the main study", "KL", "explained"]
    yield from _table(head, rows)


def _changes(study: ByMethod, main: ByMethod) -> str:
    here = next(iter(next(iter(study.values())).values())).settings
    there = next(iter(next(iter(main.values())).values())).settings if main else {}
    changes = [f"{name} = {json.dumps(value)}" for name, value in here.items() if there.get(name) != value]
    return ", ".join(changes) if main else "unknown, as there is no run of the main study"


def _tuning(studies: Mapping[str, ByMethod]) -> Iterator[str]:
    if not studies:
        return
    yield "## Tuning, on sparse alone\n"
    rows = []
    for study in studies.values():
        for method, by_seed in study.items():
            logs = list(by_seed.values())
            tuned = {name: logs[0].settings[name] for name in ("learning_rate", "kl", "critic_rate", "epochs")}
            said = ", ".join(f"{name} {value:g}" for name, value in tuned.items())
            kl = f"{np.mean([log.last('kl') for log in logs]):.1f}"
            distinct = f"{np.mean([log.last('distinct') for log in logs]):.3f}"
            mean, last = (interval(values) for values in ([g.mean() for g in logs], [g.last() for g in logs]))
            rows.append([method, said, str(len(logs[0].columns["step"])), str(len(logs)), mean, last, kl, distinct])
    head = ["method", "settings", "steps", "seeds", "mean over training", "last 10 steps", "KL", "distinct"]
    yield from _table(head, rows)


def _mean_curve(by_seed: Mapping[int, Log]) -> Numbers:
    curve: Numbers = np.stack([log.smooth("reward") for log in by_seed.values()]).mean(0)
    return curve


def _reached(curve: Numbers, best: float) -> str:
    passed = np.flatnonzero(curve >= best)
    return f"step {passed[0] + 1}" if len(passed) else "never"


def _at_kl(by_seed: Mapping[int, Log], kl: float) -> str:
    found = [reward for log in by_seed.values() if (reward := log.reward_at(kl)) is not None]
    return f"{interval(found)} ({len(found)})" if found else "(0)"


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    lines = [head, ["---"] * len(head), *rows]
    yield "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
