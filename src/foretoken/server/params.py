"""From a checked body to what the engine is asked for."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foretoken.core.noise import derive_seed
from foretoken.core.params import MAX_SEED, SamplingParams
from foretoken.engine.llm import LLM
from foretoken.errors import RequestError
from foretoken.models.cache import BLOCK_SIZE
from foretoken.server.errors import FieldError, UnknownModelError
from foretoken.server.schemas import Content, GenerationRequest, JsonSchemaFormat
from foretoken.server.settings import ServerSettings
from foretoken.server.submission import Submission

DEFAULT_TEMPERATURE = 1.0  # OpenAI's; the engine's own is 0

# Sampling parameters that the API calls the same and that need no translation.
_SAME = {item.name for item in dataclasses.fields(SamplingParams)} - {
    "max_new_tokens",
    "min_new_tokens",
    "logits_processors",
    "json_schema",
    "logprobs",
    "seed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as the engine and as an echo want it."""

    token_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """All that one HTTP request asks for.

    Args:
        response_id: Names the answer.
        model: The served model's name.
        submissions: One per choice; those of one prompt stand together.
        prompts: The prompt of each choice.
        num_choices: Per prompt.
        is_stream: Whether chunks are sent as they come.
        has_usage: Whether a stream ends with what it took.
        has_details: Whether choices carry their tokens.
        created: When the request came, in seconds since 1970.
    """

    response_id: str
    model: str
    submissions: tuple[Submission, ...]
    prompts: tuple[Prompt, ...]
    num_choices: int
    is_stream: bool
    has_usage: bool
    has_details: bool
    created: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the two kinds of completion name differently.

    Args:
        max_tokens: Most new tokens; None for the default.
        default_tokens: Which is this; None for all that there is room for.
        max_tokens_param: What a client calls it.
        logprobs: As in `SamplingParams`.
        prompt_logprobs: Likewise, wanted for an echo; None otherwise.
    """

    max_tokens: int | None
    default_tokens: int | None
    max_tokens_param: str
    logprobs: int | None
    prompt_logprobs: int | None = None


def check_call(body: GenerationRequest, num_prompts: int, settings: ServerSettings) -> None:
    """Check what needs no look at the prompts.

    Raises:
        UnknownModelError: Another model is named than the served one.
        FieldError: Two fields contradict each other, or more choices are asked for than one call
            may have.
    """
    if body.model != settings.model_name:
        raise UnknownModelError(body.model, settings.model_name)
    body.check_together()
    num_choices = num_prompts * (body.n or 1)
    if num_choices > settings.max_choices:
        raise FieldError(
            "n",
            f"a call has at most {settings.max_choices} choices; got {num_choices}, {num_prompts} "
            f"prompts with n = {body.n or 1}",
            hint="make several calls",
        )


def build_call(
    llm: LLM,
    settings: ServerSettings,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    wishes: Wishes,
    response_id: str,
) -> Call:
    """Return what a body asks for; checks all but what only the engine knows.

    Raises:
        ConfigError: A sampling parameter is out of range or contradicts another.
        RequestError: Something else does not fit.
    """
    num_choices = body.n or 1
    wanted = body.speculation
    reference_ids = _reference_ids(llm, body)
    submissions: list[Submission] = []
    for prompt in prompts:
        params = sampling_params(body, wishes, _max_tokens(llm, settings, prompt, wishes))
        _check_grammar(params, settings.max_grammar_bytes)
        for seed in _seeds(body.seed, num_choices):
            submissions.append(
                Submission(
                    request_id=f"{response_id}-{len(submissions)}",
                    prompt_ids=prompt.token_ids,
                    params=dataclasses.replace(params, seed=seed),
                    drafters=_drafters(body),
                    max_nodes=wanted.max_nodes if wanted else None,
                    reference_ids=reference_ids,
                    deadline_s=body.timeout_s,
                )
            )
    return Call(
        response_id=response_id,
        model=settings.model_name,
        submissions=tuple(submissions),
        prompts=tuple(prompt for prompt in prompts for _ in range(num_choices)),
        num_choices=num_choices,
        is_stream=bool(body.stream),
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
        has_details=bool(wanted and wanted.details),
        created=int(time.time()),
    )


def sampling_params(body: GenerationRequest, wishes: Wishes, max_new_tokens: int) -> SamplingParams:
    """Return a body's sampling parameters, without a seed.

    Raises:
        ConfigError: One is out of range or contradicts another.
        FieldError: Two fields ask for a grammar.
    """
    given = {name: getattr(body, name) for name in _SAME & set(type(body).model_fields)}
    values = {name: value for name, value in given.items() if value is not None}
    values.setdefault("temperature", DEFAULT_TEMPERATURE)
    if values.get("top_k") == -1:
        values["top_k"] = 0
    schema = _json_schema(body)
    if schema is not None:
        values["json_schema"] = schema
    if wishes.prompt_logprobs is not None:
        values["prompt_logprobs"] = max(wishes.prompt_logprobs, body.prompt_logprobs or 0)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=body.min_tokens or 0,
        logprobs=wishes.logprobs,
        **values,
    )


def content_text(content: Content) -> str:
    """Return the text of a content, whose parts are lines of their own."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _check_grammar(params: SamplingParams, max_bytes: int) -> None:
    """Refuse a grammar whose compilation would take long, or more of the stack than there is."""
    for name in ("json_schema", "regex", "lark"):
        num_bytes = len((getattr(params, name) or "").encode())
        if num_bytes > max_bytes:
            raise FieldError(
                name,
                f"{name} has at most {max_bytes} bytes here; got {num_bytes}",
                hint="give a simpler one, or ask for a part at a time",
            )


