"""Closed prefixes as sequences of their own, on literal ids."""

from __future__ import annotations

import numpy as np

from densereward.capture import Captured, PrefixScores, ScoringInput
from densereward.scoring.reencoding import join_prefixes, split_prefixes

SEQUENCE = ScoringInput([1, 2, 5, 6, 7, 9], 2, 3, 5, closing_ids=[9], needs=frozenset([PrefixScores("closed")]))


def test_each_prefix_is_a_response_that_ended_there() -> None:
    sequence, prefixes = split_prefixes(SEQUENCE)
    assert sequence.needs == frozenset()
    assert [each.token_ids for each in prefixes] == [[1, 2, 9], [1, 2, 5, 9], [1, 2, 5, 6, 9], [1, 2, 5, 6, 7, 9]]
    assert [each.scored_position for each in prefixes] == [2, 3, 4, 5]


def test_only_the_boundaries_that_are_asked_for_are_scored() -> None:
    asked = ScoringInput([1, 2, 5, 6, 7, 9], 2, 3, 5, [9], frozenset([PrefixScores("closed")]), boundaries=[2, 3])
    _, prefixes = split_prefixes(asked)
    assert [len(each.token_ids) for each in prefixes] == [3, 5, 6]
    own = join_prefixes(Captured(1.0, 3), [Captured(float(i), i) for i in range(3)], [2, 3])
    assert own.prefixes["closed"].before == 0.0
    assert own.prefixes["closed"].after.tolist() == [1.0, 2.0]
    assert own.prefixes["closed"].boundaries == [2, 3]


def test_nothing_is_read_before_a_response_without_a_token_before_it() -> None:
    bare = ScoringInput([5, 6], 0, 2, 1, needs=frozenset([PrefixScores("closed")]))
    _, prefixes = split_prefixes(bare)
    assert [each.token_ids for each in prefixes] == [[5], [5, 6]]
    own = join_prefixes(Captured(1.0, 2), [Captured(3.0, 1), Captured(1.0, 2)], None)
    assert own.prefixes["closed"].before is None
    np.testing.assert_array_equal(own.prefixes["closed"].after, [3.0, 1.0])


def test_a_sequence_that_needs_none_stays_as_it_is() -> None:
    plain = ScoringInput([1, 5], 1, 1, 1)
    assert split_prefixes(plain) == (plain, [])
    captured = Captured(1.0, 1)
    assert join_prefixes(captured, [], None) is captured
