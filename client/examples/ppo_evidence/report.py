"""Writes `evidence.md` and its plot from the logs of the runs that are finished, and says how many those are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .curves import Line, Panel, draw
from .intervals import half_width, interval, sign_test
from .logs import ByMethod, Log, read_logs
from .plan import Plan, is_tuning

__all__ = ["write_report"]

_FINDINGS = Path(__file__).parent / "FINDINGS.md"
_CONTROL = "sparse"
_EQUAL_KL = (2.0, 5.0, 10.0)  # nats per response
_SHARE = 0.9  # of the control's gain


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
    for name, study in studies.items():
        if name == "main" or is_tuning(name):
            continue
        if beside := plan.studies.get(name, {}).get("beside"):
            parts += _other_method(name, study, main or {}, beside)
        else:
            parts += _other_settings(name, study, main or {})
    parts += _tuning({name: study for name, study in studies.items() if is_tuning(name)}, main or {})
    output.mkdir(parents=True, exist_ok=True)
    (output / "evidence.md").write_text("\n".join(parts).rstrip() + "\n")


def _panels(study: ByMethod) -> list[Panel]:
    over_steps, over_kl = {}, {}
    for method, by_seed in study.items():
        rewards = np.stack([log.smooth("reward") for log in by_seed.values()])
        kl = np.stack([log.smooth("kl") for log in by_seed.values()]).mean(0)
        mean, name = rewards.mean(0), f"{method} ({len(rewards)})"
        over_steps[name] = Line(list(enumerate(mean.tolist())), half_width(rewards).tolist())
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
            ["method", "mean over training", "better in", "sign test", "last 10 steps"],
            _differences(study, study, control),
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
        (_other_changes(method, by_seed, sparse) for method, by_seed in study.items()),
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
    control, rows = _reached(sparse, level), []
    for method, by_seed in study.items():
        own = _reached(by_seed, level)
        differences = [own[seed] - control[seed] for seed in own.keys() & control.keys()]
        rows.append(
            [
                method,
                f"{len(own)} of {len(by_seed)}",
                interval(list(own.values()), 1),
                "" if method == _CONTROL else interval(differences, 1),
            ]
        )
    yield from _table(["method", "come there", "steps", "less sparse's, where both do"], rows)


def _reached(by_seed: Mapping[int, Log], level: float) -> dict[int, float]:
    """Steps until the reward is at `level`, of the seeds that reach it."""
    return {seed: steps for seed, log in by_seed.items() if (steps := log.reaches(level)) is not None}


def _other_changes(method: str, by_seed: Mapping[int, Log], sparse: Mapping[int, Log]) -> list[str]:
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


def _differences(study: ByMethod, controls: ByMethod, control: str) -> Iterator[list[str]]:
    """One row per method: its difference to a control, over the seeds and steps that both have."""
    for method, by_seed in study.items():
        seeds = sorted(by_seed.keys() & controls.get(control, {}).keys())
        if method == control or not seeds:
            continue
        pairs = [(by_seed[seed], controls[control][seed]) for seed in seeds]
        steps = min(len(log.columns["step"]) for pair in pairs for log in pair)
        means = [log.mean(steps=steps) - other.mean(steps=steps) for log, other in pairs]
        last = [log.last(steps=steps) - other.last(steps=steps) for log, other in pairs]
        wins = sum(difference > 0 for difference in means)
        yield [method, interval(means), f"{wins} of {len(seeds)}", f"{sign_test(means):.3f}", interval(last)]


def _other_method(name: str, study: ByMethod, main: ByMethod, others: Sequence[str]) -> Iterator[str]:
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
            ["method", "mean over training", "better in", "sign test", "last 10 steps"],
            _differences(study, main, other),
        )


def _other_settings(name: str, study: ByMethod, main: ByMethod) -> Iterator[str]:
    """A study with one setting changed, compared with the main study's methods over the same steps and seeds."""
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
    tuning, compared = _any(next(iter(studies.values()))).identity, _any(main).identity if main else {}
    if other := [name for name, value in compared.items() if tuning.get(name) != value]:
        yield f"Not of the studies above, or not recorded: its {', '.join(other)}.\n"
    rows = []
    for study in studies.values():
        for method, by_seed in study.items():
            logs = list(by_seed.values())
            tuned = {name: logs[0].settings[name] for name in ("learning_rate", "kl", "critic_rate", "epochs")}
            settings = ", ".join(f"{name} {value:g}" for name, value in tuned.items())
            kl = f"{np.mean([log.last('kl') for log in logs]):.1f}"
            distinct = f"{np.mean([log.last('distinct') for log in logs]):.3f}"
            mean, last = (interval(values) for values in ([log.mean() for log in logs], [log.last() for log in logs]))
            rows.append([method, settings, str(len(logs[0].columns["step"])), str(len(logs)), mean, last, kl, distinct])
    head = ["method", "settings", "steps", "seeds", "mean over training", "last 10 steps", "KL", "distinct"]
    yield from _table(head, rows)


def _at_kl(method: str, by_seed: Mapping[int, Log], sparse: Mapping[int, Log], kl: float) -> str:
    own = {seed: reward for seed, log in by_seed.items() if (reward := log.reward_at(kl)) is not None}
    if method == _CONTROL:
        return interval(list(own.values()))
    control = {seed: reward for seed, log in sparse.items() if (reward := log.reward_at(kl)) is not None}
    return interval([own[seed] - control[seed] for seed in sorted(own.keys() & control.keys())])


def _average(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}"


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    lines = [head, ["---"] * len(head), *rows]
    yield "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
