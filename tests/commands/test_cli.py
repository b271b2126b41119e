"""`densereward` itself: help, wrong usage, and an installation without the service."""

from __future__ import annotations

import subprocess
import sys

import pytest

from densereward.commands.score import Score
from densereward.settings import ModelSettings, ServerSettings
from serving import Run, command, environment


def test_help_names_every_command() -> None:
    ended = command("--help", fresh=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "usage: densereward COMMAND [FLAGS]",
        "",
        "  serve   answer trainers over HTTP",
        "  score   score a file of samples without a server",
        "  check   check whether a model's numbers would be wrong",
        "  demo    start a server, call it, show tokens coloured by reward",
        "",
        "densereward COMMAND --help lists its flags.",
    ]


@pytest.mark.parametrize("arguments", [[], ["sevre"], ["--port", "8000"]])
def test_an_unknown_command_is_wrong_usage(run: Run, arguments: list[str]) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("usage: densereward COMMAND [FLAGS]")


@pytest.mark.parametrize(("name", "settings"), [("serve", ServerSettings), ("demo", ModelSettings), ("score", Score)])
def test_a_commands_help_lists_every_knob_and_its_default(run: Run, name: str, settings: type[ModelSettings]) -> None:
    ended = run(name, "--help")
    assert ended.status == 0
    assert ended.out.startswith(f"usage: densereward {name} ")
    words = ended.out.split()
    for field, info in settings.model_fields.items():
        told = f"{info.description} " + ("(required)" if info.is_required() else f"(default: {info.default})")
        if field == "file":
            assert str(info.description) in " ".join(words)
        else:
            assert f"--{field.replace('_', '-')}" in words
            assert told in " ".join(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "1"], "densereward serve: error: unrecognized arguments: --prot 1"),
        (["--port"], "densereward serve: error: argument --port: expected one argument"),
        (["--port", "99999"], "densereward serve: port: Input should be less than or equal to 65535"),
        (["--port", "http"], "densereward serve: port: Input should be a valid integer, unable to parse string"),
        (["--max-samples", "0"], "densereward serve: max_samples: Input should be greater than 0"),
        (["--request-timeout", "-1"], "densereward serve: request_timeout: Input should be greater than 0"),
        (["--dtype", "int8"], "densereward serve: dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (["--api-key", "two words"], "densereward serve: api_key: a key is printable ASCII without spaces"),
    ],
)
def test_a_wrong_flag_is_wrong_usage(run: Run, arguments: list[str], message: str) -> None:
    ended = run("serve", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err
    assert "two words" not in ended.err
    assert "pydantic" not in ended.err


def _without(modules: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in an environment that lacks some packages."""
    hidden = ", ".join(f"{module}=None" for module in modules)
    script = f"import sys; sys.modules.update({hidden}); from densereward.cli import main; main({list(arguments)})"
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


SERVICE = ["fastapi", "orjson", "prometheus_client", "pydantic_settings", "rich", "torch", "transformers", "uvicorn"]


@pytest.mark.parametrize("name", ["serve", "score", "demo"])
def test_without_the_service_extra_a_command_names_what_to_install(name: str) -> None:
    ended = _without(SERVICE, name, "--model", "x")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"densereward {name} needs pydantic_settings: pip install 'densereward[service]'\n"


def test_a_single_missing_package_is_named() -> None:
    ended = _without(["fastapi"], "serve")
    assert ended.returncode == 1
    assert ended.stderr == "densereward serve needs fastapi: pip install 'densereward[service]'\n"


def test_without_the_service_extra_help_still_helps() -> None:
    ended = _without(SERVICE, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: densereward COMMAND [FLAGS]")
