"""Answers, whole or in pieces: one writer per choice makes both, so that they cannot differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from foretoken.engine.request import Emission, FinishReason, Request
from foretoken.errors import RequestError
from foretoken.server.params import Call
from foretoken.server.submission import EngineFailedError, Running
from foretoken.server.token_texts import TextCursor, TokenTexts

FINISH_WORDS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
}
REFERENCE = "reference"  # the drafter that copies from predictions


class Writer(Protocol):
    """Writes one choice."""

    def chunk(self, emission: Emission) -> dict[str, Any] | None:
        """Return what an emission adds to a streamed choice; None if that is nothing."""

    def whole(self, emission: Emission) -> dict[str, Any]:
        """Return the choice, given all its emissions as one."""


MakeWriter = Callable[[Call, int, Request, TokenTexts], Writer]
"""Makes the writer of a call's choice, given its index and its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of completion: how its answers are written and what they are called.

    Args:
        prefix: Ids of answers begin with it.
        whole_object: What an answer calls itself.
        chunk_object: What a chunk of a streamed one calls itself.
        make_writer: Makes the writers of its choices.
    """

    prefix: str
    whole_object: str
    chunk_object: str
    make_writer: MakeWriter


class ChoiceWriter:
    """What writers of all kinds share: places in the text, and who guessed which token.

    Args:
        call: Whose choice it is.
        index: Of the choice.
        request: Of the choice.
        texts: The model's tokens.
    """

    def __init__(self, call: Call, index: int, request: Request, texts: TokenTexts) -> None:
        self.index = index
        self.request = request
        self.texts = texts
        self.prompt = call.prompts[index]
        self.reports_logprobs = request.params.logprobs is not None
        self.is_first = True  # until something was written
        self._has_details = call.has_details
        self._details = TextCursor(texts)

    def has_news(self, emission: Emission) -> bool:
        """Return whether a client learns anything of an emission."""
        has_tokens = emission.token_ids and (self._has_details or self.reports_logprobs)
        return bool(emission.text or has_tokens or emission.finish_reason)

    def extras(self, emission: Emission) -> dict[str, Any]:
        """Return what a choice holds beyond OpenAI's fields; call it once per emission."""
        extras: dict[str, Any] = {}
        if self.is_first and self.request.params.prompt_logprobs is not None:
            extras["prompt_logprobs"] = self.texts.chat_logprobs(self.request.prompt_logprobs)
        if self._has_details:
            pairs = zip(emission.token_ids, emission.sources, strict=True)
            tokens = [
                {"id": token_id, "text": self._details.advance(token_id), "source": source}
                for token_id, source in pairs
            ]
            extras["foretoken"] = {"tokens": tokens}
        return extras


def joined(emissions: Sequence[Emission]) -> Emission:
    """Return successive emissions of one request as one."""
    if len(emissions) == 1:
        return emissions[0]
    return Emission(
        request_id=emissions[-1].request_id,
        token_ids=tuple(token_id for item in emissions for token_id in item.token_ids),
        sources=tuple(source for item in emissions for source in item.sources),
        text="".join(item.text for item in emissions),
        finish_reason=emissions[-1].finish_reason,
        logprobs=tuple(entry for item in emissions for entry in item.logprobs),
    )


def finish_word(emission: Emission) -> str | None:
    """Return OpenAI's word for why a choice ended; None if it did not, or not as it should."""
    return FINISH_WORDS.get(emission.finish_reason) if emission.finish_reason else None


def failure_of(request: Request, emission: Emission) -> RequestError | EngineFailedError | None:
    """Return why a request ended without being complete; None if it goes on or is."""
    if emission.finish_reason is None or emission.finish_reason in FINISH_WORDS:
        return None
    return request.error or EngineFailedError("the request was ended from outside")


def envelope(call: Call, object_name: str) -> dict[str, Any]:
    """Return the fields that every answer and chunk begins with."""
    return {
        "id": call.response_id,
        "object": object_name,
        "created": call.created,
        "model": call.model,
    }


def usage(call: Call, runnings: Sequence[Running]) -> dict[str, Any]:
    """Return what a call took, in tokens; a prompt counts once however many its choices are."""
    requests = [running.request for running in runnings]
    prompts = requests[:: call.num_choices]
    num_prompt = sum(request.num_prompt_ids for request in prompts)
    num_output = sum(request.stats.num_tokens for request in requests)
    num_copied = sum(request.stats.drafted_by[REFERENCE] for request in requests)
    num_accepted = sum(request.stats.accepted_by[REFERENCE] for request in requests)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {
            "cached_tokens": sum(request.stats.num_cached_prompt_tokens for request in prompts)
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": num_accepted,
            "rejected_prediction_tokens": max(0, num_copied - num_accepted),
        },
    }


def summary(runnings: Sequence[Running], exactness: str) -> dict[str, Any]:
    """Return the object `foretoken` of an answer: how its choices came about."""
    requests = [running.request for running in runnings]
    return {
        "seeds": [request.seed for request in requests],
        "exactness": exactness,
        "stats": [
            {
                **request.stats.as_dict(),
                "drafted_by": dict(request.stats.drafted_by),
                "accepted_by": dict(request.stats.accepted_by),
                "finish_reason": request.finish_reason.value if request.finish_reason else None,
            }
            for request in requests
        ],
    }


__all__ = [
    "ChoiceWriter",
    "Kind",
    "Writer",
    "envelope",
    "failure_of",
    "finish_word",
    "joined",
    "summary",
    "usage",
]
