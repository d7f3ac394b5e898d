"""Warpers: each equals transformers' warper of the same name, alone and all together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.core.params import SamplingParams
from foretoken.core.warpers import has_filters, warp
from tests.controls import (
    shares,
    warped_by_numpy,
    warped_by_them,
    warped_by_torch,
    warper_controls,
)

VOCAB_SIZE = 40
LARGE = 3000  # more than are tried before typical sampling sorts all
CONTROLS = warper_controls()
HEAT = st.sampled_from([0.3, 0.7, 1.0, 1.9])
WAYS = pytest.mark.parametrize("warped", [warped_by_numpy, warped_by_torch], ids=["numpy", "torch"])


@st.composite
def rows(draw, size=VOCAB_SIZE, *, has_ties=True):
    """Rows of every spread; some tokens are ruled out already, some are as likely as others."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    row = torch.randn(size, generator=generator, dtype=torch.float64)
    row *= draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    if has_ties:
        row[draw(st.lists(st.integers(0, size - 1), max_size=4))] = row[0].clone()
    out = draw(st.lists(st.integers(0, size - 1), max_size=size - 1))
    row[out] = -torch.inf
    return row.to(draw(st.sampled_from([torch.float32, torch.float64])))


def has_a_token(row):
    return row.isfinite().any()


def check_both_ways(params, row):
    theirs = warped_by_them(params, row)
    assert torch.equal(warped_by_numpy(params, row), theirs)
    assert torch.equal(warped_by_torch(params, row), theirs)


@pytest.mark.parametrize("name", CONTROLS)
@settings(max_examples=30)
@given(rows(has_ties=False).filter(has_a_token), HEAT, st.data())
def test_each_warper_alone_equals_theirs(name, row, heat, data):
    check_both_ways(SamplingParams(temperature=heat, **{name: data.draw(CONTROLS[name])}), row)


@settings(max_examples=100)
@given(rows(has_ties=False).filter(has_a_token), HEAT, st.fixed_dictionaries({}, optional=CONTROLS))
def test_all_warpers_together_equal_theirs(row, heat, values):
    check_both_ways(SamplingParams(temperature=heat, **values), row)


@pytest.mark.parametrize("name", [name for name in CONTROLS if name not in ("top_h", "top_p")])
@settings(max_examples=30)
@given(rows().filter(has_a_token), HEAT, st.data())
def test_equal_tokens_are_treated_as_they_treat_them(name, row, heat, data):
    """Top-h and top-p are left out: their sort is not stable, so which of equals go is open."""
    check_both_ways(SamplingParams(temperature=heat, **{name: data.draw(CONTROLS[name])}), row)


@settings(max_examples=30)
@given(rows().filter(has_a_token), HEAT, st.floats(0.01, 0.99))
def test_top_p_keeps_as_many_of_equal_tokens_as_theirs(row, heat, mass):
    params = SamplingParams(temperature=heat, top_p=mass)
    theirs = warped_by_them(params, row).sort().values
    assert torch.equal(warped_by_numpy(params, row).sort().values, theirs)
    assert torch.equal(warped_by_torch(params, row).sort().values, theirs)


@settings(max_examples=30)
@given(rows(LARGE, has_ties=False), HEAT, st.fixed_dictionaries({}, optional=CONTROLS))
def test_large_rows_equal_theirs(row, heat, values):
    params = SamplingParams(temperature=heat, **values)
    assert torch.equal(warped_by_numpy(params, row), warped_by_them(params, row))


@pytest.mark.parametrize("mass", [0.001, 0.2, 0.9, 0.99999, 1 - 1e-12])
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_typical_sampling_of_large_rows(mass, spread):
    """With so little spread all tokens are needed, with so much the nearest few are enough."""
    row = torch.randn(LARGE, generator=torch.Generator().manual_seed(3)).double() * spread
    params = SamplingParams(temperature=1.0, typical_p=mass)
    ours = warped_by_numpy(params, row)
    assert torch.equal(ours, warped_by_them(params, row))
    assert ours.isfinite().any()


