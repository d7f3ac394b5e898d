"""Part two: the distribution of what is emitted, against the target's own."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretoken.certify.goodness import (
    MIN_EXPECTED,
    ChiSquare,
    FitTest,
    Tally,
    distance_from_uniform,
    distance_resolution,
    uniform_counts,
)
from foretoken.certify.observe import agreed_draws, decode, rule_of, target_of, watched
from foretoken.certify.passes import TextScorer, largest_difference, same_bits
from foretoken.certify.places import Place, PlaceLog, Stratum
from foretoken.certify.settings import CertifyPrompt, CertifySettings, Report
from foretoken.core.noise import derive_seed
from foretoken.core.sampling import Sampler
from foretoken.engine.engine import Engine
from foretoken.engine.request import Request

GROUP = 16  # texts that are drawn at once, then looked at
NUM_BINS = 16  # of values that are uniform if all is right
NUM_PAIR_BINS = 4  # per value of a pair
DISTANCE_LEVEL = 0.01  # of the resolution stated beside a measured distance
_BELOW_ONE = math.nextafter(1.0, 0.0)
_FIRST_SEED = 2**32  # far from the seeds of part one


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """A measured deviation from the target's distribution.

    Args:
        order: The order of tokens in which it was found.
        num_observations: Tokens.
        distance: The total variation distance is at least this, up to `resolution`.
        resolution: What chance alone exceeds with probability `DISTANCE_LEVEL` at most.
    """

    order: str
    num_observations: int
    distance: float
    resolution: float


@dataclass(slots=True)
class _Prefix:
    """What followed one prefix: how often which token, of those likely enough to be counted."""

    probs: dict[int, float]
    counts: Counter[int] = field(default_factory=Counter)


class TokenSample:
    """Tokens with the target's distribution of each, boiled down to what tests need.

    Each token x becomes values that are uniform on [0, 1) and independent of everything before if
    x was drawn from the target's distribution p: u = p(tokens that stand before x in some order) +
    v p(x), v uniform (a randomised probability integral transform). The order may depend on
    anything that was known before x was drawn. Two are used: by p, likeliest first; and by how much
    the drafter favours a token over the target, because that is where rules go wrong.

    Args:
        generator: Draws v.
        num_samples: Texts per prompt at most.
    """

    def __init__(self, generator: np.random.Generator, num_samples: int) -> None:
        self._generator = generator
        self._min_prob = MIN_EXPECTED / max(1, num_samples)
        self.num_texts = 0
        self.num_tokens = 0
        self.num_impossible = 0
        self._by_rank: dict[Stratum, list[float]] = defaultdict(list)
        self._by_draft: dict[Stratum, list[float]] = defaultdict(list)
        self._favoured = Tally()
        self._repeated = Tally()
        self._pairs: list[int] = []
        self._prefixes: dict[tuple[int, ...], _Prefix] = {}

    def add(
        self,
        prompt_index: int,
        output_ids: Sequence[int],
        probs: Sequence[NDArray[np.float64]],
        places: Sequence[Place],
    ) -> None:
        """Take one text; all sequences are as long as the output.

        Args:
            prompt_index: Which prompt it continues.
            output_ids: Its tokens.
            probs: The target's distribution of each token given all before, [V] each.
            places: Where each was chosen.
        """
        self.num_texts += 1
        ranks = []
        prefix: tuple[int, ...] = (prompt_index,)
        for position, token_id in enumerate(output_ids):
            row, place = probs[position], places[position]
            self.num_tokens += 1
            self.num_impossible += row[token_id] == 0
            ranks.append(self._value(row, row, token_id))
            self._by_rank[place.stratum].append(ranks[-1])
            self._add_draft(row, token_id, place)
            in_step = sorted(set(output_ids[position + 1 - place.depth : position]))
            if in_step:  # penalties must know these already
                self._repeated.add(token_id in in_step, float(row[in_step].sum()))
            self._add_count(prefix, row, token_id)
            prefix = (*prefix, token_id)
        # Pairs do not overlap, so that they are independent too.
        bins = np.minimum((np.array(ranks) * NUM_PAIR_BINS).astype(int), NUM_PAIR_BINS - 1)
        pairs = zip(bins[::2], bins[1::2], strict=False)
        self._pairs += [int(first) * NUM_PAIR_BINS + int(second) for first, second in pairs]

    def _value(
        self, probs: NDArray[np.float64], keys: NDArray[np.floating], token_id: int
    ) -> float:
        """Return a token's uniform value in the order of descending keys."""
        key = keys[token_id]
        before = float(probs[keys > key].sum())
        tied = float(probs[keys == key].sum())
        return min(before + float(self._generator.random()) * tied, _BELOW_ONE)

    def _add_draft(self, probs: NDArray[np.float64], token_id: int, place: Place) -> None:
        if place.draft_probs is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                keys = np.where(probs > 0, place.draft_probs / probs, 0.0)
            favoured = place.draft_probs > probs
        elif place.children is not None:
            favoured = np.zeros(len(probs), dtype=bool)
            favoured[list(place.children)] = True
            keys = favoured.astype(np.float64)
        else:
            return
        self._by_draft[place.stratum].append(self._value(probs, keys, token_id))
        self._favoured.add(bool(favoured[token_id]), float(probs[favoured].sum()))

    def _add_count(
        self, prefix: tuple[int, ...], probs: NDArray[np.float64], token_id: int
    ) -> None:
        known = self._prefixes.get(prefix)
        if known is None:
            likely = np.flatnonzero(probs >= self._min_prob)
            known = _Prefix(dict(zip(likely.tolist(), probs[likely].tolist(), strict=True)))
            self._prefixes[prefix] = known
        known.counts[token_id] += 1

    # -- results -----------------------------------------------------------------------------

    def tests(self) -> list[FitTest]:
        """Return all tests that there is enough to count for."""
        results = [
            self._prefix_test(),
            _uniform_test("likely or unlikely tokens, by place", self._by_rank),
            _uniform_test("tokens the drafter favours, by place", self._by_draft),
            self._favoured.result("tokens the drafter favours, all places"),
            self._repeated.result("tokens repeated within a step"),
            self._pair_test(),
        ]
        return [result for result in results if result is not None]

    def distances(self) -> list[Distance]:
        """Return how far the tokens are from the target's distribution, by each order."""
        found = []
        for order, strata in (
            ("likeliest first", self._by_rank),
            ("the drafter's favourites first", self._by_draft),
        ):
            values = [value for stratum in strata.values() for value in stratum]
            if values:
                found.append(
                    Distance(
                        order=order,
                        num_observations=len(values),
                        distance=distance_from_uniform(values),
                        resolution=distance_resolution(len(values), DISTANCE_LEVEL),
                    )
                )
        return found

    def strata(self) -> dict[str, int]:
        """Return how many tokens were chosen in each kind of place."""
        return {stratum.value: len(self._by_rank.get(stratum, ())) for stratum in Stratum}

    def _prefix_test(self) -> FitTest | None:
        total = ChiSquare()
        for prefix in self._prefixes.values():
            ids = list(prefix.probs)
            counts = np.array([prefix.counts[token_id] for token_id in ids], dtype=np.float64)
            probs = np.array(list(prefix.probs.values()))
            rest = prefix.counts.total() - counts.sum()
            total.add(np.append(counts, rest), np.append(probs, max(0.0, 1 - probs.sum())))
        return total.result("counts of tokens after equal prefixes")

    def _pair_test(self) -> FitTest | None:
        num_cells = NUM_PAIR_BINS**2
        total = ChiSquare()
        counts = np.bincount(np.array(self._pairs, dtype=np.int64), minlength=num_cells)
        total.add(counts.astype(np.float64), np.full(num_cells, 1 / num_cells))
        return total.result("pairs of consecutive tokens")


