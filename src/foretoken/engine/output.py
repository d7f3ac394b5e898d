"""What comes out: finished requests, and what each step adds to a streamed one."""

from __future__ import annotations

from dataclasses import dataclass

from foretoken.core.verdict import Exactness
from foretoken.engine.logprobs import TokenLogprobs
from foretoken.engine.request import FinishReason
from foretoken.engine.stats import RequestStats
from foretoken.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Args:
        index: Place of the prompt in the call.
        prompt: As given; the decoded text if token ids were given.
        prompt_ids: The prompt's token ids.
        text: Output text, without end-of-sequence token and without anything from a stop text.
        token_ids: Output token ids, the end-of-sequence token included.
        finish_reason: Why it ended.
        seed: Key of its noise; give it again to get the same tokens.
        exactness: How closely the output follows plain decoding.
        stats: Counts and times.
        logprobs: One entry per output token, if the request asked for them.
        prompt_logprobs: One entry per token of the prompt after the first, likewise.
        error: What went wrong, if the finish reason is an error; what was generated before stands.
    """

    index: int
    prompt: str
    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    seed: int
    exactness: Exactness
    stats: RequestStats
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: RequestError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChunk:
    """What one step added to a streamed request.

    Args:
        text: New text that can no longer change; may lag behind the tokens.
        token_ids: New tokens.
        sources: For each token, the drafter that guessed it; "" for the target's own.
        logprobs: One entry per token, if the request asked for them.
        output: The whole output, with the last chunk.
    """

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[str, ...]
    logprobs: tuple[TokenLogprobs, ...]
    output: RequestOutput | None
