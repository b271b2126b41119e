"""`densereward score`: a file of samples in, a file of answers out, whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from densereward.methods import METHODS
from serving import Json, Run, command

SAMPLES = [
    {"id": f"s{number}", "prompt": f"Question {number}? ", "response": "lazy dog " * (1 + number * 7 % 13)}
    for number in range(300)
]
CHUNK = 256


def write(path: Path, samples: list[Any]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def read(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("samples") / "samples.jsonl", SAMPLES)


@pytest.fixture(scope="module")
def uncut(samples: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of one process that was not disturbed."""
    output = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    ended = command("score", str(samples), "-o", str(output), "--model", str(tiny_llama), fresh=True)
    assert ended.returncode == 0, ended.stderr
    assert "300/300" in ended.stdout
    assert "Traceback" not in ended.stderr
    return output


def test_every_sample_gets_a_line_in_order(uncut: Path) -> None:
    answers = read(uncut)
    assert [(answer["index"], answer["id"]) for answer in answers] == [(n, f"s{n}") for n in range(300)]
    for answer in answers:
        assert answer.keys() == {"index", "id", "reward", "warnings", "token_rewards", "baseline", "scored_with"}
        assert answer["scored_with"].keys() == {"fingerprint", "methods", "sample"}
        total = sum(answer["token_rewards"]["red"]) + answer["baseline"]["red"]
        assert total == pytest.approx(answer["reward"], abs=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 5000, 40_000, -2, -1], ids=lambda cut: f"cut at {cut}")
