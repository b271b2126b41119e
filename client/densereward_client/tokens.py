"""What the tokens of a Hugging Face fast tokenizer write, in bytes, read from its own definition.

Text is put together from ids and never tokenised again, so every byte has the token it came from. Known are the three
ways in which tokenizers spell: byte-level BPE (GPT-2's alphabet), `▁` for blanks (SentencePiece, with or without bytes
such as `<0x0A>`), and WordPiece (`##` within a word).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["TokenBytes", "byte_alphabet", "fingerprint"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What the WordPiece decoder takes together when it cleans up, token by token.
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def byte_alphabet() -> dict[str, int]:
    """Character of a byte-level token to the byte it stands for.

    Printable bytes stand for themselves; the others, in order, are moved to 256 and up (GPT-2's convention).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def fingerprint(vocabulary: dict[str, int], merges: Sequence[Any]) -> str:
    """sha256 of vocabulary and merges: equal for tokenizers whose ids stand for the same tokens."""
    ordered = sorted(vocabulary.items(), key=lambda item: item[1])
    pairs = [each.split(" ") if isinstance(each, str) else each for each in merges]
    canonical = json.dumps([ordered, pairs], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class TokenBytes:
    """The tokens of one tokenizer.

    Args:
        tokenizer: A transformers fast tokenizer, or whatever has its `backend_tokenizer`.

    Attributes:
        fingerprint: Of vocabulary and merges, as servers tell theirs.
        special: Ids that stand for no text: BOS, EOS, padding and their like.
        eos_id: The tokenizer's own end of a text.

    Raises:
        ValueError: The tokenizer spells in a way that is not known here.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: the bytes of its tokens are not known")
        definition = json.loads(backend.to_str())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.fingerprint = fingerprint(vocabulary, definition["model"].get("merges", []))
        self.eos_id: int | None = tokenizer.eos_token_id
        added = {each["id"]: each for each in definition["added_tokens"]}
        self.special = frozenset(token for token, each in added.items() if each["special"])
        self._written: dict[int, bytes] = {token: each["content"].encode() for token, each in added.items()}
        self._tokens = {token: text for text, token in vocabulary.items()}
        self._alphabet = byte_alphabet()
        self._unknown = definition["model"].get("unk_token")
        parts = _parts(definition.get("decoder"))
        kinds = [part["type"] for part in parts]
        self._spell: Callable[[str, bool], bytes]
        self._reads_bytes = False
        self._strips_first = self._first_bare = False
        self._cleans_up = False
        if kinds == ["ByteLevel"]:
            self._spell = self._byte_level
        elif kinds == ["WordPiece"]:
            self._spell = self._word_piece
            unknown = vocabulary.get(self._unknown)  # some word, and not nothing
            self.special -= {unknown}
            self._written.pop(unknown, None)
            (decoder,) = (part for part in parts if part["type"] == "WordPiece")
            self._prefix, self._cleans_up = decoder["prefix"], decoder["cleanup"]
        elif kinds and all(_is_sentencepiece(part) for part in parts):
            self._spell = self._blanks
            self._strips_first = any(_strips_blank(part) for part in parts)
            self._first_bare = any(_bares_first(part) for part in parts)
            self._reads_bytes = "ByteFallback" in kinds
        else:
            raise ValueError(f"{type(tokenizer).__name__} decodes by {kinds or 'nothing'}, which is not known here")

    def pieces(self, ids: Sequence[int], *, behind: bool = False) -> list[bytes]:
        """What each token writes, nothing for special tokens; the first of a text is written otherwise by some.

        Args:
            ids: The tokens.
            behind: Whether they stand behind other text.

        Raises:
            ValueError: An id that the tokenizer does not have, or a token that stands for unknown text.
        """
        pieces: list[bytes] = []
        begun = behind
        for token in ids:
            piece = b"" if token in self.special else self._piece(token, first=not begun)
            begun = begun or token not in self.special
            pieces.append(piece)
        return pieces

    def _piece(self, token: int, *, first: bool) -> bytes:
        if token in self._written:
            return self._written[token]
        if token not in self._tokens:
            raise ValueError(f"the tokenizer has no token {token}")
        return self._spell(self._tokens[token], first)

    def _byte_level(self, token: str, first: bool) -> bytes:  # noqa: ARG002
        if not all(character in self._alphabet for character in token):
            raise ValueError(f"the token {token!r} is not spelt in bytes")
        return bytes(self._alphabet[character] for character in token)

    def _blanks(self, token: str, first: bool) -> bytes:
        if self._reads_bytes and (match := _BYTE.fullmatch(token)) is not None:
            return bytes([int(match[1], 16)])
        text = token.replace("▁", "" if first and self._first_bare else " ")
        return text.removeprefix(" ").encode() if first and self._strips_first else text.encode()

    def _word_piece(self, token: str, first: bool) -> bytes:
        if token == self._unknown:
            raise ValueError(f"the token {token!r} stands for a word that the tokenizer does not know")
        inside = not first and token.startswith(self._prefix)
        text: str = token.removeprefix(self._prefix) if inside else token if first else " " + token
        for written, cleaned in _CLEANED if self._cleans_up else ():
            text = text.replace(written, cleaned)
        return text.encode()


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder's steps, one or several."""
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _is_sentencepiece(part: dict[str, Any]) -> bool:
    """Whether a step is one that SentencePiece's tokens are decoded by, as it is known here."""
    strips = part["type"] == "Strip" and part["content"] == " " and (part["start"], part["stop"]) in ((1, 0), (0, 0))
    return strips or _replaces_blanks(part) or part["type"] in ("Metaspace", "ByteFallback", "Fuse")


def _replaces_blanks(part: dict[str, Any]) -> bool:
    return bool(part["type"] == "Replace" and part["pattern"] == {"String": "▁"} and part["content"] == " ")


def _strips_blank(part: dict[str, Any]) -> bool:
    """Whether a text loses the blank that it begins with."""
    return bool(part["type"] == "Strip" and part["start"] > 0)


def _bares_first(part: dict[str, Any]) -> bool:
    """Whether the first token of a text loses all its blanks."""
    return bool(part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
