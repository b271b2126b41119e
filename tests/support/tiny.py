"""Small random reward models of real architectures, with a tokenizer trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Thank you, that was a wonderful evening with good food.",
    "It's a café in Zürich: naïve, 東京, 日本語, 😀 👩‍👩‍👧 and e\u0301.",
    "def add(a, b):\n    return a + b\n",
] * 4

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_oss")

_SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def make_tokenizer(
    *, adds_bos: bool = False, template: str | None = CHATML, words: int = 320
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 ids, or fewer; pad = eos = `<|im_end|>`, which is the trap."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )


def make_config(architecture: str, **changes: Any) -> Any:
    """A config of a few small layers; windows and caps are small enough to matter in a short test."""
    common = {"vocab_size": 320, "num_labels": 1, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    if architecture == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 2048}
        return GPT2Config(**sizes | common | changes)
    if architecture == "gpt_neox":
        sizes = {name: value for name, value in _SIZE.items() if name != "num_key_value_heads"}
        return GPTNeoXConfig(**sizes | common | changes)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "cohere": (CohereConfig, {"logit_scale": 0.25}),
        "granite": (GraniteConfig, {"logits_scaling": 3.0}),
        "phi": (PhiConfig, {}),
        "llama": (LlamaConfig, {}),
        "mixtral": (MixtralConfig, {"num_local_experts": 2}),
        "gpt_oss": (
            GptOssConfig,
            {"head_dim": 16, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 32}),
        "mistral": (MistralConfig, {"sliding_window": 9}),
        "gemma2": (
            Gemma2Config,
            {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
        ),
    }
    kind, special = kinds[architecture]
    return kind(**_SIZE | special | common | changes)


def make_model(architecture: str, seed: int = 0, kind: Any = None, **changes: Any) -> PreTrainedModel:
    """A random model whose matrices and sinks are large enough for attention to show; one with a score head."""
    torch.manual_seed(seed)
    config = make_config(architecture, **changes)
    model: PreTrainedModel = (kind or AutoModelForSequenceClassification).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            elif name.endswith("sinks"):
                parameter.normal_(mean=2.0)
    model.eval()
    return model


def save(folder: Path, architecture: str = "llama", *, adds_bos: bool = False, **changes: Any) -> Path:
    """A reward model's folder: weights, config, tokenizer."""
    make_model(architecture, **changes).save_pretrained(folder)
    make_tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return folder


def save_judge(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A token classifier's folder; by default with two labels."""
    make_model(architecture, seed, AutoModelForTokenClassification, **{"num_labels": 2} | changes).save_pretrained(
        folder
    )
    make_tokenizer().save_pretrained(folder)
    return folder


def save_process_model(folder: Path, seed: int = 0) -> Path:
    """A folder in the layout of Qwen2.5-Math-PRM: its names of weights, its architecture, its special token."""
    torch.manual_seed(seed)
    sizes = {**_SIZE, "vocab_size": 324, "num_labels": 2, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    config = Qwen2Config(**sizes)
    decoder = AutoModel.from_config(config)
    hidden = config.hidden_size
    layers = [torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, 2)]
    with torch.no_grad():
        for parameter in [*decoder.parameters(), *layers[0].parameters(), *layers[1].parameters()]:
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    weights = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    weights |= {
        f"score.{i}.{name}": each
        for i, layer in zip((0, 2), layers, strict=True)
        for name, each in layer.state_dict().items()
    }
    weights["lm_head.weight"] = torch.zeros(324, hidden)  # published checkpoints carry one that nothing reads
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    written = config.to_dict() | {
        "architectures": ["Qwen2ForProcessRewardModel"],
        "auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    }
    (folder / "config.json").write_text(json.dumps(written))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    tokenizer.save_pretrained(folder)
    return folder


def save_language_model(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A causal language model's folder."""
    make_model(architecture, seed, AutoModelForCausalLM, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_sentencepiece_style_tokenizer() -> PreTrainedTokenizerFast:
    """A Llama-2 style tokenizer: spaces as a mark put before the text too, unknown characters as byte tokens."""
    letters = sorted(set("".join(CORPUS)) - set("東京😀"))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁Th", "an", "k", "▁you", "▁good", *letters]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *byte_tokens, *words]))}
    merges = [("▁", "T"), ("a", "n"), ("▁", "y"), ("▁", "g")]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(["▁T", "▁y", "▁g"]) if token not in vocabulary}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


ENCODERS = ("deberta-v2", "deberta", "bert", "roberta", "modernbert", "xlm-roberta", "electra", "albert", "distilbert")


def save_encoder(folder: Path, kind: str = "deberta-v2", seed: int = 0, **changes: Any) -> Path:
    """A bidirectional classifier's folder, whose tokenizer frames pairs of texts."""
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    special: dict[str, dict[str, Any]] = {
        "deberta-v2": {**relative, "position_buckets": 32, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0},
        "deberta": {**relative, "type_vocab_size": 0},
        "bert": {"type_vocab_size": 2},
        "roberta": {"max_position_embeddings": 131, "type_vocab_size": 1},
        "xlm-roberta": {"max_position_embeddings": 131, "type_vocab_size": 1},
        "electra": {"type_vocab_size": 2, "embedding_size": 64},
        "albert": {"type_vocab_size": 2, "embedding_size": 32},
        "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 4},
        "modernbert": {"local_attention": 16, "cls_token_id": 0, "sep_token_id": 2},
    }
    sizes = {name: value for name, value in _SIZE.items() if name != "num_key_value_heads"}
    common = {"vocab_size": 320, "num_labels": 1, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    written = sizes | common | {"max_position_embeddings": 128} | special[kind] | changes
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **written))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.eval().save_pretrained(folder)
    tokenizer = make_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>",
        pair="<|bos|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|bos|>", 0), ("<|im_end|>", 2)],
    )
    tokenizer.save_pretrained(folder)
    return folder
