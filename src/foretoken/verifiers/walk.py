"""Walking down a draft along tokens that somebody else chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT, TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.verifiers.base import TargetRows


def follow(tree: TokenTree, choose: Callable[[int, Sequence[int]], int]) -> Verdict:
    """Descend while a child carries the chosen token; the first token that none has is the last.

    Args:
        tree: The draft's.
        choose: Maps a node, and the tokens emitted so far, to the token after it.
    """
    node = ROOT
    nodes: list[int] = []
    emitted: list[int] = []
    while True:
        chosen_id = choose(node, emitted)
        emitted.append(chosen_id)
        matching = [child for child in tree.children[node] if tree.token_ids[child] == chosen_id]
        if not matching:
            kind = FinalKind.RECOVERED if tree.children[node] else FinalKind.BONUS
            return Verdict(tuple(nodes), tuple(emitted), kind)
        node = matching[0]
        nodes.append(node)


def follow_target(
    tree: TokenTree, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
) -> Verdict:
    """Let the target choose its own token at each node, as plain decoding does.

    With temperature 0 this is greedy verification (SpecInfer, arXiv:2305.09781, VerifyGreedy),
    which every rule is then.
    """
    return follow(tree, lambda node, path: rows.choose(node, sampler, token_ids, path))
