"""Coupled verification: the walk stops where plain sampling leaves the tree, and nowhere else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import Draft
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT, TokenTree
from foretoken.core.verdict import Exactness, FinalKind
from foretoken.verifiers import VERIFIERS
from foretoken.verifiers.base import TargetRows
from foretoken.verifiers.coupled import CoupledVerifier
from tests.engines import counting_model, random_table, sampled
from tests.fakes import token_trees
from tests.goodness import FALSE_FAILURE, fit_probability

VOCAB_SIZE = 20
VERIFIER = CoupledVerifier()
GREEDY = SamplingParams()


def verify(table, tree, params=GREEDY, *, before=(), seed=0):
    """Return the verdict on a tree whose rows are those of a table model."""
    text = [*before, tree.token_ids[ROOT]]
    logits = table[torch.tensor(tree.token_ids)]
    rows = TargetRows(logits, logits.argmax(dim=-1).tolist())
    sampler = Sampler(params, seed, len(text))
    return VERIFIER.verify(Draft.from_drafter("test", tree), rows, sampler, text)


def test_rows_of_a_draft_are_those_of_its_span_of_the_step():
    rows = TargetRows(RANDOM, RANDOM.argmax(dim=-1).tolist(), slice(3, 6))
    assert torch.equal(rows.logits, RANDOM[3:6])
    assert rows.argmax_ids == RANDOM[3:6].argmax(dim=-1).tolist()
    for params in (GREEDY, SamplingParams(temperature=1.0)):
        sampler = Sampler(params, 5, 1)
        for node in range(3):
            expected = sampler.choose(RANDOM[3 + node], [0], [1] * node)
            assert rows.choose(node, sampler, [0], [1] * node) == expected


def plain(table, text, params, seed, count):
    """Return the next tokens by plain sampling."""
    text = list(text)
    sampler = Sampler(params, seed, len(text))
    start = len(text)
    for _ in range(count):
        text.append(sampler.choose(table[text[-1]], text))
    return tuple(text[start:])


COUNTING = counting_model(VOCAB_SIZE).table
RANDOM = random_table(VOCAB_SIZE, seed=7, spread=1.0).table


def test_it_is_registered_as_bitwise():
    assert VERIFIERS.load("coupled") is CoupledVerifier
    assert CoupledVerifier.exactness is Exactness.BITWISE


def test_empty_draft_emits_one_token():
    verdict = verify(COUNTING, TokenTree.single(3))
    assert (verdict.path, verdict.token_ids) == ((), (4,))
    assert verdict.final_kind is FinalKind.BONUS


def test_whole_path_gives_a_bonus_token():
    verdict = verify(COUNTING, TokenTree.chain([3, 4, 5]))
    assert (verdict.path, verdict.token_ids) == ((1, 2), (4, 5, 6))
    assert verdict.final_kind is FinalKind.BONUS


def test_first_wrong_token_is_replaced_by_the_targets():
    verdict = verify(COUNTING, TokenTree.chain([3, 4, 9, 6]))
    assert (verdict.path, verdict.token_ids) == ((1,), (4, 5))
    assert verdict.final_kind is FinalKind.RECOVERED


def test_the_branch_that_agrees_is_followed():
    #      3 ─ 8 ─ 9
    #        ├ 4 ─ 7
    #        │   └ 5 ─ 6
    #        └ 2
    tree = TokenTree((3, 8, 4, 2, 9, 7, 5, 6), (-1, 0, 0, 0, 1, 2, 2, 6))
    verdict = verify(COUNTING, tree)
    assert (verdict.path, verdict.token_ids) == ((2, 6, 7), (4, 5, 6, 7))


def test_equal_siblings_do_no_harm():
    tree = TokenTree((3, 4, 4, 5), (-1, 0, 0, 2))
    verdict = verify(COUNTING, tree)
    assert verdict.token_ids in {(4, 5), (4, 5, 6)}
    assert verdict.path in {(1,), (2, 3)}


@given(
    token_trees(max_nodes=12, vocab=VOCAB_SIZE),
    st.integers(0, 2**64 - 1),
    st.sampled_from(
        [
            GREEDY,
            SamplingParams(temperature=1.0),
            SamplingParams(temperature=0.6, top_k=4, min_p=0.05),
            SamplingParams(temperature=1.3, repetition_penalty=1.4, presence_penalty=0.7),
            SamplingParams(frequency_penalty=1.9, logit_bias={2: 3.0, 11: -4.0}),
        ]
    ),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
    st.integers(0, 6),
)
def test_emitted_tokens_are_those_of_plain_sampling(tree, seed, params, before, num_true):
    text = [*before, tree.token_ids[ROOT]]
    truth = plain(RANDOM, text, params, seed, num_true)
    # A random tree, and some of the right tokens in it.
    tree, _ = TokenTree.merge([tree, TokenTree.chain([text[-1], *truth])])
    verdict = verify(RANDOM, tree, params, before=before, seed=seed)
    assert verdict.num_accepted >= num_true
    assert verdict.token_ids == plain(RANDOM, text, params, seed, len(verdict.token_ids))
    # The path is one of the tree, spells the tokens, and could not have gone on.
    assert tuple(tree.path(verdict.path[-1] if verdict.path else ROOT)[1:]) == verdict.path
    assert tuple(tree.token_ids[node] for node in verdict.path) == verdict.token_ids[:-1]
    children = tree.children[verdict.path[-1] if verdict.path else ROOT]
    assert verdict.final_id not in {tree.token_ids[child] for child in children}
    assert (verdict.final_kind is FinalKind.RECOVERED) == bool(children)


def test_first_two_tokens_fit_the_target_under_a_skewed_tree():
    """Chi-square of (first, second) token over seeds; correct code fails for one in a million.

    The tree proposes what the target finds unlikely more often than not, repeats a sibling, and
    goes deeper below the unlikely tokens.
    """
    vocab_size, num_seeds, root = 5, 4000, 0
    table = random_table(vocab_size, seed=12, spread=1.2).table
    probs = table.softmax(dim=-1)
    unlikely = probs[root].argsort().tolist()
    tree = TokenTree.single(root)
    tree = TokenTree(
        (root, unlikely[0], unlikely[1], unlikely[1], unlikely[3], unlikely[0], unlikely[2]),
        (-1, 0, 0, 0, 0, 1, 4),
    )
    params = sampled(2)
    pairs = []
    for seed in range(num_seeds):
        emitted = list(verify(table, tree, params, before=[2], seed=seed).token_ids)
        if len(emitted) < 2:  # the next step, with an empty draft
            next_tree = TokenTree.single(emitted[0])
            emitted += verify(table, next_tree, params, before=[2, root], seed=seed).token_ids
        pairs.append(emitted[0] * vocab_size + emitted[1])
    joint = (probs[root][:, None] * probs).reshape(-1)
    assert fit_probability(torch.tensor(pairs), joint) > FALSE_FAILURE


def test_choice_ignores_rows_of_nodes_that_were_not_reached():
    table = COUNTING.clone()
    table[9] = float("nan")
    verdict = verify(table, TokenTree((3, 9, 4), (-1, 0, 0)))
    assert verdict.token_ids == (4, 5)


def test_greedy_ties_go_to_the_lowest_id():
    table = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    assert verify(table, TokenTree.chain([5, 0, 0])).token_ids == (0, 0, 0)
