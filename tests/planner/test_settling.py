"""Counting from which depth on guesses are right, also where that is known in part only."""

import random

import pytest

from foretoken.planner.settling import QUANTA, Settling

SETTLE = (0.5, 0.2, 0.1, 0.2)


def test_shares_are_those_of_what_was_seen():
    """A thousand tokens of which the last hundred count: 4.5 standard errors are 0.23."""
    settling, draws = Settling(4), random.Random(0)
    for depth in draws.choices((1, 2, 3, 4), SETTLE, k=1000):
        settling.observe(depth, depth)
    assert settling.estimate() == pytest.approx(SETTLE, abs=0.23)


def test_shares_sum_to_one_in_whole_parts():
    settling = Settling(5)
    for depth in (1, 5, 5, 3):
        settling.observe(depth, depth)
        shares = settling.estimate()
        assert sum(shares) == 1.0
        assert all(share * QUANTA == int(share * QUANTA) for share in shares)


def test_what_is_known_in_part_is_shared_as_exact_tokens_say():
    """Most tokens tell only whether depth 2 was early enough; one in eight tells all."""
    settling, draws = Settling(4), random.Random(1)
    for number, depth in enumerate(draws.choices((1, 2, 3, 4), SETTLE, k=2000)):
        if number % 8 == 0:
            settling.observe(depth, depth)
        elif depth <= 2:
            settling.observe(1, 2)
        else:
            settling.observe(3, 4)
    shares = settling.estimate()
    assert sum(shares[:2]) == pytest.approx(0.7, abs=0.2)
    assert shares[0] > shares[1]
    assert shares[3] > shares[2]


def test_doubt_lets_new_tokens_count():
    sure, doubtful = Settling(3), Settling(3)
    for settling in (sure, doubtful):
        for _ in range(300):
            settling.observe(3, 3)
    doubtful.doubt(8.0)
    for settling in (sure, doubtful):
        for _ in range(6):
            settling.observe(1, 1)
    assert sure.estimate()[0] < 0.2 < 0.4 < doubtful.estimate()[0]


def test_weights_that_grow_for_ever_stay_numbers():
    """Ten thousand tokens: the weights pass what is scaled down several times."""
    settling = Settling(2)
    for _ in range(10_000):
        settling.observe(2, 2)
    before = settling.estimate()
    settling.observe(1, 1)
    assert before[1] > 0.95
    assert 0 < settling.estimate()[0] < 0.1
