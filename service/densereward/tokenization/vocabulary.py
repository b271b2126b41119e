"""The reward model's tokenizer: ids of texts, bytes and spans of ids, special tokens, a fingerprint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

from tokenizers import Encoding, Tokenizer

from densereward.capture import Span
from densereward.errors import ModelError
from densereward_client.tokens import byte_alphabet, fingerprint

__all__ = ["Vocabulary"]

_ANY_LETTER = "a"
_CACHED_PROMPTS = 64
_CACHED_CHARACTERS = 4096  # of a prompt; so the cache stays within a few MB


class Vocabulary:
    """A tokenizer, read in bytes.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.

    Raises:
        ModelError: the tokenizer has no such backend, so its spans cannot be had.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._definition: dict[str, Any] = json.loads(backend.to_str())
        self._added: dict[int, bytes] = {
            each["id"]: each["content"].encode() for each in self._definition["added_tokens"]
        }
        self._prompt_ids = lru_cache(_CACHED_PROMPTS)(lambda text: tuple(self.encode(text).ids))
        self._known: dict[int, bytes | None] = {}  # never more than the vocabulary
        self._alphabet = byte_alphabet()
        self._decoders = _types(self._definition.get("decoder"))
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.prefix_ids, self.suffix_ids = self._special_frame()

    def pair_frame(self) -> tuple[list[int], list[int], list[int]]:
        """What the tokenizer itself writes before, between and after a pair of texts: CLS, SEP, SEP."""
        framed = self._backend.encode(_ANY_LETTER, _ANY_LETTER, add_special_tokens=True).ids
        bare = self._backend.encode(_ANY_LETTER, add_special_tokens=False).ids
        size = len(bare)
        places = [i for i in range(len(framed)) if framed[i : i + size] == bare]
        if len(places) != 2:
            raise ModelError(f"the tokenizer writes {framed} for a pair of texts, in which they cannot be told apart")
        first, last = places
        return framed[:first], framed[first + size : last], framed[last + size :]

    def _special_frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself writes before and after a text: BOS, EOS."""
        framed, bare = (self._backend.encode(_ANY_LETTER, add_special_tokens=special).ids for special in (True, False))
        start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        return framed[:start], framed[start + len(bare) :]

    @cached_property
    def blank_id(self) -> int | None:
        """The token of a single space; None where the tokenizer has none."""
        blank = self.encode(" ").ids
        return blank[0] if len(blank) == 1 else None

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers whose ids stand for the same tokens."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return fingerprint(vocabulary, self._definition["model"].get("merges", []))

    def encode(self, text: str) -> Encoding:
        """Ids with character offsets; special tokens in the text are recognised, none are added."""
        return self._backend.encode(text, add_special_tokens=False)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a prompt, cached: trainers send many responses to one prompt."""
        if len(text) > _CACHED_CHARACTERS:
            return self.encode(text).ids
        return list(self._prompt_ids(text))

    def ids_behind(self, text: str) -> list[int]:
        """The ids of a text that follows another: without the blank that some tokenizers write first."""
        before, both = self.encode(_ANY_LETTER).ids, self.encode(_ANY_LETTER + text).ids
        return both[len(before) :] if both[: len(before)] == before else self.encode(text).ids

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary has it; None where it has none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def is_added(self, token_id: int) -> bool:
        """Whether a token was added to the vocabulary, as special tokens are."""
        return token_id in self._added

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that is tokenised to these ids, without the blank that some tokenizers write before every text.

        Raises:
            UnicodeDecodeError: their bytes are no text.
        """
        written = self.bytes_of(token_ids)
        return written.removeprefix(self._before_text).decode()

    @cached_property
    def _before_text(self) -> bytes:
        return self.bytes_of(self.encode(_ANY_LETTER).ids).removesuffix(_ANY_LETTER.encode())

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for inside a text, or None where the tokenizer does not let that be known."""
        if token_id not in self._known:
            self._known[token_id] = self._bytes_of(token_id)
        return self._known[token_id]

    def _bytes_of(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id]
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # a row of the embedding without a token: it writes nothing
        if "ByteLevel" in self._decoders:
            known = all(character in self._alphabet for character in token)
            return bytes(self._alphabet[character] for character in token) if known else None
        if "ByteFallback" in self._decoders:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()
        return None

    def token_text(self, token_id: int) -> str:
        """A token for display; part of a character shows as a replacement mark."""
        known = self.token_bytes(token_id)
        return str(self._backend.id_to_token(token_id)) if known is None else known.decode(errors="replace")

    def spans_of_ids(self, token_ids: Sequence[int]) -> list[Span] | None:
        """[start, end) of each token in the bytes that the ids write, or None where they cannot be known."""
        pieces = self._pieces(token_ids)
        return None if pieces is None else _consecutive(list(map(len, pieces)))

    def bytes_of(self, token_ids: Sequence[int]) -> bytes:
        """What ids write; nothing where that cannot be known."""
        return b"".join(self._pieces(token_ids) or [])

    def _pieces(self, token_ids: Sequence[int]) -> list[bytes] | None:
        """The bytes of each token, or None where those of one cannot be known."""
        pieces = list(map(self._known.get, token_ids))
        if None in pieces:  # not met before, or not to be known
            pieces = list(map(self.token_bytes, token_ids))
        known = [piece for piece in pieces if piece is not None]
        return known if len(known) == len(pieces) else None

    def spans_in_text(self, text: str, encoding: Encoding) -> list[Span]:
        """[start, end) of each token in the UTF-8 bytes of its text; in order, without overlap.

        Exact where the tokens spell the text's bytes (some tokenizers write a blank before them). Where the tokenizer
        rewrites the text, spans come from its character offsets.
        """
        pieces, raw = self._pieces(encoding.ids), text.encode()
        written = b"".join(pieces or [])
        if pieces is not None and written in (raw, self._before_text + raw):
            blank = len(written) - len(raw)
            spans = _consecutive(list(map(len, pieces)))
            return [(max(start - blank, 0), max(stop - blank, 0)) for start, stop in spans] if blank else spans
        return _from_offsets(text, encoding.offsets)


def _types(component: dict[str, Any] | None) -> set[str]:
    """The type names of a tokenizer component and of the parts of a sequence of them."""
    if component is None:
        return set()
    parts = [part for parts in component.values() if isinstance(parts, list) for part in parts]
    return {component["type"]}.union(*(_types(part) for part in parts if isinstance(part, dict) and "type" in part))


def _consecutive(lengths: list[int]) -> list[Span]:
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def _from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """Byte spans from character offsets; tokens that share a character divide its bytes in order."""
    byte_at = [0, *accumulate(len(character.encode()) for character in text)]
    spans: list[Span] = []
    index = 0
    reached = 0
    while index < len(offsets):
        start, stop = offsets[index]
        sharing = 1
        while stop > start and index + sharing < len(offsets) and offsets[index + sharing] == (start, stop):
            sharing += 1
        first, last = max(byte_at[start], reached), max(byte_at[stop], reached)
        bounds = [first + (last - first) * part // sharing for part in range(sharing + 1)]
        spans.extend(pairwise(bounds))
        reached = last
        index += sharing
    return spans
