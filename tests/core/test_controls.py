"""Controls that look at the history: each equals transformers' processor of the same name."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foretoken.core.controls import build_controls
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.errors import ConfigError
from tests.controls import (
    CyclicGrammar,
    edited_by_numpy,
    edited_by_them,
    edited_by_torch,
    history_controls,
)

VOCAB_SIZE = 40
EOS_IDS = (7, 3)
CONTROLS = history_controls(VOCAB_SIZE)
TOKEN_IDS = st.lists(st.integers(0, 5) | st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=16)
DTYPES = st.sampled_from([torch.float32, torch.float64])
WAYS = pytest.mark.parametrize("edited", [edited_by_numpy, edited_by_torch], ids=["numpy", "torch"])


@st.composite
def rows(draw, *, has_infinities=True):
    """Rows with ties, far outliers and, if wanted, tokens that are ruled out already."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    row = torch.randn(VOCAB_SIZE, generator=generator, dtype=torch.float64) * 4
    if draw(st.booleans()):
        row = row.round()
    if has_infinities:
        row[draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5))] = -torch.inf
    return row.to(draw(DTYPES))


def equal(ours, theirs):
    assert ours.dtype == theirs.dtype
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CONTROLS)
@settings(max_examples=30)
@given(rows(), TOKEN_IDS, st.integers(0, 16), st.data())
def test_each_control_alone_equals_theirs(name, row, token_ids, num_prompt_ids, data):
    num_prompt_ids = min(num_prompt_ids, len(token_ids))
    params = SamplingParams(**{name: data.draw(CONTROLS[name])})
    theirs = edited_by_them(params, row, token_ids, num_prompt_ids, EOS_IDS)
    for edited in (edited_by_numpy, edited_by_torch):
        ours = edited(params, row, token_ids, num_prompt_ids, eos_ids=EOS_IDS)
        assume(ours.isfinite().any())
        assert equal(ours, theirs)


@settings(max_examples=100)
@given(
    rows(),
    TOKEN_IDS,
    st.integers(0, 16),
    st.integers(0, 16),
    st.fixed_dictionaries({}, optional=CONTROLS),
)
def test_all_controls_together_equal_theirs(row, token_ids, num_prompt_ids, num_standing, values):
    """In transformers' order; some of the tokens are a draft's path."""
    try:
        params = SamplingParams(**values)
    except ConfigError:
        assume(False)
    num_prompt_ids = min(num_prompt_ids, len(token_ids))
    standing, path = token_ids[:num_standing], token_ids[num_standing:]
    theirs = edited_by_them(params, row, token_ids, num_prompt_ids, EOS_IDS)
    for edited in (edited_by_numpy, edited_by_torch):
        ours = edited(params, row, standing, num_prompt_ids, eos_ids=EOS_IDS, path=path)
        assume(ours.isfinite().any())
        assert equal(ours, theirs)


@WAYS
@pytest.mark.parametrize(
    ("values", "token_ids", "banned"),
    [
        ({"no_repeat_ngram_size": 1}, [3, 5, 3], {3, 5}),
        ({"no_repeat_ngram_size": 2}, [3, 5, 3], {5}),
        ({"no_repeat_ngram_size": 3}, [3, 5, 3, 5], {3}),
        ({"no_repeat_ngram_size": 4}, [3, 5, 3], set()),
        ({"no_repeat_ngram_size": 2}, [3], set()),
        ({"bad_words_ids": [[9], [1, 2, 4], [2, 5], [3, 2, 6], [7]]}, [1, 2], {9, 4, 5}),
        ({"bad_words_ids": [[1, 2, 4]]}, [2], set()),
        ({"min_new_tokens": 3, "stop_token_ids": [9]}, [1, 2, 2], {7, 3, 9}),
        ({"min_new_tokens": 3, "stop_token_ids": [9]}, [1, 2, 2, 2], set()),
        ({"suppress_tokens": [7, 8]}, [1], {7, 8}),
        ({"allowed_token_ids": [4, 6]}, [1], set(range(VOCAB_SIZE)) - {4, 6}),
    ],
)
def test_what_is_banned_is_worked_out_by_hand(edited, values, token_ids, banned):
    row = torch.arange(VOCAB_SIZE).float()
    ours = edited(SamplingParams(**values), row, token_ids, 1, eos_ids=EOS_IDS)
    assert set((ours == -torch.inf).nonzero().flatten().tolist()) == banned
    left = [token_id for token_id in range(VOCAB_SIZE) if token_id not in banned]
    assert torch.equal(ours[left], row[left])