def _uniform_test(name: str, strata: dict[Stratum, list[float]]) -> FitTest | None:
    """Return the test that values are uniform in every stratum that has enough of them."""
    total = ChiSquare()
    for values in strata.values():
        num_bins = min(NUM_BINS, int(len(values) / MIN_EXPECTED))
        if num_bins >= 2:
            counts = uniform_counts(np.array(values), num_bins)
            total.add(counts, np.full(num_bins, 1 / num_bins))
    return total.result(name)


@dataclass(slots=True)
class SampledRows:
    """The rows that chose the sampled tokens, against passes of the finished texts.

    Args:
        num_rows: Compared.
        num_same_rows: The same bit for bit.
        row_difference: Largest difference between logits.
    """

    num_rows: int = 0
    num_same_rows: int = 0
    row_difference: float = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Compare one row."""
        self.num_rows += 1
        if same_bits(found, expected):
            self.num_same_rows += 1
        else:
            difference = largest_difference(found, expected)
            self.row_difference = max(self.row_difference, difference)


class DistributionCheck:
    """Draws many short texts speculatively and compares their tokens with the target's law.

    Args:
        engine: Idle.
        settings: How much.
        temperature: Above 0.

    Attributes:
        sample: What was drawn.
        rows: What the rule was shown, compared with what it should have been shown.
    """

    def __init__(self, engine: Engine, settings: CertifySettings, temperature: float) -> None:
        self._engine = engine
        self._settings = settings
        self.temperature = temperature
        chosen = [
            (place, prompt)
            for place, prompt in enumerate(settings.prompts)
            if temperature in prompt.temperatures
        ]
        self._prompts = chosen[: settings.sample_prompts]
        self._draws = set(agreed_draws(engine).values())
        index = settings.temperatures.index(temperature)
        self._seed = derive_seed(settings.seed, _FIRST_SEED + index)
        # Not the requests' own randomness, which the rule under test may have tampered with.
        self.sample = TokenSample(np.random.default_rng(self._seed), self._num_per_prompt)
        self.rows = SampledRows()

    @property
    def exactness(self) -> str:
        """What the rule says of itself."""
        return rule_of(self._engine).exactness.value

    @property
    def _num_per_prompt(self) -> int:
        return -(-self._settings.num_samples // len(self._prompts))

    @property
    def num_texts(self) -> int:
        """Texts to be drawn."""
        return self._num_per_prompt * len(self._prompts)

    def run(self, report: Report) -> None:
        """Do all the work; whole groups of texts that are finished when it is interrupted stand.

        Args:
            report: Told after each text.
        """
        number = 0
        for place, prompt in self._prompts:
            scorer = TextScorer(
                target_of(self._engine), len(prompt.prompt_ids) + self._settings.sample_tokens
            )
            left = self._num_per_prompt
            while left:
                size = min(GROUP, left)
                requests = [self._request(prompt, number + one) for one in range(size)]
                self._take(place, prompt, requests, scorer)
                number += size
                left -= size
                for _ in requests:
                    report(f"temperature {self.temperature:g}: samples")

    def _request(self, prompt: CertifyPrompt, number: int) -> Request:
        params = replace(
            prompt.params,
            temperature=self.temperature,
            seed=derive_seed(self._seed, number + 1),
            max_new_tokens=self._settings.sample_tokens,
            min_new_tokens=min(prompt.params.min_new_tokens, self._settings.sample_tokens),
            stop=(),  # texts end by length, not by what was drawn
            stop_token_ids=(),
            ignore_eos=True,
            logprobs=None,
            prompt_logprobs=None,
        )
        return self._engine.new_request(list(prompt.prompt_ids), params)

    def _take(
        self,
        place: int,
        prompt: CertifyPrompt,
        requests: Sequence[Request],
        scorer: TextScorer,
    ) -> None:
        log = PlaceLog(requests, self._draws)
        samplers = [
            self._engine.new_request(request.prompt_ids, request.params, drafters=()).sampler
            for request in requests
        ]
        with watched(self._engine, log.watch):
            list(decode(self._engine, requests, len(requests)))
        for request, sampler in zip(requests, samplers, strict=True):
            expected = scorer.rows(prompt.prompt_ids, request.output_ids)
            for found, row in zip(log.rows(request), expected, strict=True):
                self.rows.add(found, row)
            probs = distributions(sampler, prompt.prompt_ids, request.output_ids, expected)
            self.sample.add(place, request.output_ids, probs, log.places(request))


def distributions(
    sampler: Sampler, prompt_ids: Sequence[int], output_ids: Sequence[int], rows: Tensor
) -> list[NDArray[np.float64]]:
    """Return the target's distribution of each output token, every control applied, [V] each.

    Args:
        sampler: Of the request, used by nobody else.
        prompt_ids: The prompt.
        output_ids: The output; each token's history is all that is before it.
        rows: The target's logits for each output token, [tokens, V].

    Raises:
        RequestError: A control of the request's own failed.
    """
    history = list(prompt_ids)
    found = []
    for row, token_id in zip(rows, output_ids, strict=True):
        found.append(sampler.distribution(row, history))
        if sampler.failure is not None:
            raise sampler.failure
        history.append(token_id)
    return found


__all__ = [
    "DISTANCE_LEVEL",
    "Distance",
    "DistributionCheck",
    "SampledRows",
    "TokenSample",
    "distributions",
]
