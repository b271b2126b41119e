"""What vLLM is not given, and which vLLM is not taken: all of it found out without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import tiny
from densereward.checks.loading import load
from densereward.engines.vllm.model import check_version, refuse_arguments, served_model
from densereward.errors import ModelError
from densereward.settings import ModelSettings


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0"])
def test_versions_that_are_known_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0rc1", "1.0.0", "dev"])
def test_other_versions_are_refused_with_those_that_are_known(version: str) -> None:
    with pytest.raises(ModelError, match=r"is not known here; install 0\.32\.\* or 0\.33\.\*") as refused:
        check_version(version)
    assert refused.value.error_code == "vllm_version"


def test_arguments_are_vllms_and_the_operators() -> None:
    known = ["tensor_parallel_size", "model", "pooler_config"]
    refuse_arguments(["tensor_parallel_size"], known)
    with pytest.raises(ModelError, match="has no tensor_size"):
        refuse_arguments(["tensor_size"], known)
    with pytest.raises(ModelError, match="pooler_config cannot be set there"):
        refuse_arguments(["pooler_config"], known)


def test_a_sequence_classifier_is_what_it_is_in_its_files(tiny_llama: Path) -> None:
    found = served_model(str(tiny_llama), None, 100)
    assert (found.head, found.longest) == ("bradley_terry", 100)
    assert found.size == (tiny_llama / "model.safetensors").stat().st_size


def test_the_fingerprint_changes_with_one_weight(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    before = served_model(str(folder), None, None).fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert served_model(str(folder), None, None).fingerprint != before


def _two_labels(folder: Path) -> Path:
    return tiny.save(folder, num_labels=2)


def _without_head(folder: Path) -> Path:
    tiny.save(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _normalised(folder: Path) -> Path:
    tiny.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"normalize_reward": True, "mean": 1.0, "std": 2.0}))
    return folder


def _windowed(folder: Path) -> Path:
    tiny.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    return folder


def _not_causal(folder: Path) -> Path:
    return tiny.save(folder, is_causal=False)


def _made_of_a_language_model(folder: Path) -> Path:
    tiny.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"classifier_from_token": ["yes", "no"]}))
    return folder


def test_a_window_that_both_have_is_taken(tmp_path: Path) -> None:
    assert served_model(str(tiny.save(tmp_path, "mistral")), None, None).config.sliding_window == 9


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_two_labels, "num_labels = 2"),
        (_without_head, r"no weight called score\.weight"),
        (_normalised, "the head openrlhf are not read by vLLM as by their family; serve it with --engine torch"),
        (_not_causal, "its tokens attend to later ones"),
        (_windowed, "transformers has none in llama; take it out"),
        (_made_of_a_language_model, "with `classifier_from_token` in its config"),
        (tiny.save_judge, "the head token_classifier"),
        (tiny.save_encoder, "the head encoder"),
        (tiny.save_language_model, "a language model without a score head"),
    ],
)
def test_what_vllm_would_read_in_its_own_way_is_refused(make: Callable[[Path], Path], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        served_model(str(make(tmp_path)), None, None)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_start_says_how_to_install_it(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"vLLM is not installed .* pip install 'densereward\[vllm\]'"):
        load(ModelSettings(engine="vllm", model=str(tiny_llama)))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"engine_arguments": {"tensor_parallel_size": 2}}, "engine_arguments are vLLM's"),
        ({"engine": "vllm", "head": "nemotron"}, "head: not with --engine vllm"),
        ({"engine": "vllm", "step_separator": "\\n"}, "step_separator: not with"),
        ({"engine": "vllm", "allow": ["pickle"]}, "allow pickle: not with"),
        ({"engine": "vllm", "model": ["a=x", "b=y"]}, "a server has one model"),
    ],
)
def test_settings_that_the_engine_does_not_heed_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ModelSettings(**given)
