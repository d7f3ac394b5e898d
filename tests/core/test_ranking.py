"""Ranking: argmax, the best few, and the race in one sweep, against plain torch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.noise import gumbel_noise
from foretoken.core.ranking import RaceRows, argmax_ids, best_in_race, best_tokens, race_winner

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# A term 16 below the best is left out, and the exponential is good to a thousandth near there.
ESTIMATE = 1e-3


def random_rows(num_rows, vocab_size, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * spread


def expected_best(scores, width, temperature=1.0):
    """Return what `best_tokens` should: sorted stably, so that ties go to the lowest id."""
    order = scores.double().sort(dim=-1, descending=True, stable=True).indices[:, :width]
    logprobs = (scores.double() / temperature).log_softmax(dim=-1).gather(1, order)
    return order.tolist(), logprobs.tolist()


# -- argmax ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 64, 1000])
def test_argmax_takes_the_lowest_of_equal_entries(dtype, vocab_size):
    scores = torch.randint(0, 3, (50, vocab_size)).to(dtype)
    expected = [row.index(max(row)) for row in scores.tolist()]
    assert argmax_ids(scores) == expected


def test_argmax_of_no_rows():
    assert argmax_ids(torch.empty(0, 5)) == []


# -- the best few ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (3, 63), (2, 64), (4, 65), (3, 2048)])
def test_best_tokens_are_those_of_a_sort(dtype, temperature, spread, num_rows, vocab_size):
    scores = random_rows(num_rows, vocab_size, spread).to(dtype)
    ids, logprobs = best_tokens(scores, 4, temperature)
    expected_ids, expected_logprobs = expected_best(scores, 4, temperature)
    assert ids == expected_ids
    torch.testing.assert_close(
        torch.tensor(logprobs), torch.tensor(expected_logprobs), rtol=0, atol=ESTIMATE
    )


@given(
    st.lists(st.sampled_from([-math.inf, -3.0, 0.0, 0.5, 0.5, 7.0]), min_size=1, max_size=200),
    st.integers(1, 9),
)
def test_ties_go_to_the_lowest_id_and_what_is_ruled_out_is_left_out(entries, width):
    scores = torch.tensor([entries])
    [ids], [logprobs] = best_tokens(scores, width)
    allowed = sorted(
        (index for index, entry in enumerate(entries) if entry > -math.inf),
        key=lambda index: (-entries[index], index),
    )
    assert ids == allowed[:width]
    assert len(logprobs) == len(ids)
    assert logprobs == sorted(logprobs, reverse=True)


def test_rows_of_different_lengths():
    scores = torch.full((3, 100), -math.inf)
    scores[1, 70] = 2.0
    scores[2, [3, 99]] = 1.0
    ids, logprobs = best_tokens(scores, 4)
    assert ids == [[], [70], [3, 99]]
    assert logprobs[1] == pytest.approx([0.0], abs=1e-12)
    assert logprobs[2] == pytest.approx([-math.log(2)] * 2)


def test_entries_that_are_not_numbers_are_left_out():
    [ids], _ = best_tokens(torch.tensor([[math.nan, 1.0, math.nan, 2.0]]), 3)
    assert ids == [3, 1]


def test_dtypes_that_numpy_does_not_know_are_ranked_by_torch():
    scores = random_rows(3, 500).to(torch.bfloat16)
    ids, logprobs = best_tokens(scores, 4)
    # bfloat16 has ties, which torch's topk resolves as it likes: the values must agree.
    assert torch.equal(scores.gather(1, torch.tensor(ids)), scores.topk(4).values)
    assert all(row == sorted(row, reverse=True) for row in logprobs)


def test_rows_that_are_not_contiguous():
    scores = random_rows(8, 300)
    assert best_tokens(scores[::2, 50:250], 3) == best_tokens(scores[::2, 50:250].clone(), 3)


# -- the race --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 13.0])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 2048])
def test_race_winner_is_the_argmax_of_the_sum(dtype, temperature, vocab_size):
    logits = random_rows(40, vocab_size).to(dtype)
    noise = gumbel_noise(5, range(40), vocab_size, CPU)
    expected = argmax_ids(logits / temperature + noise)
    found = [race_winner(*pair, temperature) for pair in zip(logits, noise, strict=True)]
    assert found == expected


def test_race_winner_takes_the_lowest_of_equal_entries():
    logits = torch.tensor([-math.inf, 1.0, 2.0, 2.0, 1.0])
    assert race_winner(logits, torch.zeros(5, dtype=torch.float64), 1.0) == 2
    assert race_winner(logits - math.inf, torch.zeros(5, dtype=torch.float64), 1.0) == 0


def test_best_in_race_ranks_each_row_by_its_own_request():
    logits = random_rows(5, 300)
    noise = gumbel_noise(5, [3, 9], 300, CPU)
    race = RaceRows((1.0, 0.7, 0.7, 1.0, 2.0), 0.4, (1, 0, 0, -1, 1), noise)
    ids, logprobs = best_in_race(logits, 4, race)
    for row, temperature in enumerate(race.temperatures):
        scores = (logits[row] / temperature).double()
        if race.noise_of[row] >= 0:
            scores = scores + noise[race.noise_of[row]]
        expected = expected_best(scores.unsqueeze(0), 4, race.race_temperature)
        assert ids[row] == expected[0][0]
        assert logprobs[row] == pytest.approx(expected[1][0], abs=ESTIMATE)
