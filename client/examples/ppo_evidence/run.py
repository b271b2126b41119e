"""Runs of the plan, as PLAN.md tells: `python -m examples.ppo_evidence.run tune|runs|report|samples`.

One compact log a run, in a folder outside the repository; what is finished is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from densereward.default_model.build import load_tokenizer
from densereward_client import Client

from . import start
from .judge import READING, Judge, serving
from .policy import Policy
from .ppo import Moments, Settings, collect, train

__all__ = [
    "Place",
    "Plan",
    "Run",
    "execute",
    "is_finished",
    "log_path",
    "make_policy",
    "measure",
    "moments_of",
    "read_log",
    "refuse_other",
    "run_all",
]

PLAN = Path(__file__).parent / "plan.toml"
SPARSE = {"name": "sparse"}


@dataclass(frozen=True)
class Run:
    """One training: a method, a seed and hyperparameters."""

    study: str
    method: str
    request: Mapping[str, Any]
    seed: int
    steps: int
    settings: Settings


class Plan:
    """The plan file: hyperparameters, methods and which runs each study has."""

    def __init__(self, path: Path = PLAN) -> None:
        content = tomllib.loads(path.read_text())
        self.settings = Settings(**content["settings"])
        self.methods: dict[str, dict[str, Any]] = content["methods"]
        self.studies: dict[str, dict[str, Any]] = content["studies"]

    def runs(self, studies: Sequence[str]) -> list[Run]:
        """Runs of these studies; seeds outermost, so that an interrupted study has whole seeds."""
        return [run for name in studies for run in self._study(name)]

    def _study(self, name: str) -> Iterator[Run]:
        study = self.studies[name]
        settings = replace(self.settings, **study.get("settings", {}))
        for seed in study["seeds"]:
            for method in study["methods"]:
                yield Run(name, method, self.methods[method], seed, study["steps"], settings)


@dataclass(frozen=True)
class Place:
    """Where a run finds its policy and its server, and where its log goes.

    Attributes:
        model: The reward model's fingerprint.
        start: A hash of the start policy's files.
    """

    policy: Path
    logs: Path
    url: str
    moments: Moments
    model: str
    start: str
    device: str = "cpu"
    precision: str = "bfloat16"

    @property
    def scoring(self) -> dict[str, Any]:
        """What decides the start policy's scores, and with them the moments."""
        of_place = {name: getattr(self, name) for name in ("model", "start", "device", "precision")}
        return of_place | {"reading": READING}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a run's numbers besides the plan; it stands in every log's header."""
        return self.scoring | {"moments": asdict(self.moments)}


def log_path(logs: Path, run: Run) -> Path:
    """The file of a finished run."""
    return logs / run.study / f"{run.method.replace(' ', '-')}.{run.seed}.jsonl.gz"


def read_log(path: Path) -> list[dict[str, Any]]:
    """A run's header, then its steps."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def is_finished(run: Run, place: Place) -> bool:
    """Whether its log is there.

    Raises:
        ValueError: The log is of another run, as when the plan or the reward model was changed: old and new must not
            be mixed.
    """
    path = log_path(place.logs, run)
    if not path.is_file():
        return False
    refuse_other(path, read_log(path)[0], asdict(run) | place.identity)
    return True


def refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a file of other runs, by the names of what differs.

    Raises:
        ValueError: It is of other runs.
    """
    if different := [name for name, value in wanted.items() if name not in found or found[name] != value]:
        raise ValueError(f"{path} was made with another {', '.join(different)}; move it away")


def execute(run: Run, place: Place) -> float:
    """Train once and write the log, which appears under its name when it is whole. Returns the seconds it took."""
    begun, path = time.monotonic(), log_path(place.logs, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.manual_seed(run.seed)
    policy = make_policy(place)
    with Client(place.url, trust_env=False) as client, gzip.open(partial, "wt") as file:
        judge = Judge(client, policy.facts, run.request, fingerprint=place.model)
        print(json.dumps(asdict(run) | place.identity), file=file)
        for record in train(policy, judge, place.moments, run.settings, steps=run.steps, seed=run.seed):
            if record["step"] % 20 and record["step"] != run.steps - 1:
                del record["ids"]
            print(json.dumps(record), file=file, flush=True)
    partial.replace(path)
    return time.monotonic() - begun


def make_policy(place: Place) -> Policy:
    """A fresh policy at the start."""
    policy = Policy(*start.load(place.policy), precision=getattr(torch, place.precision))
    return policy.to(place.device)


def measure(place: Place, settings: Settings, batches: int = 32) -> Moments:
    """Mean and deviation of the start policy's scores."""
    policy, generator = make_policy(place), torch.Generator().manual_seed(999)
    with Client(place.url, trust_env=False) as client:
        judge = Judge(client, policy.facts, SPARSE, fingerprint=place.model)
        scores = [collect(policy, judge, place.moments, settings, generator).judged.scores for _ in range(batches)]
    return Moments(float(torch.cat(scores).mean()), float(torch.cat(scores).std()))


