"""What every test shares: quiet libraries, a fixed thread count, the tiny models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama reward model and its tokenizer."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("llama"))
