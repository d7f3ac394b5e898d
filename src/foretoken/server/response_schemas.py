"""What answers hold, for readers of /openapi.json; the answers themselves are plain objects."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """An object that has the fields named, and no others."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Answer):
    """What went wrong."""

    message: str = Field(description="What is wrong and what to do, in one line.")
    type: str = Field(description="A kind of error.")
    param: str | None = Field(description="The field at fault, with its path in dots.")
    code: str | None = Field(description="A word for programs.")


class ErrorBody(Answer):
    """The body of every answer that is an error, and of an event when a stream fails."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    """Parts of the prompt's tokens."""

    cached_tokens: int = Field(description="Taken over from earlier requests.")


class CompletionTokensDetails(Answer):
    """Tokens that a prediction offered."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    """What a call took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Summary(Answer):
    """How the choices of an answer came about."""

    seeds: list[int] = Field(description="Of each choice; give one to get its tokens again.")
    exactness: str = Field(description="How closely output follows plain decoding.")
    stats: list[dict[str, Any]] = Field(description="Counts and times of each choice.")


class SourcedToken(Answer):
    """A token and who guessed it."""

    id: int
    text: str = Field(description="The characters that it completes.")
    source: str = Field(description='The drafter, "a+b" if several; "" for the target itself.')


class Details(Answer):
    """The tokens of a choice or of what a chunk adds to it."""

    tokens: list[SourcedToken]


class TopLogprob(Answer):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token, how likely it was, and what else could have stood there."""

    top_logprobs: list[TopLogprob]


class CompletionLogprobs(Answer):
    """Columns with a place per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where tokens begin in the text, in characters.")


class Choice(Answer):
    """What choices of both kinds have."""

    index: int
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: list[TokenLogprob] | None = None
    foretoken: Details | None = Field(None, description="Only with `speculation.details`.")


class CompletionChoice(Choice):
    """One text."""

    text: str
    logprobs: CompletionLogprobs | None


class Whole(Answer):
    """What answers of both kinds have."""

    id: str
    created: int
    model: str
    usage: Usage
    foretoken: Summary


class Completion(Whole):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatLogprobs(Answer):
    """An entry per token."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    """One message."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(Whole):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelCard(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the server began, in seconds since 1970.")
    owned_by: str
    max_model_len: int = Field(description="Tokens that prompt and output have together at most.")


class ModelList(Answer):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


_ERRORS: dict[int | str, str] = {
    400: "The request is wrong; `error.param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says when to try again.",
    503: "The server starts or shuts down; `Retry-After` says when to try again.",
    504: "The request's time was over.",
    "default": "Something else went wrong.",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in _ERRORS.items()
}


def generation_responses(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return what a completion's route may answer, for its documentation."""
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "A chunk, as JSON, or [DONE]."}},
        "required": ["data"],
    }
    whole = {
        "model": model,
        "description": "The answer; with `stream`, its chunks as server-sent events.",
        "content": {"text/event-stream": {"itemSchema": event}},
    }
    return {200: whole, **ERROR_RESPONSES}


__all__ = [
    "ERROR_RESPONSES",
    "ChatCompletion",
    "Completion",
    "ModelCard",
    "ModelList",
    "generation_responses",
]
