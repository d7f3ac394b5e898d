"""Divergences: their values, and their gradients against finite differences and closed forms."""

import math

import pytest
import torch

from foretoken.errors import ConfigError
from foretoken.training.losses import (
    DIVERGENCES,
    at_temperature,
    cross_entropy,
    divergence,
    forward_kl,
    jsd,
    reverse_kl,
    total_variation,
    tvd_plus_plus,
)

NAMES = list(DIVERGENCES)
VOCAB_SIZE = 7


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, VOCAB_SIZE, generator=generator, dtype=torch.float64)


DRAFT, TARGET = logits(4, 3, seed=1), logits(4, 3, seed=2)
Q, P = DRAFT.softmax(-1), TARGET.softmax(-1)


def gradient(function, draft=DRAFT, target=TARGET):
    draft = draft.clone().requires_grad_()
    function(draft, target).sum().backward()
    return draft.grad


def expected(values):
    """The expectation under the draft, kept as a last axis of 1."""
    return (Q * values).sum(-1, keepdim=True)


def closed_forms():
    reward = (P > Q).double()
    mean, middle = expected(reward), (P + Q) / 2
    log_ratio = Q.log() - P.log()
    to_middle = Q.log() - middle.log()
    first = torch.nn.functional.one_hot(TARGET.argmax(-1), VOCAB_SIZE)
    total_variations = -Q * (reward - mean)
    return {
        "forward-kl": Q - P,
        "reverse-kl": Q * (log_ratio - expected(log_ratio)),
        "jsd": Q * (to_middle - expected(to_middle)) / 2,
        "tv": total_variations,
        "tvd++": total_variations / (mean * (1 - mean)).sqrt(),
        "cross-entropy": Q - first,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_closed_form(name):
    # rtol 1e-9: float64, a few dozen operations of 1e-16 each on numbers near 1.
    torch.testing.assert_close(
        gradient(DIVERGENCES[name]), closed_forms()[name], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tvd++"])
def test_the_gradient_is_that_of_finite_differences(name):
    """All but TVD++, whose gradient is by design not that of its value."""
    draft = DRAFT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda it: DIVERGENCES[name](it, TARGET), (draft,))


def test_the_gradient_of_tvd_plus_plus_points_where_that_of_total_variation_does():
    ours, plain = gradient(tvd_plus_plus), gradient(total_variation)
    cosine = torch.nn.functional.cosine_similarity(ours, plain, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-9, atol=0)


def test_tvd_plus_plus_learns_where_total_variation_is_flat():
    """The draft is sure of token 0, the target of token 1: TV's gradient is of size q(1)."""
    draft = torch.tensor([12.0, 0.0, 0.0], dtype=torch.float64)
    target = torch.tensor([0.0, 12.0, 0.0], dtype=torch.float64)
    flat = gradient(total_variation, draft, target).abs().max()
    steep = gradient(tvd_plus_plus, draft, target).abs().max()
    assert flat < 1e-4
    assert steep > 50 * flat


@pytest.mark.parametrize("name", NAMES)
def test_every_place_has_its_own_value(name):
    whole = DIVERGENCES[name](DRAFT, TARGET)
    assert whole.shape == DRAFT.shape[:-1]
    torch.testing.assert_close(whole[2, 1], DIVERGENCES[name](DRAFT[2, 1], TARGET[2, 1]))


def test_values_are_those_of_the_formulas():
    torch.testing.assert_close(forward_kl(DRAFT, TARGET), (P * (P / Q).log()).sum(-1))
    torch.testing.assert_close(reverse_kl(DRAFT, TARGET), (Q * (Q / P).log()).sum(-1))
    middle = (P + Q) / 2
    both = (P * (P / middle).log() + Q * (Q / middle).log()).sum(-1) / 2
    torch.testing.assert_close(jsd(DRAFT, TARGET), both)
    rejected = 1 - torch.minimum(P, Q).sum(-1)
    torch.testing.assert_close(total_variation(DRAFT, TARGET), rejected)
    torch.testing.assert_close(tvd_plus_plus(DRAFT, TARGET), rejected)
    first = P.argmax(-1, keepdim=True)
    torch.testing.assert_close(cross_entropy(DRAFT, TARGET), -Q.gather(-1, first).log().squeeze(-1))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cross-entropy"])
def test_a_draft_that_is_the_target_has_nothing_to_learn(name):
    value = DIVERGENCES[name](TARGET, TARGET)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    found = gradient(DIVERGENCES[name], TARGET)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_give_finite_gradients(name):
    """float32, probabilities that underflow to 0 on either side."""
    draft = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]])
    target = torch.tensor([[-200.0, 0.0, 200.0], [300.0, -300.0, 0.0]])
    draft.requires_grad_()
    value = DIVERGENCES[name](draft, target)
    value.sum().backward()
    assert value.isfinite().all()
    assert draft.grad.isfinite().all()


@pytest.mark.parametrize("name", ["forward-kl", "jsd", "tv", "tvd++", "cross-entropy"])
def test_tokens_that_the_target_never_says_cost_nothing_more(name):
    """A logit of minus infinity: 0 log 0 is 0. Reverse KL is infinite there, and is left out."""
    target = TARGET.clone()
    target[..., 3] = -math.inf
    assert DIVERGENCES[name](DRAFT, target).isfinite().all()
    assert gradient(DIVERGENCES[name], DRAFT, target).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_target(name):
    draft, target = DRAFT.clone().requires_grad_(), TARGET.clone().requires_grad_()
    DIVERGENCES[name](draft, target).sum().backward()
    assert target.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_divides_both_logits(name):
    function = DIVERGENCES[name]
    warm = at_temperature(function, 0.5)
    torch.testing.assert_close(warm(DRAFT, TARGET), function(2 * DRAFT, 2 * TARGET))
    assert at_temperature(function, 1.0) is function
    assert at_temperature(function, 0.0) is function


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_a_wrong_temperature_is_refused(temperature):
    with pytest.raises(ConfigError, match="temperature is a number >= 0"):
        at_temperature(forward_kl, temperature)


def test_an_unknown_loss_is_refused_with_the_known_ones():
    assert divergence("jsd") is jsd
    with pytest.raises(ConfigError, match=r"no loss 'kl'; there are forward-kl, reverse-kl"):
        divergence("kl")
