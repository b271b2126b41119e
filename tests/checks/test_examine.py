"""Planted faults: what is wrong is named by `densereward check`, and the server refuses to serve it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForTokenClassification

import tiny
from densereward.capture import Captured, ScoringInput
from densereward.checks.examine import examine, refuse
from densereward.checks.loading import load, load_unchecked
from densereward.cli import main
from densereward.engines.torch.engine import TorchEngine
from densereward.engines.torch.loading import weights_fingerprint
from densereward.errors import ModelError
from densereward.settings import ALLOWABLE, ModelSettings

Plant = Callable[[Path], Any]
Change = Callable[[dict[str, torch.Tensor]], Any]


def weights(change: Change) -> Plant:
    """A sound model with other weights."""

    def plant(folder: Path) -> None:
        tiny.save(folder)
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return plant


def config(**changes: Any) -> Plant:
    """A sound model with another config."""

    def plant(folder: Path) -> None:
        tiny.save(folder)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | changes))

    return plant


def template(text: str, *, adds_bos: bool = False) -> Plant:
    """A sound model with another chat template."""

    def plant(folder: Path) -> None:
        tiny.save(folder)
        tiny.make_tokenizer(template=text, adds_bos=adds_bos).save_pretrained(folder)

    return plant


def renamed(held: dict[str, torch.Tensor]) -> None:
    held["reward_head.weight"] = held.pop("score.weight")


def halved(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if ".layers.2." in name]:
        del held[name]


def put(name: str, value: float) -> Change:
    return lambda held: held[name].view(-1)[:1].fill_(value)


def scaled(name: str, factor: float) -> Change:
    return lambda held: held[name].mul_(factor)


def sigmoid_left_on(held: dict[str, torch.Tensor]) -> None:
    """A head of a linear layer and an activation, as a sequence."""
    held["score.0.weight"] = held.pop("score.weight")


def judge(**changes: Any) -> Plant:
    return lambda folder: tiny.save_judge(folder, **changes)


def other_tokenizer(words: int) -> Plant:
    def plant(folder: Path) -> None:
        tiny.save(folder, vocab_size=320)
        tiny.make_tokenizer(words=words).save_pretrained(folder)

    return plant


def larger_tokenizer(folder: Path) -> None:
    tiny.save(folder, vocab_size=300)


def other_beginning(folder: Path) -> None:
    tiny.save(folder, adds_bos=True, bos_token_id=7)


def torn(folder: Path) -> None:
    tiny.save(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")


def pickled(folder: Path) -> None:
    tiny.save(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    tiny.save(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def lost_separator(folder: Path) -> None:
    tiny.save_process_model(folder)
    tiny.make_tokenizer().save_pretrained(folder)


def bidirectional(folder: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_labels": 2}
    model = BertForTokenClassification(BertConfig(vocab_size=320, num_attention_heads=4, **sizes))
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)


def pair_with_template(folder: Path) -> None:
    tiny.save_encoder(folder)
    tiny.make_tokenizer().save_pretrained(folder)


def chaotic(held: dict[str, torch.Tensor]) -> None:
    """Attention so sharp that rounding its logits to half precision chooses other tokens."""
    for name in held:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            held[name].mul_(12)


def shepherd_of_another_tokenizer(folder: Path) -> None:
    tiny.save_language_model(folder, vocab_size=700)


BOS_TWICE = "{{ '<|bos|><|bos|>' }}" + tiny.CHATML
FAULTS: dict[str, tuple[Plant, str, dict[str, Any]]] = {
    "head weights renamed": (weights(renamed), "unexpected_weights|missing_weights", {}),
    "a third of the layers missing": (weights(halved), "missing_weights", {}),
    "a config with fewer layers": (config(num_hidden_layers=2), "unexpected_weights", {}),
    "a config of another size": (config(intermediate_size=96), "mismatched_weights|model_error", {}),
    "NaN in a weight": (weights(put("model.layers.1.mlp.down_proj.weight", float("nan"))), "numbers", {}),
    "infinity in the head": (weights(put("score.weight", float("inf"))), "numbers", {}),
    "overflow in half precision": (weights(scaled("model.norm.weight", 1e5)), "numbers", {"dtype": "float16"}),
    "a head of zeros": (weights(scaled("score.weight", 0.0)), "spread", {}),
    "a sigmoid left on": (weights(sigmoid_left_on), "model_error", {}),
    "a torn file": (torn, "model_error", {}),
    "pickled weights": (pickled, "pickle", {}),
    "a tokenizer with more tokens": (larger_tokenizer, "vocabulary", {}),
    "a tokenizer with far fewer tokens": (other_tokenizer(270), "vocabulary", {}),
    "a tokenizer with another beginning": (other_beginning, "special_tokens", {}),
    "no tokenizer": (no_tokenizer, "model_error", {}),
    "a doubled BOS": (template(BOS_TWICE), "doubled_bos", {}),
    "a template of other special tokens": (
        template(tiny.CHATML.replace("<|im_end|>", "<|eot_id|>")),
        "template_tokens",
        {},
    ),
    "a template that leaves the answer out": (template("{{ messages[0]['content'] }}"), "model_error", {}),
    "a template that is broken": (template("{{ messages[7]['content'].no }}"), "model_error", {}),
    "two labels without a rule": (config(num_labels=2, id2label={"0": "a", "1": "b"}), "model_error", {}),
    "three labels for tokens": (judge(num_labels=3), "model_error", {}),
    "labels that do not say which is good": (judge(id2label={0: "a", 1: "b"}), "model_error", {}),
    "a normaliser without figures": (config(normalize_reward=True), "model_error", {}),
    "a separator that the tokenizer does not know": (lost_separator, "model_error", {}),
    "a bidirectional model": (bidirectional, "model_error", {}),
    "a pair of texts with a template for dialogues": (pair_with_template, "model_error", {}),
    "quantised weights": (config(quantization_config={"quant_method": "bitsandbytes"}), "model_error", {}),
    "a judge of pairs": (config(architectures=["LlamaPairRM"]), "model_error", {}),
    "numbers that half precision drowns": (weights(chaotic), "numbers|dtype_drift|parity", {"dtype": "bfloat16"}),
    "another family's tokens": (shepherd_of_another_tokenizer, "model_error", {"head": "math_shepherd"}),
    "a language model": (tiny.save_language_model, "model_error", {}),
    "an architecture nobody knows": (config(architectures=["LlamaForPairs"]), "model_error", {}),
}


def check(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    """The command's exit status and its report."""
    try:
        main(["check", str(folder), "--device", "cpu", "--json", *flags])
        status: Any = 0
    except SystemExit as ended:
        status = ended.code
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.filterwarnings("ignore")  # a faulty model may warn as it likes
def test_a_planted_fault_is_named_and_not_served(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, name, settings = FAULTS[fault]
    folder = tmp_path / "model"
    plant(folder)
    flags = [part for key, value in settings.items() for part in (f"--{key}", value)]
    status, report = check(folder, capsys, *flags)
    failed = [each for each in report["findings"] if each["status"] == "fail"]
    assert status == 1
    assert not report["served"]
    assert failed[0]["name"] in name.split("|"), failed
    assert len(failed[0]["text"]) > 20
    with pytest.raises(ModelError) as refused:
        load(ModelSettings(model=[str(folder)], device="cpu", **settings))
    assert refused.value.error_code in name.split("|")


def test_a_sound_model_passes_every_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = check(tiny.save(tmp_path / "model"), capsys)
    assert (status, report["served"]) == (0, True)
    assert {each["status"] for each in report["findings"]} == {"ok"}
    names = [each["name"] for each in report["findings"]]
    checks = ["weights", "vocabulary", "special_tokens", "template", "score_position", "numbers", "spread", "parity"]
    assert names == [*checks, "dtype_drift", "precision", "speed", "memory"]
    assert re.search(
        r"the weights take \d+ MiB, this process took at most [\d.]+ [MG]iB", report["findings"][-1]["text"]
    )


def test_half_precision_is_compared_with_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = check(tiny.save(tmp_path / "model"), capsys, "--dtype", "bfloat16")
    computed, stored = [each for each in report["findings"] if each["name"] == "dtype_drift"]
    assert computed["status"] == stored["status"] == "ok"
    assert re.search(r"bfloat16 moves scores of up to .* from float32 arithmetic", computed["text"])
    assert re.search(r"bfloat16 moves scores of up to .* from the weights' float32", stored["text"])


def test_weights_that_are_stored_in_half_precision_are_not_loaded_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in held.items()}, folder / "model.safetensors")
    _, report = check(folder, capsys, "--dtype", "bfloat16")
    [computed] = [each for each in report["findings"] if each["name"] == "dtype_drift"]
    assert "from float32 arithmetic" in computed["text"]


