"""Where tokens are chosen, and what may be known of a place beforehand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foretoken.certify.observe import Decision
from foretoken.certify.places import PlaceLog, Stratum
from foretoken.core.draft import Draft, Draws, SiblingDraw
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.verifiers.base import TargetRows


def places(draft, path, way):
    request = SimpleNamespace(sampler=object(), output_ids=[0] * (len(path) + 1))
    log = PlaceLog([request], [way])
    tokens = tuple(draft.tree.token_ids[node] for node in path)
    verdict = Verdict(path, (*tokens, 9), FinalKind.RECOVERED)
    logits = torch.arange(3.0 * len(draft.tree)).view(-1, 3)
    log.watch(Decision(draft, TargetRows(logits, []), request.sampler, verdict))
    log.watch(Decision(draft, TargetRows(logits, []), object(), verdict))  # somebody else's
    nodes = [0, *path]
    assert [row.tolist() for row in log.rows(request)] == [logits[it].tolist() for it in nodes]
    return log.places(request)


def test_strata_of_a_chain_and_its_bonus():
    draft = Draft.from_drafter("", TokenTree.chain([1, 2, 3, 4]))
    found = places(draft, (1, 2, 3), SiblingDraw.DETERMINISTIC)
    assert [place.stratum for place in found] == [
        Stratum.FIRST, Stratum.SECOND, Stratum.DEEPER, Stratum.BONUS,
    ]  # fmt: skip
    assert [place.depth for place in found] == [1, 2, 3, 4]
    assert [place.children for place in found] == [(2,), (3,), (4,), None]


def test_a_step_without_a_draft():
    [place] = places(Draft.empty(5), (), SiblingDraw.DETERMINISTIC)
    assert (place.stratum, place.children) == (Stratum.NO_DRAFT, None)


@pytest.mark.parametrize("way", [SiblingDraw.COUPLED, SiblingDraw.IID])
def test_children_that_chance_chose_are_not_used(way):
    """Given what the race or the dice will say, drafted children are likelier than p says."""
    draft = Draft.from_drafter("", TokenTree.chain([1, 2]), siblings=way)
    place = places(draft, (), way)[0]
    assert (place.stratum, place.children, place.draft_probs) == (Stratum.FIRST, None, None)


def test_distributions_of_several_drafters_are_averaged():
    tree = TokenTree((1, 0, 2), (-1, 0, 0))
    groups = (
        Draws(nodes=(1,), probs=np.array([1.0, 0, 0])),
        Draws(nodes=(2,), probs=np.array([0.0, 0.5, 0.5])),
    )
    draft = Draft.from_drafter("", tree, siblings=SiblingDraw.IID, draws={0: groups})
    place = places(draft, (), SiblingDraw.IID)[0]
    assert place.draft_probs.tolist() == [0.5, 0.25, 0.25]
