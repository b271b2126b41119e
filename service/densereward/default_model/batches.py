"""From labelled texts to training batches: mixing sources, joining texts, cutting prefixes, packing token trees.

A training text is one to three texts joined by spaces, and its label is the running sum of theirs: known exactly where
a text ends, unknown inside one, where the sum up to that text's end is the target of the squared error (so the score
learns its expectation). The sum is what makes a step of the score belong to the words that caused it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from densereward.default_model.data import Message, Preference, Rated
from densereward.default_model.trees import TokenTree, TreeBatch, collate

EMPTY_TURN: tuple[Message, ...] = ({"role": "user", "content": ""},)
SHARES = {"movie": 0.26, "amazon": 0.14, "nyt": 0.14, "tweets": 0.14, "clean": 0.16, "offensive": 0.16}
OFFENSIVE_FROM = -1.5  # a Davidson tweet below this is drawn as often as one above: the raw file is 4 to 1
JOIN_ODDS = (0.5, 0.3, 0.2)  # of one, two, three texts
LABEL_LIMIT = 6.0
TREE_TOKENS = 320


@dataclass(frozen=True)
class Template:
    """Token ids around an answer: the rendered empty user turn before it, the closing tokens after it."""

    prompt: list[int]
    closing: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Template":
        """Read both from the tokenizer's chat template."""
        opened = render(tokenizer, EMPTY_TURN, open_answer=True)
        full = render(tokenizer, (*EMPTY_TURN, {"role": "assistant", "content": "x"}))
        closing = full.removeprefix(opened + "x")
        return cls(*(tokenizer(text, add_special_tokens=False).input_ids for text in (opened, closing)))


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], open_answer: bool = False) -> str:
    """The text the chat template writes; with `open_answer`, up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_answer)
    return str(text)


def dialogue_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a whole dialogue as the chat template writes it, closing tokens included."""
    ids: list[int] = tokenizer(render(tokenizer, messages), add_special_tokens=False).input_ids
    return ids


@dataclass(frozen=True)
class Joined:
    """Ids of one to three texts in a row; `targets[t]` is the summed label at the end of the text token t is in."""

    ids: list[int]
    targets: list[float]
    progress: list[float]  # share of its own text read up to and with the token, in (0, 1]

    @property
    def ends(self) -> list[int]:
        """How many tokens have been read where a text ends, for each text in turn."""
        return [count + 1 for count, share in enumerate(self.progress) if share == 1.0]


def join(texts: Sequence[tuple[list[int], float]], limit: float = LABEL_LIMIT) -> Joined:
    """Concatenate tokenised texts and sum their labels, the running sum clipped to +-limit."""
    ids: list[int] = []
    targets: list[float] = []
    progress: list[float] = []
    total = 0.0
    for tokens, label in texts:
        total = float(np.clip(total + label, -limit, limit))
        ids += tokens
        targets += [total] * len(tokens)
        progress += [(i + 1) / len(tokens) for i in range(len(tokens))]
    return Joined(ids, targets, progress)


class Deck:
    """Endless draws from n items, each pass in a new random order."""

    def __init__(self, size: int) -> None:
        self.size, self.order = size, list[int]()

    def draw(self, rng: np.random.Generator) -> int:
        """Index of the next item; `rng` shuffles whenever the pass is over."""
        if not self.order:
            self.order = [int(i) for i in rng.permutation(self.size)]
        return self.order.pop()


