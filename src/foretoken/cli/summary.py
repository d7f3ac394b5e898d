"""The statistics line, and the comparison with plain decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from foretoken.cli.terminal import ACCEPTED, paint
from foretoken.core.verdict import Exactness
from foretoken.errors import ForetokenError

if TYPE_CHECKING:
    from typing import TextIO

    from foretoken.cli.prompts import Job
    from foretoken.engine.llm import RequestOutput

T = TypeVar("T")


@dataclass(slots=True)
class Run:
    """What a set of prompts gave and how long the engine worked on it.

    Args:
        outputs: Finished ones.
        elapsed_s: Seconds that the engine took; showing and writing results is not counted.
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    elapsed_s: float = 0.0

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, counting only the time until each is there."""
        while True:
            started_s = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.elapsed_s += time.perf_counter() - started_s
            yield item

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return sum(output.stats.num_tokens for output in self.outputs)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, prefill included."""
        return self.num_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


def describe(run: Run, jobs: Sequence[Job], stream: TextIO) -> str:
    """Return the statistics of a run as one line.

    Args:
        run: At least one output.
        jobs: What was asked.
        stream: Where the line will be shown; decides on colour.
    """
    num_steps = sum(output.stats.num_steps for output in run.outputs)
    num_draft_tokens = sum(output.stats.num_draft_tokens for output in run.outputs)
    num_accepted = sum(output.stats.num_accepted for output in run.outputs)
    per_step = run.num_tokens / num_steps if num_steps else 0.0
    drafts = "no draft tokens"
    if num_draft_tokens:
        share = 100 * num_accepted / num_draft_tokens
        drafts = f"{share:.0f} % of {_count(num_draft_tokens, 'draft token')} accepted"
        drafts = paint(drafts, ACCEPTED, stream)
    prompts = f"{len(run.outputs)} prompts, " if len(jobs) > 1 else ""
    return (
        f"{prompts}{_count(run.num_tokens, 'token')} in {_count(num_steps, 'step')}: "
        f"{per_step:.1f} tokens per step, {drafts}, {run.tokens_per_s:.1f} tokens/s "
        f"({_how(run, jobs)})"
    )


def describe_comparison(run: Run, plain: Run) -> str:
    """Return how plain decoding of the same prompts did.

    Raises:
        ForetokenError: It gave other tokens although the same ones are promised.
    """
    different = [
        (ours, theirs)
        for ours, theirs in zip(_in_order(run), _in_order(plain), strict=True)
        if ours.token_ids != theirs.token_ids
    ]
    exactness = run.outputs[0].exactness
    if different and exactness in (Exactness.BITWISE, Exactness.NUMERICAL):
        raise _other_tokens(different, len(run.outputs), exactness)
    same = "other tokens, as its exactness allows" if different else "the same tokens"
    ratio = run.tokens_per_s / plain.tokens_per_s if plain.tokens_per_s else 0.0
    return f"plain decoding: {plain.tokens_per_s:.1f} tokens/s, {same}; {_times(ratio)}"


def _other_tokens(
    different: Sequence[tuple[RequestOutput, RequestOutput]], num_prompts: int, level: Exactness
) -> ForetokenError:
    ours, theirs = different[0]
    pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
    shorter = min(len(ours.token_ids), len(theirs.token_ids))
    first = next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)
    hint = "report it: this must not happen"
    if level is Exactness.NUMERICAL:
        hint = (
            "exactness numerical allows this at near ties only: try --dtype float64, or report it"
        )
    return ForetokenError(
        f"plain decoding gave other tokens for {len(different)} of {_count(num_prompts, 'prompt')};"
        f" first at output token {first + 1} of prompt {ours.index + 1}",
        hint=hint,
    )


def _how(run: Run, jobs: Sequence[Job]) -> str:
    """Return what the numbers depend on: the sampling, and how exact the output is."""
    modes = {"greedy" if job.params.is_greedy else "sampled" for job in jobs}
    mode = modes.pop() if len(modes) == 1 else "greedy and sampled"
    if len(jobs) == 1 and mode == "sampled":
        mode = f"temperature {jobs[0].params.temperature:g}, seed {run.outputs[0].seed}"
    return f"{mode}, exactness {run.outputs[0].exactness.value}"


def _times(ratio: float) -> str:
    return f"drafting is {ratio:.2f} times as fast"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _in_order(run: Run) -> list[RequestOutput]:
    return sorted(run.outputs, key=lambda output: output.index)


__all__ = ["Run", "describe", "describe_comparison"]