@settings(max_examples=50)
@given(rows(), HEAT, st.fixed_dictionaries({}, optional=CONTROLS))
def test_both_ways_agree(row, heat, values):
    params = SamplingParams(temperature=heat, **values)
    assert torch.equal(warped_by_numpy(params, row), warped_by_torch(params, row))


@WAYS
@pytest.mark.parametrize("name", CONTROLS)
@settings(max_examples=20)
@given(rows(), st.data())
def test_the_likeliest_token_stays_unless_it_is_atypical(warped, name, row, data):
    params = SamplingParams(temperature=1.0, **{name: data.draw(CONTROLS[name])})
    left = warped(params, row).isfinite()
    assert left.any() == row.isfinite().any()
    if left.any() and name != "typical_p":
        assert row[left].max() == row.max()


@WAYS
@pytest.mark.parametrize("values", [{name: 0.3} for name in CONTROLS if name != "top_k"])
def test_a_row_without_tokens_stays_one(warped, values):
    row = torch.full((VOCAB_SIZE,), -torch.inf)
    params = SamplingParams(temperature=1.0, top_k=3, **values)
    assert torch.equal(warped(params, row), row)


@WAYS
@pytest.mark.parametrize("values", [{name: 0.3} for name in CONTROLS if name != "top_k"])
def test_logits_that_overflowed_stay(warped, values):
    """Half precision turns what is too large into infinity."""
    row = torch.arange(VOCAB_SIZE).float()
    row[7] = torch.inf
    assert warped(SamplingParams(temperature=1.0, **values), row)[7] == torch.inf


@WAYS
@pytest.mark.parametrize(("mass", "num_kept"), [(0.5, 2), (0.51, 3), (0.75, 3), (0.25, 1)])
def test_top_p_keeps_no_more_than_reach_the_mass(warped, mass, num_kept):
    """Four equal tokens have exactly a quarter each; of equals the last stay."""
    params = SamplingParams(temperature=1.0, top_p=mass)
    left = warped(params, torch.zeros(4)).isfinite()
    assert left.tolist() == [False] * (4 - num_kept) + [True] * num_kept
    assert left.sum() == warped_by_them(params, torch.zeros(4)).isfinite().sum()


@WAYS
def test_top_k_keeps_ties_with_the_last_one(warped):
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
    params = SamplingParams(temperature=1.0, top_k=2)
    assert warped(params, row).isfinite().tolist() == [False, True, True, True, True]


@WAYS
@given(shares())
def test_min_p_of_two_tokens(warped, share):
    """The second token is half as likely as the first."""
    row = torch.tensor([0.0, -torch.log(torch.tensor(2.0)).item()])
    left = warped(SamplingParams(temperature=1.0, min_p=share), row).isfinite()
    assert left.tolist() == [True, share < 0.5]


def test_filters_that_are_off_do_nothing():
    assert not has_filters(SamplingParams(temperature=0.5))
    row = torch.randn(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(warp(row, SamplingParams(temperature=1.0)), row)
    assert torch.equal(warp(row, SamplingParams(temperature=0.7)), row / 0.7)


@pytest.mark.parametrize("name", CONTROLS)
@settings(max_examples=10)
@given(st.integers(1, 4), st.data())
def test_rows_by_torch_are_taken_one_by_one(name, num_rows, data):
    params = SamplingParams(temperature=0.7, **{name: data.draw(CONTROLS[name])})
    batch = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(8)).double()
    expected = torch.stack([warped_by_torch(params, row) for row in batch])
    assert torch.equal(warped_by_torch(params, batch), expected)


@pytest.mark.parametrize("by", [warped_by_numpy, warp], ids=["array", "tensor"])
def test_the_row_is_not_changed(by):
    row = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    before = row.clone()
    params = SamplingParams(temperature=0.5, top_k=3)
    by(*((row, params) if by is warp else (params, row)))
    assert torch.equal(row, before)
