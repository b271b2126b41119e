"""`python -m tests.benchmarks.same_answers --old FOLDER --new FOLDER`: do two checkouts give the same answers?

Both run in this interpreter, serve the same small random models, and get the same requests, one at a time, so that
equal requests run in equal batches. Ids and times are left out. Messages and descriptions may be reworded; the report
shows where. All else must be the same to the byte.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random

import httpx
import torch
from transformers.utils import logging

from serving import PATIENCE, Server, environment
from tests.benchmarks.same_answers import refusals
from tests.benchmarks.same_answers.comparison import Answer, Tally
from tests.benchmarks.same_answers.lifecycle import from_start_to_end, send
from tests.benchmarks.same_answers.models import KEY, SETUPS, Target
from tests.benchmarks.same_answers.report import codes_in, written
from tests.benchmarks.same_answers.traffic import Request, Traffic

Start = Callable[[], Server]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags, compare, and exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.same_answers", description=__doc__)
    parser.add_argument("--old", type=Path, required=True, help="a checkout of this repository")
    parser.add_argument("--new", type=Path, default=Path(), help="another one (default: the current folder)")
    parser.add_argument("--requests", type=int, default=1000, help="how many each of them gets (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--only", nargs="+", choices=SETUPS, default=list(SETUPS), help="these servers")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    checkouts = (given.old.resolve(), given.new.resolve())
    for checkout in checkouts:
        _check(checkout)
    tally = Tally()
    for name in given.only:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            _compare(name, checkouts, Path(scratch), given.requests, given.seed, tally)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(written(tally, codes_in(checkouts[1])))
    sys.exit(0 if tally.same else 1)


def _variables(checkout: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{checkout / 'service'}:{checkout / 'client'}", "PYTHONDONTWRITEBYTECODE": "1"}


def _check(checkout: Path) -> None:
    """Make sure that a checkout is what its server will import; else one version would be compared with itself."""
    code = "import densereward, densereward_client as client; print(densereward.__file__, client.__file__)"
    variables = environment(**_variables(checkout))
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    if found.returncode or not all(Path(file).is_relative_to(checkout) for file in found.stdout.split()):
        sys.exit(f"{checkout} is not what Python imports: {found.stdout}{found.stderr}")


def _compare(name: str, checkouts: tuple[Path, Path], scratch: Path, requests: int, seed: int, tally: Tally) -> None:
    """Start one server of a kind from each checkout, and ask both the same."""
    setup = SETUPS[name]
    flags, targets = setup.make(scratch)
    starts = [
        partial(Server, scratch / f"{number}.log", *flags, fresh=True, **setup.variables | _variables(checkout))
        for number, checkout in enumerate(checkouts)
    ]
    answered = _together(starts, _requests(name, targets, requests, seed)) if targets else _in_turn(starts)
    for request, old, new in answered:
        tally.add(name, request.kind, str(request), (old, new))


def _together(starts: Sequence[Start], requests: Iterable[Request]) -> Iterator[tuple[Request, Answer, Answer]]:
    """Both servers run at once, and get the same requests in the same order."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        servers = [start() for start in starts]
        for server in servers:
            stack.callback(server.stop)
        clients = [stack.enter_context(client) for client in pool.map(_client, servers)]
        for request in requests:
            old, new = pool.map(send, clients, (request, request))
            yield request, old, new


def _in_turn(starts: Sequence[Start]) -> Iterator[tuple[Request, Answer, Answer]]:
    """One server after the other, from start to end, so that neither slows the other down."""
    answers = []
    for start in starts:
        server = start()
        try:
            answers.append(from_start_to_end(server))
        finally:
            server.stop()
    for (request, old), (_, new) in zip(*answers, strict=True):
        yield request, old, new


def _client(server: Server) -> httpx.Client:
    """A client of a server that is ready."""
    try:
        server.wait_until_ready()
    except httpx.TransportError as error:  # a model that fails its checks ends the server
        raise RuntimeError(f"the server ended: {server.log[server.log.find('ERROR') :]}") from error
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE, trust_env=False)


def _requests(name: str, targets: Sequence[Target], requests: int, seed: int) -> Iterator[Request]:
    """What a server is asked: first what it refuses, then at random of all that it serves."""
    refused = list(refusals.requests(name))
    yield from refused
    random = Random(f"{seed} {name}")
    traffic = [Traffic(random, target) for target in targets]
    for number in range(round(requests * SETUPS[name].share) - len(refused)):
        yield traffic[number % len(traffic)].request()


if __name__ == "__main__":
    main()
