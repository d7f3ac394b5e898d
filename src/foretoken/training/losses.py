"""Divergences between what a draft says and what the target says: what distillation lowers.

p is the target's distribution and q the draft's, over the tokens behind one place. A divergence
takes logits of both and returns one number per place; which places count, and how they are
averaged, is the caller's affair. Gradients flow into the draft's logits; the target is a constant.

Speculative decoding accepts a sampled draft token with probability sum_x min(p, q) = 1 - TV(p, q)
(Leviathan et al. 2023, arXiv:2211.17192, Corollary 3.6), which makes total variation the exact
objective of a chain; the others have gradients that do not vanish where it is flat. DistillSpec
(arXiv:2310.08461) compares them and finds that the best one depends on the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from foretoken.errors import ConfigError

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(draft_logits [..., V], target_logits [..., V]) -> [...] of the draft's type."""

# The spread of a reward that has none, where draft and target agree: there the gradient is zero.
_MIN_DEVIATION = 1e-4


def forward_kl(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return KL(p || q) = sum_x p(x) (log p(x) - log q(x)), in nats.

    Covers all that the target may say, at the price of mass where it says nothing. The gradient
    with respect to the draft's logits is q - p.

    Args:
        draft_logits: [..., V].
        target_logits: [..., V].

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    draft, target = _log_probs(draft_logits, target_logits)
    return (target.exp() * _difference(target, draft)).sum(dim=-1)


def reverse_kl(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return KL(q || p) = sum_x q(x) (log q(x) - log p(x)), in nats.

    Puts the draft's mass where the target surely has some. The gradient with respect to the
    draft's logits is q (log q - log p - KL(q || p)).

    Args:
        draft_logits: [..., V].
        target_logits: [..., V]; finite wherever the draft's are.

    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543.
    """
    draft, target = _log_probs(draft_logits, target_logits)
    return (draft.exp() * _difference(draft, target)).sum(dim=-1)


def jsd(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.

    It is at most ln 2. The gradient with respect to the draft's logits is
    q (log(q / m) - KL(q || m)) / 2.

    Args:
        draft_logits: [..., V].
        target_logits: [..., V].

    Source: Agarwal et al. 2023 (generalised knowledge distillation), arXiv:2306.13649.
    """
    draft, target = _log_probs(draft_logits, target_logits)
    mean = torch.logaddexp(draft, target) - math.log(2)
    to_target = target.exp() * _difference(target, mean)
    to_draft = draft.exp() * _difference(draft, mean)
    return 0.5 * (to_target + to_draft).sum(dim=-1)


def total_variation(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return TV(p, q) = 1/2 sum_x |p(x) - q(x)|: the probability that a drafted token is rejected.

    The gradient with respect to the draft's logits is -q (r - E_q[r]) with r(x) = 1 where
    p(x) > q(x), else 0. It vanishes where the draft is sure of something wrong.

    Args:
        draft_logits: [..., V].
        target_logits: [..., V].

    Source: Leviathan et al. 2023, arXiv:2211.17192, section 3.2; as a loss in DistillSpec,
    arXiv:2310.08461.
    """
    draft, target = _log_probs(draft_logits, target_logits)
    # Half of |p - q| summed is the surplus of p over q summed. Written so, a place where both are
    # equal counts as r = 0, as the formula above says.
    return torch.relu(target.exp() - draft.exp()).sum(dim=-1)


def tvd_plus_plus(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return TV(p, q), with the gradient of TVD++: that of a policy with normalised advantages.

    The gradient of total variation is a policy gradient, -E_{x~q}[r(x) grad log q(x)], with the
    reward r(x) = 1 where p(x) > q(x), else 0. TVD++ puts the advantage A = (r - mean) / deviation
    in the reward's place. Here expectation, mean and deviation are those under q at each place,
    taken over the whole vocabulary instead of sampled tokens of a batch: the gradient with respect
    to the draft's logits is -q (r - E_q[r]) / sqrt(Var_q[r]), which is total variation's, made
    longer where the draft is sure of something wrong or nearly right.

    Args:
        draft_logits: [..., V].
        target_logits: [..., V].

    Source: Goel et al. 2024, arXiv:2403.00858, section 2.
    """
    draft, target = _log_probs(draft_logits, target_logits)
    with torch.no_grad():
        draft_probs, target_probs = draft.exp(), target.exp()
        reward = (target_probs > draft_probs).to(draft.dtype)
        mean = (draft_probs * reward).sum(dim=-1, keepdim=True)
        deviation = (mean * (1 - mean)).clamp_min(0).sqrt()
        advantage = (reward - mean) / deviation.clamp_min(_MIN_DEVIATION)
        value = torch.relu(target_probs - draft_probs).sum(dim=-1)
    surrogate = -(draft.exp() * advantage).sum(dim=-1)
    return value + surrogate - surrogate.detach()


def cross_entropy(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return -log q(x*), x* the target's first choice (the lowest id of equal ones), in nats.

    What greedy decoding compares, and nothing of how sure the target is. The gradient with respect
    to the draft's logits is q - onehot(x*).

    Args:
        draft_logits: [..., V].
        target_logits: [..., V].

    Source: Kim and Rush 2016 (sequence-level distillation), arXiv:1606.07947.
    """
    draft = torch.log_softmax(draft_logits, dim=-1)
    choice = target_logits.detach().argmax(dim=-1, keepdim=True)
    return -draft.gather(-1, choice).squeeze(-1)


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "forward-kl": forward_kl,
        "reverse-kl": reverse_kl,
        "jsd": jsd,
        "tv": total_variation,
        "tvd++": tvd_plus_plus,
        "cross-entropy": cross_entropy,
    }
)


def divergence(name: str) -> Divergence:
    """Return a divergence by its name in `DIVERGENCES`.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in DIVERGENCES:
        raise ConfigError(
            f"there is no loss {name!r}; there are {', '.join(DIVERGENCES)}", hint="change --loss"
        )
    return DIVERGENCES[name]


def at_temperature(divergence: Divergence, temperature: float) -> Divergence:
    """Return the divergence between the distributions at a temperature.

    A draft serves best at the temperature that it was distilled at. Greedy decoding, temperature
    0, has no distribution of its own to match: it is distilled at temperature 1, where the whole
    order of the tokens is learnt and not only the first one; `cross_entropy` knows only that.

    Args:
        divergence: Of logits.
        temperature: At least 0.

    Raises:
        ConfigError: The temperature is below 0 or no finite number.

    Source: Ouyang et al. 2024, arXiv:2410.10141.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            f"temperature is a number >= 0; got {temperature}", hint="change --temperature"
        )
    if temperature in (0, 1):
        return divergence
    return lambda draft_logits, target_logits: divergence(
        draft_logits / temperature, target_logits / temperature
    )


def _log_probs(draft_logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    draft = torch.log_softmax(draft_logits, dim=-1)
    target = torch.log_softmax(target_logits.detach().to(draft.dtype), dim=-1)
    return draft, target


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """Return `one - other`, 0 where `one` is impossible: its weight there is 0, and 0 log 0 = 0."""
    return torch.where(one == -math.inf, 0.0, one - other)


__all__ = [
    "DIVERGENCES",
    "Divergence",
    "at_temperature",
    "cross_entropy",
    "divergence",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "total_variation",
    "tvd_plus_plus",
]