@contextmanager
def place_of(arguments: argparse.Namespace) -> Iterator[Place]:
    """Everything a run needs: the start policy, made on the first call, a server, and the scale of its scores."""
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "start"
    if not (policy / "start.json").is_file():
        start.teach(arguments.data, policy, arguments.teaching)
    with _server(arguments) as url:
        with Client(url, trust_env=False) as client:
            model = Judge(client, start.load(policy)[1], SPARSE).fingerprint()
        place = Place(
            policy,
            folder / "logs",
            url,
            Moments(0.0, 1.0),
            model,
            start.fingerprint(policy),
            arguments.device,
            arguments.precision,
        )
        yield replace(place, moments=moments_of(place, folder / "moments.json"))


def moments_of(place: Place, path: Path) -> Moments:
    """Measured once and kept in `path` with what they were measured with.

    Raises:
        ValueError: Those there were measured with something else.
    """
    if not path.is_file():
        path.write_text(json.dumps(asdict(measure(place, Plan().settings)) | place.scoring))
    kept = json.loads(path.read_text())
    refuse_other(path, kept, place.scoring)
    return Moments(kept["mean"], kept["deviation"])


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
    else:
        flags = {"model": arguments.model, "device": arguments.device, "dtype": arguments.precision}
        with serving(arguments.folder / "server.log", *(f"--{name}={value}" for name, value in flags.items())) as url:
            yield url


def run_all(runs: Sequence[Run], place: Place, workers: int) -> None:
    """Those that are not finished, so many at a time."""
    waiting = [run for run in runs if not is_finished(run, place)]
    print(f"{len(runs)} runs, {len(waiting)} to do, {workers} at a time", flush=True)
    # Started afresh, for a forked process would share the threads' state of torch.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(execute, run, place): run for run in waiting}
        for done, future in enumerate(as_completed(running), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)  # the others would fail alike
            run, seconds = running[future], future.result()
            last = read_log(log_path(place.logs, run))[1:][-10:]
            reward = sum(record["reward"] for record in last) / len(last)
            name = f"{run.study}, {run.method}, seed {run.seed}"
            print(f"{done}/{len(waiting)} {name}: {seconds:.0f} s, last steps {reward:+.3f}", flush=True)


def print_samples(logs: Path, studies: Sequence[str]) -> None:
    """What the policies wrote at the steps that keep it, to be read."""
    tokenizer = load_tokenizer()
    for path in sorted(path for name in studies for path in (logs / name).glob("*.jsonl.gz")):
        for record in read_log(path)[1:]:
            for ids in record.get("ids", []):
                print(f"{path.name}, step {record['step']}: {tokenizer.decode(ids)!r}")


def _one_thread() -> None:
    torch.set_num_threads(1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tune", "runs", "report", "samples"))
    parser.add_argument("--study", action="append", help="of plan.toml; `main` by default; repeat it for several")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the human labels")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "densereward" / "ppo_evidence")
    parser.add_argument("--teaching", type=int, default=276, help="steps that the start policy is taught, once")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--url", help="of a running server; by default one is started")
    parser.add_argument("--model", default="default", help="what the server that is started serves")
    parser.add_argument("--device", default="cpu", help="of the policy and the server: cpu or cuda")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, default=Path("service/docs"), help="where the report goes")
    arguments = parser.parse_args(argv)
    if arguments.what == "report":
        from .report import write_report

        write_report(arguments.folder / "logs", arguments.output)
        return
    if arguments.what == "samples":
        print_samples(arguments.folder / "logs", arguments.study or ["main"])
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _one_thread()
    plan = Plan()
    tuning = [name for name in plan.studies if name.startswith("tune")]
    names = arguments.study or (tuning if arguments.what == "tune" else ["main"])
    with place_of(arguments) as place:
        run_all(plan.runs(names), place, arguments.workers)


if __name__ == "__main__":
    main()
