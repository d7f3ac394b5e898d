"""Sampling: choices follow the distribution of the controls, and failures end nobody else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.core import edits, ranking, sampling, warpers
from foretoken.core.noise import gumbel_noise
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Frontier, Sampler, best_guesses
from foretoken.errors import RequestError
from tests.controls import CyclicGrammar, their_processors, warped_by_them, warper_controls
from tests.goodness import FALSE_FAILURE, fit_probability

VOCAB_SIZE = 40
TOKEN_IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def random_logits(seed, dtype=torch.float32, shape=(VOCAB_SIZE,)):
    """Return logits without ties, some of them far apart."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def test_greedy_ignores_what_only_shapes_the_distribution():
    shaped = {name: 0.3 for name in warper_controls() if name != "top_k"}
    sampler = Sampler(SamplingParams(temperature=0, top_k=3, **shaped), 0, 1)
    assert sampler.is_argmax
    assert sampler.is_plain


@pytest.mark.parametrize(
    ("values", "is_argmax"),
    [
        ({}, True),
        ({"temperature": 1.0}, False),
        ({"logit_bias": {1: 2.0}}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.5}, False),
        ({"no_repeat_ngram_size": 2}, False),
        ({"bad_words_ids": [[1]]}, False),
        ({"min_new_tokens": 1}, False),
        ({"allowed_token_ids": [1]}, False),
        ({"suppress_tokens": [1]}, False),
        ({"sequence_bias": [([1], 1.0)]}, False),
        ({"logits_processors": [lambda input_ids, scores: scores]}, False),
        ({"stop_token_ids": [1]}, True),
    ],
)
def test_argmax_needs_greedy_without_processors(values, is_argmax):
    assert Sampler(SamplingParams(**values), 0, 1).is_argmax is is_argmax


# -- choices ---------------------------------------------------------------------------------


def tilt(input_ids, scores):
    """A user's processor that looks at the history."""
    return scores + 0.1 * (input_ids.sum() % 7) - scores.abs() * 0.01


EVERYTHING = SamplingParams(
    temperature=0.8,
    top_h=0.9,
    top_k=20,
    top_p=0.95,
    min_p=0.01,
    typical_p=0.9,
    epsilon_cutoff=0.001,
    eta_cutoff=0.001,
    logit_bias={3: 1.5, 4: -2.0},
    sequence_bias=[([9, 3], 1.0)],
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    presence_penalty=0.4,
    no_repeat_ngram_size=2,
    bad_words_ids=[[9, 2], [6]],
    min_new_tokens=5,
    stop_token_ids=[8],
    suppress_tokens=[7],
    allowed_token_ids=list(range(1, VOCAB_SIZE)),
    logits_processors=[tilt],
)
SETTINGS = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=3.0),
    "top-k": SamplingParams(temperature=1.0, top_k=5),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
    "min-p": SamplingParams(temperature=1.5, min_p=0.1),
    "typical": SamplingParams(temperature=1.5, typical_p=0.6),
    "eta": SamplingParams(temperature=1.5, eta_cutoff=0.05),
    "n-grams": SamplingParams(temperature=1.0, no_repeat_ngram_size=1),
    "processor": SamplingParams(temperature=1.0, logits_processors=[tilt]),
    "everything": EVERYTHING,
    "greedy": SamplingParams(),
    "greedy with penalties": replace(EVERYTHING, temperature=0.0),
}
PROMPT_IDS, OUTPUT_IDS = [1, 2, 3], [5, 5, 9]


@pytest.mark.parametrize("name", [name for name in SETTINGS if not SETTINGS[name].is_greedy])
def test_choices_follow_the_processed_distribution(name):
    """Chi-tilt of 1,200 seeds' choices; fails by chance once in a million."""
    params, history = SETTINGS[name], PROMPT_IDS + OUTPUT_IDS
    logits = random_logits(11, torch.float64) / 2
    processors = their_processors(params, len(PROMPT_IDS))
    edited = processors(torch.tensor([history]), logits.unsqueeze(0).clone())[0]
    processed = warped_by_them(params, edited)
    winners = [
        Sampler(params, seed, len(PROMPT_IDS)).choose(logits, history) for seed in range(1200)
    ]
    assert fit_probability(torch.tensor(winners), processed.softmax(-1)) > FALSE_FAILURE


