"""`densereward score FILE.jsonl -o OUT`: the server's answers for a file of samples, without a server.

Every line of the file is a sample of POST /token_rewards. The output has a line (a row, if its name ends in
.parquet) per sample, in order. Stopped half-way, the same command goes on where it stopped; with another model or
other methods it refuses to mix the two.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from pydantic import AliasChoices, Field, FilePath, model_validator
from pydantic_settings import CliPositionalArg
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from densereward.commands import FLAGS
from densereward.commands.score_files import ScoredLines, count_samples, read_samples, write_parquet
from densereward.scoring.pipeline import answer_to
from densereward.server.service import Service
from densereward.settings import ModelSettings
from densereward_client.wire import MethodRequest, TokenRewardsRequest

__all__ = ["Score"]


class Score(ModelSettings, cli_prog_name="densereward score", **FLAGS):
    """Score a file of samples without a server. Run again, it goes on where it stopped."""

    file: CliPositionalArg[FilePath] = Field(description="JSON lines, a sample each, as in POST /token_rewards.")
    output: Path = Field(
        validation_alias=AliasChoices("o", "output"), description="OUT.jsonl or OUT.parquet: a sample each, in order."
    )
    methods: list[str] | None = Field(None, description="Methods by name; may be repeated.")

    @model_validator(mode="after")
    def _output_can_be_written(self) -> Score:
        """Found out before a model is loaded."""
        if len(self.model) > 1:
            raise ValueError("a file is scored by one model: give --model once")
        if not self.output.parent.is_dir():
            raise ValueError(f"there is no folder {self.output.parent}")
        if self.output.is_dir():
            raise ValueError(f"{self.output} is a folder")
        if self.output.exists() and self.output.samefile(self.file):
            raise ValueError(f"{self.output} is the file of samples")
        return self

    def cli_cmd(self) -> None:
        """Score; exits with 1 if a sample could not be scored, whose line then says why."""
        if failed := asyncio.run(self._score()):
            sys.exit(f"not scored: {failed} of the samples; `error` in {self.output} says why")

    async def _score(self) -> int:
        # No measured batch size: a run that goes on where it stopped must batch as before.
        service = Service(self.model_copy(update={"max_queue_tokens": sys.maxsize}), repeatable=True)
        await service.start()
        try:
            return await self._score_with(service)
        finally:
            await service.stop()

    async def _score_with(self, service: Service) -> int:
        parquet = self.output.suffix == ".parquet"
        path = self.output.with_name(self.output.name + ".lines") if parquet else self.output
        methods = None if self.methods is None else list[str | MethodRequest](self.methods)
        envelope = TokenRewardsRequest.model_construct(methods=methods, on_error="item", samples=[])
        scorer = service.pipeline_for(envelope)
        with ScoredLines(path, self.file, scorer.fingerprint, self.methods) as lines, _progress() as progress:
            task = progress.add_task("scoring", total=count_samples(self.file), completed=lines.count)
            for samples in read_samples(self.file, skip=lines.count):
                answer = await answer_to(scorer, envelope, samples)
                lines.append(answer["data"])
                progress.update(task, completed=lines.count)
        if parquet:
            write_parquet(path, self.output)
            path.unlink()
        return lines.errors


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns)
