"""Goodness of fit and independence, with the probability that chance alone looks worse.

Tests compare the returned probability with `FALSE_FAILURE`. Seeds are fixed, so a test that passes
once passes always; the bound is the share of seeds for which correct code would have failed.
"""

import torch

FALSE_FAILURE = 1e-6
MIN_EXPECTED = 8.0


def fit_probability(winners, probs):
    """Return the chi-square probability of draws that fit `probs` no better than these.

    Tokens too rare for the approximation are counted together. A draw of probability 0 is never
    right.

    Args:
        winners: [n] int64 token ids.
        probs: [V] probabilities; they sum to 1.
    """
    counts = torch.bincount(winners, minlength=len(probs)).double()
    expected = probs.double() * len(winners)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < MIN_EXPECTED
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if expected[-1] < MIN_EXPECTED:  # still too rare: join it with the likeliest
        likeliest = int(expected[:-1].argmax())
        counts[likeliest] += counts[-1]
        expected[likeliest] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    return _tail(((counts - expected) ** 2 / expected).sum(), len(expected) - 1)


def independence_probability(first, second, num_values):
    """Return the chi-square probability of independent pairs that look as dependent as these.

    Args:
        first: [n] int64 values below `num_values`, each common.
        second: [n] int64 likewise.
        num_values: Number of different values.
    """
    counts = torch.bincount(first * num_values + second, minlength=num_values**2).double()
    counts = counts.view(num_values, num_values)
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    return _tail(((counts - expected) ** 2 / expected).sum(), (num_values - 1) ** 2)


def _tail(statistic, degrees):
    """Return P(chi-square with that many degrees of freedom > statistic)."""
    if degrees < 1:
        raise ValueError("draw more often: all tokens but one are too rare to be counted")
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic.double() / 2))
