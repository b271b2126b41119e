"""Runs the plan of PLAN.md: `python -m examples.ppo_evidence.run tune|runs|report|samples`.

Each run writes one compressed log, in a folder outside the repository. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Iterator, Sequence
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
from .logs import log_path, read_log, refuse_other
from .plan import Plan, Run, is_tuning
from .policy import Policy
from .ppo import Moments, Settings, collect, train
from .report import write_report

__all__ = ["Setup", "execute", "is_finished", "make_policy", "measure", "moments_of", "run_all"]

SPARSE = {"name": "sparse"}


@dataclass(frozen=True)
class Setup:
    """Where a run finds its policy and its server, and where it writes its log.

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
        of_setup = {name: getattr(self, name) for name in ("model", "start", "device", "precision")}
        return of_setup | {"reading": READING}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a run's numbers besides the plan; every log's header has it."""
        return self.scoring | {"moments": asdict(self.moments)}


def is_finished(run: Run, setup: Setup) -> bool:
    """Whether its log is there.

    Raises:
        ValueError: The log is of another run, for example because the plan or the reward model was changed. Old and
            new runs must not be mixed.
    """
    path = log_path(setup.logs, run)
    if not path.is_file():
        return False
    refuse_other(path, read_log(path)[0], asdict(run) | setup.identity)
    return True


def execute(run: Run, setup: Setup) -> float:
    """Train once and write the log, which gets its final name only when complete. Returns the seconds it took."""
    started, path = time.monotonic(), log_path(setup.logs, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.manual_seed(run.seed)
    policy = make_policy(setup)
    with Client(setup.url, trust_env=False) as client, gzip.open(partial, "wt") as file:
        judge = Judge(client, policy.facts, run.request, fingerprint=setup.model)
        print(json.dumps(asdict(run) | setup.identity), file=file)
        for record in train(policy, judge, setup.moments, run.settings, steps=run.steps, seed=run.seed):
            if record["step"] % 20 and record["step"] != run.steps - 1:
                del record["ids"]
            print(json.dumps(record), file=file, flush=True)
    partial.replace(path)
    return time.monotonic() - started


def make_policy(setup: Setup) -> Policy:
    """A new policy, untrained: a copy of the start policy."""
    policy = Policy(*start.load(setup.policy), precision=getattr(torch, setup.precision))
    return policy.to(setup.device)


def measure(setup: Setup, settings: Settings, batches: int = 32) -> Moments:
    """Mean and standard deviation of the start policy's scores."""
    policy, generator = make_policy(setup), torch.Generator().manual_seed(999)
    with Client(setup.url, trust_env=False) as client:
        judge = Judge(client, policy.facts, SPARSE, fingerprint=setup.model)
        scores = [collect(policy, judge, setup.moments, settings, generator).judged.scores for _ in range(batches)]
    return Moments(float(torch.cat(scores).mean()), float(torch.cat(scores).std()))


@contextmanager
def prepare(arguments: argparse.Namespace) -> Iterator[Setup]:
    """Everything a run needs: the start policy (trained at the first call), a server, and the moments of its scores."""
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "start"
    if not (policy / "start.json").is_file():
        start.teach(arguments.data, policy, arguments.teaching)
    with _server(arguments) as url:
        with Client(url, trust_env=False) as client:
            model = Judge(client, start.load(policy)[1], SPARSE).fingerprint()
        setup = Setup(
            policy,
            folder / "logs",
            url,
            Moments(0.0, 1.0),
            model,
            start.fingerprint(policy),
            arguments.device,
            arguments.precision,
        )
        yield replace(setup, moments=moments_of(setup, folder / "moments.json"))


def moments_of(setup: Setup, path: Path) -> Moments:
    """The start policy's moments; measured once and kept in `path`, with what they were measured with.

    Raises:
        ValueError: The kept moments were measured with something else.
    """
    if not path.is_file():
        path.write_text(json.dumps(asdict(measure(setup, Plan().settings)) | setup.scoring))
    kept = json.loads(path.read_text())
    refuse_other(path, kept, setup.scoring)
    return Moments(kept["mean"], kept["deviation"])


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
    else:
        flags = {"model": arguments.model, "device": arguments.device, "dtype": arguments.precision}
        with serving(arguments.folder / "server.log", *(f"--{name}={value}" for name, value in flags.items())) as url:
            yield url


def run_all(runs: Sequence[Run], setup: Setup, workers: int) -> None:
    """Run those that are not finished, `workers` at a time."""
    unfinished = [run for run in runs if not is_finished(run, setup)]
    print(f"{len(runs)} runs, {len(unfinished)} to do, {workers} at a time", flush=True)
    # Spawned: a forked process would inherit the state of torch's threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(execute, run, setup): run for run in unfinished}
        for done, future in enumerate(as_completed(running), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)  # the others would fail in the same way
            run, seconds = running[future], future.result()
            last = read_log(log_path(setup.logs, run))[1:][-10:]
            reward = sum(record["reward"] for record in last) / len(last)
            name = f"{run.study}, {run.method}, seed {run.seed}"
            print(f"{done}/{len(unfinished)} {name}: {seconds:.0f} s, last steps {reward:+.3f}", flush=True)


def print_samples(logs: Path, studies: Sequence[str]) -> None:
    """Print what the policies wrote, at the steps whose texts are logged."""
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
        write_report(arguments.folder / "logs", arguments.output)
        return
    if arguments.what == "samples":
        print_samples(arguments.folder / "logs", arguments.study or ["main"])
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _one_thread()
    plan = Plan()
    tuning = [name for name in plan.studies if is_tuning(name)]
    names = arguments.study or (tuning if arguments.what == "tune" else ["main"])
    with prepare(arguments) as setup:
        run_all(plan.runs(names), setup, arguments.workers)


if __name__ == "__main__":
    main()
