"""Every setting, once: a flag of `densereward serve`, an environment variable DENSEREWARD_*, or a line of a TOML file.

Flags win over the environment, the environment over the file (`DENSEREWARD_CONFIG=FILE`). An empty flag or variable
is one that was not given.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    FilePath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from densereward.engines import ENGINES

__all__ = ["ALLOWABLE", "PAIR", "ModelSettings", "ServerSettings"]

ALLOWABLE = (
    "pickle",
    "vocabulary",
    "special_tokens",
    "template_tokens",
    "doubled_bos",
    "spread",
    "parity",
    "dtype_drift",
)
"""Findings of `densereward check` with which a model may be served; pickled weights, with which it may be loaded."""

PAIR = "pair"
"""What requests call the pair of language models."""


class ModelSettings(BaseSettings):
    """Which model, where and how it runs."""

    model_config = SettingsConfigDict(
        env_prefix="DENSEREWARD_", env_ignore_empty=True, extra="forbid", protected_namespaces=()
    )

    model: Annotated[list[str], NoDecode] = Field(
        ["default"],
        min_length=1,
        description="Folder or hub id of a reward model; `default` is the embedded one. Repeat it to serve several, "
        "as NAME=SOURCE to name them; the first is the one that answers where a request names none.",
    )
    engine: str = Field(
        "torch", description="What runs the reward models: torch does all, vllm what fleets that run vLLM need."
    )
    engine_arguments: dict[str, Any] = Field(
        {},
        description='Arguments of vLLM\'s engine as a JSON object: {"tensor_parallel_size": 2, '
        '"gpu_memory_utilization": 0.5}.',
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    model_name: str | None = Field(
        None, description="Name the only model is served under; by default what --model says."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1; auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the weights; auto is bfloat16 on a GPU, float32 on the CPU. The head is float32."
    )
    residual_dtype: Literal["float32", "weights"] = Field(
        "float32",
        description="Of the residual stream of a packed half-precision model: float32 takes most of the rounding noise "
        "out of token rewards; weights rounds it at every addition, as transformers does.",
    )
    ensemble: Annotated[list[str], NoDecode] = Field(
        [],
        description="NAME=MODEL+MODEL:HOW, by which requests may name several models; HOW is mean, min or uncertainty.",
    )
    pair: str | None = Field(
        None,
        description="policy=SOURCE,reference=SOURCE: two causal language models, served as the model `pair`, which "
        "give any other model the methods `implicit` and `contrastive`; policy=SOURCE alone gives only the latter.",
    )
    head: Literal["nemotron", "math_shepherd"] | None = Field(
        None, description="How models are read that nothing in their files tells from language models."
    )
    step_separator: str | None = Field(
        None,
        min_length=1,
        description="For a token classifier that was trained on steps, as by TRL's PRMTrainer: the text that ends each "
        "of them, `\\n` for a line break. Without it, each token is scored. It holds for all that are served.",
    )
    allow: Annotated[list[str], NoDecode] = Field(
        [], description="Names of failed checks (`densereward check`) with which a model is served nevertheless."
    )
    chat_template: FilePath | None = Field(
        None, description="File with the chat template that takes the place of the reward models' own."
    )
    max_length: PositiveInt | None = Field(
        None, description="Tokens in the longest sequence served; by default what the model's config gives."
    )
    max_batch_tokens: PositiveInt | None = Field(
        None, description="Tokens in one forward pass; by default what is fastest, measured at the start."
    )
    prompt_cache_bytes: NonNegativeInt = Field(
        2**30, description="Bytes for the keys of prompts that come again in later passes; 0 caches none."
    )
    max_queue_tokens: PositiveInt = Field(1_048_576, description="Tokens that may wait; beyond that, 429.")

    @field_validator("engine")
    @classmethod
    def _is_an_engine(cls, name: str) -> str:
        if name not in ENGINES:
            raise ValueError(f"no engine is called {name!r}; there are {', '.join(ENGINES)}")
        return name

    @field_validator("model", "ensemble", "allow", mode="before")
    @classmethod
    def _one_or_several(cls, given: object) -> object:
        """One may be given as it stands, in the environment several with commas between them."""
        return given.split(",") if isinstance(given, str) else given

    @model_validator(mode="after")
    def _names_are_different(self) -> ModelSettings:
        if self.model_name is not None and len(self.model) > 1:
            raise ValueError("model_name names one model; name several as --model NAME=SOURCE")
        if len(self.sources) < len(self.model):
            raise ValueError(f"two models have one name: {', '.join(self.model)}; name them as --model NAME=SOURCE")
        return self

    @model_validator(mode="after")
    def _ensembles_are_of_these_models(self) -> ModelSettings:
        for text in self.ensemble:
            found = re.fullmatch(r"([^=]+)=(.+):(mean|min|uncertainty)", text)
            if found is None or len(found[2].split("+")) < 2:
                raise ValueError(f"ensemble {text!r} is not of the form NAME=MODEL+MODEL:mean, :min or :uncertainty")
            there = {*self.sources, PAIR} if "reference" in self.pair_sources else self.sources
            if unknown := [name for name in found[2].split("+") if name not in there]:
                raise ValueError(f"ensemble {text!r} names {', '.join(unknown)}; there are {', '.join(self.sources)}")
            if found[1] in self.sources:
                raise ValueError(f"{found[1]!r} is a model and an ensemble")
            if len(set(found[2].split("+"))) < len(found[2].split("+")):
                raise ValueError(f"ensemble {text!r} has a model twice")
        if len(self.ensembles) < len(self.ensemble):
            raise ValueError(f"two ensembles have one name: {', '.join(self.ensemble)}")
        return self

    @field_validator("allow")
    @classmethod
    def _can_be_allowed(cls, given: list[str]) -> list[str]:
        """Found out before a model is loaded."""
        if unknown := sorted(set(given) - set(ALLOWABLE)):
            raise ValueError(f"{', '.join(unknown)} cannot be allowed; only {', '.join(ALLOWABLE)}")
        return given

    @field_validator("step_separator")
    @classmethod
    def _with_line_breaks(cls, given: str | None) -> str | None:
        """A shell writes a line break as two characters."""
        return None if given is None else given.replace("\\n", "\n")

    @field_validator("pair")
    @classmethod
    def _is_a_pair(cls, given: str | None) -> str | None:
        """Its parts have their names."""
        parts = [] if given is None else _parts(given)
        whole = all(source for _, source in parts)
        if given is not None and not (
            whole and sorted(name for name, _ in parts) in (["policy"], ["policy", "reference"])
        ):
            raise ValueError(f"{given!r} is not of the form policy=SOURCE,reference=SOURCE")
        return given

    @model_validator(mode="after")
    def _no_model_is_called_pair(self) -> ModelSettings:
        if self.pair is not None and PAIR in {*self.sources, *self.ensembles}:
            raise ValueError(f"{PAIR!r} is the name of the pair; name the model otherwise, as --model NAME=SOURCE")
        return self

    @model_validator(mode="after")
    def _engine_heeds_them(self) -> ModelSettings:
        """Refuse settings that the chosen engine would ignore."""
        if self.engine == "torch" and self.engine_arguments:
            raise ValueError("engine_arguments are vLLM's; give --engine vllm with them")
        unused = {"head": self.head, "step_separator": self.step_separator, "allow pickle": "pickle" in self.allow}
        unused["residual_dtype"] = self.residual_dtype != "float32"
        if self.engine == "vllm" and (given := [name for name, value in unused.items() if value]):
            raise ValueError(f"{', '.join(given)}: not with --engine vllm; such models are served by --engine torch")
        if self.engine == "vllm" and len(self.model) > 1:
            raise ValueError("with --engine vllm a server has one model; start one for each")
        return self

    @property
    def pair_sources(self) -> dict[str, str]:
        """Folder or hub id of the policy, and of the reference where there is one."""
        return {} if self.pair is None else dict(sorted(_parts(self.pair)))  # the policy first

    @property
    def ensembles(self) -> dict[str, tuple[list[str], str]]:
        """Models and how they are combined, by the ensemble's name."""
        parts = [(name, *rest.rpartition(":")) for name, _, rest in (each.partition("=") for each in self.ensemble)]
        return {name: (models.split("+"), how) for name, models, _, how in parts}

    @property
    def sources(self) -> dict[str, str]:
        """Folder or hub id by the name a model is served under."""
        pairs = [_named(each.strip()) for each in self.model]
        return {self.model_name or name: source for name, source in pairs}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file that DENSEREWARD_CONFIG names."""
        file = os.environ.get("DENSEREWARD_CONFIG")
        sources = (init_settings, env_settings, dotenv_settings, file_secret_settings)
        return (*sources, InitSettingsSource(settings_cls, _read(Path(file), settings_cls))) if file else sources


def _parts(pair: str) -> list[tuple[str, str]]:
    """Name and source of each part."""
    parts = [each.partition("=") for each in pair.split(",")]
    return [(name.strip(), source.strip()) for name, _, source in parts]


def _named(model: str) -> tuple[str, str]:
    """NAME=SOURCE as the two; anything else, a path with an equals sign in it too, is its own name."""
    found = re.fullmatch(r"(\w[\w.-]*)=(.+)", model)
    return (found[1], found[2]) if found else (model, model)


def _read(file: Path, settings_cls: type[BaseSettings]) -> dict[str, object]:
    """The file's settings, without those that only the server has; an unknown one is refused like a flag.

    Raises:
        SettingsError: no such file, or no TOML.
    """
    try:
        lines = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"DENSEREWARD_CONFIG={file}: {error}") from error
    only_servers = ServerSettings.model_fields.keys() - settings_cls.model_fields.keys()
    return {name: value for name, value in lines.items() if name not in only_servers}


class ServerSettings(ModelSettings):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(None, description="Key that every scoring route then asks for, as a bearer.")
    max_body_bytes: PositiveInt = Field(64 * 2**20, description="Bytes in one request's body; beyond that, 413.")
    max_samples: PositiveInt = Field(4096, description="Samples in one request; beyond that, 413.")
    request_timeout: PositiveFloat = Field(300.0, description="Seconds for one request; beyond that, 504.")
    drain_timeout: PositiveFloat = Field(60.0, description="Seconds that SIGTERM leaves to requests under way.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Of the server's log.")

    @field_validator("api_key")
    @classmethod
    def _can_be_sent(cls, key: SecretStr | None) -> SecretStr | None:
        """Refuse a key that no HTTP header can carry."""
        if key is not None and not re.fullmatch(r"[!-~]+", key.get_secret_value()):
            raise ValueError("a key is printable ASCII without spaces, at least one character")
        return key
