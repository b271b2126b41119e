"""The command line: `densereward serve | score | check | demo`. Every flag is a field of a command's settings class."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NoReturn

__all__ = ["main"]

_COMMANDS = {
    "serve": ("densereward.commands.serve:Serve", "answer trainers over HTTP"),
    "score": ("densereward.commands.score:Score", "score a file of samples without a server"),
    "check": ("densereward.commands.check:Check", "check whether a model's numbers would be wrong"),
    "demo": ("densereward.commands.demo:Demo", "start a server, call it, show tokens coloured by reward"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 2 on wrong usage and 1 on failure."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in _COMMANDS:
        _run(given[0], given[1:])
        return
    asked = bool(given) and given[0] in ("-h", "--help")
    print(_usage(), file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)


def _run(name: str, arguments: list[str]) -> None:
    try:
        from pydantic import ValidationError
        from pydantic_settings import CliApp, SettingsError

        command = _load(_COMMANDS[name][0])
    except ModuleNotFoundError as error:
        _exit(1, f"densereward {name} needs {error.name}: pip install 'densereward[service]'")
    from densereward.errors import DenseRewardError
    from densereward.server.pydantic_errors import describe_errors, errors_in
    from densereward_client import DenseRewardError as ClientError

    try:
        CliApp.run(command, cli_args=arguments)
    except ValidationError as error:
        _exit(2, f"densereward {name}: {describe_errors(errors_in(error))}\nSee densereward {name} --help")
    except SettingsError as error:
        _exit(2, f"densereward {name}: {error}")
    except (DenseRewardError, ClientError) as error:
        _exit(1, f"densereward {name}: {error}")
    except KeyboardInterrupt:
        _exit(130, f"densereward {name}: stopped")


def _exit(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)  # noqa: T201
    sys.exit(status)


def _load(path: str) -> Any:
    module, attribute = path.split(":")
    return getattr(import_module(module), attribute)


def _usage() -> str:
    rows = [f"  {name:<8}{text}" for name, (_, text) in _COMMANDS.items()]
    return "\n".join(
        ["usage: densereward COMMAND [FLAGS]", "", *rows, "", "densereward COMMAND --help lists its flags."]
    )
