"""From the logs to `evidence.md` and its plot; works on whatever is there and says how much that is."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .curves import Line, Panel, draw
from .run import Plan, Run, read_log, refuse_other

__all__ = ["Log", "interval", "read_logs", "sign_test", "student", "write_report"]

Numbers = NDArray[np.float64]
_FINDINGS = Path(__file__).parent / "FINDINGS.md"
_WINDOW, _EQUAL_KL, _CONTROL, _SHARE = 10, (2.0, 5.0, 10.0), "sparse", 0.9
_NO_COLUMNS, _OF_A_STUDY = ("ids", "warnings"), ("steps", "settings")


@dataclass(frozen=True)
class Log:
    """One finished run: its header, a column a quantity, and how often the judge warned."""

    head: Mapping[str, Any]
    columns: Mapping[str, Numbers]
    warnings: Mapping[str, int]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's hyperparameters."""
        settings: Mapping[str, Any] = self.head["settings"]
        return settings

    @property
    def identity(self) -> dict[str, Any]:
        """What else decided its numbers, and is the same for all runs that may be compared."""
        of_run = {field.name for field in fields(Run)}
        return {name: value for name, value in self.head.items() if name not in of_run}

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

    def first(self, name: str) -> float:
        """Over the first ten steps."""
        return float(np.mean(self.columns[name][:_WINDOW]))

    def last(self, name: str = "reward", steps: int | None = None) -> float:
        """Over the last ten steps, of the whole training or of its first steps."""
        return float(np.mean(self.columns[name][:steps][-_WINDOW:]))

    def reward_at(self, kl: float) -> float | None:
        """The smoothed reward when the smoothed KL first reaches this; None where it never does."""
        passed = np.flatnonzero(self.smooth("kl") >= kl)
        return float(self.smooth("reward")[passed[0]]) if len(passed) else None

    def reaches(self, reward: float) -> float | None:
        """How many steps it takes until the smoothed reward is this; None where it never is."""
        passed = np.flatnonzero(self.smooth("reward") >= reward)
        return float(passed[0] + 1) if len(passed) else None


ByMethod = dict[str, dict[int, Log]]


def read_logs(folder: Path) -> dict[str, ByMethod]:
    """Finished runs: study, method, seed; studies and methods in the plan's order.

    Raises:
        ValueError: Some were made with another plan, reward model or start than the others. Only the tuning may have
            been, as it is compared with nothing; the report says so.
    """
    logs: dict[str, ByMethod] = defaultdict(lambda: defaultdict(dict))
    same: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.jsonl.gz")):
        head, *steps = read_log(path)
        columns = {
            name: np.array([step[name] for step in steps], dtype=float) for name in steps[0] if name not in _NO_COLUMNS
        }
        warnings: Counter[str] = Counter()
        for step in steps:
            warnings.update(step.get("warnings", {}))
        log, kind = Log(head, columns, warnings), "tune" if _is_tuning(head["study"]) else "studies"
        identity = same.setdefault((kind,), log.identity)
        refuse_other(path, head, dict.fromkeys(log.identity) | identity)  # what the first does not say differs too
        refuse_other(path, head, same.setdefault((kind, head["study"]), {key: head[key] for key in _OF_A_STUDY}))
        refuse_other(path, head, same.setdefault((kind, "", head["method"]), {"request": head["request"]}))
        logs[head["study"]][head["method"]][head["seed"]] = log
    plan = Plan()
    return {
        study: {method: logs[study][method] for method in plan.methods if method in logs[study]}
        for study in sorted(logs, key=[*plan.studies, *logs].index)
    }


def _is_tuning(study: str) -> bool:
    return study.startswith("tune")


def student(degrees: int) -> float:
    """Student's t that holds 95 %, two-sided; to .2 % (Abramowitz and Stegun 26.7.5 from three degrees on)."""
    if degrees < 3:
        return (12.706, 4.303)[degrees - 1]
    x = 1.959964
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / math.pow(degrees, power) for power, term in enumerate(terms))


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean and 95 % interval by Student's t, where there are enough values to tell, and how many there are."""
    count = len(values)
    mean = f"{np.mean(values):+.{digits}f} " if count else ""
    error = f"± {_half_width(np.array(values)[:, None])[0]:.{digits}f} " if count > 1 else ""
    return f"{mean}{error}({count})"


def _half_width(rows: Numbers) -> Numbers:
    """Of the 95 % interval of the mean over rows; 0 of a single one."""
    count = len(rows)
    half: Numbers = np.zeros(rows.shape[1])
    return half if count < 2 else student(count - 1) * rows.std(0, ddof=1) / math.sqrt(count)


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
    plan = Plan()
    others = [name for name in studies if name != "main" and not _is_tuning(name)]
    for name in others:
        beside = plan.studies.get(name, {}).get("beside")
        parts += (
            _beside(name, studies[name], main or {}, beside) if beside else _variant(name, studies[name], main or {})
        )
    parts += _tuning({name: study for name, study in studies.items() if _is_tuning(name)}, main or {})
    output.mkdir(parents=True, exist_ok=True)
    (output / "evidence.md").write_text("\n".join(parts).rstrip() + "\n")


