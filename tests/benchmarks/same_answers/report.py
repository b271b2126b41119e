"""What was compared, as a page of text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from tests.benchmarks.same_answers.comparison import Tally

SHOWN = 5
NEVER_ANSWERED = {
    "adapter_mismatch": "ends the start",
    "cannot_pack": "ends the start",
    "client_gone": "nobody is left to read it",
    "engine_died": "vLLM's",
    "internal_error": "a fault",
    "model_error": "ends the start",
    "other_run": "of densereward score",
    "out_of_memory": "needs a full device",
    "pickle": "ends the start",
    "sum_mismatch": "a fault",
    "vllm_version": "ends the start",
}
"""Codes that no request gets here, and why."""


def codes_in(checkout: Path) -> set[str]:
    """Every error code that a checkout's service names."""
    sources = (file.read_text() for file in (checkout / "service" / "densereward").rglob("*.py"))
    return {code for source in sources for code in re.findall(r'\bcode(?:: ClassVar\[str\])? ?= ?"(\w+)"', source)}


def written(tally: Tally, codes: set[str]) -> str:
    """The page: counts, coverage, differences; `codes` are the errors that there are."""
    requests = sum(tally.requests.values())
    lines = [f"{requests:,} requests to each version; {tally.content:,} bytes of answers compared.", ""]
    lines += _by_kind(tally)
    lines += ["", f"Samples rewarded, by method: {_counted(tally.samples)}."]
    lines += ["", f"Errors, by code: {_counted(tally.codes)}."]
    unseen = sorted(codes - tally.codes.keys() - NEVER_ANSWERED.keys())
    lines += [
        f"Codes not seen: {', '.join(unseen) or 'none'}; not to be had by a request: {', '.join(NEVER_ANSWERED)}."
    ]
    lines += ["", f"Warnings, by code: {_counted(tally.warnings)}."]
    lines += ["", f"Reworded messages and descriptions (allowed): {len(tally.texts)}."]
    lines += [f"  {old}\n  -> {new}" for (old, new), _ in tally.texts.most_common(SHOWN)]
    lines += ["", f"Fingerprints that differ: {len(tally.fingerprints)}."]
    lines += [f"  {old} -> {new}, {count} times" for (old, new), count in tally.fingerprints.most_common(SHOWN)]
    lines += [f"Answers that differ: {len(tally.differences)}."]
    return "\n".join([*lines, *(f"  {each}" for each in tally.differences[:SHOWN])])


def _by_kind(tally: Tally) -> list[str]:
    """A line for each server and kind of request: how many, and their statuses."""
    rows: defaultdict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for (server, kind, status), count in tally.requests.items():
        rows[server, kind][status] += count
    width = max(len(kind) for _, kind in rows)
    return [
        f"{server:<14}{kind:<{width}}{statuses.total():>6}   "
        + ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        for (server, kind), statuses in rows.items()
    ]


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common()) or "none"
