"""Sampling: each control equals transformers' processor, and choices follow the distribution."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from foretoken.core import sampling
from foretoken.core.noise import gumbel_noise
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import (
    Frontier,
    Sampler,
    best_guesses,
    build_processors,
    build_warpers,
)
from tests.goodness import FALSE_FAILURE, fit_probability

VOCAB_SIZE = 40
TOKEN_IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64])
# Values that float32 holds exactly, as transformers keeps biases in it.
BIASES = st.dictionaries(
    st.integers(0, VOCAB_SIZE - 1), st.integers(-64, 64).map(lambda n: n / 8), min_size=1
)


def random_logits(seed, dtype=torch.float32, shape=(VOCAB_SIZE,)):
    """Return logits without ties, some of them far apart."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def apply_theirs(processors, token_ids, logits):
    """Run transformers' processors on one row."""
    return processors(torch.tensor([token_ids]), logits.unsqueeze(0).clone())[0]


def apply_ours(params, token_ids, logits):
    """Run all controls of `params` on one row, the whole of `token_ids` being the prompt."""
    for process in build_processors(params):
        logits = process(logits, token_ids, len(token_ids))
    for warp in build_warpers(params):
        logits = warp(logits)
    return logits


# -- each control alone ----------------------------------------------------------------------


@given(SEEDS, DTYPES, BIASES, TOKEN_IDS)
def test_logit_bias_equals_transformers_sequence_bias(seed, dtype, bias, token_ids):
    logits = random_logits(seed, dtype)
    ours = sampling.logit_bias(bias)(logits, token_ids, 0)
    theirs = SequenceBiasLogitsProcessor({(key,): value for key, value in bias.items()})
    assert torch.equal(ours, apply_theirs(theirs, token_ids, logits))


@given(SEEDS, DTYPES, TOKEN_IDS, st.integers(0, 12), st.sampled_from([0.5, 0.9, 1.1, 1.3, 2.0]))
def test_repetition_penalty_equals_transformers(seed, dtype, token_ids, num_prompt_ids, penalty):
    logits = random_logits(seed, dtype)
    ours = sampling.repetition_penalty(penalty)(logits, token_ids, num_prompt_ids)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    assert torch.equal(ours, apply_theirs(theirs, token_ids, logits))


@given(SEEDS, DTYPES, st.floats(0.05, 10))
def test_temperature_equals_transformers(seed, dtype, value):
    logits = random_logits(seed, dtype)
    theirs = apply_theirs(TemperatureLogitsWarper(value), [0], logits)
    assert torch.equal(sampling.temperature(value)(logits), theirs)


@given(SEEDS, DTYPES, st.integers(1, VOCAB_SIZE + 5))
def test_top_k_equals_transformers(seed, dtype, count):
    logits = random_logits(seed, dtype)
    ours = sampling.top_k(count)(logits)
    assert torch.equal(ours, apply_theirs(TopKLogitsWarper(count), [0], logits))
    assert ours.isfinite().sum() == min(count, VOCAB_SIZE)


@given(SEEDS, DTYPES, st.floats(1e-6, 1, exclude_max=True))
def test_top_p_equals_transformers(seed, dtype, mass):
    logits = random_logits(seed, dtype)
    ours = sampling.top_p(mass)(logits)
    assert torch.equal(ours, apply_theirs(TopPLogitsWarper(mass), [0], logits))


@pytest.mark.parametrize(("mass", "num_kept"), [(0.5, 2), (0.51, 3), (0.75, 3), (0.25, 1)])
def test_top_p_keeps_no_more_than_reach_the_mass(mass, num_kept):
    """Four equal tokens have exactly a quarter each."""
    logits = torch.zeros(4)
    kept = sampling.top_p(mass)(logits).isfinite().sum()
    assert kept == apply_theirs(TopPLogitsWarper(mass), [0], logits).isfinite().sum() == num_kept


@given(SEEDS, DTYPES, st.floats(0, 1))
def test_min_p_equals_transformers(seed, dtype, share):
    logits = random_logits(seed, dtype)
    ours = sampling.min_p(share)(logits)
    assert torch.equal(ours, apply_theirs(MinPLogitsWarper(share), [0], logits))


@given(SEEDS, TOKEN_IDS, st.integers(0, 12), st.integers(-8, 8), st.integers(-8, 8))
def test_occurrence_penalties_follow_openai_formula(seed, token_ids, num_prompt_ids, freq, pres):
    """Logit - count * frequency - (count > 0) * presence, over the output alone."""
    logits = random_logits(seed, torch.float64)
    frequency, presence = freq / 4, pres / 4
    ours = sampling.occurrence_penalties(frequency, presence)(logits, token_ids, num_prompt_ids)
    output_ids = token_ids[num_prompt_ids:]
    for token_id in range(VOCAB_SIZE):
        count = output_ids.count(token_id)
        penalty = count * frequency + (count > 0) * presence
        assert ours[token_id].item() == pytest.approx(logits[token_id].item() - penalty, abs=1e-12)


