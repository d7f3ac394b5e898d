"""Counts and times of a request; everything else is derived from them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from foretoken.core.draft import source_names


@dataclass(slots=True)
class RequestStats:
    """What one request cost and gained.

    Args:
        num_tokens: Tokens emitted.
        num_steps: Passes of the target that emitted at least one token. Where it runs loop by
            loop, as many loops as it has count as one pass, the first of them at once.
        num_ticks: Loops, where it runs loop by loop.
        num_draft_tokens: Draft tokens scored, root not counted.
        drafted_by: The same by drafter; a token that several proposed counts for each.
        num_accepted: Draft tokens emitted.
        accepted_by: The same by drafter, counted likewise.
        num_cached_prompt_tokens: Tokens of the prompt that were cached when it was fed.
        num_preemptions: How often it was thrown back for want of KV cache.
        prefill_s: Seconds from the first scheduling to the first token.
        decode_s: Seconds from the first token to the last.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_ticks: int = 0
    num_draft_tokens: int = 0
    drafted_by: Counter[str] = field(default_factory=Counter)
    num_accepted: int = 0
    accepted_by: Counter[str] = field(default_factory=Counter)
    num_cached_prompt_tokens: int = 0
    num_preemptions: int = 0
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

    @property
    def started_s(self) -> float | None:
        """When it was first admitted, by `time.perf_counter`; None if it still waits."""
        return self._started_s

    def start(self, num_cached: int = 0) -> None:
        """Note that the prompt is about to be fed, but for so many tokens that are cached.

        The time of the first call counts, and what was cached at the last one before the output.
        """
        if self._started_s is None:
            self._started_s = time.perf_counter()
        if not self.num_tokens:
            self.num_cached_prompt_tokens = num_cached

    def add_tick(self, num_loops: int) -> None:
        """Count one loop of a target that has so many."""
        self.num_steps += self.num_ticks % num_loops == 0
        self.num_ticks += 1

    def add_drafted(self, drafted: Sequence[str]) -> None:
        """Count draft tokens that were scored, by their sources."""
        self.num_draft_tokens += len(drafted)
        _count(self.drafted_by, drafted)

    def add_step(
        self, drafted: Sequence[str], sources: Sequence[str], *, is_pass: bool = True
    ) -> None:
        """Count what one step brought.

        Args:
            drafted: Sources of the draft tokens that were scored.
            sources: Sources of the tokens that were emitted; "" for the target.
            is_pass: Whether it was a pass of the target; else its loops are counted one by one.
        """
        accepted = [source for source in sources if source]
        self.num_steps += is_pass
        self.num_tokens += len(sources)
        self.add_drafted(drafted)
        self.num_accepted += len(accepted)
        _count(self.accepted_by, accepted)
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


def _count(counts: Counter[str], sources: Sequence[str]) -> None:
    """Count each source for every drafter that it names."""
    for source in dict.fromkeys(sources):  # most are the same
        for name in source_names(source):
            counts[name] += sources.count(source)
