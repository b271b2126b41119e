"""All groups of figures, by name. A new one is a function in `groups` and a line here."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.groups import engine, engines, gpu, growth, serving
from tests.benchmarks.harness import Group
from tests.benchmarks.work import Work

GROUPS: dict[str, Callable[[Work], Group]] = {
    "overhead": engine.overhead,
    "padded": engine.padded,
    "long": engine.long,
    "long-padded": engine.long_padded,
    "memory": growth.memory,
    "prefixes": engine.prefixes,
    "closed": engine.closed,
    "closed-long-prompt": engine.closed_long_prompt,
    "shared": engine.shared,
    "served": serving.served,
    "vllm": serving.vllm,
    "engines": engines.engines,
    "plain": serving.plain,
    "health": serving.health,
    "growth-tokens": growth.growth_length,
    "growth-batch": growth.growth_batch,
    "growth-group": growth.growth_group,
    "gpu": gpu.elsewhere,
}

ON_EMBEDDED = frozenset(["overhead", "padded", "long", "closed", "shared", "served", "engines"])
"""What is measured on the embedded model as well; the rest says the same there and takes long."""

ONLY_EMBEDDED = frozenset(["engines"])
"""What is measured on the embedded model alone."""
