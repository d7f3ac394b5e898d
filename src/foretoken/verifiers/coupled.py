"""Coupled verification: the target chooses; the draft only saved the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from foretoken.core.draft import Draft
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Exactness, FinalKind, Verdict
from foretoken.verifiers.base import TargetRows


class CoupledVerifier:
    """Lets the target choose its own token at each node; descends while a child carries it.

    The target's choice uses the keyed noise of its position, so the emitted tokens are by
    construction those of plain decoding with the same seed, whatever was drafted and however.
    With temperature 0 this is greedy verification (SpecInfer, arXiv:2305.09781, VerifyGreedy).
    """

    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def verify(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> Verdict:
        """Walk down from the root as far as the target's own choices go."""
        tree = draft.tree
        node = ROOT
        nodes: list[int] = []
        emitted: list[int] = []
        while True:
            chosen_id = rows.choose(node, sampler, token_ids, emitted)
            emitted.append(chosen_id)
            matching = [
                child for child in tree.children[node] if tree.token_ids[child] == chosen_id
            ]
            if not matching:
                kind = FinalKind.RECOVERED if tree.children[node] else FinalKind.BONUS
                return Verdict(tuple(nodes), tuple(emitted), kind)
            node = matching[0]
            nodes.append(node)
