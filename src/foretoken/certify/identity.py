"""Part one: the same tokens as plain decoding, from the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from foretoken.certify.divergence import END, Divergence, explain
from foretoken.certify.observe import PlainRule, RowLog, decode, rule_of, target_of, watched
from foretoken.certify.passes import TextScorer, largest_difference, same_bits, ulp
from foretoken.certify.settings import CertifyPrompt, CertifySettings, Report
from foretoken.core.noise import derive_seed
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import Exactness
from foretoken.engine.engine import Engine
from foretoken.engine.request import FinishReason, Request
from foretoken.models.adapter import ModelInfo

# Rows of other passes may differ from plain decoding's by this many times what rows of prompt
# passes over the same texts do, which is rounding alone: no draft, no neighbour.
NOISE_FACTOR = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One text to be decoded in several ways.

    Args:
        prompt: What it continues.
        prompt_index: Its place among the prompts.
        temperature: With which.
        seed: Of its noise.
    """

    prompt: CertifyPrompt
    prompt_index: int
    temperature: float
    seed: int

    def request(self, engine: Engine, *, is_plain: bool) -> Request:
        """Return a request for the text, checked and not queued."""
        params = replace(
            self.prompt.params,
            temperature=self.temperature,
            seed=self.seed,
            logprobs=None,
            prompt_logprobs=None,
        )
        drafters: tuple[str, ...] | None = () if is_plain else None
        return engine.new_request(list(self.prompt.prompt_ids), params, drafters=drafters)


