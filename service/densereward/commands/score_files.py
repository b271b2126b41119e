"""Files of samples and files of answers, for `densereward score`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import orjson
from pydantic import ValidationError

from densereward.errors import DenseRewardError, InvalidRequest
from densereward.server.pydantic_errors import errors_in, invalid_request
from densereward_client.wire import Sample

__all__ = ["CHUNK", "ScoredLines", "count_samples", "read_samples", "write_parquet"]

CHUNK = 256
"""Samples that are scored together; the last digits of a number may depend on its batch."""

_FOREIGN = "remove the file, or write to another"


def count_samples(path: Path) -> int:
    """Samples in a file of JSON lines; blank lines are none."""
    return sum(1 for _ in _lines(path))


def read_samples(path: Path, skip: int) -> Iterator[list[Sample | DenseRewardError]]:
    """Samples in chunks, past the first `skip`; a line that is no sample becomes its error."""
    lines = islice(_lines(path), skip, None)
    while chunk := list(islice(lines, CHUNK)):
        yield [_sample(line) for line in chunk]


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from filter(None, map(bytes.strip, file))


def _sample(line: bytes) -> Sample | DenseRewardError:
    try:
        return Sample.model_validate_json(line)
    except ValidationError as error:
        errors = errors_in(error)
    return invalid_request(errors, sample=None if errors[0]["type"] == "json_invalid" else orjson.loads(line))


class ScoredLines:
    """A file of answers that grows by whole lines, so that a run that was stopped can go on.

    Every line says what it was scored with: the model's fingerprint, the methods, a hash of the sample's line.

    Args:
        path: the file, new or from an earlier run.
        samples: the file that is scored.
        fingerprint: of the model.
        methods: asked for by name; None for the default.

    Attributes:
        count: answers in the file.
        errors: how many of them are errors.

    Raises:
        InvalidRequest: the file holds anything but answers of this model and these methods to these samples.
    """

    def __init__(self, path: Path, samples: Path, fingerprint: str, methods: list[str] | None) -> None:
        self._path = path
        self._samples = samples
        self._run = {"fingerprint": fingerprint, "methods": methods}
        self.count, self.errors, end = self._read_back() if path.exists() else (0, 0, 0)
        self._scored_with = islice(self._each_scored_with(), self.count, None)
        self._file: IO[bytes] = path.open("ab")
        self._file.truncate(end)

    def _each_scored_with(self) -> Iterator[dict[str, Any]]:
        for line in _lines(self._samples):
            yield self._run | {"sample": hashlib.sha256(line).hexdigest()[:16]}

    def _read_back(self) -> tuple[int, int, int]:
        """Answers, errors and bytes to keep of an earlier run: its whole chunks, or all if it came to its end."""
        expected = self._each_scored_with()
        failed: list[bool] = []
        ends = [0]
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._check_torn(line, len(failed))
                    break
                failed.append("error" in self._own(line, len(failed), next(expected, None)))
                ends.append(ends[-1] + len(line))
        finished = next(expected, None) is None
        count = len(failed) if finished else len(failed) // CHUNK * CHUNK
        return count, sum(failed[:count]), ends[count]

    def _own(self, line: bytes, index: int, expected: dict[str, Any] | None) -> dict[str, Any]:
        try:
            answer = orjson.loads(line)
        except ValueError:
            answer = None
        found = answer.get("scored_with") if isinstance(answer, dict) else None
        if found is None or found != expected:
            raise InvalidRequest(
                f"line {index + 1} of {self._path} was scored with {found}, and this run has {expected}; {_FOREIGN}",
                code="other_run",
            )
        return dict(answer)

    def _check_torn(self, line: bytes, index: int) -> None:
        """A line without an end is written again, if it begins as it would here."""
        start = f'{{"index":{index},'.encode()
        if line[: len(start)] != start[: len(line)]:
            raise InvalidRequest(f"line {index + 1} of {self._path} is no answer; {_FOREIGN}", code="other_run")

    def append(self, items: list[dict[str, Any]]) -> None:
        """Write the answers of a chunk; their index becomes the line's."""
        for item in items:
            line = _moved(item, self.count) | {"scored_with": next(self._scored_with)}
            self._file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
            self.count += 1
            self.errors += "error" in item
        self._file.flush()

    def __enter__(self) -> ScoredLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _moved(item: dict[str, Any], index: int) -> dict[str, Any]:
    """An item of a chunk at its place in the file."""
    if "error" not in item:
        return item | {"index": index}
    error = item["error"]
    message = error["message"].removeprefix(f"samples[{item['index']}]: ")
    return item | {
        "index": index,
        "error": error | {"message": message, "details": error["details"] | {"index": index}},
    }


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
        while chunk := list(islice(file, CHUNK)):
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
