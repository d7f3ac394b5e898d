"""Keyed noise: frozen values, and draws that nothing tells from independent samples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core import noise
from foretoken.core.noise import NoiseBlocks, derive_seed, gumbel_noise
from tests.goodness import FALSE_FAILURE, fit_probability, independence_probability

CPU = torch.device("cpu")
NUM_DRAWS = 8_000


def stack_noise(keys, vocab_size):
    """Return the noise of several (seed, position) pairs, [n, V]."""
    return torch.cat([gumbel_noise(seed, [position], vocab_size, CPU) for seed, position in keys])


@pytest.fixture(scope="module")
def over_positions():
    """Noise of one seed at consecutive positions, [n, 64]."""
    return gumbel_noise(7, range(NUM_DRAWS), 64, CPU)


@pytest.fixture(scope="module")
def over_seeds():
    """Noise of consecutive seeds at one position, [n, 64]."""
    return stack_noise([(seed, 41) for seed in range(NUM_DRAWS)], 64)


DISTRIBUTIONS = {
    "uniform": torch.full((64,), 1 / 64),
    "two of many": torch.tensor([0.0] * 31 + [0.25, 0.75] + [0.0] * 31),
    "zipf": 1 / torch.arange(1, 65),
    "geometric": 0.7 ** torch.arange(64.0),
    "peaked": torch.tensor([0.001 / 63] * 40 + [0.999] + [0.001 / 63] * 23),
}
DISTRIBUTIONS = {name: p.double() / p.double().sum() for name, p in DISTRIBUTIONS.items()}


# -- frozen values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "position", "expected"),
    [
        (0, 0, [0.0173312731738756, 1.74344560639287, -0.0153525725837186, -0.703252362056787]),
        (7, 3, [1.33070881190695, -0.419019816766454, -1.15249787922388, 2.06903437958094]),
        (2**63, 100_000, [2.80930544112248, 2.1602270178642, -0.780970207437159, 0.2919533525972]),
        (
            2**64 - 1,
            2**31,
            [0.306480360118656, 1.719098168549, 0.852562751341945, -0.79944342790723],
        ),
    ],
)
def test_noise_is_frozen(seed, position, expected):
    """A seed printed by one version must give the same tokens with the next."""
    values = gumbel_noise(seed, [position], 4, CPU)[0]
    assert values.dtype == torch.float64
    # Logarithms differ between libraries in the last bit.
    assert values.tolist() == pytest.approx(expected, rel=1e-13)


def test_derived_seeds_are_frozen():
    assert [derive_seed(7, index) for index in range(3)] == [
        7,
        4414019431610648415,
        5090977316425868581,
    ]


def test_noise_of_the_last_of_many_tokens_is_frozen():
    assert float(gumbel_noise(7, [3], 151_936, CPU)[0, -1]) == pytest.approx(
        2.2286804418592, rel=1e-13
    )


# -- what the noise depends on ---------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 2, 61, 999])
def test_smaller_vocabulary_gets_a_prefix(vocab_size):
    small = gumbel_noise(7, [3], vocab_size, CPU)
    assert torch.equal(small, gumbel_noise(7, [3], 1000, CPU)[:, :vocab_size])


def test_noise_is_a_pure_function_of_its_key():
    state = torch.random.get_rng_state()
    first = gumbel_noise(7, [3], 100, CPU)
    first.clone().zero_()
    torch.manual_seed(0)
    again = gumbel_noise(7, [3], 100, CPU)
    torch.random.set_rng_state(state)
    assert torch.equal(first, again)


def test_noise_handed_out_may_be_changed():
    gumbel_noise(7, [3], 100, CPU).zero_()
    assert gumbel_noise(7, [3], 100, CPU).any()


def test_neighbouring_keys_share_no_noise():
    keys = [(seed, position) for seed in range(40) for position in range(40)]
    noise = stack_noise(keys, 40).flatten()
    assert len(noise.unique()) == len(noise)


def test_positions_of_one_call_are_those_of_many():
    together = gumbel_noise(7, [5, 3, 900], 61, CPU)
    assert torch.equal(together, stack_noise([(7, 5), (7, 3), (7, 900)], 61))


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from([5, 9])), max_size=40))
def test_blocks_give_the_same_noise_in_any_order(requests):
    blocks = NoiseBlocks(7)
    for position, vocab_size in requests:
        expected = gumbel_noise(7, [position], vocab_size, CPU)[0]
        assert torch.equal(blocks.row(position, vocab_size, CPU), expected)


@given(st.integers(0, 40), st.integers(1, 30))
def test_rows_ahead_are_those_of_their_positions(position, num_wanted):
    blocks = NoiseBlocks(7)
    rows = blocks.rows(position, 5, num_wanted)
    assert min(num_wanted, NoiseBlocks.BLOCK // 2) <= len(rows) <= num_wanted
    for place, row in enumerate(rows):
        assert torch.equal(row, blocks.row(position + place, 5, CPU))
    assert len(blocks._blocks) <= 2  # nothing is computed far ahead


def test_blocks_far_behind_are_forgotten():
    blocks = NoiseBlocks(7)
    for position in range(50 * NoiseBlocks.BLOCK):
        blocks.row(position, 5, CPU)
    assert len(blocks._blocks) <= 3


def test_noise_is_finite(over_positions, over_seeds):
    assert over_positions.isfinite().all()
    assert over_seeds.isfinite().all()


@pytest.mark.parametrize("bits", [0, -1])
def test_outermost_hashes_have_finite_noise(bits):
    """All bits 0 and all bits 1: uniform variates just above 0 and just below 1."""
    uniform = float(noise._uniform_by_torch(torch.tensor([bits])))
    extreme = -math.log(-math.log(uniform))
    assert math.isfinite(extreme)
    assert extreme < -3.6 if bits == 0 else extreme > 36


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(1, 300))
def test_compiled_hash_is_that_of_other_devices(keys, vocab_size):
    """The integers must be the same everywhere, and so must the variates made of them."""
    token_keys = noise._token_keys(vocab_size, CPU)
    position_keys = torch.tensor([noise._signed(key) for key in keys]).unsqueeze(1)
    by_torch = noise._uniform_by_torch(noise._mix(token_keys ^ position_keys))
    compiled = noise._uniform(token_keys.numpy().view(np.uint64), np.array(keys, dtype=np.uint64))
    assert np.array_equal(compiled, by_torch.numpy())


@pytest.mark.gpu
def test_noise_is_the_same_on_every_device():
    """The integers are the same; logarithms may differ in the last bits."""
    for seed, position in ((0, 0), (7, 3), (2**64 - 1, 2**31)):
        here = gumbel_noise(seed, [position], 50_000, CPU)
        there = gumbel_noise(seed, [position], 50_000, torch.device("cuda")).cpu()
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


# -- distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["over_positions", "over_seeds"])
def test_noise_is_gumbel(source, request):
    """Chi-square of 512,000 variates in 1,000 bins; fails by chance once in a million."""
    noise = request.getfixturevalue(source)
    uniform = torch.exp(-torch.exp(-noise)).flatten()
    bins = (uniform * 1000).long().clamp_(max=999)
    assert fit_probability(bins, torch.full((1000,), 1e-3)) > FALSE_FAILURE


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("source", ["over_positions", "over_seeds"])
def test_race_draws_from_p(source, name, request):
    """Chi-square of 8,000 winners against p; fails by chance once in a million."""
    probs = DISTRIBUTIONS[name]
    winners = (probs.log() + request.getfixturevalue(source)).argmax(-1)
    assert fit_probability(winners, probs) > FALSE_FAILURE


@pytest.mark.parametrize("source", ["over_positions", "over_seeds"])
def test_very_peaked_race_has_one_winner(source, request):
    """The others have 1e-11 together; 8,000 draws fail by chance in 8 of 100 million."""
    probs = torch.full((64,), 1e-11 / 63, dtype=torch.float64)
    probs[17] = 1 - 1e-11
    winners = (probs.log() + request.getfixturevalue(source)).argmax(-1)
    assert winners.unique().tolist() == [17]


@pytest.mark.parametrize("name", ["uniform", "zipf"])
def test_draw_of_one_key_does_not_favour_any_of_many_tokens(name):
    """Chi-square of 2,000 winners of 4,096 in 64 groups; fails by chance once in a million."""
    probs = DISTRIBUTIONS[name].repeat_interleave(64) / 64
    noise = stack_noise([(seed, 5 * seed) for seed in range(2000)], len(probs))
    winners = (probs.log() + noise).argmax(-1)
    assert fit_probability(winners // 64, DISTRIBUTIONS[name]) > FALSE_FAILURE
    assert fit_probability(winners % 64, DISTRIBUTIONS["uniform"]) > FALSE_FAILURE


@pytest.mark.parametrize("lag", [1, 2, 16])
@pytest.mark.parametrize("source", ["over_positions", "over_seeds"])
def test_neighbouring_draws_are_independent(source, lag, request):
    """Contingency chi-square of draws `lag` apart; fails by chance once in a million."""
    probs = DISTRIBUTIONS["uniform"][:6]
    winners = (probs.log() + request.getfixturevalue(source)[:, :6]).argmax(-1)
    assert independence_probability(winners[:-lag], winners[lag:], 6) > FALSE_FAILURE


@pytest.mark.parametrize("lag", [1, 2, 32])
def test_noise_of_neighbouring_tokens_is_independent(over_positions, lag):
    """Contingency chi-square of deciles of two tokens; fails by chance once in a million."""
    deciles = (torch.exp(-torch.exp(-over_positions)) * 10).long().clamp_(max=9)
    first, second = deciles[:, :-lag].flatten(), deciles[:, lag:].flatten()
    assert independence_probability(first, second, 10) > FALSE_FAILURE


# -- derived seeds ---------------------------------------------------------------------------


def test_first_choice_keeps_the_seed():
    assert derive_seed(123, 0) == 123


def test_derived_seeds_differ_and_are_seeds():
    seeds = {derive_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 50 * 50
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_choices_of_one_request_are_independent():
    """Contingency chi-square of two choices' draws; fails by chance once in a million."""
    pairs = [(derive_seed(seed, 1), derive_seed(seed, 2)) for seed in range(3000)]
    first, second = (
        stack_noise([(pair[choice], 9) for pair in pairs], 6).argmax(-1) for choice in (0, 1)
    )
    assert independence_probability(first, second, 6) > FALSE_FAILURE
