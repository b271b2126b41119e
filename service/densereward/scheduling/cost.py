"""What a batch costs: tokens, and pairs of a query and a key, with a shared prompt counted once.

A token costs its matrix products. A pair of a query and a key costs little, and only adds up in long sequences.
`EngineFacts.pair_cost` says what a pair costs in tokens. See `engines.torch.packing` for how a batch is laid out.
"""

from __future__ import annotations

from dataclasses import dataclass

from densereward.capture import ScoringInput

__all__ = ["BatchCost", "Cost", "SequenceCost", "cost_of"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a forward pass does.

    Attributes:
        tokens: tokens that run through the model.
        pairs: pairs of a query and a key it attends to, in one head of one layer.
    """

    tokens: int = 0
    pairs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.pairs + other.pairs)

    def work(self, pair_cost: float) -> float:
        """Tokens and pairs together, in tokens' worth."""
        return self.tokens + pair_cost * self.pairs


@dataclass(frozen=True, slots=True)
class SequenceCost:
    """What a sequence adds to a batch.

    Attributes:
        prompt_ids: the prompt, where it can be shared; otherwise empty.
        prompt: counted once a batch, for the first sequence with this prompt.
        own: counted for every sequence: what follows the prompt (all of it where nothing can be shared), and its
            closed prefixes.
    """

    prompt_ids: tuple[int, ...]
    prompt: Cost
    own: Cost


def cost_of(
    sequence: ScoringInput, known: dict[tuple[int, ...], tuple[int, ...]] | None = None, *, shares: bool = True
) -> SequenceCost:
    """What a sequence adds to a batch.

    Args:
        sequence: the sequence.
        known: prompts met so far; a prompt met again is stored once.
        shares: whether the engine runs a prompt of several sequences once.
    """
    length = len(sequence.token_ids)
    shareable = sequence.prompt_length if shares and 0 < sequence.prompt_length < length else 0
    prompt_ids = tuple(sequence.token_ids[:shareable])
    return SequenceCost(
        prompt_ids=prompt_ids if known is None else known.setdefault(prompt_ids, prompt_ids),
        prompt=_causal(0, shareable),
        own=_causal(shareable, length - shareable) + _closed_prefixes(sequence),
    )


def _causal(before: int, tokens: int) -> Cost:
    """Tokens that attend to all that is before them and, causally, to each other."""
    return Cost(tokens, tokens * before + tokens * (tokens + 1) // 2)


def _closed_prefixes(sequence: ScoringInput) -> Cost:
    """The closing tokens of every closed prefix; each attends to the prompt, the response so far and its own block."""
    size, blocks = len(sequence.closing_ids), sequence.closed_prefixes
    before = len(blocks) * sequence.prompt_length + sum(blocks)
    return Cost(size * len(blocks), size * before + len(blocks) * (size * (size + 1) // 2))


class BatchCost:
    """The cost of a batch as it grows.

    Args:
        pair_cost: what a query and a key cost, in tokens' worth.

    Attributes:
        total: the cost of all that was added.
    """

    def __init__(self, pair_cost: float) -> None:
        self._pair_cost = pair_cost
        self._prompts: set[tuple[int, ...]] = set()
        self.total = Cost()

    @property
    def work(self) -> float:
        """The total in tokens' worth."""
        return self.total.work(self._pair_cost)

    def of(self, item: SequenceCost) -> Cost:
        """What a sequence would add."""
        return item.own if item.prompt_ids in self._prompts else item.prompt + item.own

    def add(self, item: SequenceCost) -> Cost:
        """Add a sequence; what it added."""
        added = self.of(item)
        self._prompts.add(item.prompt_ids)
        self.total += added
        return added

    def fits(self, item: SequenceCost, limit: float) -> bool:
        """Whether the work would stay within a limit, in tokens' worth."""
        left = limit - self.work
        # The first half refuses most of what does not fit, and compares no prompts.
        return item.own.work(self._pair_cost) <= left and self.of(item).work(self._pair_cost) <= left
