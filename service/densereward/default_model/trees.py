"""Token trees: many sequences that share beginnings, scored in one forward pass.

Every text here begins with the same template tokens, every closed cut of a text with the text itself, and the two
dialogues of a preference pair with their common turns. A tree holds each shared token once; a token attends to its
ancestors only, so its hidden state is the one it would have in its own sequence (up to rounding).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class TokenTree:
    """Tokens with their parents (-1 at a root), in an order that puts every parent before its children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, ids: Sequence[int]) -> list[int]:
        """Insert one sequence; return, for each of its tokens, the index of the node that holds it."""
        nodes: list[int] = []
        parent = -1
        for token in ids:
            key = (parent, token)
            if key not in self._children:
                self._children[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
            parent = self._children[key]
            nodes.append(parent)
        return nodes

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TreeBatch:
    """Trees side by side: ids and positions (B, L) int64, mask (B, 1, L, L) bool, true where attention is allowed."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor


def collate(trees: Sequence[TokenTree]) -> TreeBatch:
    """Lay trees out as rows of one batch, padded to the largest; a padding token sees only itself."""
    length = max(len(tree) for tree in trees)
    ids = np.zeros((len(trees), length), dtype=np.int64)
    positions = np.zeros((len(trees), length), dtype=np.int64)
    allowed = np.tile(np.eye(length, dtype=bool), (len(trees), 1, 1, 1))
    for row, tree in enumerate(trees):
        ids[row, : len(tree)] = tree.tokens
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                positions[row, node] = positions[row, parent] + 1
                allowed[row, 0, node] |= allowed[row, 0, parent]
    return TreeBatch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(allowed))


def score_nodes(backbone: torch.nn.Module, head: torch.nn.Module, batch: TreeBatch) -> Tensor:
    """Score at every node, (B, L) float32: the decoder under the caller's autocast, the head always in float32."""
    hidden = backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).last_hidden_state
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        scores: Tensor = head(hidden.float()).squeeze(-1)
    return scores
