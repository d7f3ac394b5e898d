"""Why two runs went different ways: the first row at which they did, and the two tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foretoken.certify.passes import largest_difference, same_bits, ulp
from foretoken.core.sampling import Sampler

RULE = "rule"  # its own row says otherwise
LOGITS = "logits"  # the rows differ, and each run followed its own
END = "end"  # same tokens, but one text ended earlier or for another reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One of the two tokens, as both runs saw it.

    Args:
        token_id: Which.
        plain_logit: In plain decoding's row.
        found_logit: In the other run's row.
        plain_score: What it was ranked by in plain decoding: the logit after every control, with
            the race's noise if sampled.
        found_score: The same in the other run.
    """

    token_id: int
    plain_logit: float
    found_logit: float
    plain_score: float
    found_score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where a text first differed from plain decoding's.

    Args:
        position: Index of the output token.
        cause: `RULE`, `LOGITS` or `END`.
        plain: Plain decoding's token; None for `END`.
        found: The other run's; None for `END`.
        margin: By how much plain decoding preferred its token, in score, which is logits over
            temperature if sampled.
        margin_ulp: The margin in units in the last place of the dtype, at the larger logit.
        row_difference: Largest difference between the two rows.
        rows_same: Whether the two rows are the same bits.
        detail: How both ended, for `END`.
    """

    position: int
    cause: str
    plain: Contender | None = None
    found: Contender | None = None
    margin: float = 0.0
    margin_ulp: float = 0.0
    row_difference: float = 0.0
    rows_same: bool = True
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as a JSON object; what is not finite is null."""
        return {
            "position": self.position,
            "cause": self.cause,
            "plain": _contender(self.plain),
            "found": _contender(self.found),
            "margin": finite(self.margin),
            "margin_ulp": finite(self.margin_ulp),
            "row_difference": finite(self.row_difference),
            "rows_same": self.rows_same,
            "detail": self.detail,
        }


def explain(
    sampler: Sampler,
    history: Sequence[int],
    position: int,
    rows: tuple[Tensor, Tensor],
    token_ids: tuple[int, int],
) -> Divergence:
    """Return why two runs with one history chose different tokens.

    Args:
        sampler: A fresh one of the request's.
        history: Prompt and output before the token, the same in both runs.
        position: Index of the output token.
        rows: [V] each: plain decoding's, the other run's.
        token_ids: Chosen from them.
    """
    plain_row, found_row = rows
    plain_id, found_id = token_ids
    chosen_id = sampler.choose(found_row, history)
    scores = [sampler.race_scores(row.unsqueeze(0), history, [()])[0] for row in rows]
    contenders = [
        Contender(
            token_id=token_id,
            plain_logit=float(plain_row[token_id]),
            found_logit=float(found_row[token_id]),
            plain_score=float(scores[0][token_id]),
            found_score=float(scores[1][token_id]),
        )
        for token_id in token_ids
    ]
    margin = float(scores[0][plain_id] - scores[0][found_id])
    logit = max(abs(contenders[0].plain_logit), abs(contenders[1].plain_logit))
    is_finite = math.isfinite(logit)
    return Divergence(
        position=position,
        cause=LOGITS if chosen_id == found_id else RULE,
        plain=contenders[0],
        found=contenders[1],
        margin=margin,
        margin_ulp=margin / ulp(logit, plain_row.dtype) if is_finite else math.inf,
        row_difference=largest_difference(plain_row, found_row),
        rows_same=same_bits(plain_row, found_row),
    )


def finite(value: float) -> float | None:
    """Return the value, None if JSON has no word for it."""
    return value if math.isfinite(value) else None


def _contender(contender: Contender | None) -> dict[str, Any] | None:
    if contender is None:
        return None
    return {
        "token_id": contender.token_id,
        "plain_logit": finite(contender.plain_logit),
        "found_logit": finite(contender.found_logit),
        "plain_score": finite(contender.plain_score),
        "found_score": finite(contender.found_score),
    }


__all__ = ["END", "LOGITS", "RULE", "Contender", "Divergence", "explain", "finite"]
