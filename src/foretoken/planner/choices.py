"""What a plan says of each request: a way to draft, and the size of its draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foretoken.planner.base import Share
from foretoken.planner.gains import Arm

Choice = tuple[Arm, int]
PLAIN: Choice = ((), 0)


def share_out(
    shares: Sequence[Share], arm: Arm, nodes: NDArray[np.float64], num_best: int
) -> dict[str, Choice]:
    """Return for each request how many of the best nodes of all are its own.

    Args:
        shares: The requests, B.
        arm: The way to draft.
        nodes: What its nodes are worth, [B, N].
        num_best: Nodes to share out; more, where several are worth as much as the last.
    """
    least = np.partition(nodes, nodes.size - num_best, axis=None)[nodes.size - num_best]
    sizes = (nodes >= least).sum(axis=1).tolist()
    return {
        request_id: (arm, size) if size else PLAIN
        for request_id, size in zip(ids_of(shares), sizes, strict=True)
    }


def ids_of(shares: Sequence[Share]) -> list[str]:
    """Return the ids of some requests."""
    return [share.request_id for share in shares]


__all__ = ["PLAIN", "Choice", "ids_of", "share_out"]
