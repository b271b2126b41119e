"""The commands, a file each: a settings class whose fields are its flags, and `cli_cmd`, which runs it."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict

FLAGS = SettingsConfigDict(
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_hide_none_type=True,
    cli_avoid_json=True,
    cli_enforce_required=True,
)