def test_a_run_that_was_cut_ends_with_the_same_bytes(
    run: Run, samples: Path, uncut: Path, tiny_llama: Path, tmp_path: Path, cut: int
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_bytes(uncut.read_bytes()[:cut])
    assert run("score", samples, "--output", output, "--model", tiny_llama).status == 0
    assert output.read_bytes() == uncut.read_bytes()


@pytest.mark.parametrize("lines", [1, 100, CHUNK, CHUNK + 20])
def test_a_run_that_was_cut_between_lines_ends_with_the_same_bytes(
    run: Run, samples: Path, uncut: Path, tiny_llama: Path, tmp_path: Path, lines: int
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_bytes(b"".join(uncut.read_bytes().splitlines(keepends=True)[:lines]))
    assert run("score", samples, "-o", output, "--model", tiny_llama).status == 0
    assert output.read_bytes() == uncut.read_bytes()


def test_a_finished_run_is_left_alone(run: Run, samples: Path, uncut: Path, tiny_llama: Path) -> None:
    before = uncut.read_bytes()
    ended = run("score", samples, "-o", uncut, "--model", tiny_llama)
    assert ended.status == 0
    assert "300/300" in ended.out
    assert uncut.read_bytes() == before


def test_samples_that_were_added_are_scored(
    run: Run, samples: Path, uncut: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    file, output = tmp_path / "samples.jsonl", tmp_path / "answers.jsonl"
    write(file, SAMPLES[:10])
    assert run("score", file, "-o", output, "--model", tiny_llama).status == 0
    file.write_bytes(samples.read_bytes())
    assert run("score", file, "-o", output, "--model", tiny_llama).status == 0
    assert output.read_bytes() == uncut.read_bytes()


def test_answers_of_other_methods_another_model_or_other_samples_are_not_mixed_in(
    run: Run, samples: Path, uncut: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    import tiny

    other_model = tiny.save(tmp_path / "model", seed=1)
    other_samples = write(tmp_path / "other.jsonl", SAMPLES[1:])
    fewer_samples = write(tmp_path / "fewer.jsonl", SAMPLES[:299])
    before = uncut.read_bytes()
    for file, model, more in (
        (samples, tiny_llama, ["--methods", "abc"]),
        (samples, other_model, []),
        (other_samples, tiny_llama, []),
        (fewer_samples, tiny_llama, []),
    ):
        ended = run("score", file, "-o", uncut, "--model", model, *more)
        assert ended.status == 1
        assert f"of {uncut} was scored with " in ended.err
        assert ended.err.endswith("; remove the file, or write to another\n")
        assert uncut.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["my notes", "my notes\nin two lines\n", "{}\n", "[]\n", '{"index":0}\n', '{"index":1,']
)
def test_a_file_of_something_else_is_never_written_to(
    run: Run, samples: Path, tiny_llama: Path, tmp_path: Path, text: str
) -> None:
    output = tmp_path / "notes.txt"
    output.write_text(text)
    ended = run("score", samples, "-o", output, "--model", tiny_llama)
    assert ended.status == 1
    assert ended.err.endswith("; remove the file, or write to another\n")
    assert output.read_text() == text


BAD = {
    "misspelt": ('{"id": "x", "prompt": "q", "respnse": "a"}', "respnse: Extra inputs are not permitted", "x"),
    "no JSON": ("hello", "Invalid JSON: expected value at line 1 column 1", None),
    "cut JSON": ('{"id": "x", "prompt": ', "Invalid JSON: EOF while parsing a value at line 1 column 21", None),
    "a lone surrogate": (
        r'{"prompt": "q", "response": "\ud800"}',
        "Invalid JSON: unexpected end of hex escape at line 1 column 36",
        None,
    ),
    "no object": ("[1]", "Input should be an object", None),
    "a mask too short": (
        '{"id": "x", "prompt": "q", "response_token_ids": [1, 2], "response_mask": [1]}',
        "response_mask has 1 entries for 2 the response's tokens",
        "x",
    ),
}


def test_a_bad_line_becomes_an_error_line_with_its_own_number(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    good = [json.dumps(sample) for sample in SAMPLES[:260]]
    lines = [*good[:3], BAD["no JSON"][0], "", "  ", *good[3:], *(line for line, _, _ in BAD.values()), good[0]]
    file, output = tmp_path / "samples.jsonl", tmp_path / "answers.jsonl"
    file.write_text("\r\n".join(lines))
    ended = run("score", file, "-o", output, "--model", tiny_llama)
    assert ended.status == 1
    assert ended.err.endswith(f"not scored: 7 of the samples; `error` in {output} says why")
    answers = read(output)
    assert [answer["index"] for answer in answers] == list(range(268))
    failed = {answer["index"]: answer for answer in answers if "error" in answer}
    assert list(failed) == [3, *range(261, 267)]
    for index, (_, message, identity) in zip(range(261, 267), BAD.values(), strict=True):
        assert failed[index]["error"]["message"].startswith(message)
        assert failed[index]["error"]["details"]["index"] == index
        assert failed[index]["id"] == identity
    assert answers[-1]["id"] == "s0"
    assert run("score", file, "-o", output, "--model", tiny_llama).status == 1


def test_a_parquet_file_holds_the_same_answers(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "samples.jsonl", [*SAMPLES[:4], {"prompt": "q"}, SAMPLES[4] | {"response": ""}])
    arguments = ("score", file, "--model", tiny_llama, "--methods", "red", "--methods", "uniform", "-o")
    assert run(*arguments, tmp_path / "out.jsonl").status == run(*arguments, tmp_path / "out.parquet").status == 1
    table = pq.read_table(tmp_path / "out.parquet")
    floats = pa.list_(pa.field("element", pa.float32()))
    assert {name: table.schema.field(name).type for name in table.schema.names} == {
        "index": pa.int64(),
        "id": pa.string(),
        "reward": pa.float64(),
        "warnings": pa.list_(pa.field("element", pa.string())),
        "error": pa.string(),
        "token_rewards.red": floats,
        "token_rewards.uniform": floats,
        "baseline.red": pa.float64(),
        "baseline.uniform": pa.float64(),
    }
    rows = table.to_pylist()
    for row, answer in zip(rows, read(tmp_path / "out.jsonl"), strict=True):
        assert (row["index"], row["id"], row["reward"]) == (answer["index"], answer["id"], answer.get("reward"))
        assert row["error"] == answer.get("error", {}).get("message")
        for method in ("red", "uniform"):
            assert row[f"token_rewards.{method}"] == _float32(answer.get("token_rewards", {}).get(method))
            assert row[f"baseline.{method}"] == answer.get("baseline", {}).get(method)
    assert rows[5]["token_rewards.red"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.parquet", "samples.jsonl"]


def _float32(values: list[float] | None) -> list[float] | None:
    return None if values is None else pa.array(values, pa.float32()).to_pylist()


def test_a_parquet_run_that_was_cut_goes_on(
    run: Run, samples: Path, uncut: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.parquet"
    (tmp_path / "answers.parquet.lines").write_bytes(uncut.read_bytes()[:-100])
    assert run("score", samples, "-o", output, "--model", tiny_llama).status == 0
    assert pq.read_table(output)["reward"].to_pylist() == [answer["reward"] for answer in read(uncut)]


def test_an_empty_file_gives_an_empty_file(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "samples.jsonl", [])
    for name in ("out.jsonl", "out.parquet"):
        assert run("score", file, "-o", tmp_path / name, "--model", tiny_llama).status == 0
    assert read(tmp_path / "out.jsonl") == pq.read_table(tmp_path / "out.parquet").to_pylist() == []


def test_methods_may_be_listed_with_commas(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "samples.jsonl", SAMPLES[:1])
    arguments = ("score", file, "--model", tiny_llama, "-o", tmp_path / "out.jsonl", "--methods", "abc,sparse")
    assert run(*arguments).status == 0
    [answer] = read(tmp_path / "out.jsonl")
    assert list(answer["token_rewards"]) == answer["scored_with"]["methods"] == ["abc", "sparse"]


def test_an_unknown_method_is_said_so(run: Run, samples: Path, tiny_llama: Path, tmp_path: Path) -> None:
    ended = run("score", samples, "--model", tiny_llama, "-o", tmp_path / "out.jsonl", "--methods", "rde")
    assert ended.status == 1
    assert ended.err.endswith("densereward score: no method named 'rde'; there are " + ", ".join(METHODS) + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{samples}"], "the following arguments are required: -o/--output"),
        (["-o", "{tmp}/out.jsonl"], "the following arguments are required: FILE"),
        (["{tmp}/none.jsonl", "-o", "{tmp}/out.jsonl"], "file: Path does not point to a file"),
        (["{tmp}", "-o", "{tmp}/out.jsonl"], "file: Path does not point to a file"),
        (["{samples}", "-o", "{tmp}/no/out.jsonl"], "there is no folder {tmp}/no"),
        (["{samples}", "-o", "{tmp}"], "{tmp} is a folder"),
        (["{samples}", "-o", "{samples}"], "{samples} is the file of samples"),
    ],
)
def test_files_that_cannot_be_used_are_wrong_usage(
    run: Run, samples: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    names = {"samples": samples, "tmp": tmp_path}
    before = samples.read_bytes()
    ended = run("score", *(argument.format(**names) for argument in arguments))
    assert ended.status == 2
    assert message.format(**names) in ended.err
    assert "Traceback" not in ended.err
    assert samples.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_loaded_is_said_so(run: Run, samples: Path, tmp_path: Path) -> None:
    ended = run("score", samples, "-o", tmp_path / "out.jsonl", "--model", tmp_path / "none")
    assert (ended.status, ended.err) == (1, f"densereward score: there is no folder {tmp_path / 'none'}\n")
