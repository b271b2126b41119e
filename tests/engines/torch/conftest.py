"""The packed engine and its reference, for the tests in this folder."""

from __future__ import annotations

from typing import Any

import pytest

import reference
import tiny
from densereward.engines.torch.engine import TorchEngine


@pytest.fixture(scope="session", params=tiny.ARCHITECTURES)
def engine_and_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TorchEngine, Any]:
    """Our engine and the eager reference on the same random weights."""
    folder = tiny.save(tmp_path_factory.mktemp(request.param), request.param)
    return TorchEngine.load(str(folder), device="cpu"), reference.eager(folder)
