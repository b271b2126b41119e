"""What tokens write, with tokenizers of real families, against the tokenizers' own decoding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

import tiny
from densereward.tokenization.vocabulary import Vocabulary
from densereward_client.tokens import TokenBytes, byte_alphabet
from families import POLICIES, TOKENS

LETTERS = [
    "The fox",
    " ",
    "  ",
    "\n",
    "\t",
    "ß",
    "é",
    "e\u0301",
    "京都",
    "😀",
    "👩‍👩‍👧",
    "\x07",
    "\u200b",
    "don't.",
    "Word",
]
text = st.lists(st.sampled_from(LETTERS) | st.text(max_size=2), max_size=8).map("".join)


@pytest.mark.parametrize("name", list(POLICIES))
@settings(max_examples=60, deadline=None)
@given(written=text.filter(lambda each: not {"▁", "\ufffd"} & {*each}))
def test_tokens_write_what_their_tokenizer_decodes(name: str, written: str) -> None:
    backend = POLICIES[name].backend_tokenizer
    ids = backend.encode(written, add_special_tokens=False).ids
    if name == "bert" and 100 in ids:
        return  # a word it does not know
    pieces = TOKENS[name].pieces(ids)
    assert len(pieces) == len(ids)
    assert b"".join(pieces).decode() == backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", list(POLICIES))
def test_special_tokens_write_nothing_and_do_not_begin_a_text(name: str) -> None:
    backend, tokens = POLICIES[name].backend_tokenizer, TOKENS[name]
    ids = backend.encode("fox", add_special_tokens=False).ids
    special = min(tokens.special)
    assert b"".join(tokens.pieces([special, *ids, special])) == b"fox"
    assert tokens.pieces([special]) == [b""]


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_servers_fingerprint_is_the_clients(name: str) -> None:
    assert Vocabulary(POLICIES[name]).fingerprint == TOKENS[name].fingerprint


def test_fingerprints_tell_vocabularies_apart() -> None:
    fingerprints = {tokens.fingerprint for tokens in TOKENS.values()}
    assert len(fingerprints) == len(TOKENS)
    assert TokenBytes(tiny.make_tokenizer(adds_bos=True)).fingerprint == TOKENS["tiny"].fingerprint
    assert TokenBytes(tiny.make_tokenizer(words=300)).fingerprint != TOKENS["tiny"].fingerprint


def test_the_byte_alphabet_is_the_tokenizers_librarys() -> None:
    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_what_cannot_be_known_is_said() -> None:
    with pytest.raises(ValueError, match="is no fast tokenizer"):
        TokenBytes(object())
    with pytest.raises(ValueError, match="has no token 100000"):
        TOKENS["tiny"].pieces([100000])
    with pytest.raises(ValueError, match="a word that the tokenizer does not know"):
        TOKENS["bert"].pieces([100])
    for steps in (
        [decoders.Replace("x", " "), decoders.Replace("▁", " ")],
        [decoders.Replace("▁", " "), decoders.Strip(" ", 2, 0)],
        [decoders.ByteLevel(), decoders.Strip(" ", 1, 0)],
    ):
        backend = Tokenizer(models.BPE({"a": 0}, []))
        backend.decoder = decoders.Sequence(steps)
        with pytest.raises(ValueError, match="which is not known here"):
            TokenBytes(SimpleNamespace(backend_tokenizer=backend, eos_token_id=None))
    plain = SimpleNamespace(backend_tokenizer=Tokenizer(models.BPE({"a": 0}, [])), eos_token_id=None)
    with pytest.raises(ValueError, match="decodes by nothing, which is not known here"):
        TokenBytes(plain)


@pytest.mark.parametrize("scheme", ["always", "never"])
@pytest.mark.parametrize("words", [["▁a", "▁a"], ["▁▁", "a", "▁▁"], ["a"]])
def test_metaspace_is_read_as_it_decodes(scheme: str, words: list[str]) -> None:
    vocabulary = {word: index for index, word in enumerate(["a", "▁a", "▁▁", "<unk>"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokens = TokenBytes(SimpleNamespace(backend_tokenizer=backend, eos_token_id=None))
    ids = [vocabulary[word] for word in words]
    assert b"".join(tokens.pieces(ids)).decode() == backend.decode(ids)
