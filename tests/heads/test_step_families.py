"""Step judges with their own way of writing a solution, against their own reading of it in one eager pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import tiny
from densereward.capture import Need, StepScores
from densereward.checks.examine import examine, refuse
from densereward.checks.loading import load_unchecked
from densereward.engines.torch.engine import TorchEngine
from densereward.errors import InvalidRequest, ModelError
from densereward.settings import ModelSettings
from densereward_client.wire import Sample

STEPS: frozenset[Need] = frozenset([StepScores()])
WORDS = 324  # transformers adds tokens to Qwen2's
SOLUTION = "The fox was quick.\nSo was the dog 😀.\n\nThank you: 2"


@pytest.fixture(scope="module")
def skywork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skywork-o1-Open-PRM's layout."""
    folder = tmp_path_factory.mktemp("skywork")
    config = tiny.make_config("qwen2", vocab_size=WORDS)
    torch.manual_seed(0)
    decoder = AutoModel.from_config(config)
    weights = {f"pretrained_model.model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    weights |= {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}
    weights["pretrained_model.lm_head.weight"] = torch.zeros(WORDS, 64)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    written = config.to_dict() | {"architectures": ["Qwen2ForPrmModel"]}
    (folder / "config.json").write_text(json.dumps(written))
    tiny.make_tokenizer().save_pretrained(folder)
    torch.save((decoder.state_dict(), weights), folder / "read.pt")
    return folder


def skywork_reading(folder: Path, problem: str, response: str) -> list[float]:
    """The ids of the problem's line behind a BOS, then every line and its break, judged at the breaks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    line = tokenizer.encode("\n")[-1]
    ids, places = tokenizer.encode(tokenizer.bos_token + problem + "\n"), []
    for step in response.split("\n"):
        ids += [*(tokenizer.encode(step) if step else []), line]
        places.append(len(ids) - 1)
    state, weights = torch.load(folder / "read.pt")
    decoder = AutoModel.from_config(tiny.make_config("qwen2", vocab_size=WORDS), attn_implementation="eager").eval()
    decoder.load_state_dict(state)
    with torch.no_grad():
        hidden = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, places]
        values = hidden @ weights["v_head.summary.weight"][0] + weights["v_head.summary.bias"]
    return [float(each) for each in values.sigmoid()]


@pytest.mark.parametrize("response", [SOLUTION, "One step.", "a\n", "\n\na", "  \nb"])
def test_skywork_judges_every_line_at_its_break(skywork: Path, response: str) -> None:
    engine, aligner = load_unchecked(ModelSettings(model=[str(skywork)], device="cpu"))
    refuse(examine(engine, aligner))
    assert (engine.facts.head, engine.facts.unit) == ("step_value", "step")
    aligned = aligner.align(Sample(prompt="How was it?", response=response), STEPS)
    [captured] = engine.forward([aligned.sequence])
    expected = skywork_reading(skywork, "How was it?", response)
    assert captured.step_scores == pytest.approx(np.array(expected), abs=1e-5)
    assert captured.reward == pytest.approx(expected[-1], abs=1e-5)
    size = len(response.encode())
    assert all(0 <= start <= stop <= size for start, stop in aligned.spans or [])


def test_a_prompt_whose_line_is_open_is_ended(skywork: Path) -> None:
    engine, aligner = load_unchecked(ModelSettings(model=[str(skywork)], device="cpu"))
    for prompt in ("How was it? ", "How\t"):
        [captured] = engine.forward([aligner.align(Sample(prompt=prompt, response="a"), STEPS).sequence])
        assert captured.step_scores == pytest.approx(np.array(skywork_reading(skywork, prompt, "a")), abs=1e-5)


def test_a_prompt_that_ends_its_line_gets_no_second_break(skywork: Path) -> None:
    _, aligner = load_unchecked(ModelSettings(model=[str(skywork)], device="cpu"))
    one, two = (aligner.align(Sample(prompt=prompt, response="a")).sequence.token_ids for prompt in ("Why?", "Why?\n"))
    assert list(one) == list(two)


def test_families_without_a_template_refuse_messages(skywork: Path) -> None:
    _, aligner = load_unchecked(ModelSettings(model=[str(skywork)], device="cpu"))
    sample = Sample.model_validate({"messages": [{"role": "user", "content": "Why?"}], "response": "a"})
    with pytest.raises(InvalidRequest, match="no chat template: give `prompt`"):
        aligner.align(sample)


TAG, GOOD, BAD = 12902, 648, 387


def shepherd_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2's kind, with the published ids for the tag and the two answers, and fillers for the rest."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = "TheSoTankyou:2fxwasqdg.▁+-Whycи"
    words += list(dict.fromkeys([*letters, "к"]))
    words += ["▁T", "▁+", "▁-", "▁к", "▁ки", "▁Th", "he", "▁So"]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    vocabulary |= {"▁+": GOOD, "▁-": BAD, "▁ки": TAG}
    taken = set(vocabulary.values())
    vocabulary |= {f"<filler{place}>": place for place in range(TAG + 1) if place not in taken}
    merges = [("▁", "T"), ("▁", "+"), ("▁", "-"), ("▁", "к"), ("▁к", "и"), ("▁T", "h"), ("h", "e")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def shepherd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shepherd")
    special: dict[str, Any] = {"vocab_size": TAG + 1, "sliding_window": 4096, "bos_token_id": 1}
    tiny.make_model("mistral", 0, AutoModelForCausalLM, **special).save_pretrained(folder)
    shepherd_tokenizer().save_pretrained(folder)
    return folder


def shepherd_settings(folder: Path) -> ModelSettings:
    return ModelSettings(model=[str(folder)], device="cpu", head="math_shepherd", max_length=512)


def shepherd_reading(folder: Path, text: str) -> list[float]:
    """The model's card: logits of the two answers where the token is the tag's, `+` of the two."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("+ -")[1:] == [GOOD, BAD]
    ids = torch.tensor([tokenizer.encode(text)])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        scores = model(input_ids=ids).logits[:, :, [GOOD, BAD]].softmax(dim=-1)[:, :, 0]
    return [float(each) for each in scores[ids == tokenizer.encode("ки")[-1]]]


@pytest.mark.parametrize(
    ("prompt", "response", "written"),
    [
        ("Why?", "The fox.\nSo the dog: 2", "Why? The fox. ки\nSo the dog: 2 ки"),
        ("Why? ", "The fox.\n\nSo 😀", "Why? The fox. ки\n\nSo 😀 ки"),
        ("Why?", " The fox.\n", "Why? The fox. ки"),
        ("Why?\n", "a\r\nd", "Why?\n a ки\r\nd ки"),
    ],
)
def test_math_shepherd_judges_each_line_at_its_tag(shepherd: Path, prompt: str, response: str, written: str) -> None:
    engine, aligner = load_unchecked(shepherd_settings(shepherd))
    refuse(examine(engine, aligner))
    aligned = aligner.align(Sample(prompt=prompt, response=response), STEPS)
    [captured] = engine.forward([aligned.sequence])
    expected = shepherd_reading(shepherd, written)
    assert len(expected) == written.count("ки")
    assert captured.step_scores == pytest.approx(np.array(expected), abs=1e-5)
    spans = aligned.spans or []
    assert all(0 <= start <= stop <= len(response.encode()) for start, stop in spans)
    lines = [line for line in response.split("\n") if line.strip()]
    ends = [spans[stop - 1] for stop in aligned.steps]
    assert [response.encode()[a:b].decode(errors="ignore") for a, b in ends] == [
        line.rstrip().encode()[-1:].decode(errors="ignore") for line in lines
    ]


def test_math_shepherd_needs_its_own_tokenizer(shepherd: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(shepherd).save_pretrained(tmp_path)
    tiny.make_sentencepiece_style_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="and the model was trained with 648; it is another model's tokenizer"):
        load_unchecked(shepherd_settings(tmp_path))


def test_a_response_that_holds_the_tag_is_refused(shepherd: Path) -> None:
    _, aligner = load_unchecked(shepherd_settings(shepherd))
    with pytest.raises(InvalidRequest, match="which stands for the end of a step"):
        aligner.align(Sample(prompt="Why?", response="The ки fox"))
    with pytest.raises(InvalidRequest, match="which stands for the end of a step"):
        aligner.align(Sample(prompt="Why? The", response="ки"))


def test_nothing_tells_math_shepherd_from_a_language_model_but_its_name(shepherd: Path) -> None:
    with pytest.raises(ModelError, match="is a language model without a score head"):
        TorchEngine.load(str(shepherd), device="cpu")
