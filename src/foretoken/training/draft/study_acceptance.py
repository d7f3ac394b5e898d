"""How often drafts of a shape are right: measured after a short training, interpolated for others.

A few candidates are trained, all with the same budget. What each accepts is read off the target's
own texts: a greedy chain goes on as long as the draft's first choice is what the target said (Yan
et al., arXiv:2402.01528, section 4); when sampling, a token passes with the probability
sum_x min(p, q) (Leviathan et al., arXiv:2211.17192). For the others, of P parameters and L layers,

    logit a = b0 + b1 ln P + b2 ln L

is fitted to those that were trained; a draft that has only some of the target's tokens accepts
that share of it with which the target says these. Short trainings flatter small drafts, which learn
faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.models.trainable import TrainableModel
from foretoken.training.corpus import Example
from foretoken.training.draft.distil import DistilBatch

MAX_TEXTS = 8  # of a pass
RIDGE = 0.01  # shrinks slopes a little, so that few or like points are no matter
EDGE = 0.01  # acceptances are kept so far from 0 and 1, where a logit has no end


@dataclass(frozen=True, slots=True)
class Hits:
    """How a draft does behind the target's own texts.

    Args:
        accepted: For each text, the probability that each output token would be accepted if those
            before it were, [n].
        cross_entropy: Of the output tokens that the draft has, in nats; its perplexity is exp.
    """

    accepted: list[Tensor]
    cross_entropy: float

    def by_depth(self, max_depth: int) -> list[float]:
        """Return the conditional acceptance at each depth: of drafts that begin at any token.

        Entry k is sum_s prod_(j <= k) a_(s + j) / sum_s prod_(j < k) a_(s + j).
        """
        rates = []
        # The probability that a draft that begins at each token comes as far as depth k.
        reached = [torch.ones_like(accepted) for accepted in self.accepted]
        for depth in range(max_depth):
            before = [it[: max(0, len(it) - 1)] if depth else it for it in reached]
            after = [
                past * accepted[depth:]
                for past, accepted in zip(before, self.accepted, strict=True)
            ]
            total = sum(float(it.sum()) for it in before)
            rates.append(sum(float(it.sum()) for it in after) / total if total else 0.0)
            reached = after
        return rates


@torch.no_grad()
def hits(
    student: TrainableModel,
    target: TrainableModel,
    texts: Sequence[Example],
    temperature: float,
) -> Hits:
    """Return how a draft does behind texts.

    Args:
        student: It may have fewer tokens than the target.
        target: On the same device; run only when sampling.
        texts: At least one.
        temperature: Of the texts; 0 is greedy.
    """
    accepted: list[Tensor] = []
    losses: list[Tensor] = []
    for start in range(0, len(texts), MAX_TEXTS):
        some = texts[start : start + MAX_TEXTS]
        batch = DistilBatch.of(some, student.device)
        output_ids = torch.tensor([it for text in some for it in text.output_ids])
        logits = student.logits(batch.token_ids)[batch.is_asked].float().cpu()
        ids = torch.arange(target.vocab_size)
        own_ids = output_ids
        if student.vocabulary is not None:
            ids = student.vocabulary.d2t
            own_ids = student.vocabulary.t2d[output_ids]
        if temperature:
            target_logits = target.logits(batch.token_ids)[batch.is_asked].float().cpu()
            target_probs = (target_logits / temperature).softmax(dim=-1)[:, ids]
            rates = torch.minimum((logits / temperature).softmax(dim=-1), target_probs).sum(dim=-1)
        else:
            rates = (ids[logits.argmax(dim=-1)] == output_ids).float()
        accepted += rates.split([len(text.output_ids) for text in some])
        is_known = ids[own_ids] == output_ids
        losses.append(-logits.log_softmax(dim=-1).gather(1, own_ids[:, None])[:, 0][is_known])
    return Hits(accepted, torch.cat(losses).double().mean().item())


@dataclass(frozen=True, slots=True)
class Point:
    """A shape's sizes, as far as acceptance follows from them, and what it accepts.

    Args:
        num_parameters: With all of the target's tokens, whatever it has.
        layers: Its depth.
        coverage: Share of the output tokens that it can say.
        acceptances: Conditional, by depth; none if it was not trained.
    """

    num_parameters: int
    layers: int
    coverage: float = 1.0
    acceptances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AcceptanceFit:
    """The model of acceptance by parameters and depth.

    Args:
        coefficients: b0, b1 of ln P, b2 of ln L.
        profile: What each depth adds to the logit of the first, [depths].
        residual: Root mean square of what the fit misses the trained ones by, in acceptance.
    """

    coefficients: tuple[float, float, float]
    profile: tuple[float, ...]
    residual: float

    def acceptances(self, point: Point) -> list[float]:
        """Return the conditional acceptance at each depth of a shape that was not trained."""
        terms = (1.0, math.log(point.num_parameters), math.log(point.layers))
        first = sum(b * term for b, term in zip(self.coefficients, terms, strict=True))
        return [point.coverage * _sigmoid(first + more) for more in self.profile]


def fit_acceptance(trained: Sequence[Point]) -> AcceptanceFit:
    """Fit the model to shapes that were trained, at least one.

    Slopes are those of least squares with a slight ridge on standardized sizes; with one shape
    they are 0.
    """
    logits = np.array(
        [[_logit(rate / point.coverage) for rate in point.acceptances] for point in trained]
    )
    sizes = np.log([[point.num_parameters, point.layers] for point in trained])
    first = logits[:, 0]
    means, spreads = sizes.mean(axis=0), np.maximum(sizes.std(axis=0), 1e-9)
    scaled = (sizes - means) / spreads
    scaled[:, sizes.std(axis=0) == 0] = 0.0
    gram = scaled.T @ scaled + RIDGE * len(trained) * np.eye(2)
    slopes = np.linalg.solve(gram, scaled.T @ (first - first.mean())) / spreads
    intercept = float(first.mean() - slopes @ means)
    fit = AcceptanceFit(
        coefficients=(intercept, float(slopes[0]), float(slopes[1])),
        profile=tuple((logits - first[:, None]).mean(axis=0).tolist()),
        residual=0.0,
    )
    misses: NDArray[np.float64] = np.array(
        [fit.acceptances(point)[0] - point.acceptances[0] for point in trained]
    )
    residual = float(np.sqrt((misses**2).mean()))
    return AcceptanceFit(fit.coefficients, fit.profile, residual)


def spread_out(points: Sequence[Point], count: int) -> list[int]:
    """Return which shapes to train so that the others lie between them, in their order.

    The first is that of fewest layers and most parameters; each next one is the farthest from
    those chosen, in ln P and ln L. Only shapes with all tokens are chosen.
    """
    places = [place for place, point in enumerate(points) if point.coverage == 1.0]
    sizes = np.log([[points[place].num_parameters, points[place].layers] for place in places])
    sizes = (sizes - sizes.min(axis=0)) / np.maximum(np.ptp(sizes, axis=0), 1e-9)
    chosen = [min(range(len(places)), key=lambda it: (sizes[it][1], -sizes[it][0]))]
    while len(chosen) < min(count, len(places)):
        distances = np.linalg.norm(sizes[:, None] - sizes[chosen][None], axis=2).min(axis=1)
        chosen.append(int(distances.argmax()))
    return sorted(places[it] for it in set(chosen))


def _logit(rate: float) -> float:
    rate = min(1 - EDGE, max(EDGE, rate))
    return math.log(rate / (1 - rate))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


__all__ = ["AcceptanceFit", "Hits", "Point", "fit_acceptance", "hits", "spread_out"]
