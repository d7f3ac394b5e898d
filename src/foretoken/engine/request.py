"""One request: what it asks, what it has, and when it ends."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from foretoken.core.grammar import GrammarState
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.engine.logprobs import TokenLogprobs
from foretoken.engine.stats import RequestStats
from foretoken.engine.text import Decode, TextStream
from foretoken.errors import RequestError
from foretoken.models.adapter import ModelInfo


class FinishReason(enum.Enum):
    """Why a request ended."""

    LENGTH = "length"  # max_new_tokens or the context limit
    EOS = "eos"
    STOP = "stop"  # a stop text, a stop token or the end of a grammar
    ABORT = "abort"
    ERROR = "error"  # something of the request's own went wrong; the others go on


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step gave one request.

    Args:
        request_id: Whose it is.
        token_ids: New tokens.
        sources: For each, the drafter that guessed it; "" for the target's own.
        text: New text that can no longer change; may lag behind the tokens.
        finish_reason: Set with the last emission.
        logprobs: One entry per token, if the request asked for them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sources: tuple[str, ...]
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()


def join_emissions(emissions: Sequence[Emission]) -> Emission:
    """Return what several emissions gave one request, one after the other, as one."""
    if len(emissions) == 1:
        return emissions[0]
    return Emission(
        emissions[0].request_id,
        tuple(token_id for it in emissions for token_id in it.token_ids),
        tuple(source for it in emissions for source in it.sources),
        "".join(it.text for it in emissions),
        emissions[-1].finish_reason,
        tuple(entry for it in emissions for entry in it.logprobs),
    )


class Request:
    """State of one request. Its token ids are stored once; counts and limits are derived.

    Args:
        request_id: Unique among unfinished requests.
        prompt_ids: At least one token.
        params: What it asks.
        seed: Key of its noise.
        drafters: Labels of the drafters that draft for it; none means plain decoding.
        info: The target, for its end-of-sequence tokens and context limit.
        decode: Token ids to text, or None.
        grammar: What its output must follow, or None.
        reference_ids: A text that drafters may copy from; empty if there is none.
        max_nodes: Most draft tokens per step; None for as many as the plan allows.

    Attributes:
        streams_text: Whether every emission has the text that is new; else the last one has all.
    """

    def __init__(  # noqa: PLR0913 - one parameter is one part
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        drafters: tuple[str, ...],
        info: ModelInfo,
        decode: Decode | None,
        grammar: GrammarState | None = None,
        reference_ids: Sequence[int] = (),
        max_nodes: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.max_nodes = max_nodes
        self.reference_ids = reference_ids
        self.params = params
        self.seed = seed
        self.drafters = drafters
        self.token_ids = list(prompt_ids)
        self.num_prompt_ids = len(prompt_ids)
        self._eos_ids = frozenset() if params.ignore_eos else info.eos_ids
        self._stop_ids = frozenset(params.stop_token_ids)
        self._grammar = grammar
        self.sampler = Sampler(
            params, seed, len(prompt_ids), eos_ids=self._eos_ids, grammar=grammar
        )
        self.streams_text = True
        self.text_stream = TextStream(decode, prompt_ids, params.stop)
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.stats = RequestStats()
        self.max_tokens = min(self.num_prompt_ids + params.max_new_tokens, info.context_limit)

    @property
    def temperature(self) -> float:
        """Of its sampling; 0 if greedy."""
        return 0.0 if self.sampler.is_greedy else self.sampler.temperature

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt."""
        return self.token_ids[: self.num_prompt_ids]

    @property
    def output_ids(self) -> list[int]:
        """The output so far."""
        return self.token_ids[self.num_prompt_ids :]

    @property
    def num_wanted(self) -> int:
        """Tokens that the request can still take."""
        return self.max_tokens - len(self.token_ids)

    def take(
        self,
        token_ids: Sequence[int],
        sources: Sequence[str],
        drafted: Sequence[str] = (),
        logprobs: Sequence[TokenLogprobs] = (),
        *,
        is_pass: bool = True,
    ) -> Emission:
        """Take tokens that stand, up to the first that ends the output.

        Args:
            token_ids: New tokens.
            sources: For each, the drafter that guessed it; "" for the target's own.
            drafted: Sources of the draft tokens that were scored for them.
            logprobs: One entry per token, if the request asks for them.
            is_pass: Whether they are what a pass of the target brought, as for `add_step`.
        """
        token_ids = self._cut(token_ids)
        logprobs = tuple(logprobs[: len(token_ids)])
        self.logprobs += logprobs
        sources = sources[: len(token_ids)]
        self.token_ids += token_ids
        self.stats.add_step(drafted, sources, is_pass=is_pass)
        is_finished = self.finish_reason is not None
        text = self.text_stream.take() if self.streams_text else ""
        if is_finished:
            text += self.text_stream.finish()
        return Emission(
            self.request_id, tuple(token_ids), tuple(sources), text, self.finish_reason, logprobs
        )

    def fail(self, error: RequestError) -> Emission:
        """End because of an error of the request's own; what was emitted stands."""
        self.error = error
        self.finish_reason = FinishReason.ERROR
        return Emission(self.request_id, (), (), self.text_stream.finish(), self.finish_reason)

    def _cut(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens that still belong to the output; set the reason if it ends."""
        kept = list(token_ids[: self.num_wanted])
        reason = FinishReason.LENGTH if len(kept) == self.num_wanted else None
        failed_at = self.sampler.failed_at
        if failed_at is not None and failed_at < len(self.token_ids) + len(kept):
            # The choices before it are those of plain decoding, which may end before it comes here.
            kept, reason = kept[: failed_at - len(self.token_ids)], FinishReason.ERROR
        end = self._first_end(kept)
        if end is not None:
            kept, reason = kept[: end[0]], end[1]
        num_until_stop = self.text_stream.push(kept)
        if num_until_stop is not None:
            kept = kept[:num_until_stop]
            reason = FinishReason.STOP
        self.finish_reason = reason
        self.error = self.sampler.failure if reason is FinishReason.ERROR else None
        return kept

    def _first_end(self, token_ids: Sequence[int]) -> tuple[int, FinishReason] | None:
        """Return after how many of some new tokens the output ends, and why, if it does."""
        grammar = self._grammar
        for count, token_id in enumerate(token_ids, start=1):
            if token_id in self._eos_ids:
                return count, FinishReason.EOS
            if token_id in self._stop_ids:
                return count, FinishReason.STOP
            if grammar is not None and grammar.is_complete(self.token_ids, token_ids[:count]):
                return count, FinishReason.STOP
        return None
