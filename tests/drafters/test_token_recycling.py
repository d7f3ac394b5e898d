"""The drafter `token-recycling`: its template, what it learns of rows, and its file."""

import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters.base import DraftContext
from foretoken.drafters.token_recycling import (
    NUM_SUCCESSORS,
    TokenRecyclingDrafter,
    TokenRecyclingOptions,
    make_template,
)
from foretoken.errors import ConfigError
from tests.engines import (
    counting_model,
    finish,
    greedy,
    make_engine,
    make_host,
    micro_model,
    outcome_of,
    plain_ids,
    random_table,
    sampled,
)

VOCAB_SIZE = 26
SAMPLER = Sampler(SamplingParams(), 0, 1)


@pytest.fixture(scope="module")
def host():
    return make_host(counting_model(VOCAB_SIZE))


@pytest.fixture
def build(host):
    return lambda **options: TokenRecyclingDrafter.create(TokenRecyclingOptions(**options), host)


def table_of(drafter):
    return drafter._successors.table


def propose(drafter, last, max_nodes=80, max_depth=80, max_width=None):
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_depth, max_width=max_width)
    context = DraftContext(request_id="r", token_ids=[0, last], sampler=SAMPLER, budget=budget)
    [draft] = drafter.propose([context])
    return draft


def learn(drafter, tree, top_ids, path=()):
    """Let a drafter see the rows of a scored tree."""
    token_ids = (*(tree.token_ids[node] for node in path), 9)
    verdict = Verdict(path, token_ids, FinalKind.RECOVERED)
    draft = Draft.from_drafter("it", tree)
    drafter.commit([outcome_of(verdict, draft=draft, top_ids=np.array(top_ids))])


# -- the template ----------------------------------------------------------------------------


@pytest.fixture
def template(build):
    return build()._template


def test_template_has_the_levels_of_the_paper(template):
    assert np.bincount(template.depths).tolist() == [0, 8, 21, 25, 15, 8, 3]


def test_template_puts_parents_first_and_every_path_once(template):
    paths = []
    for place, (parent, rank) in enumerate(zip(template.parents, template.ranks, strict=True)):
        assert parent < place
        paths.append((*(paths[parent] if parent >= 0 else ()), int(rank)))
        assert len(paths[-1]) == template.depths[place]
    assert len(set(paths)) == len(paths) == 80


def test_levels_hold_the_likeliest_children_and_all_is_in_the_order_of_probability():
    template = make_template((2, 2), (0.6, 0.3, 0.1))
    # 0.6, 0.36 = 0.6 * 0.6, 0.3, and of the two at 0.18 the one below the likelier parent
    assert template.depths.tolist() == [1, 2, 1, 2]
    assert template.parents.tolist() == [-1, 0, -1, 0]
    assert template.ranks.tolist() == [0, 0, 1, 1]


# -- drafts ----------------------------------------------------------------------------------


def plain_fill(template, table, root_id, max_nodes, max_depth, max_width):
    """Fill the template as the method is described, one node after the other."""
    nodes, token_ids, parents, ranks = {}, [root_id], [-1], []
    for place, (above, rank) in enumerate(zip(template.parents, template.ranks, strict=True)):
        parent = nodes.get(int(above)) if above >= 0 else 0
        fits = rank < max_width and template.depths[place] <= max_depth
        if parent is None or not fits or len(ranks) == max_nodes:
            continue
        token_id = int(table[token_ids[parent], rank])
        if token_id >= 0:
            nodes[place] = len(token_ids)
            token_ids.append(token_id)
            parents.append(parent)
            ranks.append(int(rank))
    return tuple(token_ids), tuple(parents), ranks


@given(
    seed=st.integers(0, 999),
    num_known=st.integers(0, NUM_SUCCESSORS),
    max_nodes=st.integers(0, 90),
    max_depth=st.integers(0, 7),
    max_width=st.integers(1, 9),
)
def test_the_draft_is_the_template_filled_with_successors(
    seed, num_known, max_nodes, max_depth, max_width
):
    host = make_host(counting_model(VOCAB_SIZE))
    drafter = TokenRecyclingDrafter.create(TokenRecyclingOptions(), host)
    rng = np.random.default_rng(seed)
    for row in table_of(drafter):
        row[: rng.integers(num_known + 1)] = -2
        row[row == -2] = rng.permutation(VOCAB_SIZE)[: (row == -2).sum()]
    draft = propose(drafter, 5, max_nodes, max_depth, max_width)
    bounds = (max_nodes, max_depth, max_width)
    token_ids, parents, ranks = plain_fill(drafter._template, table_of(drafter), 5, *bounds)
    assert (draft.tree.token_ids, draft.tree.parents) == (token_ids, parents)
    probs = [math.exp(value) for value in draft.draft_logprobs[1:]]
    assert probs == pytest.approx([0.45 / (rank + 1) ** 1.7 for rank in ranks])


def test_nothing_is_drafted_after_a_token_that_was_never_scored(build):
    drafter = build()
    learn(drafter, TokenTree.single(3), [[4, 5]])
    assert propose(drafter, 4).tree == TokenTree.single(4)
    assert propose(drafter, 3, max_nodes=2).tree.sequences == {(3,), (3, 4), (3, 5)}


