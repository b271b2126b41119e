"""A response as units that can be left out: sentences, words or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from densereward.errors import InvalidRequest
from densereward.methods.base import Params, Response
from densereward.methods.prefixes import spread_evenly, text_boundaries_of

__all__ = ["MOST_UNITS", "UnitParams", "Units"]

MOST_UNITS = 512
"""Units of a response that is still taken: each of them costs a pass, or several."""


class UnitParams(Params):
    """Parameters of the methods that leave parts of a response out.

    Attributes:
        unit: what is left out at a time. Words are what white space separates.
        absent: "remove" takes the unit's tokens out; "blank" puts a space in the place of each.
    """

    unit: Literal["sentence", "word", "token"] = "word"
    absent: Literal["remove", "blank"] = "remove"


@dataclass(frozen=True, slots=True)
class Units:
    """U units.

    Attributes:
        response: the response.
        stops: tokens before each unit's end, in order.
        blank: the token that stands for one that is left out; None removes it.
    """

    response: Response
    stops: Sequence[int]
    blank: int | None

    @classmethod
    def of(cls, response: Response, params: UnitParams) -> Units:
        """Cut a response.

        Raises:
            InvalidRequest: its text is not known, or it has too many units.
        """
        if params.unit == "token":
            stops: Sequence[int] = range(1, response.length + 1)
        else:
            boundaries = text_boundaries_of(f"unit {params.unit!r}", response)
            stops = boundaries.sentences if params.unit == "sentence" else boundaries.words
        if len(stops) > MOST_UNITS:
            raise InvalidRequest(
                f"the response has {len(stops)} {params.unit}s, and {MOST_UNITS} units can be left out in turn; take a "
                "larger unit",
                code="too_many_units",
                field="methods",
                given=len(stops),
                limit=MOST_UNITS,
            )
        if params.absent == "blank" and response.blank_id is None:
            raise InvalidRequest(
                'this tokenizer has no token for a space; use absent: "remove"', code="no_blank", field="methods"
            )
        return cls(response, stops, response.blank_id if params.absent == "blank" else None)

    def without(self, present: Bool[np.ndarray, " U"]) -> list[int]:
        """The response's ids with only some of its units present."""
        kept = np.repeat(present, np.diff(np.asarray(self.stops), prepend=0))
        ids = np.asarray(self.response.ids, dtype=np.int64)
        left: list[int] = (ids[kept] if self.blank is None else np.where(kept, ids, self.blank)).tolist()
        return left

    def spread(self, values: Float64[np.ndarray, " U"]) -> Float64[np.ndarray, " T"]:
        """Each unit's value in equal shares on its tokens."""
        return spread_evenly(values, self.stops)

    def spans(self) -> list[tuple[int, int]]:
        """[start, stop) of each unit, in tokens."""
        return list(pairwise([0, *self.stops]))
