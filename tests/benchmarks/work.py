"""What is measured: the models, the samples, and how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from densereward.capture import ScoringInput
from densereward.engines.torch.engine import TorchEngine
from densereward.tokenization.align import Aligner
from densereward_client.wire import Sample
from tests.benchmarks import servers
from tests.benchmarks.peers import Peer

SEED = 0
LENGTH_SPREAD = 0.8  # of their logarithms

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "ar", "en")]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        hidden, layers: of the random Llama.
        samples, mean_length, longest: the batch: how many, and their tokens.
        long, long_batch: tokens of the single long sequence, and sequences in the batch of which it is the longest.
        prefixes: response tokens of the sample whose prefixes are all scored.
        group, group_prompt, group_response: responses to one prompt, the prompt's tokens, and each response's.
        callers, calls: who calls the server at once, and how often each.
        engine_lengths, engine_tokens: of the sequences that both engines serve, and of all of one length together.
        memory: tokens of the sequences whose pass is weighed.
        growth_length, growth_batch, growth_group: the charts' tokens, sequences and responses.
        rounds: of every group; cheap groups take some more, dear ones fewer.
        embedded: whether the embedded model is measured too.
    """

    hidden: int = 512
    layers: int = 8
    samples: int = 32
    mean_length: int = 170
    longest: int = 1024
    long: int = 2048
    long_batch: int = 8
    prefixes: int = 256
    group: int = 8
    group_prompt: int = 512
    group_response: int = 64
    callers: int = 64
    calls: int = 2
    engine_lengths: tuple[int, ...] = (128, 512, 1024, 2048)
    engine_tokens: int = 16_384
    memory: tuple[int, ...] = (512, 1024, 2048, 4096)
    growth_length: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    growth_batch: tuple[int, ...] = (1, 4, 16, 64)
    growth_group: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rounds: int = 3
    embedded: bool = True

    @property
    def dear_rounds(self) -> int:
        """Rounds of a group whose contestants take a minute each."""
        return min(self.rounds, 2)


FULL = Size()
QUICK = replace(
    FULL,
    samples=8,
    mean_length=85,
    longest=512,
    long=512,
    prefixes=64,
    group_prompt=128,
    callers=16,
    engine_lengths=(128, 512),
    engine_tokens=4096,
    memory=(256, 512, 1024),
    growth_length=(128, 256, 512, 1024),
    growth_batch=(1, 2, 4, 8),
    growth_group=(1, 2, 4, 8),
)
SMALLEST = Size(
    hidden=64,
    layers=2,
    samples=4,
    mean_length=40,
    longest=80,
    long=96,
    long_batch=2,
    prefixes=8,
    group=3,
    group_prompt=24,
    group_response=8,
    callers=2,
    calls=1,
    engine_lengths=(32,),
    engine_tokens=64,
    memory=(64, 128),
    growth_length=(16, 32),
    growth_batch=(1, 2),
    growth_group=(1, 2),
    rounds=2,
    embedded=False,
)


@dataclass(frozen=True)
class Work:
    """One model and its samples; contestants that are larger are made when they are first asked for."""

    title: str
    folder: Path
    size: Size
    threads: int
    vllm_python: Path | None = None
    resources: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def engine(self) -> TorchEngine:
        """Our engine."""
        return TorchEngine.load(str(self.folder), device="cpu", dtype="float32")

    @cached_property
    def server(self) -> str:
        """The address of our server, a process of its own."""
        return self.resources.enter_context(servers.ours(self.folder, self.threads))

    @cached_property
    def aligner(self) -> Aligner:
        """Reads samples as the server does."""
        facts = self.engine.facts
        return Aligner(AutoTokenizer.from_pretrained(self.folder), facts.max_length, facts.vocabulary_size)

    @cached_property
    def config(self) -> Any:
        """The model's."""
        return AutoConfig.from_pretrained(self.folder)

    @cached_property
    def shapes(self) -> Any:
        """The model without its weights, to count what it does."""
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(self.config)

    @cached_property
    def eager(self) -> Peer:
        """The same weights in transformers, with the attention that returns its maps."""
        return self._peer("eager")

    @cached_property
    def sdpa(self) -> Peer:
        """The same with transformers' usual attention."""
        return self._peer("sdpa")

    def _peer(self, attention: str) -> Peer:
        return self.resources.enter_context(closing(Peer(self.folder, attention, self.threads)))

    @cached_property
    def lengths(self) -> list[int]:
        """Lengths of the batch's samples, in tokens."""
        size = self.size
        return log_normal_lengths(size.samples, size.mean_length, size.longest)

    @cached_property
    def samples(self) -> list[Sample]:
        """The batch as a trainer sends it: a quarter of each length is the prompt."""
        return [self.sample(length // 4, length - length // 4, seed) for seed, length in enumerate(self.lengths)]

    def sample(self, prompt_tokens: int, response_tokens: int, seed: int) -> Sample:
        """A prompt and a response of so many tokens, give or take a cut word."""
        prompt, response = (
            self._text(tokens, np.random.default_rng([SEED, seed, part]))
            for part, tokens in enumerate((prompt_tokens, response_tokens))
        )
        return Sample.model_validate({"messages": [{"role": "user", "content": prompt}], "response": response})

    def _text(self, tokens: int, generator: np.random.Generator) -> str:
        text = random_text(tokens, generator)
        return text[: self.aligner.vocabulary.encode(text).offsets[tokens - 1][1]]

    def sequences(self, samples: Sequence[Sample]) -> list[ScoringInput]:
        """The samples as the engine takes them, closing tokens included."""
        return [self.aligner.align(sample).sequence for sample in samples]


def log_normal_lengths(count: int, mean: float, longest: int) -> list[int]:
    """Even quantiles, so that no draw was a lucky one."""
    normal = NormalDist(np.log(mean) - LENGTH_SPREAD**2 / 2, LENGTH_SPREAD)
    lengths = np.exp([normal.inv_cdf((i + 0.5) / count) for i in range(count)]).clip(16, longest)
    return [int(length) for length in np.random.default_rng(SEED).permutation(lengths)]


def lengths_up_to(longest: int, count: int) -> list[int]:
    """Log-normal lengths of which the longest is given."""
    top = NormalDist().inv_cdf((count - 0.5) / count)
    mean = longest * np.exp(LENGTH_SPREAD**2 / 2 - LENGTH_SPREAD * top)
    lengths = log_normal_lengths(count, mean, longest)
    return [longest if length == max(lengths) else length for length in lengths]


def random_ids(prompt: Sequence[int], response: int, seed: int, vocabulary: int) -> ScoringInput:
    """A sequence of made-up ids after the prompt's, scored at its end."""
    ids = [*prompt, *made_up(response, seed, vocabulary)]
    return ScoringInput(ids, len(prompt), response, len(ids) - 1)


def made_up(count: int, seed: int, vocabulary: int) -> list[int]:
    """Ids without the first few, which may be special."""
    ids: list[int] = np.random.default_rng([SEED, seed]).integers(10, vocabulary, count).tolist()
    return ids


def random_text(words: int, generator: np.random.Generator) -> str:
    """Made-up words of one to three syllables."""
    return " ".join("".join(generator.choice(_SYLLABLES, generator.integers(1, 4))) for _ in range(words))


def write_random_model(folder: Path, size: Size) -> Path:
    """A Llama with random weights, large enough for attention to differ from uniform, and a tokenizer."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    torch.manual_seed(SEED)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as most models have it, trained on text like the samples'."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([random_text(20_000, np.random.default_rng(SEED))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=_CHATML
    )