def test_a_small_budget_goes_to_the_likeliest_nodes(build):
    drafter = build()
    table_of(drafter)[:] = np.arange(NUM_SUCCESSORS)
    tree = propose(drafter, 9, max_nodes=8).tree
    assert tree.sequences == {
        (9,), (9, 0), (9, 1), (9, 2), (9, 3), (9, 0, 0), (9, 0, 1), (9, 1, 0), (9, 0, 0, 0),
    }  # fmt: skip


# -- learning --------------------------------------------------------------------------------


def test_rows_of_rejected_tokens_are_learned_too(build):
    drafter = build()
    tree = TokenTree((1, 2, 3), (-1, 0, 0))
    learn(drafter, tree, [[2, 3], [4, 5], [6, 7]], path=(1,))
    assert table_of(drafter)[[1, 2, 3], :3].tolist() == [[2, 3, -1], [4, 5, -1], [6, 7, -1]]


def test_of_a_token_that_occurs_twice_the_accepted_row_stands(build):
    drafter = build()
    tree = TokenTree((1, 2, 3, 2, 1), (-1, 0, 0, 2, 3))
    learn(drafter, tree, [[10], [11], [12], [13], [14]], path=(1,))
    assert table_of(drafter)[[1, 2, 3], 0].tolist() == [10, 11, 12]
    learn(drafter, tree, [[10], [11], [12], [13], [14]], path=(2, 3))
    assert table_of(drafter)[[1, 2, 3], 0].tolist() == [10, 13, 12]


def test_a_newer_row_replaces_the_whole_older_one(build):
    drafter = build()
    learn(drafter, TokenTree.single(1), [[*range(10, 20)]])  # another drafter asks for ten
    assert table_of(drafter)[1].tolist() == [*range(10, 18)]
    learn(drafter, TokenTree.single(1), [[5, 6]])
    assert table_of(drafter)[1].tolist() == [5, 6, *[-1] * 6]


def test_steps_without_rows_teach_nothing(build):
    drafter = build()
    drafter.commit([outcome_of(Verdict((), (3,), FinalKind.BONUS))])
    assert (table_of(drafter) == -1).all()


@pytest.mark.parametrize("params", [greedy(40), sampled(40, seed=3)], ids=["greedy", "sampled"])
def test_tokens_are_those_of_plain_decoding_and_steps_become_fewer(params):
    target = random_table(VOCAB_SIZE, spread=3.0)
    prompts = [[1, 2], [7], [5, 5, 3]]
    drafter = TokenRecyclingDrafter.create(TokenRecyclingOptions(), make_host(target))
    engine = make_engine(target, {"it": drafter}, max_nodes=12)
    for _ in range(2):
        requests = [engine.add_request(prompt, params) for prompt in prompts]
        finish(engine)
        for prompt, request in zip(prompts, requests, strict=True):
            assert request.output_ids == plain_ids(target, prompt, params)
    assert sum(request.stats.num_steps for request in requests) < 3 * 40 * 0.7


def test_what_one_request_taught_serves_the_next():
    target = counting_model(VOCAB_SIZE)
    drafter = TokenRecyclingDrafter.create(TokenRecyclingOptions(), make_host(target))
    engine = make_engine(target, {"it": drafter}, max_nodes=12)
    num_steps = []
    for _ in range(2):
        request = engine.add_request([3], greedy(20))
        finish(engine)
        num_steps.append(request.stats.num_steps)
    assert num_steps[0] == 20  # every token is new
    assert num_steps[1] <= 5


# -- the file --------------------------------------------------------------------------------


def test_successors_are_there_in_the_next_run(build, tmp_path):
    path = tmp_path / "successors"
    first = build(path=str(path))
    learn(first, TokenTree.single(3), [[4, 5]])
    engine = make_engine(counting_model(VOCAB_SIZE), {"it": first})
    assert not path.exists()
    engine.close()
    second = build(path=str(path))
    assert (table_of(second) == table_of(first)).all()
    assert propose(second, 3, max_nodes=2).tree.sequences == {(3,), (3, 4), (3, 5)}
    learn(second, TokenTree.single(3), [[6, 7]])  # what was read can be written to
    second.close()
    assert table_of(build(path=str(path)))[3, :2].tolist() == [6, 7]


def test_without_a_path_nothing_is_written(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drafter = build()
    learn(drafter, TokenTree.single(3), [[4, 5]])
    drafter.close()
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_used_are_refused(build, tmp_path):
    path = tmp_path / "successors"
    build(path=str(path)).close()
    other = make_host(micro_model(vocab_size=31))
    with pytest.raises(ConfigError, match="another vocabulary"):
        TokenRecyclingDrafter.create(TokenRecyclingOptions(path=str(path)), other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"token-recycling:path .* is damaged"):
        build(path=str(path))
    with pytest.raises(ConfigError, match="folder that does not exist"):
        build(path=str(tmp_path / "no" / "successors"))


def test_a_save_that_fails_is_a_warning(build, tmp_path, monkeypatch):
    def fail(_file):
        raise OSError(28, "No space left on device")

    drafter = build(path=str(tmp_path / "successors"))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(RuntimeWarning, match="were not saved .* No space left"):
        drafter.close()
