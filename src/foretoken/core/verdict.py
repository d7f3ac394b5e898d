"""Verdicts: what a verifier keeps of a draft."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Exactness(enum.Enum):
    """How closely output follows plain decoding, strongest first."""

    BITWISE = "bitwise"  # same tokens, from logits that are the same bits
    NUMERICAL = "numerical"  # same rule; logits may differ in the last bits between batch shapes
    DISTRIBUTION = "distribution"  # same distribution, other tokens for the same seed
    LOSSY = "lossy"  # not the target's distribution

    @staticmethod
    def weakest(*levels: Exactness) -> Exactness:
        """Return the level that a whole made of such parts has."""
        return max(levels, key=list(Exactness).index)


class FinalKind(enum.Enum):
    """Where a verdict's last token comes from."""

    BONUS = "bonus"  # a whole root-to-leaf path was accepted; one more token for free
    RECOVERED = "recovered"  # the target chose a token that was not drafted


@dataclass(frozen=True, slots=True)
class Verdict:
    """The accepted path of a draft and the target's own token after it.

    Args:
        path: Accepted nodes from the root's child downward; the root is not included.
        token_ids: Tokens to emit: those of `path`, then the final token.
        final_kind: Whether the final token is a bonus or recovered.
    """

    path: tuple[int, ...]
    token_ids: tuple[int, ...]
    final_kind: FinalKind

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.path) + 1:
            raise ValueError(
                f"a verdict emits its accepted tokens and one more; got {len(self.path)} accepted "
                f"nodes and {len(self.token_ids)} tokens"
            )

    @property
    def num_accepted(self) -> int:
        """Number of accepted draft tokens; neither root nor final token counts."""
        return len(self.path)

    @property
    def final_id(self) -> int:
        """The token that the target chose itself."""
        return self.token_ids[-1]
