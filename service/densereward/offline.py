"""Files of samples and files of answers, for `densereward score`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import orjson
from pydantic import ValidationError

from densereward.errors import DenseRewardError, InvalidRequest
from densereward_client.wire import Sample

__all__ = ["ScoredLines", "count_samples", "read_samples", "write_parquet"]

_CHUNK = 256


def count_samples(path: Path) -> int:
    """Samples in a file of JSON lines; blank lines are none."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def read_samples(path: Path, skip: int) -> Iterator[list[Sample | DenseRewardError]]:
    """Samples in chunks, past the first `skip`; a line that is no sample becomes its error."""
    with path.open("rb") as file:
        lines = islice((line for line in file if line.strip()), skip, None)
        while chunk := list(islice(lines, _CHUNK)):
            yield [_sample(line) for line in chunk]


def _sample(line: bytes) -> Sample | DenseRewardError:
    try:
        return Sample.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"]))
        return InvalidRequest(f"{field}: {problem['msg']}" if field else problem["msg"])


class ScoredLines:
    """A file of answers that grows by whole lines, so that a run that was stopped can go on.

    Every line carries the fingerprint and the methods it was scored with.

    Args:
        path: the file, new or from an earlier run.
        fingerprint: of the model.
        methods: asked for by name; None for the default.

    Attributes:
        count: answers in the file.
        errors: how many of them are errors.

    Raises:
        InvalidRequest: the file holds answers of another model or other methods.
    """

    def __init__(self, path: Path, fingerprint: str, methods: list[str] | None) -> None:
        self._scored_with = {"fingerprint": fingerprint, "methods": methods}
        self._path = path
        self.count = 0
        self.errors = 0
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b")
        self._read_back()

    def _read_back(self) -> None:
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # torn by the end of the earlier run: written again
            answer = orjson.loads(line)
            if answer.get("scored_with") != self._scored_with:
                raise InvalidRequest(
                    f"{self._path} holds answers scored with {answer.get('scored_with')}, and this run has "
                    f"{self._scored_with}; remove the file, or write to another",
                    code="other_run",
                )
            end += len(line)
            self.count += 1
            self.errors += "error" in answer
        self._file.seek(end)
        self._file.truncate()

    def append(self, items: list[dict[str, Any]]) -> None:
        """Write the answers of a chunk; their index becomes the line's."""
        for item in items:
            line = item | {"index": self.count, "scored_with": self._scored_with}
            self._file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
            self.count += 1
            self.errors += "error" in item
        self._file.flush()

    def __enter__(self) -> ScoredLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_parquet(lines: Path, output: Path) -> None:
    """Turn a file of answers into a Parquet file: index, id, reward, warnings, error, and two columns per method.

    Args:
        lines: made by `ScoredLines`.
        output: written whole or not at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = _method_keys(lines)
    schema = pa.schema(
        [("index", pa.int64()), ("id", pa.string()), ("reward", pa.float64())]
        + [("warnings", pa.list_(pa.string())), ("error", pa.string())]
        + [(f"token_rewards.{key}", pa.list_(pa.float32())) for key in keys]
        + [(f"baseline.{key}", pa.float64()) for key in keys]
    )
    partial = output.with_name(output.name + ".partial")
    with lines.open("rb") as file, pq.ParquetWriter(partial, schema) as writer:
        while chunk := list(islice(file, _CHUNK)):
            rows = [_row(orjson.loads(line), keys) for line in chunk]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    partial.replace(output)


def _method_keys(lines: Path) -> list[str]:
    with lines.open("rb") as file:
        answers = (orjson.loads(line) for line in file)
        return next((list(answer["token_rewards"]) for answer in answers if "token_rewards" in answer), [])


def _row(answer: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    row = {name: answer.get(name) for name in ("index", "id", "reward", "warnings")}
    row["error"] = answer["error"]["message"] if "error" in answer else None
    for key in keys:
        row[f"token_rewards.{key}"] = answer.get("token_rewards", {}).get(key)
        row[f"baseline.{key}"] = answer.get("baseline", {}).get(key)
    return row
