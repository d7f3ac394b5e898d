"""The certificate: both parts, a verdict, and what led to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from foretoken.certify.distribution import DISTANCE_LEVEL, Distance, DistributionCheck
from foretoken.certify.divergence import LOGITS, Divergence, finite
from foretoken.certify.goodness import POWER, FitTest, holm
from foretoken.certify.identity import (
    NOISE_FACTOR,
    Case,
    Comparison,
    IdentityCheck,
    describe_way,
)
from foretoken.certify.observe import rule_of, target_of
from foretoken.certify.settings import FALSE_ALARM, CertifySettings
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.core.verdict import Exactness
from foretoken.engine.engine import Engine

FORMAT = 1
PASS, FAIL, INCOMPLETE = "pass", "fail", "incomplete"
MAX_DIVERGENCES = 20  # written down per comparison; all are counted
SIGNIFICANT_DIGITS = 6

TokenText = Callable[[int], str]


class Certification:
    """Compares one engine's speculative decoding with its target's own.

    Args:
        engine: Idle, and used by nobody else until `run` is over.
        settings: What is compared and how much of it.
        token_text: Token id to text, for the report.
    """

    def __init__(
        self,
        engine: Engine,
        settings: CertifySettings,
        *,
        token_text: TokenText = str,
    ) -> None:
        self._settings = settings
        self._token_text = token_text
        self._info = target_of(engine).info
        self._rule = rule_of(engine).exactness
        self._exactness = engine.exactness
        self._identity = IdentityCheck(engine, settings)
        self._distributions = [
            DistributionCheck(engine, settings, temperature)
            for temperature in settings.temperatures
            if temperature > 0
        ]
        self._is_complete = False

    def run(self, report: OnProgress = silent) -> None:
        """Do all the work; if it is interrupted, `record` tells what was finished.

        Args:
            report: Told how far the work is, if anybody wants to know.

        Raises:
            RequestError: A prompt does not fit, or the rule refuses the drafts it is given.
        """
        total = self._identity.num_texts + sum(check.num_texts for check in self._distributions)
        done = 0

        def count(doing: str) -> None:
            nonlocal done
            done += 1
            report(Progress(done=done, total=total, detail=doing))

        self._identity.run(count)
        for check in self._distributions:
            check.run(count)
        self._is_complete = True

    # -- the record --------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Return what was found as a JSON object, without anything that is not a number."""
        distributions = self._judged_distributions()
        reasons = [*self._identity_reasons(), *self._distribution_reasons(distributions)]
        verdict = FAIL if reasons else PASS
        return {
            "what": "foretoken verify",
            "format": FORMAT,
            "verdict": verdict if self._is_complete else INCOMPLETE,
            "reasons": reasons,
            "notes": list(self._notes()),
            "exactness": self._exactness.value,
            "exactness_of_target": self._info.exactness.value,
            "exactness_of_rule": self._rule.value,
            "inexact_because": self._info.inexact_because,
            "false_alarm": FALSE_ALARM if self._distributions else 0.0,
            "work": {
                "num_prompts": len(self._settings.prompts),
                "temperatures": self._settings.temperatures,
                "num_seeds": self._settings.num_seeds,
                "batch_sizes": list(self._settings.batch_sizes),
                "num_samples": self._settings.num_samples,
                "sample_tokens": self._settings.sample_tokens,
                "seed": self._settings.seed,
                "allow_lossy": self._settings.allow_lossy,
            },
            "identity": {
                "noise": {
                    "num_rows": self._identity.noise.num_rows,
                    "row_difference": _number(self._identity.noise.row_difference),
                    "factor": NOISE_FACTOR,
                },
                "tolerance": _number(self._tolerance),
                "comparisons": [self._comparison(item) for item in self._identity.comparisons],
            },
            "distribution": distributions,
        }

    @property
    def _tolerance(self) -> float:
        return self._identity.noise.tolerance(self._info)

    @property
    def _is_lossless(self) -> bool:
        return self._rule is not Exactness.LOSSY

    def _is_failure(self, comparison: Comparison, divergence: Divergence) -> bool:
        """Whether a difference is more than the exactness allows."""
        if not comparison.is_promised:
            return False
        is_numerical = self._info.exactness is not Exactness.BITWISE
        is_explained = divergence.cause == LOGITS and divergence.row_difference <= self._tolerance
        return not (is_numerical and is_explained)

    def _identity_reasons(self) -> Iterator[str]:
        for item in self._identity.comparisons:
            failures = [it for it in item.divergences if self._is_failure(item, it[1])]
            if failures:
                yield (
                    f"{describe_way(item)}: {len(failures)} of {item.num_texts} texts are not "
                    "plain decoding's"
                )
            yield from self._row_reasons(describe_way(item), item)
        for check in self._distributions:
            yield from self._row_reasons(
                f"samples at temperature {check.temperature:g}", check.rows
            )

    def _row_reasons(self, where: str, rows: Any) -> Iterator[str]:
        different = rows.num_rows - rows.num_same_rows
        if self._info.exactness is Exactness.BITWISE and different:
            yield (
                f"{where}: {different} of {rows.num_rows} rows of logits have other bits, although "
                "the target claims bitwise"
            )
        elif rows.row_difference > self._tolerance:
            yield (
                f"{where}: logits differ by up to {rows.row_difference:.3g}; rounding explains "
                f"{self._tolerance:.3g}"
            )

    def _distribution_reasons(self, distributions: list[dict[str, Any]]) -> Iterator[str]:
        if not self._is_lossless:
            if not self._settings.allow_lossy:
                yield "the rule is lossy by its own account"
            return
        is_bitwise = self._info.exactness is Exactness.BITWISE
        for check, entry in zip(self._distributions, distributions, strict=True):
            where = f"temperature {check.temperature:g}"
            if check.sample.num_impossible and is_bitwise:
                yield f"{where}: {check.sample.num_impossible} tokens have probability 0"
            if self._is_complete and not entry["tests"]:
                yield f"{where}: too few samples for any test"
            for test in entry["tests"]:
                if test["adjusted_p_value"] < FALSE_ALARM:
                    yield (
                        f"{where}: {test['name']} do not have the target's distribution "
                        f"(p = {test['adjusted_p_value']:.2g})"
                    )

    def _notes(self) -> Iterator[str]:
        speculative = [item for item in self._identity.comparisons if item.is_speculative]
        strata = [check.sample.strata() for check in self._distributions]
        num_drafted = sum(item.num_draft_tokens for item in speculative)
        num_drafted += sum(
            count for entry in strata for name, count in entry.items() if name != "no draft"
        )
        if self._is_complete and not num_drafted:
            yield "nothing was drafted, so speculation was not put to the test"
        if not self._distributions:
            yield "no temperature above 0: nothing is drawn, so there is no distribution to test"
        if not self._is_lossless and self._settings.allow_lossy:
            yield "the rule is lossy: its distribution was measured and not judged"

    # -- parts of the record -----------------------------------------------------------------

    def _comparison(self, item: Comparison) -> dict[str, Any]:
        return {
            "temperature": item.temperature,
            "is_speculative": item.is_speculative,
            "batch_size": item.batch_size,
            "is_promised": item.is_promised,
            "num_texts": item.num_texts,
            "num_same_texts": item.num_same_texts,
            "num_rows": item.num_rows,
            "num_same_rows": item.num_same_rows,
            "row_difference": _number(item.row_difference),
            "num_draft_tokens": item.num_draft_tokens,
            "num_accepted": item.num_accepted,
            "num_divergences": len(item.divergences),
            "divergences": [
                self._divergence(item, case, divergence)
                for case, divergence in item.divergences[:MAX_DIVERGENCES]
            ],
        }

    def _divergence(self, item: Comparison, case: Case, divergence: Divergence) -> dict[str, Any]:
        entry = divergence.as_dict()
        for name in ("plain", "found"):
            if entry[name] is not None:
                entry[name]["text"] = self._token_text(entry[name]["token_id"])
        return {
            "prompt_index": case.prompt_index,
            "place": case.prompt.place,
            "seed": case.seed,
            "is_failure": self._is_failure(item, divergence),
            **entry,
        }

    def _judged_distributions(self) -> list[dict[str, Any]]:
        """Return part two; its p-values are adjusted for all tests of all temperatures."""
        tests = [check.sample.tests() for check in self._distributions]
        flat = [test for group in tests for test in group]
        adjusted = iter(holm([test.p_value for test in flat]))
        return [
            {
                "temperature": check.temperature,
                "num_texts": check.sample.num_texts,
                "num_tokens": check.sample.num_tokens,
                "num_impossible": int(check.sample.num_impossible),
                "places": check.sample.strata(),
                "num_rows": check.rows.num_rows,
                "num_same_rows": check.rows.num_same_rows,
                "row_difference": _number(check.rows.row_difference),
                "tests": [_test(test, next(adjusted), len(flat)) for test in group],
                "distances": [_distance(it) for it in check.sample.distances()],
            }
            for check, group in zip(self._distributions, tests, strict=True)
        ]


def _test(test: FitTest, adjusted: float, num_tests: int) -> dict[str, Any]:
    return {
        "name": test.name,
        "num_observations": test.num_observations,
        "statistic": _number(test.statistic),
        "kind": "chi-square" if test.degrees else "standardized sum",
        "degrees": test.degrees,
        "p_value": _number(test.p_value),
        "adjusted_p_value": _number(adjusted),
        "detectable_distance": _number(test.detectable_distance(FALSE_ALARM / num_tests)),
        "power": POWER,
    }


def _distance(distance: Distance) -> dict[str, Any]:
    return {
        "order": distance.order,
        "num_observations": distance.num_observations,
        "distance": _number(distance.distance),
        "resolution": _number(distance.resolution),
        "resolution_level": DISTANCE_LEVEL,
    }


def _number(value: float) -> float | None:
    """Return the value with as many digits as it can mean; None if it is not finite."""
    known = finite(value)
    return None if known is None else float(f"{known:.{SIGNIFICANT_DIGITS}g}")


__all__ = ["FAIL", "INCOMPLETE", "PASS", "Certification"]