@WAYS
def test_openai_penalties_follow_their_formula(edited):
    """Logit - count * frequency - (count > 0) * presence, over the output alone."""
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    ours = edited(params, torch.zeros(VOCAB_SIZE), [1, 1, 2, 2, 3, 2], 2)
    assert ours[[1, 2, 3, 4]].tolist() == [0.0, -(3 * 0.5 + 0.25), -(0.5 + 0.25), 0.0]


@WAYS
def test_sequence_bias_needs_the_tokens_before(edited):
    params = SamplingParams(
        logit_bias={5: 1.0}, sequence_bias=[([1, 2, 5], 2.0), ([2, 5], 4.0), ([3, 5], 8.0)]
    )
    row = torch.zeros(VOCAB_SIZE)
    assert edited(params, row, [1, 2], 1)[5] == 7
    assert edited(params, row, [2], 1)[5] == 5
    assert edited(params, row, [2, 3], 1)[5] == 9


@WAYS
@pytest.mark.parametrize("narrower", [0, 1, 30])
def test_a_grammar_rules_out_what_it_does_not_show(edited, narrower):
    grammar = CyclicGrammar(VOCAB_SIZE, narrower=narrower)
    row = torch.arange(VOCAB_SIZE).double()
    ours = edited(SamplingParams(), row, [3, 6], 1, grammar=grammar, path=[1])
    allowed = [i for i in range(VOCAB_SIZE - narrower) if i % 3 == 2]
    assert ours.isfinite().nonzero().flatten().tolist() == allowed
    assert torch.equal(ours[allowed], row[allowed])


@WAYS
def test_a_grammar_may_be_wider_than_the_row(edited):
    """A draft model may have fewer logits than the tokenizer has tokens."""
    ours = edited(SamplingParams(), torch.zeros(10), [2], 1, grammar=CyclicGrammar(VOCAB_SIZE))
    assert ours.isfinite().nonzero().flatten().tolist() == [0, 3, 6, 9]


@WAYS
def test_tokens_that_the_row_does_not_have_are_passed_over(edited):
    """Embeddings may hold more tokens than there are logits, as transformers allows."""
    params = SamplingParams(
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        logit_bias={2: 1.0, 90: 1.0},
        no_repeat_ngram_size=1,
        suppress_tokens=[91],
        bad_words_ids=[[92]],
        allowed_token_ids=[0, 1, 2, 3, 93],
        min_new_tokens=9,
    )
    ours = edited(params, torch.ones(5), [1, 90, 91], 1, eos_ids=(94,))
    assert ours.tolist() == [1.0, -torch.inf, 2.0, 1.0, -torch.inf]


def test_only_controls_that_are_on_are_built_and_in_order():
    assert build_controls(SamplingParams(), frozenset(EOS_IDS), None) == {}
    values = {
        "suppress_tokens": [1],
        "allowed_token_ids": [2],
        "min_new_tokens": 1,
        "bad_words_ids": [[1]],
        "no_repeat_ngram_size": 2,
        "presence_penalty": 1.0,
        "repetition_penalty": 2.0,
        "sequence_bias": [([1], 1.0)],
        "logit_bias": {1: 1.0},
    }
    built = build_controls(SamplingParams(**values), frozenset(EOS_IDS), CyclicGrammar(9))
    assert list(built) == [
        "logit_bias",
        "sequence_bias",
        "repetition_penalty",
        "frequency_penalty and presence_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "min_new_tokens",
        "allowed_token_ids",
        "suppress_tokens",
        "grammar",
    ]


@pytest.mark.parametrize("values", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
def test_the_result_does_not_depend_on_what_was_asked_before(values):
    """Paths go back and forth; a sampler that starts there says the same."""
    rng, params = np.random.default_rng(5), SamplingParams(**values)
    token_ids, sampler = rng.integers(0, 6, 10).tolist(), Sampler(params, 1, 4)
    for _ in range(200):
        if rng.random() < 0.3:
            token_ids += rng.integers(0, 6, 2).tolist()
        path = rng.integers(0, 6, rng.integers(0, 4)).tolist()
        row = torch.from_numpy(rng.standard_normal((1, VOCAB_SIZE)))
        fresh = Sampler(params, 1, 4)
        assert torch.equal(
            sampler.scores(row, token_ids, [path]), fresh.scores(row, [*token_ids, *path], [()])
        )
