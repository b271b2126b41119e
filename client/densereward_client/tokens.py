"""The bytes that each token of a Hugging Face fast tokenizer writes, read from the tokenizer's own definition.

Text is put together from ids and never tokenised again, so it is known which token wrote which byte. Three kinds of
tokenizers are known: byte-level BPE (GPT-2's alphabet), SentencePiece (`▁` for a space, with or without byte tokens
such as `<0x0A>`) and WordPiece (`##` within a word).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TokenBytes", "byte_alphabet", "fingerprint"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What the WordPiece decoder replaces in each token when it cleans up.
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def byte_alphabet() -> dict[str, int]:
    """Maps each character of byte-level tokens to the byte it stands for.

    Printable bytes stand for themselves; the others, in order, are moved to 256 and up (GPT-2's convention).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def fingerprint(vocabulary: dict[str, int], merges: Sequence[Any]) -> str:
    """sha256 of vocabulary and merges; equal if the ids of two tokenizers stand for the same tokens."""
    ordered = sorted(vocabulary.items(), key=lambda item: item[1])
    pairs = [each.split(" ") if isinstance(each, str) else each for each in merges]
    canonical = json.dumps([ordered, pairs], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class TokenBytes:
    """The bytes that the tokens of one tokenizer write.

    Args:
        tokenizer: A transformers fast tokenizer, or any object with its `backend_tokenizer` and `eos_token_id`.

    Attributes:
        fingerprint: Of vocabulary and merges, as a server's model card has it.
        special: Ids that stand for no text, such as BOS, EOS and padding.
        eos_id: The tokenizer's EOS.

    Raises:
        ValueError: How the tokenizer writes its tokens is not known here.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: the bytes of its tokens are not known")
        definition = json.loads(backend.to_str())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = {each["id"]: each for each in definition["added_tokens"]}
        self.fingerprint = fingerprint(vocabulary, definition["model"].get("merges", []))
        self.eos_id: int | None = tokenizer.eos_token_id
        self.special = frozenset(token for token, each in added.items() if each["special"])
        self._added: dict[int, bytes] = {token: each["content"].encode() for token, each in added.items()}
        self._tokens = {token: text for text, token in vocabulary.items()}
        steps = _decoder_steps(definition.get("decoder"))
        kinds = [step["type"] for step in steps]
        self._bytes_of: Callable[[str, bool], bytes]
        if kinds == ["ByteLevel"]:
            self._bytes_of = _ByteLevel(byte_alphabet())
        elif kinds == ["WordPiece"]:
            unknown = definition["model"].get("unk_token")
            self._bytes_of = _WordPiece(steps[0]["prefix"], steps[0]["cleanup"], unknown)
            self.special -= {vocabulary.get(unknown)}  # it stands for a word, though not for a known one
            self._added.pop(vocabulary.get(unknown), None)
        elif kinds and all(_is_sentencepiece(step) for step in steps):
            self._bytes_of = _SentencePiece(
                has_bytes="ByteFallback" in kinds,
                strips_first=any(step["type"] == "Strip" and step["start"] > 0 for step in steps),
                first_without_space=any(
                    step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
                ),
            )
        else:
            raise ValueError(f"{type(tokenizer).__name__} decodes by {kinds or 'nothing'}, which is not known here")

    def pieces(self, ids: Sequence[int], *, behind: bool = False) -> list[bytes]:
        """What each token writes; nothing for special tokens. Some tokenizers write the first token differently.

        Args:
            ids: The tokens.
            behind: Whether other text stands before them.

        Raises:
            ValueError: An id that the tokenizer does not have, or a token that stands for unknown text.
        """
        pieces: list[bytes] = []
        first = not behind
        for token in ids:
            if token in self.special:
                pieces.append(b"")
            else:
                pieces.append(self._piece(token, first))
                first = False
        return pieces

    def _piece(self, token: int, first: bool) -> bytes:
        if token in self._added:
            return self._added[token]
        if token not in self._tokens:
            raise ValueError(f"the tokenizer has no token {token}")
        return self._bytes_of(self._tokens[token], first)


@dataclass(frozen=True)
class _ByteLevel:
    """Byte-level BPE: each character is a byte."""

    alphabet: dict[str, int]

    def __call__(self, token: str, _: bool) -> bytes:
        if not all(character in self.alphabet for character in token):
            raise ValueError(f"the token {token!r} is not spelt in bytes")
        return bytes(self.alphabet[character] for character in token)


@dataclass(frozen=True)
class _SentencePiece:
    """`▁` is a space.

    Attributes:
        has_bytes: `<0x0A>` is a byte.
        strips_first: The first token of a text loses one space at its beginning.
        first_without_space: The first token of a text loses all its spaces.
    """

    has_bytes: bool
    strips_first: bool
    first_without_space: bool

    def __call__(self, token: str, first: bool) -> bytes:
        if self.has_bytes and (match := _BYTE.fullmatch(token)) is not None:
            return bytes([int(match[1], 16)])
        text = token.replace("▁", "" if first and self.first_without_space else " ")
        return text.removeprefix(" ").encode() if first and self.strips_first else text.encode()


@dataclass(frozen=True)
class _WordPiece:
    """A token with the prefix continues a word; any other begins one, after a space."""

    prefix: str
    cleans_up: bool
    unknown: str | None

    def __call__(self, token: str, first: bool) -> bytes:
        if token == self.unknown:
            raise ValueError(f"the token {token!r} stands for a word that the tokenizer does not know")
        if first:
            text = token
        elif token.startswith(self.prefix):
            text = token.removeprefix(self.prefix)
        else:
            text = " " + token
        for written, cleaned in _CLEAN_UP if self.cleans_up else ():
            text = text.replace(written, cleaned)
        return text.encode()


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _is_sentencepiece(step: dict[str, Any]) -> bool:
    """Whether `_SentencePiece` covers this step of a decoder."""
    if step["type"] == "Strip":
        return step["content"] == " " and (step["start"], step["stop"]) in ((1, 0), (0, 0))
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": "▁"} and step["content"] == " ")
    return step["type"] in ("Metaspace", "ByteFallback", "Fuse")