def _panels(study: ByMethod) -> list[Panel]:
    over_steps, over_kl = {}, {}
    for method, by_seed in study.items():
        rewards = np.stack([log.smooth("reward") for log in by_seed.values()])
        kl = np.stack([log.smooth("kl") for log in by_seed.values()]).mean(0)
        mean, name = rewards.mean(0), f"{method} ({len(rewards)})"
        over_steps[name] = Line(list(enumerate(mean.tolist())), _half_width(rewards).tolist())
        over_kl[name] = Line(list(zip(kl.tolist(), mean.tolist(), strict=True)))
    return [
        Panel("Reward, mean of the seeds and its 95 % interval", "step", over_steps),
        Panel("Reward beside the distance paid for it", "KL to the reference, nats a response", over_kl),
    ]


def _main(study: ByMethod) -> Iterator[str]:
    counts = ", ".join(f"{method} {len(by_seed)}" for method, by_seed in study.items())
    yield (
        f"Finished runs: {counts}. Raw rewards of the judge; ± is a 95 % interval by Student's t over seeds, and "
        "behind each figure stands how many seeds it has.\n"
    )
    sparse = study.get(_CONTROL, {})
    head = ["method", "seeds", "mean over training", "last 10 steps", "spread of these"]
    yield from _table(
        [*head, "KL", "distinct", "explained"],
        (
            [
                method,
                str(len(by_seed)),
                interval([log.mean() for log in by_seed.values()]),
                interval([log.last() for log in by_seed.values()]),
                f"{np.std([log.last() for log in by_seed.values()], ddof=min(1, len(by_seed) - 1)):.3f}",
                *(_average([log.last(name) for log in by_seed.values()]) for name in ("kl", "distinct")),
                _average([log.mean("explained") for log in by_seed.values()]),
            ]
            for method, by_seed in study.items()
        ),
    )
    yield "Spread: standard deviation over seeds. KL (nats a response) and distinct pairs of tokens: last 10 steps.\n"
    for control in (_CONTROL, "uniform"):
        yield f"Differences to `{control}`, seed by seed:\n"
        yield from _table(
            ["method", "mean over training", "better in", "sign test", "last 10 steps"], _paired(study, study, control)
        )
    if sparse:
        yield from _steps_taken(study, sparse)
    yield "Reward when the KL first reaches a value; below `sparse`, less `sparse`'s, over the seeds where both do:\n"
    yield from _table(
        ["method", *(f"{kl:g} nats" for kl in _EQUAL_KL)],
        ([method, *(_at_kl(method, by_seed, sparse, kl) for kl in _EQUAL_KL)] for method, by_seed in study.items()),
    )
    yield (
        "What changed besides, from the first ten steps to the last ten, and less `sparse`'s in these; what the token "
        "rewards pay of R; warnings:\n"
    )
    yield from _table(
        ["method", "seeds", "tokens", "less sparse's", "finished texts", "less sparse's", "paid", "warnings"],
        (_besides(method, by_seed, sparse) for method, by_seed in study.items()),
    )
    yield "Paid: slope of the sums of the token rewards on R, mean over training; the rest is the baseline's.\n"


def _steps_taken(study: ByMethod, sparse: Mapping[int, Log]) -> Iterator[str]:
    start = next(iter(sparse.values())).identity["moments"]["mean"]
    final = float(np.mean([log.last() for log in sparse.values()]))
    level = start + _SHARE * (final - start)
    yield (
        f"Steps until the reward, mean of ten steps, is {level:.2f}: {_SHARE:.0%} of the way from the start policy's "
        f"to that of `sparse` in its last ten steps ({len(sparse)} seeds). Only seeds that come there are counted:\n"
    )
    rows = []
    for method, by_seed in study.items():
        taken = {seed: steps for seed, log in by_seed.items() if (steps := log.reaches(level)) is not None}
        theirs = {seed: steps for seed, log in sparse.items() if (steps := log.reaches(level)) is not None}
        less = [taken[seed] - theirs[seed] for seed in taken.keys() & theirs.keys()]
        rows.append(
            [
                method,
                f"{len(taken)} of {len(by_seed)}",
                interval(list(taken.values()), 1),
                "" if method == _CONTROL else interval(less, 1),
            ]
        )
    yield from _table(["method", "come there", "steps", "less sparse's, where both do"], rows)


def _besides(method: str, by_seed: Mapping[int, Log], sparse: Mapping[int, Log]) -> list[str]:
    logs = list(by_seed.values())
    pairs = [(by_seed[seed], sparse[seed]) for seed in by_seed.keys() & sparse.keys()]
    warnings = sum((Counter(log.warnings) for log in logs), Counter())
    cells = [method, str(len(logs))]
    for name in ("length", "finished"):
        cells.append(f"{_average([log.first(name) for log in logs])} to {_average([log.last(name) for log in logs])}")
        cells.append(
            "" if method == _CONTROL else interval([log.last(name) - other.last(name) for log, other in pairs])
        )
    counts = ", ".join(f"{name} {count}" for name, count in sorted(warnings.items()))
    return [*cells, _average([log.mean("paid") for log in logs]), counts or "none"]