@pytest.mark.parametrize(
    "warper", [sampling.top_k(1), sampling.top_k(7), sampling.top_p(1e-9), sampling.min_p(1.0)]
)
def test_the_likeliest_token_always_stays(warper):
    logits = random_logits(5, shape=(200, VOCAB_SIZE))
    assert torch.equal(warper(logits).argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize(
    "warper",
    [sampling.temperature(0.7), sampling.top_k(7), sampling.top_p(0.8), sampling.min_p(0.1)],
)
def test_warpers_take_rows_one_by_one(warper):
    logits = random_logits(5, shape=(9, VOCAB_SIZE))
    assert torch.equal(warper(logits), torch.stack([warper(row) for row in logits]))


# -- all together ----------------------------------------------------------------------------


@given(SEEDS, DTYPES, BIASES, TOKEN_IDS, st.data())
def test_controls_apply_in_transformers_order(seed, dtype, bias, token_ids, data):
    penalty = data.draw(st.sampled_from([1.0, 0.8, 1.2]))
    heat = data.draw(st.sampled_from([1.0, 0.6, 1.7]))
    count = data.draw(st.sampled_from([0, 3, 10, 30]))
    mass = data.draw(st.sampled_from([1.0, 0.5, 0.9]))
    share = data.draw(st.sampled_from([0.0, 0.02, 0.2]))
    params = SamplingParams(
        logit_bias=bias,
        repetition_penalty=penalty,
        temperature=heat,
        top_k=count,
        top_p=mass,
        min_p=share,
    )
    # The order of GenerationMixin._get_logits_processor, and when it adds each.
    theirs = [SequenceBiasLogitsProcessor({(key,): value for key, value in bias.items()})]
    if penalty != 1:
        theirs.append(RepetitionPenaltyLogitsProcessor(penalty))
    if heat != 1:
        theirs.append(TemperatureLogitsWarper(heat))
    if count:
        theirs.append(TopKLogitsWarper(count))
    if mass < 1:
        theirs.append(TopPLogitsWarper(mass))
    if share:
        theirs.append(MinPLogitsWarper(share))
    logits = random_logits(seed, dtype)
    ours = apply_ours(params, token_ids, logits)
    assert torch.equal(ours, apply_theirs(LogitsProcessorList(theirs), token_ids, logits))


def test_only_controls_that_are_on_are_built():
    assert build_processors(SamplingParams()) == []
    assert build_warpers(SamplingParams()) == []
    assert build_warpers(SamplingParams(temperature=1.0)) == []
    assert len(build_warpers(SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1))) == 4


def test_greedy_ignores_what_only_shapes_the_distribution():
    params = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.5)
    assert build_warpers(params) == []
    assert Sampler(params, 0, 1).is_argmax


@pytest.mark.parametrize(
    ("values", "is_argmax"),
    [
        ({}, True),
        ({"temperature": 1.0}, False),
        ({"logit_bias": {1: 2.0}}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.5}, False),
    ],
)
def test_argmax_needs_greedy_without_processors(values, is_argmax):
    assert Sampler(SamplingParams(**values), 0, 1).is_argmax is is_argmax


# -- choices ---------------------------------------------------------------------------------


EVERYTHING = SamplingParams(
    temperature=0.8,
    top_k=20,
    top_p=0.95,
    min_p=0.01,
    logit_bias={3: 1.5, 4: -2.0},
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    presence_penalty=0.4,
)
SETTINGS = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.3),
    "hot": SamplingParams(temperature=3.0),
    "top-k": SamplingParams(temperature=1.0, top_k=5),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
    "min-p": SamplingParams(temperature=1.5, min_p=0.1),
    "everything": EVERYTHING,
    "greedy": SamplingParams(),
    "greedy with penalties": replace(EVERYTHING, temperature=0.0),
}
PROMPT_IDS, OUTPUT_IDS = [1, 2, 3], [5, 5, 9]


@pytest.mark.parametrize("name", [name for name in SETTINGS if not SETTINGS[name].is_greedy])
def test_choices_follow_the_processed_distribution(name):
    """Chi-square of 1,200 seeds' choices; fails by chance once in a million."""
    params, history = SETTINGS[name], PROMPT_IDS + OUTPUT_IDS
    logits = random_logits(11, torch.float64) / 2
    processed = logits
    for process in build_processors(params):
        processed = process(processed, history, len(PROMPT_IDS))
    for warp in build_warpers(params):
        processed = warp(processed)
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
