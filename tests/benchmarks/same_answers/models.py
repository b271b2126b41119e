"""Small random models of many kinds, made on the spot, and the servers that serve them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import decoder_kinds
import families
import tiny
from tests.heads.test_gated import LLAMA_3, SPECIAL
from tests.heads.test_gated import save as save_gated

BY_SCORES = (
    "red",
    "sentence",
    "message",
    "segment",
    "abc",
    "contribution",
    "future_attention",
    "attribution",
    "occlusion",
    "shapley",
    "uniform",
    "sparse",
    "weights",
)
"""Methods for models that score sequences."""

BY_PAIR = ("implicit", "contrastive")
BY_STEPS = ("steps", "uniform", "sparse", "weights")
BY_CLOSED = ("red", "sentence", "message", "segment", "abc", "occlusion", "shapley", "uniform", "sparse", "weights")
TOGETHER = ("red", "sentence", "abc", "contribution", "uniform", "sparse", "weights")
"""For ensembles."""

KEY = "the-key-of-this-server"
POISON = "\x0e"
"""A text whose token makes the model answer NaN; no other text holds it."""

QUEUE = 60_000
"""Tokens that the slow server's queue holds."""

CHATML_PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
GATED_PROMPT = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
PLAIN = ("{}", "{}\n", "{} ")
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'critic' %}"
    "{{ raise_exception('no critics here') }}{% endif %}{% endfor %}" + tiny.CHATML
)


@dataclass(frozen=True)
class Target:
    """What a request names as its model, and what it can ask of it.

    Attributes:
        model: the name, or several; None names none.
        tokenizer: the model's; None where a sample can hold no ids.
        methods: what it can serve.
        prompts: prompts as text, with a place for the question.
        dialogues: whether it takes `messages`.
        system: whether these may begin with a system message.
        whole: whether it scores texts that hold prompt and response in one, as vLLM's routes take them.
        framed: whether prompts as ids must have the tokenizer's special tokens round them.
        closed: whether its prefixes are only scored closed, each as a sequence of its own.
        steps: whether it judges steps.
        objectives: whether it has several objectives.
        longest: characters of a response.
    """

    model: str | list[str] | None
    tokenizer: Any
    methods: tuple[str, ...] = BY_SCORES
    prompts: tuple[str, ...] = (CHATML_PROMPT, CHATML_PROMPT, *PLAIN)
    dialogues: bool = True
    system: bool = True
    whole: bool = True
    framed: bool = False
    closed: bool = False
    steps: bool = False
    objectives: bool = False
    longest: int = 1500


@dataclass(frozen=True)
class Setup:
    """A server to start.

    Attributes:
        share: of all requests.
        make: writes models into a folder; the flags that serve them, and what requests can name.
        variables: of the server's environment.
    """

    share: float
    make: Callable[[Path], tuple[list[str], list[Target]]]
    variables: dict[str, str] = field(default_factory=dict)


def _one(folder: Path) -> tuple[list[str], list[Target]]:
    """A Llama with one bad row in its embedding; passes so small that long sequences run in pieces."""
    tokenizer = tiny.make_tokenizer(template=STRICT_TEMPLATE)
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[tokenizer.encode(POISON)[0]] = torch.nan
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    limits = ["--max-body-bytes", "400000", "--max-samples", "64"]
    targets = [Target(name, tokenizer) for name in (None, "tiny", "default")]
    return [*_serve(folder, ["tiny"], batch_tokens=512), *limits], targets


def _several(folder: Path) -> tuple[list[str], list[Target]]:
    """Models with tokenizers of their own, one without a template, a pair beside them, and ensembles."""
    tiny.save(folder / "one")
    tiny.save(folder / "two", "qwen3", adds_bos=True, seed=3)
    tiny.make_model("gpt2", seed=4).save_pretrained(folder / "bare")
    for seed, name in enumerate(["policy", "reference"]):
        tiny.save_language_model(folder / name, "qwen3", seed)
    own, bos = tiny.make_tokenizer(), tiny.make_tokenizer(adds_bos=True, words=300)
    bare, other = tiny.make_tokenizer(template=None), tiny.make_tokenizer(words=300)
    for tokenizer, names in ((bos, ["two"]), (bare, ["bare"]), (other, ["policy", "reference"])):
        for name in names:
            tokenizer.save_pretrained(folder / name)
    flags = _serve(folder, ["one", "two", "bare"])
    flags += ["--pair", f"policy={folder / 'policy'},reference={folder / 'reference'}"]
    flags += ["--ensemble", "safe=two+one:min", "--ensemble", "with_pair=one+pair:mean"]
    together: list[str | list[str]] = ["safe", "with_pair", ["one", "two"], ["two", "pair", "one"]]
    return flags, [
        Target("one", own, (*BY_SCORES, *BY_PAIR, *BY_PAIR)),
        Target("two", bos, (*BY_SCORES, *BY_PAIR)),
        Target("bare", bare, dialogues=False, prompts=PLAIN),
        Target("pair", other, ("red", "sentence", "message", "segment", "sparse", *BY_PAIR), whole=False),
        *(Target(names, None, TOGETHER, whole=False) for names in together),
    ]