def _paired(study: ByMethod, controls: ByMethod, control: str) -> Iterator[list[str]]:
    """Methods less a control, over the seeds and the steps that both have."""
    for method, by_seed in study.items():
        seeds = sorted(by_seed.keys() & controls.get(control, {}).keys())
        if method == control or not seeds:
            continue
        pairs = [(by_seed[seed], controls[control][seed]) for seed in seeds]
        steps = min(len(log.columns["step"]) for pair in pairs for log in pair)
        whole = [log.mean(steps=steps) - other.mean(steps=steps) for log, other in pairs]
        last = [log.last(steps=steps) - other.last(steps=steps) for log, other in pairs]
        wins = sum(difference > 0 for difference in whole)
        yield [method, interval(whole), f"{wins} of {len(seeds)}", f"{sign_test(whole):.3f}", interval(last)]


def _beside(name: str, study: ByMethod, main: ByMethod, others: Sequence[str]) -> Iterator[str]:
    """A study of another method, compared with methods of the main study over the same steps and seeds."""
    steps = max(len(log.columns["step"]) for by_seed in study.values() for log in by_seed.values())
    changed = _changes(study, main)
    yield f"## {name}\n\nBeside the first {steps} steps of the same seeds in the main study. Changed: {changed}.\n"
    yield from _table(
        ["method", "seeds", "mean over training", "last 10 steps", "KL"],
        (
            [
                method,
                str(len(by_seed)),
                interval([log.mean(steps=steps) for log in by_seed.values()]),
                interval([log.last(steps=steps) for log in by_seed.values()]),
                _average([log.last("kl", steps) for log in by_seed.values()]),
            ]
            for method, by_seed in [*study.items(), *((other, main[other]) for other in others if other in main)]
        ),
    )
    for other in others:
        yield f"Differences to `{other}` of the main study, seed by seed:\n"
        yield from _table(
            ["method", "mean over training", "better in", "sign test", "last 10 steps"], _paired(study, main, other)
        )


def _variant(name: str, study: ByMethod, main: ByMethod) -> Iterator[str]:
    """A study of one change, compared with the same methods of the main study over the same steps and seeds."""
    yield f"## {name}\n\nChanged: {_changes(study, main)}.\n"
    sparse, sparse_before, rows = study.get(_CONTROL, {}), main.get(_CONTROL, {}), []
    for method, by_seed in study.items():
        before = main.get(method, {})
        to_sparse = {seed: log.mean() - sparse[seed].mean() for seed, log in by_seed.items() if seed in sparse}
        to_main = {
            seed: log.mean() - before[seed].mean(steps=len(log.columns["step"]))
            for seed, log in by_seed.items()
            if seed in before
        }
        sparse_to_main = {
            seed: log.mean() - sparse_before[seed].mean(steps=len(log.columns["step"]))
            for seed, log in sparse.items()
            if seed in sparse_before
        }
        gained = [to_main[seed] - sparse_to_main[seed] for seed in to_main.keys() & sparse_to_main.keys()]
        rows.append(
            [
                method,
                interval([log.mean() for log in by_seed.values()]),
                "" if method == _CONTROL else interval(list(to_sparse.values())),
                interval(list(to_main.values())),
                "" if method == _CONTROL else interval(gained),
                *(_average([log.last(name) for log in by_seed.values()]) for name in ("kl", "length")),
                _average([log.mean("explained") for log in by_seed.values()]),
            ]
        )
    head = ["method", "mean over training", "less sparse", "less the main study", "change of less sparse"]
    yield from _table([*head, "KL", "tokens", "explained"], rows)


def _changes(study: ByMethod, main: ByMethod) -> str:
    if not main:
        return "unknown, as there is no run of the main study"
    here, there = _any(study).settings, _any(main).settings
    changes = [f"{name} = {json.dumps(value)}" for name, value in here.items() if there.get(name) != value]
    return ", ".join(changes) or "nothing but the method"


def _any(study: ByMethod) -> Log:
    return next(iter(next(iter(study.values())).values()))


def _tuning(studies: Mapping[str, ByMethod], main: ByMethod) -> Iterator[str]:
    if not studies:
        return
    yield "## Tuning, on sparse alone\n"
    then, now = (_any(next(iter(studies.values()))).identity, _any(main).identity if main else {})
    if other := [name for name, value in now.items() if then.get(name) != value]:
        yield f"Not of the studies above, or not recorded: its {', '.join(other)}.\n"
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


def _at_kl(method: str, by_seed: Mapping[int, Log], sparse: Mapping[int, Log], kl: float) -> str:
    own = {seed: reward for seed, log in by_seed.items() if (reward := log.reward_at(kl)) is not None}
    if method == _CONTROL:
        return interval(list(own.values()))
    theirs = {seed: reward for seed, log in sparse.items() if (reward := log.reward_at(kl)) is not None}
    return interval([own[seed] - theirs[seed] for seed in sorted(own.keys() & theirs.keys())])


def _average(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}"


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    lines = [head, ["---"] * len(head), *rows]
    yield "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
