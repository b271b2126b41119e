"""What is to be run: `plan.toml` as hyperparameters, methods and studies."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .ppo import Settings

__all__ = ["Plan", "Run", "is_tuning"]

_FILE = Path(__file__).parent / "plan.toml"


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
    """The plan file: hyperparameters, methods, and the runs of each study."""

    def __init__(self, path: Path = _FILE) -> None:
        content = tomllib.loads(path.read_text())
        self.settings = Settings(**content["settings"])
        self.methods: dict[str, dict[str, Any]] = content["methods"]
        self.studies: dict[str, dict[str, Any]] = content["studies"]

    def runs(self, studies: Sequence[str]) -> list[Run]:
        """The runs of these studies. Seeds are the outer loop, so an interrupted study has whole seeds."""
        return [run for name in studies for run in self._study(name)]

    def _study(self, name: str) -> Iterator[Run]:
        study = self.studies[name]
        settings = replace(self.settings, **study.get("settings", {}))
        for seed in study["seeds"]:
            for method in study["methods"]:
                yield Run(name, method, self.methods[method], seed, study["steps"], settings)


def is_tuning(study: str) -> bool:
    """Whether a study chose the hyperparameters; such a study is compared with no other."""
    return study.startswith("tune")