class Sampler:
    """Draws joined texts and preference pairs; its whole state can be saved and restored."""

    def __init__(
        self,
        rated: Sequence[Rated],
        pairs: Sequence[Preference],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokenizer, self.pairs = tokenizer, pairs
        self.pools: dict[str, list[Rated]] = {}
        for item in rated:
            self.pools.setdefault(pool_of(item), []).append(item)
        self.decks = {name: Deck(len(pool)) for name, pool in self.pools.items()} | {"pairs": Deck(len(pairs))}

    def texts(self, count: int) -> list[Joined]:
        """`count` rated texts, drawn by the shares of their sources, in joined groups."""
        joined = []
        while count > 0:
            size = min(count, 1 + int(self.rng.choice(len(JOIN_ODDS), p=JOIN_ODDS)))
            joined.append(join([self._tokenised(first=i == 0) for i in range(size)]))
            count -= size
        return joined

    def preferences(self, count: int) -> list[Preference]:
        """`count` preference pairs."""
        return [self.pairs[self.decks["pairs"].draw(self.rng)] for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Random state and the rest of every deck."""
        return {
            "rng": self.rng.bit_generator.state,
            "decks": {k: list(d.order) for k, d in self.decks.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, on the same data."""
        self.rng.bit_generator.state = state["rng"]
        for name, order in state["decks"].items():
            self.decks[name].order = list(order)

    def _tokenised(self, first: bool) -> tuple[list[int], float]:
        shares = np.array([SHARES[name] for name in self.pools])
        pool = list(self.pools)[int(self.rng.choice(len(shares), p=shares / shares.sum()))]
        item = self.pools[pool][self.decks[pool].draw(self.rng)]
        text = item.text if first else " " + item.text
        return self.tokenizer(text, add_special_tokens=False).input_ids, item.label


def pool_of(item: Rated) -> str:
    """Name of the pool a text is drawn from: its source, Davidson's in two halves."""
    if item.source != "davidson":
        return item.source
    return "offensive" if item.label < OFFENSIVE_FROM else "clean"


@dataclass
class Places:
    """Where the losses read the flattened (B * L) scores; every list of one group is parallel."""

    final: list[int] = field(default_factory=list)
    final_target: list[float] = field(default_factory=list)
    cut_closed: list[int] = field(default_factory=list)
    cut_open: list[int] = field(default_factory=list)
    cut_target: list[float] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    open_target: list[float] = field(default_factory=list)
    open_weight: list[float] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        """One list as a tensor: int64 places or float32 targets and weights."""
        values = getattr(self, name)
        return torch.tensor(values, dtype=torch.float32 if name.endswith(("target", "weight")) else torch.int64)


class BatchBuilder:
    """Packs texts and pairs into trees and keeps the places the losses need, as (row, node)."""

    def __init__(self, template: Template, rng: np.random.Generator, cuts: int = 3) -> None:
        self.template, self.rng, self.cuts = template, rng, cuts
        self.trees = [TokenTree()]
        self.places = Places()

    def add_text(self, text: Joined) -> None:
        """One joined text: a closed end after each of its texts, every open position, and random closed cuts."""
        row, prompt = self._row(), self.template.prompt
        at = [self._place(row, node) for node in self._insert(text.ids)][len(prompt) - 1 :]
        targets = [0.0, *text.targets]  # at[0] is the end of the prompt: nothing said, nothing earned
        length = len(text.ids)
        for end in text.ends:
            self.places.final.append(self._place(row, self._insert(text.ids[:end])[-1]))
            self.places.final_target.append(targets[end])
        self.places.open += at[: length + 1]
        self.places.open_target += targets
        self.places.open_weight += [1.0, *text.progress]
        for cut in self.rng.integers(0, length, size=self.cuts):
            self.places.cut_closed.append(self._place(row, self._insert(text.ids[:cut])[-1]))
            self.places.cut_open.append(at[cut])
            self.places.cut_target.append(targets[cut])

    def add_pair(self, chosen: list[int], rejected: list[int]) -> None:
        """One preference pair, rendered and tokenised; the score is read at each dialogue's last token."""
        row = self._row()
        for ids, places in ((chosen, self.places.chosen), (rejected, self.places.rejected)):
            places.append(self._place(row, self.trees[row].add(ids)[-1]))

    def build(self) -> tuple[TreeBatch, Places]:
        """The batch, and the places flattened to its width."""
        batch = collate(self.trees)
        width = batch.input_ids.shape[1]
        for name in ("final", "cut_closed", "cut_open", "open", "chosen", "rejected"):
            flat = [(place >> 16) * width + (place & 0xFFFF) for place in getattr(self.places, name)]
            setattr(self.places, name, flat)
        return batch, self.places

    def _row(self) -> int:
        if len(self.trees[-1]) >= TREE_TOKENS:
            self.trees.append(TokenTree())
        return len(self.trees) - 1

    def _insert(self, ids: list[int]) -> list[int]:
        return self.trees[-1].add(self.template.prompt + ids + self.template.closing)

    @staticmethod
    def _place(row: int, node: int) -> int:
        return row << 16 | node