@dataclass(frozen=True, slots=True)
class Plain:
    """What plain decoding alone, one token a pass, made of a case."""

    token_ids: list[int]
    rows: list[Tensor]
    finish_reason: FinishReason | None


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Texts decoded in one way, against plain decoding alone.

    Args:
        temperature: Of all of them.
        is_speculative: Whether drafts were made; else only neighbours differ.
        batch_size: Requests at once.
        is_promised: Whether the rule promises plain decoding's tokens here.
        num_texts: Compared.
        num_same_texts: With the same tokens and the same end.
        num_rows: Compared: those of every token up to the first different one.
        num_same_rows: The same bit for bit.
        row_difference: Largest difference between logits.
        num_draft_tokens: Scored.
        num_accepted: Of them, emitted.
        divergences: Of texts that differ.
    """

    temperature: float
    is_speculative: bool
    batch_size: int
    is_promised: bool
    num_texts: int = 0
    num_same_texts: int = 0
    num_rows: int = 0
    num_same_rows: int = 0
    row_difference: float = 0.0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    divergences: list[tuple[Case, Divergence]] = field(default_factory=list)

    def add(
        self,
        case: Case,
        plain: Plain,
        request: Request,
        rows: Sequence[Tensor],
        sampler: Sampler,
    ) -> None:
        """Compare one text.

        Args:
            case: What was asked.
            plain: Its reference.
            request: The finished request.
            rows: Those that chose its tokens.
            sampler: The request's, but one that nobody has used.
        """
        self.num_texts += 1
        self.num_draft_tokens += request.stats.num_draft_tokens
        self.num_accepted += request.stats.num_accepted
        pairs = zip(plain.token_ids, request.output_ids, strict=False)
        for position, (plain_id, found_id) in enumerate(pairs):
            self._add_row(plain.rows[position], rows[position])
            if plain_id != found_id:
                history = request.token_ids[: request.num_prompt_ids + position]
                both_rows = plain.rows[position], rows[position]
                why = explain(sampler, history, position, both_rows, (plain_id, found_id))
                self.divergences.append((case, why))
                return
        shorter = min(len(plain.token_ids), len(request.output_ids))
        if plain.token_ids == request.output_ids and plain.finish_reason == request.finish_reason:
            self.num_same_texts += 1
            return
        detail = f"{_ended(plain.finish_reason)}, here {_ended(request.finish_reason)}"
        self.divergences.append((case, Divergence(position=shorter, cause=END, detail=detail)))

    def _add_row(self, plain_row: Tensor, found_row: Tensor) -> None:
        self.num_rows += 1
        if same_bits(plain_row, found_row):
            self.num_same_rows += 1
        else:
            difference = largest_difference(plain_row, found_row)
            self.row_difference = max(self.row_difference, difference)


@dataclass(slots=True)
class Noise:
    """How far rounding alone moves logits here: prompt passes against plain decoding, same texts.

    Args:
        num_rows: Compared.
        row_difference: Largest difference.
        largest_logit: Of the rows of plain decoding.
    """

    num_rows: int = 0
    row_difference: float = 0.0
    largest_logit: float = 0.0

    def tolerance(self, info: ModelInfo) -> float:
        """Return the difference beyond which rounding explains nothing; 0 where it never should.

        Not less than `NOISE_FACTOR` units in the last place of the largest logit.
        """
        if info.exactness is Exactness.BITWISE:
            return 0.0
        return NOISE_FACTOR * max(self.row_difference, ulp(self.largest_logit, info.dtype))


class IdentityCheck:
    """Decodes every prompt plainly and speculatively, alone and beside others.

    Args:
        engine: Idle.
        settings: How much.

    Attributes:
        comparisons: One per temperature and way of decoding, in the order of the work.
        noise: Measured along the way.
    """

    def __init__(self, engine: Engine, settings: CertifySettings) -> None:
        self._engine = engine
        self._settings = settings
        self._target = target_of(engine)
        self._rule = rule_of(engine)
        self.comparisons: list[Comparison] = []
        self.noise = Noise()

    @property
    def num_texts(self) -> int:
        """Texts to be decoded, all ways together."""
        return sum(
            len(cases) + sum(max(len(cases), way.batch_size) for way in self._ways(temperature))
            for temperature, cases in self._rounds()
        )

    def run(self, report: Report) -> None:
        """Do all the work; what is finished when this is interrupted stands.

        Args:
            report: Told after each text.
        """
        for temperature, cases in self._rounds():
            plain = self._decode_plainly(temperature, cases, report)
            for comparison in self._ways(temperature):
                known = [item for item in self.comparisons if _is_same_way(item, comparison)]
                if not known:
                    self.comparisons.append(comparison)
                self._compare(known[0] if known else comparison, cases, plain, report)

    def _rounds(self) -> list[tuple[float, list[Case]]]:
        """Return sets of cases; the rows of only one set are in memory at a time."""
        rounds = []
        for temperature in self._settings.temperatures:
            for index in range(1 if temperature == 0 else self._settings.num_seeds):
                cases = [
                    Case(
                        prompt=prompt,
                        prompt_index=place,
                        temperature=temperature,
                        seed=derive_seed(self._first_seed(place), index),
                    )
                    for place, prompt in enumerate(self._settings.prompts)
                    if temperature in prompt.temperatures
                ]
                rounds.append((temperature, cases))
        return rounds

    def _first_seed(self, place: int) -> int:
        given = self._settings.prompts[place].params.seed
        return derive_seed(self._settings.seed, place + 1) if given is None else given

    def _ways(self, temperature: float) -> list[Comparison]:
        promised = {
            Exactness.BITWISE: True,
            Exactness.NUMERICAL: True,
            Exactness.DISTRIBUTION: temperature == 0,
            Exactness.LOSSY: False,
        }[self._rule.exactness]
        sizes = self._settings.batch_sizes
        largest = max(sizes)
        ways = []
        if largest > 1:
            ways.append(
                Comparison(
                    temperature=temperature,
                    is_speculative=False,
                    batch_size=largest,
                    is_promised=True,
                )
            )
        if not promised and temperature > 0:  # other tokens by design: part two looks at these
            return ways
        ways += [
            Comparison(
                temperature=temperature, is_speculative=True, batch_size=size, is_promised=promised
            )
            for size in sizes
        ]
        return ways

    def _decode_plainly(
        self, temperature: float, cases: Sequence[Case], report: Report
    ) -> list[Plain]:
        references = []
        longest = 0
        for case in cases:
            request = case.request(self._engine, is_plain=True)
            log = RowLog([request])
            with watched(self._engine, log.watch, rule=PlainRule()):
                list(decode(self._engine, [request], 1))
            references.append(Plain(request.output_ids, log.rows(request), request.finish_reason))
            longest = max(longest, len(request.token_ids))
            report(f"{_mode(temperature)}: plain decoding")
        scorer = TextScorer(self._target, longest)
        for case, plain in zip(cases, references, strict=True):
            self._measure_noise(scorer.rows(case.prompt.prompt_ids, plain.token_ids), plain)
        return references

    def _measure_noise(self, rows: Tensor, plain: Plain) -> None:
        for row, plain_row in zip(rows, plain.rows, strict=True):
            noise = self.noise
            noise.num_rows += 1
            difference = largest_difference(row, plain_row)
            noise.row_difference = max(noise.row_difference, difference)
            logits = plain_row[plain_row.isfinite()]
            noise.largest_logit = max(noise.largest_logit, float(logits.abs().max()))

    def _compare(
        self,
        comparison: Comparison,
        cases: Sequence[Case],
        plain: Sequence[Plain],
        report: Report,
    ) -> None:
        is_plain = not comparison.is_speculative
        # A batch that is wider than there are cases holds some of them more than once.
        num_requests = max(len(cases), comparison.batch_size)
        places = [number % len(cases) for number in range(num_requests)]
        requests = [cases[place].request(self._engine, is_plain=is_plain) for place in places]
        place_of = {
            request.request_id: place for request, place in zip(requests, places, strict=True)
        }
        log = RowLog(requests)
        with watched(self._engine, log.watch, rule=PlainRule() if is_plain else None):
            for request in decode(self._engine, requests, comparison.batch_size):
                place = place_of[request.request_id]
                fresh = cases[place].request(self._engine, is_plain=True).sampler
                comparison.add(cases[place], plain[place], request, log.rows(request), fresh)
                report(describe_way(comparison))


def describe_way(comparison: Comparison) -> str:
    """Return how the texts of a comparison were decoded, in a few words."""
    how = "speculative" if comparison.is_speculative else "plain"
    batch = "alone" if comparison.batch_size == 1 else f"{comparison.batch_size} at once"
    return f"{_mode(comparison.temperature)}: {how}, {batch}"


def _is_same_way(first: Comparison, second: Comparison) -> bool:
    return (first.temperature, first.is_speculative, first.batch_size) == (
        second.temperature,
        second.is_speculative,
        second.batch_size,
    )


def _mode(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _ended(reason: FinishReason | None) -> str:
    return f"ended by {reason.value}" if reason is not None else "did not end"


__all__ = [
    "NOISE_FACTOR",
    "Case",
    "Comparison",
    "IdentityCheck",
    "Noise",
    "Plain",
    "describe_way",
]
