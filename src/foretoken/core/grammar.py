"""What the sampler asks of a grammar; the engines that answer live with the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class GrammarState(Protocol):
    """A grammar's view of one request: a pure function of what was generated.

    Every method takes the prompt and output so far, a live list that only grows, and draft tokens
    after them. An implementation may remember where it was; the answer must not depend on it.
    """

    def allowed(self, token_ids: Sequence[int], path: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Return which tokens may come next, [V]; not to be written to.

        Nothing but end-of-sequence tokens is allowed once the text is complete and can't go on.

        Raises:
            RequestError: The grammar became too complex to follow.
        """
        ...

    def forced(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens that the grammar leaves no choice about, possibly none."""
        ...

    def is_complete(self, token_ids: Sequence[int], path: Sequence[int] = ()) -> bool:
        """Return whether the text is whole and nothing can follow it."""
        ...
