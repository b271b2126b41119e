"""Binds a policy's tokenizer to a reward model's: samples in the policy's ids go out, one reward per id comes back.

    binding.py   what is sent for a response, and how its end is read
    text.py      the text that ids write, with the byte span of each
    bound.py     a sample ready to be sent, and the way of its rewards back to the policy's ids

If both have the same vocabulary, ids are sent as they are. Otherwise the response is sent as text with the byte spans
of the policy's tokens; both are put together from the ids.

A policy ends its response with an EOS, and a reward model reads its score at the closing tokens of its template. So the
EOS stands for the closing tokens, and what they add to the score is the EOS's reward.
"""

from .binding import Binding
from .bound import Bound
from .text import Text

__all__ = ["Binding", "Bound", "Text"]
