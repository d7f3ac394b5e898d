"""Walking down a draft along tokens that somebody else chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT, TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.verifiers.base import NextToken, TargetRows


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
        child = child_with(tree, node, chosen_id)
        if child is None:
            kind = FinalKind.RECOVERED if tree.children[node] else FinalKind.BONUS
            return Verdict(tuple(nodes), tuple(emitted), kind)
        node = child
        nodes.append(node)


def child_with(tree: TokenTree, node: int, token_id: int) -> int | None:
    """Return the first child of a node that carries a token."""
    for child in tree.children[node]:
        if tree.token_ids[child] == token_id:
            return child
    return None


def follow_target(
    tree: TokenTree, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
) -> Verdict:
    """Let the target choose its own token at each node, as plain decoding does.

    With temperature 0 this is greedy verification (SpecInfer, arXiv:2305.09781, VerifyGreedy),
    which every rule is then.
    """
    return follow(tree, lambda node, path: rows.choose(node, sampler, token_ids, path))


def choose_next(
    tree: TokenTree, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
) -> NextToken:
    """Let the target choose its own token after the root: the first step of `follow_target`."""
    chosen_id = rows.choose(ROOT, sampler, token_ids, ())
    return NextToken(chosen_id, child_with(tree, ROOT, chosen_id))