def test_choice_is_the_winner_of_the_race_at_its_position():
    logits = random_logits(11, torch.float64)
    scores = logits + gumbel_noise(9, [6], VOCAB_SIZE, logits.device)[0]
    sampler = Sampler(SamplingParams(temperature=1.0), 9, len(PROMPT_IDS))
    assert sampler.choose(logits, PROMPT_IDS + OUTPUT_IDS) == scores.argmax()


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=20)
@given(SEEDS, st.integers(0, 2**64 - 1), TOKEN_IDS)
def test_path_counts_as_history(name, seed, key, path):
    """A choice below draft tokens is the one plain decoding makes after emitting them."""
    sampler = Sampler(SETTINGS[name], key, len(PROMPT_IDS))
    logits = random_logits(seed)
    history = PROMPT_IDS + OUTPUT_IDS
    below = sampler.race_scores(logits.unsqueeze(0), history, [path])
    assert torch.equal(below, sampler.race_scores(logits.unsqueeze(0), history + path, [[]]))
    assert sampler.choose(logits, history, path) == sampler.choose(logits, history + path)


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=20)
@given(SEEDS, st.integers(0, 2**64 - 1), DTYPES, st.integers(0, 3), st.integers(1, 5))
def test_scores_of_a_batch_equal_those_of_its_rows(name, seed, key, dtype, depth, num_rows):
    sampler = Sampler(SETTINGS[name], key, len(PROMPT_IDS))
    logits = random_logits(seed, dtype, (num_rows, VOCAB_SIZE))
    history = PROMPT_IDS + OUTPUT_IDS
    paths = [[(seed + row * step) % VOCAB_SIZE for step in range(depth)] for row in range(num_rows)]
    scores = sampler.race_scores(logits, history, paths)
    assert scores.shape == logits.shape
    for row, path in enumerate(paths):
        alone = sampler.race_scores(logits[row : row + 1], history, [path])
        assert torch.equal(scores[row], alone[0])
        assert sampler.choose(logits[row], history, path) == scores[row].argmax()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_never_changed(name, dtype):
    params = SETTINGS[name]
    logits = random_logits(21, dtype, (2, VOCAB_SIZE))
    before = logits.clone()
    sampler = Sampler(params, 7, len(PROMPT_IDS))
    scores = sampler.race_scores(logits, PROMPT_IDS + OUTPUT_IDS, [[1], [2]])
    sampler.choose(logits[0], PROMPT_IDS + OUTPUT_IDS)
    assert torch.equal(logits, before)
    assert params.is_greedy or scores.data_ptr() != logits.data_ptr()


