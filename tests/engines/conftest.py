"""One engine of each kind for the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from densereward.engines import ENGINES, INTERNAL_ENGINES
from densereward.engines.base import Engine

VLLM: dict[str, Any] = {"kv_cache_memory_bytes": 2**26, "max_num_seqs": 64}
"""What a tiny model needs of vLLM."""

ENGINE_KINDS = ["torch", "unpacked", pytest.param("vllm", marks=pytest.mark.vllm)]


def load_engine(kind: str, folder: Path, **arguments: Any) -> Any:
    """The engine by its name, on the CPU."""
    if kind == "vllm":
        given = VLLM | arguments
        tokens = given.pop("batch_tokens", None)
        return ENGINES["vllm"].load(str(folder), arguments=given, longest=512, batch_tokens=tokens, prompt_cache=1)
    if kind == "unpacked":
        return INTERNAL_ENGINES["unpacked"].load(str(folder), "a test asked for it", device="cpu", longest=512)
    return ENGINES["torch"].load(str(folder), device="cpu", longest=512)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose heads are as large as all engines take them."""
    return tiny.save(tmp_path_factory.mktemp("model"), "llama", head_dim=32)


@pytest.fixture(scope="session", params=ENGINE_KINDS)
def engine(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Engine]:
    """Each engine, on the same weights."""
    loaded = load_engine(request.param, model_folder)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def start_vllm() -> Callable[..., Any]:
    """Start vLLM on a folder, with arguments of its engine."""
    return lambda folder, **arguments: load_engine("vllm", folder, **arguments)
