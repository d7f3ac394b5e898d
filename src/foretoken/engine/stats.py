"""Counts and times of a request; everything else is derived from them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from foretoken.core.draft import source_names


@dataclass(slots=True)
class RequestStats:
    """What one request cost and gained.

    Args:
        num_tokens: Tokens emitted.
        num_steps: Passes of the target that emitted at least one token.
        num_draft_tokens: Draft tokens scored, root not counted.
        num_accepted: Draft tokens emitted.
        accepted_by: The same by drafter; a token that several proposed counts for each.
        prefill_s: Seconds from the first scheduling to the first token.
        decode_s: Seconds from the first token to the last.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    accepted_by: Counter[str] = field(default_factory=Counter)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    _started_s: float | None = None
    _first_token_s: float | None = None

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per pass of the target, the target's own token included."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted per scored draft token; falls as the tree gets wider."""
        return self.num_accepted / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens per second, prefill included."""
        total_s = self.prefill_s + self.decode_s
        return self.num_tokens / total_s if total_s > 0 else 0.0

    def start(self) -> None:
        """Note that the request was scheduled for the first time."""
        if self._started_s is None:
            self._started_s = time.perf_counter()

    def add_step(self, num_draft_tokens: int, sources: list[str]) -> None:
        """Count one step; `sources` names the drafter of each emitted token, "" for the target."""
        self.num_steps += 1
        self.num_tokens += len(sources)
        self.num_draft_tokens += num_draft_tokens
        for source in sources:
            if source:
                self.num_accepted += 1
                self.accepted_by.update(source_names(source))
        now_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = now_s
            self.prefill_s = now_s - (self._started_s or now_s)
        self.decode_s = now_s - self._first_token_s

    def as_dict(self) -> dict[str, float | int]:
        """Return what the JSON output shows."""
        return {
            "num_steps": self.num_steps,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted": self.num_accepted,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "prefill_s": round(self.prefill_s, 6),
            "decode_s": round(self.decode_s, 6),
            "tokens_per_s": round(self.tokens_per_s, 3),
        }
