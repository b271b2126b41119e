"""Where a setting's value comes from: flags, then DENSEREWARD_*, then the file, then the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from densereward.commands.demo import Demo
from densereward.commands.score import Score
from densereward.commands.serve import Serve
from densereward.settings import ModelSettings
from serving import Run


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ModelSettings]:
    """The settings that each command came to; it does nothing else."""
    settings: list[ModelSettings] = []
    for command in (Serve, Score, Demo):
        monkeypatch.setattr(command, "cli_cmd", settings.append)
    return settings


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "densereward.toml"
    file.write_text('model = "from-file"\nport = 1111\nhost = "0.0.0.0"\napi_key = "file-key"\nmax_samples = 7\n')
    monkeypatch.setenv("DENSEREWARD_CONFIG", str(file))
    return file


def _serve(run: Run, seen: list[ModelSettings], *flags: str) -> Serve:
    assert run("serve", *flags).status == 0
    settings = seen.pop()
    assert isinstance(settings, Serve)
    return settings


def test_without_anything_there_are_the_defaults(run: Run, seen: list[ModelSettings]) -> None:
    settings = _serve(run, seen)
    assert (settings.model, settings.host, settings.port, settings.api_key) == (["default"], "127.0.0.1", 8000, None)


def test_the_file_is_read(run: Run, seen: list[ModelSettings], config: Path) -> None:
    settings = _serve(run, seen)
    assert (settings.model, settings.host, settings.port, settings.max_samples) == (["from-file"], "0.0.0.0", 1111, 7)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "file-key"


def test_the_environment_wins_over_the_file_and_flags_over_both(
    run: Run, seen: list[ModelSettings], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DENSEREWARD_PORT", "2222")
    monkeypatch.setenv("DENSEREWARD_HOST", "::1")
    settings = _serve(run, seen, "--port", "3333")
    assert (settings.model, settings.host, settings.port, settings.max_samples) == (["from-file"], "::1", 3333, 7)


def test_every_knob_can_be_set_from_the_environment(
    run: Run, seen: list[ModelSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "model": ["m"], "ensemble": [], "revision": "r", "model_name": "n", "pair": "policy=p",
        "engine": "torch", "engine_arguments": {},
        "head": "nemotron", "step_separator": "s", "allow": [], "chat_template": None, "device": "cpu",
        "dtype": "float16", "residual_dtype": "weights", "max_length": 1,
        "max_batch_tokens": 2, "prompt_cache_bytes": 17, "max_queue_tokens": 3, "host": "h", "port": 4,
        "api_key": "k", "max_body_bytes": 5, "max_samples": 6, "request_timeout": 7.5,
        "drain_timeout": 8.5, "log_level": "error",
    }  # fmt: skip
    assert values.keys() == Serve.model_fields.keys()
    values |= {"chat_template": Path(__file__)}
    for name, value in values.items():
        monkeypatch.setenv(f"DENSEREWARD_{name.upper()}", ",".join(value) if isinstance(value, list) else str(value))
    settings = _serve(run, seen)
    assert settings.api_key is not None
    assert settings.model_dump() | {"api_key": settings.api_key.get_secret_value()} == values


def test_arguments_of_the_engine_are_an_object_wherever_they_are_given(
    run: Run, seen: list[ModelSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DENSEREWARD_ENGINE", "vllm")
    monkeypatch.setenv("DENSEREWARD_ENGINE_ARGUMENTS", '{"tensor_parallel_size": 2}')
    assert _serve(run, seen).engine_arguments == {"tensor_parallel_size": 2}
    assert _serve(run, seen, "--engine-arguments", '{"max_num_seqs": 8}').engine_arguments["max_num_seqs"] == 8


@pytest.mark.parametrize(
    ("pair", "sources"),
    [
        ("policy=a,reference=b", {"policy": "a", "reference": "b"}),
        ("policy=/x=1, reference=org/b", {"policy": "/x=1", "reference": "org/b"}),
        ("policy=a", {"policy": "a"}),
        ("reference= b , policy=a", {"policy": "a", "reference": "b"}),
        (None, {}),
    ],
)
def test_a_pair_is_read_from_one_line(pair: str | None, sources: dict[str, str]) -> None:
    assert ModelSettings(pair=pair).pair_sources == sources


@pytest.mark.parametrize(("given", "separator"), [(r"\n\n", "\n\n"), ("\n", "\n"), (" ки", " ки")])
def test_a_separator_may_be_given_as_a_shell_writes_line_breaks(given: str, separator: str) -> None:
    assert ModelSettings(step_separator=given).step_separator == separator


@pytest.mark.parametrize("pair", ["a,b", "reference=b", "policy=a,policy=b", "policy=,reference=b", "policy=a,b"])
def test_what_is_no_pair_is_refused(pair: str) -> None:
    with pytest.raises(ValidationError, match="is not of the form policy=SOURCE,reference=SOURCE"):
        ModelSettings(pair=pair)
    with pytest.raises(ValidationError, match="'pair' is the name of the pair"):
        ModelSettings(model=["pair=x"], pair="policy=a")


def test_an_empty_variable_is_none(run: Run, seen: list[ModelSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "PORT", "MAX_LENGTH"):
        monkeypatch.setenv(f"DENSEREWARD_{name}", "")
    settings = _serve(run, seen)
    assert (settings.api_key, settings.port, settings.max_length) == (None, 8000, None)


def test_an_empty_flag_was_not_given(run: Run, seen: list[ModelSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEREWARD_API_KEY", "key-of-the-environment")
    settings = _serve(run, seen, "--api-key", "", "--port=")
    assert settings.api_key is not None
    assert (settings.api_key.get_secret_value(), settings.port) == ("key-of-the-environment", 8000)


def test_the_key_is_not_shown(run: Run, seen: list[ModelSettings]) -> None:
    settings = _serve(run, seen, "--api-key", "hush")
    assert "hush" not in f"{settings!r} {settings}"


@pytest.mark.parametrize("name", ["demo", "score"])
def test_other_commands_read_the_servers_file_and_pass_over_the_servers_own_lines(
    run: Run, seen: list[ModelSettings], config: Path, tmp_path: Path, name: str
) -> None:
    arguments = [config, "-o", tmp_path / "out.jsonl"] if name == "score" else []
    ended = run(name, *arguments)
    assert (ended.status, ended.err) == (0, "")
    assert seen.pop().model == ["from-file"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("serve", "prot = 1", "prot: Extra inputs are not permitted"),
        ("demo", "prot = 1", "prot: Extra inputs are not permitted"),
        ("serve", "port = 'http'", "port: Input should be a valid integer, unable to parse string as an integer"),
        ("serve", 'api_key = ""', "api_key: a key is printable ASCII without spaces, at least one character"),
        ("serve", "port = ", "densereward.toml: Invalid value"),
        ("demo", "\xff", "densereward.toml: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_that_cannot_be_read_is_wrong_usage(
    run: Run, seen: list[ModelSettings], config: Path, name: str, text: str, message: str
) -> None:
    config.write_text(text, encoding="latin-1")
    ended = run(name)
    assert ended.status == 2
    assert ended.err.startswith(f"densereward {name}: ")
    assert message in ended.err
    assert not seen


def test_a_file_that_is_not_there_is_wrong_usage(run: Run, seen: list[ModelSettings], config: Path) -> None:
    config.unlink()
    ended = run("serve")
    assert ended.status == 2
    assert ended.err.startswith(f"densereward serve: DENSEREWARD_CONFIG={config}: ")
    assert "No such file or directory" in ended.err
    assert not seen


def test_several_models_are_given_by_repeating_the_flag_or_with_commas_in_the_environment(
    run: Run, seen: list[ModelSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _serve(run, seen, "--model", "tone=default", "--model", "some/model")
    assert given.sources == {"tone": "default", "some/model": "some/model"}
    monkeypatch.setenv("DENSEREWARD_MODEL", "default,b=some/model")
    assert _serve(run, seen).sources == {"default": "default", "b": "some/model"}
    assert _serve(run, seen, "--model", "x", "--model-name", "y").sources == {"y": "x"}
    for path in ("/models/epoch=3/ckpt", "./lr=1e-5", "runs/lr=1e-5"):
        assert _serve(run, seen, "--model", path).sources == {path: path}


def test_a_file_is_scored_by_one_model(run: Run, config: Path, tmp_path: Path) -> None:
    ended = run("score", config, "-o", tmp_path / "out.jsonl", "--model", "a", "--model", "b")
    assert ended.status == 2
    assert "give --model once" in ended.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "a", "--model", "b", "--model-name", "c"], "name several as --model NAME=SOURCE"),
        (["--model", "a=x", "--model", "a=y"], "two models have one name"),
        (["--model", "a", "--ensemble", "e=a+b:min"], "names b; there are a"),
        (["--model", "a", "--ensemble", "e=a"], "is not of the form"),
        (["--model", "a", "--model", "b", "--ensemble", "a=a+b:mean"], "is a model and an ensemble"),
        (["--model", "a", "--ensemble", "e=a+a:mean"], "has a model twice"),
        (["--model=a", "--model=b", "--ensemble=e=a+b:mean", "--ensemble=e=a+b:min"], "one name"),
    ],
)
def test_names_that_leave_a_model_out_are_refused(run: Run, flags: list[str], message: str) -> None:
    ended = run("serve", *flags)
    assert ended.status == 2
    assert message in ended.err
