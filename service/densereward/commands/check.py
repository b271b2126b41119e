"""`densereward check`: would this model's numbers be wrong? The checks that `serve` makes at its start, and some more.

Exits with 1 where the model would not be served.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.markup import escape

from densereward.checks.examine import Finding, compare_engines, dtype_drift, examine
from densereward.checks.loading import load_unchecked
from densereward.checks.precision import finding_of, measure_precision
from densereward.commands import FLAGS
from densereward.engines.base import Engine, StreamingEngine
from densereward.engines.torch.adapters import base_of
from densereward.engines.torch.weights import stored_in_float32
from densereward.errors import ModelError
from densereward.scheduling.batch_size import measure_batch_size
from densereward.settings import ModelSettings

__all__ = ["Check"]

_MARKS = {
    "ok": "[green]ok[/]",
    "warning": "[yellow]warning[/]",
    "allowed": "[yellow]allowed[/]",
    "fail": "[red]FAIL[/]",
}


class Check(ModelSettings, cli_prog_name="densereward check", **FLAGS):
    """Check a model before it is served: weights, tokenizer, template, numbers, speed."""

    checked: CliPositionalArg[str | None] = Field(None, description="The model; wins over --model and the environment.")
    json_: bool = Field(False, alias="json", description="One JSON object instead of text.")

    @model_validator(mode="after")
    def _one_model(self) -> Check:
        if len(self.model) > 1 or self.pair is not None:
            raise ValueError("models are checked one by one: give one")
        if self.checked is not None:
            self.model = [self.checked]
        return self

    def cli_cmd(self) -> None:
        """Check, print, and exit with 1 if the model would not be served."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        findings = list(self._findings() if self.json_ else map(_print, self._findings()))
        failed = [each.name for each in findings if each.status == "fail"]
        if self.json_:
            source = next(iter(self.sources.values()))
            report = {"model": source, "served": not failed, "findings": [asdict(each) for each in findings]}
            print(json.dumps(report, ensure_ascii=False, indent=1))  # noqa: T201
        if failed:
            sys.exit(1)

    def _rounds(self) -> bool:
        """Whether weights are rounded to half precision while they are loaded; an adapter's are, once it is merged."""
        source = next(iter(self.sources.values()))
        if source == "default" or base_of(source, self.revision) != source:
            return True
        return stored_in_float32(source, self.revision)

    def _findings(self) -> Iterator[Finding]:
        try:
            engine, aligner = load_unchecked(self)
        except ModelError as error:
            yield Finding(error.error_code, "fail", error.message)
            return
        yield from examine(engine, aligner, self.allow)
        if isinstance(engine, StreamingEngine):
            alike = {"engine": "torch", "engine_arguments": {}, "device": "cpu", "dtype": "float32"}
            finding = _compared_with_torch(engine, self.model_copy(update=alike))
            yield finding if finding.name not in self.allow else replace(finding, status="allowed")
        elif engine.facts.dtype != "float32" and self._rounds():
            exact, _ = load_unchecked(self.model_copy(update={"dtype": "float32"}))
            finding = dtype_drift(engine, exact)
            exact.close()
            yield finding if finding.name not in self.allow else replace(finding, status="allowed")
        yield finding_of(measure_precision(engine, aligner))
        yield _speed(engine)
        yield _memory(engine)
        engine.close()


def _compared_with_torch(engine: Engine, settings: ModelSettings) -> Finding:
    """How far an engine is from the torch engine, where that can load the model."""
    try:
        exact, _ = load_unchecked(settings)
    except ModelError as error:
        return Finding("parity", "warning", f"it cannot be compared with the torch engine: {error.message}")
    finding = compare_engines(engine, exact)
    exact.close()
    return finding


def _speed(engine: Engine) -> Finding:
    """What a pass holds, as the server would measure it."""
    if isinstance(engine, StreamingEngine):
        return Finding("speed", "ok", f"a pass holds up to {engine.facts.batch_tokens} tokens, as the engine decides")
    started = time.perf_counter()
    batch_tokens = measure_batch_size(engine)
    seconds = time.perf_counter() - started
    return Finding(
        "speed", "ok", f"a pass holds {batch_tokens} tokens on {engine.facts.device}, measured in {seconds:.1f} s"
    )


def _memory(engine: Engine) -> Finding:
    """What the weights take, and the most that was taken while all of this ran."""
    import torch

    if isinstance(engine, StreamingEngine):
        return Finding(
            "memory", "ok", f"the weights take {_amount(engine.facts.weights_bytes)}; the engine's log has more"
        )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = f"the weights take {_amount(engine.facts.weights_bytes)}, this process took at most {_amount(most)}"
    if torch.cuda.is_available():
        text += f", on the GPU {_amount(torch.cuda.max_memory_allocated())}"
    return Finding("memory", "ok", f"{text}; cached prompts come on top (--prompt-cache-bytes)")


def _amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _print(finding: Finding) -> Finding:
    Console(highlight=False, soft_wrap=True).print(
        f"{_MARKS[finding.status]:<24} {finding.name:<16} {escape(finding.text)}"
    )
    return finding
