"""Samples for drafts: their law, their order, and how a short supply is shared."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.drawing import draw_iid, draw_without_replacement, share_draws
from tests.goodness import FALSE_FAILURE, fit_probability

PROBS = np.array([0.4, 0.0, 0.1, 0.3, 0.2, 0.0])
NUM_SAMPLES = 6000


def pairs(draw):
    """Return the first two draws of many trials as one number each."""
    generator = np.random.default_rng(7)
    drawn = np.array([draw(PROBS, 2, generator) for _ in range(NUM_SAMPLES)])
    return torch.from_numpy(drawn[:, 0] * len(PROBS) + drawn[:, 1])


def test_independent_draws_have_the_law_of_independent_draws():
    """Chi-square of both draws together; correct code fails for one seed in a million."""
    law = np.outer(PROBS, PROBS).reshape(-1)
    assert fit_probability(pairs(draw_iid), torch.from_numpy(law)) > FALSE_FAILURE


def test_draws_without_replacement_have_the_law_of_one_after_the_other():
    """Chi-square of both draws together; correct code fails for one seed in a million."""
    law = np.outer(PROBS, PROBS) / (1 - PROBS)[:, None]
    np.fill_diagonal(law, 0)
    law = torch.from_numpy(law.reshape(-1))
    assert fit_probability(pairs(draw_without_replacement), law) > FALSE_FAILURE
    # The same counts do not look like independent draws.
    independent = torch.from_numpy(np.outer(PROBS, PROBS).reshape(-1))
    assert fit_probability(pairs(draw_without_replacement), independent) < 1e-30


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6, 50])
def test_the_support_is_what_can_be_drawn_without_replacement(count):
    drawn = draw_without_replacement(PROBS, count, np.random.default_rng(1))
    assert len(drawn) == len(set(drawn)) == min(count, 4)
    assert set(drawn) <= {0, 2, 3, 4}
    assert all(type(token_id) is int for token_id in drawn)


def test_a_shorter_list_is_the_start_of_a_longer_one():
    """Draws are in order, so asking for fewer takes the first ones, not the likeliest."""
    for draw in (draw_iid, draw_without_replacement):
        long = draw(PROBS, 4, np.random.default_rng(3))
        assert draw(PROBS, 2, np.random.default_rng(3)) == long[:2]


class LastNumber:
    """A generator whose uniform numbers are the largest there are."""

    def random(self, count):
        return np.full(count, np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("scale", [1.0, 3e-320, 1e300])
def test_rounding_draws_no_token_of_weight_zero(scale):
    for probs in (PROBS * scale, PROBS[::-1] * scale):
        assert probs[draw_iid(probs, 3, LastNumber())].min() > 0


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 20))
def test_a_supply_goes_around_before_anybody_gets_more(wanted, available):
    shares = share_draws(wanted, available)
    assert sum(shares) == min(sum(wanted), available)
    for place, (share, want) in enumerate(zip(shares, wanted, strict=True)):
        assert 0 <= share <= want
        for other, (other_share, other_want) in enumerate(zip(shares, wanted, strict=True)):
            if share < want:  # nobody else got more, but those who come first one
                assert other_share <= share + (other < place)
            del other_want