def test_pickled_weights_are_read_where_that_is_asked_for(tmp_path: Path) -> None:
    plain, folder = tiny.save(tmp_path / "plain"), tmp_path / "pickled"
    pickled(folder)
    first, _ = load(ModelSettings(model=[str(plain)], device="cpu"))
    second, _ = load(ModelSettings(model=[str(folder)], device="cpu", allow=["pickle"]))
    assert first.facts.weights_fingerprint == second.facts.weights_fingerprint


def test_a_pickle_that_runs_code_is_refused_even_then(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pickled(folder)
    torch.save({"score.weight": Path("any object that is no tensor")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin: Weights only load failed"):
        load(ModelSettings(model=[str(folder)], device="cpu", allow=["pickle"]))


def test_scores_that_half_precision_moves_too_far_are_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(model=[str(tiny.save(tmp_path))], device="cpu", dtype="bfloat16")
    computed = TorchEngine.exactly

    def moved(self: TorchEngine, batch: Sequence[ScoringInput]) -> list[Captured]:
        return [replace(each, reward=each.reward + 0.1) for each in computed(self, batch)]

    monkeypatch.setattr(TorchEngine, "exactly", moved)
    with pytest.raises(ModelError, match="--allow dtype_drift serves it nevertheless") as refused:
        load(settings)
    assert refused.value.error_code == "dtype_drift"
    load(settings.model_copy(update={"allow": ["dtype_drift"]}))


def test_the_servers_own_start_compares_with_float32_without_a_second_copy(tmp_path: Path) -> None:
    engine, aligner = load_unchecked(ModelSettings(model=[str(tiny.save(tmp_path))], device="cpu", dtype="bfloat16"))
    before = engine.facts.weights_fingerprint
    [drift] = [each for each in examine(engine, aligner) if each.name == "dtype_drift"]
    assert drift.status == "ok"
    assert isinstance(engine, TorchEngine)
    assert weights_fingerprint(engine._model) == before


def test_a_template_that_wants_more_than_white_space_passes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    refusing = "{% if not messages[0]['content'].strip() %}{{ raise_exception('say something') }}{% endif %}"
    template(refusing + tiny.CHATML)(folder)
    findings = refuse(examine(*load_unchecked(ModelSettings(model=[str(folder)], device="cpu"))))
    assert {each.status for each in findings} == {"ok"}


def test_a_failure_may_be_allowed_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    other_beginning(folder)
    status, report = check(folder, capsys, "--allow", "special_tokens")
    assert status == 0
    assert [each["name"] for each in report["findings"] if each["status"] == "allowed"] == ["special_tokens"]
    load(ModelSettings(model=[str(folder)], device="cpu", allow=["special_tokens"]))
    with pytest.raises(ValidationError, match="numbers cannot be allowed; only pickle, vocabulary, "):
        ModelSettings(model=[str(folder)], device="cpu", allow=["numbers"])


@pytest.mark.parametrize(
    ("old", "new", "name", "text"),
    [
        ("message['content']", "message['content'] | trim", "template", "strips white space"),
        ("<|im_start|>", "<|user|>", "template_tokens", "writes <|user|>, which the tokenizer does not know"),
    ],
)
def test_what_sound_models_do_as_well_is_told_and_served(
    old: str, new: str, name: str, text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    template(tiny.CHATML.replace(old, new))(folder)
    findings = list(examine(*load_unchecked(ModelSettings(model=[str(folder)], device="cpu"))))
    [told] = [each for each in findings if each.status == "warning"]
    assert (told.name, text in told.text) == (name, True)


@pytest.mark.parametrize("save", [tiny.save_judge, tiny.save_process_model, tiny.save_language_model])
def test_other_kinds_of_models_pass_too(save: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    settings = ModelSettings(model=[str(folder)], device="cpu")
    if save is not tiny.save_language_model:
        findings = refuse(examine(*load_unchecked(settings)))
        assert {each.status for each in findings} == {"ok"}


def test_numbers_that_differ_from_the_reference_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, aligner = load_unchecked(ModelSettings(model=[str(tiny.save(tmp_path / "model"))], device="cpu"))
    own = type(engine).reference
    monkeypatch.setattr(type(engine), "reference", lambda self, each: _moved(own(self, each)))
    found = {each.name: each.status for each in examine(engine, aligner)}
    assert found["parity"] == "fail"
    assert [name for name, status in found.items() if status == "fail"] == ["parity"]
    assert "parity" in ALLOWABLE


def _moved(captured: Any) -> Any:
    captured.attention_rows[-1][3] += 0.01
    return captured


def test_it_is_readable_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--model", str(tiny.save(tmp_path / "model")), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert any("scores of random sequences lie in [" in line for line in lines)


def test_a_template_from_a_file_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    template("{{ messages[7]['content'].no }}")(folder)
    (tmp_path / "chat.jinja").write_text(tiny.CHATML)
    settings = ModelSettings(model=[str(folder)], device="cpu", chat_template=tmp_path / "chat.jinja")
    _, aligner = load(settings)
    assert aligner.template is not None
    assert aligner.template.closing == "<|im_end|>\n"
