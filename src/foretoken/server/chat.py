"""POST /v1/chat/completions: a conversation goes on, as the model's chat template writes it."""

from __future__ import annotations

from typing import Any

from foretoken.engine.llm import LLM
from foretoken.engine.request import Emission
from foretoken.errors import RequestError
from foretoken.server.params import Call, Prompt, Wishes, build_call, content_text
from foretoken.server.responses import ChoiceWriter, Kind, finish_word
from foretoken.server.schemas import ChatRequest, Message
from foretoken.server.settings import ServerSettings


def chat_call(llm: LLM, settings: ServerSettings, body: ChatRequest, response_id: str) -> Call:
    """Return what a body asks for; raises what `build_call` does."""
    renamed = body.max_completion_tokens is not None
    wishes = Wishes(
        max_tokens=body.max_completion_tokens if renamed else body.max_tokens,
        default_tokens=None,
        max_tokens_param="max_completion_tokens" if renamed else "max_tokens",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    text = _rendered(llm, settings, body)
    if not text or llm.tokenizer is None:
        raise RequestError("the chat template writes nothing", hint="give messages with text")
    prompt = Prompt(token_ids=llm.tokenizer.encode(text, adds_special=False), text="")
    return build_call(llm, settings, body, [prompt], wishes, response_id)


def _rendered(llm: LLM, settings: ServerSettings, body: ChatRequest) -> str:
    """Return the conversation as the chat template writes it."""
    if llm.tokenizer is None:
        raise RequestError(
            "chat needs a tokenizer, and the model has none",
            hint="use /v1/completions with token ids",
        )
    return llm.tokenizer.render_chat(
        [_message(message) for message in body.messages],
        template=settings.chat_template,
        opens_turn=body.add_generation_prompt is not False,
        continues_last=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
    )


def _message(message: Message) -> dict[str, str]:
    rendered = {"role": message.role, "content": content_text(message.content)}
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


class ChatWriter(ChoiceWriter):
    """Writes choices of chat completions."""

    def chunk(self, emission: Emission) -> dict[str, Any] | None:
        """Return what an emission adds to a streamed choice; None if that is nothing."""
        if not self.has_news(emission):
            return None
        delta = {"role": "assistant"} if self.is_first else {}
        if emission.text or self.is_first:
            delta["content"] = emission.text
        return self._choice(emission, {"delta": delta})

    def whole(self, emission: Emission) -> dict[str, Any]:
        """Return the choice, given all its emissions as one."""
        message = {"role": "assistant", "content": emission.text, "refusal": None}
        return self._choice(emission, {"message": message})

    def _choice(self, emission: Emission, said: dict[str, Any]) -> dict[str, Any]:
        extras = self.extras(emission)
        self.is_first = False
        logprobs = None
        if self.reports_logprobs:
            entries = self.texts.chat_logprobs(emission.logprobs)
            logprobs = {"content": entries, "refusal": None}
        return {
            "index": self.index,
            **said,
            "logprobs": logprobs,
            "finish_reason": finish_word(emission),
            **extras,
        }


CHAT = Kind(
    prefix="chatcmpl",
    whole_object="chat.completion",
    chunk_object="chat.completion.chunk",
    make_writer=ChatWriter,
)

__all__ = ["CHAT", "ChatWriter", "chat_call"]