@given(st.lists(st.integers(-2, 2), min_size=2, max_size=30))
def test_greedy_breaks_ties_to_the_lowest_id(values):
    logits = torch.tensor(values, dtype=torch.float32)
    choice = Sampler(SamplingParams(), 0, 1).choose(logits, [0])
    assert choice == values.index(max(values))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_way_of_other_devices_is_the_same(name, monkeypatch):
    """Rows that numpy cannot read are edited, warped and ranked by torch."""
    rows, history = random_logits(8, shape=(20, VOCAB_SIZE)), PROMPT_IDS + OUTPUT_IDS

    def all_of_it():
        sampler = Sampler(SETTINGS[name], 5, len(PROMPT_IDS), eos_ids=frozenset({10}))
        chosen_ids = [sampler.choose(row, history, (1,)) for row in rows]
        probs = [sampler.distribution(row, history, (1,)) for row in rows]
        return chosen_ids, np.stack(probs), sampler.scores(rows, history, [(1,)] * len(rows))

    by_numpy = all_of_it()
    for module in (edits, ranking, sampling, warpers):
        monkeypatch.setattr(module, "is_numpy", lambda scores: False)
    by_torch = all_of_it()
    assert by_torch[0] == by_numpy[0]
    assert np.array_equal(by_torch[1], by_numpy[1])
    assert torch.equal(by_torch[2], by_numpy[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    logits = random_logits(3, dtype)
    sampler = Sampler(EVERYTHING, 7, 1)
    scores = sampler.race_scores(logits.unsqueeze(0), [1], [[]])
    assert torch.equal(scores, sampler.race_scores(logits.float().unsqueeze(0), [1], [[]]))


def test_dropped_tokens_never_win():
    logits = random_logits(3)
    allowed = set(logits.topk(2).indices.tolist())
    params = SamplingParams(temperature=50.0, top_k=2)
    choices = {Sampler(params, seed, 1).choose(logits, [1]) for seed in range(200)}
    assert choices == allowed


def test_almost_greedy_is_greedy():
    """At temperature 1e-4 the likeliest token leads by far more than any noise."""
    logits = random_logits(3)
    params = SamplingParams(temperature=1e-4)
    lead = (logits.topk(2).values[0] - logits.topk(2).values[1]).item()
    assert lead / 1e-4 > -math.log(1e-20)
    assert Sampler(params, 7, 1).choose(logits, [1]) == logits.argmax()


# -- guesses of drafters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["greedy", "plain", "hot"], list(SETTINGS)], ids=["plain", "all"]
)
@settings(max_examples=10)
@given(SEEDS, st.integers(0, 2), st.lists(st.integers(1, 3), min_size=8, max_size=8), DTYPES)
def test_guesses_are_ranked_by_the_race_of_each_request(names, seed, depth, counts, dtype):
    """Requests with and without noise and controls in one call, each as if it were alone."""
    frontiers, expected = [], []
    logits = random_logits(seed, dtype, (sum(counts), VOCAB_SIZE))
    start = 0
    for index, count in enumerate(counts):
        params = SETTINGS[names[(seed + index) % len(names)]]
        sampler = Sampler(params, seed + index, len(PROMPT_IDS))
        history = PROMPT_IDS + OUTPUT_IDS[:index]
        paths = [tuple((row + step) % VOCAB_SIZE for step in range(depth)) for row in range(count)]
        frontiers.append(Frontier(sampler, history, paths))
        scores = sampler.race_scores(logits[start : start + count], history, paths)
        expected += scores.double().sort(dim=-1, descending=True, stable=True).indices.tolist()
        start += count
    token_ids, logprobs = best_guesses(logits, frontiers, 3, 0.5)
    for found, order, values in zip(token_ids, expected, logprobs, strict=True):
        assert found == order[: len(found)]
        assert len(values) == len(found) >= 1
        assert values == sorted(values, reverse=True)
        assert values[0] <= 1e-3


# -- failures --------------------------------------------------------------------------------


NOTHING_LEFT = {
    "bans": ({"suppress_tokens": list(range(VOCAB_SIZE))}, None),
    "n-grams": ({"no_repeat_ngram_size": 1, "allowed_token_ids": [1, 2]}, None),
    "grammar": ({}, CyclicGrammar(VOCAB_SIZE, dead_ends=(9,))),
    "processor": ({"logits_processors": [lambda _, scores: scores - torch.inf]}, None),
}


def failing_sampler(name, heat):
    values, grammar = NOTHING_LEFT[name]
    params = SamplingParams(temperature=heat, **values)
    return Sampler(params, 3, len(PROMPT_IDS), grammar=grammar)


HISTORY = PROMPT_IDS + OUTPUT_IDS


@pytest.mark.parametrize("heat", [0, 0.7])
@pytest.mark.parametrize("name", NOTHING_LEFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_without_a_token_to_choose_fails_the_request(name, heat, dtype):
    sampler = failing_sampler(name, heat)
    chosen_id = sampler.choose(random_logits(1, dtype), HISTORY)
    assert 0 <= chosen_id < VOCAB_SIZE
    assert isinstance(sampler.failure, RequestError)
    assert sampler.failure.hint
    other = failing_sampler(name, heat)
    probs = other.distribution(random_logits(1), HISTORY)
    assert str(other.failure) == str(sampler.failure)
    assert probs.sum() == pytest.approx(1)


def test_the_message_names_the_controls_in_force():
    sampler = failing_sampler("n-grams", 0)
    sampler.choose(random_logits(1), HISTORY)
    assert "no_repeat_ngram_size, allowed_token_ids" in str(sampler.failure)
    assert "after 6 tokens" in str(sampler.failure)


def test_the_first_failure_is_kept():
    sampler = failing_sampler("bans", 0)
    sampler.choose(random_logits(1), HISTORY)
    first = sampler.failure
    sampler.choose(random_logits(1), [*HISTORY, 4])
    assert sampler.failure is first


@pytest.mark.parametrize("heat", [0, 0.7])
@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_drafts_without_a_token_to_guess_fail_nothing(name, heat):
    """Plain decoding would not have come there, so the request cannot fail of it."""
    sampler = failing_sampler(name, heat)
    rows = random_logits(1, shape=(2, VOCAB_SIZE))
    assert (sampler.race_scores(rows, HISTORY, [(), ()]) == -torch.inf).all()
    assert not sampler.draft_distribution(rows[0], HISTORY).any()
    assert best_guesses(rows, [Frontier(sampler, HISTORY, [(), ()])], 3, 0.5) == (
        [[], []],
        [[], []],
    )
    assert sampler.failure is None


def test_a_draft_row_that_is_padded_out_whole_yields_no_guesses():
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.5), 3, 1)
    rows = torch.full((1, VOCAB_SIZE), -torch.inf)
    assert best_guesses(rows, [Frontier(sampler, HISTORY, [()])], 3, 0.5) == ([[]], [[]])
    assert sampler.failure is None


