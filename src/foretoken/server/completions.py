"""POST /v1/completions: prompts go on, as texts or as token ids."""

from __future__ import annotations

from typing import Any

from foretoken.engine.llm import LLM
from foretoken.engine.logprobs import TokenLogprobs
from foretoken.engine.request import Emission, Request
from foretoken.server.params import Call, Prompt, Wishes, build_call
from foretoken.server.responses import ChoiceWriter, Kind, finish_word
from foretoken.server.schemas import CompletionRequest
from foretoken.server.settings import ServerSettings
from foretoken.server.token_texts import TextCursor, TokenTexts, finite

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def listed_prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    """Return the prompts of a body, of which there may be one or several."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return prompt  # type: ignore[return-value]


def completion_call(
    llm: LLM, settings: ServerSettings, body: CompletionRequest, response_id: str
) -> Call:
    """Return what a body asks for; raises what `build_call` does."""
    wishes = Wishes(
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_MAX_TOKENS,
        max_tokens_param="max_tokens",
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    prompts = [_prompt(llm, given, has_echo=bool(body.echo)) for given in listed_prompts(body)]
    return build_call(llm, settings, body, prompts, wishes, response_id)


def _prompt(llm: LLM, given: str | list[int], *, has_echo: bool) -> Prompt:
    text = given if isinstance(given, str) else ""
    if has_echo and not text and llm.tokenizer is not None:
        text = llm.tokenizer.decode(given)  # type: ignore[arg-type]
    return Prompt(token_ids=llm.encode(given), text=text if has_echo else "")


class CompletionWriter(ChoiceWriter):
    """Writes choices of text completions; a chunk has the form of a whole choice."""

    def __init__(self, call: Call, index: int, request: Request, texts: TokenTexts) -> None:
        super().__init__(call, index, request, texts)
        self._has_echo = bool(self.prompt.text)
        self._cursor = TextCursor(texts)

    def chunk(self, emission: Emission) -> dict[str, Any] | None:
        """Return what an emission adds to a streamed choice; None if that is nothing."""
        if not self.has_news(emission):
            return None
        extras = self.extras(emission)
        logprobs = self._logprobs(emission) if self.reports_logprobs else None
        begin = self.prompt.text if self.is_first else ""
        self.is_first = False
        return {
            "index": self.index,
            "text": begin + emission.text,
            "logprobs": logprobs,
            "finish_reason": finish_word(emission),
            **extras,
        }

    def whole(self, emission: Emission) -> dict[str, Any]:
        """Return the choice, given all its emissions as one."""
        return self.chunk(emission) or {}

    def _logprobs(self, emission: Emission) -> dict[str, Any]:
        found = _Logprobs(self.texts, self._cursor)
        if self.is_first and self._has_echo:
            prompt_ids = self.request.prompt_ids
            spelled = TextCursor(self.texts)
            for token_id in prompt_ids:
                spelled.advance(token_id)
            # Some tokenizers begin a text with a space that is not there.
            self._cursor.offset = len(self.prompt.text) - spelled.offset
            found.add(prompt_ids[0], None)
            for entry in self.request.prompt_logprobs:
                found.add(entry.token_id, entry)
        for entry in emission.logprobs:
            found.add(entry.token_id, entry)
        return found.columns


class _Logprobs:
    """Log-probabilities in the form of text completions: columns, a place per token.

    Args:
        texts: The model's tokens.
        cursor: Where in the text the next token begins.
    """

    def __init__(self, texts: TokenTexts, cursor: TextCursor) -> None:
        self._texts = texts
        self._cursor = cursor
        self.columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add(self, token_id: int, entry: TokenLogprobs | None) -> None:
        """Add a token; nothing is known of how likely the first one of a prompt was."""
        name = self._texts.name(token_id)
        top = None
        if entry is not None:
            pairs = [*entry.top, (token_id, entry.logprob)]
            top = {self._texts.name(other): finite(logprob) for other, logprob in pairs}
        self.columns["tokens"].append(name)
        self.columns["token_logprobs"].append(None if entry is None else finite(entry.logprob))
        self.columns["top_logprobs"].append(top)
        self.columns["text_offset"].append(max(0, self._cursor.offset))
        self._cursor.advance(token_id)


COMPLETION = Kind(
    prefix="cmpl",
    whole_object="text_completion",
    chunk_object="text_completion",
    make_writer=CompletionWriter,
)

__all__ = ["COMPLETION", "CompletionWriter", "completion_call", "listed_prompts"]