def _json_schema(body: GenerationRequest) -> Any:
    """Return the JSON schema that a body's fields ask for, None if none does."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return body.json_schema
    if body.json_schema is not None:
        raise FieldError(
            "json_schema",
            f"json_schema and response_format {wanted.type} are both given",
            hint="give one of them",
        )
    if isinstance(wanted, JsonSchemaFormat):
        return wanted.json_schema.schema_
    return {"type": "object"}


def _max_tokens(llm: LLM, settings: ServerSettings, prompt: Prompt, wishes: Wishes) -> int:
    """Return the most new tokens of a choice."""
    limit = settings.max_new_tokens_limit
    if wishes.max_tokens is not None:
        if limit is not None and wishes.max_tokens > limit:
            raise FieldError(
                wishes.max_tokens_param,
                f"this server gives at most {limit} tokens per choice; got {wishes.max_tokens}",
                hint=f"lower {wishes.max_tokens_param}",
            )
        return wishes.max_tokens
    room = wishes.default_tokens or _room(llm, len(prompt.token_ids))
    return room if limit is None else min(room, limit)


def _room(llm: LLM, num_prompt_ids: int) -> int:
    """Return how many tokens context and KV cache have left, at least 1."""
    capacity = llm.engine.cache.num_blocks * BLOCK_SIZE
    return max(1, min(llm.info.context_limit, capacity) - num_prompt_ids)


def _seeds(seed: int | None, num_choices: int) -> Iterator[int]:
    """Yield a seed per choice; the first is the given one."""
    first = secrets.randbits(64) if seed is None else seed % MAX_SEED
    return (derive_seed(first, index) for index in range(num_choices))


def _drafters(body: GenerationRequest) -> tuple[str, ...] | None:
    wanted = body.speculation
    if wanted is None:
        return None
    if not wanted.enabled:
        return ()
    return None if wanted.drafters is None else tuple(wanted.drafters)


def _reference_ids(llm: LLM, body: GenerationRequest) -> Sequence[int]:
    text = content_text(body.prediction.content) if body.prediction else ""
    if text and llm.tokenizer is None:
        raise RequestError(
            "a prediction needs the model's tokenizer, and it has none", hint="leave it out"
        )
    return llm.encode(text) if text else ()


__all__ = ["Call", "Prompt", "Wishes", "build_call", "check_call", "content_text"]