def _steps(folder: Path) -> tuple[list[str], list[Target]]:
    """Models that judge steps."""
    tiny.save_judge(folder / "trl", "qwen3")
    tiny.save_process_model(folder / "process")
    tokenizer = tiny.make_tokenizer()
    names: list[str | list[str]] = ["trl", "process"]
    targets = [Target(name, tokenizer, BY_STEPS, whole=False, steps=True) for name in names]
    targets.append(Target(["trl", "process"], None, BY_STEPS, whole=False, steps=True))
    return [*_serve(folder, ["trl", "process"]), "--step-separator", r"\n\n"], targets


def _architectures(folder: Path) -> tuple[list[str], list[Target]]:
    """Decoders of several kinds, one that cannot be packed, an encoder, gated heads, and judges of single tokens."""
    decoders = ["gemma2", "gpt_oss", "mistral"]
    for name in decoders:
        tiny.save(folder / name, name)
    decoder_kinds.save(folder / "bloom", "bloom")
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(folder / "bloom")
    tiny.save_encoder(folder / "encoder")
    tiny.save_judge(folder / "tokens", "gpt2", num_labels=1)
    labels: dict[str, Any] = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    tiny.save_judge(folder / "named", **labels)
    save_gated(folder / "armo", "ArmoRM")
    save_gated(folder / "qrm", "QRM")
    gated = tiny.make_tokenizer(template=LLAMA_3)
    gated.add_special_tokens({"additional_special_tokens": SPECIAL})
    unpacked = tuple(name for name in BY_SCORES if name not in ("contribution", "future_attention"))
    return _serve(folder, [*decoders, "bloom", "encoder", "tokens", "named", "armo", "qrm"]), [
        *(Target(name, tokenizer) for name in decoders),
        Target("bloom", tokenizer, unpacked, longest=100),
        Target("encoder", _framing(folder / "encoder"), BY_CLOSED, PLAIN, dialogues=False, whole=False, framed=True,
                closed=True, longest=100),
        *(Target(name, tokenizer, BY_STEPS, whole=False) for name in ("tokens", "named")),
        *(Target(name, gated, prompts=(GATED_PROMPT,), whole=False, objectives=True) for name in ("armo", "qrm")),
    ]  # fmt: skip


def _tokenizers(folder: Path) -> tuple[list[str], list[Target]]:
    """Tokenizers and templates of real families before the smallest of models."""
    targets = []
    for name in ("llama 2", "gemma", "llama 3", "qwen"):
        template = families.TEMPLATES[name]
        tokenizer = families.load(template.family, template.text)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "{}"}], tokenize=False, add_generation_prompt=True
        )
        called = name.replace(" ", "_")
        _save_beside(folder / called, tokenizer)
        targets.append(Target(called, tokenizer, prompts=(prompt, prompt, *PLAIN), system=template.systems))
    mon = families.load("mon")
    _save_beside(folder / "mon", mon)
    targets.append(Target("mon", mon, prompts=PLAIN, dialogues=False))
    bert = families.load("bert")
    tiny.save_encoder(folder / "bert", "bert", vocab_size=len(bert), pad_token_id=0)
    bert.save_pretrained(folder / "bert")
    targets.append(Target("bert", bert, BY_CLOSED, PLAIN, False, whole=False, framed=True, closed=True, longest=100))
    return _serve(folder, [str(target.model) for target in targets]), targets


def _save_beside(folder: Path, tokenizer: Any) -> None:
    """A Llama for a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    tiny.make_model("llama", vocab_size=len(tokenizer), **sizes, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _framing(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _limits(folder: Path) -> tuple[list[str], list[Target]]:
    """A model so slow that a full queue outlasts the time of a request."""
    tiny.save(folder / "slow", num_hidden_layers=24)
    limits = {"max-queue-tokens": QUEUE, "request-timeout": 2, "drain-timeout": 20}
    flags = [part for name, value in limits.items() for part in (f"--{name}", f"{value}")]
    return [*_serve(folder, ["slow"], batch_tokens=2000), *flags], []


def _serve(folder: Path, names: list[str], batch_tokens: int = 4096) -> list[str]:
    """Flags that serve models; without a size of batches it would be measured, and be another one every time."""
    models = [part for name in names for part in ("--model", f"{name}={folder / name}")]
    return ["--device", "cpu", "--max-batch-tokens", f"{batch_tokens}", *models]


SETUPS = {
    "one": Setup(0.40, _one, {"DENSEREWARD_API_KEY": KEY}),
    "several": Setup(0.22, _several),
    "steps": Setup(0.09, _steps),
    "architectures": Setup(0.15, _architectures),
    "tokenizers": Setup(0.14, _tokenizers),
    "limits": Setup(0.0, _limits),
}