def test_a_processor_that_fails_on_a_draft_does_not_fail_the_request():
    def fragile(input_ids, scores):
        if input_ids[0, -1] == 30:
            raise KeyError("thirty")
        return scores

    sampler = Sampler(SamplingParams(logits_processors=[fragile]), 3, 1)
    rows = random_logits(1, shape=(2, VOCAB_SIZE))
    scores = sampler.scores(rows, HISTORY, [(30,), (31,)])
    assert (scores[0] == -torch.inf).all()
    assert torch.equal(scores[1], rows[1])
    assert sampler.failure is None
    sampler.choose(rows[0], HISTORY, [30])
    assert "logits_processors[0] (fragile) raised KeyError: 'thirty'" in str(sampler.failure)


class BrokenGrammar(CyclicGrammar):
    def allowed(self, token_ids, path=()):
        if path:
            raise RequestError("the grammar became too complex", hint="simplify it")
        return super().allowed(token_ids, path)


def test_a_grammar_that_gives_up_fails_the_target_alone():
    sampler = Sampler(SamplingParams(), 3, 1, grammar=BrokenGrammar(VOCAB_SIZE))
    rows = random_logits(1, shape=(1, VOCAB_SIZE))
    assert (sampler.scores(rows, HISTORY, [(3,)]) == -torch.inf).all()
    assert sampler.failure is None
    assert sampler.choose(rows[0], HISTORY) % 3 == 1
    assert sampler.failure is None
    sampler.choose(rows[0], HISTORY, [3])
    assert str(sampler.failure) == "the grammar became too complex"


def test_a_grammar_holds_whatever_a_processor_returns():
    def revive(input_ids, scores):
        return torch.where(scores.isfinite(), scores - 50, torch.zeros_like(scores))

    params = SamplingParams(logits_processors=[revive])
    sampler = Sampler(params, 3, 1, grammar=CyclicGrammar(VOCAB_SIZE))
    assert sampler.grammar is not None
    for seed in range(20):
        assert sampler.choose(random_logits(seed), HISTORY) % 3 == 1
    assert sampler.failure is None


@pytest.mark.parametrize("name", SETTINGS)
def test_distribution_is_the_softmax_of_the_scores(name):
    sampler, row = Sampler(SETTINGS[name], 3, 3), random_logits(4, torch.float64)
    scores = sampler.scores(row.unsqueeze(0), HISTORY, [(1,)])[0]
    probs = sampler.distribution(row, HISTORY, (1,))
    assert np.array_equal(probs, sampler.draft_distribution(row, HISTORY, (1,)))
    if sampler.is_greedy:
        assert probs.tolist() == [float(i == scores.argmax()) for i in range(VOCAB_SIZE)]
    else:
        assert np.array_equal(probs, scores.softmax(-1).numpy())
    assert sampler.failure is None
